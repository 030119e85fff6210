"""Labelled images for the training recipes: an npz file or a folder with one sub-folder a class."""

from __future__ import annotations

import hashlib
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError

IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".webp"}


@dataclass(frozen=True)
class LabelledImages:
    """A data set held in memory.

    Attributes:
        images: uint8, ``(count, channels, size, size)``.
        labels: int64, ``(count,)``, in ``range(len(names))``.
        names: one name a class.
    """

    images: torch.Tensor
    labels: torch.Tensor
    names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.labels)

    def float_images(self, index: torch.Tensor | slice = slice(None)) -> torch.Tensor:
        """The images of ``index`` as float32 in [-1, 1]."""
        return self.images[index].float().div_(127.5).sub_(1.0)

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the bytes of ``images``, in their order."""
        return hashlib.sha256(self.images.contiguous().numpy().tobytes()).hexdigest()


def load_images(path: str | Path, *, split: str = "train", size: int = 32) -> LabelledImages:
    """Reads one split of a labelled image set.

    Args:
        path: an ``.npz`` with ``x_train, y_train, x_test, y_test`` (uint8, grey or RGB), or a folder
            ``<split>/<class>/*.png`` (``<class>/*.png`` where there is only one split).
        split: ``"train"`` or ``"test"``.
        size: side of the square images returned, in pixels. Images up to 8 pixels smaller are padded
            with black, others are resized.

    Raises:
        ValueError: the path holds no such data.
    """
    path = Path(path)
    if path.suffix == ".npz" and path.is_file():
        arrays, labels, names = _read_archive(path, split)
    elif path.is_dir():
        arrays, labels, names = _read_folder(path, split)
    else:
        raise ValueError(f"data {path} is neither an .npz file nor a folder of images")
    images = np.stack([_fit(array, size) for array in arrays])
    if images.ndim == 3:
        images = images[..., None]
    return LabelledImages(
        torch.from_numpy(images).permute(0, 3, 1, 2).contiguous(),
        torch.from_numpy(labels.astype(np.int64)),
        names,
    )


_Split = tuple[Sequence[np.ndarray], np.ndarray, tuple[str, ...]]
"""Images, labels and the classes' names."""


def _read_archive(path: Path, split: str) -> _Split:
    try:
        with np.load(path, allow_pickle=False) as archive:
            arrays, labels = archive[f"x_{split}"], archive[f"y_{split}"]
    except KeyError as error:
        raise ValueError(f"data {path} has no {error}; it needs x_{split} and y_{split}") from None
    except (zipfile.BadZipFile, ValueError, OSError) as error:
        raise ValueError(f"data {path} is not a readable .npz file: {error}") from None
    if arrays.dtype != np.uint8 or arrays.ndim not in (3, 4) or arrays.shape[3:] not in ((), (1,), (3,)):
        raise ValueError(
            f"data {path}: x_{split} is {arrays.dtype} {arrays.shape}; give uint8 (N, H, W) or (N, H, W, 3)"
        )
    if labels.shape != arrays.shape[:1] or not len(labels) or labels.dtype.kind not in "iu" or labels.min() < 0:
        raise ValueError(f"data {path}: y_{split} must hold one integer from 0 up for each of {len(arrays)} images")
    if arrays.shape[3:] == (1,):
        arrays = arrays[..., 0]
    return arrays, labels, tuple(str(k) for k in range(int(labels.max()) + 1))


def _read_folder(path: Path, split: str) -> _Split:
    root = path / split
    if not root.is_dir():
        if split == "test" or (path / "test").is_dir():
            raise ValueError(f"data {path} has no folder {split}/")
        root = path
    names = tuple(sorted(p.name for p in root.iterdir() if p.is_dir()))
    files = [(f, k) for k, n in enumerate(names) for f in sorted((root / n).iterdir()) if f.suffix in IMAGE_SUFFIXES]
    if not files:
        raise ValueError(f"data {root} has no <class>/<image> files; give a folder with one sub-folder a class")
    pictures = []
    for file, _ in files:
        try:
            with Image.open(file) as picture:
                pictures.append(picture.convert("L" if picture.mode in ("1", "L") else "RGB"))
        except (UnidentifiedImageError, OSError) as error:
            raise ValueError(f"data {file} is not a readable image: {error}") from None
    if len({picture.mode for picture in pictures}) > 1:
        pictures = [picture.convert("RGB") for picture in pictures]
    return [np.asarray(picture) for picture in pictures], np.array([k for _, k in files]), names


def _fit(image: np.ndarray, size: int) -> np.ndarray:
    """One image padded with black (a few pixels) or resized to ``size`` x ``size``."""
    height, width = image.shape[:2]
    if (height, width) == (size, size):
        return image
    if max(height, width) <= size <= min(height, width) + 8:
        top, left = (size - height) // 2, (size - width) // 2
        pads = [(top, size - height - top), (left, size - width - left)] + [(0, 0)] * (image.ndim - 2)
        return np.pad(image, pads)
    return np.asarray(Image.fromarray(image).resize((size, size), Image.Resampling.LANCZOS))
