"""Any tower, image size, tokenizer and folder: a model that works with its own processor, or an error beforehand."""

import shutil
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModel, TimmWrapperConfig

from modeling_miniclip import MiniClipModel, MiniClipProcessor, encode_texts, export
from modeling_miniclip.inference.loading import processor_of
from modeling_miniclip.processing_miniclip import image_processor_from_timm
from modeling_miniclip.training.command_line.arguments import TrainingArguments
from modeling_miniclip.training.towers.create_model import create_model
from modeling_miniclip.training.towers.try_towers import try_towers
from tests.helpers.fuzzing import cases, fuzz, result_or_error
from tests.helpers.towers import CAPTIONS, PIXELS, VISION, save_decoder, tiny_config, tiny_model, tiny_processor

WORDS = [word for row in CAPTIONS for word in row[0].split()]
# Some take any size, some only multiples of 32, some only the size that they were made for.
ARCHITECTURES = [*VISION, "dla46_c"]


@cache
def model_with(family: str) -> MiniClipModel:
    torch.manual_seed(0)
    if family in VISION:
        return tiny_model(family)
    config = tiny_config()
    size = {"input_size": [3, PIXELS, PIXELS], "crop_pct": 1.0}
    config.vision_config = TimmWrapperConfig(architecture=family, pretrained_cfg=size)
    return MiniClipModel(config).eval()


@cases(24, 1000)
def test_image_sizes_work_or_are_rejected(record_property: Any, count: int) -> None:
    @fuzz(count, record_property)
    @given(family=st.sampled_from(ARCHITECTURES), size=st.integers(8, 130), augmented=st.booleans())
    def check(family: str, size: int, augmented: bool) -> None:
        model, processor = model_with(family), tiny_processor()
        flags = {"train_image_size" if augmented else "image_size": size}
        processor.image_processor = image_processor_from_timm(model.config.vision_config, flags.get("image_size"))
        _, message = result_or_error(try_towers, model, processor, TrainingArguments(**flags))
        if not message:
            with torch.no_grad():
                assert model(pixel_values=torch.zeros(1, 3, size, size)).image_embeds.isfinite().all()
            return
        assert f"{size}x{size}" in message and f"--{next(iter(flags))} {size}" in message
        for other in message.rpartition("it takes: ")[2].split(", "):
            with torch.no_grad():
                model(pixel_values=torch.zeros(1, 3, int(other), int(other)))

    check()


@cases(16, 400)
def test_texts_of_any_decoder_differ(
    tiny_towers: tuple[Path, Path], tmp_path: Path, record_property: Any, count: int
) -> None:
    tokens = st.dictionaries(st.sampled_from(("eos_token", "bos_token")), st.just("<|endoftext|>"))

    @fuzz(count, record_property)
    @given(
        tokens=st.tuples(tokens, st.sampled_from(({}, {"pad_token": "<pad>"}))).map(lambda two: two[0] | two[1]),
        pooling=st.sampled_from((None, "cls", "mean", "last")),
        side=st.sampled_from(("left", "right")),
        texts=st.lists(
            st.lists(st.sampled_from(WORDS), min_size=1, max_size=4), min_size=2, max_size=3, unique_by=tuple
        ),
    )
    def check(tokens: dict[str, str], pooling: str | None, side: str, texts: list[list[str]]) -> None:
        decoder = save_decoder(tmp_path / "gpt2", **tokens)
        flags = {"vision_model": str(tiny_towers[0]), "text_model": str(decoder), "text_pooling": pooling}
        made, message = result_or_error(create_model, TrainingArguments(**flags), CAPTIONS)
        if made is None:
            assert pooling == "cls" or not ({"eos_token", "pad_token"} & tokens.keys()), message
            return
        model, processor = made
        words = ["a " + " ".join(text) for text in texts]
        processor.tokenizer.padding_side = side
        together = encode_texts(model, words, processor, progress=False)
        alone = torch.cat([encode_texts(model, [text], processor, progress=False) for text in words])
        torch.testing.assert_close(together, alone, atol=1e-5, rtol=0)
        assert (together @ together.T).fill_diagonal_(0).max() < 1 - 1e-6, "two texts have one embedding"

    check()


@cases(12, 200)
def test_model_of_any_folder_has_its_own_processor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, record_property: Any, count: int
) -> None:
    places = ["", "large", "small/first"]
    for number, place in enumerate(reversed(places)):  # the root is written last, as an export replaces its folder
        processor = tiny_processor()
        processor.image_processor.image_mean = [0.1 * (3 - number)] * 3
        export(tiny_model(), processor, tmp_path / "parts" / str(number))
        shutil.copytree(tmp_path / "parts" / str(number), tmp_path / "clip" / place, dirs_exist_ok=True)

    @fuzz(count, record_property)
    @given(
        place=st.sampled_from(places),
        auto_class=st.sampled_from((MiniClipModel, AutoModel)),
        relative=st.booleans(),
        whole=st.booleans(),
    )
    def check(place: str, auto_class: Any, relative: bool, whole: bool) -> None:
        monkeypatch.chdir(tmp_path)
        folder = "clip" if relative else str(tmp_path / "clip")
        where = {"subfolder": place} if place and not whole else {}
        model = auto_class.from_pretrained(f"{folder}/{place}" if whole else folder, **where)
        monkeypatch.chdir("/")
        own = MiniClipProcessor.from_pretrained(tmp_path / "clip" / place)
        assert processor_of(model).image_processor.to_dict() == own.image_processor.to_dict()

    check()
