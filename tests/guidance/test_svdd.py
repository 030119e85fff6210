"""SVDD on Gaussian data: exact values give the tilted law, posterior means trust too much, greed collapses."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from exact_laws import run, tensor
from fewstep.guidance import (
    SVDD,
    LearnedValue,
    Reward,
    TransitionRecorder,
    Transitions,
    ValueNetwork,
    fit_value,
)
from fewstep.guidance.learned_value import half_logsnr
from fewstep.guidance.svdd import choose
from fewstep.metrics import GaussianMixture
from fewstep.samplers import SAMPLERS, PlanScheduler
from fewstep.samplers.guided import GuidedStep
from pipelines.tiny import CASES, batched

DATA = GaussianMixture(tensor([[1.0]]), tensor([0.6]), tensor([1.0]))
SCALE, TARGET, CHAINS = 1.5, 2.2, 6000


def towards_target(x: torch.Tensor) -> torch.Tensor:
    return -0.5 * (x[:, 0] - TARGET) ** 2


def ddpm(steps: int = 50) -> PlanScheduler:
    config = {"timestep_spacing": "trailing", "beta_start": 1e-4, "beta_end": 0.02}
    scheduler = SAMPLERS["sde-dpm++1"].build(config)
    scheduler.set_timesteps(steps)
    return scheduler


class ExactValue:
    """The soft value of the sampler's own chain: its steps are affine, so that results given a sample are Gaussian."""

    def __init__(self, scheduler: PlanScheduler) -> None:
        self.laws: list[tuple[float, float, float]] = []
        slope, offset, variance = 1.0, 0.0, 0.0
        for call in reversed(scheduler.plan.calls):
            total = call.alpha**2 * 0.36 + call.sigma**2
            gain = call.alpha * 0.36 / total
            row = dict(call.rows[-1].terms)
            (p, q), (p_clean, q_clean) = call.prediction, call.clean
            # prediction = p x + q u with u of the exact clean sample 1 + gain (x - alpha).
            on_x = row.get("sample", 0.0) + row["prediction"] * (p + q / q_clean * (gain - p_clean))
            constant = row["prediction"] * q / q_clean * (1.0 - gain * call.alpha)
            slope, offset, variance = (
                slope * on_x,
                slope * constant + offset,
                slope**2 * row.get("noise", 0.0) ** 2 + variance,
            )
            self.laws.insert(0, (slope, offset, variance))

    def of_step(self, step: GuidedStep, where: str) -> torch.Tensor:
        slope, offset, variance = self.laws[step.index]
        mean = slope * step.sample[:, 0] + offset
        # log E[exp(SCALE r)] / SCALE, up to a constant.
        return -0.5 * (mean - TARGET) ** 2 / (1 + SCALE * variance)

    def of_results(self, samples: torch.Tensor) -> torch.Tensor:
        return towards_target(samples)


def svdd(value: Any, candidates: int, temperature: float, steps: int = 50, **options: Any) -> torch.Tensor:
    """The first candidate of every chain's result."""
    scheduler = ddpm(steps).guide(SVDD(value, candidates=candidates, temperature=temperature, seeds=0, **options))
    x = run(scheduler, DATA, CHAINS * candidates).view(CHAINS, candidates)
    assert (x == x[:, :1]).all()
    return x[:, 0]


@pytest.mark.parametrize(
    ("candidates", "mean", "variance"), [(1, 1.001, 0.286), (2, 1.205, 0.246), (8, 1.327, 0.211), (32, 1.353, 0.204)]
)
def test_exact_values_converge_to_the_tilted_law(candidates: int, mean: float, variance: float) -> None:
    """Mean 1.366 and variance 0.203; for finite M between the sampler's law and that."""
    x = svdd(ExactValue(ddpm()), candidates, 1 / SCALE)
    assert float(x.mean()) == pytest.approx(mean, abs=0.025)
    assert float(x.var()) == pytest.approx(variance, abs=0.015)


def test_posterior_means_trust_too_much_and_greed_collapses() -> None:
    """The mean lies beyond the target's 1.366; at temperature 0 all chains end at the reward's optimum."""
    soft = svdd(towards_target, 32, 1 / SCALE)
    assert float(soft.mean()) == pytest.approx(1.409, abs=0.025)
    assert float(soft.var()) == pytest.approx(0.199, abs=0.015)
    for candidates, mean, variance in ((2, 2.163, 0.022), (8, 2.200, 0.0002)):
        greedy = svdd(towards_target, candidates, 0.0)
        assert float(greedy.mean()) == pytest.approx(mean, abs=0.02)
        assert float(greedy.var()) == pytest.approx(variance, rel=0.3)


