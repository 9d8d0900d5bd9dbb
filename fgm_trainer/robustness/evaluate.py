"""Accuracy under attack over a grid of epsilons: deterministic, in eval mode, gradients left as they were."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import IterableDataset

from ..attacks import FGM, PGD, Attack, Noise, Step
from ..engine.accelerate import Engine
from ..engine.driver import Driver, RunningPass, unit_of
from ..perturbation.batches import rows_of, without_column
from ..perturbation.target import Target
from ..perturbation.targets import find_target

ATTACKS_TO_TRY: tuple[Attack, ...] = (Noise(), FGM(), PGD(steps=10))
EPSILONS = (0.1, 0.2, 0.4)
LossOf = Callable[[nn.Module, Mapping[str, Any]], tuple[Tensor, Any]]


@dataclass(frozen=True)
class RobustnessReport:
    """What `evaluate_robustness` measured.

    Args:
        examples: how many examples were evaluated.
        epsilons: the grid, ascending.
        clean: the score without attack: accuracy, or for regression the mean squared error.
        scores: by attack, the score at each epsilon; it never improves as epsilon grows.
        metric: `accuracy` or `squared_error`.
        clean_pearson: regression only: Pearson's correlation without attack.
        pearson: regression only: by attack, Pearson's correlation at each epsilon.
    """

    examples: int
    epsilons: tuple[float, ...]
    clean: float
    scores: dict[str, tuple[float, ...]]
    metric: str = "accuracy"
    clean_pearson: float | None = None
    pearson: dict[str, tuple[float, ...]] | None = None

    def to_dict(self) -> dict[str, Any]:
        """The report as plain data, for JSON."""
        return asdict(self)

    def metrics(self, prefix: str = "robust") -> dict[str, float]:
        """The report as flat figures by name, such as `robust_pgd-10_0.2`, for logs and `all_results.json`.

        For regression, Pearson's correlations as well: `robust_pearson_pgd-10_0.2`.
        """
        flat = {f"{prefix}_clean": self.clean, **self._flat(prefix, self.scores)}
        if self.pearson is not None and self.clean_pearson is not None:
            flat |= {f"{prefix}_pearson_clean": self.clean_pearson, **self._flat(f"{prefix}_pearson", self.pearson)}
        return flat

    def _flat(self, prefix: str, rows: Mapping[str, Sequence[float]]) -> dict[str, float]:
        return {f"{prefix}_{a}_{e:g}": s for a, row in rows.items() for e, s in zip(self.epsilons, row, strict=True)}


@dataclass
class _Outcome:
    """The examples of one attack so far. A fallen example stays fallen at every larger epsilon."""

    right: Tensor
    error: Tensor
    prediction: Tensor
    regression: bool


def evaluate_robustness(
    model: nn.Module,
    dataset: Any,
    attacks: Sequence[Attack] = ATTACKS_TO_TRY,
    epsilons: Sequence[float] = EPSILONS,
    *,
    target: str | Target | None = None,
    epsilon_unit: str = "absolute",
    clip: tuple[Tensor, Tensor] | None = None,
    batch_size: int = 32,
    collate_fn: Callable[[list[Any]], Mapping[str, Any]] | None = None,
    seed: int = 0,
    progress: bool = True,
) -> RobustnessReport:
    """Clean accuracy and accuracy under each attack at each epsilon.

    An example that the model gets wrong without attack counts as wrong at every epsilon, and one that fell at some
    epsilon counts as wrong at every larger one, so no curve rises; such examples are not attacked again. The attacks
    work in scope `example` unless they name another.

    Args:
        model: a classifier, (examples, classes) logits, or a regression model, one number an example; with labels
            in the batch it must return a loss.
        dataset: examples for `collate_fn`, with `labels`; any iterable, of which each example is taken once.
        attacks: the attacks; each one's own epsilon is replaced by the grid's.
        epsilons: 0 or more, any order.
        target: what is perturbed, as `adv_target`; None for the input token lookup.
        epsilon_unit: `absolute`, or `embedding`: the grid in units of the mean norm of a token's embedding.
        clip: the valid range of the target's tensor, two tensors that broadcast against it (`valid_range`).
        batch_size: examples a batch.
        collate_fn: makes a batch of a list of examples; None for transformers' `default_data_collator`.
        seed: of whatever an attack draws; noise is drawn batch by batch, so it depends on `batch_size` too.
        progress: show a bar.

    Returns:
        A `RobustnessReport`. The model's weights, `.grad`s, mode and hooks are as before.

    Raises:
        ValueError: bad epsilons, no attack, an empty data set, labels or logits of another shape.
    """
    grid = _check_grid(epsilons, attacks, dataset)
    model = getattr(model, "_orig_mod", model)
    place = target if isinstance(target, Target) else find_target(target or "word_embeddings", model)
    unit = unit_of(epsilon_unit, model)
    names = _names(attacks)
    scores: dict[str, list[list[_Outcome]]] = {name: [[] for _ in grid] for name in names}
    clean: list[_Outcome] = []
    labels: list[Tensor] = []
    with evaluating(model, place, clip):
        batches = _batches(dataset, batch_size, collate_fn)
        total = math.ceil(len(dataset) / batch_size) if isinstance(dataset, Sized) else None
        for number, batch in enumerate(bar(batches, progress, "robustness", total)):
            batch = on_device(batch, model)
            inputs = {name: value for name, value in batch.items() if name not in {a.targeted for a in attacks}}
            outcome = _judge(_logits(model, inputs), batch["labels"])
            clean.append(outcome)
            labels.append(batch["labels"].flatten().cpu())
            for name, attack in zip(names, attacks, strict=True):
                now = outcome
                for i, epsilon in enumerate(grid):
                    now = _attacked(model, place, batch, attack.in_units(unit), epsilon * unit, now, seed + number)
                    scores[name][i].append(now)
    if not clean:
        raise ValueError("Robustness can't be evaluated: the data set is empty.")
    return _report(clean, scores, torch.cat(labels), grid)


def _attacked(
    model: nn.Module, place: Target, batch: Mapping[str, Any], attack: Attack, epsilon: float, now: _Outcome, seed: int
) -> _Outcome:
    """The outcome at this epsilon: the examples that still stand are attacked, the others stay as they are."""
    standing = now.right.nonzero().flatten()
    if not len(standing) or epsilon == 0:
        return now
    part = rows_of(batch, standing, len(now.right))
    scope = place.resolve_scope(attack.scope, "example")
    last = under_attack(model, place, part, attack, Step(epsilon, seed, examples=len(standing)), scope)
    after = _judge(_checked(last.outputs, part["labels"]), part["labels"])
    worse = after.error > now.error[standing]
    right, error, prediction = now.right.clone(), now.error.clone(), now.prediction.clone()
    right[standing] = after.right
    error[standing] = torch.where(worse, after.error, now.error[standing])
    prediction[standing] = torch.where(worse, after.prediction, now.prediction[standing])
    return _Outcome(right, error, prediction, now.regression)


def under_attack(
    model: nn.Module,
    place: Target,
    batch: Mapping[str, Any],
    attack: Attack,
    step: Step,
    scope: str,
    loss_of: LossOf | None = None,
) -> RunningPass:
    """The last perturbed pass that the attack would train on.

    Args:
        model: the model, in whatever mode it shall be.
        place: its target, attached.
        batch: the model's inputs, and the column that a targeted attack reads.
        attack: the attack.
        step: its epsilon and seed.
        scope: over which entries norms are taken.
        loss_of: (model, inputs) -> (loss, outputs); None for the model's own loss.

    Returns:
        That pass: what it reported as its loss, its outputs, and the calls of its target. No gradient is left anywhere.
    """

    def run_pass(running: RunningPass, called: nn.Module, inputs: Any) -> Tensor:
        loss, _ = running.measure(lambda own: (loss_of or model_loss)(called, own), inputs)
        running.backward(loss, Tensor.backward)
        return loss.detach()

    plain = replace(attack, weight=1.0) if attack.clean_weight else replace(attack, weight=1.0, clean_weight=1.0)
    driver = Driver(plain, place, scope, Engine(None, model, model), trains=False)
    return driver.run(step, without_column(batch, attack.targeted), run_pass, batch)[-1]


def model_loss(model: nn.Module, batch: Mapping[str, Any]) -> tuple[Tensor, Any]:
    """The model's own loss and its outputs. Raises ValueError where it returns no loss."""
    outputs = model(**batch)
    loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs[0]
    if not isinstance(loss, Tensor) or loss.dim():
        raise ValueError(f"{type(model).__name__} returned no loss for a batch of: {', '.join(batch)}. Has it labels?")
    return loss, outputs


