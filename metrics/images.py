"""The images of a data set, from wherever they lie, as uint8 batches."""

from __future__ import annotations

import hashlib
import tarfile
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import IO, Any

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError

SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".webp", ".ppm", ".pgm", ".tif", ".tiff"})
"""Of the files that count as images, in lower case."""

ImageSource = str | Path | Iterable[Any]

_TARS = (".tar", ".tar.gz", ".tgz", ".tar.xz", ".txz", ".tar.bz2", ".tbz2")
_GREY, _COLOUR = {"1", "L"}, {"RGB", "P", "CMYK", "YCbCr"}


def reference_images(
    source: ImageSource,
    *,
    batch_size: int = 64,
    part: str | None = None,
    size: int | None = None,
    channels: int | None = None,
) -> Iterator[torch.Tensor]:
    """The images of a source in their order, batch by batch.

    Args:
        source: a folder (its image files in all depths, sorted by path), an image tar (``.tar``, ``.tar.gz``,
            ``.tar.xz``, ``.tar.bz2``; in the archive's order), an ``.npz`` of uint8 ``(N, H, W)`` or
            ``(N, H, W, 1 or 3)``, a torch data set, or anything to iterate over. Items of the latter two are PIL
            images or uint8 tensors ``(1 or 3, H, W)``, or tuples that begin with one, as of labelled data sets.
        batch_size: images at a time.
        part: sub-folder of a folder or tar, or name of the array in an ``.npz`` that has several.
        size: images are resized (shorter side, bicubic with antialiasing) and cut to this square; by default they are
            taken as they are, and must be of one size.
        channels: 1 makes all grey, 3 makes all RGB; by default they are taken as they are, and must be of one kind.

    Yields:
        uint8 ``(B, 1 or 3, H, W)`` on the CPU; only the last batch is smaller.

    Raises:
        ValueError: the source is not there, empty or not readable, an image is broken, has transparency or more than
            8 bits, or images differ in size or channels.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size {batch_size} must be at least 1")
    if size is not None and size < 1:
        raise ValueError(f"size {size} must be at least 1")
    if channels not in (None, 1, 3):
        raise ValueError(f"channels {channels} must be 1 (grey) or 3 (RGB)")
    batch: list[torch.Tensor] = []
    first: tuple[str, torch.Tensor] | None = None
    for name, image in _images(source, part):
        image = _fitted(image, size, channels)
        if first is None:
            first = name, image
        elif image.shape != first[1].shape:
            raise ValueError(_difference(first, (name, image)))
        batch.append(image)
        if len(batch) == batch_size:
            yield torch.stack(batch)
            batch = []
    if first is None:
        raise ValueError(f"{_described(source)} has no images; give a folder, tar, npz or data set that has some")
    if batch:
        yield torch.stack(batch)


def describe_preparation(size: int | None, channels: int | None) -> str:
    """What ``reference_images`` does to an image, in words; empty where it does nothing."""
    words = []
    if channels is not None:
        words.append("made grey" if channels == 1 else "made RGB")
    if size is not None:
        words.append(f"shorter side to {size} by Pillow's bicubic filter, middle {size} x {size}")
    return "; ".join(words)


def images_fingerprint(
    source: ImageSource, *, part: str | None = None, size: int | None = None, channels: int | None = None
) -> str:
    """SHA-256 of the images' bytes in their order; see `reference_images` for the arguments and errors."""
    digest = hashlib.sha256()
    for batch in reference_images(source, part=part, size=size, channels=channels):
        digest.update(batch.numpy().tobytes())
    return digest.hexdigest()


def _images(source: ImageSource, part: str | None) -> Iterator[tuple[str, Image.Image | torch.Tensor]]:
    if not isinstance(source, str | Path):
        if part is not None:
            raise ValueError(f"part {part!r} is for folders, tars and npz files; the source is a data set")
        return _of_items(source)
    path = Path(source)
    if path.is_dir():
        return _of_folder(path, part)
    if not path.is_file():
        raise ValueError(f"{path} does not exist; give a folder, an image tar or an .npz file")
    if path.suffix.lower() == ".npz":
        return _of_archive(path, part)
    if path.name.lower().endswith(_TARS):
        return _of_tar(path, part)
    raise ValueError(f"{path} is no folder, image tar or .npz file; give one of these")


def is_grid(file: Path) -> bool:
    """Whether an image shows the others of its folder: what ``fewstep generate`` puts beside its record."""
    return file.name == "grid.png" and (file.parent / "record.json").is_file()


def _of_folder(path: Path, part: str | None) -> Iterator[tuple[str, Image.Image | torch.Tensor]]:
    root = path if part is None else path / part
    if not root.is_dir():
        raise ValueError(f"part {part!r}: {path} has no such sub-folder")
    for file in sorted(f for f in root.rglob("*") if f.suffix.lower() in SUFFIXES and f.is_file() and not is_grid(f)):
        with file.open("rb") as stream:
            yield str(file), _decoded(stream, str(file))


def _of_tar(path: Path, part: str | None) -> Iterator[tuple[str, Image.Image | torch.Tensor]]:
    folder = PurePosixPath(part or ".")
    try:
        with tarfile.open(path) as archive:
            for member in archive:
                name = PurePosixPath(member.name)
                if not member.isfile() or name.suffix.lower() not in SUFFIXES or not name.is_relative_to(folder):
                    continue
                stream = archive.extractfile(member)
                assert stream is not None  # it is a file
                yield f"{path}:{member.name}", _decoded(stream, f"{path}:{member.name}")
    except (tarfile.TarError, EOFError, OSError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0].rstrip(":")
        raise ValueError(f"{path} is not a readable tar: {reason}") from None