def test_one_candidate_is_the_sampler_bit_for_bit() -> None:
    for temperature in (0.0, 0.3, math.inf):
        x = svdd(towards_target, 1, temperature, steps=10)
        assert torch.equal(x, run(ddpm(10), DATA, CHAINS)[:, 0])


@pytest.mark.parametrize("value", [towards_target, lambda x: torch.zeros(len(x))])
def test_nothing_to_choose_by_leaves_the_law(value: Any) -> None:
    x = svdd(value, 4, math.inf if value is towards_target else 0.1)
    assert float(x.mean()) == pytest.approx(1.0, abs=4 * math.sqrt(0.292 / CHAINS))
    assert float(x.var()) == pytest.approx(0.292, rel=4 * math.sqrt(2 / CHAINS))


def test_choices_follow_the_softmax() -> None:
    values = tensor([[0.0, 1.0, -1.0]]).expand(40000, -1)
    uniforms = torch.rand(40000, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = torch.bincount(choose(values, 0.7, uniforms).flatten(), minlength=3) / 40000
    torch.testing.assert_close(found.double(), torch.softmax(values[0] / 0.7, 0), atol=0.01, rtol=0)
    assert (choose(values, 0.0, uniforms) == 1).all()
    assert torch.isfinite(choose(values * 1e6, 1e-3, uniforms).double()).all()
    evenly = torch.bincount(choose(values, math.inf, uniforms).flatten(), minlength=3) / 40000
    torch.testing.assert_close(evenly, torch.full((3,), 1 / 3), atol=0.01, rtol=0)


def test_worst_chains_are_replaced() -> None:
    """SVDD-R with 20 chains a prompt: a higher reward with fewer ancestors, and prompts that keep to themselves."""
    plain = svdd(towards_target, 4, 0.2, steps=20)

    def replaced(reward: Any) -> torch.Tensor:
        guidance = SVDD(reward, candidates=4, temperature=0.2, chains=20, replace=0.05, seeds=0)
        x = run(ddpm(20).guide(guidance), DATA, CHAINS * 4)
        return x.view(-1, 20, 4)[..., 0]

    x = replaced(towards_target)
    assert towards_target(x.reshape(-1, 1)).mean() > towards_target(plain[:, None]).mean() + 0.01
    distinct = torch.tensor([len(torch.unique(prompt)) for prompt in x])
    assert distinct.min() >= 17
    assert (distinct < 20).double().mean() > 0.8

    def other_prompts_count_more(samples: torch.Tensor) -> torch.Tensor:
        return towards_target(samples) + 1e6 * (torch.arange(len(samples)) >= 80)

    assert torch.equal(replaced(other_prompts_count_more)[0], x[0])


@pytest.mark.parametrize("case", ["sd", "sdxl", "sd3", "flux", "dit", "ddpm"])
def test_every_pipeline_at_its_own_number_of_calls(case: str) -> None:
    pipe = CASES[case].build()
    pipe.scheduler = SAMPLERS["sde-dpm++1"].build(pipe.scheduler.config).manual_seed(3)
    chosen = CASES[case]
    inputs = {"batch_size": 4} if case == "ddpm" else batched(chosen.inputs(), 4)
    reward = Reward(lambda x: x.flatten(1).mean(1))
    rows: list[int] = []
    network = getattr(pipe, "unet", None) or pipe.transformer
    handle = network.register_forward_hook(lambda module, args, output: rows.append(len(output[0])))
    base = chosen.call(pipe, **inputs)
    plain = rows[:]
    guidance = SVDD(reward, candidates=2, temperature=0.0, chains=2, seeds=0)
    pipe.scheduler.guide(guidance)
    x = chosen.call(pipe, **inputs)
    handle.remove()
    assert plain
    assert rows == 2 * plain
    assert torch.equal(x[::2], x[1::2])
    assert not torch.equal(x[0], x[2])
    assert reward(x).mean() > reward(base).mean()
    halves = 2 if case == "dit" else 1
    assert guidance.values.shape == (5, 2 * halves)
    assert reward.evaluations == 5 * 4 * halves + 8
    torch.testing.assert_close(guidance.values[-1][:2], reward(x[::2]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"candidates": 0}, "candidates 0"),
        ({"temperature": -0.1}, "temperature -0.1"),
        ({"chains": 0}, "chains 0"),
        ({"replace": 1.0}, "replace 1.0"),
        ({"replace": 0.1, "chains": 5}, "replace 0.1 of 5 chains is none"),
        ({"start": 1.0}, "start 1.0"),
    ],
)
def test_impossible_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SVDD(towards_target, **{"candidates": 2, "temperature": 1.0, **options})


# ----------------------------------------------------------------------------------------- learned values


