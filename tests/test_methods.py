"""Every method against a slow version of its own paper's equations: the same weights after several steps."""

import copy
import random

import pytest
import reference_methods as slow
import torch
import transformers
from models import CLASSES, AdversarialInOrder, StockInOrder, batches, distance, padded_data, tiny, train, weights
from transformers import TrainerCallback

from fgm_trainer import FGM, PGD, PartialFGM
from fgm_trainer.perturbation.geometry import SCOPES
from fgm_trainer.robustness import evaluate_robustness

TOLERANCE = 1e-9
EPSILON = {"vocabulary": 1.0, "example": 1.0, "token": 0.3}
FACTOR = {"l2": 1.0, "linf": 0.1, "max": 0.3}
# (scope, norm): every scope, and every norm in one of them.
PLACES = [(scope, "l2") for scope in SCOPES] + [("example", "linf"), ("example", "max"), ("token", "max")]


def size(scope, norm):
    return FACTOR[norm] * EPSILON[scope]


def lines(trainer):
    return [line for line in trainer.state.log_history if "loss" in line]


def already_divided(accumulate):
    """A loss that Trainer does not divide by the number of micro-batches; what it does with others varies."""

    def loss(outputs, labels, num_items_in_batch=None):
        return torch.nn.functional.cross_entropy(outputs.logits.flatten(0, -2), labels.flatten()) / accumulate

    return {"compute_loss_func": loss} if accumulate > 1 else {}


def check(model, data, scope, method, *, accumulate=1, epochs=1, extra=None, **flags):
    """Trains by both; returns the log lines and what the reference saw."""
    start, ours, theirs = weights(model), copy.deepcopy(model), copy.deepcopy(model)
    trainer = train(
        ours,
        data,
        accumulate=accumulate,
        num_train_epochs=epochs,
        adv_scope=scope,
        extra=already_divided(accumulate) if extra is None else extra,
        seed=slow.SEED,
        **flags,
    )
    seen = slow.train(theirs, epochs * batches(data, 4), method, scope or "example", accumulate=accumulate)
    assert distance(start, theirs) > 1e-3, "nothing was trained, so nothing was compared"
    assert distance(ours, theirs) < TOLERANCE
    return lines(trainer), seen


def logged(found, seen):
    """The log holds the clean loss and the adversarial one, unweighted."""
    for line, (clean, adversarial) in zip(found, seen, strict=True):
        assert line["adv_loss"] == pytest.approx(adversarial, abs=1e-3)
        assert line["loss"] == pytest.approx(clean, abs=1e-3)


def matters(model, data, scope, method, other, **settings):
    """Two references differ by far more than the tolerance, so what tells them apart is tested."""
    one, two = copy.deepcopy(model), copy.deepcopy(model)
    slow.train(one, batches(data, 4), method, scope, **settings)
    slow.train(two, batches(data, 4), other, scope, **settings)
    assert distance(one, two) > 1e-6


# Attacks on the loss ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scope", SCOPES)
def test_fgsm(scope):
    model = tiny("bert")
    found, seen = check(
        model, padded_data(model), scope, slow.fgm("linf", epsilon=0.05), adv_method="fgsm", adv_epsilon=0.05
    )
    logged(found, seen)


def test_fgsm_by_default_is_a_sign_of_every_entry():
    model = tiny("bert")
    check(model, padded_data(model), None, slow.fgm("linf", epsilon=0.005), adv_method="fgsm")


