"""A model that one Trainer steps bare, then inside DDP, on one process; prints how far from a twin that stays bare.

Started by `test_trainer.py`, since a process group stays in its process: `wrapped_later.py FOLDER`.
"""

import copy
import sys
from pathlib import Path

import torch
from models import batches, distance, padded_data, tiny
from on_cpu import leave
from torch.nn.parallel import DistributedDataParallel

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))
from by_hand import by_hand

from fgm_trainer import FGM, AdversarialTrainer


def stepped(folder, model, wraps):
    """Three steps; with `wraps`, the last two inside of DDP."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    schedule = torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)
    batch = batches(padded_data(model), 4)[0]
    parts = {"attack": FGM(), "optimizers": (optimizer, schedule)}
    one = by_hand(AdversarialTrainer, model, batch, folder, **parts)
    for number in range(3):
        if wraps and number == 1:
            one.trainer.model_wrapped = DistributedDataParallel(one.trainer.model)
        one.passes()
        one.update()
    return model


def main():
    folder = sys.argv[1]
    model = tiny("bert")
    twin = stepped(folder, copy.deepcopy(model), wraps=False)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/group", rank=0, world_size=1)
    print(f"distance {distance(twin, stepped(folder, model, wraps=True))}", flush=True)
    leave()


if __name__ == "__main__":
    main()
