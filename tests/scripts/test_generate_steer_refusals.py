"""Bad input of ``fewstep generate --steer``: one line on stderr, exit code 2, and nothing is made or written."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
from diffusers import DiTTransformer2DModel

from fewstep.scripts.generation.steering import METHODS
from model_folders import assert_refused, invoke, pictures, save_class_model, save_unconditional_model

EIGHT = ("--reward", "class:8")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    save_class_model(folder / "class")
    save_unconditional_model(folder / "plain")
    return folder


def option(*words: str) -> tuple[str, ...]:
    return tuple(part for word in words for part in ("--steer-option", word))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        # methods
        (("--steer", "sdvv", *EIGHT), ("steer 'sdvv'", "(nearest first) svdd,", *METHODS)),
        (("--steer", "dts*", *EIGHT), ("steer 'dts*'", "(nearest first) dts")),
        (("--steer", ""), ("steer ''",)),
        (EIGHT, ("reward is for steered runs", "--steer", "svdd")),
        (("--particles", "4"), ("particles is for steered runs",)),
        (option("scale=1"), ("steer-option is for steered runs",)),
        # particles
        (("--steer", "svdd", *EIGHT, "--particles", "0"), ("particles 0 is less than 1",)),
        (("--steer", "svdd", *EIGHT, "--particles", "2.5"), ("--particles", "2.5")),
        (("--steer", "minority", "--particles", "4"), ("particles 4 does not apply", "minority")),
        (("--steer", "paths", *EIGHT, "--particles", "3"), ("candidates 3", "multiple of paths 2")),
        # rewards
        (("--steer", "svdd"), ("steer svdd needs a reward", "class:8", "brightness")),
        (("--steer", "dts-star"), ("steer dts-star needs a reward",)),
        (("--steer", "fk", "--reward", "clas:8"), ("reward 'clas'", "(nearest first) class,")),
        (("--steer", "fk", "--reward", ""), ("reward ''",)),
        (("--steer", "fk", "--reward", "class"), ("reward 'class'", "class:0+2+4")),
        (("--steer", "fk", "--reward", "class:eight"), ("reward 'class:eight'", "digits from 0 to 9")),
        (("--steer", "fk", "--reward", "class:10"), ("reward 'class:10'", "digits from 0 to 9")),
        (("--steer", "fk", "--reward", "class:1+"), ("reward 'class:1+'",)),
        (("--steer", "fk", "--reward", "class@x:1"), ("takes no model",)),
        (("--steer", "fk", "--reward", "clip:"), ("reward 'clip:' has no text", "clip:TEXT")),
        (("--steer", "fk", "--reward", "compressibility"), ("names no format", "compressibility:png")),
        (("--steer", "fk", "--reward", "compressibility:gif"), ("names no format",)),
        (("--steer", "fk", "--reward", "brightness:2"), ("takes no text",)),
        (("--steer", "fk", "--reward", "1e999*brightness"), ("'1e999*brightness'", "no finite number")),
        (("--steer", "fk", "--reward", "1.2.3*brightness"), ("no finite number",)),
        # options
        (("--steer", "fk", *EIGHT, *option("temprature=1")), ("steer-option of fk 'temprature'", "threshold")),
        (("--steer", "svdd", *EIGHT, *option("temprature=1")), ("'temprature'", "(nearest first) temperature,")),
        (("--steer", "svdd", *EIGHT, *option("rounds=2")), ("steer-option of svdd 'rounds'",)),
        (("--steer", "svdd", *EIGHT, *option("temperature")), ("'temperature'", "key=value")),
        (("--steer", "svdd", *EIGHT, *option("temperature=1", "temperature=2")), ("'temperature'", "twice")),
        (("--steer", "svdd", *EIGHT, *option("temperature=cold")), ("temperature='cold'", "a number")),
        (("--steer", "svdd", *EIGHT, *option("temperature=true")), ("temperature=True", "a number")),
        (("--steer", "svdd", *EIGHT, *option("temperature=-1")), ("temperature -1",)),
        (("--steer", "svdd", *EIGHT, *option("temperature=null")), ("temperature=None", "a number")),
        (("--steer", "svdd", *EIGHT, *option("start=inf")), ("start='inf'", "a number")),
        (("--steer", "svdd", *EIGHT, *option("start=0.5", "stop=0.2")), ("start 0.5", "stop 0.2")),
        (("--steer", "fk", *EIGHT, *option("scale=-1")), ("scale -1", "negate the reward")),
        (("--steer", "fk", *EIGHT, *option("potential=min")), ("potential 'min'", "difference")),
        (("--steer", "fk", *EIGHT, *option("resampling=any")), ("resampling 'any'", "systematic")),
        (("--steer", "fk", *EIGHT, *option("threshold=2")), ("threshold 2",)),
        (("--steer", "fk", *EIGHT, *option("every=1.5")), ("every=1.5", "whole number")),
        (("--steer", "fk", *EIGHT, *option("every=0")), ("every 0",)),
        (("--steer", "fk", *EIGHT, *option("pick=first")), ("steer-option pick 'first'", "draw")),
        (("--steer", "reward-gradient", *EIGHT, *option("gradient_scale=-1")), ("gradient_scale -1",)),
        (("--steer", "fkc", *EIGHT, *option("exponent=0")), ("exponents [0.0]", "above 0")),
        (("--steer", "fkc", *EIGHT, *option("churn=-2")), ("churn -2",)),
        (("--steer", "fkc", "--classes", "none"), ("fkc has nothing to do", "--guidance-scale")),
        (("--steer", "fkc", *option("exponent=1.1", "pick=best")), ("pick='best'", "--reward")),
        (("--steer", "best-of-n", *EIGHT, *option("rounds=0")), ("rounds=0", "at least 1")),
        (("--steer", "best-of-n", *EIGHT, *option("combine=ranks")), ("combine='ranks'", "several rewards")),
        (("--steer", "paths", *EIGHT, *option("combine=mean")), ("steer-option combine 'mean'", "ranks")),
        (("--steer", "zero-order", *EIGHT, *option("similarity=1")), ("similarity 1",)),
        (("--steer", "paths", *EIGHT, *option("forward=2")), ("forward 2", "backward 2")),
        (("--steer", "dts", *EIGHT, *option("selection=best")), ("selection 'best'", "boltzmann")),
        (("--steer", "dts", *EIGHT, *option("widening=2")), ("widening=2", "[FACTOR, EXPONENT]")),
        (("--steer", "dts", *EIGHT, *option("widening=[2,0.8,1]")), ("widening=[2, 0.8, 1]", "two numbers")),
        (("--steer", "dts", *EIGHT, *option("widening=[2,8]")), ("widening (2, 8)",)),
        (("--steer", "dts", *EIGHT, *option("branching=9")), ("branching 9", "1 to 4")),
        (("--steer", "dts", *EIGHT, *option("scale=inf")), ("scale inf",)),
        (("--steer", "dts", *EIGHT, *option("calls=3")), ("calls=3", "one whole run takes, 4")),
        (("--steer", "dts-star", *EIGHT, *option("calls=-3")), ("calls=-3", "at least 1")),
        (("--steer", "dts-star", *EIGHT, *option("parallel=0")), ("parallel 0",)),
        (("--steer", "dts-star", *EIGHT, *option("exploration=-1")), ("exploration -1",)),
        (("--steer", "minority", *option("target=10")), ("target=10", "0 to 9")),
        (("--steer", "minority", *option("scale=-1")), ("scale -1",)),
        (("--steer", "minority", *option("classifier=nowhere")), ("nowhere", "no classifier")),
        (("--steer", "self-minority", *option("timestep=5000")), ("timestep 5000",)),
        (("--steer", "self-minority", *option("distance=lpips")), ("steer-option distance 'lpips'", "squared")),
        # samplers
        (("--steer", "svdd", *EIGHT, "--sampler", "dpm++"), ("svdd needs a sampler that draws noise", "sde-dpm++")),
        (("--steer", "fk", *EIGHT, "--sampler", "unipc"), ("fk needs a sampler that draws noise",)),
        (("--steer", "dts", *EIGHT, "--sampler", "deis"), ("dts needs a sampler that draws noise",)),
        (("--steer", "svdd", *EIGHT, "--steps", "1"), ("draws none in 1 steps", "2 steps or more")),
        (("--steer", "zero-order", *EIGHT, "--sampler", "sde-dpm++"), ("zero-order", "draws no noise of its own")),
        (("--steer", "paths", *EIGHT, "--sampler", "deis-heun"), ("calls a step",)),
        (("--steer", "fkc", *EIGHT, "--sampler", "sde-dpm++"), ("sampler does not apply", "fkc")),
        (("--steer", "fkc", *EIGHT, "--option", "solver_type=midpoint"), ("option of the sampler of fkc",)),
        (("--steer", "fkc", *EIGHT, "--option", "use_karras_sigmas=1"), ("use_karras_sigmas=1", "true or false")),
        (("--steer", "svdd", *EIGHT, "--sampler", "feynman-kac"), ("sampler feynman-kac is not for steer svdd",)),
        (("--sampler", "feynman-kac"), ("sampler 'feynman-kac' is not known",)),
        # what does not go together
        (("--steer", "svdd", *EIGHT, "--compare", "sde-dpm++,sde-dpm"), ("steer and compare exclude each other",)),
        (("--steer", "fkc", *EIGHT, "--compare", "dpm++"), ("sampler does not apply",)),
        (("--steer", "svdd", *EIGHT, "--stitch", "digits-large:0.4"), ("steer and stitch exclude each other",)),
        # plots
        (("--plot", "reward.png"), ("plot draws the rewards of a steered run",)),
        (("--steer", "minority", *EIGHT, "--plot", "reward.png"), ("plot draws the rewards",)),
        (("--steer", "fkc", *option("exponent=2"), "--plot", "reward.png"), ("plot draws the rewards", "--reward")),
        (("--steer", "svdd", *EIGHT, "--plot", "reward.gif"), ("reward.gif", ".png, .svg, .pdf")),
        (("--steer", "svdd", *EIGHT, "--plot", "/no/such/folder/r.png"), ("r.png", "no folder")),
    ],
)
def test_bad_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], said: tuple[str, ...]
) -> None:
    def never(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("the network was called")

    monkeypatch.setattr(DiTTransformer2DModel, "forward", never)
    steps = () if "--steps" in arguments else ("--steps", 4)
    assert_refused(invoke("generate", "--output", tmp_path / "out", *steps, *arguments), *said)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("model", "arguments", "said"),
    [
        ("class", EIGHT, ("reward class:8", "digits-small and digits-large")),
        ("plain", EIGHT, ("reward class:8",)),
        ("class", ("--steer", "minority"), ("minority needs a classifier", "classifier=FOLDER", "self-minority")),
        ("plain", ("--classes", "none", "--reward", "brightness"), ("classes do not apply",)),
    ],
)
def test_bad_models(
    models: Path, tmp_path: Path, model: str, arguments: tuple[str, ...], said: tuple[str, ...]
) -> None:
    steer = () if "--steer" in arguments else ("--steer", "svdd")
    result = invoke("generate", "--model", models / model, *steer, *arguments, "--output", tmp_path / "out")
    assert_refused(result, *said)
    assert not (tmp_path / "out").exists()


def test_restoration_is_not_steered(tmp_path: Path) -> None:
    result = invoke(
        "generate", "--model", "digits-restore", "--steer", "svdd", "--reward", "brightness", "--output", tmp_path / "o"
    )
    assert_refused(result, "steer does not apply", "residuals")


def test_reward_without_gradient(tmp_path: Path) -> None:
    result = invoke(
        "generate", "--steer", "reward-gradient", "--reward", "compressibility:png", "--steps", 3, "--number", 1,
        "--output", tmp_path / "out",
    )  # fmt: skip
    assert result.exit_code == 2
    assert "'compressibility:png' has no gradient" in result.stderr.splitlines()[-1]
    assert not (tmp_path / "out").exists()


def test_plot_without_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "matplotlib" else find(name))
    result = invoke("generate", "--steer", "svdd", *EIGHT, "--plot", tmp_path / "r.png", "--output", tmp_path / "out")
    assert_refused(result, "plot needs matplotlib", "fewstep[plot]")
    assert list(tmp_path.iterdir()) == []


def test_folder_of_another_run(tmp_path: Path) -> None:
    common = ("generate", "--steps", 2, "--number", 1, "--classes", 3, "--guidance-scale", 1, "--output", tmp_path)
    steered = ("--steer", "svdd", "--particles", 2)
    assert invoke(*common, *steered, "--reward", "brightness").exit_code == 0
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    for other in (
        ("--sampler", "sde-dpm++"),
        (*steered, "--reward", "class:3"),
        (*steered, "--reward", "brightness", "--steer-option", "temperature=0"),
    ):
        assert_refused(invoke(*common, *other), "another run (different steering)", "another folder")
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_record_fixes_steering(tmp_path: Path) -> None:
    out = tmp_path / "out"
    steer = ("--steer", "svdd", "--reward", "brightness", "--particles", 2)
    assert invoke("generate", "--steps", 2, "--number", 1, *steer, "--output", out).exit_code == 0
    record = out / "record.json"
    assert_refused(
        invoke("generate", "--record", record, *steer, "--output", tmp_path / "other"),
        "record fixes the run: leave out", "--steer", "--reward", "--particles",
    )  # fmt: skip
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"method": "svd"}, "steer 'svd' is not known"),
        ({"method": 3}, "steering has the unusable value"),
        ({"rewards": [8]}, "steering has the unusable value"),
        ({"rewards": ["class:x"]}, "reward 'class:x'"),
        ({"rewards": []}, "needs a reward"),
        ({"particles": 0}, "particles 0 is less than 1"),
        ({"particles": True}, "steering has the unusable value"),
        ({"options": {"temperature": 0.1}}, "lacks the options start, stop"),
        ({"options": {"temperature": 0.1, "start": 0.0, "stop": 1.0, "colour": 1}}, "'colour'"),
        ({"colour": "red"}, "steering has the unusable value"),
    ],
)
def test_bad_records(tmp_path: Path, changes: dict[str, object], said: str) -> None:
    steering = {"method": "svdd", "rewards": ["brightness"], "particles": 2}
    options = {"temperature": 0.1, "start": 0.0, "stop": 1.0}
    run = {
        "model": "digits-small", "samplers": ["sde-dpm++"], "steps": [2], "compare": False, "options": {},
        "preset": None, "number": 1, "seed": 0, "prompts": [], "negative_prompt": None, "classes": [1],
        "guidance_scale": 1.0, "height": None, "width": None, "dtype": "float32", "device": "cpu", "stitch": None,
        "inputs": {}, "steering": {**steering, "options": options},
    }  # fmt: skip
    path = tmp_path / "record.json"
    path.write_text(json.dumps({"format": 1, "run": run, "versions": {}}))
    good = invoke("generate", "--record", path, "--output", tmp_path / "good")
    assert good.exit_code == 0, good.output
    assert len(pictures(tmp_path / "good")) == 2
    path.write_text(
        json.dumps({"format": 1, "run": {**run, "steering": {**run["steering"], **changes}}, "versions": {}})
    )
    assert_refused(invoke("generate", "--record", path, "--output", tmp_path / "bad"), said)
    assert not (tmp_path / "bad").exists()


def test_damaged_account(tmp_path: Path) -> None:
    common = (
        "generate",
        "--steps",
        2,
        "--number",
        1,
        "--steer",
        "svdd",
        "--particles",
        2,
        *EIGHT,
        "--output",
        tmp_path,
    )
    assert invoke(*common).exit_code == 0
    (tmp_path / "00000.json").write_text("[]")
    assert_refused(invoke(*common), "00000.json is damaged", "delete it")
    (tmp_path / "00000.json").unlink()
    assert invoke(*common).exit_code == 0
    assert json.loads((tmp_path / "00000.json").read_text())["network_calls"] == 4
