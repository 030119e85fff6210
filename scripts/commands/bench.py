"""``fewstep bench``: cost of a step, order of convergence, accuracy a network call, and quality on digits."""

from __future__ import annotations

import importlib
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

_FILE = click.Path(path_type=Path)
_LATER = {
    "loop": "Time whole generations, against the pipelines of diffusers.",
    "cuda": "Run all checks and benchmarks that need a CUDA device.",
    "digits": "Measure the images of a digit model.",
    "stitch": "Measure T-Stitch: a small model makes the early steps.",
    "tuned": "Measure tuned samplers against the best of diffusers.",
    "variants": "Measure samplers against one that they vary: momentum, shifted times.",
    "minority": "Measure minority guidance: rarity and agreement against its scale.",
    "restore": "Measure restoration of degraded digits against network calls.",
    "steer": "Measure steering towards some digits against network calls.",
}
"""Subcommands in files of their own, and their lines in the help."""


class _BenchGroup(click.Group):
    """Imports the subcommands of ``_LATER``, which need the metrics, on their first use."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return [*super().list_commands(ctx), *_LATER]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _LATER:
            return super().get_command(ctx, cmd_name)
        command: click.Command = getattr(importlib.import_module(f"{__package__}.{cmd_name}"), cmd_name)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        commands = [(name, command.get_short_help_str(80)) for name, command in self.commands.items()]
        with formatter.section("Commands"):
            formatter.write_dl([*sorted(commands), *_LATER.items()])


@click.group(cls=_BenchGroup)
def bench() -> None:
    """Measure samplers."""


@bench.command()
@click.option("--samplers", metavar="A,B,...", help="Some of the table's lines.  [default: all]")
@click.option("--seconds", type=click.FloatRange(0.0), default=1.0, show_default=True, help="Time a cell, at least.")
@click.option("--device", metavar="NAME", default="cpu", show_default=True, help="cpu, cuda or auto.")
@click.option("--dtype", metavar="NAME", default="float32", show_default=True, help="float32, float16 or bfloat16.")
@click.option(
    "--backend", type=click.Choice(["torch", "compile", "triton"]), help="Of our steps.  [default: by the device]"
)
@click.option("--compiled", is_flag=True, help="Also time diffusers' step under torch.compile; takes a minute a cell.")
@click.option("--json", "json_file", type=_FILE, help="File for the figures.")
def step(
    samplers: str | None,
    seconds: float,
    device: str,
    dtype: str,
    backend: str | None,
    compiled: bool,
    json_file: Path | None,
) -> None:
    """Time a step without the network, against diffusers.

    Whole runs of 20 steps, ours and diffusers' in turn, on three shapes of the sample (on CUDA four); the median. Also
    how many tensor operations a step takes, and how long set_timesteps takes. On CUDA also which part of the bandwidth
    of a copy, measured in the same run, our step reaches.
    """
    from tqdm import tqdm

    from ..bench.output import environment
    from ..bench.step import CUDA_SHAPES, PAIRS, SHAPES, STEPS, measure, step_table
    from ..bench.traffic import copy_bandwidth
    from ..files import check_files, write_json
    from ..generation.choices import unknown
    from ..generation.model import DTYPES, resolve_device

    check_files(json_file)
    names = list(PAIRS) if samplers is None else samplers.split(",")
    for name in names:
        if name not in PAIRS:
            raise unknown("samplers", name, PAIRS)
    if dtype not in DTYPES:
        raise unknown("dtype", dtype, DTYPES)
    device = resolve_device(device)
    on_cuda = device.startswith("cuda")
    bandwidth = copy_bandwidth(device) if on_cuda else None
    cells = [(name, shape) for name in names for shape in (CUDA_SHAPES if on_cuda else SHAPES)]
    options: dict[str, Any] = {
        "device": device,
        "dtype": DTYPES[dtype],
        "backend": backend,
        "bandwidth": bandwidth,
        "compiles": compiled,
    }
    results = [
        measure(name, shape, seconds, **options) for name, shape in tqdm(cells, desc="step", unit="cell", leave=False)
    ]
    click.echo(step_table(results))
    if json_file is not None:
        write_json(
            json_file,
            {
                "environment": environment(device),
                "dtype": dtype,
                "backend": backend,
                "copy_bytes_per_second": bandwidth,
                "steps": STEPS,
                "results": results,
            },
        )


@bench.command()
@click.option("--json", "json_file", type=_FILE, help="File for the figures.")
@click.option("--markdown", "markdown_file", type=_FILE, help="File for the table.")
def orders(json_file: Path | None, markdown_file: Path | None) -> None:
    """Measure orders of convergence, and compare them with the stated ones.

    Every sampler, diffusers' classes, and k-diffusion and azula where they are installed, on a mixture of two Gaussians
    whose trajectories are known, over a smooth grid of uneven steps. Of SDE solvers it is the drift, with the noise
    switched off. The columns N hold the largest error after N steps.
    """
    from tqdm import tqdm

    from ..bench.foreign import missing
    from ..bench.orders import all_orders, orders_table
    from ..bench.output import environment
    from ..files import check_files, write_json, write_text

    check_files(json_file, markdown_file)
    results = list(tqdm(all_orders(), desc="orders", unit="solver", leave=False))
    click.echo(orders_table(results))
    for library in missing():
        click.echo(f"left out: {library} is not installed")
    if json_file is not None:
        content = [{**asdict(result), "measured": result.order} for result in results]
        write_json(json_file, {"environment": environment(), "missing": missing(), "results": content})
    if markdown_file is not None:
        write_text(markdown_file, orders_table(results, markdown=True) + "\n")


@bench.command()
@click.option("--json", "json_file", type=_FILE, help="File for the figures.")
@click.option("--plot", "plot_file", type=_FILE, help="File for the picture: png, svg or pdf.")
def accuracy(json_file: Path | None, plot_file: Path | None) -> None:
    """Measure the error over the number of network calls, against diffusers.

    A mixture of Gaussians in 64 dimensions, the noise schedule of Stable Diffusion, and the root mean square distance
    of the samples from where the exact probability flow ends, over 64 noises.
    """
    from tqdm import tqdm

    from ..bench.accuracy import accuracy_curves, accuracy_table, plot_accuracy
    from ..bench.output import environment
    from ..files import check_files, write_json
    from ..plots import check_plot

    check_files(json_file, plot_file)
    if plot_file is not None:
        check_plot(plot_file)
    curves = list(tqdm(accuracy_curves(), desc="accuracy", unit="curve", leave=False))
    click.echo(accuracy_table(curves))
    if json_file is not None:
        write_json(json_file, {"environment": environment(), "curves": [asdict(curve) for curve in curves]})
    if plot_file is not None:
        plot_accuracy(curves, plot_file)


@bench.command()
@click.option("--json", "json_file", type=_FILE, required=True, help="File for the table.")
def presets(json_file: Path) -> None:
    """Search for the options of preset="accurate", for samplers/presets.json."""
    from ..bench.presets import measure_presets, write_presets
    from ..files import check_files

    check_files(json_file)
    write_presets(measure_presets(), json_file)
