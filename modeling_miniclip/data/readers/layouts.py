"""Where the captions of a folder are: caption files, one for each split, metadata files, annotations."""

import os
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

from ..listing import is_hidden, subfolders
from ..splits import SPLITS, WORD, split_of_name, split_words
from .image_files import image_folder
from .text_files import is_json_list

CAPTION_FILES = ("captions.csv", "captions.txt", "Flickr8k.token.txt", "Flickr8k_text/Flickr8k.token.txt")
METADATA_FILES = ("metadata.csv", "metadata.jsonl")
TABLES = (".csv", ".tsv", ".jsonl")  # suffixes of caption files, one for each split
SAVED_DATASETS = ("dataset_dict.json", "state.json")  # of DatasetDict.save_to_disk and Dataset.save_to_disk
CAPTION_WORDS = frozenset({"", "captions", "caption", "annotations", "data", "dataset"})


def find_caption_file(folder: Path) -> Path | None:
    """The caption file of a folder of captioned images, by its usual names."""
    return next((folder / name for name in CAPTION_FILES if (folder / name).is_file()), None)


def find_caption_files(path: Path) -> list[tuple[str | None, Path]]:
    """The caption files of a source, each with its split, or with None if the name of the file says nothing.

    Args:
        path: a caption file; or a folder with one under a usual name, or with one for each split, such as `train.csv`
            and `val.csv`, or `coco_train.jsonl` and `coco_test.jsonl`.

    Returns:
        The caption files in the order of the splits; empty if the folder has none.
    """
    if path.is_file():
        return [(None, path)]
    single = find_caption_file(path)
    if single is not None:
        return [(None, single)]
    families: dict[str, list[tuple[str | None, Path]]] = defaultdict(list)  # by what their names have in common
    for file in sorted(path.iterdir()):
        split = split_of_name(file.name)
        if split is not None and not is_hidden(file.name) and file.is_file() and _is_table(file):
            words = [word for word in WORD.findall(file.stem.lower()) if word not in split_words(file.name)]
            families[" ".join(words)].append((split, file))
    known = [files for words, files in families.items() if words in CAPTION_WORDS or len({s for s, _ in files}) > 1]
    return sorted(next(iter(known), []), key=lambda pair: (SPLITS.index(str(pair[0])), pair[1]))


def _is_table(file: Path) -> bool:
    return file.suffix.lower() in TABLES or (file.suffix.lower() == ".json" and is_json_list(file))


def find_images(
    root: Path, split: str | None, names: Iterable[str], image_dir: str | os.PathLike | None
) -> tuple[Path, Path]:
    """The folder that the image names of a file are relative to, and the one that they may not leave.

    Images of one split may be in a folder of their own; the folder's name is then a part of the image's name.

    Args:
        root: folder of the file.
        split: split of all images in the file, if it has one.
        names: names of some of the images.
        image_dir: folder of the images, if they are not next to the file.
    """
    base = Path(image_dir).expanduser() if image_dir is not None else root
    if image_dir is not None and (split is None or not base.is_dir()):
        return base, base
    places = [base, *(base / name for name in ("Images", "images") if (base / name).is_dir())]
    own = [
        place.relative_to(base).joinpath(name).as_posix()
        for place in (places if split is not None else ())
        for name in subfolders(place)
        if split_of_name(name) == split
    ]
    folder = image_folder(base, names, own)
    return folder, base if folder.relative_to(base).as_posix() in own else folder


def find_coco_files(folder: Path) -> list[Path]:
    """COCO's caption annotations in a folder, or in its folder `annotations`: `captions_train2017.json` and others."""
    for place in (folder, folder / "annotations"):
        files = sorted(file for file in place.glob("captions_*.json") if file.is_file())
        if files:
            return files
    return []


def find_karpathy_file(folder: Path) -> Path | None:
    """One of Karpathy's splits in a folder, such as `dataset_flickr8k.json`; None if there is none, or several."""
    files = [
        file for file in folder.glob("dataset_*.json") if file.name not in ("dataset_dict.json", "dataset_info.json")
    ]
    return files[0] if len(files) == 1 else None
