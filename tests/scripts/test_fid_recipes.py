"""The recipes of the papers' tables: their options are valid, their small form runs, and their files convert."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

import fewstep.scripts.recipes.prepare as recipes
from fewstep.metrics import IMAGE_METRICS, reference_images
from fewstep.samplers import SAMPLERS
from fewstep.scripts.commands.fid import fid, parse_scales
from fewstep.scripts.generation.model import DTYPES, resolve_name
from fewstep.scripts.generation.request import parse_steps, read_prompts
from model_folders import invoke

FOLDER = Path(__file__).parents[2] / "scripts" / "recipes"
RECIPES = sorted(path.stem for path in FOLDER.glob("*.sh") if path.stem != "common")
DOWNLOADED = {
    "inception.safetensors": None,
    "cifar10.npz": None,
    "VIRTUAL_imagenet256_labeled.npz": None,
    "DiT-XL-2-256": "model_index.json",
    "coco-30000": "prompts.txt",
}
"""What the recipes would download and convert -> a file in it, where it is a folder."""


@pytest.fixture
def data(tmp_path: Path) -> Path:
    folder = tmp_path / "data"
    for name, inside in DOWNLOADED.items():
        path = folder / name if inside is None else folder / name / inside
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("a prompt\n")
    return folder


def arguments(recipe: str, data: Path, *more: str, **environment: str) -> list[str]:
    """The words of ``fewstep fid`` that a recipe ends in."""
    shell = {**os.environ, "DATA": str(data), "FFHQ": str(data), "LAUNCH": "printf %s\\n", **environment}
    told = subprocess.run(["sh", FOLDER / f"{recipe}.sh", *more], env=shell, capture_output=True, text=True, timeout=60)
    assert told.returncode == 0, told.stderr
    name, *words = told.stdout.splitlines()
    assert name == "fid"
    return words


def test_there_is_a_recipe_for_each_table() -> None:
    assert RECIPES == ["cifar10", "coco", "ffhq", "imagenet"]


@pytest.mark.parametrize("recipe", RECIPES)
def test_options_are_valid(recipe: str, data: Path) -> None:
    given = fid.make_context("fid", arguments(recipe, data, "--seed", "7")).params
    assert given["seed"] == 7
    assert all(name in SAMPLERS for name in given["samplers"].split(","))
    assert len(parse_steps(given["steps"])) > 5
    assert parse_scales(given["guidance_scale"])
    assert set((given["metrics"] or "fid").split(",")) <= set(IMAGE_METRICS)
    assert given["dtype"] in DTYPES
    assert resolve_name(given["model"])
    assert given["number"] >= 10000
    assert given["features"] == "inception"
    assert given["prompts_file"] is None or read_prompts(given["prompts_file"])
    for file in (given["weights"], given["reference"]):
        assert Path(file).is_relative_to(data)


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_small_form_runs(recipe: str, tmp_path: Path) -> None:
    words = arguments(recipe, tmp_path / "nothing", SMALL="1", OUTPUT=str(tmp_path / "out"))
    result = invoke("fid", *words)
    assert result.exit_code == 0, (result.output, result.exception)
    rows = json.loads((tmp_path / "out" / "fid.json").read_text())["cells"]
    given = fid.make_context("fid", words).params
    assert list(dict.fromkeys(row["sampler"] for row in rows)) == given["samplers"].split(",")
    assert not (tmp_path / "nothing").exists()


@pytest.mark.parametrize("recipe", RECIPES)
def test_own_words_overrule_the_small_form(recipe: str, tmp_path: Path) -> None:
    words = arguments(recipe, tmp_path, "--number", "41", "--samplers", "a b", SMALL="1")
    given = fid.make_context("fid", words).params
    assert (given["number"], given["samplers"], given["steps"]) == (41, "a b", "2")
    assert (given["model"], given["features"]) == ("digits-small", "digits")


def test_a_recipe_starts_the_command(tmp_path: Path) -> None:
    launch = f"{sys.executable} -m fewstep.scripts"
    shell = {**os.environ, "SMALL": "1", "LAUNCH": launch, "OUTPUT": str(tmp_path / "out")}
    command = ["sh", FOLDER / "cifar10.sh", "--samplers", "dpm++"]
    told = subprocess.run(command, env=shell, capture_output=True, text=True, timeout=300, cwd=tmp_path)
    assert told.returncode == 0, told.stderr
    assert (tmp_path / "out" / "fid.csv").exists()


def test_images_of_cifar_are_put_into_an_npz(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (7, 32, 32, 3), dtype=np.uint8)
    records = [bytes([k]) + pixels[k].transpose(2, 0, 1).tobytes() for k in range(7)]
    (tmp_path / "data_batch_1.bin").write_bytes(b"".join(records[:4]))
    (tmp_path / "data_batch_2.bin").write_bytes(b"".join(records[4:]))
    files = [tmp_path / f"data_batch_{k}.bin" for k in (1, 2)]
    prepared("cifar10", *files, tmp_path / "cifar10.npz")
    (images,) = reference_images(tmp_path / "cifar10.npz")
    assert np.array_equal(images.permute(0, 2, 3, 1).numpy(), pixels)
    files[0].write_bytes(b"".join(records)[:-1])
    with pytest.raises(ValueError, match=r"data_batch_1\.bin has 21510 bytes"):
        recipes.cifar_images(files)


def test_captions_of_coco_belong_to_their_images(tmp_path: Path) -> None:
    names = [f"COCO_val2014_{k:03d}.png" for k in range(20)]
    (tmp_path / "val2014").mkdir()
    for k, name in enumerate(names):
        Image.fromarray(np.full((4, 4, 3), k, np.uint8)).save(tmp_path / "val2014" / name)
    entries = [{"id": 100 - k, "image_id": k, "caption": f" picture\n{k} "} for k in range(20)]
    entries += [{"id": 200 + k, "image_id": k, "caption": "another"} for k in range(20)]
    content = {"images": [{"id": k, "file_name": name} for k, name in enumerate(names)], "annotations": entries}
    (tmp_path / "captions.json").write_text(json.dumps(content))
    prepared("coco", tmp_path / "captions.json", tmp_path / "val2014", tmp_path / "coco", "--number", 8)
    (images,) = reference_images(tmp_path / "coco" / "images")
    shown = [int(image[0, 0, 0]) for image in images]
    assert len(set(shown)) == 8
    assert read_prompts(tmp_path / "coco" / "prompts.txt") == tuple(f"picture {k}" for k in shown)
    with pytest.raises(ValueError, match="number 21 is more than the 20 images"):
        recipes.coco_captions(content, 21)


def prepared(*words: object) -> None:
    result = CliRunner().invoke(recipes.prepare, [str(word) for word in words])
    assert result.exit_code == 0, (result.output, result.exception)