def drawn(share):
    """The package's convention for which examples are attacked."""

    def chosen(seed, examples):
        draw = random.Random(seed)
        count = max(1, int(examples * share + draw.random()))
        return torch.tensor(draw.sample(range(examples), count))

    return chosen


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize(("scope", "norm"), [place for place in PLACES if place[0] != "vocabulary"])
@pytest.mark.parametrize("share", [0.3, 0.6, 1.0])
def test_partial_fgm(scope, norm, share, accumulate):
    model = tiny("bert")
    data, epsilon = padded_data(model), size(scope, norm)
    method = slow.partial_fgm(norm, epsilon=epsilon, chosen=drawn(share), weight=0.7)
    flags = {"adv_method": "partial_fgm", "adv_epsilon": epsilon, "adv_norm": norm, "adv_weight": 0.7}
    check(model, data, scope, method, accumulate=accumulate, adv_kwargs={"share": share}, **flags)


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize(("scope", "norm"), [place for place in PLACES if place[0] != "vocabulary"])
def test_atta(scope, norm, accumulate):
    """Three epochs: the first as `partial_fgm`, the others along the gradients of the epoch before."""
    model = tiny("bert")
    data, epsilon = padded_data(model), size(scope, norm) / 2
    method = slow.ATTA(norm, epsilon=epsilon, chosen=drawn(0.6), weight=0.7)
    flags = {"adv_method": "atta", "adv_epsilon": epsilon, "adv_norm": norm, "adv_weight": 0.7}
    check(model, data, scope, method, accumulate=accumulate, epochs=3, adv_kwargs={"share": 0.6}, **flags)
    # The step that meets the first example again does not know it yet.
    assert method.kinds == ["new"] * (4 + accumulate) + ["known"] * (8 - accumulate)


def test_what_atta_remembers_matters():
    model = tiny("bert")
    method = slow.ATTA(epsilon=0.5, chosen=drawn(0.6))
    matters(model, 3 * padded_data(model), "example", method, slow.partial_fgm(epsilon=0.5, chosen=drawn(0.6)))


def test_the_part_of_a_batch_is_the_share_on_average():
    counts = [len(drawn(0.3)(seed, 4)) for seed in range(400)]
    assert set(counts) == {1, 2}
    assert sum(counts) / 400 == pytest.approx(0.3 * 4, abs=0.1)


def test_a_share_that_makes_no_sense():
    with pytest.raises(ValueError, match=r"share must be above 0 and at most 1; found 0\. clean_weight must be left"):
        PartialFGM(epsilon=0.3, share=0, clean_weight=0.5)


def test_a_part_of_the_batch_needs_one_row_an_example():
    model = tiny("bert")
    data = [{**row, "twice": 1} for row in padded_data(model)]

    class Doubled(AdversarialInOrder):
        def compute_loss(self, model, inputs, **kwargs):
            inputs = {name: torch.cat([value, value]) for name, value in inputs.items() if name != "twice"}
            return super().compute_loss(model, inputs, **kwargs)

    with pytest.raises(RuntimeError, match=r"4 examples are 8 rows\. Choose a method that perturbs them all"):
        train(model, data, trainer=Doubled, adv_method="partial_fgm")


@pytest.mark.parametrize(("scope", "norm"), PLACES)
def test_pgd_from_a_random_start(scope, norm):
    model = tiny("bert")
    data, epsilon = padded_data(model), size(scope, norm)
    method = slow.pgd(norm, epsilon=epsilon, steps=2, random_start=True)
    flags = {"adv_method": "pgd", "adv_epsilon": epsilon, "adv_norm": norm, "adv_steps": 2}
    check(model, data, scope, method, adv_kwargs={"random_start": True}, **flags)
    matters(model, data, scope, method, slow.pgd(norm, epsilon=epsilon, steps=2))


@pytest.mark.parametrize("scope", SCOPES)
def test_noise(scope):
    model = tiny("bert")
    method = slow.noise(epsilon=EPSILON[scope])
    check(model, padded_data(model), scope, method, adv_method="noise", adv_epsilon=EPSILON[scope])


