"""The output of an evaluation: its settings, its figures, and whether it can be continued."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from ..files import changed_settings, read_json, write_json, write_text
from ..generation.record import check_writable
from .chunks import ChunkFiles
from .report import csv_text
from .settings import EvaluatedCell

SETTINGS, RESULTS, TABLE, REFERENCE = "settings.json", "fid.json", "fid.csv", "reference.safetensors"
_FEATURES = "features"
_ROW = {"sampler", "steps", "calls", "guidance_scale", "number", "seeds", "figures", "remarks", "scheduler"}


class EvaluationFolder:
    """Where an evaluation writes.

    Args:
        path: the folder, which need not exist.
        settings: of all cells, ready for JSON.

    Attributes:
        rows: the figures of the cells that have been measured, ready for JSON.
        reference_row: what they are held against, ready for JSON; empty before the first.

    Raises:
        ValueError: the folder cannot be written, or holds something else than a part of this evaluation, or what it
            holds is damaged.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any]) -> None:
        check_writable(path)
        self.path = path
        self._settings = settings
        self.rows: list[dict[str, Any]] = []
        self.reference_row: dict[str, Any] = {}
        changed = changed_settings(path / SETTINGS, settings)
        if changed:
            raise ValueError(
                f"output {path} holds another evaluation (different {', '.join(changed)}); choose another folder"
            )
        if changed is None and path.is_dir() and any(path.iterdir()):
            raise ValueError(f"output {path} is not empty and holds no {SETTINGS}; choose another folder")
        if (path / RESULTS).exists():
            self.rows, self.reference_row = _read_results(path / RESULTS)

    @property
    def reference(self) -> Path:
        """The file for computed statistics of the reference."""
        return self.path / REFERENCE

    def begin(self) -> None:
        """Writes the settings, before anything else."""
        if not (self.path / SETTINGS).exists():
            write_json(self.path / SETTINGS, self._settings)

    def begun(self) -> bool:
        """Whether the settings are there."""
        return (self.path / SETTINGS).exists()

    def chunks(self, cell: EvaluatedCell) -> ChunkFiles:
        """The features of a cell."""
        return ChunkFiles(self.path / _FEATURES / f"{cell.folder}-{cell.fingerprint[:16]}")

    def image_path(self, cell: EvaluatedCell, index: int) -> Path:
        """The file of one image."""
        return self.path / cell.folder / f"{index:05d}.png"

    def measured(self, cell: EvaluatedCell, metrics: Sequence[str]) -> bool:
        """Whether a cell has all of these figures."""
        row = self._row(cell)
        return row is not None and row["scheduler"] == cell.config and row["figures"].keys() >= set(metrics)

    def add(self, cell: EvaluatedCell, row: dict[str, Any]) -> None:
        """Writes the figures with those of one more cell, or with more of a cell."""
        known = self._row(cell)
        if known is None:
            self.rows.append(row)
        elif known["scheduler"] != cell.config:  # a sampler's folder holds another one by now
            known.update(row)
        else:
            remarks = list(dict.fromkeys([*known["remarks"], *row["remarks"]]))
            known.update({**row, "figures": {**known["figures"], **row["figures"]}, "remarks": remarks})
        self._write()

    def finish(self, cells: Sequence[EvaluatedCell]) -> None:
        """Puts the figures into the order of the cells, those of earlier commands last, and takes the features away.

        Args:
            cells: of this command; the features of others that are not yet measured stay.
        """
        asked = [row for cell in cells if (row := self._row(cell)) is not None]
        self.rows = asked + [row for row in self.rows if row not in asked]
        self._write()
        for cell in cells:
            self.chunks(cell).remove()
        with suppress(OSError):  # it is not there, or an earlier command's cells are not done
            (self.path / _FEATURES).rmdir()

    def _row(self, cell: EvaluatedCell) -> dict[str, Any] | None:
        found = (row for row in self.rows if (row["sampler"], row["steps"], row["guidance_scale"]) == cell.key)
        return next(found, None)

    def _write(self) -> None:
        content = {"settings": dict(self._settings), "reference": self.reference_row, "cells": self.rows}
        write_json(self.path / RESULTS, content)
        write_text(self.path / TABLE, csv_text(self.rows))


def check_no_evaluation(path: Path) -> None:
    """Raises ValueError where a folder holds an evaluation of a model, whose figures others would replace."""
    if (path / SETTINGS).exists() or ((path / RESULTS).exists() and "cells" in read_json(path / RESULTS)):
        raise ValueError(f"output {path} holds an evaluation of a model; choose another folder")


def _read_results(path: Path) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    content = read_json(path)
    rows, reference = content.get("cells"), content.get("reference")
    if not isinstance(rows, list) or not isinstance(reference, dict) or not all(map(_is_row, rows)):
        raise ValueError(f"{path} holds no figures of an evaluation; choose another folder")
    return rows, reference


def _is_row(row: Any) -> bool:
    return isinstance(row, dict) and row.keys() >= _ROW and isinstance(row["figures"], dict)
