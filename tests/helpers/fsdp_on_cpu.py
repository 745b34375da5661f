"""`train_miniclip.py` under FSDP on CPUs, where Accelerate silently uses DistributedDataParallel instead.

Run with `accelerate launch` and the launch file for two CPUs. Only the choice of FSDP is made here; `fully_shard`,
gradient norms, checkpoints and gathered weights are Accelerate's own code, with the settings of the launch file for
FSDP. The first process prints the types of the model's parameters and of the modules that are sharded separately.
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


def printing_prepare(self: Any, *args: Any, **kwargs: Any) -> Any:
    prepared = prepare(self, *args, **kwargs)
    if self.is_main_process:
        modules = {type(m).__name__.removeprefix("FSDP") for m in prepared[0].modules() if isinstance(m, FSDPModule)}
        print("parameters:", sorted({type(parameter).__name__ for parameter in prepared[0].parameters()}))
        print("sharded separately:", sorted(modules), flush=True)
    return prepared


if __name__ == "__main__":
    launch_file = yaml.safe_load(packaged_file("configuration", "accelerate", "fsdp.yaml").read_text(encoding="utf-8"))
    os.environ.update({name.upper(): str(value) for name, value in launch_file["fsdp_config"].items()})
    AcceleratorState.__init__, Accelerator.prepare = state_with_fsdp, printing_prepare
    main(sys.argv[1:])
