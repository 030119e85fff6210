"""The command ``fewstep`` itself: help, version, what it imports, and how it fails."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import version

import pytest

from fewstep.scripts.cli import COMMANDS
from model_folders import assert_refused, invoke


@pytest.mark.parametrize("words", [("--help",), ("-h",)])
def test_help_lists_the_commands(words: tuple[str, ...]) -> None:
    result = invoke(*words)
    assert result.exit_code == 0
    for name, line in COMMANDS.items():
        assert f"  {name} " in result.stdout
        assert line in result.stdout


@pytest.mark.parametrize(
    "command",
    [*((name,) for name in COMMANDS), *(("bench", name) for name in ("step", "orders", "accuracy", "digits"))],
)
def test_every_command_has_help(command: tuple[str, ...]) -> None:
    result = invoke(*command, "--help")
    assert result.exit_code == 0
    assert result.stdout.startswith(f"Usage: main {' '.join(command)} ")
    assert result.stderr == ""


def test_examples_of_generate_stand_on_lines_of_their_own() -> None:
    lines = [line.strip() for line in invoke("generate", "--help").stdout.splitlines()]
    assert "fewstep generate" in lines
    assert "fewstep generate --compare dpm++,deis,unipc --steps 5,10,20" in lines


def test_version() -> None:
    result = invoke("--version")
    assert (result.exit_code, result.stdout) == (0, f"fewstep, version {version('fewstep')}\n")


@pytest.mark.parametrize("words", [(), ("bench",)])
def test_no_command_shows_the_help(words: tuple[str, ...]) -> None:
    result = invoke(*words)
    assert result.exit_code == 2
    assert "Commands:" in result.stderr


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("generat",), "generat"),
        (("bench", "speed"), "speed"),
        (("--colour",), "--colour"),
        (("train",), "RECIPE"),
        (("bench", "digits"), "--model"),
    ],
)
def test_usage_errors_are_one_line(words: tuple[str, ...], said: str) -> None:
    assert_refused(invoke(*words), said)


@pytest.mark.parametrize(
    "words",
    [
        *("--help", "--version", "generate --help", "tune --help", "train --help", "bench --help"),
        *("generate --steps", "tune --steps", "train", "typo"),
    ],
)
def test_help_and_typing_errors_wait_for_no_heavy_import(words: str) -> None:
    program = (
        "import sys\n"
        "from fewstep.scripts.cli import main\n"
        f"try: main({words.split()})\n"
        "except SystemExit: pass\n"
        "print([name for name in ('torch', 'numpy', 'diffusers', 'scipy') if name in sys.modules])\n"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert result.stdout.splitlines()[-1] == "[]", result.stderr
