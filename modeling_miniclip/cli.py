"""The `miniclip` command: the flags of each subcommand, and a function that imports and runs its code."""

import argparse
import os
import shlex
import shutil
import sys
import tempfile
import time
import warnings
import webbrowser
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from .utils.interrupts import exit_when_terminated, quit_at_interrupt

if Path(sys.argv[0]).stem == "miniclip":
    os.environ.setdefault("PYTORCH_ENABLE_MPS_FALLBACK", "1")  # what a Mac's GPU lacks is computed on its CPU
    quit_at_interrupt()

from . import __version__
from .errors import EXIT_CODES, DataError, UsageError
from .training.command_line.arguments import TrainingArguments
from .utils.commands import run_command
from .utils.processes import process_rank


@dataclass(frozen=True)
class Command:
    """A subcommand: one line of help, a function that declares its flags, and one that runs it."""

    help: str
    declare: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int | None]  # returns an exit code, None for 0


TRAINING_HELP: dict[str, str] = {field.name: field.metadata["help"] for field in fields(TrainingArguments)}
ANY_CLIP = (
    "an export, or any CLIP of transformers or open_clip: folder, Hub repository or open_clip:ARCHITECTURE/CHECKPOINT"
)
DATASET_FLAGS = (
    "image_dir", "image_column", "caption_column", "allow_outside_images", "validation_fraction", "seed",
    "caption_template",
)  # fmt: skip


def declare_caption_columns(parser: argparse.ArgumentParser) -> None:
    """Flags that say how a caption file is read, with the help texts of training."""
    parser.add_argument(
        "--image_column", default="image", metavar="NAME", help=f"{TRAINING_HELP['image_column']} (image)"
    )
    parser.add_argument(
        "--caption_column", default="caption", metavar="NAME", help=f"{TRAINING_HELP['caption_column']} (caption)"
    )
    parser.add_argument("--allow_outside_images", action="store_true", help=TRAINING_HELP["allow_outside_images"])


def declare_shard_cache(parser: argparse.ArgumentParser) -> None:
    """How many gigabytes of remote shards are kept."""
    default = TrainingArguments.shard_cache_gb
    parser.add_argument(
        "--shard_cache_gb", type=float, default=default, metavar="GB",
        help=f"{TRAINING_HELP['shard_cache_gb']} ({default:g})",
    )  # fmt: skip


def choose_shard_cache(limit_gb: float) -> None:
    """Set `--shard_cache_gb` for this process and those that it starts."""
    from .data.shards.remote_shards import use_cache

    if limit_gb < 0:
        raise UsageError(f"--shard_cache_gb must be at least 0, not {limit_gb:g}")
    use_cache(limit_gb=limit_gb)


def declare_dataset(parser: argparse.ArgumentParser) -> None:
    """The flags of [`DATASET_FLAGS`], and of the cache of shards."""
    declare_shard_cache(parser)
    parser.add_argument("--image_dir", metavar="DIR", help=TRAINING_HELP["image_dir"])
    declare_caption_columns(parser)
    parser.add_argument(
        "--validation_fraction", type=float, default=0.1, metavar="F",
        help=f"{TRAINING_HELP['validation_fraction']}; use the same value as in training (0.1)",
    )  # fmt: skip
    parser.add_argument(
        "--seed",
        type=int,
        default=0,
        metavar="N",
        help="random seed of the validation split; use the same value as in training (0)",
    )
    parser.add_argument(
        "--caption_template", default=TrainingArguments.caption_template, metavar="TEXT",
        help=f"{TRAINING_HELP['caption_template']} ({TrainingArguments.caption_template})",
    )  # fmt: skip


def declare_cache(parser: argparse.ArgumentParser) -> None:
    """The folder of the tables that datasets are read into."""
    parser.add_argument("--dataset_cache_dir", metavar="DIR", help=TRAINING_HELP["dataset_cache_dir"])


def dataset_options(args: argparse.Namespace) -> dict[str, Any]:
    """Values of [`DATASET_FLAGS`] and of [`declare_cache`], as keyword arguments of `load_captions`."""
    return {name: getattr(args, name) for name in DATASET_FLAGS} | {"cache_dir": args.dataset_cache_dir}


