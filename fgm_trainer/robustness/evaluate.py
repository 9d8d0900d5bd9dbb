"""Accuracy under attack over a grid of epsilons: deterministic, in eval mode, gradients left as they were."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence, Sized
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from ..attacks import FGM, PGD, Attack, Noise, Step
from ..engine.accelerate import AllProcesses, bare
from ..engine.driver import unit_of
from ..perturbation.batches import examples_in, rows_of
from ..perturbation.target import Target
from ..perturbation.targets import find_target
from .data import bar, batches_of, on_device
from .ensemble import Ensemble, signs_of_masking, strong
from .foolbox import Foolbox
from .passes import LossOf, evaluating, passes_of
from .report import RobustnessReport
from .tasks import Outcome, Task, rows_in, task_of

AnyAttack = Attack | Ensemble | Foolbox
ATTACKS_TO_TRY: tuple[Attack, ...] = (Noise(), FGM(), PGD(steps=10))
EPSILONS = (0.1, 0.2, 0.4)
PRESETS: dict[str, Callable[[], Sequence[AnyAttack]]] = {"quick": lambda: ATTACKS_TO_TRY, "strong": strong}


def evaluate_robustness(
    model: nn.Module,
    dataset: Any,
    attacks: Sequence[AnyAttack] | AnyAttack | str = "quick",
    epsilons: Sequence[float] = EPSILONS,
    *,
    target: str | Target | None = None,
    epsilon_unit: str = "absolute",
    clip: tuple[Tensor, Tensor] | None = None,
    batch_size: int = 32,
    collate_fn: Callable[[list[Any]], Mapping[str, Any]] | None = None,
    task: Task | None = None,
    accelerator: Any = None,
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
        dataset: examples for `collate_fn`, with `labels`; any iterable, of which each example is taken once. Those
            without a label (-100) are left out.
        attacks: the attacks; each one's own epsilon is replaced by the grid's. `quick`: noise, FGM and 10-step PGD.
            `strong`: what a sceptic would ask for (`ensemble.strong`), at twenty times the cost and more.
        epsilons: 0 or more, any order.
        target: what is perturbed, as `adv_target`; None for the input token lookup.
        epsilon_unit: `absolute`, or `embedding`: the grid in units of the mean norm of a token's embedding.
        clip: the valid range of the target's tensor, two tensors that broadcast against it (`valid_range`).
        batch_size: examples a batch.
        collate_fn: makes a batch of a list of examples; None for transformers' `default_data_collator`.
        task: what is measured, a `Task`; None for what the model's outputs show (`tasks`).
        accelerator: an `accelerate.Accelerator`, whose processes take turns at the batches; each needs the whole model,
            and gets the report of all. None where this process attacks them all.
        seed: of whatever an attack draws; noise is drawn batch by batch, so it depends on `batch_size` too.
        progress: show a bar.

    Returns:
        A `RobustnessReport`. The model's weights, `.grad`s, mode and hooks are as before.

    Raises:
        ValueError: bad epsilons, no attack, an empty data set, labels or logits of another shape.
    """
    strongly, attacks = attacks == "strong", by_name(attacks)
    grid = _check_grid(epsilons, attacks, dataset)
    model = bare(model, None)
    place = find_target(target or "word_embeddings", model)
    names = _names(attacks)
    found: list[_Found] = []
    evaluation = Evaluation(model, place, unit_of(epsilon_unit, model), columns_of(attacks), task)
    turns, own = (1, 0) if accelerator is None else (accelerator.num_processes, accelerator.process_index)
    with evaluating(model, place, clip):
        batches = batches_of(dataset, batch_size, collate_fn, seed)
        total = math.ceil(len(dataset) / batch_size) if isinstance(dataset, Sized) else None
        for number, batch in enumerate(bar(batches, progress, "robustness", total)):
            batch = on_device(batch, model)
            if number % turns == own:
                named = dict(zip(names, attacks, strict=True))
                found.append(_attacked(evaluation, batch, named, grid, number, seed, strongly))
            elif number == 0:
                # All have to know the task.
                evaluation.clean(batch)
    found = sorted(AllProcesses(accelerator).gathered(found), key=lambda each: each.number)
    if not found:
        raise ValueError("Robustness can't be evaluated: the data set is empty, or no example has a label.")
    report = _report(evaluation.task, found, grid)
    far = sum(each.far for each in found)
    return replace(report, masking=signs_of_masking(report, far)) if strongly else report


