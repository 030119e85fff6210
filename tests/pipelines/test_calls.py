"""What a scheduler can be asked, by pipelines and callers of every style, and what it answers."""

from __future__ import annotations

import inspect
from typing import Any

import numpy as np
import pytest
import torch

from pipelines.loops import (
    CLASSES,
    CONFIGS,
    LEVELS,
    STEPS,
    build,
    every_kind,
    every_sampler,
    network,
    run,
    start,
)
from pipelines.tiny import seeded


@pytest.mark.parametrize("cls", CLASSES)
def test_signatures_are_those_that_pipelines_look_for(cls: Any) -> None:
    def names(method: str) -> list[str]:
        return list(inspect.signature(getattr(cls, method)).parameters)[1:]

    assert names("set_timesteps") == ["num_inference_steps", "device", "sigmas", "mu", "timesteps"]
    assert names("step") == ["model_output", "timestep", "sample", "generator", "variance_noise", "return_dict"]
    assert names("scale_model_input") == ["sample", "timestep"]
    assert names("add_noise") == ["original_samples", "noise", "timesteps"]
    assert names("scale_noise") == ["sample", "timestep", "noise"]
    assert names("set_begin_index") == ["begin_index"]
    assert names("get_velocity") == ["sample", "noise", "timesteps"]
    for method in ("set_timesteps", "step", "scale_model_input", "add_noise", "scale_noise", "set_begin_index"):
        kinds = {p.kind for p in inspect.signature(getattr(cls, method)).parameters.values()}
        assert kinds == {inspect.Parameter.POSITIONAL_OR_KEYWORD}
    options = inspect.signature(cls.__init__).parameters.values()
    assert all(p.kind is not inspect.Parameter.VAR_KEYWORD for p in options)


@every_sampler
@every_kind
def test_attributes_that_pipelines_read(name: str, kind: str) -> None:
    scheduler = build(name, kind, None)
    assert scheduler.num_inference_steps is None
    assert float(scheduler.init_noise_sigma) == 1.0
    assert isinstance(scheduler.order, int)
    assert len(scheduler) == scheduler.config.num_train_timesteps == 1000
    assert scheduler.step_index is scheduler.begin_index is None
    assert scheduler.config.get("base_image_seq_len", 256) == 256
    assert hasattr(scheduler.config, "use_flow_sigmas") == ("use_flow_sigmas" in scheduler.config)
    assert len(scheduler.timesteps) == 1000
    scheduler.set_timesteps(STEPS)
    count = len(scheduler.timesteps)
    assert scheduler.num_inference_steps == STEPS
    assert scheduler.timesteps.ndim == 1
    assert (STEPS - 1) * scheduler.order < count <= STEPS * scheduler.order
    assert len(scheduler.sigmas) == count + 1
    # Wan and CogView4 read the level of every step.
    for sigma, call in zip(scheduler.sigmas, scheduler.plan, strict=False):
        assert float(sigma) == pytest.approx(call.level)
    for t in scheduler.timesteps:
        assert t.ndim == 0
        assert t.expand(2).shape == (2,)
    assert (scheduler.timesteps.diff() <= 0).all()
    if kind == "flow":
        torch.testing.assert_close(scheduler.timesteps, 1000 * scheduler.sigmas[:-1])
    assert not hasattr(scheduler, "no_such_attribute")


@every_sampler
def test_every_way_to_set_the_number_of_steps(name: str) -> None:
    plans = []
    for arguments in ([5], [5, "cpu"], [np.int64(5), torch.device("cpu")]):
        scheduler = build(name, "vp", None)
        scheduler.set_timesteps(*arguments)
        plans.append(scheduler.plan)
    scheduler.set_timesteps(num_inference_steps=5, device=None)
    plans.append(scheduler.plan)
    assert all(plan == plans[0] for plan in plans)
    for wrong in ({}, {"num_inference_steps": 0}, {"num_inference_steps": -3}):
        with pytest.raises(ValueError, match=r"num_inference_steps|pass"):
            scheduler.set_timesteps(**wrong)


@every_sampler
@every_kind
def test_every_way_to_give_sigmas(name: str, kind: str) -> None:
    """A list, an array or a tensor, with or without the level where the run ends."""
    levels = LEVELS[kind]
    options = {"flow_shift": 1.0} if kind == "flow" else {}
    scheduler = build(name, kind, None, **options)
    scheduler.set_timesteps(sigmas=levels)
    plan = scheduler.plan
    assert scheduler.num_inference_steps == 4
    nodes = [float(sigma) for sigma in scheduler.sigmas]
    for level in levels:
        assert min(abs(level - node) for node in nodes) < 1e-6
    assert plan.calls[0].level == pytest.approx(levels[0])
    given: list[Any] = [np.array(levels), np.array(levels, np.float32), torch.tensor(levels), tuple(levels)]
    given += [[*levels, plan.final_level], torch.tensor([*levels, plan.final_level])]
    for sigmas in given:
        scheduler.set_timesteps(sigmas=sigmas, device="cpu")
        assert scheduler.num_inference_steps == 4
        assert scheduler.sigmas.tolist() == pytest.approx(nodes, abs=1e-6)
    scheduler.set_timesteps(sigmas=[*levels, 0.0])
    assert scheduler.num_inference_steps == 4
    assert scheduler.plan.final_level == 0.0


@every_sampler
@every_kind
def test_every_way_to_give_timesteps(name: str, kind: str) -> None:
    labels = [900, 600, 300, 100]
    scheduler = build(name, kind, None)
    scheduler.set_timesteps(timesteps=labels)
    plan = scheduler.plan
    assert {float(label) for label in labels} <= {call.timestep for call in plan}
    for timesteps in (np.array(labels), torch.tensor(labels), [float(label) for label in labels]):
        scheduler.set_timesteps(timesteps=timesteps, device="cpu")
        assert scheduler.plan == plan
        assert scheduler.num_inference_steps == 4
    scheduler.set_timesteps(timesteps=[900.5, 300.25])
    assert {900.5, 300.25} <= {float(t) for t in scheduler.timesteps}


