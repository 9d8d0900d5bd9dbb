"""`Trainer.hyperparameter_search` over the adversarial flags, with Optuna itself."""

import math

import pytest
import transformers
from models import padded_data, tiny
from test_patching import settings

import fgm_trainer
from fgm_trainer import FGM, PGD, AdversarialTrainer, AdversarialTrainingArguments

optuna = pytest.importorskip("optuna", reason="make .venv/distributed installs it")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.trainers,
    pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning"),
    # Optuna's storage opens a database of its own.
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]


class Noted(AdversarialTrainer):
    """Notes what each trial trains with."""

    def train(self, *args, **kwargs):
        result = super().train(*args, **kwargs)
        self.notes = [*getattr(self, "notes", []), (self.attack, self._adv_run.plan.strength, self.args.adv_epsilon)]
        return result


def searching(tmp_path, kind=Noted, arguments=AdversarialTrainingArguments, **flags):
    data = padded_data(tiny("bert"))
    args = arguments(**settings(tmp_path, max_steps=2), **flags)
    return kind(model_init=lambda: tiny("bert"), args=args, train_dataset=data, eval_dataset=data)


class InOrder(optuna.samplers.BaseSampler):
    """Suggests what stands in a list."""

    def __init__(self, trials):
        self.trials = trials

    def infer_relative_search_space(self, study, trial):
        return {}

    def sample_relative(self, study, trial, search_space):
        return {}

    def sample_independent(self, study, trial, param_name, param_distribution):
        return self.trials[trial.number][param_name]


def search(trainer, *trials):
    """One trial for each of the settings."""

    def space(trial):
        choices = {name: [own[name] for own in trials if name in own] for name in trials[trial.number]}
        return {name: trial.suggest_categorical(name, values) for name, values in choices.items()}

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    trainer.hyperparameter_search(
        space, compute_objective=lambda metrics: metrics["eval_loss"], n_trials=len(trials), backend="optuna",
        sampler=InOrder(trials),
    )  # fmt: skip
    return trainer


@pytest.mark.parametrize("start", [None, "auto", 1.0])
def test_numbers_and_auto_in_any_order(tmp_path, start):
    trials = [{"adv_epsilon": 0.25}, {"adv_epsilon": "auto"}, {"adv_epsilon": 0.5}, {"adv_strength": 0.75}]
    trainer = search(searching(tmp_path, adv_epsilon=start), *trials, {"adv_epsilon": 0.0})
    attacks, strengths, epsilons = zip(*trainer.notes, strict=True)
    # As with a flag of Trainer's own, what a trial does not name is what the one before left.
    assert epsilons == (0.25, "auto", 0.5, 0.5, 0.0)
    assert attacks == tuple(FGM(epsilon=epsilon) for epsilon in epsilons)
    assert strengths == (1.5, 1.5, 1.5, 0.75, 0.75)
    assert all(type(each) in (float, str) for each in epsilons)


def test_methods_and_their_settings(tmp_path):
    trainer = searching(tmp_path, adv_epsilon=0.5, adv_scope="example")
    search(trainer, {"adv_method": "pgd", "adv_steps": 2}, {"adv_method": "pgd", "adv_steps": 4})
    assert [attack for attack, *_ in trainer.notes] == [PGD(epsilon=0.5, scope="example", steps=n) for n in (2, 4)]


@pytest.mark.parametrize(
    ("trial", "says"),
    [
        ({"adv_strength": -0.88}, "adv_strength must be a finite number, 0 or more; found -0.88"),
        ({"adv_epsilon": math.nan}, "adv_epsilon must be a finite number"),
        ({"adv_method": "fgm", "adv_steps": 3}, "adv_steps is given, but the method 'fgm' has no such setting"),
    ],
)
def test_a_trial_that_can_not_be_is_refused(tmp_path, trial, says):
    with pytest.raises(ValueError, match=says):
        search(searching(tmp_path), trial)


def test_under_a_patch(tmp_path):
    with fgm_trainer.patch(adv_scope="example") as patched:
        trainer = searching(tmp_path, transformers.Trainer, transformers.TrainingArguments)
        search(trainer, {"adv_epsilon": 0.25}, {"adv_epsilon": "auto"})
    assert trainer.attack == FGM(epsilon="auto", scope="example")
    assert patched.steps == 4
