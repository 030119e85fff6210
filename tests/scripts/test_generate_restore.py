"""``fewstep generate --input``: restored images are the pipeline's own, and bad input is refused in one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import UNet2DModel
from PIL import Image

from fewstep.metrics import DigitsClassifier
from fewstep.samplers import SAMPLERS, MRSamplerScheduler, RestorationPipeline, UniPCScheduler
from fewstep.scripts.training.degradation import degrade
from model_folders import assert_refused, invoke, pictures, save_class_model


def save_restoration_model(folder: Path, channels: int = 1, **options: Any) -> Path:
    torch.manual_seed(0)
    unet = UNet2DModel(
        in_channels=2 * channels,
        out_channels=channels,
        block_out_channels=(8, 8),
        layers_per_block=1,
        norm_num_groups=4,
        down_block_types=("DownBlock2D",) * 2,
        up_block_types=("UpBlock2D",) * 2,
    )
    RestorationPipeline(unet, MRSamplerScheduler(prediction_type="v_prediction", **options)).save_pretrained(folder)
    return folder


def save_pictures(folder: Path, count: int, size: tuple[int, ...] = (8, 8)) -> Path:
    folder.mkdir(parents=True)
    for k in range(count):
        pixels = np.random.default_rng(k).integers(0, 256, size, dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{k}.png")
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_restoration_model(tmp_path_factory.mktemp("restoration"))


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_pictures(tmp_path_factory.mktemp("inputs") / "in", 3)


def generate(*arguments: object) -> str:
    result = invoke("generate", *arguments)
    assert result.exit_code == 0, (result.output, result.exception)
    return result.stdout


def restored(model: Path, file: Path, seed: int, steps: int, mode: str = "L", **options: Any) -> Image.Image:
    """One image, by a user's own lines."""
    pipe = RestorationPipeline.from_pretrained(model)
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = MRSamplerScheduler.from_config(pipe.scheduler.config, **options)
    generator = [torch.Generator().manual_seed(seed)]
    image: Image.Image = pipe([Image.open(file).convert(mode)], steps, generator).images[0]
    return image


def assert_same(file: Path, image: Image.Image) -> None:
    with Image.open(file) as found:
        np.testing.assert_array_equal(np.asarray(found), np.asarray(image))


# ---------------------------------------------------------------- what is restored


def test_every_sampler_by_name(model: Path, inputs: Path, tmp_path: Path) -> None:
    common = ("--model", model, "--input", inputs / "0.png", "--steps", 3, "--seed", 4)
    generate(*common, "--compare", ",".join(SAMPLERS), "--output", tmp_path)
    for sampler in SAMPLERS:
        expected = restored(model, inputs / "0.png", 4, 3, solver=sampler)
        assert_same(tmp_path / f"{sampler}-3" / "00000.png", expected)
    assert len({file.read_bytes() for file in tmp_path.glob("*-3/00000.png")}) > len(SAMPLERS) / 2


def test_images_of_a_folder_in_the_order_of_their_names(model: Path, inputs: Path, tmp_path: Path) -> None:
    """Round and round where more images are asked for; each with its own seed."""
    told = generate(
        "--model", model, "--input", inputs, "--number", 4, "--steps", 2, "--seed", 7, "--sampler", "sde-dpm++",
        "--output", tmp_path,
    )  # fmt: skip
    assert told == f"4 images in {tmp_path}\n"
    for i, k in enumerate((0, 1, 2, 0)):
        assert_same(tmp_path / f"{i:05d}.png", restored(model, inputs / f"{k}.png", 7 + i, 2, solver="sde-dpm++"))
    images = json.loads((tmp_path / "record.json").read_text())["images"]
    names = [str(inputs.resolve() / f"{k}.png") for k in (0, 1, 2, 0)]
    assert [(entry["seed"], entry["input"]) for entry in images] == [(7 + i, name) for i, name in enumerate(names)]


def test_options_of_the_solver_and_of_the_schedule(model: Path, inputs: Path, tmp_path: Path) -> None:
    words = ("--option", "solver_order=3", "--option", "use_lu_lambdas=true")
    file = inputs / "1.png"
    generate("--model", model, "--input", file, "--sampler", "unipc", *words, "--steps", 5, "--output", tmp_path)
    expected = restored(model, file, 0, 5, solver="unipc", solver_options={"solver_order": 3}, use_lu_lambdas=True)
    assert_same(tmp_path / "00000.png", expected)
    plain = restored(model, file, 0, 5, solver="unipc")
    assert np.asarray(plain).tobytes() != np.asarray(expected).tobytes()


def test_a_saved_scheduler(model: Path, inputs: Path, tmp_path: Path) -> None:
    options = {"solver": "deis", "solver_options": {"solver_order": 3}, "prediction_type": "v_prediction"}
    MRSamplerScheduler(**options).save_pretrained(tmp_path / "saved")
    generate(
        "--model", model, "--input", inputs, "--sampler", tmp_path / "saved", "--steps", 4, "--output", tmp_path / "out"
    )
    assert_same(tmp_path / "out" / "00002.png", restored(model, inputs / "2.png", 2, 4, **options))


