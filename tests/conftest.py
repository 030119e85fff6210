"""One thread, quiet libraries, and no way to the model hub."""

from __future__ import annotations

import os
from collections.abc import Iterator

# Tensors of the tests are tiny: threads would only wait for each other. Also for the programs that tests start.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from diffusers.utils import logging


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _quiet(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    yield
    logging.set_verbosity(before)
