"""``fewstep bench tuned``: who is compared, with what, and that a run goes on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from fewstep.scripts.bench.output import STABLE_DIFFUSION
from fewstep.scripts.bench.rivals import rivals
from fewstep.scripts.bench.tuned import _frechet
from fewstep.scripts.tuning.task import change
from model_folders import assert_refused, invoke

SMALL = ("--held-out", 20, "--images", 100, "--iterations", 1, "--rounds", 0, "--polish", 0, "--guidance-scale", 1)
CALL = ("bench", "tuned", "--model", "mixture", "--calls", 4, *SMALL)


@pytest.mark.parametrize("calls", [4, 5, 8])
def test_rivals_are_all_that_make_so_many_calls(calls: int) -> None:
    found = list(rivals({**STABLE_DIFFUSION, "prediction_type": "epsilon"}, calls))
    assert len({rival.name for rival in found}) == len(found) > 50
    for rival in found:
        rival.scheduler.set_timesteps(rival.steps)
        assert len(rival.scheduler.timesteps) == calls
    classes = {type(rival.scheduler).__name__ for rival in found}
    assert {"DDIMScheduler", "DPMSolverMultistepScheduler", "UniPCMultistepScheduler", "PNDMScheduler"} <= classes
    assert ("HeunDiscreteScheduler" in classes) == (calls % 2 == 1)


def test_the_table_holds_all_methods_and_goes_on(tmp_path: Path) -> None:
    report, folder = tmp_path / "r.json", tmp_path / "fits"
    files = ("--json", report, "--folder", folder)
    first = invoke(*CALL, "--methods", "unipc,learned", *files)
    assert first.exit_code == 0, first.output
    results = {one["method"]: one for one in json.loads(report.read_text())["results"]}
    assert list(results) == ["diffusers", "unipc", "learned"]
    assert results["diffusers"]["errors"]["median"]["change"] == 0.0
    assert results["learned"]["errors"]["mean"]["after"] < results["unipc"]["errors"]["mean"]["after"]
    for one in results.values():
        low, high = one["frechet_interval"]
        assert low < one["frechet"] < high
    second = invoke(*CALL, "--methods", "unipc,dc,learned", *files)
    assert second.exit_code == 0, second.output
    assert "fit:" not in second.stderr  # the learned plan was there
    methods = [one["method"] for one in json.loads(report.read_text())["results"]]
    assert sorted(methods) == ["dc", "diffusers", "learned", "unipc"]
    lines = [line.split()[0] for line in second.stdout.splitlines()[1:]]
    assert lines == ["diffusers", "unipc", "dc", "learned"]
    assert_refused(invoke(*CALL, "--held-out", 30, *files), "other settings")


def test_changes_are_between_pairs() -> None:
    """A change that is the same for every sample has no spread, however the samples differ."""
    errors = torch.rand(50, generator=torch.Generator().manual_seed(0)) + 0.1
    for name in ("mean", "median", "root_mean_square"):
        figures = change(errors, 0.75 * errors, name)
        assert figures["change"] == pytest.approx(-0.25, abs=1e-6)
        assert figures["change_interval"] == pytest.approx([-0.25, -0.25], abs=1e-6)


def test_intervals_of_the_frechet_distance_cover_it() -> None:
    """Of two Gaussians one apart, whose distance is 1 and the bias of few samples."""
    features = torch.randn(400, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    features[:, 0] += 1.0
    value, (low, high) = _frechet(features, (torch.zeros(4).double(), torch.eye(4).double()))
    assert low < 1.0 < high
    assert low < value < high
    assert high - low < 0.6


def test_bad_input_is_one_line(tmp_path: Path) -> None:
    folder = ("--folder", tmp_path)
    assert_refused(invoke(*CALL, *folder, "--model", "digits-restore"), "digits-restore")
    assert_refused(invoke(*CALL, *folder, "--methods", "unipc,ddim"), "ddim")
    assert_refused(invoke(*CALL, *folder, "--calls", "2"), "--calls", "2")
    assert_refused(invoke(*CALL, *folder, "--calls", "4.5"), "--calls", "4.5")
    assert_refused(invoke(*CALL, *folder, "--guidance-scale", "x"), "--guidance-scale", "x")
