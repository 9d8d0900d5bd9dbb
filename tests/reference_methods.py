"""Every method once more, from its paper's equations: slowly, in float64, sharing no code with the package.

Divergences are one graph with both branches in it and one backward pass; norms are loops over examples, tokens or the
vocabulary's rows. The perturbation is added to the lookup's output: a tensor (rows, positions, D) in scope `example`
and `token`, and a table (V, D) in scope `vocabulary`. Only the convention of the random noise is the package's.
"""

import copy

import torch
from reference import each_unit, nearest, unit_step

SEED = 42


def seed_of(step, index):
    return hash((SEED, step, index)) % 2**63


def draw(kind, batch, place, seed):
    """Noise in the shape of the lookup's output; a row of the vocabulary has that of its last position."""
    generator = torch.Generator().manual_seed(seed)
    shape = (*batch["input_ids"].shape, place.dimension)
    if kind == "uniform":
        noise = 2 * torch.rand(shape, dtype=torch.float64, generator=generator) - 1
    else:
        noise = torch.randn(shape, dtype=torch.float64, generator=generator)
    if place.scope != "vocabulary":
        return noise * batch["attention_mask"][:, :, None]
    table = torch.zeros(place.size, place.dimension, dtype=torch.float64)
    for b, row in enumerate(batch["input_ids"]):
        for position, token in enumerate(row):
            if batch["attention_mask"][b, position]:
                table[token] = noise[b, position]
    return table


class Place:
    """The lookup's output of a model."""

    def __init__(self, model, scope):
        self.model, self.scope = model, scope
        self.lookup = model.get_input_embeddings()
        self.size, self.dimension = self.lookup.weight.shape

    def zero(self, batch):
        if self.scope == "vocabulary":
            return torch.zeros(self.size, self.dimension, dtype=torch.float64)
        return torch.zeros(*batch["input_ids"].shape, self.dimension, dtype=torch.float64)

    def __call__(self, batch, delta=None, labels=None, model=None):
        """(loss, logits) of the batch moved by `delta`."""
        model = self.model if model is None else model
        lookup = model.get_input_embeddings()
        ids, mask = batch["input_ids"], batch["attention_mask"]
        embeds = torch.nn.functional.embedding(ids, lookup.weight, padding_idx=lookup.padding_idx)
        if delta is not None:
            shift = torch.nn.functional.embedding(ids, delta) if self.scope == "vocabulary" else delta
            embeds = embeds + shift * mask[:, :, None]
        labels = batch["labels"] if labels is None else labels
        outputs = model(inputs_embeds=embeds, attention_mask=mask, labels=labels)
        return outputs.loss, outputs.logits

    def each_unit(self, values, function):
        return each_unit(self.scope, values, function)

    def entries(self, batch):
        """The number of entries of each unit, in a shape that broadcasts against a perturbation."""
        mask = batch["attention_mask"]
        if self.scope == "vocabulary":
            present = {token.item() for row, m in zip(batch["input_ids"], mask, strict=True) for token in row[m == 1]}
            return torch.tensor(float(len(present) * self.dimension), dtype=torch.float64)
        if self.scope == "example":
            return (mask.sum(dim=1).double() * self.dimension)[:, None, None]
        return torch.tensor(float(self.dimension), dtype=torch.float64)

    def direction(self, gradient, norm):
        return self.each_unit(gradient, lambda unit: unit_step(unit, norm))

    def projected(self, delta, epsilon, norm):
        return self.each_unit(delta, lambda unit: nearest(unit, epsilon, norm))

    def ascent(self, objective, delta, through=False):
        """The gradient of `objective(delta)`; `through` keeps the graph, for who wants the second order."""
        if not through:
            delta = delta.detach()
        if not delta.requires_grad:
            delta = delta.clone().requires_grad_()
        return torch.autograd.grad(objective(delta), delta, create_graph=through)[0]


# How far apart two outputs are ------------------------------------------------------------------------------------


def kl(p, q):
    """KL(p || q) of two distributions, as a sum over outcomes."""
    total = 0.0
    for a, b in zip(p, q, strict=True):
        total = total + a * (a.log() - b.log())
    return total


