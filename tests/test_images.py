"""Pixels: the example script, and the valid range that every pass of an attack keeps to, to the last bit."""

from __future__ import annotations

import gzip
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from test_faults import flags
from torch import nn
from transformers import TrainingArguments, ViTConfig, ViTForImageClassification, default_data_collator, set_seed

from fgm_trainer import FGSM, PGD, AdversarialTrainer, Noise
from fgm_trainer.loops import Adversary
from fgm_trainer.perturbation.calls import SharedCalls
from fgm_trainer.perturbation.clipping import valid_range
from fgm_trainer.perturbation.forward_pass import PerturbedForward
from fgm_trainer.perturbation.targets import InputTensor
from fgm_trainer.robustness import evaluate_robustness

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
sys.path.insert(0, str(EXAMPLES))

import run_image_classification as script  # noqa: E402

# Bounds of three channels that are no round numbers, and such that are: 0.25 and 0.5 are exact in every type.
ODD = ([0.48, 0.457, 0.41], [0.267, 0.261, 0.276])
EXACT = ([0.5, 0.25, 0.75], [0.5, 0.25, 0.125])
GREY = ([0.31], [0.37])
NORMALISATIONS = {"three channels": ODD, "grey": GREY}


def make_processor(normalisation):
    mean, std = normalisation
    return script.ViTImageProcessor(do_resize=False, size={"height": 4, "width": 4}, image_mean=mean, image_std=std)


def images(normalisation, count=16, dtype=torch.float32):
    """Random images in which many pixels are black or white, as the processor makes them for the model."""
    draw = np.random.default_rng(0)
    pixels = draw.choice([0, 0, 0, 100, 200, 255, 255], (count, 4, 4, len(normalisation[0]))).astype(np.uint8)
    made = make_processor(normalisation)([*pixels], input_data_format="channels_last", return_tensors="pt")
    return [{"pixel_values": p.to(dtype), "labels": i % 3} for i, p in enumerate(made["pixel_values"])]


def tiny_vit(channels, dtype=torch.float32):
    set_seed(0)
    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    still = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    sizes = {"image_size": 4, "patch_size": 2, "num_channels": channels, "num_labels": 3}
    model = ViTForImageClassification(ViTConfig(**shape, **still, **sizes)).to(dtype)
    # A fresh ViT hardly listens to its input; gradients of everyday size show what an attack does.
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(8) if p.dim() > 1 else None
    return model


def watched(model):
    """A list to which every forward pass adds what enters the model's first layer."""
    seen = []
    first = next(m for m in model.modules() if isinstance(m, nn.Conv2d))
    first.register_forward_pre_hook(lambda module, args: seen.append(args[0].detach().clone()))
    return seen


def pixel_flags(path, **settings):
    own = {"max_steps": 3, "adv_target": "pixel_values", "adv_clip": [0.0, 1.0], "adv_norm": "linf"}
    return flags(path, **own | settings)


def trainer_on(path, normalisation, dtype=torch.float32, **settings):
    model = tiny_vit(len(normalisation[0]), dtype)
    processor = make_processor(normalisation)
    data = images(normalisation, dtype=dtype)
    args = pixel_flags(path, **settings)
    return AdversarialTrainer(model=model, args=args, train_dataset=data, eval_dataset=data, processing_class=processor)


def outside(seen, low, high):
    """How many values leave the range, bounds in the tensor's own type."""
    return sum(((t < low.to(t)) | (t > high.to(t))).sum().item() for t in seen)


# The range ------------------------------------------------------------------------------------------------------------


def test_valid_range_by_hand():
    low, high = valid_range((0, 1), make_processor(EXACT))
    assert low.shape == high.shape == (3, 1, 1)
    assert low.flatten().tolist() == [-1.0, -1.0, -6.0]
    assert high.flatten().tolist() == [1.0, 3.0, 2.0]
    low, high = valid_range((0.25, 0.75), make_processor(EXACT))
    assert low.flatten().tolist() == [-0.5, 0.0, -4.0]
    assert high.flatten().tolist() == [0.5, 2.0, 0.0]


