"""One of two processes under FSDP2: trains a language model, the second process's first row without a label."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import torch
from test_faults import flags
from transformers import LlamaForCausalLM, TrainingArguments, set_seed
from transformers.distributed import DistributedConfig

from fgm_trainer import FGM, AdversarialTrainer


class InOrder(AdversarialTrainer):
    """The rows as they come, by turns to the processes."""

    def _get_train_sampler(self, *args):
        return torch.utils.data.SequentialSampler(self.train_dataset)


if __name__ == "__main__":
    out = Path(sys.argv[1])
    set_seed(0)
    rows = [{"input_ids": torch.randint(3, 30, (8,))} for _ in range(12)]
    for number, row in enumerate(rows):
        row["labels"] = torch.full((8,), -100) if number == 1 else row["input_ids"].clone()
    args = flags(
        out,
        TrainingArguments,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=2,
        max_steps=3,
        ddp_timeout=60,
    )
    model = LlamaForCausalLM.from_pretrained(out / "model", distributed_config=DistributedConfig(fsdp_size=2))
    passes = []
    model.register_forward_pre_hook(lambda *call: passes.append(1))
    InOrder(model=model, args=args, train_dataset=rows, attack=FGM()).train()
    (out / f"{args.process_index}.txt").write_text(str(len(passes)))
