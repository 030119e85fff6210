"""What is distributed: the wheel's contents, its metadata, the public names and what importing them costs."""

import ast
import importlib
import importlib.metadata
import inspect
import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from email import message_from_bytes
from email.message import Message
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ROOMS = ("samplers", "guidance", "metrics", "scripts")
ARROWS = {
    "samplers": set(),
    "guidance": {"samplers"},
    "metrics": {"samplers"},
    "scripts": {"samplers", "guidance", "metrics"},
}
"""The rooms that a room may import."""


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what the wheel is built from, so that building leaves nothing in the checkout."""
    copy = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    for room in ROOMS:
        shutil.copytree(ROOT / room, copy / room, ignore=shutil.ignore_patterns("__pycache__"))
    return copy


@pytest.fixture(scope="module")
def wheel(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[zipfile.ZipFile]:
    """The wheel, built without network by the setuptools that is installed."""
    target = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(target), str(source)]
    result = subprocess.run(command, cwd=target, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stdout + result.stderr
    (path,) = target.glob("*.whl")
    with zipfile.ZipFile(path) as archive:
        yield archive


@pytest.fixture(scope="module")
def information(wheel: zipfile.ZipFile) -> dict[str, bytes]:
    """The files of the wheel's dist-info folder by their names in it."""
    return {
        name.split("/", 1)[1]: wheel.read(name)
        for name in wheel.namelist()
        if name.split("/")[0].endswith(".dist-info")
    }


@pytest.fixture(scope="module")
def metadata(information: dict[str, bytes]) -> Message:
    return message_from_bytes(information["METADATA"])


def test_wheel_holds_every_module_and_data_file(source: Path, wheel: zipfile.ZipFile) -> None:
    expected = {
        f"fewstep/{path.relative_to(source).as_posix()}"
        for room in ROOMS
        for path in (source / room).rglob("*")
        if path.suffix in {".py", ".json", ".safetensors"} or path.name == "py.typed"
    }
    assert {name for name in wheel.namelist() if ".dist-info/" not in name} == expected


@pytest.mark.parametrize("room", ROOMS)
def test_wheel_offers_every_room_with_its_types(wheel: zipfile.ZipFile, room: str) -> None:
    assert {f"fewstep/{room}/__init__.py", f"fewstep/{room}/py.typed"} <= set(wheel.namelist())


def test_wheel_claims_one_top_level_name_and_leaves_it_a_namespace(
    wheel: zipfile.ZipFile, information: dict[str, bytes], metadata: Message
) -> None:
    assert {name.split("/")[0] for name in wheel.namelist()} == {
        "fewstep",
        f"fewstep-{metadata['Version']}.dist-info",
    }
    assert information["top_level.txt"].split() == [b"fewstep"]
    assert "fewstep/__init__.py" not in wheel.namelist()


def test_wheel_is_pure_and_carries_its_licence(information: dict[str, bytes], metadata: Message) -> None:
    assert b"Tag: py3-none-any" in information["WHEEL"]
    assert metadata["License-Expression"] == "Apache-2.0"
    assert information["licenses/LICENSE"] == (ROOT / "LICENSE").read_bytes()


def test_wheel_works_from_its_own_folder(wheel: zipfile.ZipFile, tmp_path: Path) -> None:
    wheel.extractall(tmp_path)
    program = (
        "import importlib, fewstep\n"
        "assert fewstep.__file__ is None, fewstep\n"
        f"for room in {ROOMS}: print(importlib.import_module('fewstep.' + room).__file__)\n"
    )
    expected = [str(tmp_path / "fewstep" / room / "__init__.py") for room in ROOMS]
    assert _run(program, cwd=tmp_path, PYTHONPATH=str(tmp_path)).splitlines() == expected


def test_console_script_is_declared_and_loads(information: dict[str, bytes]) -> None:
    assert b"fewstep = fewstep.scripts.cli:main" in information["entry_points.txt"].splitlines()
    (script,) = importlib.metadata.entry_points(group="console_scripts", name="fewstep")
    assert callable(script.load())


