"""A plan as matrices, against its rows; and which backend executes it."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from fewstep.samplers import SAMPLERS, GuidedOutput, UniPCScheduler
from fewstep.samplers.execute import PlanRun
from fewstep.samplers.fused import backend
from fewstep.samplers.fused.backend import FusedRows, pass_for, serves
from fewstep.samplers.fused.operands import torch_pass
from fewstep.samplers.fused.table import PlanTable
from fewstep.samplers.rows import Thresholding, compiled

STABLE_DIFFUSION = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 3.0}
CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def normal(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("limits", [None, Thresholding(0.9, 1.5), Thresholding(0.9, 1.0)], ids=str)
@pytest.mark.parametrize("config", [STABLE_DIFFUSION, FLOW], ids=["sd", "flow"])
@pytest.mark.parametrize("name", SAMPLERS)
def test_matrices_are_the_plan(name: str, config: dict[str, object], limits: Thresholding | None) -> None:
    try:
        scheduler = SAMPLERS[name].build(config)
    except ValueError:
        pytest.skip(f"{name} refuses this model")
    scheduler.set_timesteps(5)
    plan = scheduler.plan
    exact = PlanRun(plan, limits, backend="torch")
    calls, slots = compiled(plan, fold=limits is None)
    rows = FusedRows(PlanTable(calls, slots, clip=limits is not None), limits, torch_pass, CPU, torch.float64)
    values: list[object] = [None] * slots
    x = y = normal(2, 3, 5, seed=1)
    for k, call in enumerate(plan):
        output, noise = normal(2, 3, 5, seed=2 + k), normal(2, 3, 5, seed=90 + k)
        results = rows.execute(k, values, None, y, output, noise, clean=True)
        x, clean = exact.step(x, output, noise if call.is_stochastic else None)
        y = results.following
        assert results.predicted is not None
        assert clean is not None
        scale = 1e-11 * max(1.0, x.abs().max().item(), clean.abs().max().item())
        assert (x - y).abs().max() <= scale
        assert (clean - results.predicted).abs().max() <= scale


def test_matrices_read_and_write_no_more_than_the_rows() -> None:
    """Traffic of a middle step, as the rows say: what it reads and writes is counted by hand."""
    counts = {}
    for name in ("dpm++", "dpm++3m", "unipc", "ddim"):
        scheduler = SAMPLERS[name].build(STABLE_DIFFUSION)
        scheduler.set_timesteps(10)
        calls, slots = compiled(scheduler.plan, fold=True)
        layout = PlanTable(calls, slots, clip=False).layouts[5]
        counts[name] = layout.columns, 1 + len(layout.writes)
    assert counts["ddim"] == (2, 1)
    assert counts["dpm++"] == (3, 2)
    assert counts["dpm++3m"] == (4, 2)
    # x, output, two predictions, and the state before the corrector.
    assert counts["unipc"] == (5, 3)


def test_a_call_that_reads_noise_needs_it() -> None:
    scheduler = SAMPLERS["sde-dpm++"].build(STABLE_DIFFUSION)
    scheduler.set_timesteps(3)
    calls, slots = compiled(scheduler.plan, fold=True)
    rows = FusedRows(PlanTable(calls, slots, clip=False), None, torch_pass, CPU)
    x = torch.zeros(1, 2)
    with pytest.raises(ValueError, match="noise is None"):
        rows.execute(0, [None] * slots, None, x, x, None, clean=True)


@pytest.mark.parametrize("name", ["dpm++", "unipc", "sde-dpm++"])
def test_guidance_in_the_step_is_that_of_pipelines(name: str) -> None:
    ours, theirs = (SAMPLERS[name].build(STABLE_DIFFUSION).manual_seed(3) for _ in range(2))
    x = y = normal(2, 4, 3, 3, seed=1).float()
    for scheduler in (ours, theirs):
        scheduler.set_timesteps(4)
    for t in ours.timesteps:
        prompt, blank = normal(2, 2, 4, 3, 3, seed=int(t)).float()
        x = ours.step(GuidedOutput(prompt, blank, 7.5), t, x).prev_sample
        y = theirs.step(blank + 7.5 * (prompt - blank), t, y).prev_sample
    assert torch.equal(x, y)


def test_guided_output_of_networks_with_variances() -> None:
    x = normal(2, 3, 4, 4, seed=1).float()
    prompt, blank = normal(2, 2, 6, 4, 4, seed=2).float()
    results = []
    for output in (GuidedOutput(prompt, blank, 3.0), blank + 3.0 * (prompt - blank)):
        scheduler = UniPCScheduler.from_config(STABLE_DIFFUSION, variance_type="learned_range")
        scheduler.set_timesteps(3)
        results.append(scheduler.step(output, scheduler.timesteps[0], x).prev_sample)
    assert torch.equal(*results)
    plain = UniPCScheduler.from_config(STABLE_DIFFUSION)
    plain.set_timesteps(3)
    with pytest.raises(ValueError, match="learned_range"):
        plain.step(GuidedOutput(prompt, blank, 3.0), plain.timesteps[0], x)


def test_another_run_of_the_same_times_is_a_new_one() -> None:
    scheduler = UniPCScheduler.from_config(STABLE_DIFFUSION)
    x, results = normal(2, 3, 4, 4, seed=1).float(), []
    for dtype in (torch.float32, torch.float64, torch.float32):
        scheduler.set_timesteps(4)
        y = x.to(dtype)
        for t in scheduler.timesteps[: 4 if results else 3]:  # the first is left unfinished
            y = scheduler.step(normal(2, 3, 4, 4, seed=int(t)).to(dtype), t, y).prev_sample
        results.append(y)
    fresh = UniPCScheduler.from_config(STABLE_DIFFUSION)
    fresh.set_timesteps(4)
    y = x
    for t in fresh.timesteps:
        y = fresh.step(normal(2, 3, 4, 4, seed=int(t)).float(), t, y).prev_sample
    assert torch.equal(results[2], y)
    assert (results[1] - y).abs().max() < 1e-4


def test_choice_of_the_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FEWSTEP_BACKEND", raising=False)
    monkeypatch.setattr(backend, "_missing", lambda: None)
    monkeypatch.setattr(backend, "_interpreted", lambda: False)
    scheduler = UniPCScheduler.from_config(STABLE_DIFFUSION)
    assert pass_for(None, CPU) is None
    assert pass_for("torch", CUDA) is None
    with pytest.raises(ValueError, match="backend 'cuda' is unknown; use one of torch, compile, triton"):
        scheduler.set_backend("cuda")
    with pytest.raises(ValueError, match="needs samples on a CUDA device, not on cpu"):
        pass_for("triton", CPU)
    monkeypatch.setenv("FEWSTEP_BACKEND", "cuda")
    with pytest.raises(ValueError, match="FEWSTEP_BACKEND is 'cuda'"):
        scheduler.set_timesteps(3)
    # An argument is stronger than the environment.
    assert scheduler.set_backend("torch") is scheduler
    scheduler.set_timesteps(3)


def test_environment_chooses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "_missing", lambda: "triton is not installed")
    monkeypatch.setenv("FEWSTEP_BACKEND", "triton")
    scheduler = UniPCScheduler.from_config(STABLE_DIFFUSION)
    scheduler.set_timesteps(3)
    x = torch.zeros(1, 2, 3, 3)
    with pytest.raises(ValueError, match="triton is not installed"):
        scheduler.step(x, scheduler.timesteps[0], x)
    monkeypatch.setenv("FEWSTEP_BACKEND", "torch")
    scheduler.set_timesteps(3)
    scheduler.step(x, scheduler.timesteps[0], x)


def test_cuda_without_triton_says_so_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FEWSTEP_BACKEND", raising=False)
    monkeypatch.setattr(backend, "_missing", lambda: "triton is not installed; pip install 'fewstep[cuda]'")
    backend._warn.cache_clear()
    with pytest.warns(RuntimeWarning, match=r"separate torch operations: .*fewstep\[cuda\]") as warned:
        found = [pass_for(None, CUDA) for _ in range(2)]
    assert found == [None, None]
    assert len(warned) == 1


def test_steps_on_the_cpu_do_without_the_kernel() -> None:
    code = (
        "import sys, torch; from fewstep.samplers import UniPCScheduler as S\n"
        "s = S(); s.set_timesteps(3); x = torch.zeros(1, 2); s.step(x, s.timesteps[0], x)\n"
        "assert 'fewstep.samplers.fused.backend' in sys.modules\n"
        "assert 'fewstep.samplers.fused.kernel' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_what_a_pass_does_not_take() -> None:
    x = torch.zeros(2, 3)
    assert serves(x, x, None)
    assert not serves(x, x.double())
    assert not serves(x, x.clone().requires_grad_())
    with torch.no_grad():
        assert serves(x, x.clone().requires_grad_())
    # Of one element in memory: a sample of 2**31, and two of half of that.
    assert not serves(torch.zeros(1).expand(1, 2**31))
    assert serves(torch.zeros(1).expand(2, 2**30))
