"""Ensembles of verifiers: ranks against SciPy's, and searches that no reward's scale can sway."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from scipy.stats import rankdata

from exact_laws import ExactDenoiser, first, searching
from fewstep.guidance import NoiseSearch, PathSearch, RandomSearch, VerifierEnsemble, ZeroOrderSearch
from fewstep.guidance.verifiers import mean_ranks

every_search = pytest.mark.parametrize("search", [RandomSearch, ZeroOrderSearch, PathSearch])


def second(x: torch.Tensor) -> torch.Tensor:
    return x[:, 1]


def both(search: Any, rewards: list[Any], rounds: int = 4, batch: int = 32, **options: Any) -> Any:
    one = searching(search, ExactDenoiser(batch), VerifierEnsemble(rewards), **options)
    return one.run(rounds * one.cost)


def test_ranks_are_those_of_scipy() -> None:
    """With equals, which share the mean of their ranks."""
    values = torch.randint(5, (6, 9, 3), generator=torch.Generator().manual_seed(0)).double()
    expected = torch.from_numpy(rankdata(values.numpy(), axis=1)).mean(2)
    torch.testing.assert_close(mean_ranks(values), expected)
    torch.testing.assert_close(mean_ranks(torch.zeros(2, 5, 2)), torch.full((2, 5), 3.0).double())


@every_search
def test_the_scale_of_a_reward_does_not_count(search: type[NoiseSearch]) -> None:
    """Nor anything else but its order. To a sum of rewards it does."""
    plain = both(search, [first, second])
    bent = both(search, [lambda x: 1000.0 * first(x) - 7.0, lambda x: torch.exp(second(x) / 10.0)])
    assert torch.equal(plain.noise, bent.noise)
    assert torch.equal(plain.samples, bent.samples)
    assert plain.values.shape == (8, 2)
    torch.testing.assert_close(plain.values, plain.samples[:, :2].double())
    sums = []
    for scale in (1.0, 1000.0):
        one = searching(search, ExactDenoiser(32), lambda x, scale=scale: scale * first(x) + second(x))
        sums.append(one.run(4 * one.cost).noise)
    assert not torch.equal(*sums)


@every_search
def test_an_ensemble_of_one_opinion_is_that_reward(search: type[NoiseSearch]) -> None:
    alone = searching(search, ExactDenoiser(32))
    expected = alone.run(4 * alone.cost)
    found = both(search, [first, lambda x: 3.0 * first(x)])
    assert torch.equal(found.noise, expected.noise)
    assert torch.equal(found.values[:, 0].float(), expected.values)


def test_the_best_of_a_round_has_the_best_mean_rank() -> None:
    one = searching(
        RandomSearch, ExactDenoiser(60), VerifierEnsemble([first, second, lambda x: -x[:, 2]]), candidates=6
    )
    result = one.run(one.cost)
    (values,) = (done.values for done in result.history)
    ranks = rankdata(values.numpy(), axis=1).mean(2)
    best = ranks.max(1)
    chosen = (values == result.values[:, None]).all(2).double().argmax(1)
    assert (ranks[range(10), chosen.tolist()] == best).all()


def test_all_rewards_rise_together() -> None:
    """With equal say: each of two independent normal rewards by the same amount, less than alone."""
    groups = 600
    found = both(RandomSearch, [first, lambda x: 100.0 * second(x)], rounds=1, batch=groups * 16, candidates=16)
    deviation = float(found.samples[:, 2:].std())
    means = found.samples[:, :2].double().mean(0) / deviation
    error = 1.0 / math.sqrt(groups)
    assert abs(float(means[0] - means[1])) < 4.0 * math.sqrt(2.0) * error
    assert 1.766 - 4.0 * error > float(means.min()) > 0.8  # the best of 16 by one of them has 1.766


@every_search
def test_searches_by_ensembles_go_on(search: type[NoiseSearch], tmp_path: Path) -> None:
    def build(rewards: int = 2) -> Any:
        verifiers = [first, second, first][:rewards]
        return searching(search, ExactDenoiser(8), VerifierEnsemble(verifiers), seed=5)

    whole, parts = build(), build()
    expected = whole.run(4 * whole.cost)
    parts.run(2 * parts.cost)
    parts.save(tmp_path / "search.safetensors")
    loaded = build().load(tmp_path / "search.safetensors")
    found = loaded.run(2 * loaded.cost)
    assert torch.equal(found.noise, expected.noise)
    assert torch.equal(found.values, expected.values)
    with pytest.raises(ValueError, match="other settings: rewards"):
        build(3).load(tmp_path / "search.safetensors")


def test_refusals() -> None:
    with pytest.raises(ValueError, match="rewards has 1 entries, of at least 2"):
        VerifierEnsemble([first])

    def blank(x: torch.Tensor) -> torch.Tensor:
        return first(x) * math.nan

    with pytest.raises(ValueError, match="reward 'blank' is nan at round 1"):
        both(RandomSearch, [first, blank])
