"""Files that appear whole or not at all."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO


@contextmanager
def replace_file(path: Path) -> Iterator[BinaryIO]:
    """A file to write into that becomes ``path`` in one move when it is complete; its folder is made.

    Raises:
        ValueError: the file cannot be written.
    """
    temporary = path.with_name(f".{path.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with temporary.open("wb") as file:
                yield file
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise ValueError(f"{path} cannot be written: {error.strerror or error}") from error


def write_text(path: Path, text: str) -> None:
    """Writes a text in UTF-8; see `replace_file`."""
    with replace_file(path) as file:
        file.write(text.encode())


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Writes a report as JSON; see `replace_file`."""
    write_text(path, json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """Reads a file of ``write_json``.

    Raises:
        ValueError: it is damaged, or no such file.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read ({error}); choose another folder") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds {type(content).__name__} instead of names and values; choose another folder")
    return content


def changed_settings(path: Path, settings: Mapping[str, Any]) -> list[str] | None:
    """Names of the settings that differ from those that a work was begun with; ``None`` where none was.

    Args:
        path: a file of ``write_json``.
        settings: ready for JSON.

    Raises:
        ValueError: the file is damaged.
    """
    if not path.exists():
        return None
    begun = read_json(path)
    return [name for name in settings if begun.get(name) != settings[name]]


def check_files(*paths: Path | None) -> None:
    """Refuses files that could not be written, before anything is measured.

    Raises:
        ValueError: the folder does not exist or is not writable, or the path is a folder.
    """
    for path in paths:
        if path is None:
            continue
        folder = path.absolute().parent
        if path.is_dir():
            raise ValueError(f"{path} is a folder; give the name of a file")
        if not folder.is_dir():
            raise ValueError(f"{path} cannot be written: there is no folder {path.parent}")
        if not os.access(folder, os.W_OK | os.X_OK):
            raise ValueError(f"{path} cannot be written: the folder {path.parent} is not writable")
