"""``fewstep bench restore``: quality of restored images against network calls."""

from __future__ import annotations

from pathlib import Path

import click

from .words import parse_names, parse_whole_numbers

_FILE = click.Path(path_type=Path)


@click.command(context_settings={"show_default": True})
@click.option("--data", required=True, type=_FILE, help="MNIST's .npz file, or a folder with a folder test/.")
@click.option("--model", default="digits-restore", help="Restoration model: bundled, or a folder.")
@click.option("--methods", metavar="A,B,...", help="Some of the table's methods.  [default: all]")
@click.option("--calls", default="1,2,5,10,20,50,100", metavar="N,N,...", help="Network calls an image.")
@click.option("--count", type=click.IntRange(100), default=500, help="Images.")
@click.option("--batch-size", type=click.IntRange(1), default=100, help="Images at a time.")
@click.option("--seed", type=click.IntRange(0, 2**31 - 1), default=0, help="Image K is degraded by SEED + K.")
@click.option("--device", default="auto", help="cpu, cuda, mps or auto.")
@click.option("--json", "json_file", type=_FILE, help="File for the figures; a run with it goes on where it stopped.")
@click.option("--plot", "plot_file", type=_FILE, help="File for the picture: png, svg or pdf.")
def restore(
    data: Path,
    model: str,
    methods: str | None,
    calls: str,
    count: int,
    batch_size: int,
    seed: int,
    device: str,
    json_file: Path | None,
    plot_file: Path | None,
) -> None:
    """Measure restoration: the MR Sampler, UniPC, and the reverse SDE's own samplers.

    Test images are blurred and made noisy as in the recipe of digits-restore, and restored by every method at every
    number of calls from the same noises. Feature distance: of the bundled classifier's features of an image from those
    of the clean one, the mean. Frechet distance: of the features of all restored images from those of the clean ones.
    Below the table: the fewest calls of the MR Sampler that show no loss against a baseline at its most calls.
    """
    from ..bench.restore import METHODS, Bench, Settings
    from ..bench.restore_report import claims, plot_restore, read_points, report, restore_table
    from ..files import check_files, write_json
    from ..generation.model import resolve_device, resolve_name
    from ..plots import check_plot
    from ..training.data import load_images

    names = list(METHODS) if methods is None else parse_names("methods", methods, METHODS)
    numbers = parse_whole_numbers("calls", calls, 1)
    check_files(json_file, plot_file)
    if plot_file is not None:
        check_plot(plot_file)
    settings = Settings(
        model=resolve_name(model),
        data=load_images(data, split="test").fingerprint,
        count=count,
        seed=seed,
        device=resolve_device(device),
    )
    points = [] if json_file is None else read_points(json_file, settings)
    known = {(point.method, point.calls) for point in points}
    missing = [(name, number) for number in numbers for name in names if (name, number) not in known]
    if missing:
        bench = Bench(settings, data, batch_size)
        if ("degraded", 0) not in known:
            points.append(bench.degraded())
        for name, number in missing:
            points.append(bench.measure(name, number))
            if json_file is not None:
                write_json(json_file, report(settings, points))
    click.echo(restore_table(points))
    for line in claims(points):
        click.echo(line)
    if plot_file is not None:
        plot_restore(settings, points, plot_file)