def of_one(one, other, kind, family):
    """The divergence between two vectors of logits."""
    if family == "number":
        return ((one - other) ** 2).sum()
    if family == "classes":
        pairs = [(one.exp() / one.exp().sum(), other.exp() / other.exp().sum())]
    else:
        pairs = []
        for a, b in zip(1 / (1 + (-one).exp()), 1 / (1 + (-other).exp()), strict=True):
            pairs.append((torch.stack([a, 1 - a]), torch.stack([b, 1 - b])))
    total = 0.0
    for p, q in pairs:
        total = total + kl(p, q) + (kl(q, p) if kind == "symmetric" else 0.0)
    return total


def which_count(loss, logits):
    """The positions that the loss counts: those whose logits it has a gradient at."""
    return (torch.autograd.grad(loss, logits, retain_graph=True)[0] != 0).any(dim=-1)


def apart(one, other, kind, family, counted):
    """The mean over examples, or where each position has a prediction, over the micro-batch's that count."""
    values = []
    for b in range(one.shape[0]):
        if one.dim() == 2:
            values.append(of_one(one[b], other[b], kind, family))
            continue
        for position in range(one.shape[1]):
            if counted[b, position]:
                values.append(of_one(one[b, position], other[b, position], kind, family))
    return sum(values) / len(values)


# The methods: each returns what a micro-batch does ----------------------------------------------------------------
#
# method(place, batch, seed, share) runs the backward passes, the losses multiplied by `share`, and returns the clean
# loss (where there is none, that of the first pass) and what is logged as the adversarial one.


def target_label(towards, batch, logits):
    if towards == "least_likely":
        label = torch.stack([row.argmin() for row in logits])
    elif isinstance(towards, str):
        label = batch[towards]
    else:
        label = torch.full_like(batch["labels"], towards)
    return torch.where(batch["labels"] == -100, batch["labels"], label)


def loss_to_raise(place, batch, towards):
    """The loss as a function of the perturbation; of a target label, turned around."""
    if towards is None:
        return lambda delta: place(batch, delta)[0]
    label = target_label(towards, batch, place(batch)[1])
    return lambda delta: -place(batch, delta, labels=label)[0]


def two_losses(place, batch, delta, share, weight, clean_weight):
    clean, adversarial = place(batch)[0], place(batch, delta)[0]
    (share * (clean_weight * clean + weight * adversarial)).backward()
    return clean.item(), adversarial.item()


def plain(place, batch, seed, share):
    loss = place(batch)[0]
    (share * loss).backward()
    return loss.item(), None


def fgm(norm="l2", *, epsilon, towards=None, weight=1.0, clean_weight=1.0, through=False):
    def perturbation(place, batch, seed):
        gradient = place.ascent(loss_to_raise(place, batch, towards), place.zero(batch), through)
        return epsilon * place.direction(gradient, norm)

    def method(place, batch, seed, share):
        return two_losses(place, batch, perturbation(place, batch, seed), share, weight, clean_weight)

    method.perturbation = perturbation
    return method


def of_a_part(place, batch, parts, norm, epsilon):
    """FGM's perturbation of some examples, run without the others, which get none."""
    delta = place.zero(batch)
    # A table would move the other examples as well.
    assert place.scope != "vocabulary"
    taken = {name: values[parts] for name, values in batch.items()}
    own = place.zero(taken)
    gradient = place.ascent(lambda moved: place(taken, moved)[0], own)
    own = epsilon * place.direction(gradient, norm)
    for number, row in zip(parts, own, strict=True):
        delta[number] = row
    return delta


def partial_fgm(norm="l2", *, epsilon, chosen, weight=1.0):
    """`chosen(seed, examples)` says which examples are attacked; each is run alone, then the batch once."""

    def method(place, batch, seed, share):
        delta = of_a_part(place, batch, chosen(seed, len(batch["labels"])), norm, epsilon)
        loss, _ = place(batch, delta)
        (share * weight * loss).backward()
        return loss.item(), loss.item()

    return method


