"""``fewstep bench cuda``: all checks and benchmarks that need a CUDA device."""

from __future__ import annotations

from pathlib import Path

import click

_FILE = click.Path(path_type=Path)


@click.command(context_settings={"show_default": True})
@click.option("--tests", type=_FILE, default=Path("tests"), help="Folder of the tests, in a checkout.")
@click.option("--seconds", type=click.FloatRange(0.0), default=0.3, help="Time a cell, at least.")
@click.option("--json", "json_file", type=_FILE, required=True, help="File for everything.")
def cuda(tests: Path, seconds: float, json_file: Path) -> None:
    """Run all checks and benchmarks that need a CUDA device, in less than nine minutes.

    The kernel's tests and the graphs' on the device, steps in which waiting for the device is an error,
    compute-sanitizer's memcheck and racecheck where it is installed, and the benchmarks of steps and whole generations
    with what they are held against.
    """
    from ..bench.cuda import run_all
    from ..bench.loop import loop_table
    from ..bench.step import step_table
    from ..files import check_files, write_json

    check_files(json_file)
    results = run_all(
        tests.resolve(),
        seconds,
        lambda name: click.echo(f"{name} ...", err=True),
        lambda found: write_json(json_file, found),
    )
    write_json(json_file, results)
    if isinstance(results["steps"], list):
        click.echo(step_table([cell for cell in results["steps"] if cell["dtype"] == "float32"]))
    if isinstance(results["loops"], list):
        click.echo(loop_table(results["loops"]))
    for name in ("tests", "synchronisation", "memcheck", "racecheck"):
        result = results[name]
        click.echo(f"{name}: {'passed' if result.get('passed') else result.get('left_out') or 'FAILED'}")
    for name, bar in results["bars"].items():
        click.echo(f"{name}: {bar if isinstance(bar, str) else '{worst:.2f}, bar {bar}'.format(**bar)}")
    parts = {name: part for name, part in results.items() if isinstance(part, dict)}
    failed = [name for name, part in parts.items() if part.get("passed") is False or part.get("failed")]
    if failed:
        raise ValueError(f"{', '.join(failed)} failed; {json_file} says how")
