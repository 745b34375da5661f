"""Fill in the template `model_card.md`, and rename a card."""

import json
import re
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..configuration_miniclip import tower_name
from ..errors import printable
from ..evaluation.metrics import ZERO_SHOT_METRICS
from ..modeling_miniclip import MiniClipModel
from ..utils.files import replace_text
from ..utils.resources import packaged_file

if TYPE_CHECKING:
    from jinja2 import Template

# Libraries whose versions matter for reproducing a result.
REPORTED_LIBRARIES = ("torch", "transformers", "timm", "datasets", "accelerate", "albumentations")

POOLINGS = {
    "cls": "first token",
    "mean": "mean over the tokens",
    "last": "last token",
    "eos": "end token",
    "pooler": "pooled by the tower itself",
}

# Example of the inference widget on the Hub, with the picture that the cards of CLIP models use.
WIDGET = {
    "src": "https://huggingface.co/datasets/mishig/sample_images/resolve/main/cat-dog-music.png",
    "candidate_labels": "a cat and a dog, people making music, a bowl of soup",
    "example_title": "Cat and dog",
}


def add_section(path: Path, title: str, text: str, before: str) -> None:
    """Add a section to a card that [`write_card`] wrote.

    Args:
        path: file of the card.
        title: its heading, of third level.
        text: Markdown below it.
        before: line of the card, a heading, that it comes before.
    """
    card = path.read_text(encoding="utf-8")
    start = card.index(f"\n{before}\n") + 1
    replace_text(path, f"{card[:start]}### {title}\n\n{text}\n\n{card[start:]}")


def write_card(path: Path, model: MiniClipModel, values: dict[str, Any]) -> None:
    """Fill in `model_card.md` and write it, with the metadata that the Hub reads.

    Args:
        path: file to write.
        model: model that the card describes.
        values: the `card` argument of [`export`].
    """
    from huggingface_hub import ModelCard, ModelCardData

    data = values.get("data") or {}
    metrics = values.get("metrics") or {}
    by_length = values.get("by_length") or {}
    repository = values.get("name") or "miniclip"
    towers = (model.config.vision_config, model.config.text_config)
    is_timm = towers[0].model_type == "timm_wrapper"
    base_models = [config.name_or_path for config in towers if is_hub_id(config.name_or_path)]
    card_data = ModelCardData(
        library_name="transformers",
        pipeline_tag="zero-shot-image-classification",
        license=values.get("license") or "unknown",
        metrics=["recall"] if metrics else None,
        tags=["miniclip", "clip", "image-text-retrieval", *(["timm"] if is_timm else [])],
        base_model=base_models or None,
        datasets=data.get("hub_ids") or None,
        model_name=_short(repository) if metrics else None,
        eval_results=_eval_results(metrics, data) or None,
        widget=[WIDGET],
    )
    content = _template().render(
        card_data=card_data.to_yaml(),
        title=escape_markdown(_short(repository)),
        repository=json.dumps(printable(repository), ensure_ascii=False)[1:-1],
        config=model.config,
        vision_name=_vision_name(model),
        is_timm=is_timm,
        text_pooling=POOLINGS[model.config.text_pooling],
        heads=" and ".join(dict.fromkeys(_describe_head(model.config, **head) for head in model.config.heads())),
        text_name=base_models[-1] if is_hub_id(towers[1].name_or_path) else towers[1].model_type,
        base_models=base_models,
        parameters=sum(p.numel() for p in model.parameters()),
        metrics=metrics,
        intervals=values.get("intervals") or {},
        by_length=by_length | {model.config.projection_dim: metrics} if by_length else {},
        at_start=values.get("at_start") or {},
        with_shared=values.get("with_shared"),
        retained=values.get("retained"),
        retained_at_start=values.get("retained_at_start"),
        blended=values.get("blended"),
        license=values.get("license"),
        command=inline_code(values["command"]) if values.get("command") else None,
        arguments={name: inline_code(value) for name, value in (values.get("arguments") or {}).items()},
        data=data | ({"name": inline_code(data["name"])} if data.get("name") else {}),
        versions={library: version(library) for library in REPORTED_LIBRARIES},
    )
    path.write_text(str(ModelCard(content)), encoding="utf-8")


@cache
def _template() -> "Template":
    """`model_card.md`, compiled once for all exports of a run."""
    from jinja2 import Template

    return Template(packaged_file("model_card.md").read_text(encoding="utf-8"))


def _eval_results(metrics: dict[str, float], data: dict[str, Any]) -> list[Any]:
    from huggingface_hub import EvalResult

    classified = [
        EvalResult(
            task_type="zero-shot-image-classification",
            dataset_type="unknown",
            dataset_name=data["zero_shot"]["name"],
            dataset_split=data["zero_shot"]["split"],
            metric_type="accuracy",
            metric_name=f"{key.removeprefix('zero_shot_')} accuracy",
            metric_value=round(value, 2),
        )
        for key, value in metrics.items()
        if key in ZERO_SHOT_METRICS and data.get("zero_shot")
    ]
    return classified + [
        EvalResult(
            task_type="image-text-retrieval",
            dataset_type=(data.get("hub_ids") or ["unknown"])[0],
            dataset_name=str(data.get("name") or "unknown"),
            dataset_split="validation",
            metric_type=key,
            metric_name=key.replace("_", " "),
            metric_value=round(value, 2),
        )
        for key, value in metrics.items()
        if "R@" in key or key == "rsum"
    ]


def is_hub_id(name: str | None) -> bool:
    """Whether a name is that of a repository on the Hub, and not of a local folder."""
    has_form = bool(name) and re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", str(name)) is not None
    return has_form and not Path(str(name)).exists()


def escape_markdown(text: object) -> str:
    """Text for a card, without markup, line breaks and control characters."""
    return re.sub(r"([\\`*\[\]<>|])", r"\\\1", printable(text))


def inline_code(text: object) -> str:
    """Text to put between backticks, inline or in a code block."""
    return printable(text).replace("`", "'")


def _short(repository: str) -> str:
    return repository.rpartition("/")[2]


def _describe_head(config: Any, depth: int, bias: bool, hidden: int | None, hidden_bias: bool) -> str:
    first = f"hidden layer of {hidden} units with GELU, " if hidden else ""
    if depth < 2:
        return first + ("linear" + " with bias" * bias) if depth else "none"
    return f"{first}{depth} layers with GELU, dropout {config.projection_dropout}, residual and layer norm"


def _vision_name(model: MiniClipModel) -> str:
    cfg = getattr(model.config.vision_config, "pretrained_cfg", None) or {}
    tag = cfg.get("tag")
    return tower_name(model.config.vision_config) + (f".{tag}" if tag else "")


def rename_card(text: str, repository: str) -> str:
    """Put another repository into the code sample, title and metadata of a card; other text stays as it is."""
    from huggingface_hub import ModelCard, ModelCardData

    former = re.search(r'^repository = "(.*)"$', text, flags=re.MULTILINE)
    if former is None:
        return text
    name = _short(json.loads(f'"{former[1]}"'))
    text = text.replace(former[0], f'repository = "{repository}"')
    text = re.sub(
        rf"^# {re.escape(escape_markdown(name))}$", f"# {_short(repository)}", text, count=1, flags=re.MULTILINE
    )
    card = ModelCard(text)
    assert isinstance(card.data, ModelCardData)
    if card.data.model_name == name:
        card.data.model_name = _short(repository)
    return str(card)
