"""``fewstep bench steer``: what steering methods make of equal numbers of network calls, on digits."""

from __future__ import annotations

from pathlib import Path

import click

from .words import parse_names, parse_whole_numbers

_FILE = click.Path(path_type=Path)


@click.command(context_settings={"show_default": True})
@click.option("--data", required=True, type=_FILE, help="MNIST's .npz file, or a folder with folders train/ and test/.")
@click.option("--model", default="digits-small", help="Class-conditional digit model: bundled, or a folder.")
@click.option("--targets", default="8,even", metavar="A,B,...", help="Digits, even or odd.")
@click.option("--methods", metavar="A,B,...", help="Some of the table's methods.  [default: all]")
@click.option("--budgets", default="1,2,5,10", metavar="N,N,...", help="Calls an image, in runs of --steps.")
@click.option("--seeds", type=click.IntRange(1, 1000), default=5, help="Sets of images.")
@click.option("--count", type=click.IntRange(20), default=100, help="Images in a set.")
@click.option("--sampler", default="sde-dpm++", help="Name of a stochastic sampler.")
@click.option("--steps", type=click.IntRange(8), default=10, help="Steps of a run.")
@click.option("--scale", type=click.FloatRange(0.0, min_open=True), default=1.0, help="Inverse temperature lambda.")
@click.option("--batch-size", type=click.IntRange(1), default=100, help="Samples at a time.")
@click.option("--device", default="auto", help="cpu, cuda, mps or auto.")
@click.option("--json", "json_file", type=_FILE, help="File for the figures; a run with it goes on where it stopped.")
@click.option("--plot", "plot_file", type=_FILE, help="File for the picture: png, svg or pdf.")
def steer(
    data: Path,
    model: str,
    targets: str,
    methods: str | None,
    budgets: str,
    seeds: int,
    count: int,
    sampler: str,
    steps: int,
    scale: float,
    batch_size: int,
    device: str,
    json_file: Path | None,
    plot_file: Path | None,
) -> None:
    """Measure steering: digits of some classes from the model without classes.

    The reward is the log-probability of the target by the bundled classifier. A set of images has the budget of as many
    runs an image, counted by the network: a sample of a batch is a call, and the gradients of the reward, which do not
    pass through the network, are none.

    \b
    best-of-n    each image is the best of its own N runs
    best-of-all  the best of the runs of all images together
    importance   drawn from these by exp(lambda reward)
    fk           Feynman-Kac steering, N particles for each image, one kept
    smc          the same with one population for all images
    svdd         SVDD, N candidates for each image, temperature 1 / lambda
    svdd-greedy  the same at temperature 0
    gradient     fk whose proposals follow the reward's gradient; with N = 1
                 gradient guidance alone
    dts          one tree for all images, which are drawn from it
    dts-uniform  the same with uniform selection, whose values have no bias
    dts-star     one tree for all images, which are its best leaves
    dts-star-narrow  the same with widening (1, 0.4), which goes deep earlier

    Frechet: distance of the bundled classifier's features, which the reward shares, from those of the real images.
    Pixel Frechet: of 40 principal components of real digits. Agreement: by a second classifier, Gaussians of these
    components. Distinct: images that are no copies. Few images make every distance larger, whatever their quality; the
    line of real test images has as many. Conditional is the model told the classes.
    """  # noqa: D301  click wants the backspace itself
    from tqdm import tqdm

    from fewstep.samplers import SAMPLERS

    from ..bench.steer import REFERENCES, TARGETS, Bench, Settings
    from ..bench.steer_methods import METHODS
    from ..bench.steer_reference import Reference
    from ..bench.steer_report import Results, claims, plot_steer, read_points, report, steer_table
    from ..files import check_files, write_json
    from ..generation.choices import unknown
    from ..generation.model import resolve_device, resolve_name
    from ..plots import check_plot
    from ..training.data import load_images

    wanted = parse_names("targets", targets, TARGETS)
    names = list(METHODS) if methods is None else parse_names("methods", methods, METHODS)
    if sampler not in SAMPLERS:
        raise unknown("sampler", sampler, SAMPLERS)
    runs = sorted(parse_whole_numbers("budgets", budgets, 1))
    check_files(json_file, plot_file)
    if plot_file is not None:
        check_plot(plot_file)
    settings = Settings(
        model=resolve_name(model),
        data=load_images(data).fingerprint,
        sampler=sampler,
        steps=steps,
        count=count,
        scale=scale,
        device=resolve_device(device),
    )
    points = [] if json_file is None else read_points(json_file, settings)
    known_cells = {(point.seed, point.target, point.method, point.runs) for point in points}
    jobs = []
    for seed in range(seeds):
        for target in wanted:
            for name in (*REFERENCES, *names):
                due = {"real": [0], "conditional": [1]}.get(name, runs)
                missing = [budget for budget in due if (seed, target, name, budget) not in known_cells]
                if missing:
                    jobs.append((target, name, missing, seed))
    if jobs:
        bench = Bench(settings, Reference(data, {name: TARGETS[name] for name in wanted}, count), batch_size)
        for job in tqdm(jobs, desc="steer", unit="cell", leave=False):
            points += bench.measure(*job)
            if json_file is not None:
                write_json(json_file, report(settings, points))
    results = Results(settings, points)
    click.echo(steer_table(results))
    for line in claims(results):
        click.echo(line)
    if plot_file is not None:
        plot_steer(settings, results, plot_file)
