"""Distances between all of two sets of features, some rows at a time."""

from __future__ import annotations

from collections.abc import Iterator

import torch

CHUNK = 1 << 23
"""Distances held at a time, 64 MB in float64."""


def distances(rows: torch.Tensor, columns: torch.Tensor, *, by_differences: bool) -> Iterator[tuple[int, torch.Tensor]]:
    """Number of the first row, and the distances of it and some more to all columns.

    Args:
        rows: ``(M, D)`` float64.
        columns: ``(N, D)`` float64.
        by_differences: for distances that are figures themselves. Through products it is many times faster and close
            points lose digits, which hardly changes which of two distances is larger.
    """
    count = max(1, CHUNK // len(columns))
    mode = "donot_use_mm_for_euclid_dist" if by_differences else "use_mm_for_euclid_dist"
    for begin in range(0, len(rows), count):
        yield begin, torch.cdist(rows[begin : begin + count], columns, compute_mode=mode)


def leave_out_itself(distances: torch.Tensor, begin: int) -> None:
    """Nobody is his own neighbour: distances of rows ``begin`` and on to their own set, changed in place."""
    rows = torch.arange(len(distances), device=distances.device)
    distances[rows, rows + begin] = torch.inf


def check_features(**features: torch.Tensor) -> None:
    """Refuses what is no ``(count, D)``, all with the same D, or has values that are not finite.

    Raises:
        ValueError: naming the argument.
    """
    size = next(iter(features.values())).shape[-1:]
    for name, values in features.items():
        if values.ndim != 2 or not values.numel() or values.shape[1:] != size:
            raise ValueError(f"{name} has shape {tuple(values.shape)}; give (count, D), D as of the reference")
        if not bool(torch.isfinite(values).all()):
            raise ValueError(f"{name} has values that are not finite; check the images for NaN")
