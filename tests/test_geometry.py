"""The mathematics of a perturbation, against definitions written out over dense tables and single units."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from fgm_trainer.perturbation.geometry import NORMS, SCOPES, Units, ascent, length, project, sample, shared_entries
from fgm_trainer.perturbation.stacking import row_norms

VOCABULARY = 7
many = settings(max_examples=40, deadline=None, derandomize=True, database=None)


class Case:
    """A random micro-batch; with `dense` and `units` what the definitions speak of."""

    def __init__(self, seed, scope, masked=True, dtype=torch.float64):
        generator = torch.Generator().manual_seed(seed)

        def draw(low, high, shape=()):
            return torch.randint(low, high, shape, generator=generator)

        rows, positions, dimension = int(draw(1, 4)), int(draw(1, 6)), int(draw(1, 5))
        self.scope, self.generator = scope, generator
        self.ids = draw(0, VOCABULARY, (rows, positions))
        self.tokens = draw(0, 4, (rows, positions)) > 0 if masked else None
        self.mask = torch.ones(rows, positions, dtype=torch.bool) if self.tokens is None else self.tokens
        self.values = torch.randn(rows, positions, dimension, generator=generator, dtype=torch.float64).to(dtype)
        padding = None if self.tokens is None else ~self.tokens
        entries = shared_entries(self.ids, padding, VOCABULARY) if scope == "vocabulary" else None
        self.units = Units(scope, padding, entries)

    def table(self, values):
        """Scope vocabulary: the (V, D) gradient of the lookup's weight."""
        table = torch.zeros(VOCABULARY, values.shape[-1], dtype=values.dtype)
        for row, position in self.mask.nonzero().tolist():
            table[self.ids[row, position]] += values[row, position]
        return table

    def spread(self, table):
        """What a perturbed weight does at each position."""
        return table[self.ids] * self.mask[:, :, None]

    def each(self, values, function):
        """`function` applied to the tensor of each unit that has a token, one after the other."""
        if self.scope == "vocabulary":
            return self.spread(function(self.table(values)))
        values = values * self.mask[:, :, None]
        result = torch.zeros_like(values)
        for row in range(values.shape[0]):
            if self.scope == "example":
                result[row] = function(values[row])
                continue
            for position in range(values.shape[1]):
                result[row, position] = function(values[row, position])
        return result

    def members(self, values):
        """The tensor of each unit, every member once: for perturbations, which are the same wherever an id stands."""
        if self.scope == "example":
            return list(values * self.mask[:, :, None])
        if self.scope == "token":
            return list((values * self.mask[:, :, None]).flatten(0, 1))
        table = torch.zeros(VOCABULARY, values.shape[-1], dtype=values.dtype)
        for row, position in self.mask.nonzero().tolist():
            table[self.ids[row, position]] = values[row, position]
        return [table]

    def perturbation(self, size=1.0):
        """A random perturbation, the same at all positions that hold an id in scope vocabulary."""
        if self.scope == "vocabulary":
            table = torch.randn(VOCABULARY, self.values.shape[-1], generator=self.generator, dtype=torch.float64)
            return size * self.spread(table)
        drawn = torch.randn(self.values.shape, generator=self.generator, dtype=torch.float64)
        return size * drawn * self.mask[:, :, None]


seeds = st.integers(0, 2**32 - 1)
scopes = st.sampled_from(SCOPES)
masks = st.booleans()


def by_definition(unit, norm):
    largest = unit.abs().max()
    if largest == 0:
        return unit
    return {"l2": unit / unit.pow(2).sum().sqrt(), "linf": unit.sign(), "max": unit / largest, "none": unit}[norm]


@many
@given(seeds, masks)
def test_shared_entries(seed, masked):
    case = Case(seed, "vocabulary", masked)
    entries, ids, mask = case.units.entries.flatten(), case.ids.flatten(), case.mask.flatten()
    for one in range(len(ids)):
        if not mask[one]:
            assert not mask[entries[one]]
            continue
        assert mask[entries[one]]
        assert ids[entries[one]] == ids[one]
        for other in range(len(ids)):
            if mask[other]:
                assert (entries[one] == entries[other]) == (ids[one] == ids[other])


