"""``fewstep bench stitch``: distance and time against the share of the steps that a small model makes."""

from __future__ import annotations

from pathlib import Path

import click

from .words import parse_numbers

_FILE = click.Path(path_type=Path)
_ALL = ",".join(f"{k / 10:g}" for k in range(11))


@click.command(context_settings={"show_default": True})
@click.option("--small", default="digits-small", help="Model of the early steps: bundled, or a folder.")
@click.option("--large", default="digits-large", help="Model of the other steps.")
@click.option("--fractions", default=_ALL, metavar="A,B,...", help="Shares of the steps by the small model.")
@click.option("--sampler", default="dpm++", help="Name of a sampler.")
@click.option("--steps", type=click.IntRange(1), default=20, help="Sampling steps.")
@click.option("--count", type=click.IntRange(100), default=10000, help="Images a fraction.")
@click.option("--guidance-scale", type=click.FloatRange(1.0), default=1.0, help="Classifier-free guidance; 1 is none.")
@click.option("--batch-size", type=click.IntRange(1), default=250, help="Images at a time.")
@click.option("--seed", type=click.IntRange(0), default=0, help="Seed of the first image.")
@click.option("--device", default="auto", help="cpu, cuda, mps or auto.")
@click.option("--json", "json_file", type=_FILE, help="File for the figures; a run with it goes on where it stopped.")
@click.option("--plot", "plot_file", type=_FILE, help="File for the picture: png, svg or pdf.")
def stitch(
    small: str,
    large: str,
    fractions: str,
    sampler: str,
    steps: int,
    count: int,
    guidance_scale: float,
    batch_size: int,
    seed: int,
    device: str,
    json_file: Path | None,
    plot_file: Path | None,
) -> None:
    """Measure T-Stitch: a small model makes the early steps, a large one the rest.

    The same noises and classes at every fraction, so that changes against the large model alone are between pairs of
    images and their intervals narrow. Few images make every distance larger, whatever their quality; compare
    distances of one --count.
    """
    from fewstep.samplers import SAMPLERS

    from ..bench.stitch import Curve, Settings, plot_stitch, read_points, report, stitch_table
    from ..files import check_files, write_json
    from ..generation.choices import unknown
    from ..generation.model import resolve_device, resolve_name
    from ..plots import check_plot

    chosen = parse_numbers("fractions", fractions, 0.0, 1.0)
    if sampler not in SAMPLERS:
        raise unknown("sampler", sampler, SAMPLERS)
    check_files(json_file, plot_file)
    if plot_file is not None:
        check_plot(plot_file)
    settings = Settings(
        small=resolve_name(small),
        large=resolve_name(large),
        sampler=sampler,
        steps=steps,
        count=count,
        guidance_scale=guidance_scale,
        batch_size=batch_size,
        seed=seed,
        device=resolve_device(device),
    )
    points = [] if json_file is None else read_points(json_file, settings)
    known = {point.fraction for point in points}
    missing = [fraction for fraction in chosen if fraction not in known]
    if missing:
        curve = Curve(settings)
        curve.warm_up()
        for fraction in missing:
            points.append(curve.measure(fraction))
            if json_file is not None:
                write_json(json_file, report(settings, points))
    click.echo(stitch_table(points))
    if plot_file is not None:
        plot_stitch(settings, points, plot_file)
