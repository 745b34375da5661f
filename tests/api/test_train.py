"""`train`: the training script as a function, with data of a Python program, callbacks and interrupts."""

import inspect
import signal
import subprocess
import sys
import threading
import types
from pathlib import Path
from typing import Any, get_type_hints

import pandas
import pytest

import modeling_miniclip
from modeling_miniclip import DataError, TrainResult, UsageError, train
from modeling_miniclip.api.clean_process import clean_process
from modeling_miniclip.api.describe_keywords import OWN, keywords_module
from modeling_miniclip.api.keywords import TrainingKeywords
from modeling_miniclip.training.command_line.arguments import TrainingArguments
from tests.helpers.forks import free_port
from tests.helpers.runs import ROOT, assert_same_weights, environment, flags, metrics_of
from train_miniclip import main


def keywords(folder: Path, **values: Any) -> dict[str, Any]:
    """Keyword arguments of a tiny run in `folder`, see [`flags`]."""
    given = dict(word.removeprefix("--").split("=", 1) for word in flags(folder, **values))
    return given | {"output_dir": str(folder / "python")}


def frame(folder: Path) -> pandas.DataFrame:
    """The scenes of [`flags`] as a DataFrame with the names of image files."""
    flags(folder)  # writes them
    return pandas.read_csv(folder / "scenes" / "captions.csv")


# --- the same code as the script ----------------------------------------------------------------------------------


def test_a_frame_gives_the_weights_of_the_script(tmp_path: Path, without_finish: None) -> None:
    main(flags(tmp_path, num_train_epochs=1))
    given = keywords(tmp_path, num_train_epochs=1, image_dir=tmp_path / "scenes" / "Images")
    given["dataset"] = frame(tmp_path)
    result = train(**given)
    assert_same_weights(tmp_path / "run" / "export", result.export, tolerance=0)
    times = ("seconds", "pairs_per_second")
    script, python = ([{name: value for name, value in line.items() if name not in times} for line in metrics_of(run)]
                      for run in (tmp_path / "run", tmp_path / "python"))  # fmt: skip
    assert python == script
    assert str(tmp_path) not in (result.export / "README.md").read_text(encoding="utf-8")


def test_wrong_arguments_have_the_messages_of_flags(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="unknown flag '--batchsize'; did you mean --batch_size?"):
        train("a.csv", tmp_path / "out", batchsize=3)  # type: ignore[call-arg]
    with pytest.raises(UsageError, match="--freeze: invalid choice: 'all'"):
        train("a.csv", tmp_path / "out", freeze="all")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="validation: only datasets to train on have weights"):
        train("a.csv", tmp_path / "out", validation={"b.csv": 1.0})
    assert not (tmp_path / "out").exists()


def test_validation_may_have_the_name_of_its_flag(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="int: expected a DataFrame"):
        train("a.csv", tmp_path / "out", validation_dataset=5)  # type: ignore[call-arg]


def test_keywords_are_written_from_the_flags() -> None:
    path = ROOT / "modeling_miniclip" / "api" / "keywords.py"
    assert path.read_text(encoding="utf-8") == keywords_module(), "run `make docs`"
    hints = get_type_hints(TrainingKeywords)
    assert set(hints) | set(OWN) == set(get_type_hints(TrainingArguments))
    shown = inspect.signature(train).parameters
    assert list(shown)[:2] == ["dataset", "output_dir"] and set(hints) <= set(shown)
    assert shown["max_grad_norm"].default == 1.0
    assert "early_stopping_patience: stop after N validations" in (train.__doc__ or "")


def test_a_notebook_completes_keywords() -> None:
    completer = pytest.importorskip("IPython.core.completer").IPCompleter(namespace={"train": train}, use_jedi=False)
    completer.text_until_cursor = "result = train(df, batch_"
    assert completer.python_func_kw_matches("batch_") == ["batch_size="]


# --- callbacks and interrupts -------------------------------------------------------------------------------------


