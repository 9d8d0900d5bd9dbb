"""What a result came from: versions of the libraries, and the machine."""

import os
import platform
from typing import Any

import torch
import transformers

import fgm_trainer


def versions() -> dict[str, str]:
    """Of everything that decides about a figure."""
    return {
        "fgm_trainer": fgm_trainer.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def machine() -> dict[str, Any]:
    """The processor, its cores, the threads torch uses of them, and the GPU if there is one."""
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "system": platform.platform(),
    }


def _processor() -> str:
    try:
        with open("/proc/cpuinfo") as lines:
            return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
