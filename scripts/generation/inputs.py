"""The images that a restoration model starts from."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

from PIL import Image, ImageOps, UnidentifiedImageError

from fewstep.metrics.images import is_grid

from ..training.data import IMAGE_SUFFIXES

_MODES = {1: "L", 3: "RGB"}  # by the number of the network's channels
_READABLE = ("1", "L", "P", "RGB")


def read_inputs(path: Path) -> dict[str, str]:
    """The image file, or the images of a folder in the order of their names, each with the SHA-256 of its bytes.

    Raises:
        ValueError: nothing there, or a file that is no image with 8 bits a channel.
    """
    if path.is_dir():
        files = sorted(f for f in path.iterdir() if f.suffix.lower() in IMAGE_SUFFIXES and not is_grid(f))
        if not files:
            raise ValueError(f"input {path} is a folder without images; give {', '.join(sorted(IMAGE_SUFFIXES))} files")
    elif path.is_file():
        files = [path]
    else:
        raise ValueError(f"input {path} is neither an image nor a folder of images")
    for file in files:
        open_input(str(file), 1)
    return {str(file.resolve()): _digest(file) for file in files}


def check_inputs(inputs: Mapping[str, str]) -> None:
    """Sees to it that the images of a record are still the same.

    Raises:
        ValueError: one is missing or has changed.
    """
    for name, digest in inputs.items():
        file = Path(name)
        if not file.is_file() or _digest(file) != digest:
            state = "has changed since the record" if file.is_file() else "is missing"
            raise ValueError(f"input {name} {state}; put the image of the record there, or start a run of its own")


def open_input(name: str, channels: int) -> Image.Image:
    """One image as the network takes it: grey for one channel, RGB for three.

    Raises:
        ValueError: it cannot be read, or has transparency or more than 8 bits a channel.
    """
    try:
        with Image.open(name) as opened:
            image = ImageOps.exif_transpose(opened)
            if image.mode not in _READABLE or "transparency" in image.info:
                raise ValueError(
                    f"input {name} is an image of mode {image.mode}"
                    + (" with transparency" if "transparency" in image.info else "")
                    + "; save it as grey or RGB with 8 bits a channel and without transparency"
                )
            return image.convert(_MODES[channels])
    except (UnidentifiedImageError, OSError) as error:
        raise ValueError(f"input {name} is not a readable image: {error}; give png, jpg, bmp or webp files") from error


def image_channels(channels: int) -> bool:
    """Whether there are image files with so many channels: grey or RGB."""
    return channels in _MODES


def _digest(file: Path) -> str:
    try:
        return hashlib.sha256(file.read_bytes()).hexdigest()
    except OSError as error:
        raise ValueError(f"input {file} cannot be read: {error.strerror or error}") from error
