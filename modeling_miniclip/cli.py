"""The `miniclip` command. Each subcommand declares its flags here and imports what does its work when it runs."""

import argparse
import shutil
import signal
import sys
import tempfile
import time
import warnings
import webbrowser
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import EXIT_CODES, DataError, UsageError, run_command
from .training.output_dir import own_rank


@dataclass(frozen=True)
class Command:
    """A subcommand: one line of help, its flags, and what it does with them."""

    help: str
    declare: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int | None]  # an exit code other than 0, if there is one


def declare_check(parser: argparse.ArgumentParser) -> None:
    """Flags of `miniclip check`."""
    parser.add_argument("dataset", metavar="DATASET", help="as for train_miniclip.py --dataset")
    parser.add_argument("--image_dir", help="folder of the images of a CSV, if not found beside it")
    parser.add_argument("--image_column", default="image", help="column that identifies the image")
    parser.add_argument("--caption_column", default="caption", help="column with the text")
    parser.add_argument("--allow_outside_images", action="store_true", help="let a CSV name images outside image_dir")
    parser.add_argument(
        "--validation_fraction", type=float, default=0.1, help="as in training, where nothing is split"
    )
    parser.add_argument("--seed", type=int, default=0, help="of that split")
    parser.add_argument("--batch_size", type=int, default=32, help="for the expected false negatives of a step")
    parser.add_argument("--tokenizer", metavar="NAME", help="text tower or export: count the captions that it cuts")
    parser.add_argument("--num_workers", type=int, default=2, help="processes that decode images")
    parser.add_argument("--quick", action="store_true", help="look for the images, but do not open them")
    parser.add_argument("--fix", metavar="OUT.csv", help="write the rows that are in order there, and a report beside")
    parser.add_argument("--json", action="store_true", help="print all of it as JSON")


def run_check(args: argparse.Namespace) -> int:
    """Print the report; the exit code is 1 where something is wrong."""
    from .data.check import check_command

    return check_command(args)


def declare_push(parser: argparse.ArgumentParser) -> None:
    """Flags of `miniclip push`."""
    parser.add_argument("export", metavar="EXPORT", help="folder of an exported model")
    parser.add_argument("repo_id", metavar="USER/NAME", help="repository on the Hub; created if it is not there")
    parser.add_argument("--private", action="store_true", help="make a new repository private, refuse a public one")
    parser.add_argument("--revision", help="branch to commit to; created if it is not there (main)")


def run_push(args: argparse.Namespace) -> None:
    """Upload an export and print the address of the commit."""
    from .hub.push import push

    print(f"pushed: {push(args.export, args.repo_id, private=args.private, revision=args.revision)}")


# Flags that go to `load_captions`, named there alike: type and help.
DATA_FLAGS: dict[str, tuple[type, str]] = {
    "image_dir": (str, "folder of the images of a CSV, if not found beside it"),
    "image_column": (str, "column that identifies the image (image)"),
    "caption_column": (str, "column with the text (caption)"),
    "revision": (str, "commit, branch or tag of a Hub data set"),
    "validation_fraction": (float, "as in the training run, where the data set has no validation split (0.1)"),
    "seed": (int, "as in the training run, where the data set has no validation split (0)"),
}


def declare_data(parser: argparse.ArgumentParser) -> None:
    """Flags that say how a data set is read."""
    for name, (kind, text) in DATA_FLAGS.items():
        parser.add_argument(f"--{name}", type=kind, help=text)
    parser.add_argument("--allow_outside_images", action="store_true", help="let a CSV name images outside image_dir")


def data_options(args: argparse.Namespace) -> dict[str, Any]:
    """The options of `load_captions` that were given."""
    given = {name: getattr(args, name) for name in DATA_FLAGS if getattr(args, name) is not None}
    return {**given, "allow_outside_images": args.allow_outside_images}


def declare_export(parser: argparse.ArgumentParser) -> None:
    """Flags of `miniclip export`."""
    parser.add_argument("export", metavar="EXPORT", help="folder of an exported model, or a repository on the Hub")
    parser.add_argument("--onnx", metavar="DIR", required=True, help="new folder for the ONNX files and an example")
    parser.add_argument("--dataset", default="scenes", help="captioned images to compare with PyTorch on")
    parser.add_argument("--images", type=int, default=200, metavar="N", help="compare on so many of them at most")
    parser.add_argument("--tolerance", type=float, default=1e-4, help="largest difference of an embedding's component")
    declare_data(parser)


