"""Plans as data: printed, saved, loaded, and refused where damaged."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from analytic import EDM, FLOW, STABLE_DIFFUSION, ZERO_SNR
from fewstep.samplers import SAMPLERS, DPMSolverPPScheduler, Plan, UniPCScheduler
from fewstep.samplers.execute import PlanRun


def plan_of(name: str = "unipc3", config: dict[str, Any] = STABLE_DIFFUSION, steps: int = 7) -> Plan:
    scheduler = SAMPLERS[name].build(config)
    scheduler.set_timesteps(steps)
    return scheduler.plan


def test_prints_as_a_table():
    scheduler = DPMSolverPPScheduler(**STABLE_DIFFUSION)
    scheduler.set_timesteps(2)
    lines = str(scheduler.plan).splitlines()
    assert lines[0] == "DPMSolverPPScheduler, 2 steps: 2 calls, 0 kept tensors, ends at sigma 0"
    assert lines[1].split() == ["call", "timestep", "alpha", "sigma", "rows"]
    first, second = (call for call in scheduler.plan)
    assert lines[2].split()[:4] == ["0", "999", f"{first.alpha:.6f}", f"{first.sigma:.6f}"]
    assert "prediction (data) = " in lines[2]
    assert lines[3].split() == ["sample", "=", *(w for s, c in first.rows[0].terms for w in (f"{c:+.6f}", s))]
    assert lines[4].split()[:2] == ["1", f"{second.timestep:g}"]
    assert lines[-1].split() == ["sample", "=", "+1.000000", "prediction"]


@pytest.mark.parametrize("name", SAMPLERS)
def test_print_shows_every_row(name):
    plan = plan_of(name)
    text = str(plan)
    assert text.count("prediction (") == len(plan)
    shown = sum(line.count(" = ") for line in text.splitlines())
    kept = sum((call.keep_sample is not None) + (call.keep_prediction is not None) for call in plan)
    assert shown == len(plan) + sum(len(call.rows) for call in plan) + kept
    assert ("noise" in text.replace("(noise)", "")) == plan.is_stochastic


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("config", [STABLE_DIFFUSION, ZERO_SNR, FLOW, EDM], ids=["vp", "zero_snr", "flow", "edm"])
def test_save_and_load_bit_exactly(name, config, tmp_path):
    plan = plan_of(name, config)
    plan.save(tmp_path / "plan.json")
    loaded = Plan.load(tmp_path / "plan.json")
    assert loaded == plan
    results = []
    for each in (plan, loaded):
        run, x = PlanRun(each), torch.ones(2, 3, dtype=torch.float64)
        for call in each:
            x = run.step(x, torch.tanh(call.in_scale * x), torch.full_like(x, 0.5))[0]
        results.append(x)
    assert torch.equal(*results)


def test_saving_is_atomic(tmp_path, monkeypatch):
    """A write that fails leaves the old file, and nothing else reads half of the new one."""
    path = tmp_path / "plan.json"
    old = plan_of(steps=3)
    old.save(str(path))
    replaced = []

    def fails(source: Any, target: Any) -> None:
        replaced.append((Path(source).name, Path(target)))
        raise OSError("the disk is full")

    monkeypatch.setattr(os, "replace", fails)
    with pytest.raises(OSError, match="full"):
        plan_of(steps=9).save(path)
    assert Plan.load(path) == old
    assert replaced == [("plan.json.partial", path)]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda d: d.update(format="other"), "no plan"),
        (lambda d: d.update(version=99), "99"),
        (lambda d: d.pop("format"), "no plan"),
        (lambda d: d.pop("calls"), "calls"),
        (lambda d: d.pop("final_alpha"), "final_alpha"),
        (lambda d: d.update(calls=5), "damaged"),
        (lambda d: d["calls"][0].pop("rows"), "rows"),
        (lambda d: d["calls"][0].pop("alpha"), "alpha"),
        (lambda d: d["calls"][0].update(extra=1), "extra"),
        (lambda d: d["calls"][0]["rows"][-1].update(out="noise"), "noise"),
        (lambda d: d["calls"][0]["rows"][-1].update(terms=[]), "nothing"),
        (lambda d: d.update(final_sigma=True), "final_sigma"),
        (lambda d: d["calls"][0]["rows"][0].pop("out"), "out"),
        (lambda d: d["calls"][0]["rows"][0].update(terms=[["sample"]]), "damaged"),
        (lambda d: d["calls"][0]["rows"][0].update(terms=[["sample", "much"]]), "damaged"),
        (lambda d: d["calls"][0].update(clean=[1.0]), "clean"),
        (lambda d: d["calls"][0].update(alpha="near"), "alpha"),
        (lambda d: d["calls"][0].update(measure="score"), "measure"),
        (lambda d: d["calls"][0].update(sigma=float("nan")), "sigma"),
        (lambda d: d["calls"][0]["rows"][-1].update(out="kept7"), "sample"),
        (lambda d: d["calls"][0]["rows"][-1].update(terms=[["kept7", 1.0]]), "kept7"),
        (lambda d: d.update(calls=[]), "calls"),
    ],
)
def test_damaged_plans_are_refused(damage, message, tmp_path):
    data = json.loads(json.dumps(plan_of().to_dict()))
    damage(data)
    with pytest.raises(ValueError, match=message):
        Plan.from_dict(data)
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(data))
    with pytest.raises(ValueError, match=rf"plan\.json: .*{message}"):
        Plan.load(path)


@pytest.mark.parametrize("text", ["", "{", "[1, 2]", "3", '"plan"', "\x00\x01"])
def test_files_that_hold_no_plan_are_refused(text, tmp_path):
    path = tmp_path / "plan.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"plan\.json(: this is no plan| is not JSON)"):
        Plan.load(path)


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError):
        Plan.load(tmp_path / "none.json")


def test_counts():
    plan = plan_of("dpm++3m", steps=20)
    assert (len(plan), plan.slots, plan.is_stochastic) == (20, 2, False)
    assert [call.timestep for call in plan] == sorted((call.timestep for call in plan), reverse=True)
    # Second order on equal steps in half log-SNR: 1.5 and -0.5 times the first order's weight.
    scheduler = DPMSolverPPScheduler(**STABLE_DIFFUSION, use_lu_lambdas=True, final_sigmas_type="sigma_min")
    scheduler.set_timesteps(20)
    call = scheduler.plan.calls[5]
    weights = sorted(c for slot, c in call.rows[0].terms if slot != "sample")
    assert weights[1] / weights[0] == pytest.approx(-3.0, rel=1e-4)
    assert scheduler.plan.amplification == pytest.approx(
        max(sum(abs(c) for slot, c in row.terms if slot != "sample") for call in scheduler.plan for row in call.rows)
    )


def test_the_plan_of_a_later_start_is_the_end_of_the_whole_one():
    """From the third step on a second-order plan forgets where it began."""
    scheduler = UniPCScheduler(**STABLE_DIFFUSION, solver_order=1, disable_corrector=list(range(9)))
    scheduler.set_timesteps(9)
    whole = scheduler.plan
    scheduler.set_begin_index(4)
    assert scheduler.plan.calls == whole.calls[4:]
    scheduler.set_timesteps(9)
    assert scheduler.plan == whole
