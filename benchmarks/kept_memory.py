"""What the first step of a run takes at its peak for each byte that autograd keeps, by towers and batch size.

    python benchmarks/kept_memory.py 8 16 32 -- --dataset FLICKR8K --vision_model LITE0 --text_model MINILM

On a CPU, a step is stopped if `PER_KEPT` times what autograd keeps is more than there is (`training/memory/`): the
last column must stay below it. Each batch size is a separate process. Linux only, because the peak is read from /proc.
"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path
from unittest import mock

from loss import peak_mib, reset_peak
from torch import Tensor

import train_miniclip
from modeling_miniclip.training.command_line.parsing import parse_arguments
from modeling_miniclip.training.memory import activations, steps
from modeling_miniclip.training.memory.activations import PER_KEPT, bytes_to_come
from modeling_miniclip.training.towers.layers import set_training_mode
from modeling_miniclip.utils.performance import release_freed_memory

HERE = Path(__file__).resolve().parent
ENOUGH = 2**60  # bytes


class Recorded(activations._Kept):
    """Remembers the most that autograd kept at a time."""

    most_bytes = 0

    def add(self, tensor: Tensor) -> activations._Holder:
        holder = super().add(tensor)
        Recorded.most_bytes = max(Recorded.most_bytes, self.bytes)
        return holder


def measure(argv: list[str]) -> str:
    """Take one step of a run; returns the row of the table."""
    with tempfile.TemporaryDirectory() as folder:
        run = train_miniclip.prepare(parse_arguments([*argv, f"--output_dir={folder}"]))
        set_training_mode(run.unwrapped_model, run.arguments.freeze, bool(run.arguments.freeze_batch_norm))
        batch = next(iter(run.train_loader))
        to_come = bytes_to_come(run.unwrapped_model, has_moments=False) / 2**20
        release_freed_memory()
        reset_peak()
        before = peak_mib()
        ample = mock.patch.object(steps, "free_memory", lambda: ENOUGH)
        with ample, mock.patch.object(activations, "_Kept", Recorded):
            train_miniclip.train_step(run, batch, len(batch["image_id"]))
        grown, kept = peak_mib() - before, Recorded.most_bytes / 2**20
        run.close()
    images = run.arguments.batch_size
    return f"| {images} | {kept:.0f} | {to_come:.0f} | {grown:.0f} | {(grown - to_come) / kept:.2f} |"


def main() -> None:
    """Print the Markdown table."""
    end = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    own, flags = sys.argv[1:end], sys.argv[end + 1 :]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("batch_sizes", nargs="+", type=int)
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(own)
    argv = [f"--recipe={HERE / 'plain.yaml'}", "--max_validation_images=16", *flags]
    if args.child:
        print(measure([*argv, f"--batch_size={args.batch_sizes[0]}"]))
        return
    print(f"PER_KEPT is {PER_KEPT}.\n")
    print("| images | kept, MiB | gradients and moments, MiB | peak, MiB | per byte kept |")
    print("|---|---|---|---|---|", flush=True)
    for batch_size in args.batch_sizes:
        command = [sys.executable, __file__, str(batch_size), "--child", "--", *flags]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        print(done.stdout.splitlines()[-1], flush=True)


if __name__ == "__main__":
    main()