def recorded(followers: int, groups: int = 1000) -> tuple[Transitions, torch.Tensor]:
    recorder = TransitionRecorder(towards_target, followers=followers, seeds=0)
    x = run(ddpm(10).guide(recorder), DATA, groups * followers)
    return recorder.transitions, x


def test_recording_leaves_the_law_and_keeps_the_chains() -> None:
    data, x = recorded(3, groups=4000)
    calls = 10
    assert data.states.shape == (4000 * calls, 1)
    assert data.followers.shape == (4000 * calls, 3, 1)
    chains = data.states.view(calls, 4000)
    followers = data.followers.view(calls, 4000, 3)
    # The next state is one of the followers; results are those of the run.
    assert (followers[:-1] == chains[1:, :, None]).any(2).all()
    assert torch.equal(data.rewards.view(calls, 4000)[0], towards_target(x.view(4000, 3)[:, :1]))
    assert torch.isinf(data.following.view(calls, -1)[-1]).all()
    torch.testing.assert_close(data.follower_rewards.view(calls, 4000, 3)[-1], -0.5 * (followers[-1] - TARGET) ** 2)
    picked = (followers[0] == chains[1, :, None]).double().mean(0)
    torch.testing.assert_close(picked, torch.full((3,), 1 / 3, dtype=torch.float64), atol=0.03, rtol=0)
    base = run(ddpm(10), DATA, 12000)
    assert float(x.mean()) == pytest.approx(float(base.mean()), abs=0.04)
    assert float(x.var()) == pytest.approx(float(base.var()), abs=0.03)


@pytest.mark.parametrize("objective", ["soft", "soft_q", "mean"])
def test_learned_values_are_those_of_the_chain(objective: str) -> None:
    """In closed form: ``log E[exp(SCALE r)] / SCALE``, or ``E[r]``, given a sample of any call."""
    data, _ = recorded(4)
    torch.manual_seed(0)
    network = ValueNetwork((1,), width=48)
    losses = fit_value(network, data, objective=objective, temperature=1 / SCALE, epochs=25, learning_rate=5e-3)
    assert len(losses) == 25
    scheduler = ddpm(10)
    exact = ExactValue(scheduler)
    for k in (2, 5, 8):
        call, (slope, offset, variance) = scheduler.plan.calls[k], exact.laws[k]
        chosen = data.states.view(10, -1)[k].sort().values[50:-50:10]
        mean = slope * chosen + offset
        if objective == "mean":
            expected = -0.5 * ((mean - TARGET) ** 2 + variance)
        else:
            expected = -0.5 * (mean - TARGET) ** 2 / (1 + SCALE * variance)
            expected -= 0.5 * math.log1p(SCALE * variance) / SCALE
        level = torch.full((len(chosen),), half_logsnr(call.alpha, call.sigma))
        with torch.no_grad():
            found = network(chosen[:, None].float(), level)
        error = float((found - expected).square().mean().sqrt())
        assert error < 0.12 + 0.1 * float(expected.std()), (k, error)


def test_learned_values_steer_towards_the_target() -> None:
    data, _ = recorded(4)
    torch.manual_seed(0)
    network = ValueNetwork((1,), width=48)
    fit_value(network, data, temperature=1 / SCALE, epochs=25, learning_rate=5e-3)
    learned = svdd(LearnedValue(network, towards_target), 8, 1 / SCALE, steps=10)
    exact = svdd(ExactValue(ddpm(10)), 8, 1 / SCALE, steps=10)
    base = run(ddpm(10), DATA, CHAINS)
    assert abs(float(learned.mean() - exact.mean())) < 0.35 * float(exact.mean() - base.mean())


def test_value_networks_are_saved(tmp_path: Any) -> None:
    for shape in ((3, 8, 8), (5,), (16, 4)):
        network = ValueNetwork(shape, width=8).eval()
        network.save_pretrained(tmp_path)
        again = ValueNetwork.from_pretrained(tmp_path)
        x, level = torch.randn(2, *shape), torch.tensor([0.0, -math.inf])
        assert torch.equal(again(x, level), network(x, level))
        assert network(x, level).shape == (2,)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"objective": "q"}, "objective 'q'"),
        ({"temperature": 0.0}, "temperature 0.0"),
        ({"epochs": 0}, "epochs 0"),
    ],
)
def test_impossible_training_is_refused(options: dict[str, Any], message: str) -> None:
    data = Transitions(*(torch.zeros(2, 1) for _ in range(6)))
    with pytest.raises(ValueError, match=message):
        fit_value(ValueNetwork((1,)), data, **options)
    with pytest.raises(ValueError, match="nothing was recorded"):
        TransitionRecorder(towards_target).transitions  # noqa: B018