@dataclass(frozen=True)
class _Found:
    """What came of a batch: its number, its labels, without attack, by attack at each epsilon, and how many examples
    stand far out; on the CPU.
    """

    number: int
    labels: Tensor
    clean: Outcome
    scores: dict[str, list[Outcome]]
    far: int


def _attacked(
    evaluation: Evaluation,
    batch: Mapping[str, Any],
    attacks: Mapping[str, AnyAttack],
    grid: Sequence[float],
    number: int,
    seed: int,
    strongly: bool,
) -> _Found:
    """A batch under every attack at every epsilon."""
    clean, far, seed = evaluation.clean(batch), 0, seed + number
    worst = [clean for _ in grid]
    scores: dict[str, list[Outcome]] = {}
    for name, attack in attacks.items():
        now, scores[name] = clean, []
        for i, epsilon in enumerate(grid):
            if isinstance(attack, Ensemble) and attack.adds_up:
                now = now.worse_of(worst[i])
            now = evaluation.tried(batch, attack, epsilon, now, seed)
            worst[i] = worst[i].worse_of(now)
            scores[name].append(now.on_cpu())
    if strongly and max(grid) > 0:
        far = int(evaluation.tried(batch, PGD(steps=10), 100 * max(grid), worst[-1], seed).right.sum())
    return _Found(number, evaluation.task.labels(batch).cpu(), clean.on_cpu(), scores, far)


class Evaluation:
    """Attacks batches of examples.

    Args:
        model: the model, in eval mode.
        place: its target, attached.
        unit: what epsilons are multiplied by.
        columns: of the data that only a targeted attack reads.
        task: what is measured; None where the first batch shows it.
    """

    def __init__(
        self, model: nn.Module, place: Target, unit: float, columns: set[Any], task: Task | None = None
    ) -> None:
        self._model, self._place, self._unit, self._columns = model, place, unit, columns
        self._task = task

    @property
    def task(self) -> Task:
        """What is measured."""
        assert self._task is not None
        return self._task

    @torch.no_grad()
    def clean(self, batch: Mapping[str, Any]) -> Outcome:
        """Without attack."""
        inputs = {name: value for name, value in batch.items() if name not in self._columns}
        outputs = self._model(**inputs)
        self._task = self._task or task_of(self._model, outputs, batch)
        return self._task.judge(outputs, batch)

    def tried(self, batch: Mapping[str, Any], attack: AnyAttack, epsilon: float, now: Outcome, seed: int) -> Outcome:
        """The outcome at this epsilon: the examples that could be worse are attacked, the others stay as they are."""
        if epsilon == 0:
            return now
        runs = attack.runs(self.task.classes) if isinstance(attack, Ensemble) else [(attack, None)]
        for number, (each, loss_of) in enumerate(runs):
            standing = (now.error < self.task.worst).nonzero().flatten()
            if not len(standing):
                break
            others = self._columns - {getattr(each, "targeted", None)}
            part = rows_of({k: v for k, v in batch.items() if k not in others}, standing, len(now.right))
            own = now.rows(standing)
            # Of an ensemble any iterate counts.
            found = self._outputs(part, each, epsilon * self._unit, seed + 1000 * number, loss_of)
            for outputs in found if isinstance(attack, Ensemble) else found[-1:]:
                own = own.worse_of(self.task.judge(outputs, part))
            now = now.with_rows(standing, own)
        return now

    def _outputs(
        self, batch: Mapping[str, Any], attack: Attack | Foolbox, epsilon: float, seed: int, loss_of: LossOf | None
    ) -> list[Any]:
        """What the model says of each iterate."""
        if isinstance(attack, Foolbox):
            return [attack.outputs(self._model, self._place, batch, epsilon, seed)]
        scope = self._place.resolve_scope(attack.scope, "example")
        step = Step(epsilon, seed, examples=examples_in(batch))
        passes = passes_of(self._model, self._place, batch, attack.in_units(self._unit), step, scope, loss_of)
        return [each.outputs for each in passes if not each.is_clean]