def test_colours_and_sizes_of_many_kinds(tmp_path: Path) -> None:
    """A palette becomes RGB, grey too; sizes may differ, and the grid has room for the largest."""
    model = save_restoration_model(tmp_path / "model", 3)
    inputs = save_pictures(tmp_path / "in", 1, (9, 14, 3))
    Image.fromarray(np.full((20, 8), 90, np.uint8)).save(inputs / "1.PNG")
    Image.open(inputs / "0.png").quantize(4).save(inputs / "2.png")
    (inputs / "notes.txt").write_text("no image")
    generate("--model", model, "--input", inputs, "--steps", 2, "--output", tmp_path / "out")
    for i, name in enumerate(("0.png", "1.PNG", "2.png")):
        assert_same(tmp_path / "out" / f"{i:05d}.png", restored(model, inputs / name, i, 2, "RGB"))
    with Image.open(tmp_path / "out" / "grid.png") as grid:
        assert grid.height >= 60


def test_bundled_model_makes_degraded_digits_readable(tmp_path: Path) -> None:
    """On digits that another model drew."""
    generate("--number", 20, "--steps", 10, "--guidance-scale", 2, "--output", tmp_path / "clean")
    files = [tmp_path / "clean" / f"{i:05d}.png" for i in range(20)]
    clean = torch.from_numpy(np.stack([np.asarray(Image.open(file).convert("L")) for file in files]))[:, None] / 255.0
    degraded = degrade(clean, range(20))
    (tmp_path / "in").mkdir()
    for i, image in enumerate(degraded):
        Image.fromarray((image[0] * 255).round().byte().numpy()).save(tmp_path / "in" / f"{i:02d}.png")
    generate("--model", "digits-restore", "--input", tmp_path / "in", "--steps", 5, "--output", tmp_path / "out")
    found = np.stack([np.asarray(Image.open(tmp_path / "out" / f"{i:05d}.png")) for i in range(20)])
    images = torch.from_numpy(found)[:, None] / 255.0

    def decibels(each: torch.Tensor) -> float:
        return float(-10.0 * (each - clean).square().mean((1, 2, 3)).log10().mean())

    assert decibels(images) > decibels(degraded) + 2.0
    with torch.no_grad():
        answers = DigitsClassifier.bundled()(images * 2.0 - 1.0).argmax(1)
    assert int((answers == torch.arange(20) % 10).sum()) >= 18


# ---------------------------------------------------------------- the same bytes again


@pytest.mark.parametrize("sampler", ["dpm++", "sde-dpm++"])
def test_batch_size_changes_no_byte(model: Path, inputs: Path, tmp_path: Path, sampler: str) -> None:
    common = ("--model", model, "--input", inputs, "--sampler", sampler, "--steps", 3, "--number", 5)
    generate(*common, "--batch-size", 1, "--output", tmp_path / "one")
    generate(*common, "--batch-size", 4, "--output", tmp_path / "four")
    assert len(pictures(tmp_path / "one")) == 6
    assert pictures(tmp_path / "one") == pictures(tmp_path / "four")


def test_images_of_one_call_agree_with_images_alone(model: Path, inputs: Path) -> None:
    """What other devices do with a batch, on the CPU: equal up to rounding."""
    from fewstep.scripts.generation.inputs import read_inputs
    from fewstep.scripts.generation.model import load_model
    from fewstep.scripts.generation.record import Cell, Settings
    from fewstep.scripts.generation.run import call_pipeline
    from fewstep.scripts.generation.schedulers import build_scheduler

    loaded = load_model(str(model), "float32", "cpu")
    settings = Settings(
        model=str(model), samplers=("sde-dpm++",), steps=(3,), compare=False, options={}, preset=None, number=3,
        seed=0, prompts=(), negative_prompt=None, classes=(), guidance_scale=None, height=None, width=None,
        dtype="float32", device="cpu", inputs=read_inputs(inputs),
    )  # fmt: skip
    scheduler = build_scheduler(settings, loaded, Cell("sde-dpm++", 3, "."))
    together = call_pipeline(settings, loaded, scheduler, 3, range(3))
    for i in range(3):
        (alone,) = call_pipeline(settings, loaded, scheduler, 3, [i])
        difference = np.asarray(together[i]).astype(int) - np.asarray(alone).astype(int)
        assert np.abs(difference).max() <= 1
        assert np.asarray(alone).std() > 0


def test_record_repeats_the_run_and_a_part_goes_on(model: Path, inputs: Path, tmp_path: Path) -> None:
    common = ("--model", model, "--input", inputs, "--steps", 2)
    generate(*common, "--output", tmp_path / "first")
    record = tmp_path / "first" / "record.json"
    made = pictures(tmp_path / "first")
    generate("--record", record, "--output", tmp_path / "second")
    assert pictures(tmp_path / "second") == made
    assert (tmp_path / "second" / "record.json").read_bytes() == record.read_bytes()
    (tmp_path / "first" / "00001.png").unlink()
    told = generate(*common, "--output", tmp_path / "first")
    assert told == f"3 images in {tmp_path / 'first'}, 2 of them from before\n"
    assert pictures(tmp_path / "first") == made