@pytest.mark.parametrize(("scope", "norm"), PLACES)
def test_freelb(scope, norm):
    model = tiny("bert")
    epsilon = size(scope, norm)
    found, seen = check(
        model,
        padded_data(model),
        scope,
        slow.freelb(norm, epsilon=epsilon),
        adv_method="freelb",
        adv_epsilon=epsilon,
        adv_norm=norm,
    )
    logged(found, seen)


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize(
    "settings",
    [
        {"steps": 2, "step_size": 0.7, "init": 3.0},
        {"steps": 2, "clean": True, "weight": 0.5, "clean_weight": 0.7, "init": 0.0},
        {"steps": 1},
    ],
)
def test_settings_of_freelb(settings, accumulate):
    model = tiny("bert")
    own = {name: settings[name] for name in ("init", "clean", "steps", "step_size") if name in settings}
    check(
        model,
        padded_data(model),
        "example",
        slow.freelb(epsilon=0.8, **settings),
        accumulate=accumulate,
        adv_method="freelb",
        adv_epsilon=0.8,
        adv_weight=settings.get("weight", 1.0),
        adv_clean_weight=settings.get("clean_weight", 1.0),
        adv_kwargs=own,
    )


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize(("scope", "norm"), PLACES)
def test_token_aware(scope, norm, accumulate):
    """Two epochs: what a token got in one optimizer step is what it starts from in the next."""
    model = tiny("bert")
    # Longer ones magnify rounding from step to step.
    data, epsilon = padded_data(model), size(scope, norm) / 2
    found, seen = check(
        model,
        data,
        scope,
        slow.TokenAware(norm, epsilon=epsilon, steps=3),
        accumulate=accumulate,
        epochs=2,
        adv_method="token_aware",
        adv_epsilon=epsilon,
        adv_norm=norm,
        adv_steps=3,
    )
    if accumulate == 1:
        logged(found, seen)


def test_settings_of_token_aware():
    model = tiny("bert")
    settings = {"steps": 2, "step_size": 0.7, "init": 4.0}
    check(
        model,
        padded_data(model),
        "example",
        slow.TokenAware(epsilon=0.6, weight=0.5, **settings),
        adv_method="token_aware",
        adv_epsilon=0.6,
        adv_weight=0.5,
        adv_kwargs=settings,
    )


def test_padding_is_not_remembered_as_the_token_that_has_its_id():
    model = tiny("bert", pad_token_id=None)
    data = padded_data(tiny("bert"))
    for number, example in enumerate(data):
        example["input_ids"] = [
            token if there else 7 for token, there in zip(example["input_ids"], example["attention_mask"], strict=True)
        ]
        example["input_ids"][number % 3] = 7
    check(model, data, "example", slow.TokenAware(epsilon=0.5), adv_method="token_aware", adv_epsilon=0.5)


class _Forgets(slow.TokenAware):
    def end(self, place):
        self.found = {}


class _AtOnce(slow.TokenAware):
    def __call__(self, place, *args):
        result = super().__call__(place, *args)
        super().end(place)
        return result


def test_the_table_matters():
    """A table that is never written, and one that is written after every micro-batch, give other weights."""
    model = tiny("bert")
    data = padded_data(model)
    settings = {"epsilon": 1.0, "steps": 3}
    matters(model, data, "example", slow.TokenAware(**settings), _Forgets(**settings))
    matters(model, data, "example", slow.TokenAware(**settings), _AtOnce(**settings), accumulate=2)


# Divergences ------------------------------------------------------------------------------------------------------

DIVERGENCES = {
    "vat": lambda scope, norm, **more: slow.vat(norm, epsilon=size(scope, norm), **more),
    "r3f": lambda scope, norm, **more: slow.r3f(epsilon=0.2, **more),
    "smart": lambda scope, norm, **more: slow.Smart(norm, epsilon=size(scope, norm), **OF_SMART, **more),
    "alum": lambda scope, norm, **more: slow.Smart(norm, epsilon=size(scope, norm), raw=True, **OF_ALUM, **more),
}
OF_SMART = {"step_size": 0.2, "sigma": 0.05}
OF_ALUM = {"step_size": 40.0, "sigma": 0.05}
OWN = {"vat": {}, "r3f": {}, "smart": OF_SMART, "alum": OF_ALUM}


