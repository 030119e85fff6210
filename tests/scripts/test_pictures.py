"""Grids of images: where each stands, and what is written beside it."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from PIL import Image

from fewstep.scripts.generation.pictures import columns_for, image_grid, labelled_grid

COLOURS = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0), (255, 0, 255), (0, 255, 255)]


def box(picture: Image.Image, colour: tuple[int, int, int]) -> tuple[int, int, int, int]:
    """Left, top, right and bottom of the pixels of a colour, all of which must have it."""
    rows, columns = np.nonzero((np.asarray(picture) == colour).all(-1))
    left, top, right, bottom = columns.min(), rows.min(), columns.max() + 1, rows.max() + 1
    assert len(rows) == (right - left) * (bottom - top)
    return int(left), int(top), int(right), int(bottom)


@pytest.mark.parametrize(
    ("count", "conditions", "columns"),
    [(1, 1, 1), (2, 2, 2), (4, 4, 2), (10, 10, 5), (12, 0, 4), (40, 10, 10), (60, 60, 10), (7, 0, 4), (100, 0, 10)],
)
def test_columns(count: int, conditions: int, columns: int) -> None:
    assert columns_for(count, conditions) == columns


def test_small_images_are_magnified_row_by_row() -> None:
    grid = image_grid([Image.new("RGB", (8, 8), colour) for colour in COLOURS[:5]], 3)
    assert grid.size == (3 * 64 + 2 * 2, 2 * 64 + 2)
    for i, colour in enumerate(COLOURS[:5]):
        left, top = i % 3 * 66, i // 3 * 66
        assert box(grid, colour) == (left, top, left + 64, top + 64)


def test_large_images_are_reduced() -> None:
    assert image_grid([Image.new("RGB", (1024, 512), "red")], 1).size == (256, 128)


def test_magnified_pixels_stay_pixels() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32), dtype=np.uint8)
    grid = np.asarray(image_grid([Image.fromarray(pixels)], 1))
    np.testing.assert_array_equal(grid, np.repeat(np.kron(pixels, np.ones((2, 2), np.uint8))[..., None], 3, -1))


def test_labels_stand_beside_rows_and_above_columns() -> None:
    cells = [[Image.new("RGB", (70, 50), COLOURS[3 * r + c]) for c in range(3)] for r in range(2)]
    grid = labelled_grid(cells, ["dpm++", "unipc"], ["5 steps", "10 steps", "20 steps"])
    boxes = [[box(grid, COLOURS[3 * r + c]) for c in range(3)] for r in range(2)]
    for row in boxes:
        assert all(a[2] < b[0] and a[1::2] == b[1::2] for a, b in itertools.pairwise(row))
    for above, below in zip(*boxes, strict=True):
        assert above[3] < below[1]
        assert above[::2] == below[::2]
    dark = np.asarray(grid).max(-1) < 128
    for row in boxes:
        left, top, _, bottom = row[0]
        assert dark[top:bottom, :left].any()
    for left, top, right, _ in boxes[0]:
        assert dark[:top, left:right].any()
        assert not dark[:top, :left].all()
