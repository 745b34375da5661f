"""A model as a folder that others can load: weights, processor, code and a measured card; and its push."""

import os
from importlib.metadata import version
from pathlib import Path
from typing import Any

from .errors import UsageError
from .files import replaced_folder
from .modeling_miniclip import MiniClipModel
from .processing_miniclip import MiniClipProcessor
from .resources import packaged_file

# Libraries whose version decides whether a result can be reproduced.
REPORTED_LIBRARIES = ("torch", "transformers", "timm", "datasets", "accelerate", "albumentations")


def export(
    model: MiniClipModel, processor: MiniClipProcessor, folder: str | os.PathLike, card: dict[str, Any] | None = None
) -> Path:
    """Write everything that `from_pretrained` needs elsewhere, with or without this package installed there.

    The folder appears complete or not at all; one that is there is replaced.

    Args:
        model: weights go to `model.safetensors`.
        processor: that belongs to it.
        folder: to write.
        card: what `README.md` tells: `name`, `metrics` (`loss` and those of `retrieval_metrics`, on validation),
            `arguments` of the run, `data` (`name`, and `splits` with numbers of `images` and `captions`). What is left
            out, the card says was not measured or recorded.

    Returns:
        The folder.
    """
    from . import auto  # noqa: F401  (from now on the code travels with the model)

    target = Path(folder)
    model.config.architectures = [type(model).__name__]
    model.config.auto_map = {"AutoModelForZeroShotImageClassification": "modeling_miniclip.MiniClipModel"}
    with replaced_folder(target) as fresh:
        model.save_pretrained(fresh)
        processor.save_pretrained(fresh)
        write_card(fresh / "README.md", model, card or {})
    return target


def write_card(path: Path, model: MiniClipModel, values: dict[str, Any]) -> None:
    """Fill `model_card.md` and write it, with the metadata that the Hub reads."""
    from huggingface_hub import EvalResult, ModelCard, ModelCardData

    metrics = values.get("metrics") or {}
    data = values.get("data") or {}
    name = values.get("name") or "MiniCLIP"
    results = [
        EvalResult(
            task_type="image-text-retrieval",
            dataset_type=str(data.get("name", "unknown")),
            dataset_name=str(data.get("name", "unknown")),
            dataset_split="validation",
            metric_type=key,
            metric_name=key.replace("_", " "),
            metric_value=round(value, 2),
        )
        for key, value in metrics.items()
        if "R@" in key or key == "rsum"
    ]
    card_data = ModelCardData(
        library_name="transformers",
        pipeline_tag="zero-shot-image-classification",
        tags=["miniclip", "clip", "image-text-retrieval", "timm"],
        model_name=name,
        eval_results=results or None,
    )
    card = ModelCard.from_template(
        card_data,
        template_path=str(packaged_file("model_card.md")),
        name=name,
        config=model.config,
        vision_name=_vision_name(model),
        text_name=model.config.text_config.name_or_path or model.config.text_config.model_type,
        parameters=sum(p.numel() for p in model.parameters()),
        metrics=metrics,
        arguments=values.get("arguments") or {},
        data=data,
        versions={library: version(library) for library in REPORTED_LIBRARIES},
    )
    path.write_text(str(card), encoding="utf-8")


def _vision_name(model: MiniClipModel) -> str:
    cfg = getattr(model.config.vision_config, "pretrained_cfg", None) or {}
    tag = cfg.get("tag")
    return model.config.vision_config.architecture + (f".{tag}" if tag else "")


def prepare_push(repo_id: str | None, output_dir: str | os.PathLike, private: bool = False) -> str:
    """Create the repository before any long work, so that a missing token or right is known at once.

    Args:
        repo_id: `user/name`, or a name alone for the token's user; None takes the output folder's name.
        output_dir: of the run.
        private: whether a new repository is private.

    Returns:
        The full repository id.

    Raises:
        UsageError: no token, no right to write, or no connection.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError

    name = repo_id or Path(output_dir).resolve().name
    try:
        return HfApi().create_repo(name, private=private, exist_ok=True).repo_id
    except (LocalTokenNotFoundError, HfHubHTTPError, ConnectionError, OSError) as error:
        raise UsageError(
            f"--push_to_hub: cannot create or write {name}: {error}. Log in with `hf auth login` (a token with write "
            "access), check --hub_model_id, or train without --push_to_hub and push later"
        ) from error


def push(
    folder: str | os.PathLike, repo_id: str, private: bool = False, message: str = "Upload MiniCLIP model"
) -> str:
    """Upload an export as one commit.

    Args:
        folder: of [`export`].
        repo_id: `user/name`; created if it is not there.
        private: whether a new repository is private.
        message: of the commit.

    Returns:
        Address of the commit.
    """
    from huggingface_hub import HfApi

    if not (Path(folder) / "config.json").is_file():
        raise UsageError(f"{folder} is not an export: it has no config.json")
    api = HfApi()
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    return str(api.upload_folder(folder_path=str(folder), repo_id=repo_id, commit_message=message).commit_url)
