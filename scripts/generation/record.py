"""The folder of a run: its settings as JSON, atomic files, and whether a folder can be continued."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from ..files import write_json
from .steering import Steering

FORMAT = 1
RECORD, GRID = "record.json", "grid.png"
_SUMMARY = ("reward", "network_calls", "effective_sample_sizes")  # of an account, for the record
_LIBRARIES = ("fewstep", "torch", "diffusers", "transformers", "numpy")


@dataclass(frozen=True)
class Cell:
    """One sampler at one number of steps, and the folder of its images below the run's."""

    sampler: str
    steps: int
    folder: str

    @property
    def name(self) -> str:
        """Of the sampler, for people: a folder's last part."""
        return Path(self.sampler).name


@dataclass(frozen=True)
class Settings:
    """All that the images of a run depend on, besides the versions of the libraries.

    Attributes:
        model: bundled name, absolute folder or hub id.
        samplers: one name or absolute folder, or the rows of a comparison.
        steps: one number of steps, or the columns of a comparison.
        compare: whether the run is a comparison.
        options: of the schedulers, over those of the sampler's name.
        preset: of the schedulers.
        number: images a cell.
        seed: image ``i`` starts from ``seed + i``.
        prompts: image ``i`` takes prompt ``i % len(prompts)``; empty for other kinds of models.
        negative_prompt: of all images.
        classes: image ``i`` takes class ``i % len(classes)``; empty for other kinds of models.
        guidance_scale: None where the pipeline has none.
        height: pixels; None for the model's own.
        width: pixels; None for the model's own.
        dtype: of the networks.
        device: of the networks.
        inputs: degraded images, absolute file -> SHA-256; image ``i`` restores number ``i % len(inputs)``; empty for
            other kinds of models.
        stitch: the model of the early steps and its share of them, ``"MODEL:SHARE"``; None where one model makes all.
        steering: what steers the samplers, if anything does.
    """

    model: str
    samplers: tuple[str, ...]
    steps: tuple[int, ...]
    compare: bool
    options: dict[str, Any]
    preset: str | None
    number: int
    seed: int
    prompts: tuple[str, ...]
    negative_prompt: str | None
    classes: tuple[int, ...]
    guidance_scale: float | None
    height: int | None
    width: int | None
    dtype: str
    device: str
    stitch: str | None = None
    inputs: dict[str, str] = field(default_factory=dict)
    steering: Steering | None = None

    @property
    def cells(self) -> list[Cell]:
        """Row by row; a run that is no comparison has one cell, the run's folder itself."""
        pairs = [(sampler, steps) for sampler in self.samplers for steps in self.steps]
        return [Cell(a, n, f"{Path(a).name}-{n}" if self.compare else ".") for a, n in pairs]

    def seed_of(self, index: int) -> int:
        """The seed of an image."""
        return self.seed + index

    def condition_of(self, index: int) -> str | int | None:
        """The prompt, class or degraded file of an image."""
        given = self.prompts or self.classes or tuple(self.inputs)
        return given[index % len(given)] if given else None

    def to_json(self) -> dict[str, Any]:
        """The settings as plain JSON values."""
        plain: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        if self.steering is None:
            del plain["steering"]
        return plain


_SHAPES: dict[str, Any] = {
    **dict.fromkeys(("model", "dtype", "device"), str),
    **dict.fromkeys(("number", "seed"), int),
    "samplers": [str],
    "prompts": [str],
    "steps": [int],
    "classes": [int],
    **dict.fromkeys(("height", "width"), (int, type(None))),
    **dict.fromkeys(("preset", "negative_prompt", "stitch"), (str, type(None))),
    "guidance_scale": (float, int, type(None)),
    "compare": bool,
    **dict.fromkeys(("options", "inputs"), dict),
}
"""The type of every setting in a record; a list stands for a list of its entry."""