def declare_truncation(parser: argparse.ArgumentParser, more: str = "") -> None:
    """How many dimensions of embeddings are kept."""
    parser.add_argument(
        "--truncate_dim", type=int, metavar="N",
        help=f"keep only the first N dimensions of the embeddings, normalised again{more} (all)",
    )  # fmt: skip


def declare_absolute_paths(parser: argparse.ArgumentParser, more: str = "") -> None:
    """Whether HTML pages show where files are on this machine."""
    parser.add_argument(
        "--absolute_paths", action="store_true",
        help=f"HTML pages show where the files are on this machine{more} (only names and folders of the source)",
    )  # fmt: skip


def declare_check(parser: argparse.ArgumentParser) -> None:
    """Flags of `miniclip check`."""
    parser.add_argument(
        "dataset", metavar="DATASET", help="caption file, folder, shards or Hub dataset, as for training"
    )
    parser.add_argument("--validation_dataset", nargs="+", metavar="DATASET", help=TRAINING_HELP["validation_dataset"])
    declare_dataset(parser)
    parser.add_argument("--revision", help=TRAINING_HELP["dataset_revision"])
    parser.add_argument(
        "--batch_size",
        type=int,
        default=32,
        metavar="N",
        help="images per training step, to estimate the number of false negatives (32)",
    )
    parser.add_argument(
        "--tokenizer", metavar="NAME", help="text tower or export; also counts the captions that it would truncate"
    )
    parser.add_argument("--num_workers", type=int, default=2, metavar="N", help="processes that decode images (2)")
    parser.add_argument("--quick", action="store_true", help="check that image files exist, but do not open them")
    parser.add_argument(
        "--fix", metavar="OUT.csv", help="also write a CSV with only the valid rows, and a report next to it"
    )
    parser.add_argument("--json", action="store_true", help="print the report as JSON")


def run_check(args: argparse.Namespace) -> int:
    """Print the report. The exit code is 1 if there are problems."""
    from .data.checking.check import check_command

    return check_command(args)


def declare_push(parser: argparse.ArgumentParser) -> None:
    """Flags of `miniclip push`."""
    parser.add_argument("export", metavar="MODEL", help=ANY_CLIP)
    parser.add_argument("repo_id", metavar="USER/NAME", help="repository on the Hub, created if missing")
    parser.add_argument(
        "--private", action="store_true", help="create a private repository; fail if it exists and is public"
    )
    parser.add_argument("--revision", help="branch to commit to, created if missing (main)")


def run_push(args: argparse.Namespace) -> None:
    """Upload an export, or the conversion of another CLIP, and print the address of the commit."""
    from .clips.exported import as_export
    from .hub.push import push

    folder = as_export(args.export, "MODEL")
    print(f"pushed: {push(folder, args.repo_id, private=args.private, revision=args.revision)}")


def declare_convert(parser: argparse.ArgumentParser) -> None:
    """Flags of `miniclip convert`."""
    parser.add_argument("source", metavar="MODEL", help=ANY_CLIP)
    parser.add_argument("folder", metavar="DIR", help="new folder to write the converted model to")
    parser.add_argument(
        "--to", choices=("transformers", "open_clip"), help="library that loads the result with its own code "
        "(default: write an export)",
    )  # fmt: skip


def run_convert(args: argparse.Namespace) -> None:
    """Convert the model, and print how much the logits differ after it is loaded by the other library."""
    from .clips.convert import convert

    done = convert(args.source, args.folder, args.to)
    print(f"written: {done.folder}")
    if done.difference is not None:
        print(f"largest difference of the logits under {args.to}: {done.difference:.1e} of the largest logit")
    if done.rounds:
        print(f"{args.to} rounds odd margins in another way: crops of some pictures are one pixel apart")


