"""Bad input of ``fewstep generate``: one line on stderr, exit code 2, and nothing is written."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fewstep.samplers import SAMPLERS
from fewstep.scripts.generation.model import Model, describe
from fewstep.scripts.generation.record import Cell, read_settings
from fewstep.scripts.generation.schedulers import build_scheduler
from model_folders import (
    assert_refused,
    invoke,
    pictures,
    save_class_model,
    save_text_model,
    save_unconditional_model,
)
from pipelines.tiny import CASES


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    save_class_model(folder / "class")
    save_text_model(folder / "text")
    save_unconditional_model(folder / "plain")
    save_class_model(folder / "broken")
    (folder / "broken" / "transformer" / "diffusion_pytorch_model.safetensors").write_bytes(b"nonsense")
    save_class_model(folder / "pickled")
    weights = folder / "pickled" / "vae" / "diffusion_pytorch_model.safetensors"
    torch.save({}, weights.with_suffix(".bin"))
    weights.unlink()
    (folder / "empty").mkdir()
    (folder / "file").write_text("a file")
    (folder / "bytes.txt").write_bytes(b"caf\xe9\n")
    (folder / "blank.txt").write_text("\n \n")
    return folder


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        # samplers
        (("--sampler", "dpm+"), ("sampler 'dpm+'", "(nearest first) dpm++,", *SAMPLERS)),
        (("--sampler", "dpmpp"), ("sampler 'dpmpp'", "(nearest first) dpm++,")),
        (("--sampler", "UniPCC"), ("sampler 'UniPCC'", "(nearest first) unipc,")),
        (("--compare", "deis,unicp"), ("sampler 'unicp'", "(nearest first) unipc,")),
        (("--compare", "deis,deis"), ("compare", "once")),
        (("--compare", ""), ("sampler ''",)),
        (("--compare", "deis,unipc", "--sampler", "deis"), ("sampler and compare",)),
        (("--preset", "acurate"), ("preset 'acurate'", "accurate")),
        # steps and counts
        (("--steps", "0"), ("steps 0 is less than 1",)),
        (("--steps", "-5"), ("steps -5 is less than 1",)),
        (("--steps", "ten"), ("steps 'ten'",)),
        (("--steps", "5,"), ("steps '5,'",)),
        (("--steps", "5,10"), ("steps 5,10", "--compare")),
        (("--steps", "5,5", "--compare", "deis"), ("steps", "once")),
        (("--steps", "1001"), ("dpm++ at 1001 steps", "1000 timesteps")),
        (("--number", "0"), ("number 0",)),
        (("--number", "1.5"), ("--number", "1.5")),
        (("--batch-size", "0"), ("batch-size 0",)),
        (("--seed", "-1"), ("seed -1", "4294967295")),
        (("--seed", "4294967295", "--number", "2"), ("seed 4294967295",)),
        # scheduler options
        (("--option", "use_karas_sigmas=true"), ("'use_karas_sigmas'", "(nearest first) use_karras_sigmas,")),
        (("--option", "solver_order"), ("'solver_order'", "key=value")),
        (("--option", "=3"), ("'=3'", "key=value")),
        (("--option", "solver_order=2", "--option", "solver_order=3"), ("'solver_order'", "twice")),
        (("--option", "solver_order=two"), ("solver_order='two'", "whole number")),
        (("--option", "solver_order=2.5"), ("solver_order=2.5", "whole number")),
        (("--option", "solver_order=true"), ("solver_order=True", "whole number")),
        (("--option", "solver_order=7"), ("solver_order 7",)),
        (("--option", "use_karras_sigmas=yes"), ("use_karras_sigmas='yes'", "true or false")),
        (("--option", "use_karras_sigmas=1"), ("use_karras_sigmas=1", "true or false")),
        (("--option", "flow_shift=far"), ("flow_shift='far'", "a number")),
        (("--option", "beta_schedule=null"), ("beta_schedule=None", "text")),
        (("--option", "rho=1e999"), ("'rho=1e999'", "finite")),
        (("--option", "rho=NaN"), ("'rho=NaN'", "finite")),
        (("--option", "sigma_min=low"), ("sigma_min='low'", "a number")),
        (("--option", "final_sigmas_type=one"), ("final_sigmas_type 'one'",)),
        (("--option", "preset=accurate"), ("'preset'",)),
        # conditions
        (("--classes", "5"), ("class 5 is out of range", "0 to 4")),
        (("--classes", "2-9"), ("class 9 is out of range", "0 to 4")),
        (("--classes", "3-1"), ("'3-1'", "write 1-3")),
        (("--classes", "1,,2"), ("class ''", "ant")),
        (("--classes", "-1"), ("class '-1'",)),
        (("--classes", "catt"), ("class 'catt'", "(nearest first) cat,")),
        (("--prompt", "a cat"), ("prompt does not apply", "--classes")),
        (("--negative-prompt", "a cat"), ("negative-prompt does not apply",)),
        (("--height", "8"), ("height does not apply",)),
        (("--width", "0"), ("width 0",)),
        (("--guidance-scale", "nan"), ("guidance-scale nan",)),
        (("--guidance-scale", "inf"), ("guidance-scale inf",)),
        (("--guidance-scale", "-1"), ("guidance-scale -1",)),
        (("--guidance-scale", "much"), ("--guidance-scale", "much")),
        # machine
        (("--dtype", "float15"), ("dtype 'float15'", "(nearest first) float16")),
        (("--device", "cdua"), ("device 'cdua'", "cuda")),
        (("--device", "cpu:1"), ("device 'cpu:1'",)),
        (("--device", "cuda:99"), ("device 'cuda:99' is not available",)),
        # options
        (("--stpes", "5"), ("--stpes", "--steps")),
        (("five",), ("five",)),
    ],
)
def test_bad_words(models: Path, tmp_path: Path, arguments: tuple[str, ...], said: tuple[str, ...]) -> None:
    out = tmp_path / "out"
    assert_refused(invoke("generate", "--model", models / "class", "--output", out, *arguments), *said)
    assert not out.exists()


@pytest.mark.parametrize(
    ("model", "arguments", "said"),
    [
        ("nowhere", (), ("nowhere", "neither a folder, nor a hub id, nor bundled (digits-small, digits-large, ")),
        ("empty", (), ("empty", "model_index.json")),
        ("file", (), ("is a file",)),
        ("broken", (), ("broken", "cannot be loaded")),
        ("pickled", (), ("pickled", "cannot be loaded")),
        ("text", (), ("needs a prompt",)),
        ("text", ("--prompt", "x", "--classes", "1"), ("classes do not apply",)),
        ("text", ("--prompt", "bad \udce9"), ("prompts", "UTF-8")),
        ("text", ("--prompts", "{models}/missing.txt"), ("missing.txt", "cannot be read")),
        ("text", ("--prompts", "{models}/bytes.txt"), ("bytes.txt", "cannot be read")),
        ("text", ("--prompts", "{models}/blank.txt"), ("blank.txt", "no prompt")),
        ("text", ("--prompts", "{models}"), ("cannot be read",)),
        ("plain", ("--prompt", "x"), ("neither prompts nor classes",)),
        ("plain", ("--classes", "1"), ("classes do not apply",)),
        ("plain", ("--guidance-scale", "2"), ("guidance-scale does not apply",)),
    ],
)
def test_bad_models(
    models: Path, tmp_path: Path, model: str, arguments: tuple[str, ...], said: tuple[str, ...]
) -> None:
    out = tmp_path / "out"
    words = [word.replace("{models}", str(models)) for word in arguments]
    assert_refused(invoke("generate", "--model", models / model, *words, "--steps", 2, "--output", out), *said)
    assert not out.exists()


def test_unreachable_hub_model(tmp_path: Path) -> None:
    """In an interpreter of its own: the hub's library reads its settings when it is imported."""
    result = subprocess.run(
        [
            *(sys.executable, "-c", "from fewstep.scripts.cli import main; main()", "generate"),
            *("--model", "nobody/nothing-of-this-name", "--output", str(tmp_path / "out")),
        ],
        env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hub")},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (result.returncode, result.stdout) == (2, "")
    (line,) = result.stderr.splitlines()
    assert line.startswith("Error: model 'nobody/nothing-of-this-name' cannot be loaded: ")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("case", "said"),
    [("sd-img2img", "takes image"), ("sd-inpaint", "takes image, mask_image"), ("wan", "makes videos")],
)
def test_pipelines_of_other_kinds(case: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        describe("other", CASES[case].build())


# ---------------------------------------------------------------- folders and records


def test_folder_of_another_run(models: Path, tmp_path: Path) -> None:
    common = ("generate", "--model", models / "class", "--number", 2, "--output", tmp_path)
    assert invoke(*common, "--steps", 2).exit_code == 0
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    assert_refused(invoke(*common, "--steps", 3, "--seed", 1), "another run", "steps, seed", "another folder")
    assert_refused(invoke(*common, "--steps", 2, "--compare", "dpm++"), "another run", "compare")
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_folder_with_images_of_somebody(models: Path, tmp_path: Path) -> None:
    (tmp_path / "grid.png").write_bytes(b"mine")
    result = invoke("generate", "--model", models / "class", "--steps", 2, "--output", tmp_path)
    assert_refused(result, "images but no record.json")
    assert [file.name for file in tmp_path.iterdir()] == ["grid.png"]


def test_folder_that_cannot_be_made(models: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("a file")
    for out, said in ((tmp_path / "file", "is a file"), (tmp_path / "file" / "out", "not a writable folder")):
        assert_refused(invoke("generate", "--model", models / "class", "--steps", 2, "--output", out), said)


def test_folder_without_permission(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Root may write everywhere, so the system's answer is replaced."""
    monkeypatch.setattr(os, "access", lambda *_: False)
    result = invoke("generate", "--model", models / "class", "--output", tmp_path / "out")
    assert_refused(result, "not a writable folder")


def test_full_disk(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was written before is whole, nothing else is there, and the run can go on."""
    replace = os.replace

    def limited(source: Path, target: Path) -> None:
        if target.name == "00001.png":
            raise OSError(28, "No space left on device")
        replace(source, target)

    common = ("generate", "--model", models / "class", "--number", 3, "--steps", 2, "--output")
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", limited)
        result = invoke(*common, tmp_path / "full")
    assert result.exit_code == 2
    assert result.stderr.splitlines()[-1].endswith("00001.png cannot be written: No space left on device")
    assert sorted(file.name for file in (tmp_path / "full").iterdir()) == ["00000.png", "record.json"]
    for folder in ("full", "other"):
        assert invoke(*common, tmp_path / folder).exit_code == 0
    assert pictures(tmp_path / "full") == pictures(tmp_path / "other")


def _edited(record: Path, **changes: object) -> None:
    content = json.loads(record.read_text())
    content["run"].update(changes)
    record.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"steps": 5}, "steps has the unusable value 5"),
        ({"steps": ["5"]}, "steps has the unusable value"),
        ({"number": True}, "number has the unusable value True"),
        ({"steps": [0]}, "steps 0 is less than 1"),
        ({"samplers": ["none"]}, "sampler 'none'"),
        ({"colour": "red"}, "unknown in 'run': colour"),
        ({"classes": [0, 7]}, "class 7 is out of range"),
        ({"model": "/nowhere/at/all"}, "'/nowhere/at/all' is neither"),
        ({"device": "cuda:99"}, "device 'cuda:99' is not available"),
    ],
)
def test_bad_records(models: Path, tmp_path: Path, changes: dict[str, object], said: str) -> None:
    assert invoke("generate", "--model", models / "class", "--steps", 2, "--output", tmp_path / "a").exit_code == 0
    record = tmp_path / "a" / "record.json"
    _edited(record, **changes)
    assert_refused(invoke("generate", "--record", record, "--output", tmp_path / "b"), said)
    assert not (tmp_path / "b").exists()


def test_records_that_are_none(models: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    (tmp_path / "list.json").write_text("[1, 2]")
    (tmp_path / "future.json").write_text('{"format": 99, "run": {}, "versions": {}}')
    for name, said in (
        ("missing.json", "cannot be read"),
        ("list.json", "was not written by fewstep generate"),
        ("future.json", "format 99"),
    ):
        assert_refused(invoke("generate", "--record", tmp_path / name, "--output", out), name, said)
    assert_refused(
        invoke("generate", "--record", tmp_path / "list.json", "--steps", 5, "--seed", 1, "--output", out),
        "record fixes the run: leave out --steps, --seed",
    )
    assert not out.exists()


def test_record_may_move_to_another_device(models: Path, tmp_path: Path) -> None:
    first = tmp_path / "a"
    assert invoke("generate", "--model", models / "class", "--steps", 2, "--output", first).exit_code == 0
    _edited(first / "record.json", device="cuda:99")
    result = invoke("generate", "--record", first / "record.json", "--device", "cpu", "--output", tmp_path / "b")
    assert result.exit_code == 0, result.output
    assert pictures(tmp_path / "b") == pictures(first)
    assert read_settings(tmp_path / "b" / "record.json").device == "cpu"


def test_dynamic_shift_waits_for_the_pipeline(models: Path, tmp_path: Path) -> None:
    """The shift of Flux depends on the size, so that its scheduler can only be built here, not tried."""
    assert invoke("generate", "--model", models / "class", "--steps", 2, "--output", tmp_path).exit_code == 0
    settings = read_settings(tmp_path / "record.json")
    pipeline = CASES["flux-dynamic"].build()
    model = Model("flux", pipeline, "text", {}, pipeline.scheduler.config, (), {})
    scheduler = build_scheduler(settings, model, Cell("unipc", 4, "."))
    scheduler.set_timesteps(4, mu=0.7)
    assert len(scheduler.timesteps) == 4
