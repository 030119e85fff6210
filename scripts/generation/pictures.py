"""Image files, written atomically, and grids of images."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from ..files import replace_file

_SMALLEST, _LARGEST = 64, 256  # side of an image in a grid, pixels
_GAP, _MARGIN = 2, 8
_FONT_SIZE = 14


def save_image(image: Image.Image, path: Path) -> None:
    """Writes a PNG; the file appears whole or not at all."""
    with replace_file(path) as file:
        image.save(file, format="PNG")


def columns_for(count: int, conditions: int) -> int:
    """Columns of a grid: one a condition where images go round them several times, else what leaves least empty.

    Args:
        count: images.
        conditions: prompts or classes that they go round.
    """
    if 1 < conditions <= 20 and count > conditions:
        return conditions
    narrowest = math.ceil(math.sqrt(count))
    widths = range(narrowest, math.ceil(1.6 * narrowest) + 1)
    return min(widths, key=lambda columns: (-count % columns, columns))


def image_grid(images: Sequence[Image.Image], columns: int) -> Image.Image:
    """Images side by side, row by row; small ones are magnified by a whole number, large ones reduced.

    Args:
        images: at least one; those smaller than the largest leave white to their right and below.
        columns: images a row.
    """
    images = [_fit(image) for image in images]
    width, height = (max(image.size[axis] for image in images) for axis in (0, 1))
    columns = min(columns, len(images))
    rows = math.ceil(len(images) / columns)
    grid = Image.new("RGB", (columns * (width + _GAP) - _GAP, rows * (height + _GAP) - _GAP), "white")
    for i, image in enumerate(images):
        grid.paste(image, (i % columns * (width + _GAP), i // columns * (height + _GAP)))
    return grid


def labelled_grid(cells: Sequence[Sequence[Image.Image]], rows: Sequence[str], columns: Sequence[str]) -> Image.Image:
    """A table of pictures with a name beside every row and above every column.

    Args:
        cells: one picture a row and column, all of one size.
        rows: one name a row.
        columns: one name a column.
    """
    font = ImageFont.load_default(_FONT_SIZE)
    width, height = cells[0][0].size
    left = _MARGIN + math.ceil(max(font.getlength(name) for name in rows)) + _MARGIN
    width = max(width, math.ceil(max(font.getlength(name) for name in columns)))
    top = 2 * _MARGIN + _FONT_SIZE
    size = (left + len(columns) * (width + _MARGIN), top + len(rows) * (height + _MARGIN))
    grid = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(grid)
    for c, name in enumerate(columns):
        draw.text((left + c * (width + _MARGIN) + width / 2, top / 2), name, fill="black", font=font, anchor="mm")
    for r, name in enumerate(rows):
        y = top + r * (height + _MARGIN)
        draw.text((_MARGIN, y + height / 2), name, fill="black", font=font, anchor="lm")
        for c, cell in enumerate(cells[r]):
            grid.paste(cell, (left + c * (width + _MARGIN), y))
    return grid


def _fit(image: Image.Image) -> Image.Image:
    image = image.convert("RGB")
    side = max(image.size)
    if side < _SMALLEST:
        factor = math.ceil(_SMALLEST / side)
        return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
    if side > _LARGEST:
        image.thumbnail((_LARGEST, _LARGEST), Image.Resampling.LANCZOS)
    return image
