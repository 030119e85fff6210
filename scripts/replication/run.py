"""Measures claims one after the other; what is done is kept."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..bench.output import environment
from ..files import write_json
from .claims import Claim, Finding, Measurement, Scale


@dataclass(frozen=True)
class Outcome:
    """A claim that was measured.

    Attributes:
        claim: which.
        measurement: the numbers.
        minutes: it took.
        pictures: captions and PNG in base 64.
    """

    claim: Claim
    measurement: Measurement
    minutes: float
    pictures: Mapping[str, str]


def replicate(
    claims: Sequence[Claim], scale: Scale, output: Path, begin: Callable[[str], None] = lambda key: None
) -> list[Outcome]:
    """Measures claims; those that an earlier run into the same folder measured are read.

    Args:
        claims: which.
        scale: how much.
        output: folder; ``claims/KEY.json`` appears as each claim is done.
        begin: hears of each claim that is measured now.

    Raises:
        ValueError: the folder holds outcomes at another scale, with other data or of another version.
    """
    settings = _settings(scale)
    files = {claim.key: output / "claims" / f"{claim.key}.json" for claim in claims}
    known = {key: _read(path, settings) for key, path in files.items() if path.exists()}
    outcomes = []
    for claim in claims:
        entry = known.get(claim.key)
        if entry is None:
            begin(claim.key)
            clock = time.perf_counter()
            measurement = claim.measure(scale)
            entry = {
                "settings": settings,
                "environment": environment(),
                "findings": [asdict(finding) for finding in measurement.findings],
                "pictures": {title: _png(picture) for title, picture in measurement.pictures.items()},
                "minutes": (time.perf_counter() - clock) / 60.0,
            }
            write_json(files[claim.key], entry)
        findings = [Finding(**finding) for finding in entry["findings"]]
        outcomes.append(Outcome(claim, Measurement(findings), entry["minutes"], entry["pictures"]))
    return outcomes


def _settings(scale: Scale) -> dict[str, Any]:
    here = environment()
    data = scale.data is not None and hashlib.sha256(scale.data.read_bytes()).hexdigest()
    return {"quick": scale.quick, "data": data, **{k: here[k] for k in ("fewstep", "torch")}}


def _read(path: Path, settings: Mapping[str, Any]) -> dict[str, Any]:
    try:
        entry: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        other = [key for key, value in settings.items() if entry["settings"][key] != value]
        [Finding(**finding) for finding in entry["findings"]]
        float(entry["minutes"]), dict(entry["pictures"])
    except (OSError, ValueError, KeyError, TypeError):
        raise ValueError(f"{path} holds no outcome of a claim; remove it, or give another --output") from None
    if other:
        raise ValueError(f"{path} was measured with other {', '.join(other)}; give another --output")
    return entry


def _png(picture: Any) -> str:
    data = io.BytesIO()
    picture.save(data, format="PNG", optimize=True)
    return base64.b64encode(data.getvalue()).decode()
