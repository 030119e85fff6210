"""Each call of a plan by the kernel, against torch's operations in float64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from fewstep.samplers import SAMPLERS, GuidedOutput, Plan
from fewstep.samplers.execute import PlanRun
from fewstep.samplers.rows import Thresholding

STABLE_DIFFUSION = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
STOCHASTIC = "sde-dpm++"


def plan_of(name: str, steps: int = 4) -> Plan:
    scheduler = SAMPLERS[name].build(STABLE_DIFFUSION)
    scheduler.set_timesteps(steps)
    return scheduler.plan


def normal(*shape: int, seed: int, device: torch.device) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(device)


def check(
    plan: Plan,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    device: torch.device,
    thresholding: Thresholding | None = None,
    formatted: Callable[[torch.Tensor], torch.Tensor] = lambda x: x,
    clean: bool = True,
) -> None:
    """Both runs get the same outputs of a network; the kernel's must agree to a few roundings of its dtype."""
    exact, fused = (PlanRun(plan, thresholding, backend=name) for name in ("torch", "triton"))
    x = formatted(normal(*shape, seed=1, device=device).to(dtype))
    wide, size, worst = x.double(), 1e-3, 0.0
    for k in range(len(plan)):
        output = formatted(normal(*shape, seed=2 + k, device=device).to(dtype))
        noise = formatted(normal(*shape, seed=90 + k, device=device)) if exact.is_stochastic else None
        wide, wide_clean = exact.step(wide, output.double(), None if noise is None else noise.double(), clean=clean)
        x, x_clean = fused.step(x, output, noise, clean=clean)
        assert x.dtype == dtype
        assert x.stride() == output.stride() or not output.numel()
        assert (x_clean is None) == (not clean)
        for ours, theirs in ((x, wide), (x_clean, wide_clean)):
            if ours is not None and theirs is not None and ours.numel():
                assert ours.dtype == dtype
                size = max(size, theirs.abs().max().item())
                worst = max(worst, (ours.double() - theirs).abs().max().item())
    assert worst <= 4 * torch.finfo(dtype).eps * size


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", SAMPLERS)
def test_every_solver(name: str, dtype: torch.dtype, device: torch.device) -> None:
    check(plan_of(name), (2, 3, 5), dtype, device)


@pytest.mark.parametrize("name", ["unipc", STOCHASTIC])
@pytest.mark.parametrize(
    "shape",
    [(1, 1), (1,), (3, 1024), (2, 1025), (2, 2049), (0, 3, 4), (2, 0, 4), (5, 3, 7, 11), (1, 2, 3, 4, 5)],
    ids=str,
)
def test_odd_shapes(name: str, shape: tuple[int, ...], device: torch.device) -> None:
    check(plan_of(name, 3), shape, torch.float32, device)


FORMATS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "transposed": lambda x: x.transpose(1, 3).contiguous().transpose(1, 3),
    "turned": lambda x: x.permute(0, 2, 1, 3).contiguous().permute(0, 2, 1, 3),
}


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("name", FORMATS)
def test_memory_formats(name: str, dtype: torch.dtype, device: torch.device) -> None:
    check(plan_of("dpm++"), (2, 3, 5, 7), dtype, device, formatted=FORMATS[name])


@pytest.mark.parametrize(
    "formatted",
    [
        lambda x: torch.cat([x, x], 1)[:, :3],
        lambda x: torch.stack([x, x], -1)[..., 0],
        lambda x: x[:1].expand(2, -1, -1, -1),
    ],
    ids=["half_of_the_channels", "every_second", "expanded"],
)
def test_tensors_with_gaps(formatted: Callable[[torch.Tensor], torch.Tensor], device: torch.device) -> None:
    plan, shape = plan_of("dpm++"), (2, 3, 5, 7)
    exact, fused = (PlanRun(plan, backend=name) for name in ("torch", "triton"))
    x, output = (formatted(normal(*shape, seed=k, device=device)) for k in (1, 2))
    for _ in plan:
        expected, _ = exact.step(x.double(), output.double())
        found, _ = fused.step(x, output)
        assert (found - expected).abs().max() <= 1e-5
        x = formatted(found)


def test_output_in_another_format_than_the_sample(device: torch.device) -> None:
    plan = plan_of("dpm++")
    exact, fused = (PlanRun(plan, backend=name) for name in ("torch", "triton"))
    x = wide = normal(2, 3, 4, 4, seed=1, device=device)
    for k in range(len(plan)):
        output = normal(2, 3, 4, 4, seed=k, device=device).contiguous(memory_format=torch.channels_last)
        wide, x = exact.step(wide.double(), output.double())[0], fused.step(x, output)[0]
    assert (x - wide).abs().max() <= 1e-5
    assert x.is_contiguous()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("limits", [Thresholding(0.9, 1.5), Thresholding(0.995, 1.0), Thresholding(0.9, None)], ids=str)
@pytest.mark.parametrize("name", ["dpm++", "deis"])
def test_clipping(name: str, limits: Thresholding, dtype: torch.dtype, device: torch.device) -> None:
    check(plan_of(name, 3), (2, 3, 5), dtype, device, limits)


def test_without_the_clean_sample(device: torch.device) -> None:
    check(plan_of("unipc"), (2, 3, 5), torch.float16, device, clean=False)
    check(plan_of("dpm++"), (2, 3, 5), torch.float16, device, Thresholding(0.9, 1.5), clean=False)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("limits", [None, Thresholding(0.9, 1.5)], ids=str)