def flags_of(name, scope, norm):
    if name == "r3f":
        return {"adv_method": name, "adv_epsilon": 0.2}
    return {"adv_method": name, "adv_epsilon": size(scope, norm), "adv_norm": norm, "adv_kwargs": OWN[name]}


def check_divergence(name, model, data, scope="example", norm="l2", settings=None, **flags):
    method = DIVERGENCES[name](scope, norm, **(settings or {}))
    return check(model, data, scope, method, **{**flags_of(name, scope, norm), **flags})


@pytest.mark.parametrize(("scope", "norm"), PLACES)
@pytest.mark.parametrize("name", ["vat", "smart", "alum"])
def test_divergence(name, scope, norm):
    model = tiny("bert")
    data = padded_data(model)
    found, seen = check_divergence(name, model, data, scope, norm)
    logged(found, seen)
    assert seen[0][1] > 1e-3
    stock = copy.deepcopy(model)
    train(stock, data, trainer=StockInOrder)
    theirs = copy.deepcopy(model)
    slow.train(theirs, batches(data, 4), DIVERGENCES[name](scope, norm), scope)
    assert distance(stock, theirs) > 1e-5


@pytest.mark.parametrize("scope", SCOPES)
def test_r3f(scope):
    model = tiny("bert")
    found, seen = check_divergence("r3f", model, padded_data(model), scope)
    logged(found, seen)
    assert seen[0][1] > 1e-3


@pytest.mark.parametrize("name", DIVERGENCES)
def test_a_divergence_is_a_mean_over_micro_batches(name):
    model = tiny("bert")
    found, seen = check_divergence(name, model, padded_data(model), accumulate=2)
    for line, pair in zip(found, zip(seen[::2], seen[1::2], strict=True), strict=True):
        assert line["adv_loss"] == pytest.approx(sum(adversarial for _, adversarial in pair) / 2, abs=1e-3)


@pytest.mark.parametrize("name", DIVERGENCES)
def test_a_divergence_is_a_mean_whatever_is_done_with_the_loss(name):
    """Stock Trainer divides the model's own loss by the number of micro-batches, and in some versions does not."""
    model = tiny("bert")
    data = padded_data(model)
    stock, divided = copy.deepcopy(model), copy.deepcopy(model)
    train(stock, data, trainer=StockInOrder, accumulate=2)
    slow.train(divided, batches(data, 4), slow.plain, accumulate=2)
    clean_weight = 1.0 if distance(stock, divided) < TOLERANCE else 2.0
    check_divergence(name, model, data, settings={"clean_weight": clean_weight}, accumulate=2, extra={})


@pytest.mark.parametrize("name", DIVERGENCES)
def test_weights_of_loss_and_divergence(name):
    model = tiny("bert")
    settings = {"weight": 2.0, "clean_weight": 0.5}
    found, seen = check_divergence(
        name, model, padded_data(model), settings=settings, adv_weight=2.0, adv_clean_weight=0.5
    )
    logged(found, seen)


@pytest.mark.parametrize("settings", [{"iterations": 3}, {"xi": 0.5}])
def test_settings_of_vat(settings):
    model = tiny("bert")
    data = padded_data(model)
    check_divergence("vat", model, data, settings=settings, adv_kwargs=settings)
    matters(model, data, "example", slow.vat(epsilon=1.0), slow.vat(epsilon=1.0, **settings))


@pytest.mark.parametrize("name", ["smart", "alum"])
def test_several_ascent_steps(name):
    model = tiny("bert")
    check_divergence(name, model, padded_data(model), norm="max", settings={"steps": 3}, adv_steps=3)