def run_export(args: argparse.Namespace) -> None:
    """Write the ONNX files and print how far they are from PyTorch."""
    from .hub.onnx_export import export_onnx, format_onnx_report
    from .utils.performance import keep_freed_memory

    keep_freed_memory()
    report = export_onnx(args.export, args.onnx, args.dataset, args.images, args.tolerance, **data_options(args))
    print(format_onnx_report(report))
    for path in sorted(Path(args.onnx).iterdir()):
        print(f"{path.stat().st_size / 1e6:10.3f} MB  {path}")


def declare_index(parser: argparse.ArgumentParser) -> None:
    """Flags of `miniclip index`."""
    parser.add_argument("model", metavar="MODEL", help="folder of an exported model, or a repository on the Hub")
    parser.add_argument("sources", metavar="SOURCE", nargs="*", help="folders of images, caption files, tar archives, "
                        "data sets here or on the Hub; none: those that the index was made of")  # fmt: skip
    parser.add_argument("-o", "--output", metavar="INDEX", required=True, help="folder of the index: new, or updated")
    parser.add_argument("--remove", metavar="SOURCE", action="append", default=[], help="drop a source's images")
    parser.add_argument("--overwrite", action="store_true", help="index anew, whatever model made what is there")
    parser.add_argument("--dtype", choices=("float32", "float16"), help="of the embeddings (float32)")
    parser.add_argument(
        "--neighbours", choices=("auto", "exact", "approximate"), help="kind of search (auto: by size)"
    )
    parser.add_argument("--batch_size", type=int, default=32, metavar="N", help="images a forward pass (32)")
    parser.add_argument("--num_workers", type=int, metavar="N", help="threads that read images (one a core)")
    parser.add_argument("--image_column", default="image", help="in caption files and data sets")
    parser.add_argument("--caption_column", default="caption", help="in caption files and data sets")
    parser.add_argument("--allow_outside_images", action="store_true", help="let a caption file name images elsewhere")


def run_index(args: argparse.Namespace) -> None:
    """Bring an index up to date and tell what was done; images that could not be read end in exit code 1."""
    from .data.caption_files import ColumnNames
    from .search.update import update_index
    from .utils.performance import keep_freed_memory

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # as Ctrl-C: what is encoded is kept
    keep_freed_memory()
    columns = ColumnNames(args.image_column, args.caption_column, args.allow_outside_images)
    report = update_index(
        args.output, args.sources, args.model, remove=args.remove, overwrite=args.overwrite, dtype=args.dtype,
        columns=columns, batch_size=args.batch_size, num_workers=args.num_workers, neighbours=args.neighbours,
    )  # fmt: skip
    if own_rank() > 0:  # of several processes one tells
        return
    done = f"{report.encoded} encoded, {report.reused} as before, {report.dropped} dropped"
    print(f"{args.output}: {report.images} images; {done}; {report.seconds:.1f} s")
    if report.skipped:
        first = ", ".join(sorted(report.skipped)[:3]) + (", ..." if len(report.skipped) > 3 else "")
        raise DataError(
            f"{len(report.skipped)} of {report.images + len(report.skipped)} images could not be read and were left "
            f"out of the index: {first}; replace or delete them and index again"
        )


