"""Where the kernel runs: on CUDA, else in Triton's interpreter, which must be chosen before Triton is imported."""

from __future__ import annotations

import importlib.util
import os

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@pytest.fixture(scope="session")
def device() -> torch.device:
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed: pip install triton")
    from fewstep.samplers.fused.backend import _missing

    if missing := _missing():
        pytest.skip(missing)
    if torch.cuda.is_available() and not INTERPRETED:
        return torch.device("cuda")
    if not INTERPRETED:
        pytest.skip("there is no CUDA device; TRITON_INTERPRET=1 runs these tests on the CPU")
    return torch.device("cpu")