@pytest.mark.parametrize("name", ["smart", "alum"])
def test_the_published_sizes(name):
    """Sizes at which float64 has few digits of a divergence left; what the weights feel is the loss."""
    model = tiny("bert")
    sizes = {"epsilon": 1e-5, "step_size": 1e-3, "sigma": 1e-5}
    check(model, padded_data(model), None, slow.Smart(raw=name == "alum", **sizes), adv_method=name)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_bregman(accumulate):
    """The running mean is renewed once an optimizer step, and starts as the weights of the start."""
    model = tiny("bert")
    data = padded_data(model)
    settings = {"bregman": 3.0, "decay": 0.6, "weight": 0.5}
    method = DIVERGENCES["smart"]("example", "max", **settings)
    own = {**OF_SMART, "bregman": 3.0, "decay": 0.6}
    flags = {**flags_of("smart", "example", "max"), "adv_kwargs": own, "adv_weight": 0.5}
    found, seen = check(model, data, "example", method, accumulate=accumulate, **flags)
    if accumulate == 1:
        logged(found, seen)
    for other in ({"bregman": 0.0}, {"decay": 0.9}):
        method = DIVERGENCES["smart"]("example", "max", **settings)
        changed = DIVERGENCES["smart"]("example", "max", **{**settings, **other})
        matters(model, data, "example", method, changed, accumulate=accumulate)


class _States(TrainerCallback):
    """The random state at the start of each optimizer step."""

    def __init__(self):
        self.states = []

    def on_step_begin(self, args, state, control, **kwargs):
        self.states.append(torch.get_rng_state())


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("name", [*DIVERGENCES, "bregman"])
def test_with_dropout_it_is_the_joint_gradient(name, accumulate):
    """One graph, drawn from the same random state, in which every branch has the masks that it had when it was run."""
    model = tiny("bert", hidden_dropout_prob=0.2, attention_probs_dropout_prob=0.2)
    data, states = padded_data(model), _States()
    bregman = {"bregman": 3.0, "decay": 0.6} if name == "bregman" else {}
    name = "smart" if bregman else name
    flags = flags_of(name, "example", "l2")
    if bregman:
        flags["adv_kwargs"] = {**OF_SMART, **bregman}
    ours, theirs, other = (copy.deepcopy(model) for _ in range(3))
    extra = {"callbacks": [states], **already_divided(accumulate)}
    train(ours, data, accumulate=accumulate, adv_scope="example", extra=extra, **flags)
    for which, started in ((theirs, states.states), (other, states.states[:1] * 4)):
        method = DIVERGENCES[name]("example", "l2", **bregman)
        slow.train(which, batches(data, 4), method, accumulate=accumulate, random_states=started)
    assert distance(ours, theirs) < TOLERANCE
    assert distance(ours, other) > 1e-5, "no dropout was drawn"


# Other heads ------------------------------------------------------------------------------------------------------


def headed(head, name="bert"):
    """A tiny model with another head."""
    config = tiny(name).config
    torch.manual_seed(0)
    model = getattr(transformers, head)(config).double()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0.0, 0.3)
    return model


@pytest.mark.parametrize("name", DIVERGENCES)
def test_regression_compares_squared_differences(name):
    model = tiny("bert", classes=1)
    data = padded_data(model, regression=True)
    found, seen = check_divergence(name, model, data, settings={"family": "number"})
    logged(found, seen)


def several_labels(model):
    data = padded_data(model)
    for number, example in enumerate(data):
        example["labels"] = [float(number % 2), float(number % 3 == 0), 1.0]
    return data


@pytest.mark.parametrize("said", [True, False])
@pytest.mark.parametrize("name", DIVERGENCES)
def test_several_labels_an_example(name, said):
    """The configuration need not name the problem: transformers finds it out in the first forward pass."""
    model = tiny("bert", problem_type="multi_label_classification" if said else None)
    check_divergence(name, model, several_labels(model), settings={"family": "yes or no"})


