"""The `miniclip` command. Each subcommand declares its flags here and imports what does its work when it runs."""

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from .errors import MiniClipError, UsageError


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
    from .checking import check_command

    return check_command(args)


def declare_push(parser: argparse.ArgumentParser) -> None:
    """Flags of `miniclip push`."""
    parser.add_argument("export", metavar="EXPORT", help="folder of an exported model")
    parser.add_argument("repo_id", metavar="USER/NAME", help="repository on the Hub; created if it is not there")
    parser.add_argument("--private", action="store_true", help="make a new repository private, refuse a public one")
    parser.add_argument("--revision", help="branch to commit to; created if it is not there (main)")


def run_push(args: argparse.Namespace) -> None:
    """Upload an export and print the address of the commit."""
    from .pushing import push

    print(f"pushed: {push(args.export, args.repo_id, private=args.private, revision=args.revision)}")


def declare_export(parser: argparse.ArgumentParser) -> None:
    """Flags of `miniclip export`."""
    parser.add_argument("export", metavar="EXPORT", help="folder of an exported model, or a repository on the Hub")
    parser.add_argument("--onnx", metavar="DIR", required=True, help="new folder for the ONNX files and an example")
    parser.add_argument("--dataset", default="scenes", help="captioned images to compare with PyTorch on")
    parser.add_argument("--images", type=int, default=200, metavar="N", help="compare on so many of them at most")
    parser.add_argument("--tolerance", type=float, default=1e-4, help="largest difference of an embedding's component")


def run_export(args: argparse.Namespace) -> None:
    """Write the ONNX files and print how far they are from PyTorch."""
    from .onnx_export import describe, export_onnx
    from .performance import keep_freed_memory

    keep_freed_memory()
    print(describe(export_onnx(args.export, args.onnx, args.dataset, args.images, args.tolerance)))
    for path in sorted(Path(args.onnx).iterdir()):
        print(f"{path.stat().st_size / 1e6:10.3f} MB  {path}")


COMMANDS = {
    "check": Command("look for what is wrong with captioned images", declare_check, run_check),
    "export": Command("write a model as ONNX files that agree with PyTorch", declare_export, run_export),
    "push": Command("upload an exported model to the Hugging Face Hub", declare_push, run_push),
}


def build_parser() -> argparse.ArgumentParser:
    """The parser of all subcommands."""
    parser = argparse.ArgumentParser(prog="miniclip", description="What one does with a MiniCLIP model of one's own.")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, command in COMMANDS.items():
        subparser = subparsers.add_parser(name, help=command.help, description=command.help)
        command.declare(subparser)
        subparser.add_argument("--debug", action="store_true", help="show the traceback of an error")
        subparser.set_defaults(run=command.run)
    return parser


def cli(argv: list[str] | None = None) -> int:
    """Run a subcommand. An error of the user's input is one line on stderr, unless `--debug` asks for its traceback.

    Returns:
        The exit code: 0, 2 for an error of usage, 1 for any other failure, and where `check` found a problem.
    """
    args = build_parser().parse_args(argv)
    try:
        return args.run(args) or 0
    except MiniClipError as error:
        if args.debug:
            raise
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1
