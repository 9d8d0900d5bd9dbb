"""`attack_batch`: the adversarial examples of a batch, against plain torch."""

import pytest
import torch
from models import batches
from test_images import EXACT, GREY, ODD, images, make_processor, outside, tiny_vit
from test_robustness import fingerprint, model_and_data, prepared, same
from transformers import default_data_collator

from fgm_trainer import AWP, FGM, FGSM, PGD, Noise, valid_range
from fgm_trainer.robustness import attack_batch, evaluate_robustness


def test_of_embeddings_it_is_the_normalised_gradient():
    model, data = model_and_data(8)
    (batch,) = batches(data, 8)
    found = attack_batch(model, batch, FGM(epsilon=0.3))
    embeds = model.get_input_embeddings()(batch["input_ids"]).detach().requires_grad_()
    others = {name: batch[name] for name in ("attention_mask", "labels")}
    gradient = torch.autograd.grad(model(inputs_embeds=embeds, **others).loss, embeds)[0]
    gradient = gradient * batch["attention_mask"][:, :, None]
    expected = 0.3 * gradient / gradient.flatten(1).norm(dim=1)[:, None, None]
    torch.testing.assert_close(found.delta, expected, rtol=1e-9, atol=1e-12)
    with torch.no_grad():
        there = model(inputs_embeds=embeds + expected, **others)
    torch.testing.assert_close(found.outputs.logits, there.logits, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(found.loss, there.loss, rtol=1e-9, atol=1e-12)
    assert not found.outputs.logits.requires_grad
    assert all(found.inputs[name] is value for name, value in batch.items())


@pytest.mark.parametrize("normalisation", [GREY, EXACT], ids=["grey", "exact"])
def test_of_pixels_the_inputs_are_what_the_model_saw(normalisation):
    model, clip = tiny_vit(len(normalisation[0])), valid_range((0, 1), make_processor(normalisation))
    batch = default_data_collator(images(normalisation, 4))
    found = attack_batch(model, batch, FGSM(epsilon=0.4), target="pixel_values", clip=clip)
    at = batch["pixel_values"].clone().requires_grad_()
    gradient = torch.autograd.grad(model(pixel_values=at, labels=batch["labels"]).loss, at)[0]
    expected = (batch["pixel_values"] + 0.4 * gradient.sign()).clamp(*clip)
    torch.testing.assert_close(found.inputs["pixel_values"], expected, rtol=0, atol=1e-6)
    with torch.no_grad():
        assert torch.equal(model(**found.inputs).logits, found.outputs.logits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_of_pixels_none_is_rounded_out_of_the_range(dtype):
    """Value plus (bound minus value) may be just outside."""
    model, clip = tiny_vit(3, dtype), valid_range((0, 1), make_processor(ODD))
    low, high = (bound.to(dtype) for bound in clip)
    draw = torch.rand((256, 3, 4, 4), generator=torch.Generator().manual_seed(0))
    value = (low + (high - low) * draw).to(dtype).clamp(low, high)
    batch = {"pixel_values": value, "labels": torch.arange(256) % 3}
    found = attack_batch(model, batch, FGSM(epsilon=9.0), target="pixel_values", clip=clip)
    moved = found.inputs["pixel_values"]
    assert outside([value + found.delta], *clip) > 10, "rounding matters here"
    assert outside([moved], *clip) == 0
    assert ((moved == low) | (moved == high)).double().mean() > 0.9


def test_it_falls_where_the_evaluation_says_so():
    model, data = model_and_data(16)
    with torch.no_grad():
        right = model(**batches(data, 16)[0]).logits.argmax(-1) == batches(data, 16)[0]["labels"]
    # The evaluation attacks those that stand.
    data = [example for example, stands in zip(data, right.tolist(), strict=True) if stands]
    (batch,) = batches(data, len(data))
    attack = PGD(epsilon=0.1, steps=5, random_start=True)
    found = attack_batch(model, batch, attack, seed=3)
    stand = found.outputs.logits.argmax(-1) == batch["labels"]
    assert 0 < stand.sum() < len(data)
    report = evaluate_robustness(model, data, attack, [0.1], seed=3, progress=False)
    assert report.scores["pgd-5"] == (pytest.approx(stand.double().mean().item()),)


def test_a_target_label_lowers_its_own_loss():
    model, data = model_and_data(8)
    (batch,) = batches(data, 8)
    wanted = (batch["labels"] + 1) % 3
    found = attack_batch(model, batch | {"wanted": wanted}, FGM(epsilon=0.2, targeted="wanted"))
    assert "wanted" not in found.inputs
    with torch.no_grad():
        before = torch.nn.functional.cross_entropy(model(**batch).logits, wanted)
    assert torch.nn.functional.cross_entropy(found.outputs.logits, wanted) < before


def test_units_and_a_loss_of_ones_own():
    model, data = model_and_data(8)
    (batch,) = batches(data, 8)
    norm = model.get_input_embeddings().weight.norm(dim=1)
    unit = norm[norm > 0].mean()
    found = attack_batch(model, batch, Noise(epsilon=0.5), epsilon_unit="embedding")
    torch.testing.assert_close(found.delta.flatten(1).norm(dim=1), (0.5 * unit).expand(8))
    plain = attack_batch(model, batch, FGM(epsilon=0.3))
    turned = attack_batch(model, batch, FGM(epsilon=0.3), loss_of=lambda m, b: (-m(**b).loss, None))
    torch.testing.assert_close(turned.delta, -plain.delta)


def test_nothing_is_touched():
    model, data = prepared()
    (batch, *_), before = batches(data, 8), fingerprint(model)
    attack_batch(model, batch, PGD(epsilon=0.3, random_start=True))
    assert all(map(same, before, fingerprint(model)))


def test_what_it_refuses():
    model, data = model_and_data(4)
    (batch,) = batches(data, 4)
    with pytest.raises(ValueError, match=r"here none does: write FGM\(epsilon=0\.2\), say"):
        attack_batch(model, batch, FGM())
    for attack, target in ((AWP(epsilon=0.1), None), (FGM(epsilon=0.1), "weights")):
        with pytest.raises(ValueError, match="would perturb weights, not the examples"):
            attack_batch(model, batch, attack, target=target)
    with pytest.raises(ValueError, match="has no such module"):
        attack_batch(model, batch, FGM(epsilon=0.1), target="nowhere")
