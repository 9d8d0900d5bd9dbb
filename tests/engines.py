"""The engines that can carry a training run, and one small run on any of them.

`train(engine, case, ...)` trains a tiny BERT on rows in a fixed order. It is the same function in the test's own
process, where the references come from, and in each of the processes of `distributed_worker.py`.
"""

from __future__ import annotations

from collections import Counter
from contextlib import contextmanager, nullcontext
from importlib.metadata import version

import torch
from packaging.version import Version
from test_faults import examples, flags
from transformers import BertForSequenceClassification, Trainer, TrainerCallback, TrainingArguments
from transformers.data.data_collator import default_data_collator

from fgm_trainer import AdversarialTrainer
from fgm_trainer.attacks import attack_class
from fgm_trainer.loops import Adversary
from fgm_trainer.robustness import evaluate_robustness

STEPS, ROWS, RATE = 4, 32, 0.1
# transformers 4.46 adds up the losses of accumulated micro-batches where later releases take their mean.
ADDS_UP = Version(version("transformers")) < Version("4.47")


def zero(stage):
    """DeepSpeed's configuration of a ZeRO stage; the optimizer is torch's."""
    auto = dict.fromkeys(["train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping"], "auto")
    # By default ZeRO-3 keeps parameters below 100,000 entries whole, which are all of the tiny model's.
    optimization = {"stage": stage, "stage3_param_persistence_threshold": 0}
    precision = {"bf16": {"enabled": "auto"}}
    return {
        "deepspeed": {"zero_optimization": optimization, "zero_allow_untested_optimizer": True, **auto, **precision}
    }


# The engine's name: what TrainingArguments are told. Those that end in "loop" are a hand-written accelerate loop.
SETTINGS = {
    "ddp": {},
    "ddp-loop": {},
    "fsdp2": {},
    "fsdp2-accelerate": {
        "fsdp": True,
        "fsdp_config": {
            "fsdp_version": 2,
            "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
            "transformer_layer_cls_to_wrap": ["BertLayer"],
        },
    },
    "fully_shard-loop": {},
    "hsdp": {},
    "zero1": zero(1),
    "zero2": zero(2),
    "zero3": zero(3),
    "zero3-loop": zero(3),
}
# The least releases that the engines need, where they are newer than those that the package needs.
NEEDS = {
    "fsdp2": {"transformers": "5.20"},
    "fsdp2-accelerate": {"transformers": "5", "accelerate": "1.6"},
    "hsdp": {"transformers": "5.20"},
    "zero1": {"accelerate": "1.8"},
    "zero2": {"accelerate": "1.8"},
    "zero3": {"accelerate": "1.8"},
    "zero3-loop": {"accelerate": "1.8"},
}
# Replicas of two shards each; everything else runs on two processes.
PROCESSES = {"hsdp": 4}


def train(engine, case, path, model_path):
    """One run on `engine`, or on this process alone where that is `trainer` or `loop`.

    Args:
        engine: the name in `SETTINGS`, or `trainer`, or `loop`.
        case: the arguments of the run; with `measure`, its traffic and the trained model's robustness are measured.
        path: the output folder.
        model_path: where the model is.

    Returns:
        The whole weights, what was logged, what DeepSpeed was told, the rank; where asked for, by collective what
        moved, and the robustness.
    """
    case = dict(case)
    measure = case.pop("measure", False)
    run = train_in_a_loop if engine.endswith("loop") else train_by_trainer
    with traffic() if measure else nullcontext({}) as moved:
        model, result = run(engine, case, path, model_path)
    # The evaluation, too, has to work on the model as the engine left it.
    measured = {"moved": dict(moved), "robustness": robustness(model)} if measure else {}
    return {"weights": whole_weights(model), **result, **measured}


def train_by_trainer(engine, case, path, model_path):
    stock, rows, as_it_comes = case.pop("stock", False), case.pop("rows", ROWS), case.pop("as_it_comes", False)
    rule = {"optim": "sgd", "learning_rate": RATE, "lr_scheduler_type": "constant", "max_grad_norm": 0.0}
    common = {"max_steps": STEPS, "logging_steps": 2, **({"kind": TrainingArguments} if stock else {})}
    args = flags(path, **common | rule | SETTINGS.get(engine, {}) | case)
    events = Events()
    trainer = in_order(Trainer if stock else AdversarialTrainer)(
        model=load(engine, model_path), args=args, train_dataset=examples(rows), callbacks=[events]
    )
    events.trainer = trainer
    # transformers#47688: heads that ignore num_items_in_batch would have their loss scaled wrongly.
    trainer.model_accepts_loss_kwargs = trainer.model_accepts_loss_kwargs and as_it_comes
    trainer.train()
    names = ("loss", "grad_norm", "learning_rate")
    log = [{k: v for k, v in line.items() if k in names or k.startswith("adv_")} for line in trainer.state.log_history]
    return trainer.accelerator.unwrap_model(trainer.model), {
        "log": log,
        "events": events.seen,
        "rank": args.process_index,
    }


