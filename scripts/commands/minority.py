"""``fewstep bench minority``: rarity and agreement against the scale of minority guidance."""

from __future__ import annotations

from pathlib import Path

import click

from .words import parse_numbers, parse_whole_numbers

_FILE = click.Path(path_type=Path)


@click.command(context_settings={"show_default": True})
@click.option("--data", required=True, type=_FILE, help="MNIST's .npz file, or a folder with train/ and test/.")
@click.option("--model", default="digits-small", help="digits-small or digits-large.")
@click.option("--guidance-scale", "weights", default="1,2", metavar="W,W,...", help="Classifier-free; 1 is none.")
@click.option("--scales", default="0.5,1,2,4", metavar="S,S,...", help="Of minority guidance by the classifier.")
@click.option("--self-scales", default="0.1,0.3", metavar="S,S,...", help="Of self-guidance; an empty text for none.")
@click.option("--target", default="9", metavar="L,L,...", help="Classes of the classifier, from 0 (common) to 9.")
@click.option("--sampler", default="dpm++", help="Name of a sampler.")
@click.option("--steps", type=click.IntRange(1), default=10, help="Sampling steps.")
@click.option("--count", type=click.IntRange(100), default=1000, help="Images a point.")
@click.option("--json", "json_file", type=_FILE, help="File for the figures; a run with it goes on where it stopped.")
@click.option("--plot", "plot_file", type=_FILE, help="File for the picture: png, svg or pdf.")
def minority(
    data: Path,
    model: str,
    weights: str,
    scales: str,
    self_scales: str,
    target: str,
    sampler: str,
    steps: int,
    count: int,
    json_file: Path | None,
    plot_file: Path | None,
) -> None:
    """Measure minority guidance: rarity among real digits, and agreement with the digit asked for.

    The same noises and classes at every scale, so that changes against scale 0 are between pairs of images and their
    intervals narrow. Rarity is that among 5000 test images, by the bundled classifier's features; the first line is of
    training images. The last column says whether the intervals of all three changes of rarity are above 0, and whether
    agreement holds: the interval of its change has 0, or the loss is below 1 point.
    """
    from fewstep.samplers import SAMPLERS

    from ..bench.digits import real_digits
    from ..bench.minority import (
        REAL,
        REFERENCE,
        Bench,
        Point,
        minority_table,
        plot_minority,
        read_points,
        real_features,
        report,
    )
    from ..bench.output import environment
    from ..files import check_files, write_json
    from ..generation.choices import unknown
    from ..generation.model import DIGITS
    from ..plots import check_plot

    if model not in DIGITS:
        raise unknown("model", model, DIGITS)
    if sampler not in SAMPLERS:
        raise unknown("sampler", sampler, SAMPLERS)
    guidance = parse_numbers("guidance-scale", weights, 1.0, 100.0)
    strengths = {
        "minority": parse_numbers("scales", scales, 0.0, 1000.0),
        "self-minority": parse_numbers("self-scales", self_scales, 0.0, 1000.0, empty=True),
    }
    classes = parse_whole_numbers("target", target, 0, 9)
    check_files(json_file, plot_file)
    if plot_file is not None:
        check_plot(plot_file)
    reference = real_digits(data, "test")
    settings = {
        "model": model,
        "data": reference.fingerprint,
        "sampler": sampler,
        "steps": steps,
        "count": count,
        "target": classes,
    }
    points = [] if json_file is None else read_points(json_file, settings)
    wanted = [(REAL, 1.0, 0.0)]
    for weight in guidance:
        wanted.append(("minority", weight, 0.0))
        wanted += [(name, weight, s) for name, numbers in strengths.items() for s in numbers if s > 0.0]
    known = {(point.method, point.guidance_scale, point.scale) for point in points}
    missing = [key for key in wanted if key not in known]
    if missing:
        bench = Bench(model, sampler, steps, count, classes, real_features(reference, REFERENCE)[0])
        for method, weight, scale in missing:
            if method == REAL:
                figures = bench.figures(*real_features(real_digits(data, "train"), count))
                points.append(Point(REAL, weight, scale, figures))
            else:
                points.append(bench.measure(method, weight, scale))
            if json_file is not None:
                write_json(json_file, {**report(settings, points), "environment": environment()})
    chosen = [point for point in points if (point.method, point.guidance_scale, point.scale) in wanted]
    click.echo(minority_table(chosen))
    if plot_file is not None:
        plot_minority(settings, chosen, plot_file)