def test_callbacks_see_steps_and_end_the_run(tmp_path: Path, without_finish: None) -> None:
    steps: list[tuple[int, bool]] = []
    validations: list[tuple[int, float]] = []

    def on_step(step: int, metrics: dict[str, float]) -> None:
        steps.append((step, "loss" in metrics))

    def on_validation(step: int, metrics: dict[str, float]) -> bool:
        validations.append((step, metrics["rsum"]))
        return step < 2

    given = keywords(tmp_path, eval_steps=1, logging_steps=2)
    result = train(**given, on_step=on_step, on_validation=on_validation)
    assert steps == [(1, False), (2, True)]
    assert [step for step, _ in validations] == [1, 2]
    assert [line["step"] for line in result.history if line["split"] == "validation"] == [1, 2]
    assert result.metrics["rsum"] in [pytest.approx(value, rel=1e-5) for _, value in validations]
    assert (result.output_dir / "checkpoints" / "step-00000002").is_dir(), "it can be resumed"


def test_a_step_ends_a_run_outside_the_main_thread(tmp_path: Path, without_finish: None) -> None:
    found: list[TrainResult] = []
    thread = threading.Thread(
        target=lambda: found.append(train(**keywords(tmp_path), on_step=lambda step, _: step < 2))
    )
    thread.start()
    thread.join(60)
    (result,) = found
    assert [line["step"] for line in result.history if line["split"] == "validation"] == [2]
    assert result.best_step == 2


def test_an_interrupt_returns_the_best_model(tmp_path: Path, without_finish: None) -> None:
    handler = signal.getsignal(signal.SIGINT)
    result = train(**keywords(tmp_path), on_step=lambda step, _: signal.raise_signal(signal.SIGINT))
    assert result.best_step == 1 and (result.export / "model.safetensors").is_file()
    assert signal.getsignal(signal.SIGINT) is handler


def test_a_second_run_at_the_same_time_is_an_error() -> None:
    with clean_process(), pytest.raises(UsageError, match="is running in another thread of this process; wait"):
        train()


# --- several processes --------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_notebook_launcher_trains_with_two_processes(tmp_path: Path) -> None:
    given = keywords(tmp_path, max_steps=2, image_dir=tmp_path / "scenes" / "Images") | {"dataset": None}
    code = f"""
import pandas
from accelerate import notebook_launcher
from modeling_miniclip import TrainResult, train

captions = pandas.read_csv({str(tmp_path / "scenes" / "captions.csv")!r})
arguments = {given!r} | dict(dataset=captions)

def run():
    train(**arguments)

notebook_launcher(run, num_processes=2, use_port="{free_port()}")
print(TrainResult.load(arguments["output_dir"]))
"""
    done = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "on 2 x cpu" in done.stdout and "the model of step 2 of 2" in done.stdout
    assert metrics_of(tmp_path / "python")[-1]["step"] == 2


# --- the guide ----------------------------------------------------------------------------------------------------


def test_pruning_with_optuna_as_the_guide_shows_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    guide = (ROOT / "docs" / "python.md").read_text(encoding="utf-8")
    (code,) = [block.split("```")[0] for block in guide.split("```python\n")[1:] if "import optuna" in block]
    assert len([line for line in code.splitlines() if line.strip() and "import " not in line]) <= 10
    reported: list[tuple[str, int]] = []
    pruned: list[str] = []
    trained: list[dict[str, Any]] = []

    class Trial:
        def __init__(self, number: int):
            self.number = number

        def suggest_float(self, name: str, low: float, high: float, log: bool) -> float:
            return low

        def report(self, value: float, step: int) -> None:
            reported.append((f"{self.number}: {value}", step))

        def should_prune(self) -> bool:
            return self.number == 1

    class TrialPruned(Exception):
        pass

    class Study:
        def optimize(self, objective: Any, n_trials: int) -> None:
            for number in range(2):
                try:
                    assert objective(Trial(number)) == 7.0
                except TrialPruned:
                    pruned.append(str(number))

    def fake_train(*data: Any, on_validation: Any, **flags: Any) -> Any:
        trained.append(flags)
        go_on = on_validation(5, {"rsum": 7.0})
        assert go_on is (len(trained) == 1)
        return types.SimpleNamespace(metrics={"rsum": 7.0})

    study = types.ModuleType("optuna")
    study.create_study = lambda **_: Study()  # type: ignore[attr-defined]
    study.TrialPruned = TrialPruned  # type: ignore[attr-defined]
    study.pruners = types.SimpleNamespace(MedianPruner=object)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "optuna", study)
    monkeypatch.setattr(modeling_miniclip, "train", fake_train)
    exec(code, {})
    assert reported == [("0: 7.0", 5), ("1: 7.0", 5)] and pruned == ["1"]
    assert all(set(flags) <= set(get_type_hints(TrainingKeywords)) for flags in trained)
