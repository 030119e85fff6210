"""Resampling is unbiased, whatever the scheme; weights are never lost; groups keep to themselves."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from exact_laws import tensor
from fewstep.guidance import SCHEMES, Population, effective_sample_size, resample
from fewstep.guidance.populations import GroupStreams

every_scheme = pytest.mark.parametrize("scheme", SCHEMES)
WEIGHTS = tensor([0.5, 0.21, 0.15, 0.09, 0.04, 0.01])


def offspring(scheme: str, weights: torch.Tensor, draws: int, seed: int = 0) -> torch.Tensor:
    """``(draws, particles)`` counts of independent resamplings."""
    uniforms = torch.rand(draws, len(weights), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    ancestors = resample(weights.log().expand(draws, -1), uniforms, scheme)
    return torch.zeros(draws, len(weights), dtype=torch.float64).scatter_add_(1, ancestors, torch.ones_like(uniforms))


@every_scheme
def test_every_particle_is_drawn_by_its_weight(scheme: str) -> None:
    """In any order of the particles."""
    for weights in (WEIGHTS, WEIGHTS.flip(0), WEIGHTS[[3, 0, 5, 1, 4, 2]]):
        counts = offspring(scheme, weights, 40000)
        expected = 6 * weights
        error = counts.std(0) / 200 + 1e-12
        assert ((counts.mean(0) - expected).abs() / error).max() < 4
        assert (counts.sum(1) == 6).all()


def test_variances_of_the_schemes() -> None:
    """Multinomial: ``K W (1 - W)``; systematic and residual draw a whole number of copies in any case."""
    counts = {scheme: offspring(scheme, WEIGHTS, 40000) for scheme in SCHEMES}
    torch.testing.assert_close(counts["multinomial"].var(0), 6 * WEIGHTS * (1 - WEIGHTS), rtol=0.05, atol=0)
    assert counts["systematic"][:, 0].var() == counts["stratified"][:, 0].var() == counts["residual"][:, 0].var() == 0
    assert float(counts["stratified"][:, 1].var()) == pytest.approx(0.193, abs=0.01)
    assert float(counts["systematic"][:, 1].var()) == pytest.approx(0.192, abs=0.01)
    systematic = counts["systematic"]
    assert ((systematic - 6 * WEIGHTS).abs() < 1).all()
    assert (counts["residual"] >= torch.floor(6 * WEIGHTS)).all()


@every_scheme
def test_zero_weights_are_never_drawn(scheme: str) -> None:
    weights = tensor([0.0, 0.3, 0.0, 0.7, 0.0])
    assert offspring(scheme, weights, 5000)[:, [0, 2, 4]].max() == 0
    alone = tensor([-math.inf, -math.inf, 0.0, -math.inf])
    ends = torch.stack([torch.zeros(4), torch.full((4,), 1 - 2.0**-53, dtype=torch.float64)])
    assert (resample(alone.expand(2, -1), ends, scheme) == 2).all()


@every_scheme
def test_rounding_at_the_ends(scheme: str) -> None:
    """A cumulative sum that ends below 1, and a query that rounds to 1."""
    generator = torch.Generator().manual_seed(0)
    log_weights = torch.randn(50, 3001, generator=generator)
    log_weights[:, -7:] = -math.inf
    top = torch.full((50, 3001), 1 - 2.0**-53, dtype=torch.float64)
    ancestors = resample(log_weights, top, scheme)
    assert ancestors.min() >= 0
    assert ancestors.max() < 3001 - 7


@every_scheme
def test_large_log_weights_keep_their_ratios(scheme: str) -> None:
    """``exp(60)`` and more: nothing is exponentiated before the largest is taken off."""
    for size in (30.0, 60.0, 3000.0):
        log_weights = torch.tensor([size, size + math.log(3.0)]).expand(20000, 2)
        uniforms = torch.rand(20000, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        assert float(resample(log_weights, uniforms, scheme).double().mean()) == pytest.approx(0.75, abs=0.01)


@every_scheme
def test_equal_weights_keep_the_population_as_it_is(scheme: str) -> None:
    for count in (1, 2, 3, 7, 64, 1000):
        population = Population(count, resampling=scheme, threshold=1.0, seeds=3)
        population.start(2 * count, torch.empty(0))
        population.weigh(torch.full((2 * count,), -12.3))
        assert torch.equal(population.resample(0), torch.arange(2 * count))
    uniforms = torch.rand(100, 7, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    if scheme in ("systematic", "residual", "stratified"):
        assert torch.equal(resample(torch.zeros(100, 7), uniforms, scheme), torch.arange(7).expand(100, -1))


def test_unknown_schemes_and_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match="resampling 'best' is unknown"):
        resample(torch.zeros(1, 2), torch.zeros(1, 2), "best")
    with pytest.raises(ValueError, match="resampling 'best'"):
        Population(2, resampling="best")
    with pytest.raises(ValueError, match="particles 0"):
        Population(0)
    with pytest.raises(ValueError, match="threshold 2"):
        Population(2, threshold=2.0)
    with pytest.raises(ValueError, match=r"batch of 7 .* particles=2"):
        Population(2).start(7, torch.empty(0))
    population = Population(2, seeds=[1, 2, 3])
    population.start(4, torch.empty(0))
    with pytest.raises(ValueError, match="seeds has 3 entries for 2 groups"):
        population.resample(0)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.floats(-50, 50), min_size=1, max_size=12))
def test_effective_sample_size_lies_between_one_and_all(values: list[float]) -> None:
    size = float(effective_sample_size(tensor([values])))
    assert 1 - 1e-9 <= size <= len(values) + 1e-9
    shifted = float(effective_sample_size(tensor([values]) + 1000.0))
    assert shifted == pytest.approx(size, rel=1e-6)


def test_weights_are_carried_until_a_group_resamples() -> None:
    """Group 0 has even weights and keeps them; group 1 collapses and starts anew."""
    population = Population(4, threshold=0.5, seeds=0)
    population.start(8, torch.empty(0))
    first = tensor([0.1, 0.0, -0.1, 0.2, 9.0, 0.0, 0.0, 0.0])
    population.weigh(first)
    ancestors = population.resample(0)
    assert torch.equal(ancestors, torch.tensor([0, 1, 2, 3, 4, 4, 4, 4]))
    torch.testing.assert_close(population.log_weights, torch.stack([first[:4], torch.zeros(4, dtype=torch.float64)]))
    expected = math.log((math.exp(9.0) + 3) / 4)
    torch.testing.assert_close(population.log_evidence, tensor([0.0, expected]))
    assert population.survivors.tolist() == [4, 1]
    population.weigh(tensor([1.0] * 8))
    population.finish()
    even = float(first[:4].exp().mean().log()) + 1.0
    torch.testing.assert_close(population.log_evidence, tensor([even, expected + 1.0]))


def test_evidence_adds_over_splits() -> None:
    """With weights that are carried, a run in two parts is one run."""
    population = Population(3, threshold=0.0, seeds=0)
    population.start(3, torch.empty(0))
    parts = torch.randn(2, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for k, part in enumerate(parts):
        population.weigh(part)
        population.resample(k)
    population.finish()
    assert float(population.log_evidence) == pytest.approx(float(parts.sum(0).exp().mean().log()))


def test_weights_that_are_no_numbers_are_an_error() -> None:
    population = Population(2, seeds=0)
    population.start(2, torch.empty(0))
    population.weigh(tensor([math.nan, 0.0]))
    population.resample(0)
    with pytest.raises(ValueError, match="log_evidence is"):
        population.finish()


def test_groups_are_drawn_alike_in_any_batch() -> None:
    """Group 1 of two is the only group of a process that was given its seed."""
    together = GroupStreams(5).draw(2, 4, 7)
    assert torch.equal(GroupStreams(6).draw(1, 4, 7)[0], together[1])
    assert torch.equal(GroupStreams([5, 6]).draw(2, 4, 7), together)
    assert not torch.equal(GroupStreams(5).draw(2, 4, 8), together)
    # Even and independent: between neighbouring seeds, steps and columns.
    numbers = torch.stack([GroupStreams(0).draw(500, 40, step) for step in range(3)])
    assert numbers.min() >= 0
    assert numbers.max() < 1
    spread = torch.histc(numbers, 100, 0, 1)
    assert ((spread - 600).square() / 600).sum() < 99 + 4 * math.sqrt(198)
    for one, other in ((numbers[:, 1:], numbers[:, :-1]), (numbers[1:], numbers[:-1])):
        assert abs(float(torch.corrcoef(torch.stack([one.flatten(), other.flatten()]))[0, 1])) < 4 / math.sqrt(40000)
    columns = torch.corrcoef(torch.stack([numbers[..., 1:].flatten(), numbers[..., :-1].flatten()]))
    assert abs(float(columns[0, 1])) < 4 / math.sqrt(58500)
    torch.manual_seed(0)
    first = GroupStreams(None).draw(1, 2, 0)
    torch.manual_seed(0)
    assert torch.equal(GroupStreams(None).draw(1, 2, 0), first)
