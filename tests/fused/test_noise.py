"""Noise that the kernel draws, against Philox in torch; and calls of each sample's own."""

from __future__ import annotations

import pytest
import torch

from fewstep.samplers import SAMPLERS, PlanScheduler
from fewstep.samplers.execute import PlanRun
from fewstep.samplers.fused.operands import Operands, torch_pass
from fewstep.samplers.fused.table import PlanTable
from fewstep.samplers.noise import NoiseToDraw
from fewstep.samplers.per_sample import PerSamplePlan
from fewstep.samplers.rows import Thresholding, compiled

STABLE_DIFFUSION = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}


def scheduler(name: str = "sde-dpm++", steps: int = 3) -> PlanScheduler:
    made = SAMPLERS[name].build(STABLE_DIFFUSION)
    made.set_timesteps(steps)
    return made


def normal(*shape: int, seed: int, device: torch.device) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(device)


@pytest.mark.parametrize("order", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("shape", [(2, 3, 5, 7), (2, 4, 32, 33)], ids=str)
def test_kernel_draws_what_torch_draws(
    shape: tuple[int, ...], order: torch.memory_format, device: torch.device
) -> None:
    plan = scheduler().plan
    noise = NoiseToDraw(torch.tensor([7, -(2**61) + 11], device=device), 3)
    exact, fused = (PlanRun(plan, backend=name) for name in ("torch", "triton"))
    x = normal(*shape, seed=1, device=device).contiguous(memory_format=order)
    wide = x.double()
    for k in range(len(plan)):
        output = normal(*shape, seed=2 + k, device=device).contiguous(memory_format=order)
        drawn = noise.draw(k, torch.Size(shape), torch.float64)
        wide, x = exact.step(wide, output.double(), drawn)[0], fused.step(x, output, noise)[0]
    assert (x - wide).abs().max() <= 2e-6 * wide.abs().max()


def test_order_of_memory_that_the_kernel_cannot_number(device: torch.device) -> None:
    plan, noise = scheduler().plan, NoiseToDraw(torch.tensor([7, 8], device=device), 0)
    x, output = (normal(2, 5, 4, 3, seed=k, device=device) for k in range(2))
    turned = x.permute(0, 2, 1, 3).contiguous().permute(0, 2, 1, 3)
    results = [PlanRun(plan, backend="triton").step(v, output, noise)[0] for v in (x, turned)]
    assert (results[0] - results[1]).abs().max() <= 1e-6


def test_noise_of_a_sample_does_not_know_its_batch(device: torch.device) -> None:
    x, output = normal(4, 3, 32, 32, seed=1, device=device), normal(4, 3, 32, 32, seed=2, device=device)
    steps = []
    for first, batch in ((0, 4), (2, 1), (1, 2)):
        s = scheduler().set_backend("triton").manual_seed(10 + first, in_kernel=True)
        s.set_timesteps(3)
        part = slice(first, first + batch)
        steps.append(s.step(output[part], s.timesteps[0], x[part], return_dict=False)[0])
    assert torch.equal(steps[0][2:3], steps[1])
    assert torch.equal(steps[0][1:3], steps[2])


@pytest.mark.parametrize("drawn", [False, True])
def test_each_sample_at_a_call_of_its_own(drawn: bool, device: torch.device) -> None:
    from fewstep.samplers.fused.launch import triton_pass

    plan = scheduler(steps=6).plan
    calls, slots = compiled(plan, fold=True)
    table = PlanTable(calls, slots, clip=False)
    middle = [k for k, layout in enumerate(table.layouts) if layout == table.layouts[2]]
    assert len(middle) >= 3
    at = [middle[2], middle[0], middle[1], middle[0]]
    shape = (4, 3, 7)
    seeds = NoiseToDraw(torch.tensor([5, 6, 7, 8], device=device), 0)
    x, output, given, *kept = (normal(*shape, seed=k, device=device) for k in range(3 + len(table.layouts[2].reads)))

    def operands(rows: slice, index: torch.Tensor) -> Operands:
        noise = NoiseToDraw(seeds.seeds[rows], 0) if drawn else given[rows]
        numbers = torch.from_numpy(table.numbers).to(device, torch.float32)
        return Operands(
            x[rows], output[rows], None, None, noise, [k[rows] for k in kept], None, False, None, numbers, index, True
        )

    index = torch.tensor(at, dtype=torch.int32, device=device)
    together = triton_pass(operands(slice(None), index), table.layouts[2])
    in_torch = torch_pass(operands(slice(None), index), table.layouts[2])
    for b, k in enumerate(at):
        alone = triton_pass(operands(slice(b, b + 1), index[b]), table.layouts[k])
        for one, all_of_them, other in zip(
            (alone.following, *alone.kept, alone.predicted),
            (together.following, *together.kept, together.predicted),
            (in_torch.following, *in_torch.kept, in_torch.predicted),
            strict=True,
        ):
            assert (one[0] - all_of_them[b]).abs().max() <= 1e-6
            assert (one[0] - other[b]).abs().max() <= 1e-5


@pytest.mark.parametrize("limits", [None, Thresholding(0.9, 1.5), Thresholding(0.9, 1.0)], ids=str)
@pytest.mark.parametrize("name", ["sde-dpm++", "unipc", "ddim"])
def test_states_at_calls_of_their_own(
    name: str, limits: Thresholding | None, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    chain = PerSamplePlan(scheduler(name, 5).plan, limits)
    states = normal(5, 1 + chain.slots, 3, 4, seed=1, device=device)
    output, noise = (normal(5, 3, 4, seed=k, device=device) for k in (2, 3))
    at = [0, 4, 2, 1, 2]
    exact = chain.step(states.double(), output.double(), at, noise.double())
    monkeypatch.setenv("FEWSTEP_BACKEND", "triton")
    found = chain.step(states, output, at, noise)
    assert found.dtype == torch.float32
    assert (found - exact).abs().max() <= 2e-5 * max(1.0, exact.abs().max().item())
