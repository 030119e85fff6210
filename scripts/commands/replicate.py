"""``fewstep replicate``: every claim of every paper, measured again."""

from __future__ import annotations

from pathlib import Path

import click

from .words import parse_names

_PATH = click.Path(path_type=Path)


@click.command(context_settings={"show_default": True})
@click.option("--quick", is_flag=True, help="Few noises and the small model: minutes, for tests.")
@click.option("--claims", "names", metavar="A,B,...", help="Some of the claims.  [default: all]")
@click.option("--data", type=_PATH, help="An .npz of MNIST's test images; without it, generated digits are restored.")
@click.option("--output", type=_PATH, default=Path("replication"), help="Folder; a run into it goes on.")
def replicate(quick: bool, names: str | None, data: Path | None, output: Path) -> None:
    """Measure the claims of the papers again, on the bundled models and on exact mixtures.

    Writes report.md, report.html (one page with plots and pictures), and report.json. A claim that was measured is
    kept, so that an interrupted run goes on.
    """
    from tqdm import tqdm

    from ..bench.digits import real_digits
    from ..bench.output import table
    from ..files import write_json, write_text
    from ..generation.record import check_writable
    from ..replication.catalogue import CLAIMS
    from ..replication.claims import Scale
    from ..replication.report import markdown, page, report
    from ..replication.run import replicate as measure

    known = {claim.key: claim for claim in CLAIMS}
    keys = list(known) if names is None else list(dict.fromkeys(parse_names("claim", names, known)))
    check_writable(output)
    if data is not None:
        if not data.is_file():
            raise ValueError(f"--data {data} is no file; give an .npz with x_test and y_test")
        real_digits(data, "test")
    scale = Scale(quick, output / "work", data)
    with tqdm(total=len(keys), desc="replicate", unit="claim") as bar:

        def begin(key: str) -> None:
            bar.update(keys.index(key) - bar.n)
            bar.set_postfix(claim=key)

        outcomes = measure([known[key] for key in keys], scale, output, begin)
        bar.update(len(keys) - bar.n)
    write_text(output / "report.md", markdown(outcomes, quick=quick))
    write_text(output / "report.html", page(outcomes, quick=quick))
    write_json(output / "report.json", report(outcomes, quick=quick))
    rows = [[one.claim.key, one.measurement.verdict, f"{one.minutes:.1f}"] for one in outcomes]
    click.echo(table(["claim", "verdict", "minutes"], rows))