def declare_export(parser: argparse.ArgumentParser) -> None:
    """Flags of `miniclip export`."""
    parser.add_argument("export", metavar="MODEL", help=f"{ANY_CLIP}; an export for --code")
    kind = parser.add_mutually_exclusive_group(required=True)
    kind.add_argument("--onnx", metavar="DIR", help="new folder for the ONNX files and an example")
    kind.add_argument(
        "--code", metavar="DIR", help="new folder for a copy of an earlier export with the code of this release"
    )
    parser.add_argument(
        "--dataset", help="captioned images on which to compare ONNX with PyTorch (scenes; --quantize needs it)"
    )
    parser.add_argument("--images", type=int, default=200, metavar="N", help="compare on at most N images (200)")
    parser.add_argument(
        "--tolerance", type=float, default=1e-4, metavar="X",
        help="largest allowed difference in any component of an embedding (0.0001)",
    )  # fmt: skip
    parser.add_argument("--quantize", choices=("int8",), help="numbers of the ONNX files (default: float32)")
    parser.add_argument(
        "--tolerance_rsum", type=float, metavar="PERCENT",
        help="how far --quantize may lower rsum on --dataset (1)",
    )  # fmt: skip
    declare_dataset(parser)
    declare_cache(parser)
    parser.add_argument("--revision", help=TRAINING_HELP["dataset_revision"])


def run_export(args: argparse.Namespace) -> None:
    """Write the ONNX files and print how much they differ from PyTorch, or copy an export with new code."""
    check_quantization(args)
    if args.code is not None:
        from .hub.renew_code import renew_code

        print(f"written: {renew_code(args.export, args.code)}")
        return
    from .clips.exported import as_export
    from .hub.onnx_export import export_onnx, format_onnx_report
    from .hub.onnx_quantize import format_quantization
    from .utils.performance import keep_freed_memory

    keep_freed_memory()
    options = {**dataset_options(args), "revision": args.revision}
    quantize = args.quantize is not None
    if args.tolerance_rsum is not None:
        options["tolerance_rsum"] = args.tolerance_rsum
    source = as_export(args.export, "MODEL")
    report = export_onnx(source, args.onnx, args.dataset or "scenes", args.images, args.tolerance, quantize, **options)
    print(format_onnx_report(report))
    if quantize:
        print(format_quantization(report["quantization"]))
    for path in sorted(Path(args.onnx).iterdir()):
        print(f"{path.stat().st_size / 1e6:10.3f} MB  {path}")


def check_quantization(args: argparse.Namespace) -> None:
    """Check that the flags of int8 files belong together.

    Raises:
        UsageError: one of them would be ignored, or the dataset is missing that decides about the numbers.
    """
    if args.quantize is None:
        if args.tolerance_rsum is not None:
            raise UsageError("--tolerance_rsum needs --quantize int8: add it, or leave out --tolerance_rsum")
    elif args.code is not None:
        raise UsageError("--quantize belongs to --onnx: --code copies the model as it is; leave out --quantize")
    elif args.dataset is None:
        raise UsageError(
            "--quantize needs --dataset, captioned images like those that the model is for: they set the ranges of "
            "the numbers and show what is lost; --dataset scenes for a model of the demo"
        )


def declare_index(parser: argparse.ArgumentParser) -> None:
    """Flags of `miniclip index`."""
    parser.add_argument("model", metavar="MODEL", help=ANY_CLIP)
    parser.add_argument(
        "sources", metavar="SOURCE", nargs="*",
        help="folder of images, caption file, shards, or local or Hub dataset; several are allowed "
        "(default: the sources that the index was built from)",
    )  # fmt: skip
    parser.add_argument(
        "-o", "--output", metavar="INDEX", required=True, help="folder of the index to build or update"
    )
    parser.add_argument(
        "--remove",
        metavar="SOURCE",
        action="append",
        default=[],
        help="drop the images of this source; can be repeated",
    )
    parser.add_argument("--overwrite", action="store_true", help="rebuild an existing index from scratch")
    parser.add_argument(
        "--dtype", choices=("float32", "float16", "int8"), help="number format of the embeddings (float32)"
    )
    declare_truncation(parser)
    parser.add_argument(
        "--neighbours",
        choices=("auto", "exact", "approximate"),
        help="search method (auto: approximate from 500,000 images on, if FAISS is installed)",
    )
    parser.add_argument(
        "--reduced", action="store_true",
        help="decode JPEGs that are at least twice as large as needed at reduced size: faster, with slightly other "
        "embeddings",
    )  # fmt: skip
    parser.add_argument("--batch_size", type=int, default=32, metavar="N", help="images per forward pass (32)")
    parser.add_argument("--num_workers", type=int, metavar="N", help="threads that read images (one per core)")
    declare_caption_columns(parser)
    declare_shard_cache(parser)


