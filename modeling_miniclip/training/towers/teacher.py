"""`--teacher`: another CLIP, whose similarities of the images and captions of a batch the student learns.

Its towers run once over the training images, as they are without augmentation, and their captions. These features are
kept on disk like those of frozen towers; in each step, only the teacher's heads run.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from datasets import DatasetDict
from torch import Tensor, nn

from ...clips.from_clip import load_clip
from ...clips.source import read_source
from ...configuration_miniclip import tower_name
from ...data.loading.dataset import CaptionRows, TaughtRows
from ...modeling_miniclip import MiniClipModel
from ...processing_miniclip import MiniClipProcessor
from ...utils.performance import hide_advice_for_gpus, release_freed_memory, to_channels_last
from ..command_line.arguments import TrainingArguments
from ..command_line.check_arguments import teacher_details
from ..loss.global_loss import Teacher
from ..reports.reporting import say
from .feature_cache import default_cache_dir, digest_of_tokenizer, digest_of_weights
from .features import frozen_image_features, frozen_text_features

FLAG = "--teacher"


@dataclass
class RunTeacher:
    """The teacher of a run.

    Args:
        model: the teacher, on the device of the run; after [`compute_taught`] only its heads.
        processor: its preprocessing.
        scale: inverse temperature of its similarities.
        weight: weight of the distillation.

    Attributes:
        lesson: its embeddings of the last batch.
    """

    model: MiniClipModel
    processor: MiniClipProcessor
    scale: float
    weight: float
    lesson: Teacher | None = field(default=None, init=False)

    def settings(self) -> dict[str, Any]:
        """What its embeddings depend on, for the fingerprint of a run, as long as it has its towers."""
        return {
            "weights": digest_of_weights(self.model),
            "image_processor": self.processor.image_processor.to_dict(),
            "tokenizer": digest_of_tokenizer(self.processor.tokenizer),
        }

    @torch.no_grad()
    def embed(self, chunks: Sequence[Mapping[str, Tensor]]) -> Teacher:
        """Its embeddings of this process's share of a batch.

        Args:
            chunks: chunks of the batch, or the batch alone, with `taught_image` and `taught_text`.
        """
        device = self.model.device
        images, texts = (
            torch.cat([chunk[name] for chunk in chunks]).to(device, non_blocking=device.type == "cuda")
            for name in ("taught_image", "taught_text")
        )
        output = self.model(vision_pooler_output=images, text_pooler_output=texts, return_logits=False)
        self.lesson = Teacher(output.image_embeds, output.text_embeds, self.scale, self.weight)
        return self.lesson

    def taken_out(self, loss: Tensor) -> tuple[Tensor, Tensor]:
        """The contrastive loss of the last batch, and the student's divergence from the teacher.

        Args:
            loss: this process's part of the whole loss.
        """
        assert self.lesson is not None and self.lesson.divergence is not None, "after the loss of a batch"
        return loss.detach() - self.weight * self.lesson.divergence, self.lesson.divergence


def check_teacher(arguments: TrainingArguments) -> None:
    """Check before the data are read that `--teacher` names a CLIP.

    Raises:
        ModelError: it does not.
    """
    if arguments.teacher is not None:
        read_source(arguments.teacher, FLAG)


def load_teacher(arguments: TrainingArguments, accelerator: Accelerator) -> RunTeacher | None:
    """The teacher in evaluation mode and float32; None without `--teacher`.

    Raises:
        ModelError: it cannot be loaded.
    """
    if arguments.teacher is None:
        return None
    hide_advice_for_gpus()
    with torch.random.fork_rng(devices=[]):  # dropout draws the same masks as without a teacher
        model, processor = load_clip(arguments.teacher, FLAG)
    model.eval().requires_grad_(False)
    to_channels_last(model.vision_model, accelerator.device)
    details, config = teacher_details(arguments), model.config
    temperature = details["temperature"] or 1 / model.inverse_temperature().item()
    teacher = RunTeacher(model.to(accelerator.device), processor, 1 / temperature, details["weight"] or 1.0)
    say(
        accelerator,
        f"teacher: {tower_name(config.vision_config)} + {config.text_config.model_type}, {config.projection_dim}-d, "
        f"temperature {temperature:.3g}, weight {teacher.weight:g}",
    )
    return teacher


def compute_taught(
    teacher: RunTeacher | None, splits: DatasetDict, arguments: TrainingArguments, accelerator: Accelerator
) -> TaughtRows | None:
    """Run the teacher's towers over the training split, which takes minutes; results are cached on disk.

    After that, the teacher has only its heads.
    """
    if teacher is None:
        return None
    cache_dir, train = Path(arguments.feature_cache_dir or default_cache_dir()), splits["train"]
    rows, processor = CaptionRows(train, teacher.processor), teacher.processor
    images = frozen_image_features(teacher.model, rows, 1, arguments.num_workers, cache_dir, accelerator)[0]
    texts = frozen_text_features(teacher.model, train, processor, cache_dir, accelerator)
    for tower in ("vision_model", "text_model"):
        setattr(teacher.model, tower, nn.Identity())
    release_freed_memory()
    return TaughtRows(images, texts)