class ATTA:
    """The gradient of an example's last training pass, one sign an entry and one length a token in float32.

    `end` is called after every optimizer step. Where most of its examples were new the next step is `partial_fgm`'s.
    """

    def __init__(self, norm="l2", *, epsilon, chosen, weight=1.0):
        self.norm, self.epsilon, self.chosen, self.weight = norm, epsilon, chosen, weight
        self.known, self.found, self.new = {}, [], True
        self.kinds = []

    def __call__(self, place, batch, seed, share):
        ids, mask = batch["input_ids"], batch["attention_mask"]
        texts = [tuple(t.item() for t, real in zip(*rows, strict=True) if real) for rows in zip(ids, mask, strict=True)]
        self.kinds.append("new" if self.new else "known")
        if self.new:
            parts = self.chosen(seed, len(texts))
            delta = of_a_part(place, batch, parts, self.norm, self.epsilon)
        else:
            before = place.zero(batch)
            for b, text in enumerate(texts):
                real = [i for i in range(ids.shape[1]) if mask[b, i]]
                for i, row in zip(real, self.known.get(text, []), strict=False):
                    before[b, i] = row
            delta = self.epsilon * place.direction(before, self.norm)
        loss, _ = place(batch, delta)
        (share * self.weight * loss).backward()
        gradient = place.ascent(lambda moved: place(batch, moved)[0], delta)
        for b, text in enumerate(texts):
            rows = [row for row, real in zip(gradient[b], mask[b], strict=True) if real]
            signed = [
                torch.where(row > 0, 1.0, -1.0).double() * row.norm().float().double() / place.dimension**0.5
                for row in rows
            ]
            self.found.append((text, signed))
        return loss.item(), loss.item()

    def end(self, place):
        self.new = 2 * sum(text not in self.known for text, _ in self.found) > len(self.found)
        self.known.update(self.found)
        self.found = []


def pgd(norm="l2", *, epsilon, steps=3, step_size=None, random_start=False, towards=None):
    step_size = 2.5 * epsilon / steps if step_size is None else step_size

    def perturbation(place, batch, seed):
        objective = loss_to_raise(place, batch, towards)
        delta = place.zero(batch)
        if random_start:
            start = place.direction(draw("gaussian", batch, place, seed), "l2" if norm == "none" else norm)
            delta = epsilon / 2 * start
        for _ in range(steps):
            gradient = place.ascent(objective, delta)
            delta = place.projected(delta + step_size * place.direction(gradient, norm), epsilon, norm)
        return delta

    def method(place, batch, seed, share):
        return two_losses(place, batch, perturbation(place, batch, seed), share, 1.0, 1.0)

    method.perturbation = perturbation
    return method


def noise(norm="l2", *, epsilon):
    def method(place, batch, seed, share):
        delta = epsilon * place.direction(draw("gaussian", batch, place, seed), norm)
        return two_losses(place, batch, delta, share, 1.0, 1.0)

    return method


def first_noise(place, batch, epsilon, norm, init, seed):
    start = draw("uniform", batch, place, seed) * init / place.entries(batch).sqrt()
    return place.projected(start, epsilon, norm)


def freelb(norm="l2", *, epsilon, steps=3, step_size=None, init=None, clean=False, weight=1.0, clean_weight=1.0):
    """Algorithm 1: g <- g + 1/K dL(delta_(t-1)); the last ascent step changes nothing that is used."""
    step_size = epsilon / 2 if step_size is None else step_size
    init = epsilon if init is None else init

    def method(place, batch, seed, share):
        losses, first = [], None
        if clean:
            first = place(batch)[0]
            (share * clean_weight * first).backward()
        delta = first_noise(place, batch, epsilon, norm, init, seed)
        for _ in range(steps):
            loss = place(batch, delta)[0]
            (share * weight * loss / steps).backward()
            losses.append(loss.item())
            gradient = place.ascent(lambda moved: place(batch, moved)[0], delta)
            delta = place.projected(delta + step_size * place.direction(gradient, norm), epsilon, norm)
        return losses[0] if first is None else first.item(), sum(losses) / steps

    return method