@pytest.mark.parametrize("normalisation", [*NORMALISATIONS.values(), EXACT], ids=[*NORMALISATIONS, "exact"])
def test_valid_range_is_what_the_processor_makes_of_black_and_white(normalisation):
    channels = len(normalisation[0])
    processor = make_processor(normalisation)
    pair = [np.zeros((4, 4, channels), np.uint8), np.full((4, 4, channels), 255, np.uint8)]
    made = processor(pair, input_data_format="channels_last", return_tensors="pt")["pixel_values"]
    low, high = valid_range([0.0, 1.0], processor)
    assert torch.equal(made[0], low.expand(made[0].shape))
    assert torch.equal(made[1], high.expand(made[1].shape))


def test_valid_range_without_normalisation():
    off = make_processor(EXACT)
    off.do_normalize = False
    for processor in (None, off, object()):
        low, high = valid_range((0, 255), processor)
        assert (low.item(), high.item()) == (0.0, 255.0)
        assert low.shape == ()


def test_valid_range_of_one_number_for_all_channels():
    low, high = valid_range((0, 1), SimpleNamespace(do_normalize=True, image_mean=0.5, image_std=0.25))
    assert (low.item(), high.item()) == (-2.0, 2.0)


def test_valid_range_of_a_processor_that_holds_the_image_processor():
    inner = make_processor(EXACT)
    found = valid_range((0, 1), SimpleNamespace(image_processor=inner, tokenizer=None))
    assert all(torch.equal(a, b) for a, b in zip(found, valid_range((0, 1), inner), strict=True))


@pytest.mark.parametrize("clip", [(1, 0), (0.5, 0.5), (0,), (0, 1, 2), (float("nan"), 1)])
def test_valid_range_refuses(clip):
    with pytest.raises(ValueError, match="two numbers, the lower one first"):
        valid_range(clip)


@pytest.mark.parametrize("target", [None, "word_embeddings", "vit.encoder"])
def test_clip_is_refused_where_no_input_tensor_is_attacked(tmp_path, target):
    with pytest.raises(ValueError, match=r"adv_clip is the valid range of an input tensor, and adv_target is"):
        flags(tmp_path, adv_target=target, adv_clip=[0.0, 1.0])


@pytest.mark.parametrize("clip", [[1.0, 0.0], [1.0, 1.0], [0.0], [0.0, 1.0, 2.0]])
def test_reversed_and_odd_bounds_are_refused(tmp_path, clip):
    with pytest.raises(ValueError, match="adv_clip must be two numbers, the lower one first"):
        flags(tmp_path, adv_target="pixel_values", adv_clip=clip)


def test_a_range_of_other_channels_is_refused(tmp_path):
    """One channel and the bounds of three: without the check the sum would have three channels."""
    trainer = trainer_on(tmp_path, GREY)
    trainer.processing_class = make_processor(ODD)
    with pytest.raises(ValueError, match=r"valid range has shape \(3, 1, 1\), which does not fit the target's \(4, 1,"):
        trainer.train()
    model = tiny_vit(1)
    with pytest.raises(ValueError, match="does not fit"):
        evaluate_robustness(
            model, images(GREY), [FGSM()], target="pixel_values", clip=valid_range((0, 1), make_processor(ODD))
        )


# Every pass -----------------------------------------------------------------------------------------------------------

