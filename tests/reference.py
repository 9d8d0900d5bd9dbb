"""What the package should compute, written slowly and plainly, in float64, sharing no code with it.

Two ways in: `InPlace` moves the weight of the lookup (the snippet), `AtInput` adds to the lookup's output, one value
for each position. `train` is SGD by hand on top of either.
"""

import torch


def unit_step(gradient, norm):
    """The step of one unit, a tensor of any shape."""
    if gradient.abs().sum() == 0:
        return torch.zeros_like(gradient)
    if norm == "l2":
        return gradient / (gradient**2).sum().sqrt()
    if norm == "linf":
        return gradient.sign()
    if norm == "max":
        return gradient / gradient.abs().max()
    assert norm == "none"
    return gradient


def nearest(delta, epsilon, norm):
    """The nearest point of the ball, for one unit."""
    if norm == "l2":
        size = (delta**2).sum().sqrt()
        return delta * epsilon / size if size > epsilon else delta
    if norm in ("linf", "max"):
        return delta.clamp(min=-epsilon, max=epsilon)
    return delta


def mean_loss(model, batch, **inputs):
    return model(**inputs, labels=batch["labels"]).loss


class InPlace:
    """Scope vocabulary: the rows of the lookup's weight are moved, one unit for the whole micro-batch."""

    def __init__(self, model, loss_of=mean_loss):
        self.model, self.loss_of = model, loss_of
        self.weight = model.get_input_embeddings().weight

    def zero(self, batch):
        return torch.zeros_like(self.weight)

    def loss(self, batch, delta):
        inputs = {key: value for key, value in batch.items() if key != "labels"}
        return self.loss_of(self.model, batch, **inputs)

    def gradient(self, batch, delta):
        backup = self.weight.data.clone()
        self.weight.data.add_(delta)
        gradient = torch.autograd.grad(self.loss(batch, delta), self.weight)[0]
        self.weight.data.copy_(backup)
        return gradient

    def backward(self, batch, delta, factor):
        backup = self.weight.data.clone()
        self.weight.data.add_(delta)
        loss = self.loss(batch, delta)
        (factor * loss).backward()
        self.weight.data.copy_(backup)
        return loss.item()

    def each_unit(self, batch, values, function):
        return function(values)

    def lengths(self, batch, delta):
        rows = delta[batch["input_ids"]] * batch["attention_mask"][:, :, None]
        return (rows**2).sum(dim=(1, 2)).sqrt()


def each_unit(scope, values, function):
    """`function` on each unit of (rows, positions, dimension); in scope vocabulary the whole is one."""
    if scope == "vocabulary":
        return function(values)
    result = torch.zeros_like(values)
    for b in range(values.shape[0]):
        if scope == "example":
            result[b] = function(values[b])
        else:
            for position in range(values.shape[1]):
                result[b, position] = function(values[b, position])
    return result


class AtInput:
    """The lookup's output is moved: scope example or token, or vocabulary where the decoder must not be moved."""

    def __init__(self, model, scope, loss_of=mean_loss):
        self.model, self.scope, self.loss_of = model, scope, loss_of
        self.lookup = model.get_input_embeddings()

    def zero(self, batch):
        weight = self.lookup.weight
        if self.scope == "vocabulary":
            return torch.zeros_like(weight)
        return torch.zeros(*batch["input_ids"].shape, weight.shape[1], dtype=weight.dtype)

    def moved(self, batch, delta):
        if self.scope == "vocabulary":
            delta = torch.nn.functional.embedding(batch["input_ids"], delta)
        return delta * batch["attention_mask"][:, :, None]

    def loss(self, batch, delta):
        moved = self.moved(batch, delta)
        inputs = {key: value for key, value in batch.items() if key != "labels"}
        if type(self.model).__name__.startswith(("GPT2", "Llama")):
            # These find the last token by its id, so they need `input_ids`: the lookup itself adds the perturbation.
            weight = self.lookup.weight
            self.lookup.forward = lambda ids: torch.nn.functional.embedding(ids, weight) + moved
            try:
                return self.loss_of(self.model, batch, **inputs)
            finally:
                del self.lookup.forward
        ids = inputs.pop("input_ids")
        embeds = torch.nn.functional.embedding(ids, self.lookup.weight, padding_idx=self.lookup.padding_idx)
        return self.loss_of(self.model, batch, inputs_embeds=embeds + moved, **inputs)

    def gradient(self, batch, delta):
        delta = delta.clone().requires_grad_()
        gradient = torch.autograd.grad(self.loss(batch, delta), delta)[0]
        return gradient

    def backward(self, batch, delta, factor):
        loss = self.loss(batch, delta)
        (factor * loss).backward()
        return loss.item()

    def each_unit(self, batch, values, function):
        return each_unit(self.scope, values, function)

    def lengths(self, batch, delta):
        return (self.moved(batch, delta) ** 2).sum(dim=(1, 2)).sqrt()


def place_for(model, scope, loss_of=mean_loss):
    if scope == "vocabulary" and not model.config.is_encoder_decoder:
        return InPlace(model, loss_of)
    return AtInput(model, scope, loss_of)


def fgm(place, batch, epsilon, norm):
    gradient = place.gradient(batch, place.zero(batch))
    return place.each_unit(batch, gradient, lambda unit: epsilon * unit_step(unit, norm))


def pgd(place, batch, epsilon, norm, steps=3, step_size=None):
    step_size = 2.5 * epsilon / steps if step_size is None else step_size
    delta = place.zero(batch)
    for _ in range(steps):
        gradient = place.gradient(batch, delta)
        step = place.each_unit(batch, gradient, lambda unit: step_size * unit_step(unit, norm))
        delta = place.each_unit(batch, delta + step, lambda unit: nearest(unit, epsilon, norm))
    return delta


def train(
    model,
    batches,
    scope,
    *,
    epsilon,
    norm="l2",
    lr=0.1,
    accumulate=1,
    attack=fgm,
    weight=1.0,
    clean_weight=1.0,
    share=None,
    epsilon_at=None,
    loss_of=mean_loss,
):
    """SGD by hand. Returns what each micro-batch saw: clean loss, adversarial loss, mean length of the perturbation.

    share: the factor of each micro-batch's loss; 1 / accumulate where None.
    epsilon_at: the epsilon of each optimizer step; 0 for none.
    """
    place = place_for(model, scope, loss_of)
    share = 1.0 / accumulate if share is None else share
    model.train()
    seen = []
    for number, batch in enumerate(batches):
        if number % accumulate == 0:
            model.zero_grad()
        now = epsilon if epsilon_at is None else epsilon_at(number // accumulate)
        zero = place.zero(batch)
        if now == 0:
            seen.append((place.backward(batch, zero, share), None, None))
        else:
            delta = attack(place, batch, now, norm)
            clean = place.backward(batch, zero, clean_weight * share)
            adversarial = place.backward(batch, delta, weight * share)
            seen.append((clean, adversarial, place.lengths(batch, delta).mean().item()))
        if number % accumulate == accumulate - 1:
            with torch.no_grad():
                for parameter in model.parameters():
                    if parameter.grad is not None:
                        parameter -= lr * parameter.grad
    return seen
