"""Steps as loops that ``torch.compile`` makes, against torch's operations in float64."""

from __future__ import annotations

import pytest
import torch

from fewstep.samplers import SAMPLERS, GuidedOutput, UniPCScheduler
from fewstep.samplers.execute import PlanRun
from fewstep.samplers.fused.backend import pass_for
from fewstep.samplers.fused.compiled import missing_compiler
from fewstep.samplers.per_sample import PerSamplePlan
from fewstep.samplers.rows import Thresholding

STABLE_DIFFUSION = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
CPU = torch.device("cpu")

compiles = pytest.mark.skipif(missing_compiler(CPU) is not None, reason="there is no C++ compiler")


def normal(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@compiles
@pytest.mark.parametrize(
    ("name", "dtype", "limits"),
    [
        ("unipc", torch.float32, None),
        ("sde-dpm++", torch.bfloat16, None),
        ("dpm++", torch.float16, Thresholding(0.9, 1.5)),
    ],
    ids=["unipc", "sde-dpm++", "dpm++"],
)
def test_steps(name: str, dtype: torch.dtype, limits: Thresholding | None) -> None:
    """With guidance, noise, clipping, another batch later, and particles that are reordered."""
    scheduler = SAMPLERS[name].build(STABLE_DIFFUSION)
    scheduler.set_timesteps(3)
    plan = scheduler.plan
    for batch in (2, 3):
        exact, compiled = PlanRun(plan, limits, backend="torch"), PlanRun(plan, limits, backend="compile")
        x = normal(batch, 3, 5, seed=1).to(dtype)
        wide = x.double()
        size = 1.0
        for k in range(len(plan)):
            prompt, blank = normal(2, batch, 3, 5, seed=2 + k).to(dtype)
            noise = normal(batch, 3, 5, seed=90 + k) if exact.is_stochastic else None
            wide_noise = None if noise is None else noise.double()
            output = blank.double() + 3.0 * (prompt.double() - blank.double())
            wide, wide_clean = exact.step(wide, output, wide_noise)
            x, clean = compiled.step(x, GuidedOutput(prompt, blank, 3.0), noise)
            assert clean is not None
            assert wide_clean is not None
            assert x.dtype == clean.dtype == dtype
            size = max(size, wide.abs().max().item(), wide_clean.abs().max().item())
            for ours, theirs in ((x, wide), (clean, wide_clean)):
                assert (ours.double() - theirs).abs().max() <= 8 * torch.finfo(dtype).eps * size
            if k == 1:
                ancestors = torch.arange(batch).flip(0)
                wide, x = wide[ancestors], x[ancestors]
                exact.reorder(ancestors)
                compiled.reorder(ancestors)


@compiles
def test_it_is_chosen_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    x = normal(2, 3, 4, 4, seed=1)
    results = []
    for name in ("torch", "compile"):
        monkeypatch.setenv("FEWSTEP_BACKEND", name)
        scheduler = UniPCScheduler.from_config(STABLE_DIFFUSION)
        scheduler.set_timesteps(3)
        results.append(scheduler.step(x, scheduler.timesteps[0], x).prev_sample)
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-5)
    assert not torch.equal(*results)  # another order of operations


@compiles
def test_samples_at_calls_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    scheduler = SAMPLERS["sde-dpm++"].build(STABLE_DIFFUSION)
    scheduler.set_timesteps(5)
    chain = PerSamplePlan(scheduler.plan)
    states, at = normal(3, 1 + chain.slots, 3, 4, seed=1), [0, 4, 2]
    output, noise = normal(2, 3, 3, 4, seed=2)
    exact = chain.step(states.double(), output.double(), at, noise.double())
    monkeypatch.setenv("FEWSTEP_BACKEND", "compile")
    found = chain.step(states, output, at, noise)
    assert found.dtype == torch.float32
    assert (found - exact).abs().max() <= 2e-5 * exact.abs().max().item()


def test_without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(ValueError, match=r'backend "compile": there is no C\+\+ compiler; install g\+\+'):
        pass_for("compile", CPU)


def test_every_layout_has_compilations_of_its_own() -> None:
    """``torch.compile`` gives up, and runs slowly, after a number of compilations of one function."""
    from fewstep.samplers.fused.compiled import _loop
    from fewstep.samplers.fused.table import CallLayout

    first, second = (CallLayout(False, (), (), (), ((0, k), (0,))) for k in (0, 1))
    loops = [_loop(layout, False, True) for layout in (first, second, first)]
    assert loops[0] is loops[2]
    codes = {loop.__wrapped__.__code__ for loop in loops}
    assert len(codes) == 2
