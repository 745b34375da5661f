"""Upstream's common tests of processors."""

import unittest
from typing import Any
from unittest.mock import patch

from transformers_tests.test_processing_common import ProcessorTesterMixin

from modeling_miniclip import MiniClipProcessor
from tests.helpers.towers import tiny_processor


class MiniClipProcessorTest(ProcessorTesterMixin, unittest.TestCase):
    processor_class = MiniClipProcessor

    @classmethod
    def _setup_image_processor(cls) -> Any:
        return tiny_processor().image_processor

    @classmethod
    def _setup_tokenizer(cls) -> Any:
        return tiny_processor().tokenizer

    def test_processor_from_and_save_pretrained_as_nested_dict(self) -> None:
        # It compares with an image processor that upstream loads by itself, with the torchvision backend.
        def get_processor(test: Any) -> MiniClipProcessor:
            return MiniClipProcessor.from_pretrained(test.tmpdirname, backend="torchvision")

        with patch.object(type(self), "get_processor", get_processor):
            super().test_processor_from_and_save_pretrained_as_nested_dict()
