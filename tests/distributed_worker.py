"""One process of several: trains each case named on the command line and saves what came of it, by rank."""

import json
import os
import sys
from pathlib import Path

import torch
from engines import train
from on_cpu import leave, let_fsdp_in


def main():
    engine, cases, out, model = sys.argv[1], json.loads(sys.argv[2]), Path(sys.argv[3]), sys.argv[4]
    if engine == "fsdp2-accelerate":
        let_fsdp_in()
    environment = dict(os.environ)
    for number, case in enumerate(cases):
        # TrainingArguments of 4.46 write mixed precision into it, and would train the next case in it as well.
        os.environ.clear()
        os.environ.update(environment)
        done = train(engine, case, out / "run", model)
        torch.save(done, out / f"case{number}-rank{done['rank']}.pt")
    torch.distributed.barrier()
    leave()


if __name__ == "__main__":
    main()
