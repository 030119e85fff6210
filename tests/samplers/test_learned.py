"""Learned tables: any sampler's plan as one, and the scheduler that runs them."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from hypothesis import given
from hypothesis import strategies as st

from analytic import EDM, FLOW, STABLE_DIFFUSION, ZERO_SNR, run_labelled, sample
from fewstep.samplers import SAMPLERS, LearnedScheduler, LearnedTable, PlanScheduler, UniPCScheduler
from pipelines.tiny import CASES, STEPS

MODELS: dict[str, dict[str, Any]] = {"vp": STABLE_DIFFUSION, "zero_snr": ZERO_SNR, "flow": FLOW, "edm": EDM}
RUNGE_KUTTA = ["deis-heun", "deis-kutta3", "deis-rk4"]
DETERMINISTIC = [name for name, sampler in SAMPLERS.items() if not sampler.stochastic and name not in RUNGE_KUTTA]


def noise() -> torch.Tensor:
    return torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def built(name: str, model: str, steps: int = 6) -> PlanScheduler:
    scheduler = SAMPLERS[name].build(MODELS[model], fractional_timesteps=model == "zero_snr")
    scheduler.set_timesteps(steps)
    return scheduler


def learned(config: Any, table: LearnedTable) -> LearnedScheduler:
    scheduler: LearnedScheduler = LearnedScheduler.from_config(config, table=table)
    scheduler.set_timesteps(table.calls)
    return scheduler


def random_table(draw: Any, model: str, calls: int) -> LearnedTable:
    """A table with every freedom used."""
    base = LearnedTable.of(built("unipc", model, calls).plan)
    number = st.floats(-0.5, 0.5)
    scales = (1.0, *(math.exp(draw(number)) for _ in range(calls - 1)))
    rows: dict[str, list[tuple[float, ...]]] = {"data": [], "noise": []}
    for k in range(calls):
        for name, row in (("data", base.data[k]), ("noise", base.noise[k])):
            moved = [draw(number) for _ in range(k)]
            scale = (*scales[1:], 1.0)[k]
            pairs = zip(row, [*moved, -math.fsum(moved)], strict=True)
            rows[name].append(tuple((c + m) * scale for c, m in pairs))
    low = min(base.labels)
    labels = (base.labels[0], *(max(low, t * (1.0 + 0.1 * draw(number))) for t in base.labels[1:]))
    return LearnedTable(base.levels, labels, scales, tuple(rows["data"]), tuple(rows["noise"]))


@pytest.mark.parametrize("model", ["vp", "flow", "edm"])
@pytest.mark.parametrize("name", DETERMINISTIC)
def test_every_sampler_is_a_table(name, model):
    """The table of a sampler's plan gives its samples: weights, correctors, kept tensors and stages are all in it."""
    base = built(name, model)
    table = LearnedTable.of(base.plan)
    ours = learned(base.config, table)
    x = noise() * base.init_noise_sigma
    expected, result = sample(base, x), sample(ours, x)
    size = max(1.0, base.plan.amplification, ours.plan.amplification)
    torch.testing.assert_close(result, expected, rtol=0.0, atol=2e-6 * size)


def test_tables_are_exact_where_labels_are_whole():
    """In float64, on whole timesteps, nothing but the order of additions differs."""
    base = built("unipc3", "vp")
    table = LearnedTable.of(base.plan)
    x = noise()
    torch.testing.assert_close(sample(learned(base.config, table), x), sample(base, x), rtol=0.0, atol=1e-9)


@given(st.data(), st.sampled_from(["vp", "zero_snr", "flow", "edm"]), st.integers(1, 5))
def test_a_model_that_is_sure_is_followed_exactly(data, model, calls):
    """Whatever was fitted: alpha c + sigma e stays one, and the end is c."""
    table = random_table(data.draw, model, calls)
    config = {**MODELS[model], "prediction_type": "sample"} if model != "edm" else EDM
    ours = learned(config, table)
    clean = noise().flip(0)
    plan = ours.plan
    x = plan.calls[0].alpha * clean + plan.calls[0].sigma * noise()
    result = run_labelled(ours, x, lambda *_: clean)
    torch.testing.assert_close(result, clean, rtol=0.0, atol=1e-5 * (1.0 + ours.plan.amplification))


