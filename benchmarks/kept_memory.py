"""What some steps of a run take at their peak, and what is estimated, by towers and batch size.

    python benchmarks/kept_memory.py 8 16 32 -- --dataset FLICKR8K --vision_model LITE0 --text_model MINILM

On a CPU, a step is stopped if the estimate is more than there is (`training/memory/activations.py`): the last column
must stay below 1.1, because a tenth of the memory is left over. Each batch size is a separate process. Linux only,
because the peak is read from /proc.
"""

import argparse
import subprocess
import sys
import tempfile
from itertools import islice
from pathlib import Path
from unittest import mock

from loss import peak_mib, reset_peak

import train_miniclip
from modeling_miniclip.inference.fit import PER_OUTPUT
from modeling_miniclip.training.command_line.parsing import parse_arguments
from modeling_miniclip.training.memory import activations, steps
from modeling_miniclip.training.memory.activations import PER_KEPT, bytes_to_come
from modeling_miniclip.training.memory.sizes import StepSizes
from modeling_miniclip.training.towers.layers import set_training_mode
from modeling_miniclip.utils.performance import release_freed_memory

HERE = Path(__file__).resolve().parent
ENOUGH = 2**60  # bytes
STEPS = 6


class Recorded(activations._Counted):
    """Remembers the most that autograd kept at a time, the largest output of a layer, and the largest estimate."""

    kept = output = estimate = 0.0

    def check(self) -> None:
        Recorded.kept, Recorded.output = max(Recorded.kept, self.bytes), max(Recorded.output, self.largest)
        Recorded.estimate = max(Recorded.estimate, PER_KEPT * self.bytes + PER_OUTPUT * self.largest)


def measure(argv: list[str]) -> str:
    """Take some steps of a run; returns the row of the table."""
    with tempfile.TemporaryDirectory() as folder:
        run = train_miniclip.prepare(parse_arguments([*argv, f"--output_dir={folder}"]))
        set_training_mode(run.unwrapped_model, run.arguments.freeze, bool(run.arguments.freeze_batch_norm))
        batches = list(islice(run.train_loader, STEPS))
        to_come = bytes_to_come(run.unwrapped_model, has_moments=False)
        release_freed_memory()
        reset_peak()
        before = peak_mib()
        with (
            mock.patch.object(steps, "free_memory", lambda: ENOUGH),
            mock.patch.object(activations, "_Counted", Recorded),
        ):
            for batch in batches:
                run.sizes = StepSizes()
                train_miniclip.train_step(run, batch, len(batch["image_id"]))
        grown = peak_mib() - before
        run.close()
    parts = [x / 2**20 for x in (Recorded.kept, Recorded.output, to_come, Recorded.estimate + to_come)]
    figures = " | ".join(f"{x:.0f}" for x in (run.arguments.batch_size, *parts, grown))
    return f"| {figures} | {grown / parts[-1]:.2f} |"


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
    print(f"{PER_KEPT} bytes per byte kept, {PER_OUTPUT} per byte of the largest output; sizes in MiB.\n")
    print("| images | kept | largest output | gradients and moments | estimate | peak | peak / estimate |")
    print("|---|---|---|---|---|---|---|", flush=True)
    for batch_size in args.batch_sizes:
        command = [sys.executable, __file__, str(batch_size), "--child", "--", *flags]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        print(done.stdout.splitlines()[-1], flush=True)


if __name__ == "__main__":
    main()
