"""``fewstep tune``, and saved schedulers as samplers of ``fewstep generate``."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fewstep.samplers import DCSolverScheduler, UniPCScheduler
from model_folders import assert_refused, invoke, save_text_model

TUNE = ("tune", "--model", "digits-small", "--steps", "5", "--held-out", "20", "--noises", "6", "--refinement", "4")


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tuned") / "sampler"
    result = invoke(*TUNE, "--output", folder)
    assert result.exit_code == 0, (result.output, result.exception)
    assert "held out, 20 noises" in result.stdout
    return folder


def test_errors_shrink_on_noises_that_the_search_never_saw(tuned: Path) -> None:
    report = json.loads((tuned / "tuning.json").read_text())
    assert report["errors"]["seen"]["samples"] == 6
    held_out = report["errors"]["held_out"]
    assert held_out["samples"] == 20
    assert held_out["after"] < 0.95 * held_out["before"]
    low, high = held_out["change_interval"]
    assert low < held_out["change"] < high < 0
    assert held_out["change"] == pytest.approx(held_out["after"] / held_out["before"] - 1)


def test_the_folder_is_a_scheduler(tuned: Path) -> None:
    scheduler = DCSolverScheduler.from_pretrained(tuned)
    assert scheduler.config.ratios == json.loads((tuned / "tuning.json").read_text())["ratios"]
    assert scheduler.config.ratios[:2] == [1.0, 1.0]
    assert scheduler.config.prediction_type == "v_prediction"


def test_a_search_is_repeated_by_its_seed(tuned: Path, tmp_path: Path) -> None:
    again = invoke(*TUNE, "--output", tmp_path / "again")
    assert again.exit_code == 0
    assert (tmp_path / "again" / "scheduler_config.json").read_text() == (tuned / "scheduler_config.json").read_text()
    other = invoke(*TUNE, "--seed", 1, "--output", tmp_path / "other")
    assert other.exit_code == 0
    assert (tmp_path / "other" / "scheduler_config.json").read_text() != (tuned / "scheduler_config.json").read_text()


def test_options_reach_the_scheduler(tmp_path: Path) -> None:
    result = invoke(*TUNE, "--option", "corrector=false", "--option", "solver_p=dpm++", "--output", tmp_path / "s")
    assert result.exit_code == 0, result.output
    assert DCSolverScheduler.from_pretrained(tmp_path / "s").config.solver_p == "dpm++"


def test_generate_takes_the_folder(tuned: Path, tmp_path: Path) -> None:
    call = ("generate", "--steps", 5, "--number", 3, "--guidance-scale", 1)
    result = invoke(*call, "--compare", f"unipc,{tuned}", "--output", tmp_path / "a")
    assert result.exit_code == 0, result.output
    assert (tmp_path / "a" / "unipc-5" / "00000.png").read_bytes() != (
        tmp_path / "a" / "sampler-5" / "00000.png"
    ).read_bytes()
    # The same without ratios is UniPC.
    plain = tmp_path / "plain"
    UniPCScheduler.from_config(DCSolverScheduler.from_pretrained(tuned).config).save_pretrained(plain)
    assert invoke(*call, "--sampler", plain, "--output", tmp_path / "b").exit_code == 0
    for k in range(3):
        name = f"0000{k}.png"
        assert (tmp_path / "b" / name).read_bytes() == (tmp_path / "a" / "unipc-5" / name).read_bytes()
    again = invoke("generate", "--record", tmp_path / "a" / "record.json", "--output", tmp_path / "c")
    assert again.exit_code == 0, again.output
    assert (tmp_path / "c" / "grid.png").read_bytes() == (tmp_path / "a" / "grid.png").read_bytes()


def test_generate_refuses_folders_that_do_not_fit(tuned: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    steps = ("generate", "--number", "1", "--output", output)
    assert_refused(invoke(*steps, "--sampler", tuned, "--steps", 6), "ratios", "6")
    (tmp_path / "empty").mkdir()
    assert_refused(invoke(*steps, "--sampler", tmp_path / "empty"), "empty", "scheduler_config.json")
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    (theirs / "scheduler_config.json").write_text(json.dumps({"_class_name": "DDIMScheduler"}))
    assert_refused(invoke(*steps, "--sampler", theirs), "theirs")
    other = tmp_path / "other"
    UniPCScheduler(prediction_type="epsilon").save_pretrained(other)
    assert_refused(invoke(*steps, "--sampler", other), "prediction_type", "differ")
    assert not output.exists()


def test_bad_input_is_one_line(tuned: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"

    def call(*changed: object) -> object:
        return invoke(*TUNE, "--output", output, *changed)

    assert_refused(call("--model", "digits-tiny"), "digits-tiny")
    assert_refused(call("--steps", 2), "steps", "2")
    assert_refused(call("--option", "order=3"), "order", "solver_order")
    assert_refused(call("--option", "ratios=[2,1,1,1,1]"), "ratios")
    assert_refused(call("--guidance-scale", 0.5), "guidance-scale")
    assert_refused(call("--output", tuned), "exists")
    assert_refused(call("--model", save_text_model(tmp_path / "text")), "DiTPipeline")
    assert_refused(call("--method", "s3"), "method", "dc")
    assert not output.exists()
