"""One process of a two-process run: trains each case named on the command line and saves the weights of each rank."""

import json
import sys
from importlib.metadata import version
from pathlib import Path

import torch
from packaging.version import Version
from test_faults import examples, flags, tiny_bert
from transformers import Trainer, TrainerCallback, TrainingArguments

from fgm_trainer import AdversarialTrainer

ADDS_UP = Version(version("transformers")) < Version("4.47")
STEPS, ROWS = 4, 32
PLAIN = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def in_order(base):
    class InOrder(base):
        def _get_train_sampler(self, *args):
            return torch.utils.data.SequentialSampler(self.train_dataset)

        def compute_loss(self, *args, **kwargs):
            loss = super().compute_loss(*args, **kwargs)
            # transformers 4.46 adds up the losses of accumulated micro-batches where later releases take their mean.
            return loss / self.args.gradient_accumulation_steps if ADDS_UP else loss

    return InOrder


class CountBytes(TrainerCallback):
    """A communication hook of DDP that averages as DDP does, and counts."""

    def __init__(self, trainer):
        self.trainer, self.bytes = trainer, 0

    def on_train_begin(self, args, state, control, **kwargs):
        if hasattr(self.trainer.model_wrapped, "register_comm_hook"):
            self.trainer.model_wrapped.register_comm_hook(None, self.average)

    def average(self, state, bucket):
        buffer = bucket.buffer()
        self.bytes += buffer.numel() * buffer.element_size()
        work = torch.distributed.all_reduce(buffer.div_(torch.distributed.get_world_size()), async_op=True)
        return work.get_future().then(lambda future: future.value()[0])


def train(path, settings, stock=False):
    """Trains a tiny BERT; gives its weights and the bytes that gradients took."""
    model = tiny_bert(**PLAIN)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    kind = {"kind": TrainingArguments} if stock else {}
    args = flags(path, max_steps=STEPS, max_grad_norm=0.0, logging_steps=2, **kind, **settings)
    trainer = in_order(Trainer if stock else AdversarialTrainer)(
        model=model, args=args, train_dataset=examples(ROWS), optimizers=(optimizer, schedule)
    )
    # transformers#47688: heads that ignore num_items_in_batch would have their loss scaled wrongly.
    trainer.model_accepts_loss_kwargs = False
    counter = CountBytes(trainer)
    trainer.add_callback(counter)
    trainer.train()
    lines = [{k: v for k, v in h.items() if k.startswith("adv_")} for h in trainer.state.log_history]
    return {"weights": model.state_dict(), "bytes": counter.bytes, "log": lines, "rank": args.process_index}


def main():
    out, cases = Path(sys.argv[1]), json.loads(sys.argv[2])
    for number, case in enumerate(cases):
        done = train(out / "run", case["settings"], case.get("stock", False))
        torch.save(done, out / f"case{number}-rank{done['rank']}.pt")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