def labelled_tokens(model, classes):
    data = padded_data(model)
    for example in data:
        pairs = zip(example["input_ids"], example["attention_mask"], strict=True)
        example["labels"] = [token % classes if there else -100 for token, there in pairs]
    return data


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("name", DIVERGENCES)
def test_token_classification(name, accumulate):
    """Positions without a token have an output, and do not count."""
    model = headed("BertForTokenClassification")
    check_divergence(name, model, labelled_tokens(model, CLASSES), accumulate=accumulate)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_language_model(accumulate):
    """Tied weights; the lookup alone is moved."""
    model = headed("BertForMaskedLM")
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    check_divergence("vat", model, labelled_tokens(model, 30), accumulate=accumulate)


class _PerToken(AdversarialInOrder):
    """The loss is a sum over tokens, divided by the number of tokens of the whole optimizer step."""

    model_accepts_loss_kwargs = property(lambda self: True, lambda self, value: None)


def test_a_divergence_beside_a_loss_that_is_divided_by_all_tokens():
    """All examples have as many labels, so that this loss is the mean over micro-batches, as the divergence is."""
    model = headed("LlamaForCausalLM", "llama")
    data = padded_data(model)
    for example in data:
        example["attention_mask"] = [1] * 4 + [0] * 6
        example["labels"] = [-100, *example["input_ids"][1:4], *[-100] * 6]
    check_divergence("vat", model, data, accumulate=2, extra={}, trainer=_PerToken)


# Weights ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("head", ["BertForSequenceClassification", "BertForMaskedLM"])
def test_awp(head, accumulate):
    model = headed(head)
    data = labelled_tokens(model, 30) if "LM" in head else padded_data(model)
    found, seen = check(
        model, data, None, slow.awp(epsilon=0.1), accumulate=accumulate, adv_method="awp", adv_epsilon=0.1
    )
    if accumulate == 1:
        logged(found, seen)
    matters(model, data, "example", slow.awp(epsilon=0.1), slow.awp(epsilon=1e-6), accumulate=accumulate)


@pytest.mark.parametrize("norm", ["linf", "max"])
def test_settings_of_awp(norm):
    model = tiny("bert")
    method = slow.awp(norm, epsilon=0.01, weight=0.5, clean_weight=0.7)
    flags = {"adv_method": "awp", "adv_epsilon": 0.01, "adv_norm": norm, "adv_weight": 0.5, "adv_clean_weight": 0.7}
    check(model, padded_data(model), None, method, **flags)


def test_awp_without_a_clean_loss():
    model = tiny("bert")
    method = slow.awp(epsilon=0.1, clean_weight=0.0)
    check(model, padded_data(model), None, method, adv_method="awp", adv_epsilon=0.1, adv_clean_weight=0.0)


# First order only -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["fgm", "vat", "smart"])
def test_no_gradient_flows_through_the_making_of_a_perturbation(name):
    # The other implementations of attention have no second derivative.
    model = tiny("bert", attn_implementation="eager")
    data = padded_data(model)
    flags = {"adv_epsilon": 1.0} if name == "fgm" else flags_of(name, "example", "l2")
    make = (lambda scope, norm, **more: slow.fgm(epsilon=1.0, **more)) if name == "fgm" else DIVERGENCES[name]
    check(model, data, "example", make("example", "l2"), **flags)
    matters(model, data, "example", make("example", "l2"), make("example", "l2", through=True))


# Targeted ---------------------------------------------------------------------------------------------------------


def with_a_column(model):
    data = padded_data(model)
    for example in data:
        example["towards"] = (example["labels"] + 1) % CLASSES
    return data


TARGETS = [1, "least_likely", "towards"]


