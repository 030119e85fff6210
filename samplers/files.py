"""Files that appear whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replaced(path: Path) -> Iterator[Path]:
    """A path beside ``path`` to write to, which takes its place when nothing went wrong."""
    partial = path.with_name(path.name + ".partial")
    yield partial
    os.replace(partial, path)