def test_what_is_kept_between_steps_belongs_to_no_mode():
    ids = torch.tensor([[3, 3, 5, 3, 1, 2, 2, 2, 6, 6, 0]])
    expected = [[True, True, False, True]]

    def check(ids):
        entries = shared_entries(ids, None, VOCABULARY)
        assert (entries[:, :4] == entries[:, :1]).tolist() == expected

    for _ in range(2):
        with FakeTensorMode() as mode:
            shared_entries(mode.from_tensor(ids), None, VOCABULARY)
    with torch.inference_mode():
        check(ids.clone())
    check(ids)
    units = Units("vocabulary", None, shared_entries(ids, None, VOCABULARY))
    values = torch.ones(1, 11, 1, requires_grad=True)
    units.once(values).sum().backward()
    assert values.grad is not None


@pytest.mark.parametrize("norm", NORMS)
def test_positions_that_cancel_give_no_step(norm):
    ids = torch.tensor([[1, 1, 1, 2, 2]])
    units = Units("vocabulary", None, shared_entries(ids, None, 3))
    # In float32 the sums are zero to the last bit; those of thirds, rounded, would not be.
    values = torch.tensor([0.12573022, -0.13210486, 0.0], dtype=torch.float32)
    values[2] = -(values[0] + values[1])
    three = torch.cat([values, torch.tensor([0.5, -0.5])]).view(1, 5, 1)
    assert not ascent(three, norm, units).any()
    if norm != "none":
        # One entry cancels, and the other, much smaller one is all that is left.
        rest = torch.tensor([1.0, -1.0, 0.0, 3e-23, 0.0]).view(1, 5, 1)
        assert ascent(rest, norm, units).flatten().tolist() == pytest.approx([0, 0, 0, 1, 1])


@many
@given(seeds, scopes, masks, st.sampled_from(NORMS))
def test_ascent_is_its_definition(seed, scope, masked, norm):
    case = Case(seed, scope, masked)
    expected = case.each(case.values, lambda unit: by_definition(unit, norm))
    torch.testing.assert_close(ascent(case.values, norm, case.units), expected, rtol=1e-12, atol=1e-14)


@many
@given(seeds, scopes, masks)
def test_ascent_attains_the_dual_norm(seed, scope, masked):
    """<g, step> is the dual norm of g, and no other step of length 1 gets more."""
    case = Case(seed, scope, masked)
    gradients = [case.table(case.values)] if scope == "vocabulary" else case.members(case.values)
    for norm, dual in (("l2", 2), ("linf", 1)):
        steps = case.members(ascent(case.values, norm, case.units))
        others = case.members(sample(case.values, norm, case.units, seed))
        for gradient, step, other in zip(gradients, steps, others, strict=True):
            attained = (gradient * step).sum()
            assert attained == pytest.approx(torch.linalg.vector_norm(gradient, ord=dual).item(), rel=1e-12)
            assert (gradient * other).sum() <= attained + 1e-12


@many
@given(seeds, scopes, masks)
def test_largest_entry_of_max_is_one(seed, scope, masked):
    case = Case(seed, scope, masked)
    for unit in case.members(ascent(case.values, "max", case.units)):
        assert unit.abs().max() in (0.0, 1.0)