def _of_archive(path: Path, part: str | None) -> Iterator[tuple[str, Image.Image | torch.Tensor]]:
    with path.open("rb") as file:
        if not zipfile.is_zipfile(file):
            raise ValueError(f"{path} is not a readable .npz file: it is cut off, or of another kind")
    try:
        with np.load(path, allow_pickle=False) as archive:
            names = archive.files
            chosen = names[0] if part is None and len(names) == 1 else part
            array = archive[chosen] if chosen in names else None
    except (zipfile.BadZipFile, zlib.error, ValueError, EOFError, OSError, NotImplementedError) as error:
        raise ValueError(f"{path} is not a readable .npz file: {error}") from None
    if array is None:
        if part is None:
            raise ValueError(f"{path} has the arrays {', '.join(names)}; say which by part")
        raise ValueError(f"part {part!r}: {path} has the arrays {', '.join(names)}")
    if array.dtype != np.uint8 or array.ndim not in (3, 4) or array.shape[3:] not in ((), (1,), (3,)):
        raise ValueError(f"{path}: {chosen} is {array.dtype} {array.shape}; give uint8 (N, H, W) or (N, H, W, 1 or 3)")
    pixels = torch.from_numpy(array[:, None] if array.ndim == 3 else array.transpose(0, 3, 1, 2))
    for number, image in enumerate(pixels):
        yield f"{path}[{number}]", image


def _of_items(items: Iterable[Any]) -> Iterator[tuple[str, Image.Image | torch.Tensor]]:
    for number, item in enumerate(_iterated(items)):
        image = item[0] if isinstance(item, tuple | list) else item
        if isinstance(image, Image.Image):
            yield f"item {number}", _of_one_kind(image, f"item {number}")
        elif (
            isinstance(image, torch.Tensor) and image.dtype == torch.uint8 and image.ndim == 3 and len(image) in (1, 3)
        ):
            yield f"item {number}", image.cpu()
        else:
            kind = f"{image.dtype} {tuple(image.shape)}" if isinstance(image, torch.Tensor) else type(image).__name__
            raise ValueError(f"item {number} is {kind}; give PIL images or uint8 tensors (1 or 3, H, W) in 0 to 255")


def _iterated(items: Any) -> Iterator[Any]:
    # A torch data set has __getitem__ and __len__ alone, and need not end by IndexError.
    if hasattr(items, "__iter__"):
        return iter(items)
    if hasattr(items, "__getitem__") and hasattr(items, "__len__"):
        return (items[k] for k in range(len(items)))
    raise ValueError(f"source is {type(items).__name__}; give a path, a data set or something to iterate over")


def _decoded(stream: IO[bytes], name: str) -> Image.Image:
    try:
        with Image.open(stream) as picture:
            picture.load()
            return _of_one_kind(picture, name)
    except (UnidentifiedImageError, Image.DecompressionBombError, OSError, SyntaxError) as error:
        reason = "no image format known to Pillow" if isinstance(error, UnidentifiedImageError) else str(error)
        raise ValueError(f"{name} is not a readable image: {reason}") from None


def _of_one_kind(picture: Image.Image, name: str) -> Image.Image:
    if picture.mode in {"RGBA", "LA", "PA"} or "transparency" in picture.info:
        raise ValueError(f"{name} has transparency; put it on a background first")
    if picture.mode not in _GREY | _COLOUR:
        raise ValueError(f"{name} has pixels of mode {picture.mode}; give 8-bit grey or RGB images")
    return picture.convert("L" if picture.mode in _GREY else "RGB")


def _fitted(image: Image.Image | torch.Tensor, size: int | None, channels: int | None) -> torch.Tensor:
    """``(C, H, W)``; Pillow converts and resizes, also what came as a tensor."""
    if isinstance(image, torch.Tensor):
        if size is None and channels in (None, len(image)):
            return image
        pixels = image.permute(1, 2, 0).numpy()
        image = Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels)
    if channels is not None:
        image = image.convert("L" if channels == 1 else "RGB")
    if size is not None:
        scale = size / min(image.size)
        width, height = (max(size, round(edge * scale)) for edge in image.size)
        image = image.resize((width, height), Image.Resampling.BICUBIC)
        left, top = (width - size) // 2, (height - size) // 2
        image = image.crop((left, top, left + size, top + size))
    array = np.array(image)
    return torch.from_numpy(array[None] if array.ndim == 2 else array.transpose(2, 0, 1))


def _difference(first: tuple[str, torch.Tensor], other: tuple[str, torch.Tensor]) -> str:
    said = []
    for name, image in (first, other):
        kind = "grey" if len(image) == 1 else "RGB"
        said.append(f"{name} is {kind} {image.shape[1]} x {image.shape[2]}")
    remedy = "channels=3 or 1" if len(first[1]) != len(other[1]) else "size"
    return f"images differ: {said[0]}, {said[1]}; give {remedy} to make them alike"


def _described(source: ImageSource) -> str:
    return str(source) if isinstance(source, str | Path) else "the data set"
