#!/usr/bin/env python
"""run_glue.py on the workers of Ray Train; what this script does not know goes to run_glue.py.

python examples/launch/ray_glue.py --num_workers 2 --use_gpu --model_name_or_path bert-base-cased --task_name mrpc
--do_train --do_eval --adv_epsilon 1.0 --output_dir runs/mrpc
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any

import ray
from ray.train import ScalingConfig
from ray.train.torch import TorchTrainer


def train(config: dict[str, Any]) -> None:
    """What each worker does."""
    # Paths among the flags count from the user's folder.
    os.chdir(config["folder"])
    sys.path.insert(0, config["examples"])
    if not config["use_gpu"]:
        # Without this word transformers takes each worker for a process of its own.
        os.environ["ACCELERATE_USE_CPU"] = "true"
    import run_glue

    run_glue.main(config["flags"])


def main() -> None:
    """Starts the workers and waits for them."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--num_workers", type=int, default=2, help="Processes; with --use_gpu each has a GPU.")
    parser.add_argument("--use_gpu", action="store_true", help="Train on GPUs.")
    own, flags = parser.parse_known_args()
    examples = str(Path(__file__).resolve().parents[1])
    config = {"folder": os.getcwd(), "examples": examples, "use_gpu": own.use_gpu, "flags": flags}
    scaling = ScalingConfig(num_workers=own.num_workers, use_gpu=own.use_gpu)
    # Ray's own print would stand in the way of how datasets tells one function from another.
    os.environ["RAY_TRAIN_ENABLE_PRINT_PATCH"] = "0"
    ray.init(include_dashboard=False)
    TorchTrainer(train, train_loop_config=config, scaling_config=scaling).fit()


if __name__ == "__main__":
    main()
