"""What the recipes make of downloaded files: ``python -m fewstep.scripts.recipes.prepare WHAT FILES...``."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
import numpy as np

from fewstep.metrics import convert_inception

from ..files import replace_file, write_text

_CIFAR_RECORD = 1 + 3 * 32 * 32

_FILE = click.Path(path_type=Path, exists=True)
_NEW = click.Path(path_type=Path)


@click.group()
def prepare() -> None:
    """Prepare downloaded files for fewstep fid."""


@prepare.command()
@click.argument("weights", type=_FILE)
@click.argument("output", type=_NEW)
def inception(weights: Path, output: Path) -> None:
    """Convert the public pt_inception-2015-12-05-6726825d.pth to safetensors."""
    convert_inception(weights, output)


@prepare.command()
@click.argument("batches", type=_FILE, nargs=-1, required=True)
@click.argument("output", type=_NEW)
def cifar10(batches: tuple[Path, ...], output: Path) -> None:
    """Put the images of CIFAR-10's binary version into an .npz."""
    images = cifar_images(batches)
    with replace_file(output) as file:
        np.savez_compressed(file, images=images)


@prepare.command()
@click.argument("captions", type=_FILE)
@click.argument("images", type=_FILE)
@click.argument("output", type=_NEW)
@click.option("--number", type=click.IntRange(1), default=30000, show_default=True, help="Images with a caption each.")
def coco(captions: Path, images: Path, output: Path, number: int) -> None:
    """Draw images of MS-COCO: a folder of links to them, and prompts.txt with the first caption of each."""
    chosen = coco_captions(json.loads(captions.read_text(encoding="utf-8")), number)
    partial = output.with_name(output.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    (partial / "images").mkdir(parents=True)
    for name, _ in chosen:
        source = (images / name).resolve()
        if not source.is_file():
            raise ValueError(f"{source} is missing; unpack all of the images")
        (partial / "images" / name).symlink_to(source)
    write_text(partial / "prompts.txt", "".join(f"{caption}\n" for _, caption in chosen))
    partial.rename(output)


def cifar_images(batches: Sequence[Path]) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Images of the binary version, which holds a byte of label and 3 x 32 x 32 bytes of pixels for each.

    Args:
        batches: files ``data_batch_1.bin`` and so on.

    Returns:
        uint8 ``(N, 32, 32, 3)``.

    Raises:
        ValueError: a file does not hold whole records.
    """
    parts = []
    for path in batches:
        data = np.fromfile(path, dtype=np.uint8)
        if not len(data) or len(data) % _CIFAR_RECORD:
            raise ValueError(f"{path} has {len(data)} bytes, no multiple of {_CIFAR_RECORD}; fetch the file again")
        parts.append(data.reshape(-1, _CIFAR_RECORD)[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))
    return np.concatenate(parts)


def coco_captions(annotations: dict[str, Any], number: int) -> list[tuple[str, str]]:
    """File name and first caption of so many images, always the same draw, by name.

    Args:
        annotations: content of ``captions_val2014.json``.
        number: of images.

    Raises:
        ValueError: there are fewer.
    """
    first: dict[int, str] = {}
    for entry in sorted(annotations["annotations"], key=lambda entry: entry["id"]):
        first.setdefault(entry["image_id"], " ".join(entry["caption"].split()))
    named = sorted(
        (image["file_name"], first[image["id"]]) for image in annotations["images"] if first.get(image["id"])
    )
    if len(named) < number:
        raise ValueError(f"number {number} is more than the {len(named)} images with captions; give fewer")
    drawn = np.random.default_rng(0).permutation(len(named))[:number]
    return [named[k] for k in sorted(drawn)]


if __name__ == "__main__":
    try:
        prepare(standalone_mode=True)
    except ValueError as error:
        sys.exit(f"Error: {error}")