@every_kind
@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize(
    "wrong",
    [
        {"sigmas": [0.3, 0.8]},
        {"sigmas": [0.5, float("nan")]},
        {"sigmas": []},
        {"sigmas": [[0.5, 0.1]]},
        {"sigmas": torch.tensor([[0.5, 0.1]])},
        {"sigmas": [0.5, -0.1]},
        {"sigmas": ["high", "low"]},
        {"timesteps": [100, 900]},
        {"timesteps": [1e9, 5]},
        {"timesteps": []},
        {"timesteps": [500, 500]},
        {"timesteps": [[500, 100]]},
        {"timesteps": [500, float("nan")]},
    ],
)
def test_impossible_times_are_refused(cls: Any, kind: str, wrong: dict[str, Any]) -> None:
    scheduler = cls.from_config(CONFIGS[kind]().config)
    with pytest.raises(ValueError, match=r"sigmas|timesteps"):
        scheduler.set_timesteps(**wrong)


@every_sampler
@every_kind
def test_mu_is_accepted_always_and_used_with_dynamic_shifting_only(name: str, kind: str) -> None:
    scheduler = build(name, kind)
    plan = scheduler.plan
    scheduler.set_timesteps(STEPS, mu=0.7)
    assert scheduler.plan == plan
    scheduler.set_timesteps(sigmas=LEVELS[kind], mu=0.7)
    if kind == "flow":
        dynamic = build(name, kind, None, use_dynamic_shifting=True)
        dynamic.set_timesteps(STEPS, mu=1.2)
        first = dynamic.sigmas
        dynamic.set_timesteps(STEPS, mu=0.2)
        assert (dynamic.sigmas[1:-1] < first[1:-1]).all()
        dynamic.set_timesteps(STEPS, mu=1.2)
        assert torch.equal(dynamic.sigmas, first)


@every_sampler
@every_kind
def test_every_way_to_call_step(name: str, kind: str) -> None:
    x, noise = start(), seeded(2, 4, 4, 4, seed=8)

    def called(**changed: Any) -> Any:
        scheduler = build(name, kind)
        arguments = {"model_output": network(x), "timestep": scheduler.timesteps[0], "sample": x, **changed}
        return scheduler.step(**arguments, variance_noise=noise)

    output = called()
    assert output[0] is output.prev_sample
    assert output[1] is output["pred_original_sample"] is output.pred_original_sample
    scheduler = build(name, kind)
    label = scheduler.timesteps[0]
    for other in (
        scheduler.step(network(x), label, x, None, noise, False),
        called(return_dict=False),
        called(timestep=float(label), return_dict=False),
        called(timestep=label[None], return_dict=False),
    ):
        # Like diffusers' multistep classes.
        assert isinstance(other, tuple)
        assert len(other) == 1
        assert torch.equal(other[0], output.prev_sample)


@every_sampler
@every_kind
def test_the_second_output_is_the_predicted_clean_sample(name: str, kind: str) -> None:
    scheduler = build(name, kind)
    x = start(dtype=torch.float64)
    for k, (t, call) in enumerate(zip(scheduler.timesteps, scheduler.plan, strict=True)):
        u = network(x)
        expected = x - call.sigma * u if kind == "flow" else (x - call.sigma * u) / call.alpha
        output = scheduler.step(u, t, x, variance_noise=seeded(*x.shape, seed=k, dtype=x.dtype))
        torch.testing.assert_close(output.pred_original_sample, expected, rtol=1e-6, atol=1e-6)
        x = output.prev_sample


@every_sampler
@every_kind
def test_scale_model_input_before_and_after_set_timesteps(name: str, kind: str) -> None:
    scheduler = build(name, kind, None)
    x = start()
    assert torch.equal(scheduler.scale_model_input(x), x)
    assert torch.equal(scheduler.scale_model_input(x, 5), x)
    scheduler.set_timesteps(STEPS)
    # On a batch that guidance has doubled.
    doubled = torch.cat([x, x])
    assert torch.equal(scheduler.scale_model_input(doubled, scheduler.timesteps[0]), doubled)
    assert scheduler.step_index is None


def test_wrong_use_is_told_in_plain_words() -> None:
    scheduler = build("dpm++", "vp", None)
    x = start()
    with pytest.raises(ValueError, match="set_timesteps"):
        scheduler.step(x, 999, x)
    scheduler.set_timesteps(2)
    with pytest.raises(ValueError, match="timestep 123"):
        scheduler.step(x, 123, x)
    with pytest.raises(ValueError, match="model_output has shape"):
        scheduler.step(x[:1], scheduler.timesteps[0], x)
    scheduler.set_timesteps(2)
    run(scheduler, x)
    with pytest.raises(ValueError, match="set_timesteps"):
        scheduler.step(x, scheduler.timesteps[-1], x)


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("cls", CLASSES)
def test_a_preset_is_an_ordinary_scheduler(cls: Any, kind: str) -> None:
    try:
        scheduler = cls.from_config(CONFIGS[kind]().config, preset="accurate", guidance_scale=7.5)
    except ValueError as error:
        assert "was not measured" in str(error)  # noqa: PT017
        return
    for steps in (1, 4, 10, 25):
        scheduler.set_timesteps(steps)
        assert run(scheduler, start()).isfinite().all()
    scheduler.set_timesteps(sigmas=LEVELS[kind])
    assert run(scheduler, start()).isfinite().all()