def declare_search(parser: argparse.ArgumentParser) -> None:
    """Flags of `miniclip search`."""
    parser.add_argument("index", metavar="INDEX", help="folder of an index, made by `miniclip index`")
    parser.add_argument("words", metavar="WORDS", nargs="?", help="text to search for")
    parser.add_argument("--image", metavar="FILE", help="find images similar to this one; can be combined with WORDS")
    parser.add_argument(
        "--image_weight", type=float, default=0.5, help="weight of the image when combined with WORDS, 0 to 1 (0.5)"
    )
    parser.add_argument("--not", dest="without", metavar="WORDS", action="append", default=[], help="and not this")
    parser.add_argument("-k", type=int, default=10, metavar="N", help="how many images (10)")
    parser.add_argument("--folder", help="only images in it or below it")
    parser.add_argument("--since", metavar="DATE", help="only images of this time or later: 2024, 2024-07, 2024-07-14")
    parser.add_argument("--until", metavar="DATE", help="only images of this time or earlier")
    parser.add_argument(
        "--caption_contains", metavar="WORDS", help="only images whose captions contain each of these words"
    )
    parser.add_argument("--split", help="only images of this split")
    parser.add_argument("--exact", action="store_true", help="exact search, even if there is an approximate index")
    parser.add_argument("--verify", action="store_true", help="also of a large index compare all files' checksums")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--html", metavar="FILE", help="write a page with the images found; it opens without network")
    parser.add_argument("--open", action="store_true", help="show that page in the browser")


def run_search(args: argparse.Namespace) -> None:
    """Print what was found, and what took how long; write a page of it."""
    start = time.perf_counter()
    from .search.filters import EntryFilter
    from .search.formatting import format_json, format_table
    from .search.query import Query, Timing, search_index

    timing = Timing(imports=time.perf_counter() - start)
    if args.k < 1:
        raise UsageError(f"-k {args.k}: expected at least 1 image")
    if args.html and not Path(args.html).absolute().parent.is_dir():
        raise UsageError(f"--html {args.html}: there is no folder {Path(args.html).parent} to write it into")
    query = Query(args.words, args.image, args.image_weight, args.without)
    chosen = EntryFilter(args.folder, args.since, args.until, args.caption_contains, args.split)
    index, matches = search_index(args.index, query, args.k, chosen, timing, args.exact, args.verify or None)
    if args.json:
        print(format_json(index, query, matches, timing))
    else:
        print(format_table(index, matches, shutil.get_terminal_size().columns))
        own = f"imports {timing.imports:.2f} s, load of the model {timing.load:.2f} s, search {timing.search:.3f} s"
        print(f"{len(matches)} of {len(index)} images; {own}")
    if args.html or args.open:
        from .search.results_page import write_results_page

        page = Path(args.html or tempfile.mkdtemp(prefix="miniclip-")) / ("" if args.html else "found.html")
        write_results_page(page, index, str(query), matches)
        print(f"written: {page}", file=sys.stderr)
        if args.open:
            webbrowser.open(page.resolve().as_uri())


def declare_duplicates(parser: argparse.ArgumentParser) -> None:
    """Flags of `miniclip duplicates`."""
    parser.add_argument("index", metavar="INDEX", help="folder of an index, made by `miniclip index`")
    parser.add_argument("--threshold", type=float, default=0.95, help="least cosine of near-identical images (0.95)")
    parser.add_argument("--across_splits", action="store_true", help="only groups with images of several splits")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a list")


def run_duplicates(args: argparse.Namespace) -> None:
    """Print groups of images that are the same or nearly so."""
    from .search.duplicates import find_duplicates
    from .search.formatting import format_groups, format_groups_json
    from .search.index import ImageIndex

    index = ImageIndex.open(args.index, verify=True)
    groups = find_duplicates(index, args.threshold, args.across_splits)
    print(format_groups_json(index, groups) if args.json else format_groups(index, groups))


def declare_eval(parser: argparse.ArgumentParser) -> None:
    """Flags of `miniclip eval`."""
    model = "an export, any CLIP of transformers, or open_clip:ARCHITECTURE/CHECKPOINT"
    parser.add_argument("model", metavar="MODEL", help=model)
    parser.add_argument("dataset", metavar="DATASET", help="captioned images, or one folder a class")
    parser.add_argument("--split", help="train, validation or test (the last that is there)")
    parser.add_argument("--baseline", metavar="MODEL", help="another model, on the same queries")
    parser.add_argument("--output_dir", metavar="DIR", help="for figures, all queries and a page of failures")
    parser.add_argument("--templates", nargs="+", metavar="TEXT", help="sentences with {} for the class (ensemble)")
    parser.add_argument("--class_names", metavar="JSON", help="file with the words for each class folder")
    parser.add_argument("--batch_size", type=int, default=32, metavar="N", help="images a forward pass (32)")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    declare_data(parser)


