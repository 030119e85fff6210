"""Quiet libraries, no way to the model hub, and the command line as a function."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from diffusers.utils import logging


@pytest.fixture(autouse=True)
def _quiet(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    yield
    logging.set_verbosity(before)
