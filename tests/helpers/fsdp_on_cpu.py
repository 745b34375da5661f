"""`train_miniclip.py` under FSDP on CPUs, where Accelerate takes DistributedDataParallel instead without a word.

Run by `accelerate launch` with the file for two CPUs. All but the choice is Accelerate's own code, told what the
launch file for FSDP says: `fully_shard`, the norm of the gradients, checkpoints, gathered weights. The first process
prints the kinds of the model's parameters and of the modules that are gathered by themselves.
"""

import os
import sys
from typing import Any

import yaml
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from torch.distributed.fsdp import FSDPModule

from modeling_miniclip import packaged_file
from train_miniclip import main

state_init, prepare = AcceleratorState.__init__, Accelerator.prepare


def state_with_fsdp(self: Any, *args: Any, **kwargs: Any) -> None:
    state_init(self, *args, **kwargs)
    if self.distributed_type == DistributedType.MULTI_CPU:
        self.distributed_type = DistributedType.FSDP
        self.fsdp_plugin = FullyShardedDataParallelPlugin()  # reads the environment


def telling_prepare(self: Any, *args: Any, **kwargs: Any) -> Any:
    prepared = prepare(self, *args, **kwargs)
    if self.is_main_process:
        modules = {type(m).__name__.removeprefix("FSDP") for m in prepared[0].modules() if isinstance(m, FSDPModule)}
        print("parameters:", sorted({type(parameter).__name__ for parameter in prepared[0].parameters()}))
        print("sharded by themselves:", sorted(modules), flush=True)
    return prepared


if __name__ == "__main__":
    launch_file = yaml.safe_load(packaged_file("configuration", "accelerate", "fsdp.yaml").read_text(encoding="utf-8"))
    os.environ.update({name.upper(): str(value) for name, value in launch_file["fsdp_config"].items()})
    AcceleratorState.__init__, Accelerator.prepare = state_with_fsdp, telling_prepare
    main(sys.argv[1:])
