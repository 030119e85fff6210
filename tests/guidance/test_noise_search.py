"""Searches over noises: exact budgets, order statistics, and results that pipelines give again."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, EulerAncestralDiscreteScheduler

from exact_laws import ExactDenoiser, first
from exact_laws import searching as build
from fewstep.guidance import NoiseSearch, PathSearch, RandomSearch, Reward, SearchResult, ZeroOrderSearch, decoder_of
from fewstep.guidance.zero_order_search import neighbours
from fewstep.samplers import SAMPLERS, Denoiser, DPMSolverPPScheduler, DrivenDenoiser, sample
from pipelines.tiny import CASES

SEARCHES: list[type[NoiseSearch]] = [RandomSearch, ZeroOrderSearch, PathSearch]
every_search = pytest.mark.parametrize("search", SEARCHES)


def same(a: SearchResult, b: SearchResult) -> bool:
    tensors = all(torch.equal(getattr(a, name), getattr(b, name)) for name in ("noise", "samples", "values"))
    spent = [one.evaluations for one in a.history] == [one.evaluations for one in b.history]
    return tensors and spent and all(torch.equal(p.values, q.values) for p, q in zip(a.history, b.history, strict=True))


# ------------------------------------------------------------------------------------------------ all of them


@every_search
@pytest.mark.parametrize("steps", [1, 2, 6, 7])
def test_budgets_are_exact(search: type[NoiseSearch], steps: int) -> None:
    denoiser = ExactDenoiser(8)
    one = build(search, denoiser, steps=steps)
    assert denoiser.evaluations == 0
    result = one.run(3 * one.cost + one.cost - 1)
    assert denoiser.evaluations == result.evaluations == 3 * one.cost
    assert [done.evaluations for done in result.history] == [one.cost * k for k in (1, 2, 3)]
    if search is not PathSearch:
        assert one.cost == steps * 8
    with pytest.raises(ValueError, match=f"evaluations {one.cost - 1} are too few for a round, which takes {one.cost}"):
        build(search, denoiser, steps=steps).run(one.cost - 1)


@every_search
def test_results_are_the_best_of_their_history(search: type[NoiseSearch]) -> None:
    one = build(search, ExactDenoiser(12))
    result = one.run(4 * one.cost)
    values = torch.stack([done.values for done in result.history])
    assert values.shape == (4, 3, 4)
    torch.testing.assert_close(result.values, values.amax((0, 2)))
    torch.testing.assert_close(first(result.samples), result.values)
    assert result.noise.shape == result.samples.shape == (3, 8)


@every_search
def test_searches_go_on_where_they_stopped(search: type[NoiseSearch], tmp_path: Path) -> None:
    whole = build(search, ExactDenoiser(8), seed=5)
    expected = whole.run(4 * whole.cost)
    parts = build(search, ExactDenoiser(8), seed=5)
    parts.run(parts.cost)
    parts.save(tmp_path / "search.safetensors")
    assert same(parts.run(3 * parts.cost), expected)
    loaded = build(search, ExactDenoiser(8), seed=5).load(tmp_path / "search.safetensors")
    assert same(loaded.run(3 * loaded.cost), expected)
    assert loaded.run(0).evaluations == expected.evaluations
    other = build(search, ExactDenoiser(8), seed=6)
    assert not torch.equal(other.run(other.cost).noise, expected.noise)
    with pytest.raises(ValueError, match="other settings: seed"):
        other.load(tmp_path / "search.safetensors")


@every_search
def test_prompts_do_not_depend_on_each_other(search: type[NoiseSearch]) -> None:
    """Nor on how many there are: prompt ``k`` has seed ``seed + k``."""
    together = build(search, ExactDenoiser(8), seed=5)
    alone = build(search, ExactDenoiser(4), seed=6)
    result, other = together.run(3 * together.cost), alone.run(3 * alone.cost)
    torch.testing.assert_close(result.samples[1:], other.samples, rtol=1e-5, atol=1e-6)


@every_search
def test_rewards_rise_with_the_budget(search: type[NoiseSearch]) -> None:
    one = build(search, ExactDenoiser(32 * 4))
    values = [float(one.run(one.cost * rounds).values.mean()) for rounds in (1, 3, 8)]
    assert values[0] + 0.3 < values[1] < values[2] - 0.2


# ------------------------------------------------------------------------------------------------ random search


@pytest.mark.parametrize(("count", "expected"), [(1, 0.0), (16, 1.766), (64, 2.344)])
def test_best_of_n_matches_the_order_statistics_of_a_normal(count: int, expected: float) -> None:
    """Rewards are normal: every step of a normal law is linear."""
    groups = 400
    rounds = 4 if count > 1 else 1
    denoiser = ExactDenoiser(groups * count // rounds)
    search = build(RandomSearch, denoiser, candidates=count // rounds)
    std = float(sample(denoiser, search.scheduler, search.steps, latents=torch.ones(1, 8))[0, 0])
    assert std == pytest.approx(1.0, abs=0.3)
    values = search.run(rounds * search.cost).values / std
    assert abs(float(values.mean()) - expected) < 4.0 * float(values.std()) / math.sqrt(groups)


def test_a_reward_that_does_not_choose_leaves_the_law_and_favours_nobody() -> None:
    groups = 800
    search = build(RandomSearch, ExactDenoiser(groups * 4), lambda x: torch.zeros(len(x)), steps=1)
    result = search.run(search.cost)
    noise = search._normal(0, 0)
    chosen = (noise == result.noise[:, None]).all(2).double().argmax(1)
    counts = torch.bincount(chosen, minlength=4).double()
    assert float(((counts - groups / 4) ** 2 / (groups / 4)).sum()) < 16.3  # chi-squared, 3 degrees, one in a thousand
    assert abs(float(result.samples.mean())) < 4.0 / math.sqrt(groups * 8)
    # The first of equals stays: later rounds are no better.
    assert torch.equal(search.run(search.cost).noise, result.noise)


def test_more_candidates_begin_with_the_same_noises() -> None:
    few, many = (build(RandomSearch, ExactDenoiser(count), candidates=count) for count in (3, 6))
    assert torch.equal(many._normal(2, 1)[:, :3], few._normal(2, 1))


# ------------------------------------------------------------------------------------------------ zero order


def test_neighbours_have_the_angle_and_the_norm() -> None:
    pivot = torch.randn(5, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    around = torch.randn(5, 3, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    found = neighbours(pivot, around, 0.95)
    norms = found.flatten(2).norm(dim=2)
    torch.testing.assert_close(norms, pivot.flatten(1).norm(dim=1)[:, None].expand_as(norms), rtol=1e-5, atol=0)
    cosine = torch.cosine_similarity(found.flatten(2).double(), pivot.flatten(1)[:, None].double(), dim=2)
    torch.testing.assert_close(cosine, torch.full_like(cosine, 0.95), rtol=0, atol=1e-6)


def test_neighbours_of_normal_noise_are_normal_in_any_dimension() -> None:
    """Moments up to the fourth, and independence of the coordinates, in two dimensions."""
    pivot = torch.randn(40000, 2, generator=torch.Generator().manual_seed(0)).double()
    around = torch.randn(40000, 1, 2, generator=torch.Generator().manual_seed(1)).double()
    x = neighbours(pivot, around, 0.6)[:, 0]
    for power, moment, spread in ((1, 0.0, 1.0), (2, 1.0, 2.0), (4, 3.0, 96.0)):
        assert float((x.pow(power).mean(0) - moment).abs().max()) < 4.0 * math.sqrt(spread / 40000)
    assert abs(float((x[:, 0] * x[:, 1]).mean())) < 4.0 / 200.0
    assert abs(float((x[:, 0].square() * x[:, 1].square()).mean()) - 1.0) < 4.0 * math.sqrt(8.0) / 200.0


def test_zero_order_climbs_around_the_best() -> None:
    denoiser = ExactDenoiser(16)
    search = build(ZeroOrderSearch, denoiser, similarity=0.9)
    pivots = []
    for _ in range(6):
        before = search._best.get("noise")
        values = search.run(search.cost).values
        pivots.append((before, values))
    noises = search._normal(5, 0)
    expected = neighbours(pivots[5][0], noises, 0.9)
    torch.testing.assert_close(
        torch.cosine_similarity(expected, pivots[5][0][:, None], dim=2), torch.full((4, 4), 0.9), rtol=0, atol=1e-5
    )
    assert all(bool((b[1] >= a[1]).all()) for a, b in itertools.pairwise(pivots))


@pytest.mark.parametrize(
    "scheduler", [SAMPLERS["sde-dpm++"].build(DDIMScheduler().config), EulerAncestralDiscreteScheduler()]
)
def test_zero_order_refuses_samplers_with_noise_of_their_own(scheduler: Any) -> None:
    search = ZeroOrderSearch(ExactDenoiser(4), scheduler, 4, first, candidates=4)
    with pytest.raises(ValueError, match="draws noise of its own"):
        search.run(100)


# ------------------------------------------------------------------------------------------------ paths


def test_paths_turn_back_as_told() -> None:
    search = build(PathSearch, ExactDenoiser(4), start=0.25, forward=2, backward=3)
    assert search._stages(8) == [(0, 2), (0, 3), (1, 4), (2, 5), (3, 6), (4, 7), (5, 8)]
    assert build(PathSearch, ExactDenoiser(4), start=1.0)._stages(8) == [(0, 8)]
    whole = build(PathSearch, ExactDenoiser(4), start=1.0)
    base = build(RandomSearch, ExactDenoiser(4))
    torch.testing.assert_close(whole.run(whole.cost).samples, base.run(base.cost).samples)


@pytest.mark.parametrize(
    "options", [{}, {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}, {"sigma_data": 0.5}]
)
def test_noise_on_the_way_is_the_forward_process(options: dict[str, Any]) -> None:
    """From one node to an earlier one: alpha and variance of the earlier node."""
    search = build(PathSearch, ExactDenoiser(4, **options))
    scheduler = search.scheduler
    scheduler.set_timesteps(6)
    late, early = scheduler.plan.calls[4], scheduler.plan.calls[2]
    clean = 0.7
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(2, 1, 200000, generator=generator, dtype=torch.float64)
    x = search._renoised(scheduler, late.alpha * clean + late.sigma * noise[0], (4, 2), noise[1])
    assert float(x.mean()) == pytest.approx(early.alpha * clean, abs=4 * early.sigma / 447)
    assert float(x.var()) == pytest.approx(early.sigma**2, rel=4 * 2**0.5 / 447)


@pytest.mark.parametrize("sampler", ["dpm++", "sde-dpm++", "unipc"])
def test_a_constant_reward_leaves_the_law_of_paths(sampler: str) -> None:
    """Turning back and denoising again stays on the marginals of the process."""
    denoiser = ExactDenoiser(1000)
    scheduler = SAMPLERS[sampler].build(denoiser.scheduler_config)
    options: dict[str, Any] = {"paths": 4, "start": 0.3, "forward": 2, "backward": 6}
    search = PathSearch(denoiser, scheduler, 40, lambda x: torch.zeros(len(x)), candidates=4, **options)
    everything = search._round(0).samples
    assert abs(float(everything.mean())) < 4.0 / math.sqrt(8000)
    assert float(everything.std()) == pytest.approx(1.0, rel=0.06)


# ------------------------------------------------------------------------------------------------ in pipelines


@pytest.mark.parametrize("case", ["sd", "sd3", "flux", "dit", "ddpm"])
@every_search
def test_every_pipeline_can_be_searched(case: str, search: type[NoiseSearch]) -> None:
    pipe = CASES[case].build()
    inputs = {} if case == "ddpm" else _of_denoiser(CASES[case].inputs())
    denoiser = Denoiser.from_pipeline(pipe, num_images_per_prompt=2, **inputs)
    groups = denoiser.batch_size // 2
    scheduler = DPMSolverPPScheduler.from_config(denoiser.scheduler_config)
    reward = Reward(lambda images: images.flatten(1).mean(1), decode=decoder_of(denoiser))
    options: dict[str, Any] = {"paths": 1} if search is PathSearch else {}
    one = search(denoiser, scheduler, 4, reward, candidates=2, **options)
    result = one.run(2 * one.cost)
    assert denoiser.evaluations == result.evaluations == 2 * one.cost
    assert result.noise.shape == (groups, *denoiser.shape)
    torch.testing.assert_close(reward(result.samples), result.values, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("case", ["sd", "sd3", "flux"])
def test_a_pipeline_makes_the_result_of_its_noise(case: str) -> None:
    pipe, inputs = CASES[case].build(), CASES[case].inputs()
    pipe.scheduler = DPMSolverPPScheduler.from_config(pipe.scheduler.config)
    denoiser = Denoiser.from_pipeline(pipe, num_images_per_prompt=3, **_of_denoiser(inputs))
    search = RandomSearch(denoiser, pipe.scheduler, 4, lambda x: x.flatten(1).mean(1), candidates=3)
    result = search.run(2 * search.cost)
    assert len(result.noise) == 1
    again = CASES[case].call(pipe, 4, **{**inputs, "latents": result.noise})
    torch.testing.assert_close(again, result.samples, rtol=1e-3, atol=1e-3 * float(again.abs().max()))


def test_driven_pipelines_can_be_searched() -> None:
    pipe, inputs = CASES["sd"].build(), CASES["sd"].inputs()
    scheduler = DPMSolverPPScheduler.from_config(pipe.scheduler.config)
    found = []
    for kind in (Denoiser.from_pipeline, DrivenDenoiser):
        denoiser = kind(pipe, num_images_per_prompt=2, **_of_denoiser(inputs))
        search = ZeroOrderSearch(denoiser, scheduler, 4, lambda x: x.flatten(1).mean(1), candidates=2)
        before = denoiser.evaluations
        found.append(search.run(3 * search.cost))
        assert found[-1].evaluations == denoiser.evaluations - before == 3 * search.cost
    torch.testing.assert_close(found[0].samples, found[1].samples, rtol=1e-3, atol=1e-3)


def _of_denoiser(inputs: dict[str, Any]) -> dict[str, Any]:
    dropped = ("generator", "num_inference_steps", "output_type", "latents", "batch_size")
    return {key: value for key, value in inputs.items() if key not in dropped}


# ------------------------------------------------------------------------------------------------ refusals


def test_refusals(tmp_path: Path) -> None:
    denoiser = ExactDenoiser(4)
    with pytest.raises(ValueError, match="candidates 0 must be a whole number"):
        build(RandomSearch, denoiser, candidates=0)
    with pytest.raises(ValueError, match="3"):
        build(RandomSearch, denoiser, candidates=3)
    with pytest.raises(ValueError, match=r"similarity 1\.0 must lie between"):
        build(ZeroOrderSearch, denoiser, similarity=1.0)
    for options, said in (
        ({"paths": 3}, "candidates 4 must be a multiple of paths 3"),
        ({"start": 0.0}, r"start 0\.0 must be a share"),
        ({"forward": 2}, "forward 2 and backward 2 must be whole"),
    ):
        with pytest.raises(ValueError, match=said):
            build(PathSearch, denoiser, **options)
    with pytest.raises(ValueError, match="DDIMScheduler cannot begin between its times"):
        PathSearch(denoiser, DDIMScheduler(), 4, first, candidates=4)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="takes 2 calls a step"):
        PathSearch(denoiser, _two_calls(denoiser), 4, first, candidates=4)
    search = build(RandomSearch, denoiser, lambda x: x[:, 0] / 0.0)
    with pytest.raises(ValueError, match="at round 1"):
        search.run(search.cost)
    with pytest.raises(ValueError, match="nothing was searched yet"):
        search.save(tmp_path / "s.safetensors")
    with pytest.raises(ValueError, match="holds no saved search"):
        search.load(tmp_path / "none.safetensors")


def _two_calls(denoiser: Denoiser) -> Any:
    return next(
        scheduler
        for scheduler in (entry.build(denoiser.scheduler_config) for entry in SAMPLERS.values())
        if scheduler.order == 2
    )