class TokenAware:
    """TAVAT, algorithm 1, with the table's row as a mean; `end` is called after every optimizer step."""

    def __init__(self, norm="l2", *, epsilon, steps=2, step_size=None, init=None, weight=1.0):
        self.norm, self.epsilon, self.steps, self.weight = norm, epsilon, steps, weight
        self.step_size = epsilon / 2 if step_size is None else step_size
        self.init = epsilon if init is None else init
        self.table, self.found = None, {}

    def start(self, place):
        uniform = torch.rand(place.size, place.dimension, generator=torch.Generator().manual_seed(SEED))
        # In float32, as the package draws it.
        self.table = ((2 * uniform - 1) * self.init / place.dimension**0.5).double()

    def __call__(self, place, batch, seed, share):
        if self.table is None:
            self.start(place)
        ids, mask = batch["input_ids"], batch["attention_mask"]
        delta = first_noise(place, batch, self.epsilon, self.norm, self.init, seed)
        eta = place.zero(batch)
        held = [(b, i) for b in range(ids.shape[0]) for i in range(ids.shape[1]) if mask[b, i]]
        for where in held:
            eta[ids[where] if place.scope == "vocabulary" else where] = self.table[ids[where]]
        eta = place.projected(eta, self.epsilon, self.norm)
        losses = []
        for number in range(self.steps):
            loss = place(batch, delta + eta)[0]
            (share * self.weight * loss / self.steps).backward()
            losses.append(loss.item())
            if number == self.steps - 1:
                break
            gradient = place.ascent(lambda moved: place(batch, moved)[0], delta + eta)
            eta = self.renewed(place, gradient, eta)
            delta = place.projected(
                delta + self.step_size * place.direction(gradient, self.norm), self.epsilon, self.norm
            )
        for where in held:
            row = eta[ids[where] if place.scope == "vocabulary" else where]
            self.found.setdefault(ids[where].item(), []).append(row)
        return losses[0], sum(losses) / self.steps

    def renewed(self, place, gradient, eta):
        """In scope `vocabulary` the micro-batch is what an example is elsewhere."""
        examples = [(gradient, eta)] if place.scope == "vocabulary" else list(zip(gradient, eta, strict=True))
        results = []
        for slopes, rows in examples:
            moved = [row + self.step_size * unit_step(g, self.norm) for g, row in zip(slopes, rows, strict=True)]
            longest = max(row.norm() for row in moved)
            results.append(torch.stack([row * row.norm() / longest for row in moved]))
        moved = results[0] if place.scope == "vocabulary" else torch.stack(results)
        return place.projected(moved, self.epsilon, self.norm)

    def end(self, place):
        for token, rows in self.found.items():
            self.table[token] = sum(rows) / len(rows)
        self.found = {}


def vat(norm="l2", *, epsilon, iterations=1, xi=None, weight=1.0, clean_weight=1.0, family="classes", through=False):
    """The clean prediction is a constant; all passes of a micro-batch have one dropout mask."""
    xi = epsilon / 10 if xi is None else xi

    def method(place, batch, seed, share):
        state = torch.get_rng_state()
        loss, logits = place(batch)
        after = torch.get_rng_state()
        fixed, counted = logits.detach(), which_count(loss, logits)

        def distance(delta):
            torch.set_rng_state(state)
            return apart(fixed, place(batch, delta)[1], "kl", family, counted)

        direction = place.direction(draw("gaussian", batch, place, seed), "l2" if norm == "none" else norm)
        for _ in range(iterations):
            direction = place.direction(place.ascent(distance, xi * direction, through), norm)
        divergence = distance(epsilon * direction)
        torch.set_rng_state(after)
        (share * (clean_weight * loss + weight * divergence)).backward()
        return loss.item(), divergence.item()

    return method


def r3f(*, epsilon, weight=1.0, clean_weight=1.0, family="classes"):
    def method(place, batch, seed, share):
        loss, logits = place(batch)
        _, moved = place(batch, epsilon * draw("uniform", batch, place, seed))
        divergence = apart(logits, moved, "symmetric", family, which_count(loss, logits))
        (share * (clean_weight * loss + weight * divergence)).backward()
        return loss.item(), divergence.item()

    return method