def run_eval(args: argparse.Namespace) -> None:
    """Measure and print the figures."""
    import json

    from .evaluation.eval_sets import load_eval_set
    from .evaluation.evaluate import evaluate_model, format_report
    from .utils.performance import keep_freed_memory

    if args.batch_size < 1:
        raise UsageError(f"--batch_size must be at least 1, not {args.batch_size}")
    keep_freed_memory()
    data = load_eval_set(args.dataset, args.split, args.class_names, **data_options(args))
    templates = args.templates or ["ensemble"]
    report = evaluate_model(
        args.model,
        data,
        baseline=args.baseline,
        output_dir=args.output_dir,
        templates=templates[0] if len(templates) == 1 else templates,
        batch_size=args.batch_size,
        progress=sys.stderr.isatty(),
    )
    print(json.dumps(report, indent=2) if args.json else format_report(report))


def declare_app(parser: argparse.ArgumentParser) -> None:
    """Flags of `miniclip app`."""
    parser.add_argument("index", metavar="INDEX", help="folder of an index, made by `miniclip index`")
    parser.add_argument("--port", type=int, help="of the page (the first free one from 7860 on)")
    parser.add_argument("--open", action="store_true", help="show the page in the browser")


def run_app_command(args: argparse.Namespace) -> None:
    """Serve the page until it is interrupted."""
    from .search.app import run_app

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # as Ctrl-C: its temporary folder is cleared away
    run_app(args.index, args.port, args.open)


def declare_space(parser: argparse.ArgumentParser) -> None:
    """Flags of `miniclip space`."""
    parser.add_argument("export", metavar="EXPORT", help="folder of an exported model, or a repository on the Hub")
    parser.add_argument("folder", metavar="DIR", help="new folder for the Space")
    parser.add_argument("--images", metavar="SOURCE", nargs="+", required=True, help="as for `miniclip index`")
    parser.add_argument("--title", default="Image search", help="of the page")


def run_space(args: argparse.Namespace) -> None:
    """Write the Space and tell how to try and to publish it."""
    from .search.space import write_space

    count = write_space(args.export, args.folder, args.images, args.title)
    print(f"{args.folder}: a Space with {count:,} images\n  try it:   python {args.folder}/app.py")
    print(f"  share it: hf upload USER/NAME {args.folder} --repo-type space")


COMMANDS = {
    "app": Command("search an index on a page in the browser, for this machine only", declare_app, run_app_command),
    "check": Command("look for what is wrong with captioned images", declare_check, run_check),
    "duplicates": Command(
        "find images of an index that are the same or nearly so", declare_duplicates, run_duplicates
    ),
    "eval": Command("measure a model, alone or beside another one", declare_eval, run_eval),
    "export": Command("write a model as ONNX files that agree with PyTorch", declare_export, run_export),
    "index": Command("embed images into an index, or bring one up to date", declare_index, run_index),
    "push": Command("upload an exported model to the Hugging Face Hub", declare_push, run_push),
    "search": Command("find images of an index by words, by a picture or both", declare_search, run_search),
    "space": Command("write a Gradio Space with a model and small copies of images", declare_space, run_space),
}


def build_parser() -> argparse.ArgumentParser:
    """The parser of all subcommands."""
    parser = argparse.ArgumentParser(
        prog="miniclip", description="What one does with a MiniCLIP model of one's own.", epilog=EXIT_CODES
    )
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, command in COMMANDS.items():
        subparser = subparsers.add_parser(name, help=command.help, description=command.help)
        command.declare(subparser)
        subparser.add_argument("--debug", action="store_true", help="show the traceback of an error")
        subparser.set_defaults(run=command.run)
    return parser


def _show_warning(message: Warning | str, *where: Any, **more: Any) -> None:
    """A warning as one line, like an error; instead of `warnings.showwarning`."""
    print(f"warning: {message}", file=sys.stderr)


def cli(argv: list[str] | None = None) -> int:
    """Run a subcommand.

    Returns:
        The exit code of [`run_command`][modeling_miniclip.errors.run_command]; also 1 where `check` found a problem.
    """
    args = build_parser().parse_args(argv)
    with warnings.catch_warnings():
        warnings.showwarning = _show_warning
        return run_command(lambda: args.run(args), args.debug)