@pytest.mark.parametrize("scope", ["vocabulary", "example"])
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", ["fgm", "pgd"])
def test_targeted(name, target, scope):
    model = tiny("bert")
    data = with_a_column(model)
    make = {"fgm": slow.fgm, "pgd": slow.pgd}[name]
    method = make(epsilon=EPSILON[scope], towards=target)
    flags = {"adv_method": name, "adv_epsilon": EPSILON[scope]}
    found, seen = check(model, data, scope, method, adv_targeted=target, **flags)
    logged(found, seen)
    matters(model, data, scope, method, make(epsilon=EPSILON[scope]))


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", ["fgm", "pgd"])
def test_the_loss_of_the_target_label_goes_down(name, target):
    model = tiny("bert")
    place = slow.Place(model, "example")
    method = {"fgm": slow.fgm, "pgd": slow.pgd}[name](epsilon=0.3, towards=target)
    for batch in batches(with_a_column(model), 4):
        logits = place(batch)[1]
        label = slow.target_label(target, batch, logits)
        delta = method.perturbation(place, batch, 0)
        assert place(batch, delta, labels=label)[0] < place(batch, labels=label)[0] - 1e-3


def test_targeted_without_a_clean_loss():
    model = tiny("bert")
    method = slow.fgm(epsilon=1.0, towards="least_likely", clean_weight=0.0)
    flags = {"adv_epsilon": 1.0, "adv_targeted": "least_likely", "adv_clean_weight": 0.0}
    check(model, with_a_column(model), "example", method, **flags)


def test_targeted_at_tokens():
    """Labels of -100 stay as they are."""
    model = headed("BertForTokenClassification")
    method = slow.fgm(epsilon=1.0, towards=2)
    check(model, labelled_tokens(model, CLASSES), "example", method, adv_epsilon=1.0, adv_targeted=2)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("attack", [FGM, PGD])
def test_targeted_in_evaluation(attack, target):
    """The logits that are judged are those at the reference's perturbation, and they are nearer to the target."""
    model = tiny("bert")
    data = with_a_column(model)
    plain = slow.Place(model, "example")
    left_out = {"labels"} if target == "towards" else {"labels", "towards"}
    rows = [{k: v for k, v in example.items() if k not in left_out} for example in data]
    # What the model says, so that every example stands.
    answers = plain(batches(data, 16)[0])[1].argmax(-1).tolist()
    data = [{**row, "labels": label} for row, label in zip(rows, answers, strict=True)]
    seen = []
    handle = model.register_forward_hook(lambda module, args, output: seen.append(output.logits.detach()))
    try:
        settings = {"attacks": [attack(targeted=target)], "epsilons": [0.3], "progress": False}
        evaluate_robustness(model, data, batch_size=16, **settings)
    finally:
        handle.remove()
    batch = batches(data, 16)[0]
    method = {FGM: slow.fgm, PGD: slow.pgd}[attack](epsilon=0.3, towards=target)
    logits = plain(batch)[1]
    delta = method.perturbation(plain, batch, 0)
    label = slow.target_label(target, batch, logits)
    assert (seen[-1] - plain(batch, delta)[1]).abs().max() < TOLERANCE
    before, after = (torch.nn.functional.cross_entropy(values, label) for values in (seen[0], seen[-1]))
    assert after < before - 1e-3


# Lengths in another unit ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["freelb", "token_aware", "vat", "smart", "r3f"])
def test_lengths_in_units_of_an_embedding(name):
    """Every length of a method is meant in the unit, also those that it takes from epsilon."""
    model = tiny("bert")
    data = padded_data(model)
    unit = model.get_input_embeddings().weight.detach().norm(dim=1).mean().item()
    flags = {"adv_method": name, "adv_scope": "example", "adv_norm": "l2", "num_train_epochs": 2}
    lengths = {"smart": ("adv_epsilon", "sigma", "adv_step_size")}.get(name, ("adv_epsilon",))

    def run(factor, **more):
        given = dict.fromkeys(lengths, 0.3 * factor)
        given["adv_kwargs"] = {key: given.pop(key) for key in list(given) if not key.startswith("adv")} or None
        copied = copy.deepcopy(model)
        train(copied, data, **flags, **given, **more)
        return weights(copied)

    assert distance(run(1.0, adv_epsilon_unit="embedding"), run(unit)) < TOLERANCE
    assert distance(run(1.0), run(unit)) > 1e-5