class Smart:
    """SMART, or with `raw` ALUM. `end` renews the running mean of the weights after every optimizer step."""

    def __init__(
        self,
        norm="max",
        *,
        epsilon,
        steps=1,
        step_size,
        sigma,
        bregman=0.0,
        decay=0.99,
        weight=1.0,
        clean_weight=1.0,
        family="classes",
        raw=False,
        through=False,
    ):
        self.norm, self.epsilon, self.steps, self.step_size, self.sigma = norm, epsilon, steps, step_size, sigma
        self.bregman, self.decay, self.weight, self.clean_weight = bregman, decay, weight, clean_weight
        self.family, self.raw, self.through = family, raw, through
        self.mean = None

    def __call__(self, place, batch, seed, share):
        if self.mean is None:
            self.mean = copy.deepcopy(place.model)
        loss, logits = place(batch)
        fixed, counted = logits.detach(), which_count(loss, logits)
        delta = place.projected(self.sigma * draw("gaussian", batch, place, seed), self.epsilon, self.norm)
        for _ in range(self.steps):
            gradient = place.ascent(
                lambda moved: apart(fixed, place(batch, moved)[1], "symmetric", self.family, counted),
                delta,
                self.through,
            )
            # Of one example's own divergence, not of the mean.
            step = len(batch["labels"]) * gradient if self.raw else place.direction(gradient, self.norm)
            delta = place.projected(delta + self.step_size * step, self.epsilon, self.norm)
        divergence = apart(logits, place(batch, delta)[1], "symmetric", self.family, counted)
        total = self.clean_weight * loss + self.weight * divergence
        if self.bregman:
            with torch.no_grad():
                before = place(batch, model=self.mean)[1]
            total = total + self.bregman * apart(before, logits, "symmetric", self.family, counted)
        (share * total).backward()
        return loss.item(), divergence.item()

    def end(self, place):
        with torch.no_grad():
            for mean, weight in zip(self.mean.parameters(), place.model.parameters(), strict=True):
                mean.copy_(self.decay * mean + (1 - self.decay) * weight)


def moved_by_awp(model, gradients, epsilon, norm="l2"):
    """A copy of the model whose weight matrices were moved in place."""
    moved = copy.deepcopy(model)
    with torch.no_grad():
        for name, weight in moved.named_parameters():
            if weight.dim() >= 2:
                weight.add_(epsilon * weight.norm() * unit_step(gradients[name], norm))
    return moved


def awp(norm="l2", *, epsilon, weight=1.0, clean_weight=1.0):
    def method(place, batch, seed, share):
        model = place.model
        inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"], "labels": batch["labels"]}
        clean = model(**inputs).loss
        names, parameters = zip(*model.named_parameters(), strict=True)
        found = torch.autograd.grad(clean, parameters, allow_unused=True)
        gradients = {
            n: torch.zeros_like(p) if g is None else g for n, p, g in zip(names, parameters, found, strict=True)
        }
        moved = moved_by_awp(model, gradients, epsilon, norm)
        moved.zero_grad()
        adversarial = moved(**inputs).loss
        adversarial.backward()
        there = dict(moved.named_parameters())
        for name, parameter in model.named_parameters():
            step = clean_weight * gradients[name]
            if there[name].grad is not None:
                step = step + weight * there[name].grad
            parameter.grad = share * step if parameter.grad is None else parameter.grad + share * step
        return clean.item(), adversarial.item()

    return method


def train(model, batches, method, scope="example", *, lr=0.1, accumulate=1, share=None, random_states=None):
    """SGD by hand. Returns what each micro-batch saw: clean loss and adversarial loss.

    share: the factor of each micro-batch's loss; 1 / accumulate where None.
    random_states: the global random state at the start of each optimizer step, for dropout.
    """
    place = Place(model, scope)
    share = 1 / accumulate if share is None else share
    model.train()
    seen = []
    for number, batch in enumerate(batches):
        step, index = divmod(number, accumulate)
        if index == 0:
            model.zero_grad()
            if random_states is not None:
                torch.set_rng_state(random_states[step])
        seen.append(method(place, batch, seed_of(step, index), share))
        if index == accumulate - 1:
            with torch.no_grad():
                for parameter in model.parameters():
                    if parameter.grad is not None:
                        parameter -= lr * parameter.grad
            if hasattr(method, "end"):
                method.end(place)
    return seen
