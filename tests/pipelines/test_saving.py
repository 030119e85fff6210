"""Saving and loading: schedulers and whole pipelines, in this process and in another one."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file

from fewstep.samplers import SAMPLERS, DEISScheduler, DPMSolverPPScheduler, PlanScheduler, UniPCScheduler
from pipelines.tiny import CASES, flow_euler, missing, pndm

CLASSES: list[Any] = [DPMSolverPPScheduler, DEISScheduler, UniPCScheduler]
SAVED = {"sd": "dpm++", "sdxl": "unipc", "sd3": "deis", "flux": "unipc", "wan": "dpm++", "dit": "deis", "ddpm": "dpm++"}

# What another program does: nothing of fewstep but the import of its samplers.
PROGRAM = """
import sys
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from safetensors.torch import save_file

import fewstep.samplers

folder = Path(sys.argv[1])
sys.path.insert(0, sys.argv[2])
from pipelines.tiny import CASES, missing

results = {}
for path in sorted((folder / "pipelines").iterdir()):
    pipe = DiffusionPipeline.from_pretrained(path, **missing(path.name))
    pipe.set_progress_bar_config(disable=True)
    results[path.name] = CASES[path.name].call(pipe).contiguous()
for path in sorted((folder / "schedulers").iterdir()):
    cls = getattr(fewstep.samplers, path.name.split("-")[0])
    scheduler = cls.from_pretrained(path)
    scheduler.set_timesteps(5)
    results[path.name] = scheduler.sigmas
save_file(results, folder / "results.safetensors")
"""


def options_of(scheduler: PlanScheduler) -> dict[str, Any]:
    return {key: value for key, value in scheduler.config.items() if not key.startswith("_")}


def assert_same_image(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Up to the rounding of kernels that depend on where in memory the loaded weights lie."""
    assert (found - expected).abs().max() < 1e-5 * expected.abs().max()


def strict_json(path: Path) -> dict[str, Any]:
    """The file's content; infinities are diffusers' way to write one default, anything else is refused."""
    constants: list[str] = []
    data: dict[str, Any] = json.loads(path.read_text(), parse_constant=lambda c: constants.append(c) or float(c))
    assert set(constants) <= {"-Infinity"}
    infinite = {key for key, value in data.items() if isinstance(value, float) and not math.isfinite(value)}
    assert infinite <= {"lambda_min_clipped"}
    return data


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("config", ["vp", "flow"])
def test_a_scheduler_comes_back_as_it_was_saved(tmp_path: Path, name: str, config: str) -> None:
    scheduler = SAMPLERS[name].build((pndm() if config == "vp" else flow_euler()).config)
    scheduler.save_pretrained(tmp_path)
    data = strict_json(tmp_path / "scheduler_config.json")
    assert data["_class_name"] == type(scheduler).__name__
    again = type(scheduler).from_pretrained(tmp_path)
    assert options_of(again) == options_of(scheduler)
    for one in (scheduler, again):
        one.set_timesteps(5)
    assert again.plan == scheduler.plan
    # A run leaves nothing behind in the file.
    scheduler.save_pretrained(tmp_path)
    assert strict_json(tmp_path / "scheduler_config.json") == data


@pytest.mark.parametrize("cls", CLASSES)
def test_unusual_option_values_survive_saving(tmp_path: Path, cls: Any) -> None:
    import numpy as np

    options: dict[str, Any] = {
        "trained_betas": np.linspace(1e-4, 0.02, 100),
        "num_train_timesteps": 100,
        "sigma_min": 0.05,
        "use_karras_sigmas": True,
        "thresholding": True,
    }
    if cls is UniPCScheduler:
        options["disable_corrector"] = [0, 2]
    scheduler = cls(**options)
    scheduler.save_pretrained(tmp_path)
    strict_json(tmp_path / "scheduler_config.json")
    again = cls.from_pretrained(tmp_path)
    scheduler.set_timesteps(4)
    again.set_timesteps(4)
    assert again.plan == scheduler.plan