def test_every_import_is_a_declared_requirement(metadata: Message) -> None:
    declared = {
        re.split(r"[^\w.-]", requirement)[0].lower().replace("_", "-")
        for requirement in metadata.get_all("Requires-Dist", [])
    }
    owners = importlib.metadata.packages_distributions()
    for path in (path for room in ROOMS for path in sorted((ROOT / room).rglob("*.py"))):
        for module in _absolute_imports(path):
            name = module.split(".")[0]
            # Triton comes with torch where there is one.
            if name in sys.stdlib_module_names or name in {"fewstep", "triton"}:
                continue
            found = {owner.lower().replace("_", "-") for owner in owners.get(name, [name])}
            assert found & declared, f"{path.relative_to(ROOT)} imports {module}, which pyproject.toml does not require"


@pytest.mark.parametrize("room", ROOMS)
def test_rooms_import_each_other_one_way(room: str) -> None:
    for path in sorted((ROOT / room).rglob("*.py")):
        modules = [module.split(".") for module in _absolute_imports(path)]
        others = {parts[1] for parts in modules if parts[0] == "fewstep"}
        assert others <= ARROWS[room], f"{path.relative_to(ROOT)} imports {others - ARROWS[room]}"


@pytest.mark.parametrize("room", ["samplers", "guidance", "metrics"])
def test_public_names_are_those_of_all_and_are_documented(room: str) -> None:
    package = importlib.import_module(f"fewstep.{room}")
    assert len(set(package.__all__)) == len(package.__all__)
    visible = {
        name
        for name, value in vars(package).items()
        if not name.startswith("_") and not inspect.ismodule(value) and name != "annotations"
    }
    assert visible <= set(package.__all__)
    undocumented = [
        f"{name}.{member}" if member else name
        for name in package.__all__
        for member, value in _documentable(getattr(package, name))
        if not (value.__doc__ if inspect.isclass(value) else inspect.getdoc(value))
    ]
    assert not undocumented


def test_samplers_import_no_heavy_package() -> None:
    heavy = ("accelerate", "matplotlib", "scipy.stats", "torchmetrics", "transformers")
    program = f"import sys, fewstep.samplers\nprint([name for name in {heavy} if name in sys.modules])"
    assert _run(program).strip() == "[]"


def test_the_sampler_of_the_contributors_guide_works() -> None:
    guide = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"```python\n(.*?)```", guide, flags=re.DOTALL)
    program = example.replace("from .", "from fewstep.samplers.") + (
        "from fewstep.samplers import SAMPLERS\n"
        "same = [SAMPLERS[name].build({}) for name in ('adams-bashforth', 'dpm++-heun')]\n"
        "for scheduler in same: scheduler.set_timesteps(15)\n"
        "print(same[0].plan.calls == same[1].plan.calls)\n"
    )
    assert _run(program).strip() == "True"


def _run(program: str, cwd: Path | None = None, **environment: str) -> str:
    """What a fresh interpreter prints, with no way to the model hub."""
    result = subprocess.run(
        [sys.executable, "-c", program],
        cwd=cwd,
        env={**os.environ, "HF_HUB_OFFLINE": "1", **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def _absolute_imports(path: Path) -> list[str]:
    """Dotted names that a module imports by their full name, wherever in it the import stands."""
    names = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module is not None:
            names.append(node.module)
    return names


def _documentable(value: object) -> Iterator[tuple[str, object]]:
    """A function or class itself, under the empty name, and the methods and properties that a class adds."""
    if inspect.isfunction(value) or inspect.isclass(value):
        yield "", value
    if inspect.isclass(value):
        for name, member in vars(value).items():
            if name.startswith("_"):
                continue
            if isinstance(member, classmethod | staticmethod):
                member = member.__func__
            if inspect.isfunction(member) or isinstance(member, property):
                yield name, member
