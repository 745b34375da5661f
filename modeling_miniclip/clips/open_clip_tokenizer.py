"""open_clip's tokenizers: what they do to a text before they split it becomes part of the tokenizer's file."""

import gzip
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from tokenizers import Regex, normalizers
from transformers import AutoTokenizer, CLIPTokenizer, PreTrainedTokenizerFast

from ..errors import MiniClipError
from ..evaluation.encoders import OPEN_CLIP
from .source import Source, file_of

VOCABULARY = "bpe_simple_vocab_16e6.txt.gz"  # of CLIP, a file of open_clip's package
MERGES = 49152 - 256 - 2
START, END = "<|startoftext|>", "<|endoftext|>"
SPECIAL = ("bos_token", "eos_token", "unk_token", "pad_token", "cls_token", "sep_token", "mask_token")

# What ftfy and html.unescape do to ordinary captions. They also repair text decoded in the wrong way, which does not.
REPAIRS: dict[Any, str] = {
    "&amp;": "&", "&lt;": "<", "&gt;": ">", "&quot;": '"', "&#39;": "'", "&apos;": "'", "&nbsp;": " ",
    Regex("[\u02bc\u2018-\u201b]"): "'", Regex("[\u201c-\u201f]"): '"',
    "\ufb00": "ff", "\ufb01": "fi", "\ufb02": "fl", "\ufb03": "ffi", "\ufb04": "ffl", "\ufb06": "st",
    **{chr(0xFF01 + i): chr(0x21 + i) for i in range(94)},  # full-width letters
    Regex("[\\x00-\\x08\\x0e-\\x1f\\x7f\ufeff]"): "",
}  # fmt: skip
PUNCTUATION = Regex("[!\"#$%&'()*+,\\-./:;<=>?@\\[\\\\\\]^`{|}~]")


def tokenizer_of(source: Source, text_cfg: dict[str, Any]) -> Any:
    """The tokenizer that gives the ids of open_clip's.

    Args:
        source: a folder or repository with `open_clip_config.json`, or `open_clip:ARCHITECTURE/CHECKPOINT`.
        text_cfg: part of the model's configuration.

    Raises:
        ValueError: the tokenizer does something that has no counterpart.
        MiniClipError: open_clip has to be installed, because the source has no vocabulary.
    """
    options = text_cfg.get("tokenizer_kwargs") or {}
    if text_cfg.get("tokenizer_mode") or options.keys() - {"clean"}:
        what = {"tokenizer_mode": text_cfg.get("tokenizer_mode")} | options
        raise ValueError(f"{what} of its tokenizer has no counterpart")
    name = text_cfg.get("hf_tokenizer_name")
    if name:
        place = source.name if Path(source.name).is_dir() else name
        tokenizer = AutoTokenizer.from_pretrained(place, trust_remote_code=False)
    else:
        tokenizer = _clip_tokenizer(source)
    if not tokenizer.is_fast:
        raise ValueError(f"its tokenizer {type(tokenizer).__name__} has no tokenizer.json, which is needed here")
    return cleaning_first(tokenizer, options.get("clean") or ("whitespace" if name else "lower"))


def cleaning_first(tokenizer: Any, clean: str) -> PreTrainedTokenizerFast:
    """A tokenizer that cleans each text before it does what it did.

    Args:
        tokenizer: tokenizer with a `tokenizer.json`.
        clean: `"whitespace"`, `"lower"` or `"canonicalize"` (without punctuation), as in open_clip.

    Raises:
        ValueError: another value of `clean`.
    """
    steps = [normalizers.Replace(old, new) for old, new in REPAIRS.items()]
    spaces = [normalizers.Replace(Regex(r"\s+"), " "), normalizers.Strip()]
    kinds = {
        "whitespace": spaces,
        "lower": [*spaces, normalizers.Lowercase()],
        "canonicalize": [
            normalizers.Replace("_", " "), normalizers.Replace(PUNCTUATION, ""), normalizers.Lowercase(), *spaces
        ],
    }  # fmt: skip
    if clean not in kinds:
        raise ValueError(f"clean {clean!r} of its tokenizer has no counterpart; expected one of {', '.join(kinds)}")
    backend = tokenizer.backend_tokenizer
    own = [backend.normalizer] if backend.normalizer is not None else []
    backend.normalizer = normalizers.Sequence([*steps, normalizers.NFC(), *kinds[clean], *own])
    special = {name: getattr(tokenizer, name) for name in SPECIAL if getattr(tokenizer, name, None) is not None}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **special)


def _clip_tokenizer(source: Source) -> Any:
    if not source.name.startswith(OPEN_CLIP) and (file_of(source, "tokenizer.json") or file_of(source, "vocab.json")):
        return AutoTokenizer.from_pretrained(source.name, trust_remote_code=False)
    package = find_spec("open_clip")
    if package is None:
        raise MiniClipError(
            f"{source.flag} {source.name}: has no tokenizer.json, and open_clip, which has CLIP's vocabulary, is not "
            "installed: pip install open-clip-torch"
        )
    return clip_tokenizer(Path(package.submodule_search_locations[0], VOCABULARY))  # type: ignore[index]


def clip_tokenizer(vocabulary: Path) -> CLIPTokenizer:
    """CLIP's tokenizer, from the file of its merges."""
    lines = gzip.decompress(vocabulary.read_bytes()).decode("utf-8").split("\n")
    merges = [tuple(line.split()) for line in lines[1 : MERGES + 1]]
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    rest = len(set(range(256)) - set(printable))
    letters = [*map(chr, printable), *(chr(256 + i) for i in range(rest))]
    pieces = [*letters, *(f"{letter}</w>" for letter in letters), *map("".join, merges), START, END]
    return CLIPTokenizer(vocab={piece: i for i, piece in enumerate(pieces)}, merges=list(merges))
