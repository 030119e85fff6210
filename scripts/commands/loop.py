"""``fewstep bench loop``: whole generations, against the pipelines of diffusers."""

from __future__ import annotations

from pathlib import Path

import click

from .words import parse_names

_FILE = click.Path(path_type=Path)


@click.command(context_settings={"show_default": True})
@click.option("--models", metavar="A,B,...", default="digits-small", help="Some of those named above.")
@click.option("--steps", type=click.IntRange(1), default=20, help="Sampling steps.")
@click.option("--batch", type=click.IntRange(1), help="Images at a time, for throughput.  [default: the model's own]")
@click.option("--seconds", type=click.FloatRange(0.0), default=2.0, help="Time a way to generate, at least.")
@click.option("--device", metavar="NAME", default="cpu", help="cpu, cuda or auto.")
@click.option("--dtype", metavar="NAME", default="float32", help="float32, float16 or bfloat16.")
@click.option("--json", "json_file", type=_FILE, help="File for the figures.")
def loop(
    models: str, steps: int, batch: int | None, seconds: float, device: str, dtype: str, json_file: Path | None
) -> None:
    """Time whole generations, against the pipelines of diffusers.

    From the first noise to pixels: the pipeline with diffusers' DPMSolverMultistepScheduler, the same with ours, our
    loop, and on CUDA our loop as one graph. The latency of one image, and the images a second of a batch. digits-small
    and digits-large are bundled; dit-s2 and sd-unet have the sizes of DiT-S/2 and of Stable Diffusion 1.5, and random
    weights.
    """
    from tqdm import tqdm

    from ..bench.loop import MODELS, loop_table, measure
    from ..bench.output import environment
    from ..files import check_files, write_json
    from ..generation.choices import unknown
    from ..generation.model import DTYPES, resolve_device

    check_files(json_file)
    names = parse_names("models", models, MODELS)
    if dtype not in DTYPES:
        raise unknown("dtype", dtype, DTYPES)
    device = resolve_device(device)
    results = [
        measure(name, seconds, device=device, dtype=dtype, steps=steps, batch=batch)
        for name in tqdm(names, desc="loop", unit="model", leave=False)
    ]
    click.echo(loop_table(results))
    if json_file is not None:
        write_json(json_file, {"environment": environment(device), "results": results})
