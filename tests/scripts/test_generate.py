"""``fewstep generate``: its images are the pipeline's own, whatever the batch, the interruption or the repetition."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image

from fewstep.metrics import DigitsClassifier
from fewstep.samplers import SAMPLERS
from model_folders import (
    assert_refused,
    invoke,
    pictures,
    save_class_model,
    save_text_model,
    save_unconditional_model,
)


@pytest.fixture(scope="module")
def class_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_class_model(tmp_path_factory.mktemp("class"))


@pytest.fixture(scope="module")
def text_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_text_model(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="module")
def unconditional_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_unconditional_model(tmp_path_factory.mktemp("unconditional"))


def generate(*arguments: object) -> str:
    result = invoke("generate", *arguments)
    assert result.exit_code == 0, (result.output, result.exception)
    return result.stdout


def drawn(
    model: Path, sampler: str, steps: int, seed: int, dtype: torch.dtype = torch.float32, **call: Any
) -> Image.Image:
    """One image, made by a user's own lines of diffusers."""
    options = call.pop("options", {})
    pipe = DiffusionPipeline.from_pretrained(model, dtype=dtype)
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = SAMPLERS[sampler].build(pipe.scheduler.config, **options).manual_seed([seed])
    generator = [torch.Generator().manual_seed(seed)]
    image: Image.Image = pipe(num_inference_steps=steps, generator=generator, **call).images[0]
    return image


def assert_same(file: Path, image: Image.Image) -> None:
    with Image.open(file) as found:
        np.testing.assert_array_equal(np.asarray(found), np.asarray(image))


# ---------------------------------------------------------------- what is drawn


def test_every_sampler_by_name(class_model: Path, tmp_path: Path) -> None:
    names = ",".join(SAMPLERS)
    generate(
        "--model", class_model, "--compare", names, "--steps", "3,4", "--number", 1, "--seed", 5, "--output", tmp_path
    )
    for sampler in SAMPLERS:
        for steps in (3, 4):
            image = drawn(class_model, sampler, steps, 5, class_labels=[0])
            assert_same(tmp_path / f"{sampler}-{steps}" / "00000.png", image)
    assert len({file.read_bytes() for file in tmp_path.glob("*-3/00000.png")}) > len(SAMPLERS) / 2


def test_classes_go_round_and_seeds_count_up(class_model: Path, tmp_path: Path) -> None:
    told = generate(
        "--model", class_model, "--classes", "3,bee,0-1", "--number", 5, "--seed", 5, "--steps", 3,
        "--guidance-scale", 2, "--sampler", "unipc", "--output", tmp_path,
    )  # fmt: skip
    assert told == f"5 images in {tmp_path}\n"
    for i, label in enumerate([3, 1, 0, 1, 3]):
        image = drawn(class_model, "unipc", 3, 5 + i, class_labels=[label], guidance_scale=2.0)
        assert_same(tmp_path / f"{i:05d}.png", image)
    images = json.loads((tmp_path / "record.json").read_text())["images"]
    assert [(entry["seed"], entry["class"]) for entry in images] == [(5, 3), (6, 1), (7, 0), (8, 1), (9, 3)]


def test_all_classes_in_turn_by_default(class_model: Path, tmp_path: Path) -> None:
    generate("--model", class_model, "--steps", 1, "--output", tmp_path)
    images = json.loads((tmp_path / "record.json").read_text())["images"]
    assert [entry["class"] for entry in images] == [0, 1, 2, 3, 4]


def test_names_of_classes_go_before_numbers(tmp_path: Path) -> None:
    """A data set whose folders are called 2 and 10 sorts them so that 10 has the label 0."""
    model = save_class_model(tmp_path / "model")
    index = json.loads((model / "model_index.json").read_text())
    (model / "model_index.json").write_text(json.dumps({**index, "id2label": {"0": "10", "1": "2"}}))
    generate("--model", model, "--classes", "2,10,0-1", "--steps", 1, "--output", tmp_path / "out")
    images = json.loads((tmp_path / "out" / "record.json").read_text())["images"]
    assert [entry["class"] for entry in images] == [1, 0, 0, 1]


