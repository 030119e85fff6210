from __future__ import annotations

import warnings
from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def _alone() -> Iterator[None]:
    """Tensors of these tests are tiny, so threads only wait; diffusers divides by zero where it is compared."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=RuntimeWarning, module="diffusers")
        yield
    torch.set_num_threads(threads)