@many
@given(seeds, scopes, masks, st.sampled_from(NORMS), st.floats(1e-6, 1e6))
def test_ascent_does_not_see_the_gradients_scale(seed, scope, masked, norm, factor):
    case = Case(seed, scope, masked)
    expected = ascent(case.values, norm, case.units) * (factor if norm == "none" else 1.0)
    torch.testing.assert_close(ascent(factor * case.values, norm, case.units), expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("scope", SCOPES)
def test_zero_gradient_gives_zero(scope, norm):
    case = Case(3, scope)
    assert torch.equal(ascent(torch.zeros_like(case.values), norm, case.units), torch.zeros_like(case.values))


@many
@given(seeds, scopes, st.sampled_from(NORMS), st.sampled_from([math.inf, -math.inf, math.nan]))
def test_a_unit_that_is_not_finite_gives_zero_and_no_other_does(seed, scope, norm, bad):
    case = Case(seed, scope)
    held = case.mask.nonzero().tolist()
    if not held:
        return
    row, position = held[seed % len(held)]
    values = case.values.clone()
    values[row, position, 0] = bad
    expected = ascent(case.values, norm, case.units)
    if scope == "vocabulary":
        expected = torch.zeros_like(expected)
    elif scope == "example":
        expected[row] = 0
    else:
        expected[row, position] = 0
    assert torch.equal(ascent(values, norm, case.units), expected)


@many
@given(seeds, scopes, st.sampled_from(NORMS), st.sampled_from([math.inf, math.nan, 1.0]))
def test_positions_without_a_token_neither_give_nor_get(seed, scope, norm, there):
    case = Case(seed, scope)
    values = torch.where(case.mask[:, :, None], case.values, torch.tensor(there, dtype=torch.float64))
    found = ascent(values, norm, case.units)
    assert torch.equal(found, ascent(case.values, norm, case.units))
    assert not found[~case.mask].any()
    assert not sample(values, norm, case.units, 0)[~case.mask].any()


EXTREMES = [
    (torch.float32, 1e37),
    (torch.float32, 1e-37),
    (torch.float32, 1e-43),
    (torch.bfloat16, 1e37),
    (torch.bfloat16, 1e-37),
    (torch.float16, 6e4),
    (torch.float16, 1e-7),
]


@pytest.mark.parametrize(("dtype", "size"), EXTREMES)
@pytest.mark.parametrize("norm", ["l2", "linf", "max"])
@pytest.mark.parametrize("scope", SCOPES)
def test_extreme_gradients(scope, norm, dtype, size):
    """The squares of such entries leave float32, their sums leave float16; the step has length 1 all the same."""
    case = Case(5, scope)
    values = (torch.where(case.values > 0, 1.0, -1.0) * size).to(dtype)
    assert torch.isfinite(values).all()
    assert values.all()
    step = ascent(values, norm, case.units)
    assert step.dtype == torch.float32
    exact = case.each(values.double(), lambda unit: by_definition(unit, norm))
    torch.testing.assert_close(step.double(), exact, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_arithmetic_is_in_float32_at_least(dtype):
    case = Case(5, "example", dtype=dtype)
    wide = torch.promote_types(dtype, torch.float32)
    assert ascent(case.values, "l2", case.units).dtype == wide
    assert sample(case.values, "l2", case.units, 0).dtype == wide
    assert project(case.values, 1.0, "l2", case.units).dtype == wide
    assert length(case.values, "l2", case.units).dtype == wide


def test_half_precision_sums_are_widened_before_they_are_taken():
    """4096 times 1 is 2048 in a float16 or bfloat16 sum taken one by one."""
    for dtype in (torch.float16, torch.bfloat16):
        ids = torch.cat([torch.zeros(4096), torch.ones(1)]).long()[None]
        units = Units("vocabulary", None, shared_entries(ids, None, 2))
        step = ascent(torch.ones(1, 4097, 1, dtype=dtype), "l2", units)
        assert (step[0, 0] / step[0, -1]).item() == pytest.approx(4096, rel=1e-6)


@many
@given(seeds, scopes, masks, st.sampled_from(NORMS), st.floats(0.01, 10))
def test_length_counts_every_member_once(seed, scope, masked, norm, size):
    case = Case(seed, scope, masked)
    perturbation = case.perturbation(size)
    order = math.inf if norm in ("linf", "max") else 2
    expected = [torch.linalg.vector_norm(unit, ord=order).item() for unit in case.members(perturbation)]
    assert length(perturbation, norm, case.units).flatten().tolist() == pytest.approx(expected, rel=1e-12)


def nearest_by_bisection(point, epsilon):
    """min ||p - point||_2 over ||p||_2 <= epsilon: p = point / (1 + multiplier), the multiplier found by bisection."""
    if point.norm() <= epsilon:
        return point
    low, high = 0.0, 1e6
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if (point / (1 + middle)).norm() > epsilon else (low, middle)
    return point / (1 + high)


def nearest_on_a_grid(point, epsilon):
    """min |p - point| over [-epsilon, epsilon], for each coordinate, by trying 2001 numbers."""
    grid = torch.linspace(-epsilon, epsilon, 2001, dtype=torch.float64)
    return grid[(point[..., None] - grid).abs().argmin(dim=-1)]


@many
@given(seeds, scopes, masks, st.floats(0.05, 3))
def test_project_gives_the_nearest_point(seed, scope, masked, epsilon):
    case = Case(seed, scope, masked)
    far = case.perturbation(2.0)
    solvers = {"l2": (nearest_by_bisection, 1e-9), "linf": (nearest_on_a_grid, epsilon / 1000), "max": None}
    solvers["max"] = solvers["linf"]
    for norm, (solver, tolerance) in solvers.items():
        found = project(far, epsilon, norm, case.units)
        competitor = epsilon * torch.rand((), generator=case.generator, dtype=torch.float64)
        rivals = case.members(competitor * sample(far, norm, case.units, seed))
        assert (length(found, norm, case.units) <= epsilon * (1 + 1e-12)).all()
        assert not found[~case.mask].any()
        for unit, near, rival in zip(case.members(far), case.members(found), rivals, strict=True):
            assert (near - solver(unit, epsilon)).abs().max() <= max(tolerance, 1e-9)
            assert (near - unit).norm() <= (rival - unit).norm() + 1e-12
        torch.testing.assert_close(project(found, epsilon, norm, case.units), found, rtol=1e-12, atol=0)
        inside = found * 0.99
        assert torch.equal(project(inside, epsilon, norm, case.units), inside)


@pytest.mark.parametrize("norm", ["l2", "linf", "max"])
def test_project_to_radius_zero_and_from_zero(norm):
    case = Case(9, "example")
    far = case.perturbation()
    assert not project(far, 0.0, norm, case.units).any()
    assert not project(torch.zeros_like(far), 0.0, norm, case.units).any()


def test_none_has_no_ball():
    case = Case(9, "example")
    far = case.perturbation(100.0)
    assert torch.equal(project(far, 0.1, "none", case.units), far)


@many
@given(seeds, scopes, masks, st.sampled_from(NORMS), st.integers(0, 2**63 - 1))
def test_sample(seed, scope, masked, norm, drawn):
    case = Case(seed, scope, masked)
    before = torch.get_rng_state()
    found = sample(case.values, norm, case.units, drawn)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(found, sample(case.values, norm, case.units, drawn))
    torch.rand(3)
    assert torch.equal(found, sample(case.values, norm, case.units, drawn)), "it depends on the global random state"
    assert not torch.equal(found, sample(case.values, "l2", case.units, drawn + 1)) or not found.any() or norm == "linf"
    for unit, has_token in zip(case.members(found), unit_has_token(case), strict=True):
        size = unit.abs().max() if norm in ("linf", "max") else unit.norm()
        assert size == pytest.approx(1.0 if has_token else 0.0, abs=1e-12)
    if scope == "vocabulary":
        torch.testing.assert_close(found, case.spread(case.members(found)[0]), rtol=0, atol=0)


def unit_has_token(case):
    if case.scope == "vocabulary":
        return [case.mask.any()]
    return case.mask.any(dim=1) if case.scope == "example" else case.mask.flatten()


def test_sample_is_gaussian_in_direction():
    """No direction is preferred: the mean over many draws is small, the spread of a coordinate is 1 / sqrt(n)."""
    units = Units("example")
    drawn = torch.cat([sample(torch.zeros(1, 4, 4), "l2", units, seed) for seed in range(400)]).flatten(1)
    assert drawn.mean(0).abs().max() < 4 / math.sqrt(16 * 400)
    assert drawn.std().item() == pytest.approx(1 / 4, rel=0.05)


def test_tensors_without_positions():
    """(rows, ...): an image, or a pooled vector; one unit a row."""
    values = torch.randn(3, 2, 4, 4, dtype=torch.float64)
    step = ascent(values, "l2", Units("example"))
    for row in range(3):
        torch.testing.assert_close(step[row], values[row] / values[row].norm())
    step = ascent(values[:, 0, 0], "l2", Units("example"))
    assert step.norm(dim=1).tolist() == pytest.approx([1.0] * 3)


def test_refused_units():
    with pytest.raises(ValueError, match="scope must be one of vocabulary, example, token; found 'batch'"):
        Units("batch")
    with pytest.raises(ValueError, match="scope 'vocabulary' needs `entries`: it exists for token lookups only"):
        Units("vocabulary")


def test_a_token_that_is_far_longer_than_the_others_counts_for_four_times_the_median():
    values, padding = torch.randn(3, 6, 8), torch.zeros(3, 6, dtype=torch.bool)
    padding[1, 4:] = True
    plain = row_norms(values, padding)
    assert torch.equal(row_norms(values, padding, 4.0), plain), "none is"
    torch.testing.assert_close(row_norms(values[:1], None, 4.0), plain[:1])
    values[1, 0] *= 1000
    norms = values[1, :4].norm(dim=1)
    norms[0] = 4 * norms.sort().values[1]
    torch.testing.assert_close(row_norms(values, padding, 4.0), torch.stack([plain[0], norms.norm(), plain[2]]))
    mostly_zero = torch.zeros(1, 5, 2)
    mostly_zero[0, 0] = 1.0
    assert row_norms(mostly_zero, None, 4.0).item() == pytest.approx(2**0.5)
