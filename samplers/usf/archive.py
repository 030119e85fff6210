"""Every evaluated schedule of a search, one line of JSON each, from which the search can go on."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .decisions import SolverSchedule

_FORMAT, _VERSION = "fewstep.usf_archive", 1


@dataclass(frozen=True)
class Evaluation:
    """A schedule and what it was found to be worth.

    Attributes:
        stage: where in the search: ``initial``, ``evolution``, ``refinement`` or ``final``.
        round: of the evolution, from 1; 0 in other stages.
        fitness: lower is better; infinite where samples were not finite. In the stage ``final`` the second one.
        schedule: the decisions.
    """

    stage: str
    round: int
    fitness: float
    schedule: SolverSchedule


class SearchArchive:
    """A JSON-lines file that only grows; a last line that was cut off is dropped.

    Args:
        path: of the file; ``None`` keeps everything in memory.
        search: what the search is, JSON-ready; an archive of another one is refused.

    Raises:
        ValueError: the file is no archive, is of another search, or is damaged before its last line.
    """

    def __init__(self, path: str | Path | None, search: Mapping[str, Any]) -> None:
        self.path = None if path is None else Path(path)
        self.evaluations: list[Evaluation] = []
        self._found: dict[tuple[bool, str], float] = {}
        # As a file gives it back.
        header = json.loads(json.dumps({"format": _FORMAT, "version": _VERSION, "search": search}))
        if self.path is None:
            return
        content = self.path.read_bytes() if self.path.exists() else b""
        whole = content[: content.rfind(b"\n") + 1]
        start = _line(header)
        if not whole and start.startswith(content):
            # Nothing yet, or a first line that was cut off.
            if content:
                os.truncate(self.path, 0)
            self._append(header)
            return
        lines = whole.splitlines()
        found = self._parsed(lines[0], 1) if lines else None
        if not isinstance(found, dict) or (found.get("format"), found.get("version")) != (_FORMAT, _VERSION):
            raise ValueError(f"archive {self.path} is no {_FORMAT} of version {_VERSION}; name another file")
        if found != header:
            theirs, ours = found.get("search") or {}, header["search"]
            key = next(key for key in (*ours, *theirs) if theirs.get(key) != ours.get(key))
            raise ValueError(
                f"archive {self.path} is of a search with {key} {theirs.get(key)}, not {ours.get(key)}; "
                "go on with the same one, or name another file"
            )
        for number, line in enumerate(lines[1:], 2):
            self._remember(self._evaluation(self._parsed(line, number), number))
        if len(whole) < len(content):
            os.truncate(self.path, len(whole))

    def get(self, schedule: SolverSchedule, *, final: bool = False) -> float | None:
        """The fitness that was found, or ``None``; ``final`` asks for the second one."""
        return self._found.get((final, key_of(schedule)))

    def add(self, evaluation: Evaluation) -> None:
        """Appends a line, in one write."""
        self._remember(evaluation)
        if self.path is not None:
            value = evaluation.fitness
            self._append(
                {
                    "stage": evaluation.stage,
                    "round": evaluation.round,
                    "fitness": value if math.isfinite(value) else None,
                    "schedule": evaluation.schedule.to_dict(),
                }
            )

    def _remember(self, evaluation: Evaluation) -> None:
        self.evaluations.append(evaluation)
        self._found[evaluation.stage == "final", key_of(evaluation.schedule)] = evaluation.fitness

    def _append(self, entry: Mapping[str, Any]) -> None:
        assert self.path is not None
        with open(self.path, "ab", buffering=0) as file:
            file.write(_line(entry))

    def _parsed(self, line: bytes, number: int) -> Any:
        try:
            return json.loads(line)
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"archive {self.path} is damaged in line {number} ({error}); remove that line") from None

    def _evaluation(self, entry: Any, number: int) -> Evaluation:
        try:
            value = entry["fitness"]
            fitness = math.inf if value is None else float(value)
            return Evaluation(
                str(entry["stage"]), int(entry["round"]), fitness, SolverSchedule.from_dict(entry["schedule"])
            )
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"archive {self.path} is damaged in line {number} ({error}); remove that line") from None


def _line(entry: Mapping[str, Any]) -> bytes:
    return (json.dumps(entry) + "\n").encode()


def key_of(schedule: SolverSchedule) -> str:
    """A text that tells schedules apart."""
    return json.dumps(schedule.to_dict())