def run_index(args: argparse.Namespace) -> None:
    """Build or update an index and print what was done. The exit code is 1 if images or folders could not be read."""
    from .data.columns import ColumnNames
    from .data.skipped import describe_skipped
    from .search.update import update_index
    from .utils.performance import keep_freed_memory

    exit_when_terminated()  # finished embeddings are kept
    keep_freed_memory()
    columns = ColumnNames(args.image_column, args.caption_column, args.allow_outside_images)
    report = update_index(
        args.output, args.sources, args.model, remove=args.remove, overwrite=args.overwrite, dtype=args.dtype,
        columns=columns, batch_size=args.batch_size, num_workers=args.num_workers, neighbours=args.neighbours,
        truncate_dim=args.truncate_dim, reduced=args.reduced or None,
    )  # fmt: skip
    if process_rank() > 0:  # only one process reports
        return
    if report.missing:
        gone = ", ".join(report.missing)
        print(f"{args.output}: {report.images} images, now of {args.model}; not updated, as these are gone: {gone}")
        return
    done = f"{report.encoded} encoded, {report.reused} reused, {report.dropped} dropped"
    print(f"{args.output}: {report.images} images; {done}; {report.seconds:.1f} s")
    if report.skipped or report.unlisted:
        total = report.images - report.kept + len(report.skipped)
        text = f"{describe_skipped(report.skipped, total, report.unlisted)}; "
        text += f"of the images indexed there before, {report.kept} are kept. " if report.kept else ""
        raise DataError(f"{text}Replace or delete what cannot be read, or give access to it, and index again")