@given(st.data(), st.sampled_from(["vp", "flow", "edm"]), st.integers(2, 5))
def test_the_sums_hold_at_every_call(data, model, calls):
    """The samples on the way are scale (alpha c + sigma e) to rounding, as the calls say."""
    table = random_table(data.draw, model, calls)
    ours = learned(MODELS[model], table)
    for k, (call, node) in enumerate(zip(ours.plan, table.nodes(ours.schedule), strict=False)):
        assert (call.alpha, call.sigma) == (node.alpha, node.sigma)
        total = math.fsum(table.data[k])
        assert total == pytest.approx(table.nodes(ours.schedule)[k + 1].alpha, abs=1e-9 * (1 + abs(total)))
    assert len(ours.plan) == calls


def test_prediction_types_are_one():
    """Labels that stand for other levels are heard as such by every kind of network."""
    table = dataclasses.replace(
        LearnedTable.of(built("unipc", "vp").plan), labels=(999.0, 790.0, 610.0, 480.0, 300.0, 140.0)
    )
    results = []
    for prediction_type in ("epsilon", "sample", "v_prediction", "flow_prediction"):
        ours = learned({**STABLE_DIFFUSION, "prediction_type": prediction_type}, table)
        pairs = [(call.clean, ours.schedule.level(call.timestep)) for call in ours.plan]
        x = noise()
        for (p, q), level in pairs:
            alpha, sigma = (float(v) for v in ours.schedule.alpha_sigma(level))
            clean = torch.tanh(x)
            said = {
                "epsilon": (x - alpha * clean) / sigma,
                "sample": clean,
                "v_prediction": (alpha * x - clean) / sigma,
                "flow_prediction": (x - alpha * clean) / sigma - clean,
            }[prediction_type]
            torch.testing.assert_close(p * x + q * said, clean, rtol=0.0, atol=1e-9)
            x = ours.step(said, 0, x, return_dict=False)[0] if ours.step_index else first(ours, said, x)
        results.append(x)
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], rtol=0.0, atol=1e-8)


