"""What all benchmarks share: where they ran, and their tables."""

from __future__ import annotations

import json
import platform
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

import torch

Entry = TypeVar("Entry")

STABLE_DIFFUSION = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
"""The noise schedule of Stable Diffusion 1.5, 2 and XL."""


def environment(device: str = "cpu") -> dict[str, Any]:
    """The machine and the libraries of a measurement."""
    return {
        **({"device": torch.cuda.get_device_name(device)} if device.startswith("cuda") else {}),
        "machine": platform.machine(),
        "processor": _processor(),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "torch_threads": torch.get_num_threads(),
        **{name: version(name) for name in ("fewstep", "torch", "diffusers", "numpy")},
    }


def table(header: Sequence[str], rows: Sequence[Sequence[str]], *, markdown: bool = False) -> str:
    """Lines of a table: the first column to the left, the others to the right."""
    widths = [max(len(row[k]) for row in (header, *rows)) for k in range(len(header))]
    lines = []
    for row in (header, *rows):
        cells = [c.ljust(w) if k == 0 else c.rjust(w) for k, (c, w) in enumerate(zip(row, widths, strict=True))]
        lines.append("| " + " | ".join(cells) + " |" if markdown else "  ".join(cells).rstrip())
    if markdown:
        rule = ["-" * w if k == 0 else "-" * (w - 1) + ":" for k, w in enumerate(widths)]
        lines.insert(1, "| " + " | ".join(rule) + " |")
    return "\n".join(lines)


def read_entries(
    path: Path,
    what: str,
    settings: Mapping[str, Any],
    read: Callable[[Mapping[str, Any]], list[Entry]],
    *,
    same_machine: Sequence[str] = (),
) -> list[Entry]:
    """What an earlier run of a benchmark left in its file, to go on from; nothing where there is no file.

    Args:
        path: of the JSON file, with ``settings`` and, for ``same_machine``, ``environment``.
        what: the entries are, for people.
        settings: of this run, ready for JSON.
        read: takes the entries from the file's content; a ``ValueError`` says that they are none.
        same_machine: names of ``environment`` that must be equal too.

    Raises:
        ValueError: the file is none of this benchmark, or of other settings.
    """
    if not path.exists():
        return []
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        found = {**content["settings"], **{name: content["environment"][name] for name in same_machine}}
        entries = read(content)
    except (OSError, AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"--json {path} holds no {what} of this benchmark; give another file") from error
    here = environment() if same_machine else {}
    wanted = {**json.loads(json.dumps(settings)), **{name: here[name] for name in same_machine}}
    for name, value in wanted.items():
        if found.get(name) != value:
            was = f"it was made with {name}={found.get(name)!r}, not {value!r}"
            raise ValueError(f"--json {path} is of other settings (other {name}): {was}; give another file")
    return entries


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()