def test_a_predictor_given_as_an_object_is_saved_by_name(tmp_path: Path) -> None:
    scheduler = UniPCScheduler(solver_p=DPMSolverPPScheduler())
    scheduler.save_pretrained(tmp_path)
    assert isinstance(strict_json(tmp_path / "scheduler_config.json")["solver_p"], str)
    again = UniPCScheduler.from_pretrained(tmp_path)
    scheduler.set_timesteps(4)
    again.set_timesteps(4)
    assert again.plan == scheduler.plan


@pytest.mark.parametrize("name", ["dpm++", "deis", "unipc"])
def test_private_options_of_other_classes_survive_a_round_trip(name: str) -> None:
    stock = diffusers.EulerDiscreteScheduler(beta_start=0.00085, interpolation_type="log_linear", steps_offset=1)
    ours = SAMPLERS[name].build(stock.config)
    back = diffusers.EulerDiscreteScheduler.from_config(ours.config)
    assert back.config.interpolation_type == "log_linear"
    assert back.config.beta_start == 0.00085
    flow = diffusers.FlowMatchEulerDiscreteScheduler(shift=2.5, base_shift=0.4)
    back = diffusers.FlowMatchEulerDiscreteScheduler.from_config(SAMPLERS[name].build(flow.config).config)
    assert (back.config.shift, back.config.base_shift) == (2.5, 0.4)


@pytest.mark.parametrize("name", ["dpm++", "deis", "unipc"])
def test_crossing_between_our_classes_keeps_the_model(name: str) -> None:
    for stock in (pndm(), flow_euler(use_dynamic_shifting=True), diffusers.EDMEulerScheduler(sigma_max=40.0)):
        first = SAMPLERS[name].build(stock.config)
        for cls in CLASSES:
            second = cls.from_config(first.config)
            for key in ("beta_start", "prediction_type", "use_flow_sigmas", "flow_shift", "sigma_data", "sigma_max"):
                assert second.config[key] == first.config[key]
            assert second.schedule.kind == first.schedule.kind


@pytest.mark.parametrize("case", SAVED)
def test_a_saved_pipeline_loads_with_our_scheduler(tmp_path: Path, case: str) -> None:
    chosen = CASES[case]
    pipe = chosen.build()
    pipe.scheduler = SAMPLERS[SAVED[case]].build(pipe.scheduler.config)
    expected = chosen.call(pipe)
    pipe.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    module, name = index["scheduler"]
    assert name == type(pipe.scheduler).__name__
    assert module.startswith("fewstep.samplers")
    assert hasattr(sys.modules[module], "SchedulerMixin")
    again = DiffusionPipeline.from_pretrained(tmp_path, **missing(case))
    again.set_progress_bar_config(disable=True)
    assert type(again.scheduler) is type(pipe.scheduler)
    assert options_of(again.scheduler) == options_of(pipe.scheduler)
    assert_same_image(chosen.call(again), expected)
    replaced = DiffusionPipeline.from_pretrained(tmp_path, scheduler=chosen.scheduler(), **missing(case))
    assert type(replaced.scheduler) is type(chosen.scheduler())


def test_another_process_that_imports_the_samplers_loads_everything(tmp_path: Path) -> None:
    expected = {}
    for case, name in SAVED.items():
        pipe = CASES[case].build()
        pipe.scheduler = SAMPLERS[name].build(pipe.scheduler.config)
        expected[case] = CASES[case].call(pipe)
        pipe.save_pretrained(tmp_path / "pipelines" / case)
    for number, entry in enumerate(SAMPLERS.values()):
        scheduler = entry.build(flow_euler().config if number % 2 else pndm().config)
        key = f"{type(scheduler).__name__}-{number}"
        scheduler.save_pretrained(tmp_path / "schedulers" / key)
        scheduler.set_timesteps(5)
        expected[key] = scheduler.sigmas
    tests = Path(__file__).resolve().parents[1]
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tmp_path), str(tests)],
        cwd=tmp_path,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr[-2000:]
    found = load_file(tmp_path / "results.safetensors")
    assert set(found) == set(expected)
    for key, value in expected.items():
        assert_same_image(found[key], value)