def read_record(path: Path) -> dict[str, Any]:
    """The content of a record.

    Raises:
        ValueError: the file cannot be read or is no record.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"record {path} cannot be read: {error}") from error
    if not isinstance(content, dict) or not all(isinstance(content.get(key), dict) for key in ("run", "versions")):
        raise ValueError(f"record {path} was not written by fewstep generate")
    if content.get("format") != FORMAT:
        raise ValueError(f"record {path} has format {content.get('format')!r}; this version reads format {FORMAT}")
    return content


def read_settings(path: Path) -> Settings:
    """The settings in a record, with their types checked.

    Raises:
        ValueError: a setting is missing, unknown or of a wrong type.
    """
    run: dict[str, Any] = read_record(path)["run"]
    steering = run.pop("steering", None)
    names = {entry.name for entry in fields(Settings)} - {"steering"}
    if set(run) != names:
        raise ValueError(f"record {path}: missing or unknown in 'run': {', '.join(sorted(set(run) ^ names))}")
    for name, value in run.items():
        if not _has_shape(value, _SHAPES[name]):
            raise ValueError(f"record {path}: {name} has the unusable value {value!r}")
    checked: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in run.items()}
    try:
        return Settings(**checked, steering=None if steering is None else Steering.from_json(steering))
    except ValueError as error:
        raise ValueError(f"record {path}: {error}") from error


def library_versions() -> dict[str, str]:
    """Versions of Python and of the libraries that the images depend on."""
    found = {"python": platform.python_version()}
    for name in _LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:  # transformers is needed for text alone
            continue
    return found


class RunFolder:
    """Where a run writes.

    Args:
        path: the folder, which need not exist.
        settings: the run's settings.
        schedulers: config of each cell's scheduler, for the record's reader.

    Attributes:
        complete: whether everything of the run was written, and marked so.

    Raises:
        ValueError: the folder cannot be written, or holds something else than a part of this run.
    """

    def __init__(self, path: Path, settings: Settings, schedulers: Sequence[Mapping[str, Any]]) -> None:
        check_writable(path)
        self.path = path
        self.settings = settings
        self._schedulers = schedulers
        self._begun = (path / RECORD).exists()
        self.complete = False
        self._versions = library_versions()
        if self._begun:
            record = read_record(path / RECORD)
            self._check_same(record)
            self.complete = record.get("status") == "complete" and (path / GRID).exists()
            self._versions = record["versions"]
        elif any(self.image_path(cell, 0).exists() for cell in settings.cells) or (path / GRID).exists():
            raise ValueError(f"output {path} holds images but no {RECORD}; choose another folder")

    def _check_same(self, record: Mapping[str, Any]) -> None:
        mine, theirs = self.settings.to_json(), record["run"]
        names = dict.fromkeys((*mine, *theirs))
        other = [name for name in names if mine.get(name) != theirs.get(name)]
        if other:
            differing = ", ".join(other)
            raise ValueError(f"output {self.path} holds another run (different {differing}); choose another folder")
        now, then = self._versions, record["versions"]
        moved = [f"{name} {then.get(name)}, now {now[name]}" for name in now if now[name] != then.get(name)]
        if moved and any(self.missing(cell) for cell in self.settings.cells):
            raise ValueError(f"output {self.path} was begun with {'; '.join(moved)}; choose another folder")

    def image_path(self, cell: Cell, index: int) -> Path:
        """The file of one image."""
        return self.path / cell.folder / f"{index:05d}.png"

    def account_path(self, cell: Cell, index: int) -> Path:
        """The file of what a steered image is worth and has cost."""
        return self.image_path(cell, index).with_suffix(".json")

    def missing(self, cell: Cell) -> list[int]:
        """The images of a cell that are still to be made."""
        files = [self.image_path, *([self.account_path] if self.settings.steering else [])]
        return [i for i in range(self.settings.number) if not all(file(cell, i).exists() for file in files)]

    def save_account(self, cell: Cell, index: int, account: Mapping[str, Any]) -> None:
        """Writes what a steered image is worth and has cost, before the image itself."""
        write_json(self.account_path(cell, index), account)

    def accounts(self) -> list[dict[str, Any]]:
        """Of all images of a steered run.

        Raises:
            ValueError: one is damaged.
        """
        (cell,) = self.settings.cells
        return [_read_account(self.account_path(cell, i)) for i in range(self.settings.number)]

    def begin(self) -> None:
        """Writes the record, before the first image."""
        if not self._begun:
            self._write("running")
            self._begun = True

    def finish(self) -> None:
        """Marks the record complete."""
        self._write("complete")

    def _write(self, status: str) -> None:
        settings = self.settings
        key = "prompt" if settings.prompts else "input" if settings.inputs else "class"
        found: list[dict[str, Any]] = [{} for _ in range(settings.number)]
        if settings.steering is not None and status == "complete":
            found = [{name: one[name] for name in _SUMMARY if name in one} for one in self.accounts()]
        content = {
            "format": FORMAT,
            "status": status,
            "run": settings.to_json(),
            "versions": self._versions,
            "cells": [
                {**asdict(cell), "scheduler": dict(config)}
                for cell, config in zip(settings.cells, self._schedulers, strict=True)
            ],
            "images": [
                {"file": f"{i:05d}.png", "seed": settings.seed_of(i), key: settings.condition_of(i), **found[i]}
                for i in range(settings.number)
            ],
        }
        write_json(self.path / RECORD, content)


def _read_account(path: Path) -> dict[str, Any]:
    try:
        account: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if account["network_calls"] >= 0:
            return account
    except (OSError, ValueError, KeyError, TypeError):
        pass
    raise ValueError(f"{path} is damaged; delete it, and its image is made again")


def check_writable(path: Path) -> None:
    """Raises ValueError where a folder can neither be used nor made."""
    if path.exists() and not path.is_dir():
        raise ValueError(f"output {path} is a file; give a folder")
    existing = next(parent for parent in (path.absolute(), *path.absolute().parents) if parent.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        raise ValueError(f"output {path} cannot be made: {existing} is not a writable folder")


def _has_shape(value: Any, shape: Any) -> bool:
    if isinstance(shape, list):
        return isinstance(value, list) and all(_has_shape(entry, shape[0]) for entry in value)
    return isinstance(value, shape) and (shape is bool or not isinstance(value, bool))