@torch.no_grad()
def _logits(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
    return _checked(model(**batch), batch["labels"])


def _checked(outputs: Any, labels: Tensor) -> Tensor:
    logits = outputs["logits"] if isinstance(outputs, Mapping) else outputs[1]
    if not isinstance(logits, Tensor) or logits.dim() != 2 or labels.numel() != len(logits):
        shape = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise ValueError(
            "Robustness is measured for one label an example: logits (examples, classes) and labels (examples,); found "
            f"logits {shape} and labels {tuple(labels.shape)}."
        )
    return logits.detach()


def _judge(logits: Tensor, labels: Tensor) -> _Outcome:
    """Regression (one logit): nothing falls, the error counts. Classification: the error is 0 or 1."""
    if logits.shape[1] == 1:
        prediction = logits[:, 0].float()
        error = (prediction - labels.flatten()).square()
        return _Outcome(torch.ones_like(error, dtype=torch.bool), error, prediction, True)
    prediction = logits.argmax(dim=1)
    right = prediction == labels.flatten()
    return _Outcome(right, (~right).float(), prediction.float(), False)


def _report(
    clean: list[_Outcome], scores: dict[str, list[list[_Outcome]]], labels: Tensor, grid: tuple[float, ...]
) -> RobustnessReport:
    regression = clean[0].regression

    def score(outcomes: list[_Outcome]) -> float:
        values = [o.error.double() if regression else o.right.double() for o in outcomes]
        return torch.cat(values).mean().item()

    def pearson(outcomes: list[_Outcome]) -> float:
        prediction = torch.cat([o.prediction for o in outcomes]).double().cpu()
        return torch.corrcoef(torch.stack([prediction, labels.double()]))[0, 1].item()

    return RobustnessReport(
        examples=len(labels),
        epsilons=grid,
        clean=score(clean),
        scores={name: tuple(score(o) for o in rows) for name, rows in scores.items()},
        metric="squared_error" if regression else "accuracy",
        clean_pearson=pearson(clean) if regression else None,
        pearson={name: tuple(pearson(o) for o in rows) for name, rows in scores.items()} if regression else None,
    )


def _check_grid(epsilons: Sequence[float], attacks: Sequence[Attack], dataset: Any) -> tuple[float, ...]:
    problems = []
    epsilons = [float(e) for e in epsilons]
    if not attacks:
        problems.append("there is no attack: pass at least one, such as FGM().")
    bad = [e for e in epsilons if not 0 <= e < float("inf")]
    problems += [f"{a.name} perturbs {a.default_target}, not inputs." for a in attacks if a.default_target == "weights"]
    if bad or not epsilons:
        problems.append(f"epsilons must be finite numbers, 0 or more, at least one; found {epsilons!r}.")
    if isinstance(dataset, Sized) and not len(dataset):
        problems.append("the data set is empty.")
    if problems:
        raise ValueError("Robustness can't be evaluated: " + " ".join(problems))
    return tuple(sorted(set(epsilons)))


def _names(attacks: Sequence[Attack]) -> list[str]:
    """A short name for each attack: the method, its steps, and whatever is needed to tell them apart."""
    names = [a.name + (f"-{a.steps}" if isinstance(a, PGD) else "") for a in attacks]
    return [
        n if names.count(n) == 1 else f"{n} ({a.norm}, {a.scope or 'example'}, #{i})"
        for i, (n, a) in enumerate(zip(names, attacks, strict=True))
    ]


def _batches(dataset: Any, size: int, collate_fn: Any) -> Iterator[Mapping[str, Any]]:
    if collate_fn is None:
        from transformers import default_data_collator as collate_fn
    examples = iter(dataset) if _is_stream(dataset) else (dataset[i] for i in range(len(dataset)))
    while chunk := list(islice(examples, size)):
        batch = collate_fn(chunk)
        if "labels" not in batch:
            raise ValueError(f"Robustness needs `labels` in every batch; found {', '.join(batch)}.")
        yield batch


def _is_stream(dataset: Any) -> bool:
    indexed = hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")
    return isinstance(dataset, IterableDataset) or not indexed


def bar(items: Iterable[Any], progress: bool, label: str, total: int | None = None) -> Any:
    """The items, under a progress bar where one is wanted."""
    if not progress:
        return items
    from tqdm.auto import tqdm

    return tqdm(items, desc=label, total=total)


def on_device(batch: Mapping[str, Any], model: nn.Module) -> dict[str, Any]:
    """The batch where the model is."""
    device = next(model.parameters()).device
    return {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()}


@contextmanager
def evaluating(model: nn.Module, place: Target, clip: tuple[Tensor, Tensor] | None = None) -> Iterator[None]:
    """Eval mode, hooks and a valid range; every module's own mode, no hooks and the target's own range afterwards."""
    modes = [(m, m.training) for m in model.modules()]
    before, called, own = place.model, place.called, place.clip
    attached = before is model
    try:
        place.clip = own if clip is None else clip
        model.eval()
        if not attached:
            place.attach(model)
        yield
    finally:
        place.clip = own
        if not attached:
            place.detach()
            if before is not None:
                place.attach(before, called)
        for module, mode in modes:
            module.training = mode