def test_text_to_image(text_model: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red house\n\n  grüne Äpfel, 青い空 \n", encoding="utf-8")
    generate(
        "--model", text_model, "--prompt", "one cat", "--prompts", prompts, "--negative-prompt", "blue", "--number", 4,
        "--steps", 3, "--height", 16, "--width", 8, "--guidance-scale", 3, "--output", tmp_path / "out",
    )  # fmt: skip
    asked = ["one cat", "a red house", "grüne Äpfel, 青い空", "one cat"]
    for i, prompt in enumerate(asked):
        image = drawn(
            text_model, "dpm++", 3, i, prompt=prompt, negative_prompt="blue", height=16, width=8, guidance_scale=3.0
        )
        assert image.size == (8, 16)
        assert_same(tmp_path / "out" / f"{i:05d}.png", image)
    record = json.loads((tmp_path / "out" / "record.json").read_text(encoding="utf-8"))
    assert [entry["prompt"] for entry in record["images"]] == asked


@pytest.mark.parametrize("pipeline", ["DDPMPipeline", "DDIMPipeline"])
def test_unconditional(unconditional_model: Path, tmp_path: Path, pipeline: str) -> None:
    model = save_unconditional_model(tmp_path / "model", pipeline)
    generate("--model", model, "--number", 2, "--steps", 3, "--sampler", "deis", "--output", tmp_path / "out")
    for i in range(2):
        assert_same(tmp_path / "out" / f"{i:05d}.png", drawn(unconditional_model, "deis", 3, i))


def test_scheduler_options(class_model: Path, tmp_path: Path) -> None:
    common = ("--model", class_model, "--classes", 2, "--steps", 4)
    given = ("solver_order=3", "use_karras_sigmas=true", "final_sigmas_type=sigma_min")
    generate(*common, *(word for option in given for word in ("--option", option)), "--output", tmp_path / "with")
    generate(*common, "--output", tmp_path / "without")
    options = {"solver_order": 3, "use_karras_sigmas": True, "final_sigmas_type": "sigma_min"}
    expected = drawn(class_model, "dpm++", 4, 0, class_labels=[2], options=options)
    assert_same(tmp_path / "with" / "00000.png", expected)
    assert pictures(tmp_path / "with") != pictures(tmp_path / "without")
    (cell,) = json.loads((tmp_path / "with" / "record.json").read_text())["cells"]
    assert cell["scheduler"].items() >= options.items()


@pytest.mark.parametrize("sampler", ["dpm++", "deis", "unipc"])
def test_accurate_preset(class_model: Path, tmp_path: Path, sampler: str) -> None:
    generate(
        "--model", class_model, "--sampler", sampler, "--preset", "accurate", "--steps", 6, "--guidance-scale", 1,
        "--number", 1, "--output", tmp_path / "out",
    )  # fmt: skip
    options = {"preset": "accurate", "guidance_scale": 1.0}
    image = drawn(class_model, sampler, 6, 0, class_labels=[0], guidance_scale=1.0, options=options)
    assert_same(tmp_path / "out" / "00000.png", image)
    result = invoke(
        "generate", "--model", class_model, "--sampler", sampler, "--preset", "accurate",
        "--option", "use_karras_sigmas=true", "--output", tmp_path / "both",
    )  # fmt: skip
    assert_refused(result, "preset", "use_karras_sigmas")


@pytest.mark.parametrize("sampler", ["dpm++3m", "deis-rk4", "unipc4"])
def test_preset_does_not_overrule_a_name(class_model: Path, tmp_path: Path, sampler: str) -> None:
    result = invoke(
        "generate", "--model", class_model, "--sampler", sampler, "--preset", "accurate", "--output", tmp_path / "out"
    )
    assert_refused(result, f"sampler {sampler}", "preset accurate decides solver_")


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision(class_model: Path, tmp_path: Path, dtype: str) -> None:
    generate("--model", class_model, "--dtype", dtype, "--classes", 1, "--steps", 2, "--output", tmp_path)
    image = drawn(class_model, "dpm++", 2, 0, dtype=getattr(torch, dtype), class_labels=[1])
    assert_same(tmp_path / "00000.png", image)


def test_bundled_model_draws_the_digits_that_are_asked_for(tmp_path: Path) -> None:
    told = generate("--steps", 5, "--output", tmp_path)
    assert told == f"10 images in {tmp_path}\n"
    images = [np.asarray(Image.open(tmp_path / f"{i:05d}.png").convert("L")) for i in range(10)]
    batch = torch.from_numpy(np.stack(images)).float()[:, None] / 127.5 - 1.0
    with torch.no_grad():
        assert DigitsClassifier.bundled()(batch).argmax(1).tolist() == list(range(10))


@pytest.mark.parametrize("model", ["digits-small", "digits-large"])
def test_bundled_models_know_ten_classes(tmp_path: Path, model: str) -> None:
    result = invoke("generate", "--model", model, "--classes", "9,10", "--output", tmp_path / "out")
    assert_refused(result, "class 10 is out of range", "0 to 9")


# ---------------------------------------------------------------- the same bytes again


@pytest.mark.parametrize("sampler", ["dpm++", "sde-dpm++"])
def test_batch_size_changes_no_byte(class_model: Path, tmp_path: Path, sampler: str) -> None:
    common = ("--model", class_model, "--sampler", sampler, "--steps", 4, "--number", 9)
    generate(*common, "--batch-size", 1, "--output", tmp_path / "one")
    generate(*common, "--batch-size", 7, "--output", tmp_path / "seven")
    assert len(pictures(tmp_path / "one")) == 10
    assert pictures(tmp_path / "one") == pictures(tmp_path / "seven")


@pytest.mark.parametrize("kind", ["text", "unconditional"])
def test_batch_size_changes_no_byte_of_other_models(request: Any, tmp_path: Path, kind: str) -> None:
    model = request.getfixturevalue(f"{kind}_model")
    prompt = ("--prompt", "cat", "--prompt", "dog") if kind == "text" else ()
    common = ("--model", model, *prompt, "--sampler", "sde-dpm++", "--steps", 2, "--number", 8)
    generate(*common, "--batch-size", 1, "--output", tmp_path / "one")
    generate(*common, "--batch-size", 7, "--output", tmp_path / "seven")
    assert pictures(tmp_path / "one") == pictures(tmp_path / "seven")


def test_images_of_one_call_agree_with_images_alone(class_model: Path) -> None:
    """What other devices do with a batch, on the CPU: equal up to rounding, noise of SDE solvers included."""
    from fewstep.scripts.generation import model as models
    from fewstep.scripts.generation.record import Cell, Settings
    from fewstep.scripts.generation.run import call_pipeline
    from fewstep.scripts.generation.schedulers import build_scheduler

    model = models.load_model(str(class_model), "float32", "cpu")
    settings = Settings(
        model=str(class_model), samplers=("sde-dpm++",), steps=(4,), compare=False, options={}, preset=None, number=3,
        seed=0, prompts=(), negative_prompt=None, classes=(0, 1, 2), guidance_scale=3.0, height=None, width=None,
        dtype="float32", device="cpu",
    )  # fmt: skip
    scheduler = build_scheduler(settings, model, Cell("sde-dpm++", 4, "."))
    together = call_pipeline(settings, model, scheduler, 4, range(3))
    for i in range(3):
        (alone,) = call_pipeline(settings, model, scheduler, 4, [i])
        difference = np.asarray(together[i]).astype(int) - np.asarray(alone).astype(int)
        assert np.abs(difference).max() <= 1
        assert np.asarray(alone).std() > 0


def test_image_of_a_seed_is_the_same_in_every_run(class_model: Path, tmp_path: Path) -> None:
    common = ("--model", class_model, "--steps", 3, "--sampler", "sde-dpm++")
    generate(*common, "--classes", "0,1,2", "--seed", 10, "--output", tmp_path / "three")
    generate(*common, "--classes", 2, "--seed", 12, "--output", tmp_path / "third")
    assert pictures(tmp_path / "three")["00002.png"] == pictures(tmp_path / "third")["00000.png"]


def test_comparison_holds_the_images_of_single_runs(class_model: Path, tmp_path: Path) -> None:
    common = ("--model", class_model, "--classes", "1,4", "--number", 4)
    generate(*common, "--compare", "unipc, deis", "--steps", "2,3,5", "--output", tmp_path / "all")
    generate(*common, "--sampler", "deis", "--steps", 3, "--output", tmp_path / "one")
    both = pictures(tmp_path / "all")
    assert len(both) == 2 * 3 * 4 + 1
    for i in range(4):
        assert both[f"deis-3/{i:05d}.png"] == pictures(tmp_path / "one")[f"{i:05d}.png"]


def test_record_repeats_the_run(text_model: Path, tmp_path: Path) -> None:
    generate(
        "--model", text_model, "--compare", "dpm++,sde-dpm++", "--steps", "2,3", "--prompt", "löwe", "--number", 2,
        "--option", "use_karras_sigmas=true", "--seed", 3, "--output", tmp_path / "first",
    )  # fmt: skip
    record = tmp_path / "first" / "record.json"
    generate("--record", record, "--output", tmp_path / "second")
    assert len(pictures(tmp_path / "first")) == 9
    assert pictures(tmp_path / "second") == pictures(tmp_path / "first")
    assert (tmp_path / "second" / "record.json").read_bytes() == record.read_bytes()


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGKILL])
def test_interrupted_run_goes_on(class_model: Path, tmp_path: Path, stop: signal.Signals) -> None:
    common = ["generate", "--model", str(class_model), "--number", "16", "--steps", "80", "--output"]
    out = tmp_path / "stopped"
    program = "from fewstep.scripts.cli import main; main()"
    process = subprocess.Popen(
        [sys.executable, "-c", program, *common, str(out)],
        env={**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        # Whoever runs the tests in the background may ignore it, and children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    deadline = time.monotonic() + 120
    while not (out / "00002.png").exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    process.send_signal(stop)
    told, warned = process.communicate(timeout=60)
    assert process.returncode != 0
    assert told == b""
    assert b"Traceback" not in warned
    before = pictures(out)
    assert 3 <= len(before) < 16
    assert json.loads((out / "record.json").read_text())["status"] == "running"
    result = invoke(*common, out)
    assert result.exit_code == 0, result.output
    assert result.stdout == f"16 images in {out}, {len(before)} of them from before\n"
    whole = tmp_path / "whole"
    assert invoke(*common, whole).exit_code == 0
    assert pictures(out) == pictures(whole)
    assert (out / "record.json").read_bytes() == (whole / "record.json").read_bytes()


def test_only_what_is_missing_is_made(class_model: Path, tmp_path: Path) -> None:
    common = ("--model", class_model, "--number", 3, "--steps", 2, "--output", tmp_path)
    generate(*common)
    made = pictures(tmp_path)
    times = {file.name: file.stat().st_mtime_ns for file in tmp_path.iterdir()}
    assert generate(*common) == f"3 images in {tmp_path}, 3 of them from before\n"
    assert {file.name: file.stat().st_mtime_ns for file in tmp_path.iterdir()} == times
    (tmp_path / "00001.png").unlink()
    generate(*common)
    assert pictures(tmp_path) == made
    assert (tmp_path / "00000.png").stat().st_mtime_ns == times["00000.png"]


def test_run_of_other_versions_is_kept_and_not_mixed(class_model: Path, tmp_path: Path) -> None:
    common = ("generate", "--model", class_model, "--number", 2, "--steps", 2, "--output", tmp_path)
    assert invoke(*common).exit_code == 0
    record = json.loads((tmp_path / "record.json").read_text())
    record["versions"]["torch"] = "1.0"
    (tmp_path / "record.json").write_text(json.dumps(record))
    (tmp_path / "grid.png").unlink()
    assert invoke(*common).exit_code == 0
    assert json.loads((tmp_path / "record.json").read_text())["versions"]["torch"] == "1.0"
    (tmp_path / "00001.png").unlink()
    assert_refused(invoke(*common), "torch 1.0", "another folder")


def test_progress_is_on_stderr(class_model: Path, tmp_path: Path) -> None:
    result = invoke("generate", "--model", class_model, "--number", 2, "--steps", 2, "--output", tmp_path)
    assert "2/2" in result.stderr
    assert "2/2" not in result.stdout