# By name: the flags, and how many passes a step has. Steps of 1.5 epsilon, so that the projection matters.
TRAINED = {
    "fgsm": ({"adv_method": "fgsm", "adv_epsilon": 0.5}, 2),
    "pgd": ({"adv_method": "pgd", "adv_epsilon": 0.5, "adv_step_size": 0.75}, 4),
    "pgd, random start": (
        {"adv_method": "pgd", "adv_epsilon": 0.5, "adv_kwargs": {"random_start": True}, "adv_step_size": 0.75},
        5,
    ),
    "pgd, adversarial alone": (
        {"adv_method": "pgd", "adv_epsilon": 0.5, "adv_clean_weight": 0.0, "adv_kwargs": {"random_start": True}},
        5,
    ),
    "noise": ({"adv_method": "noise", "adv_epsilon": 0.5}, 2),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("normalisation", NORMALISATIONS.values(), ids=[*NORMALISATIONS])
@pytest.mark.parametrize("method", TRAINED)
def test_every_pass_of_training_is_in_the_range(tmp_path, method, normalisation, dtype):
    settings, passes = TRAINED[method]
    trainer = trainer_on(tmp_path, normalisation, dtype, **settings)
    low, high = valid_range((0, 1), trainer.processing_class)
    seen = watched(trainer.model)
    trainer.train()
    assert len(seen) == 3 * passes
    assert all(t.dtype == dtype for t in seen)
    assert outside(seen, low, high) == 0
    for step in range(3):
        clean, *moved = seen[step * passes : (step + 1) * passes]
        # The bounds are met, so a range that is too narrow would show.
        assert all((t == low.to(t)).any() and (t == high.to(t)).any() for t in moved)
        assert all((t != clean).any() for t in moved)
        # The largest entry is epsilon at most, but for the rounding of the sum in the tensor's type.
        rounding = torch.finfo(dtype).eps * clean.abs().max().item()
        assert all((t.double() - clean.double()).abs().max() <= 0.5 + rounding for t in moved)


@pytest.mark.parametrize("method", ["fgsm", "pgd, random start"])
def test_without_clip_the_range_is_left(tmp_path, method):
    trainer = trainer_on(tmp_path, ODD, adv_clip=None, **TRAINED[method][0])
    low, high = valid_range((0, 1), trainer.processing_class)
    seen = watched(trainer.model)
    trainer.train()
    assert outside(seen, low, high) > 100
    seen.clear()
    trainer.evaluate_robustness(attacks=[FGSM()], epsilons=[0.5])
    assert outside(seen, low, high) > 20


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_the_perturbation_is_no_longer_than_epsilon(tmp_path, norm):
    settings = {"adv_method": "pgd", "adv_norm": norm, "adv_epsilon": 0.5, "adv_step_size": 0.4, "adv_steps": 5}
    trainer = trainer_on(tmp_path, ODD, **settings)
    seen = watched(trainer.model)
    trainer.train()
    lengths = []
    for step in range(3):
        clean, *moved = seen[step * 6 : (step + 1) * 6]
        rows = torch.stack(moved).double().flatten(2) - clean.double().flatten(1)
        lengths.append(rows.norm(dim=-1) if norm == "l2" else rows.abs().amax(-1))
    assert torch.stack(lengths).max() <= 0.5 * (1 + 1e-6)
    assert torch.stack(lengths)[:, -1].max() > 0.3, "the ball is used"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("normalisation", NORMALISATIONS.values(), ids=[*NORMALISATIONS])
def test_every_pass_of_the_evaluation_is_in_the_range(tmp_path, normalisation, dtype):
    trainer = trainer_on(tmp_path, normalisation, dtype)
    low, high = valid_range((0, 1), trainer.processing_class)
    seen = watched(trainer.model)
    attacks = [Noise(norm="linf"), FGSM(), PGD(norm="linf", steps=7, random_start=True), PGD(norm="l2", steps=3)]
    report = trainer.evaluate_robustness(attacks=attacks, epsilons=[0.3, 1.0])
    assert 0 < report.clean <= 1
    assert len(seen) > 10
    assert outside(seen, low, high) == 0
    # The same by the function, which knows no processor.
    again = watched(trainer.model)
    by_hand = evaluate_robustness(
        trainer.model, trainer.eval_dataset, attacks, [0.3, 1.0], target="pixel_values", clip=(low, high),
        batch_size=trainer.args.eval_batch_size, seed=trainer.args.seed,
    )  # fmt: skip
    assert by_hand == report
    assert outside(again, low, high) == 0
    again.clear()
    evaluate_robustness(trainer.model, trainer.eval_dataset, attacks, [0.3, 1.0], target="pixel_values")
    assert outside(again, low, high) > 0


def test_a_loop_of_ones_own_is_in_the_range():
    clip = valid_range((0, 1), make_processor(ODD))
    model = tiny_vit(3)
    adversary = Adversary(model, PGD(epsilon=0.5, norm="linf", random_start=True), target="pixel_values", clip=clip)
    seen = watched(model)
    adversary.backward(default_data_collator(images(ODD, 4)))
    adversary.close()
    assert len(seen) == 5
    assert outside(seen, *clip) == 0


def test_a_target_keeps_its_own_range(tmp_path):
    """With plain TrainingArguments there is no adv_clip; the Trainer must not take away what the target holds."""
    place = InputTensor("pixel_values")
    place.clip = valid_range((0, 1), make_processor(ODD))
    model = tiny_vit(3)
    seen = watched(model)
    args = flags(tmp_path, TrainingArguments, max_steps=3)
    attack = FGSM(epsilon=0.5)
    AdversarialTrainer(model=model, args=args, train_dataset=images(ODD), attack=attack, target=place).train()
    assert len(seen) == 6
    assert outside(seen, *place.clip) == 0


def test_without_a_processor_the_range_is_the_tensors(tmp_path):
    data = [{**e, "pixel_values": e["pixel_values"].clamp(-0.5, 0.5)} for e in images(GREY)]
    args = pixel_flags(tmp_path, adv_clip=[-0.5, 0.5], adv_method="fgsm", adv_epsilon=0.25)
    model = tiny_vit(1)
    seen = watched(model)
    AdversarialTrainer(model=model, args=args, train_dataset=data).train()
    assert outside(seen, torch.tensor(-0.5), torch.tensor(0.5)) == 0
    assert {-0.5, 0.5, -0.25, 0.25} <= set(torch.stack(seen).flatten().tolist())


# A slow reference -----------------------------------------------------------------------------------------------------


def reference_step(gradient, norm):
    return gradient.sign() if norm == "linf" else gradient / (gradient**2).sum().sqrt()


def reference_ball(delta, epsilon, norm):
    if norm == "linf":
        return torch.stack([d.clamp(-epsilon, epsilon) for d in delta.flatten()]).view_as(delta)
    size = (delta**2).sum().sqrt()
    return delta if size <= epsilon else delta * (epsilon / size)


def reference_pgd(model, image, label, low, high, norm, epsilon, size, steps):
    """One image: step, project, clamp, one channel after the other. Returns what the model is shown in each pass."""
    shown, delta = [image], torch.zeros_like(image)
    for _ in range(steps):
        at = shown[-1].clone().requires_grad_()
        loss = model(pixel_values=at[None], labels=label[None]).loss
        gradient = torch.autograd.grad(loss, at)[0]
        delta = reference_ball(delta + size * reference_step(gradient, norm), epsilon, norm)
        moved = torch.stack([(image[c] + delta[c]).clamp(low[c], high[c]) for c in range(len(image))])
        delta = moved - image
        shown.append(moved)
    return shown


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_pgd_with_clip_is_the_reference(tmp_path, norm):
    """In float64: what the model is shown in every pass, and the weights after three steps of SGD."""
    epsilon, size, steps = (0.6, 0.35, 4) if norm == "linf" else (2.0, 1.1, 4)
    low, high = [-1.0, -1.0, -6.0], [1.0, 3.0, 2.0]
    data = images(EXACT, dtype=torch.float64)
    ours, theirs = tiny_vit(3, torch.float64), tiny_vit(3, torch.float64)
    args = pixel_flags(
        tmp_path, adv_method="pgd", adv_norm=norm, adv_epsilon=epsilon, adv_step_size=size, adv_steps=steps,
        optim="sgd", learning_rate=0.01, lr_scheduler_type="constant", max_grad_norm=0.0,
    )  # fmt: skip
    trainer = AdversarialTrainer(model=ours, args=args, train_dataset=data, processing_class=make_processor(EXACT))
    seen = watched(ours)
    trainer.train()
    assert len(seen) == 3 * (1 + steps)
    by_image = {e["pixel_values"].numpy().tobytes(): e["labels"] for e in data}
    clamped = 0
    for number in range(3):
        passes = seen[number * (1 + steps) : (number + 1) * (1 + steps)]
        labels = torch.tensor([by_image[image.numpy().tobytes()] for image in passes[0]])
        found = [
            torch.stack(shown)
            for shown in zip(
                *(
                    reference_pgd(theirs, image, label, low, high, norm, epsilon, size, steps)
                    for image, label in zip(passes[0], labels, strict=True)
                ),
                strict=True,
            )
        ]
        for own, reference in zip(passes, found, strict=True):
            assert (own - reference).abs().max() < 1e-9
        clamped += sum(
            (t[:, c] == bound).sum().item() for t in found[1:] for b in (low, high) for c, bound in enumerate(b)
        )
        clean = theirs(pixel_values=found[0], labels=labels).loss
        adversarial = theirs(pixel_values=found[-1], labels=labels).loss
        gradients = torch.autograd.grad(clean + adversarial, [*theirs.parameters()])
        with torch.no_grad():
            for p, g in zip(theirs.parameters(), gradients, strict=True):
                p -= 0.01 * g
    assert clamped > 100, "the range matters"
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert (p - q).abs().max() < 1e-9
    unmoved = tiny_vit(3, torch.float64)
    assert max((p - q).abs().max() for p, q in zip(ours.parameters(), unmoved.parameters(), strict=True)) > 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_rounding_does_not_leave_the_range(dtype):
    """Value plus (bound minus value) may round to just outside. It is kept inside, and the gradient stays whole."""
    low, high = torch.tensor(-1.7977529), torch.tensor(2.0804598)
    draw = torch.Generator().manual_seed(0)
    value = (low + (high - low) * torch.rand((1, 1, 300, 300), generator=draw)).to(dtype)
    value = value.clamp(low.to(dtype), high.to(dtype))
    delta = 5 * torch.randn(value.shape, generator=draw).sign()
    bound = torch.where(delta > 0, high.to(dtype), low.to(dtype))
    assert outside([value + (bound - value)], low, high) > 100, "rounding matters here"
    calls = SharedCalls(clip=(low, high))
    for given in (None, delta):
        seen = PerturbedForward(calls, given, gradient=True)
        with seen.loss_of({"pixel_values": value}):
            moved = seen.perturb(torch.nn.Identity() if given is None else next(iter(calls.layout))[0], value)
        moved.sum().backward()
        seen.end()
    assert outside([moved], low, high) == 0
    assert (moved - bound).abs().max() <= 2 * torch.finfo(dtype).eps
    assert torch.equal(seen.leaves[0].grad, torch.ones_like(value))


def test_the_gradient_passes_where_the_range_clamps():
    """A pixel that lies at its bound still has a gradient, so a later step can take it back inside."""
    model = tiny_vit(1, torch.float64)
    clip = (torch.tensor(-0.5), torch.tensor(0.5))
    batch = {"pixel_values": torch.full((1, 1, 4, 4), 0.5, dtype=torch.float64), "labels": torch.tensor([1])}
    adversary = Adversary(model, PGD(epsilon=0.3, norm="linf", steps=3), target="pixel_values", clip=clip)
    seen = watched(model)
    adversary.backward(batch)
    adversary.close()
    down = seen[1] < 0.5
    assert 0 < down.sum() < down.numel(), "half of the pixels would go up, and stay"
    assert torch.equal(seen[1][~down], torch.full_like(seen[1][~down], 0.5))


# The script -----------------------------------------------------------------------------------------------------------

SMALL = [
    "--train_samples", "64", "--test_samples", "40", "--max_steps", "3", "--test_steps", "2", "--test_epsilons", "0.2",
    "0.5", "--shown", "2", "--disable_tqdm", "True", "--use_cpu", "True",
]  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    return folder, script.main([*SMALL, "--output_dir", str(folder)])


def test_the_script_saves_its_parts(made):
    folder, found = made
    saved = json.loads((folder / "image_results.json").read_text())
    assert saved == json.loads(json.dumps(found))
    assert saved["settings"]["adv_epsilon"] == 0.2
    for name in script.MODELS:
        report = saved["models"][name]
        assert report["examples"] == 40
        assert set(report["scores"]) == {"noise", "fgsm", "pgd-2"}
        assert all(0 <= row[1] <= row[0] <= report["clean"] for row in report["scores"].values())
        assert {"config.json", "preprocessor_config.json"} <= {p.name for p in (folder / name).iterdir()}
    assert (folder / "examples.png").read_bytes().startswith(b"\x89PNG")


def test_the_script_is_deterministic_and_sees_its_seed(made, tmp_path):
    again = script.main([*SMALL, "--output_dir", str(tmp_path / "again")])
    other = script.main([*SMALL, "--output_dir", str(tmp_path / "other"), "--seed", "1"])
    weights = [
        torch.cat([p.flatten() for p in ViTForImageClassification.from_pretrained(folder / "adversarial").parameters()])
        for folder in (made[0], tmp_path / "again", tmp_path / "other")
    ]
    assert again["models"] == made[1]["models"]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    assert other["settings"]["seed"] == 1


def test_digits_are_bytes_and_the_last_ones_are_held_out():
    train, test = script.load_images(script.ImageArguments())
    assert (train.pixels.shape, test.pixels.shape) == ((1297, 8, 8), (500, 8, 8))
    assert train.pixels.dtype == np.uint8
    assert (train.pixels.min(), train.pixels.max()) == (0, 255)


def test_resnet(tmp_path):
    found = script.main([*SMALL, "--output_dir", str(tmp_path), "--architecture", "resnet", "--adv_method", "fgsm"])
    assert found["models"]["adversarial"]["scores"] != found["models"]["plain"]["scores"]


# Fashion-MNIST --------------------------------------------------------------------------------------------------------


def idx(values):
    head = bytes([0, 0, 8, values.ndim]) + b"".join(size.to_bytes(4, "big") for size in values.shape)
    return gzip.compress(head + values.astype(np.uint8).tobytes())


def write_fashion(folder, side=28):
    draw = np.random.default_rng(0)
    for (pixels, labels), count in zip(script.IDX_FILES.values(), (70, 40), strict=True):
        (folder / pixels).write_bytes(idx(draw.integers(0, 256, (count, side, side))))
        (folder / labels).write_bytes(idx(np.arange(count) % 10))
    return folder


def test_fashion_mnist_from_a_folder(tmp_path):
    write_fashion(tmp_path)
    flags = ["--dataset", "fashion-mnist", "--dataset_folder", str(tmp_path), "--output_dir", str(tmp_path / "out")]
    found = script.main([*SMALL, *flags])
    assert found["models"]["plain"]["examples"] == 40
    assert found["settings"]["dataset"] == "fashion-mnist"
    config = json.loads((tmp_path / "out" / "plain" / "config.json").read_text())
    assert config["id2label"]["9"] == "Boot"


def test_missing_files_say_what_to_install(tmp_path):
    with pytest.raises(script.DataError, match=r"there is no train-images.*apt-get install dataset-fashion-mnist"):
        script.load_idx(tmp_path)
    write_fashion(tmp_path)
    (tmp_path / "t10k-labels-idx1-ubyte.gz").unlink()
    with pytest.raises(script.DataError, match=r"there is no t10k-labels-idx1-ubyte\.gz\. On Debian"):
        script.load_idx(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"no gzip", "can't be read"),
        (idx(np.arange(40) % 10)[:-12], "can't be read"),
        (gzip.compress(b""), "no whole IDX file"),
        (gzip.compress(b"\0\0\x0d\x01\0\0\0\x01\0"), "no whole IDX file"),
        (gzip.compress(b"\0\0\x08\x01\0\0\0\x28\0\0"), "no whole IDX file"),
        (gzip.compress(b"\0\0\x08\x03\0\0"), "no whole IDX file"),
        (idx(np.arange(39) % 10), "a label for each"),
    ],
    # The bytes hold the time of day: two workers would not collect the same names.
    ids=["no-gzip", "cut", "empty", "no-bytes", "short", "no-shape", "too-few"],
)
def test_damaged_files_are_named(tmp_path, content, message):
    write_fashion(tmp_path)
    (tmp_path / "t10k-labels-idx1-ubyte.gz").write_bytes(content)
    with pytest.raises(script.DataError, match=message):
        script.load_idx(tmp_path)


def test_images_of_another_size_are_refused(tmp_path):
    with pytest.raises(script.DataError, match="expected are images of 28 times 28"):
        script.load_idx(write_fashion(tmp_path, side=20))


def test_every_flag_has_help_and_a_default():
    images_args, args = script.parse_arguments([])
    assert args.adv_clip == [0.0, 1.0]
    assert (args.adv_target, args.adv_norm) == ("pixel_values", "linf")
    assert all(f.metadata.get("help") for f in vars(type(images_args))["__dataclass_fields__"].values())
    assert script.parse_arguments(["--adv_clip", "0", "0.5"])[1].adv_clip == [0.0, 0.5]