def test_guidance_in_the_pass(limits: Thresholding | None, dtype: torch.dtype, device: torch.device) -> None:
    plan = plan_of("dpm++")
    exact, fused = (PlanRun(plan, limits, backend=name) for name in ("torch", "triton"))
    x = normal(2, 3, 5, seed=1, device=device).to(dtype)
    wide = x.double()
    for k in range(len(plan)):
        both = normal(4, 3, 5, seed=2 + k, device=device).to(dtype)
        output = GuidedOutput(both[2:], both[:2], 5.0 + k)
        wide, _ = exact.step(wide, both[:2].double() + output.scale * (both[2:].double() - both[:2].double()))
        x, _ = fused.step(x, output)
    assert (x.double() - wide).abs().max() <= 8 * torch.finfo(dtype).eps * wide.abs().max()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["dpm++3m", "unipc"])
def test_ancestors_are_gathered_by_the_next_read(name: str, dtype: torch.dtype, device: torch.device) -> None:
    plan = plan_of(name, 5)
    exact, fused = (PlanRun(plan, backend=name) for name in ("torch", "triton"))
    x = normal(4, 3, 5, seed=1, device=device).to(dtype)
    wide = x.double()
    for k in range(len(plan)):
        output = normal(4, 3, 5, seed=2 + k, device=device).to(dtype)
        for _ in range(k % 3):  # twice in a row as well: orders of orders
            ancestors = torch.tensor([2, 0, 0, 3], device=device)
            exact.reorder(ancestors)
            fused.reorder(ancestors)
            wide, x = wide[ancestors], x[ancestors]
        wide, x = exact.step(wide, output.double())[0], fused.step(x, output)[0]
    assert (x.double() - wide).abs().max() <= 4 * torch.finfo(dtype).eps * wide.abs().max()


def test_half_precision_goes_on_from_the_unrounded_state(device: torch.device) -> None:
    plan = plan_of("dpm++", 12)
    exact, kept = PlanRun(plan, backend="torch"), PlanRun(plan, backend="triton")
    ours = normal(2, 64, seed=1, device=device).half()
    wide = ours.double()
    for k in range(len(plan)):
        output = normal(2, 64, seed=2 + k, device=device).half()
        wide, ours = exact.step(wide, output.double())[0], kept.step(ours, output)[0]
    # One rounding at the end, not one a step: half a unit in the last place of each element.
    assert ((ours.double() - wide).abs() <= 0.501 * torch.finfo(torch.float16).eps * wide.abs() + 1e-6).all()


def test_what_a_callback_changes_is_taken(device: torch.device) -> None:
    plan = plan_of("dpm++")
    runs = [PlanRun(plan, backend=name) for name in ("torch", "triton")]
    results = []
    for run in runs:
        x = normal(2, 3, 5, seed=1, device=device).half()
        for k in range(len(plan)):
            x, _ = run.step(x, normal(2, 3, 5, seed=2 + k, device=device).half())
            x[0, 0] = 0.25 * k
        results.append(x)
    assert (results[0] - results[1]).abs().max() <= 2e-3


def test_steps_are_taken_back(device: torch.device) -> None:
    plan = plan_of("unipc")
    run = PlanRun(plan, backend="triton")
    x, outputs = normal(2, 3, seed=1, device=device).half(), normal(len(plan), 2, 3, seed=2, device=device).half()
    samples = [x]
    for output in outputs:
        samples.append(run.step(samples[-1], output)[0])
        run.undo()
        assert torch.equal(run.step(samples[-2], output)[0], samples[-1])


def test_kept_tensors_are_not_the_callers(device: torch.device) -> None:
    plan, shape = plan_of("unipc"), (2, 3)
    careful, careless = (PlanRun(plan, backend="triton") for _ in range(2))
    x = y = normal(*shape, seed=1, device=device)
    for k in range(len(plan)):
        output = normal(*shape, seed=2 + k, device=device)
        x = careful.step(x, output)[0]
        seen, said = y.clone(), output.clone()
        y = careless.step(seen, said)[0]
        seen.fill_(torch.nan)
        said.fill_(torch.nan)
    assert torch.equal(x, y)


def test_float64_and_gradients_take_torch(device: torch.device) -> None:
    plan = plan_of("unipc")
    exact, asked = (PlanRun(plan, backend=name) for name in ("torch", "triton"))
    x = y = normal(2, 3, seed=1, device=device).double()
    for k in range(len(plan)):
        output = normal(2, 3, seed=2 + k, device=device).double()
        x, y = exact.step(x, output)[0], asked.step(y, output)[0]
    assert torch.equal(x, y)
    # A gradient in the middle of a run: the kept tensors are those of both backends.
    exact, asked = (PlanRun(plan, backend=name) for name in ("torch", "triton"))
    x, y = (normal(2, 3, seed=1, device=device) for _ in range(2))
    for k in range(len(plan)):
        output = normal(2, 3, seed=2 + k, device=device)
        x = exact.step(x, output)[0]
        with_gradient = y.clone().requires_grad_(k == 2)
        y = asked.step(with_gradient, output)[0]
        if k == 2:
            (gradient,) = torch.autograd.grad(y.sum(), with_gradient)
            assert gradient.abs().min() > 0
            y = y.detach()
        asked.reorder(torch.tensor([0, 1], device=device))
    assert (x - y).abs().max() <= 1e-5
