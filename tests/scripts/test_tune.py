"""``fewstep tune``, and saved schedulers as samplers of ``fewstep generate``."""

from __future__ import annotations

import importlib
import itertools
import json
from pathlib import Path

import pytest
from PIL import Image

from fewstep.samplers import DCSolverScheduler, LearnedScheduler, PlanScheduler, SearchedScheduler, UniPCScheduler
from fewstep.samplers.plan_numbers import FREE
from fewstep.scripts.commands.tune import tune
from model_folders import assert_refused, invoke, save_text_model

TUNE = ("tune", "--model", "digits-small", "--steps", "5", "--held-out", "20", "--noises", "6")


METHODS = {
    "dc": (*TUNE, "--refinement", "4"),
    "s3": (*TUNE, "--method", "s3", "--rounds", "1", "--polish", "60"),
    "learned": (*TUNE, "--method", "learned", "--noises", "16", "--iterations", "4"),
}
CLASSES = {"dc": DCSolverScheduler, "s3": SearchedScheduler, "learned": LearnedScheduler}


@pytest.fixture(scope="module", params=METHODS)
def fitted(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """Each method's folder."""
    folder = tmp_path_factory.mktemp(request.param) / "sampler"
    result = invoke(*METHODS[request.param], "--output", folder)
    assert result.exit_code == 0, (result.output, result.exception)
    assert "held out, 20 noises" in result.stdout
    use = f"fewstep generate --model digits-small --sampler {folder} --steps 5 --guidance-scale 1"
    assert result.stdout.splitlines()[-1] == f"written to {folder}; use it by: {use}"
    return request.param, folder


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tuned") / "sampler"
    assert invoke(*METHODS["dc"], "--output", folder).exit_code == 0
    return folder


def test_errors_shrink_on_noises_that_the_fit_never_saw(fitted: tuple[str, Path]) -> None:
    method, folder = fitted
    report = json.loads((folder / "tuning.json").read_text())
    assert report["method"] == method
    held_out = report["errors"]["held_out"]
    assert held_out["samples"] == 20
    for name in ("mean", "median", "root_mean_square"):
        figures = held_out[name]
        low, high = figures["change_interval"]
        assert low <= figures["change"] <= high
        assert figures["change"] == pytest.approx(figures["after"] / figures["before"] - 1)
    assert held_out["mean"]["after"] < (0.95 if method == "dc" else 0.75) * held_out["mean"]["before"]
    assert held_out["mean"]["change_interval"][1] < 0


def test_the_folder_is_a_scheduler(fitted: tuple[str, Path]) -> None:
    method, folder = fitted
    for cls in (CLASSES[method], PlanScheduler):
        scheduler = cls.from_pretrained(folder)
        assert type(scheduler) is CLASSES[method]
        assert scheduler.config.prediction_type == "v_prediction"
        scheduler.set_timesteps(5)
        assert len(scheduler.timesteps) == 5


def test_generate_takes_every_folder(fitted: tuple[str, Path], tmp_path: Path) -> None:
    _, folder = fitted
    call = ("generate", "--steps", 5, "--number", 2, "--guidance-scale", 1)
    assert invoke(*call, "--compare", f"unipc,{folder}", "--output", tmp_path).exit_code == 0
    names = [tmp_path / f"{sampler}-5" / "00000.png" for sampler in ("unipc", "sampler")]
    assert names[0].read_bytes() != names[1].read_bytes()


@pytest.mark.parametrize("method", ["s3", "learned"])
def test_a_tuning_that_was_stopped_goes_on(method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From what it had evaluated, to the same scheduler; and never with other settings."""
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert invoke(*METHODS[method], "--output", whole).exit_code == 0
    module = "fewstep.scripts.tuning." + {"s3": "searched", "learned": "learned"}[method]
    bar = importlib.import_module(module).tqdm
    shown = itertools.count()

    class Interrupted(bar):  # type: ignore[misc, valid-type]
        def set_postfix(self, *args: object, **values: object) -> None:
            if next(shown) == 3:
                raise KeyboardInterrupt

    monkeypatch.setattr(f"{module}.tqdm", Interrupted)
    assert invoke(*METHODS[method], "--output", cut).exit_code != 0
    assert not (cut / "tuning.json").exists()
    monkeypatch.undo()
    assert_refused(invoke(*METHODS[method], "--seed", 1, "--output", cut), "other settings", "seed")
    assert invoke(*METHODS[method], "--output", cut).exit_code == 0
    name = "scheduler_config.json"
    assert (cut / name).read_bytes() == (whole / name).read_bytes()
    found = [json.loads((folder / "tuning.json").read_text())["found"] for folder in (whole, cut)]
    assert found[0] == found[1]


def test_a_picture_of_the_loss(tmp_path: Path) -> None:
    picture = tmp_path / "loss.png"
    call = (*METHODS["learned"], "--iterations", 1)
    assert invoke(*call, "--output", tmp_path / "a", "--plot", picture).exit_code == 0
    with Image.open(picture) as image:
        assert image.size[0] > 300
    assert_refused(invoke(*METHODS["dc"], "--output", tmp_path / "b", "--plot", picture), "plot")
    assert_refused(invoke(*call, "--output", tmp_path / "b", "--plot", tmp_path / "loss.txt"), "plot", ".png")


def test_frechet_distances_can_be_searched_for(tmp_path: Path) -> None:
    call = ("tune", "--model", "digits-small", "--steps", 3, "--method", "s3", "--fitness", "frechet", "--rounds", 0)
    small = ("--polish", 0, "--images", 100, "--noises", 2, "--held-out", 2)
    assert invoke(*call, *small, "--output", tmp_path / "a").exit_code == 0
    report = json.loads((tmp_path / "a" / "tuning.json").read_text())
    assert 0.5 < report["found"]["best_known_solver"] < 500.0


def test_text_models_are_fitted_to_their_prompts(tmp_path: Path) -> None:
    """Any pipeline's denoiser serves; what is needed of it is asked for."""
    text = save_text_model(tmp_path / "text")
    call = ("tune", "--model", text, "--method", "learned", "--steps", 3, "--noises", 2, "--held-out", 2)
    output = tmp_path / "fitted"
    assert_refused(invoke(*call, "--output", output), "--prompt")
    more = ("--iterations", 1, "--guidance-scale", 3, "--prompt", "a fox", "--prompt", "a hare")
    assert_refused(invoke(*TUNE, "--prompt", "a fox", "--output", output), "--prompt", "leave it out")
    result = invoke(*call, *more, "--output", output)
    assert result.exit_code == 0, result.output
    assert result.stdout.endswith(" --guidance-scale 3 --prompt 'a fox' --prompt 'a hare'\n")
    assert PlanScheduler.from_pretrained(output).table.calls == 3


def test_a_search_is_repeated_by_its_seed(tuned: Path, tmp_path: Path) -> None:
    again = invoke(*METHODS["dc"], "--output", tmp_path / "again")
    assert again.exit_code == 0
    assert (tmp_path / "again" / "scheduler_config.json").read_text() == (tuned / "scheduler_config.json").read_text()
    other = invoke(*METHODS["dc"], "--seed", 1, "--output", tmp_path / "other")
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


def test_generate_tells_what_a_sampler_was_fitted_to(tuned: Path, tmp_path: Path) -> None:
    call = ("generate", "--sampler", tuned, "--steps", 5, "--number", 1)
    for k, (words, said) in enumerate(
        (
            (("--guidance-scale", 1), ""),
            (("--guidance-scale", 4), "not at 4\n"),
            (("--guidance-scale", 4, "--model", "digits-large"), "not digits-large at 4\n"),
        )
    ):
        result = invoke(*call, *words, "--output", tmp_path / str(k))
        assert result.exit_code == 0, result.output
        remark = f"sampler sampler was fitted to digits-small at guidance 1, {said}"
        assert (remark in result.stderr) if said else ("fitted" not in result.stderr)


@pytest.mark.parametrize(
    ("method", "words", "said"),
    [
        ("dc", ("--rounds", 8), "--rounds is for --method s3; leave it out or give --method s3"),
        ("learned", ("--fitness", "error"), "--fitness is for --method s3"),
        ("dc", ("--images", 100), "--images is for --method s3"),
        ("s3", ("--images", 100), "--images is for --fitness frechet"),
        ("learned", ("--polish", 0), "--polish is for --method s3"),
        ("s3", ("--free", "times"), "--free is for --method learned"),
        ("dc", ("--iterations", 1), "--iterations is for --method learned"),
        ("s3", ("--refinement", 1), "--refinement is for --method dc"),
    ],
)
def test_options_of_another_method_are_refused(
    method: str, words: tuple[object, ...], said: str, tmp_path: Path
) -> None:
    assert_refused(invoke(*TUNE, "--method", method, *words, "--output", tmp_path / "out"), said)
    assert not (tmp_path / "out").exists()


def test_all_that_can_be_fitted_is_by_default() -> None:
    (free,) = (option for option in tune.params if option.name == "free")
    assert free.default == ",".join(FREE)


def test_bad_input_is_one_line(tuned: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"

    def call(*changed: object) -> object:
        return invoke(*TUNE, "--output", output, *changed)

    assert_refused(call("--model", "digits-tiny"), "digits-tiny")
    assert_refused(call("--model", "digits-restore"), "--model digits-restore restores images", "digits-small")
    assert_refused(call("--steps", 2), "steps", "2")
    assert_refused(call("--option", "order=3"), "order", "solver_order")
    assert_refused(call("--option", "ratios=[2,1,1,1,1]"), "ratios")
    assert_refused(call("--guidance-scale", 0.5), "guidance-scale")
    assert_refused(call("--output", tuned), "finished")
    assert_refused(call("--method", "s4"), "method", "dc")
    assert_refused(call("--method", "learned", "--free", "time"), "free", "times")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    assert_refused(call("--output", tmp_path / "full"), "exists")
    assert not output.exists()