def _report(task: Task, found: Sequence[_Found], grid: tuple[float, ...]) -> RobustnessReport:
    clean, labels = [each.clean for each in found], [each.labels for each in found]
    scores = {name: [[each.scores[name][i] for each in found] for i in range(len(grid))] for name in found[0].scores}

    def fell(rows: list[list[Outcome]]) -> tuple[float | None, ...]:
        right = torch.stack([torch.cat([o.right for o in each]) for each in (clean, *rows)])
        first = (~right).int().argmax(0).tolist()
        return tuple(None if all(r) else (0.0, *grid)[i] for r, i in zip(right.T.tolist(), first, strict=True))

    figures = {name: [task.figures(row, labels) for row in rows] for name, rows in scores.items()}
    unattacked = task.figures(clean, labels)
    others = [name for name in unattacked if name != task.metric]
    return RobustnessReport(
        examples=sum(len(each) for each in labels),
        epsilons=grid,
        clean=unattacked[task.metric],
        scores={name: tuple(each[task.metric] for each in row) for name, row in figures.items()},
        metric=task.metric,
        clean_further={other: unattacked[other] for other in others},
        further={
            other: {name: tuple(each[other] for each in row) for name, row in figures.items()} for other in others
        },
        labels=tuple(rows_in(task, labels, labels)),
        predictions=tuple(rows_in(task, [o.prediction for o in clean], labels)),
        fell={name: fell(rows) for name, rows in scores.items()} if task.falls else None,
    )


def columns_of(attacks: Sequence[AnyAttack]) -> set[Any]:
    """What the attacks are targeted at, columns of the data among it."""
    members = [member.attack for a in attacks if isinstance(a, Ensemble) for member in a.members]
    return {attack.targeted for attack in (*members, *(a for a in attacks if isinstance(a, Attack)))}


def by_name(attacks: Sequence[AnyAttack] | AnyAttack | str) -> Sequence[AnyAttack]:
    """The attacks of a preset, or those that are given; a single one as a list."""
    if isinstance(attacks, str) and attacks not in PRESETS:
        raise ValueError(f"attacks is a list of attacks, or one of {', '.join(PRESETS)}; found {attacks!r}.")
    if isinstance(attacks, (Attack, Ensemble, Foolbox)):
        return [attacks]
    return PRESETS[attacks]() if isinstance(attacks, str) else attacks


def _check_grid(epsilons: Sequence[float], attacks: Sequence[AnyAttack], dataset: Any) -> tuple[float, ...]:
    problems = []
    epsilons = [float(e) for e in epsilons]
    if not attacks:
        problems.append("there is no attack: pass at least one, such as FGM().")
    named = [a.name for a in attacks if not isinstance(a, Attack)]
    if len(set(named)) < len(named):
        problems.append(f"ensembles and attacks of foolbox need names of their own; found {', '.join(named)}.")
    bad = [e for e in epsilons if not 0 <= e < float("inf")]
    single = [a for a in attacks if isinstance(a, Attack)]
    problems += [f"{a.name} perturbs {a.default_target}, not inputs." for a in single if a.default_target == "weights"]
    if bad or not epsilons:
        problems.append(f"epsilons must be finite numbers, 0 or more, at least one; found {epsilons!r}.")
    if isinstance(dataset, (Mapping, DataLoader)):
        instead = "one of its data sets" if isinstance(dataset, Mapping) else "its dataset, and its collate_fn"
        problems.append(f"it takes a data set; found {type(dataset).__name__}: pass {instead}.")
    elif isinstance(dataset, Sized) and not len(dataset):
        problems.append("the data set is empty.")
    if problems:
        raise ValueError("Robustness can't be evaluated: " + " ".join(problems))
    return tuple(sorted(set(epsilons)))


def _names(attacks: Sequence[AnyAttack]) -> list[str]:
    """A short name for each attack: the method, its steps, and whatever is needed to tell them apart."""
    names = [a.name + (f"-{a.steps}" if isinstance(a, PGD) else "") for a in attacks]
    return [
        n if names.count(n) == 1 or not isinstance(a, Attack) else f"{n} ({a.norm}, {a.scope or 'example'}, #{i})"
        for i, (n, a) in enumerate(zip(names, attacks, strict=True))
    ]
