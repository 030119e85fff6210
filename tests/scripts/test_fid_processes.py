"""``fewstep fid`` on two processes, and killed at any moment: not a bit differs."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from fewstep.scripts.fid import run
from model_folders import invoke

COMMON = ("--samplers", "sde-dpm++", "--steps", "2", "--guidance-scale", "1,2", "--number", "150", "--device", "cpu")
"""Two cells of three chunks: 64, 64 and 22 images."""
CELLS = (("sde-dpm++", 1.0), ("sde-dpm++", 2.0))
BEGINS = (0, 64, 128)

KILLED = """
import os, signal, sys
import torch
from fewstep.scripts.cli import main
from fewstep.scripts.fid import chunks, folder, run
torch.set_num_threads(1)

def deadly(thing, name, count):
    inner, calls = getattr(thing, name), []
    def method(*args, **kwargs):
        calls.append(args)
        if len(calls) > count:
            os.kill(os.getpid(), signal.SIGKILL)
        return inner(*args, **kwargs)
    setattr(thing, name, method)

output, port, *arguments = sys.argv[1:]
points = {
    "before anything": (folder.EvaluationFolder, "begin", 0),
    "before a chunk": (run.Evaluator, "_make", 0),
    "writing a chunk": (chunks, "save", 1),
    "between cells": (run.Evaluator, "_make", 3),
    "after the figures": (chunks.ChunkFiles, "remove", 0),
    "writing figures": (folder, "write_text", 1),
    "at the end": (folder.EvaluationFolder, "finish", 0),
}
for name, point in points.items():
    child = os.fork()
    if child == 0:
        deadly(*point)
        main(["fid", *arguments, "--output", os.path.join(output, name)], standalone_mode=False)
        os._exit(0)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), name, flush=True)

# Two processes of which one is killed, and then the other.
children = []
for rank in range(2):
    children.append(os.fork())
    if children[-1] == 0:
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2")
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
        if rank == 1:
            deadly(run.Evaluator, "_make", 1)
        main(["fid", *arguments, "--output", os.path.join(output, "one of two")], standalone_mode=False)
        os._exit(0)
print(os.waitstatus_to_exitcode(os.waitpid(children[1], 0)[1]), "one of two", flush=True)
os.kill(children[0], signal.SIGKILL)
"""

SHARED = """
import sys
from accelerate import PartialState
from fewstep.scripts.cli import main
from fewstep.scripts.fid import chunks

log, *arguments = sys.argv[1:]
inner = chunks.ChunkFiles.write

def write(self, indices, *rest):
    inner(self, indices, *rest)
    with open(f"{log}-{PartialState().process_index}", "a") as file:
        print(indices.start, file=file)

chunks.ChunkFiles.write = write
main(arguments, standalone_mode=False)
"""


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files of a run of one process that nothing interrupted."""
    output = tmp_path_factory.mktemp("whole") / "fid"
    result = invoke("fid", *COMMON, "--output", output)
    assert result.exit_code == 0, (result.output, result.exception)
    return files(output)


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of runs that have been killed."""
    folder = tmp_path_factory.mktemp("killed")
    told = started(["-c", KILLED, str(folder), free_port(), *COMMON])
    lines = told.stdout.splitlines()
    assert len(lines) == 8, told.stderr
    assert {line.split()[0] for line in lines} == {str(-signal.SIGKILL)}, told.stderr
    return folder


@pytest.fixture
def resumed(monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], None]:
    """Gives the command again and sees to it that exactly what was missing is made."""
    made: list[tuple[str, float | None, int]] = []
    inner = run.call_pipeline

    def call_pipeline(settings, model, scheduler, steps, indices):
        if len(indices) > 1:  # one image alone is the trial before all
            made.append((settings.samplers[0], settings.guidance_scale, indices[0]))
        return inner(settings, model, scheduler, steps, indices)

    def resume(output: Path) -> None:
        before = done(output)
        monkeypatch.setattr(run, "call_pipeline", call_pipeline)
        result = invoke("fid", *COMMON, "--output", output)
        assert result.exit_code == 0, (result.output, result.exception)
        everything = {(*cell, begin) for cell in CELLS for begin in BEGINS}
        assert len(made) == len(set(made))
        assert set(made) == everything - before

    return resume


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def done(output: Path) -> set[tuple[str, float, int]]:
    """Sampler, guidance scale and first image of the chunks that need not be made again."""
    found = set()
    if (output / "fid.json").exists():
        for row in json.loads((output / "fid.json").read_text())["cells"]:
            found |= {(row["sampler"], row["guidance_scale"], begin) for begin in BEGINS}
    for path in output.glob("features/*/[0-9]*.safetensors"):
        sampler, scale = path.parent.name.split("-2-g")
        found.add((sampler, float(scale.split("-")[0]), int(path.stem)))
    return found


def started(arguments: list[str]) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True, timeout=300)


def free_port() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


def launched(program: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Two processes of a program."""
    # Of accelerate's launchers this one starts processes on CPUs too; the one for CPUs wants MPI.
    launch = ["--multi_gpu", "--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no"]
    launch += ["--dynamo_backend", "no", "--main_process_port", free_port()]
    return started(["-m", "accelerate.commands.launch", *launch, str(program), *map(str, arguments)])


POINTS = {
    "before anything": 0,
    "before a chunk": 0,
    "writing a chunk": 1,
    "between cells": 3,
    "after the figures": 3,
    "writing figures": 6,
    "at the end": 6,
    "one of two": 3,
}
"""Where a run is killed -> how many chunks are done by then, at least."""


@pytest.mark.parametrize("point", POINTS)
def test_a_killed_run_goes_on_to_the_same_files(
    point: str, killed: Path, whole: dict[str, bytes], resumed: Callable[[Path], None]
) -> None:
    output = killed / point
    assert POINTS[point] <= len(done(output)) <= POINTS[point] + 2 * (point == "one of two")
    resumed(output)
    assert files(output) == whole


def test_two_processes_make_the_files_of_one(tmp_path: Path, whole: dict[str, bytes]) -> None:
    program, log = tmp_path / "shared.py", tmp_path / "log"
    program.write_text(SHARED)
    told = launched(program, log, "fid", *COMMON, "--output", tmp_path / "fid")
    assert told.returncode == 0, told.stderr
    assert files(tmp_path / "fid") == whole
    assert told.stdout.count("sde-dpm++") == 2  # the table stands there once
    assert Path(f"{log}-0").read_text().split() == ["0", "128"] * 2
    assert Path(f"{log}-1").read_text().split() == ["64"] * 2
