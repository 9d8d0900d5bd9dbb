"""Starts a script as a launcher starts it on GPUs: `on_cpu.py SCRIPT FLAGS`.

Without a GPU accelerate has DDP alone: where FSDP or DeepSpeed is asked for it runs DDP, or single processes, and says
nothing.
"""

import os
import runpy
import sys

from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType


def let_fsdp_in():
    os.environ["ACCELERATE_USE_CPU"] = "true"
    prepare = AcceleratorState.__init__

    def prepare_fsdp(self, *args, fsdp_plugin=None, **kwargs):
        prepare(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None:
            self.fsdp_plugin = fsdp_plugin
            self.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP

    AcceleratorState.__init__ = prepare_fsdp


def let_deepspeed_in():
    choose = PartialState._prepare_backend

    def choose_gloo(self, cpu=False, sagemaker_dp=False, backend=None):
        return choose(self, cpu, sagemaker_dp, backend or "gloo")

    PartialState._prepare_backend = choose_gloo


def leave():
    """Ends the process at once, its work done.

    gloo's threads outlive the group, and one that drops a tensor while Python ends aborts the process (pytorch#179291).
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


if __name__ == "__main__":
    if "ACCELERATE_USE_DEEPSPEED" in os.environ:
        # `Trainer` has a flag for it.
        if "--ddp_backend" not in sys.argv:
            let_deepspeed_in()
    elif "ACCELERATE_USE_FSDP" in os.environ:
        let_fsdp_in()
    else:
        os.environ["ACCELERATE_USE_CPU"] = "true"
    del sys.argv[0]
    sys.path[0] = os.path.dirname(sys.argv[0])
    runpy.run_path(sys.argv[0], run_name="__main__")
    leave()
