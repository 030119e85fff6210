"""All that only a CUDA device can tell, within nine minutes: tests of the kernel, sanitizers, and the benchmarks."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from fewstep.samplers import SAMPLERS

from . import loop, step
from .output import STABLE_DIFFUSION, environment
from .traffic import copy_bandwidth

LIMIT = 9 * 60
"""Seconds that all parts have together; what does not fit is left out and named."""

_EXPECTED = {"tests": 120, "loops": 90, "memcheck": 90, "racecheck": 90, "compiled": 240}
"""Seconds that a part may take, where it is more than a few."""

TESTS = ("fused", "pipelines/test_loop_graph.py")
"""Below the folder of the tests."""

_SANITIZED = "odd_shapes or memory_formats or clipping or ancestors or draws or guidance"
_LOOPS = (("digits-small", "float32"), ("digits-large", "float32"), ("dit-s2", "float16"), ("sd-unet", "float16"))
_COMPILED = ("dpm++2", "unipc2")
_HALF = ("dpm++2", "unipc2", "sde-dpm++2")


def run_all(
    tests: Path, seconds: float, report: Callable[[str], None], save: Callable[[dict[str, Any]], None]
) -> dict[str, Any]:
    """Runs every part.

    Args:
        tests: folder of the tests.
        seconds: time of a benchmark's cell, at least.
        report: told what begins.
        save: given what there is, after every part.

    Returns:
        results and the time they took, ready for JSON.

    Raises:
        ValueError: there is no CUDA device, or no tests where they should be.
    """
    if not torch.cuda.is_available():
        raise ValueError("there is no CUDA device here, or torch was built without CUDA; run this where there is one")
    missing = [name for name in TESTS if not (tests / name).exists()]
    if missing:
        raise ValueError(f"tests {str(tests)!r} has no {missing[0]}; run this in a checkout, or give its tests folder")
    paths = [str(tests / name) for name in TESTS]
    bandwidth = copy_bandwidth("cuda")
    parts: dict[str, Callable[[], Any]] = {
        "tests": lambda: command(
            [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *paths], tests.parent
        ),
        "synchronisation": check_synchronisation,
        "steps": lambda: _steps(seconds, bandwidth),
        "loops": lambda: [loop.measure(name, seconds, device="cuda", dtype=dtype) for name, dtype in _LOOPS],
        "memcheck": lambda: sanitized("memcheck", paths[0], tests.parent),
        "racecheck": lambda: sanitized("racecheck", paths[0], tests.parent),
        "compiled": lambda: [
            step.measure(name, shape, seconds, device="cuda", bandwidth=bandwidth, compiles=True)
            for name in _COMPILED
            for shape in (step.CUDA_SHAPES[0], step.CUDA_SHAPES[-1])
        ],
    }
    results: dict[str, Any] = {"environment": environment("cuda"), "copy_bytes_per_second": bandwidth}
    taken: dict[str, float] = {}
    begin = time.monotonic()
    for name, part in parts.items():
        if time.monotonic() - begin + _EXPECTED.get(name, 30) > LIMIT:
            results[name] = {"left_out": f"{LIMIT} s were nearly over"}
            continue
        report(name)
        clock = time.monotonic()
        try:
            results[name] = part()
        except Exception as error:  # one part that fails must not take the others' results with it
            results[name] = {"failed": f"{type(error).__name__}: {error}"}
        taken[name] = time.monotonic() - clock
        save({**results, "bars": bars(results), "seconds": taken})
    return {**results, "bars": bars(results), "seconds": taken}


def _steps(seconds: float, bandwidth: float) -> list[dict[str, Any]]:
    cells = [(name, shape, torch.float32) for name in step.PAIRS for shape in step.CUDA_SHAPES]
    cells += [(name, step.CUDA_SHAPES[-1], torch.float16) for name in _HALF]
    return [
        {
            "dtype": str(dtype).removeprefix("torch."),
            **step.measure(name, shape, seconds, device="cuda", dtype=dtype, bandwidth=bandwidth),
        }
        for name, shape, dtype in cells
    ]


def command(words: Sequence[str], folder: Path, timeout: float = LIMIT / 3, **more: str) -> dict[str, Any]:
    """Runs a program.

    Args:
        words: what to run.
        folder: where.
        timeout: seconds after which it has failed.
        more: environment.
    """
    environment_of_run = {**os.environ, "TRITON_INTERPRET": "0", **more}
    try:
        result = subprocess.run(
            list(words), cwd=folder, env=environment_of_run, capture_output=True, text=True, timeout=timeout
        )
    except subprocess.TimeoutExpired:
        return {"passed": False, "timed_out": True, "last_lines": [f"stopped after {timeout:g} s"]}
    lines = (result.stdout + result.stderr).strip().splitlines()
    return {"passed": result.returncode == 0, "timed_out": False, "last_lines": lines[-15:]}


def sanitized(tool: str, tests: str, folder: Path) -> dict[str, Any]:
    """The kernel's tests under a tool of compute-sanitizer, where it is installed.

    Args:
        tool: ``memcheck`` or ``racecheck``.
        tests: their folder.
        folder: where to run.
    """
    places = (shutil.which("compute-sanitizer"), "/usr/local/cuda/bin/compute-sanitizer")
    found = next((place for place in places if place and Path(place).exists()), None)
    if found is None:
        return {"left_out": "compute-sanitizer is not installed; it comes with the CUDA toolkit"}
    pytest = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-k", _SANITIZED, tests]
    # Only the kernel: torch's own are checked by others, and slow under a sanitizer.
    words = [found, "--tool", tool, "--kernel-name", "kernel_substring=plan_call", "--report-api-errors", "no"]
    words += ["--error-exitcode", "9", *pytest]
    result = command(words, folder, timeout=LIMIT / 6, PYTORCH_NO_CUDA_MEMORY_CACHING="1")
    return {"left_out": result["last_lines"][0]} if result["timed_out"] else result


def check_synchronisation() -> dict[str, Any]:
    """Runs of all samplers in which waiting for the device is an error."""
    failed = {}
    cases: list[tuple[str, dict[str, Any]]] = [
        (name, {}) for name in SAMPLERS if not name.startswith("ts-")
    ]  # these choose times by what they see
    cases += [("unipc", {"thresholding": True, "sample_max_value": limit}) for limit in (1.0, 2.0)]
    for name, options in cases:
        scheduler = SAMPLERS[name].build(STABLE_DIFFUSION, **options).manual_seed(0, in_kernel=True)
        x = torch.randn(2, 4, 16, 16, device="cuda")
        for mode in ("default", "error"):  # kernels are compiled in the first run
            scheduler.set_timesteps(6, device="cuda")
            labels = list(scheduler.timesteps)
            torch.cuda.synchronize()
            torch.cuda.set_sync_debug_mode(mode)
            try:
                for label in labels:
                    x = scheduler.step(torch.tanh(x), label, x, return_dict=False)[0]
            except RuntimeError as error:
                failed[f"{name} {options}".removesuffix(" {}")] = str(error)
                break
            finally:
                torch.cuda.set_sync_debug_mode("default")
    return {"passed": not failed, "failed": failed, "runs": len(cases)}


def bars(results: Mapping[str, Any]) -> dict[str, Any]:
    """What the measurements are held against: the worst of each, and whether it is good enough.

    Args:
        results: ``steps`` and ``loops`` as ``run_all`` has them.
    """
    found: dict[str, Any] = {}
    steps, loops = (part if isinstance(part, list) else [] for part in (results.get("steps"), results.get("loops")))
    small = [cell["ratio"] for cell in steps if cell["shape"] == list(step.CUDA_SHAPES[0])]
    large = [cell["limit_us"] / cell["step_us"][0] for cell in steps if cell["shape"] == list(step.CUDA_SHAPES[-1])]
    graphs = [
        r["latency_ms"]["diffusers"] / r["latency_ms"]["our graph"] for r in loops if r["model"] == "digits-small"
    ]
    for name, values, bar in (
        ("step of diffusers over ours, launch-bound", small, 10.0),
        ("part of the copy bandwidth, bandwidth-bound", large, 0.85),
        ("pipeline of diffusers over our graph, digits-small at batch 1", graphs, 3.0),
    ):
        found[name] = {"worst": min(values), "bar": bar, "met": min(values) >= bar} if values else "not measured"
    return found