def test_other_images_under_the_same_names(model: Path, tmp_path: Path) -> None:
    inputs = save_pictures(tmp_path / "in", 2)
    common = ("--model", model, "--input", inputs, "--steps", 1, "--output")
    generate(*common, tmp_path / "out")
    record = tmp_path / "out" / "record.json"
    (inputs / "1.png").write_bytes((inputs / "0.png").read_bytes())
    assert_refused(invoke("generate", *common, tmp_path / "out"), "another run (different inputs)")
    again = ("generate", "--record", record, "--output", tmp_path / "again")
    assert_refused(invoke(*again), f"input {inputs.resolve() / '1.png'} has changed since the record")
    (inputs / "1.png").unlink()
    assert_refused(invoke(*again), "1.png is missing")
    assert not (tmp_path / "again").exists()


# ---------------------------------------------------------------- refusals


def test_input_and_model_that_do_not_fit(model: Path, inputs: Path, tmp_path: Path) -> None:
    dit = save_class_model(tmp_path / "dit")
    out = ("--output", tmp_path / "out")
    assert_refused(invoke("generate", "--model", dit, "--input", inputs, *out), "input does not apply", str(dit))
    assert_refused(invoke("generate", "--model", model, *out), str(model), "--input with a file or a folder")
    common = ("generate", "--model", model, "--input", inputs, *out)
    for words, said in (
        (("--prompt", "cat"), "prompt does not apply"),
        (("--classes", "1"), "classes do not apply"),
        (("--guidance-scale", 2), "guidance-scale does not apply"),
        (("--height", 8), "height does not apply"),
        (("--preset", "accurate"), "preset 'accurate' was not measured for MRSamplerScheduler"),
        (("--option", "sigma_inf=0.1"), "'sigma_inf'"),
        (("--option", "solver_order=9"), "solver_order 9"),
    ):
        assert_refused(invoke(*common, *words), said)
    assert not (tmp_path / "out").exists()


def test_saved_schedulers_of_another_process(model: Path, inputs: Path, tmp_path: Path) -> None:
    UniPCScheduler(prediction_type="v_prediction").save_pretrained(tmp_path / "unipc")
    MRSamplerScheduler(prediction_type="v_prediction", sigma_inf=0.1).save_pretrained(tmp_path / "mr")
    dit = save_class_model(tmp_path / "dit")
    out = ("--output", tmp_path / "out")
    common = ("generate", "--model", model, "--input", inputs, *out, "--sampler")
    assert_refused(invoke(*common, tmp_path / "unipc"), "holds a UniPCScheduler", "needs an MRSamplerScheduler")
    assert_refused(invoke(*common, tmp_path / "mr"), "another model", "their sigma_inf differ")
    result = invoke("generate", "--model", dit, "--sampler", tmp_path / "mr", *out)
    assert_refused(result, "holds a MRSamplerScheduler", "a scheduler of another class")


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("missing", "neither an image nor a folder"),
        ("empty", "folder without images"),
        ("text.png", "text.png is not a readable image"),
        ("clear.png", "mode RGBA; save it as grey or RGB"),
        ("deep.png", "mode I;16; save it as grey or RGB"),
        ("key.png", "with transparency"),
        ("tiny.png", "tiny.png: image of 1 x 8 pixels is too small"),
    ],
)
def test_files_that_cannot_be_restored(model: Path, tmp_path: Path, name: str, said: str) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.png").write_text("no image")
    Image.new("RGBA", (8, 8)).save(tmp_path / "clear.png")
    Image.fromarray(np.zeros((8, 8), np.uint16)).save(tmp_path / "deep.png")
    Image.new("P", (8, 8)).save(tmp_path / "key.png", transparency=0)
    Image.new("L", (8, 1)).save(tmp_path / "tiny.png")
    out = tmp_path / "out"
    assert_refused(invoke("generate", "--model", model, "--input", tmp_path / name, "--output", out), "input", said)
    assert not out.exists()


def test_output_among_the_inputs(model: Path, tmp_path: Path) -> None:
    inputs = save_pictures(tmp_path / "in", 1)
    result = invoke("generate", "--model", model, "--input", inputs, "--output", inputs)
    assert_refused(result, "is the folder of the input")
    assert len(list(inputs.iterdir())) == 1


def test_a_network_of_channels_that_no_picture_has(inputs: Path, tmp_path: Path) -> None:
    model = save_restoration_model(tmp_path / "model", 2)
    result = invoke("generate", "--model", model, "--input", inputs, "--output", tmp_path / "out")
    assert_refused(result, "restores 2 channels", "1 (grey) or 3 (RGB)")