def first(scheduler: PlanScheduler, output: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    result: torch.Tensor = scheduler.step(output, scheduler.timesteps[0], x, return_dict=False)[0]
    return result


def test_networks_of_edm_get_inputs_scaled_for_what_they_hear():
    base = LearnedTable.of(built("unipc", "edm", 3).plan)
    ours = learned(EDM, dataclasses.replace(base, labels=(base.labels[0], base.labels[1] * 0.8, base.labels[2])))
    call = ours.plan.calls[1]
    heard = math.exp(4.0 * call.timestep)
    assert call.in_scale == pytest.approx(1.0 / math.hypot(heard, 0.5), rel=1e-12)
    assert heard != pytest.approx(call.level, rel=0.1)


def test_saving_and_loading_is_exact(tmp_path):
    """In the config, through JSON, by its own class and by ``PlanScheduler``."""
    table = LearnedTable.of(built("deis", "vp").plan)
    ours = learned(STABLE_DIFFUSION, table)
    assert LearnedTable.from_dict(json.loads(json.dumps(table.to_dict()))) == table
    ours.save_pretrained(tmp_path)
    expected = sample(ours, noise())
    for cls in (LearnedScheduler, PlanScheduler):
        loaded = cls.from_pretrained(tmp_path)
        assert type(loaded) is LearnedScheduler
        assert loaded.table == table
        loaded.set_timesteps(6)
        assert torch.equal(sample(loaded, noise()), expected)


def test_plan_scheduler_refuses_configs_of_others():
    for config in (None, {}, {"_class_name": "DDIMScheduler"}, {"_class_name": "PlanScheduler"}):
        with pytest.raises(ValueError, match="no scheduler of fewstep"):
            PlanScheduler.from_config(config)


@pytest.mark.parametrize("case", CASES)
def test_it_runs_in_unmodified_pipelines(case):
    """From noise and from images: there the first prediction stands for those that the run lacks."""
    chosen = CASES[case]
    pipe = chosen.build()
    config = {**pipe.scheduler.config, "use_dynamic_shifting": False}
    base = SAMPLERS["dpm++"].build(config)
    base.set_timesteps(STEPS)
    pipe.scheduler = learned(config, LearnedTable.of(base.plan))
    latents = chosen.call(pipe)
    assert latents.shape == chosen.shape
    assert latents.isfinite().all()
    assert pipe.scheduler.step_index == len(pipe.scheduler.timesteps) == STEPS


@given(st.data(), st.sampled_from(["vp", "flow", "edm"]), st.integers(1, 4))
def test_a_start_in_the_middle_is_consistent_too(data, model, begin):
    table = random_table(data.draw, model, 5)
    ours = learned(MODELS[model], table)
    ours.set_begin_index(begin)
    clean = noise().flip(0)
    call = ours.plan.calls[0]
    alpha, sigma = (float(v) for v in ours.schedule.alpha_sigma(table.levels[begin]))
    assert (call.alpha, call.sigma) == (alpha, sigma)
    result = run_labelled(ours, alpha * clean + sigma * noise(), lambda *_: clean, begin=begin)
    torch.testing.assert_close(result, clean, rtol=0.0, atol=1e-5 * (1.0 + ours.plan.amplification))


def test_a_saved_pipeline_keeps_its_table(tmp_path):
    pipe = CASES["dit"].build()
    base = UniPCScheduler.from_config(pipe.scheduler.config)
    base.set_timesteps(STEPS)
    pipe.scheduler = learned(pipe.scheduler.config, LearnedTable.of(base.plan))
    pipe.save_pretrained(tmp_path)
    again = DiffusionPipeline.from_pretrained(tmp_path)
    assert again.scheduler.table == pipe.scheduler.table


def changed(**changes: Any) -> LearnedTable:
    return dataclasses.replace(LearnedTable.of(built("unipc", "vp", 3).plan), **changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"labels": (999.0,)}, "has 1 labels"),
        ({"scales": (1.0, 1.0)}, "3 scales"),
        ({"data": ((1.0,), (1.0,), (1.0, 1.0, 1.0))}, "rows of data"),
        ({"scales": (1.0, math.nan, 1.0)}, "not finite"),
        ({"scales": (0.5, 1.0, 1.0)}, "begin with 1"),
        ({"scales": (1.0, -1.0, 1.0)}, "must be positive"),
        ({"scales": (1.0, 1.1, 1.0)}, "row 0 of data sums to"),
        ({"levels": (14.0, 1.0, 2.0, 0.0)}, "decrease strictly"),
    ],
)
def test_wrong_tables_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        LearnedScheduler.from_config(STABLE_DIFFUSION, table=changed(**changes))


def test_what_else_is_refused():
    with pytest.raises(ValueError, match="fit_plan"):
        LearnedScheduler.from_config(STABLE_DIFFUSION)
    for data in (3, {"format": "x"}, {**changed().to_dict(), "more": 1}, {"format": "fewstep.learned", "version": 1}):
        with pytest.raises(ValueError, match="table"):
            LearnedTable.from_dict(data)
    ours = learned(STABLE_DIFFUSION, changed())
    with pytest.raises(ValueError, match="made for 3 network calls"):
        ours.set_timesteps(4)
    with pytest.raises(ValueError, match="part of this scheduler"):
        ours.set_timesteps(timesteps=[3, 2, 1])
    with pytest.raises(ValueError, match="another noise schedule"):
        LearnedScheduler.from_config(FLOW, table=changed(levels=(0.9, 0.5, 0.2, 0.0)))
    stochastic = built("sde-dpm++", "vp", 3)
    with pytest.raises(ValueError, match="fresh noise"):
        LearnedTable.of(stochastic.plan)
    for name in RUNGE_KUTTA:
        with pytest.raises(ValueError, match="visits a level twice"):
            LearnedTable.of(built(name, "vp", 6).plan)