def declare_search(parser: argparse.ArgumentParser) -> None:
    """Flags of `miniclip search`."""
    parser.add_argument("index", metavar="INDEX", help="folder of an index, built by `miniclip index`")
    parser.add_argument("words", metavar="WORDS", nargs="?", help="text to search for")
    parser.add_argument("--image", metavar="FILE", help="find images similar to this one; can be combined with WORDS")
    parser.add_argument(
        "--image_weight",
        type=float,
        default=0.5,
        metavar="W",
        help="weight of the image when combined with WORDS, 0 to 1 (0.5)",
    )
    parser.add_argument(
        "--not", dest="without", metavar="WORDS", action="append", default=[], help="text to avoid; can be repeated"
    )
    parser.add_argument("-k", type=int, default=10, metavar="N", help="number of images to find (10)")
    parser.add_argument("--folder", metavar="DIR", help="only images in this folder or below it")
    parser.add_argument("--since", metavar="DATE", help="only images from this date on: 2024, 2024-07 or 2024-07-14")
    parser.add_argument("--until", metavar="DATE", help="only images up to and including this date")
    parser.add_argument(
        "--caption_contains", metavar="WORDS", help="only images whose captions contain each of these words"
    )
    parser.add_argument("--split", metavar="NAME", help="only images of this split, such as train")
    parser.add_argument(
        "--cutoff", metavar="CHANCE",
        help="leave out images if unrelated captions score as high more often than this, from 0 to 1, or auto "
        "(by default, they are marked)",
    )  # fmt: skip
    declare_truncation(parser, "; the search is then exact")
    parser.add_argument("--exact", action="store_true", help="exact search, even if there is an approximate index")
    parser.add_argument(
        "--verify", action="store_true", help="compare checksums of all files, even if the index is large"
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--html", metavar="FILE", help="write an HTML page of the results that works offline")
    declare_absolute_paths(parser, "; its pictures then open their files")
    parser.add_argument("--open", action="store_true", help="open the page of results in the browser")


def run_search(args: argparse.Namespace) -> None:
    """Print the matches and the time each part took; write an HTML page if asked to."""
    start = time.perf_counter()
    from .search.filters import EntryFilter
    from .search.formatting import CHANCE_NOTE, format_count, format_json, format_table
    from .search.query import Query, Timing, search_index
    from .search.unrelated import cutoff_of

    timing = Timing(imports=time.perf_counter() - start)
    if args.k < 1:
        raise UsageError(f"-k {args.k}: expected at least 1 image")
    if args.html and not Path(args.html).absolute().parent.is_dir():
        raise UsageError(f"--html {args.html}: the folder {Path(args.html).parent} does not exist; create it first")
    if args.cutoff is not None:
        cutoff_of(args.cutoff)
    query = Query(args.words, args.image, args.image_weight, args.without)
    chosen = EntryFilter(args.folder, args.since, args.until, args.caption_contains, args.split)
    index, matches = search_index(
        args.index, query, args.k, chosen, timing, args.exact, args.verify or None, args.truncate_dim, args.cutoff
    )
    if args.json:
        print(format_json(index, query, matches, timing))
    else:
        if matches:
            print(format_table(index, matches, shutil.get_terminal_size().columns))
        if any(match.chance is not None for match in matches):
            print(CHANCE_NOTE)
        seconds = (
            f"imports {timing.imports:.2f} s, loading the model {timing.load:.2f} s, search {timing.search:.3f} s"
        )
        print(f"{format_count(index, matches, args.cutoff)}; {seconds}")
    if args.html or args.open:
        from .search.page.results_page import write_results_page

        page = Path(args.html or tempfile.mkdtemp(prefix="miniclip-")) / ("" if args.html else "results.html")
        write_results_page(page, index, str(query), matches, args.absolute_paths)
        print(f"written: {page}", file=sys.stderr)
        if args.open:
            webbrowser.open(page.resolve().as_uri())


def declare_duplicates(parser: argparse.ArgumentParser) -> None:
    """Flags of `miniclip duplicates`."""
    parser.add_argument("index", metavar="INDEX", help="folder of an index, built by `miniclip index`")
    parser.add_argument(
        "--threshold",
        type=float,
        metavar="X",
        help="smallest cosine similarity of near-identical images (by default, one that distinct images rarely reach)",
    )
    parser.add_argument("--across_splits", action="store_true", help="only groups that span several splits")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a list")


def run_duplicates(args: argparse.Namespace) -> None:
    """Print groups of identical and near-identical images."""
    from .search.duplicates import default_threshold, find_duplicates
    from .search.formatting import format_groups, format_groups_json
    from .search.index import ImageIndex

    index = ImageIndex.open(args.index, verify=True)
    threshold = default_threshold(index) if args.threshold is None else args.threshold
    groups = find_duplicates(index, threshold, args.across_splits)
    print(format_groups_json(index, groups) if args.json else format_groups(index, groups, threshold))


def declare_eval(parser: argparse.ArgumentParser) -> None:
    """Flags of `miniclip eval`."""
    parser.add_argument("model", metavar="MODEL", help=ANY_CLIP)
    parser.add_argument(
        "dataset", metavar="DATASET", nargs="?",
        help="captioned images, or a folder with one subfolder per class (the folder of --linear_probe)",
    )  # fmt: skip
    parser.add_argument(
        "--split",
        metavar="NAME",
        help="train, validation or test, or all for the images of all splits (the last split that the dataset has)",
    )
    parser.add_argument("--baseline", metavar="MODEL", help="second model, to compare on the same queries")
    parser.add_argument(
        "--output_dir",
        metavar="DIR",
        help="folder for the scores, all queries and a page of failures (by default, nothing is written)",
    )
    declare_absolute_paths(parser)
    parser.add_argument(
        "--order_test", nargs="?", const=True, default=False, metavar="FILE",
        help="also measure how often a caption scores above the same one with words swapped, or the true captions of "
        "a file above its false ones (CSV or JSON of ARO, SugarCrepe, Winoground or your own)",
    )  # fmt: skip
    parser.add_argument(
        "--linear_probe", metavar="FOLDER",
        help="also train logistic regressions on features of images, of all in these class folders and of 1, 4 and 16 "
        "per class; needs scikit-learn",
    )  # fmt: skip
    declare_truncation(parser, ", of both models")
    parser.add_argument(
        "--templates", nargs="+", metavar="TEXT", help="sentences with {} for the class name (an ensemble of eight)"
    )
    parser.add_argument("--class_names", metavar="FILE", help="JSON file that maps class folders to names")
    parser.add_argument("--batch_size", type=int, default=32, metavar="N", help="images per forward pass (32)")
    parser.add_argument("--json", action="store_true", help="print the scores as JSON")
    declare_dataset(parser)
    declare_cache(parser)
    parser.add_argument("--revision", help=TRAINING_HELP["dataset_revision"])


def run_eval(args: argparse.Namespace) -> None:
    """Evaluate and print the scores. The exit code is 1 if images or folders could not be read."""
    import json

    from .evaluation.eval_sets import load_eval_set, probe_sets
    from .evaluation.evaluate import evaluate_model, format_report
    from .evaluation.linear_probe import check_probe
    from .utils.performance import keep_freed_memory

    if args.batch_size < 1:
        raise UsageError(f"--batch_size must be at least 1, not {args.batch_size}")
    if args.truncate_dim is not None and args.truncate_dim < 1:
        raise UsageError(f"--truncate_dim must be at least 1, not {args.truncate_dim}")
    keep_freed_memory()
    probe = None
    if args.linear_probe is not None:
        check_probe()
        probe = probe_sets(args.linear_probe, args.validation_fraction, args.seed, args.class_names)
    if args.dataset is not None:
        options = {**dataset_options(args), "revision": args.revision}
        data = load_eval_set(args.dataset, args.split, args.class_names, **options)
    elif probe is not None:
        data = probe["test"]
    else:
        raise UsageError("DATASET is missing: name captioned images or class folders, or --linear_probe FOLDER")
    templates = args.templates or ["ensemble"]
    report = evaluate_model(
        args.model,
        data,
        baseline=args.baseline,
        output_dir=args.output_dir,
        templates=templates[0] if len(templates) == 1 else templates,
        batch_size=args.batch_size,
        progress=sys.stderr.isatty(),
        order_test=args.order_test,
        image_dir=args.image_dir,
        probe=probe,
        truncate_dim=args.truncate_dim,
        absolute_paths=args.absolute_paths,
    )
    print(json.dumps(report, indent=2) if args.json else format_report(report))
    if "warning" in report:
        raise DataError(f"{report['warning']}; the scores are those of the others")


def declare_mine(parser: argparse.ArgumentParser) -> None:
    """Flags of `miniclip mine`."""
    parser.add_argument("model", metavar="MODEL", help=ANY_CLIP)
    parser.add_argument("dataset", metavar="DATASET", help="captioned images, as for training")
    parser.add_argument(
        "--output", metavar="FILE", required=True, help="new .csv with the names of the images, or .parquet with them"
    )
    parser.add_argument("--num_negatives", type=int, default=5, metavar="N", help="wrong captions per image (5)")
    parser.add_argument(
        "--range_min", type=int, default=5, metavar="N", help="skip the N nearest captions, which may be right (5)"
    )
    parser.add_argument("--range_max", type=int, default=200, metavar="N", help="look at the N nearest captions (200)")
    parser.add_argument(
        "--relative_margin", type=float, default=0.05, metavar="F",
        help="a wrong caption is at most 1 - F times as similar as the image's own ones are on average (0.05)",
    )  # fmt: skip
    parser.add_argument("--batch_size", type=int, default=32, metavar="N", help="images per forward pass (32)")
    declare_dataset(parser)
    declare_cache(parser)
    parser.add_argument("--revision", help=TRAINING_HELP["dataset_revision"])


def run_mine(args: argparse.Namespace) -> None:
    """Mine hard negatives and print how to train with them."""
    from .search.mine import MiningRules, mine
    from .utils.performance import keep_freed_memory

    rules = MiningRules(args.num_negatives, args.range_min, args.range_max, args.relative_margin)
    if args.batch_size < 1:
        raise UsageError(f"--batch_size must be at least 1, not {args.batch_size}")
    keep_freed_memory()
    options = {**dataset_options(args), "revision": args.revision}
    found = mine(args.model, args.dataset, args.output, rules, args.batch_size, sys.stderr.isatty(), **options)
    for reason in found.unreadable:
        print(f"skipped: {reason}", file=sys.stderr)
    argv = ["train-miniclip", "--dataset", args.output, "--hard_negatives", "column"]
    argv += [] if found.image_dir is None else ["--image_dir", str(found.image_dir)]
    print(
        f"{args.output}: {found.negatives:,} wrong captions of {found.mined:,} of {found.images:,} training images\n"
        f"  train with them: {shlex.join(argv)}"
    )


def declare_app(parser: argparse.ArgumentParser) -> None:
    """Flags of `miniclip app`."""
    parser.add_argument("index", metavar="INDEX", help="folder of an index, built by `miniclip index`")
    parser.add_argument("--port", type=int, metavar="N", help="port of the page (the first free one from 7860 on)")
    parser.add_argument("--open", action="store_true", help="open the page in the browser")


def run_app_command(args: argparse.Namespace) -> None:
    """Serve the page until it is interrupted."""
    # Before NumPy is loaded: as for torch, one thread for each of many small computations at once.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    from .search.page.app import run_app

    exit_when_terminated()  # the temporary folder is deleted
    run_app(args.index, args.port, args.open)


def declare_space(parser: argparse.ArgumentParser) -> None:
    """Flags of `miniclip space`."""
    parser.add_argument("export", metavar="MODEL", help=ANY_CLIP)
    parser.add_argument("folder", metavar="DIR", help="new folder to write the Space to")
    parser.add_argument(
        "--images", metavar="SOURCE", nargs="+", required=True, help="sources of images, as for `miniclip index`"
    )
    declare_shard_cache(parser)
    parser.add_argument("--title", default="Image search", metavar="TEXT", help="title of the page (Image search)")


def run_space(args: argparse.Namespace) -> None:
    """Write the Space and print how to publish it. The exit code is 1 if images or folders could not be read."""
    from .data.skipped import describe_skipped
    from .search.space import write_space

    report = write_space(args.export, args.folder, args.images, args.title)
    print(f"{args.folder}: a Space with {report.images:,} images\n  try it:   python {args.folder}/app.py")
    print(f"  share it: hf upload USER/NAME {args.folder} --repo-type space")
    if report.skipped or report.unlisted:
        total = report.images + len(report.skipped)
        raise DataError(f"{describe_skipped(report.skipped, total, report.unlisted)}; the Space has the others")


COMMANDS = {
    "app": Command("search an index in the browser, on this machine only", declare_app, run_app_command),
    "check": Command("find problems in captioned images", declare_check, run_check),
    "convert": Command("convert a published CLIP, or a model into one", declare_convert, run_convert),
    "duplicates": Command("find identical and near-identical images in an index", declare_duplicates, run_duplicates),
    "eval": Command("evaluate a model, alone or against a baseline", declare_eval, run_eval),
    "export": Command("export a model to ONNX and check it, or copy it with new code", declare_export, run_export),
    "index": Command("build an index of images, or update one", declare_index, run_index),
    "mine": Command("find wrong captions that a model finds hard, to train with them", declare_mine, run_mine),
    "push": Command("upload an exported model to the Hugging Face Hub", declare_push, run_push),
    "search": Command("search an index by text, by image or both", declare_search, run_search),
    "space": Command("write a Gradio Space that searches your images", declare_space, run_space),
}


def build_parser() -> argparse.ArgumentParser:
    """Build the parser with all subcommands."""
    parser = argparse.ArgumentParser(
        prog="miniclip", description="Search, evaluate, export and share your MiniCLIP model.", epilog=EXIT_CODES
    )
    parser.add_argument("--version", action="version", version=f"miniclip {__version__}")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, command in COMMANDS.items():
        subparser = subparsers.add_parser(name, help=command.help, description=command.help)
        command.declare(subparser)
        subparser.add_argument("--debug", action="store_true", help="show the traceback of an error")
        subparser.set_defaults(run=command.run)
    return parser


def _show_warning(message: Warning | str, *where: Any, **more: Any) -> None:
    """Print a warning as one line, like an error. Replaces `warnings.showwarning`."""
    print(f"warning: {message}", file=sys.stderr)


def cli(argv: list[str] | None = None) -> int:
    """Run a subcommand.

    Returns:
        The exit code, see [`run_command`][modeling_miniclip.utils.commands.run_command]; 1 if `check` finds problems.
    """

    def command() -> int | None:
        args = build_parser().parse_args(argv)
        if hasattr(args, "shard_cache_gb"):
            choose_shard_cache(args.shard_cache_gb)
        result: int | None = args.run(args)
        return result

    with warnings.catch_warnings():
        warnings.showwarning = _show_warning
        return run_command(command, "--debug" in (sys.argv if argv is None else argv))