class BackAndForth(torch.utils.data.Sampler):
    """In order, and backwards in every second epoch: then other processes get a row."""

    def __init__(self, rows):
        self.rows, self.backwards = range(len(rows)), False

    def __len__(self):
        return len(self.rows)

    def __iter__(self):
        order = reversed(self.rows) if self.backwards else iter(self.rows)
        self.backwards = not self.backwards
        return order


def in_order(base):
    class InOrder(base):
        def _get_train_sampler(self, *args):
            return BackAndForth(self.train_dataset)

        def compute_loss(self, *args, return_outputs=False, **kwargs):
            loss, outputs = super().compute_loss(*args, return_outputs=True, **kwargs)
            if ADDS_UP:
                loss = loss / self.args.gradient_accumulation_steps
            return (loss, outputs) if return_outputs else loss

    return InOrder


def train_in_a_loop(engine, case, path, model_path):
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, PartialState
    from accelerate.utils import DeepSpeedPlugin

    AcceleratorState._reset_state()
    PartialState(cpu=True)
    accumulation = case.pop("gradient_accumulation_steps", 1)
    batch_size = case.pop("per_device_train_batch_size")
    settings = {k.removeprefix("adv_"): v for k, v in case.items()}
    settings |= settings.pop("kwargs", {})
    plugin = {}
    if engine == "zero3-loop":
        config = SETTINGS[engine]["deepspeed"] | {
            "train_micro_batch_size_per_gpu": batch_size,
            "gradient_clipping": 0.0,
        }
        plugin = {"deepspeed_plugin": DeepSpeedPlugin(config)}
    accelerator = Accelerator(cpu=not plugin, gradient_accumulation_steps=accumulation, **plugin)
    model = load(engine, model_path)
    if engine == "fully_shard-loop":
        from torch.distributed.fsdp import fully_shard

        for layer in model.bert.encoder.layer:
            fully_shard(layer)
        fully_shard(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    loader = torch.utils.data.DataLoader(examples(ROWS), batch_size, collate_fn=default_data_collator)
    if engine == "fully_shard-loop":
        optimizer, loader = accelerator.prepare(optimizer, loader)
    else:
        model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    attack = attack_class(settings.pop("method"))(**settings)
    adversary = Adversary(model, attack, accelerator=accelerator)
    for _, batch in zip(range(STEPS * accumulation), loader, strict=False):
        with accelerator.accumulate(model):
            adversary.backward(batch)
            optimizer.step()
            optimizer.zero_grad()
    adversary.close()
    return accelerator.unwrap_model(model), {"rank": accelerator.process_index}


def load(engine, path):
    if engine not in ("fsdp2", "hsdp"):
        return BertForSequenceClassification.from_pretrained(path)
    from transformers.distributed import DistributedConfig

    replicas = {"dp_replicate_size": 2} if engine == "hsdp" else {}
    config = DistributedConfig(fsdp_size=2, **replicas)
    return BertForSequenceClassification.from_pretrained(path, distributed_config=config)


def whole_weights(model):
    """The weights, gathered from wherever the engine keeps them."""
    weights = {}
    for name, value in model.named_parameters():
        if hasattr(value, "ds_id"):
            import deepspeed

            with deepspeed.zero.GatheredParameters([value]):
                weights[name] = value.detach().clone()
        else:
            weights[name] = (value.full_tensor() if hasattr(value, "full_tensor") else value).detach().clone()
    return weights


def robustness(model):
    found = evaluate_robustness(model, examples(8), epsilons=[0.5], batch_size=4, collate_fn=default_data_collator)
    return found.metrics()


class Events(TrainerCallback):
    """What a DeepSpeed engine was told, in order: b for a backward pass, s for a step, z for clearing gradients."""

    def __init__(self):
        self.seen, self.trainer = "", None

    def on_train_begin(self, args, state, control, **kwargs):
        engine = self.trainer.model_wrapped
        if hasattr(engine, "set_gradient_accumulation_boundary"):
            self._note(engine, "backward", "b")
            self._note(engine, "step", "s")
            self._note(engine.optimizer, "zero_grad", "z")

    def _note(self, owner, name, letter):
        call = getattr(owner, name)

        def noted(*args, **kwargs):
            self.seen += letter
            return call(*args, **kwargs)

        setattr(owner, name, noted)


@contextmanager
def traffic():
    """Counts, by collective, the elements that this process handed to gloo."""
    moved = Counter()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True) as profile:
        yield moved
    # `profile.events()` gives the same, at ten times the price.
    for event in profile.profiler.kineto_results.events():
        if event.name().startswith("gloo:"):
            moved[event.name().removeprefix("gloo:")] += sum(map(elements, event.shapes()))


def elements(shape):
    """The size of a tensor, or of a list of tensors, as the profiler records it."""
    if not shape:
        return 0
    if isinstance(shape[0], list | tuple):
        return sum(map(elements, shape))
    return torch.Size(shape).numel()
