"""``fewstep bench variants``: samplers against one that they vary."""

from __future__ import annotations

from pathlib import Path

import click

from .words import parse_numbers

_FILE = click.Path(path_type=Path)


@click.command(context_settings={"show_default": True})
@click.option(
    "--samplers",
    default="ipndm,ghvb2.8,hb-ipndm",
    metavar="A,B,...",
    help="NAME or NAME:KEY=VALUE:...; the others are compared with the first.",
)
@click.option("--model", default="digits-large", help="digits-small or digits-large.")
@click.option("--steps", type=click.IntRange(1), default=8, help="Sampling steps.")
@click.option("--guidance-scale", "scales", default="7.5,15", metavar="W,W,...", help="1 is none.")
@click.option("--count", type=click.IntRange(100), default=1000, help="Images a sampler.")
@click.option("--json", "json_file", type=_FILE, help="File for the figures; a run with it goes on where it stopped.")
def variants(samplers: str, model: str, steps: int, scales: str, count: int, json_file: Path | None) -> None:
    """Measure samplers against one that they vary: momentum, shifted times.

    The same noises and classes for all, so that changes are between pairs of images and their intervals narrow. The
    magnitude score tells divergence artifacts: how far latents leave the range of those of 50 unguided steps.
    """
    from ..bench.output import environment
    from ..bench.variants import Variants, parse_sampler, read_points, report, variants_table
    from ..files import check_files, write_json
    from ..generation.choices import unknown
    from ..generation.model import DIGITS

    names = [word.strip() for word in samplers.split(",")]
    for name in names:
        parse_sampler(name)
    if model not in DIGITS:
        raise unknown("model", model, DIGITS)
    guidance = parse_numbers("guidance-scale", scales, 1.0, 100.0)
    check_files(json_file)
    settings = {"model": model, "steps": steps, "count": count}
    points = [] if json_file is None else read_points(json_file, settings)
    bench = None
    for scale in guidance:
        for name in names:
            if any((point.sampler, point.guidance_scale) == (name, scale) for point in points):
                continue
            bench = bench or Variants(model, steps, count)
            points.append(bench.measure(name, scale))
            if json_file is not None:
                write_json(json_file, {**report(settings, points), "environment": environment()})
    wanted = [(name, scale) for scale in guidance for name in names]
    chosen = {(point.sampler, point.guidance_scale): point for point in points}
    click.echo(variants_table([chosen[key] for key in wanted]))
