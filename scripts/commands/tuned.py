"""``fewstep bench tuned``: fitted samplers against the best of diffusers'."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import click

from .words import parse_names

_FILE = click.Path(path_type=Path)


@click.command(context_settings={"show_default": True})
@click.option("--model", default="digits-large", help="digits-small, digits-large, or mixture: closed-form Gaussians.")
@click.option("--calls", default="4,5,6,8,10", metavar="N,N,...", help="Network calls an image.")
@click.option("--guidance-scale", "scales", default="1,4", metavar="W,W,...", help="1 is none.")
@click.option("--methods", default="unipc,dc,s3,learned", metavar="A,B,...", help="What is compared with diffusers.")
@click.option("--held-out", type=click.IntRange(20), default=200, help="Noises of the errors; no fit sees them.")
@click.option("--images", type=click.IntRange(100), default=1000, help="Samples of the Frechet distances.")
@click.option("--iterations", type=click.IntRange(1), default=30, help="Of learned plans, at most.")
@click.option("--rounds", type=click.IntRange(0), default=8, help="Of the evolution of s3.")
@click.option("--polish", type=click.IntRange(0), default=400, help="Evaluations of continuous changes of s3.")
@click.option("--folder", type=_FILE, required=True, help="Of the fitted schedulers; those in it are used.")
@click.option("--json", "json_file", type=_FILE, help="File for the figures; a run with it goes on where it stopped.")
def tuned(
    model: str,
    calls: str,
    scales: str,
    methods: str,
    held_out: int,
    images: int,
    iterations: int,
    rounds: int,
    polish: int,
    folder: Path,
    json_file: Path | None,
) -> None:
    """Measure fitted samplers against the best of diffusers'.

    For every guidance scale and number of calls: all of diffusers' deterministic schedulers on all their spacings, the
    best of them by the median error on noises of its own; then UniPC of ours at its defaults, DC-Solver, S^3 and a
    learned plan, each fitted on noises of its own. Errors are distances to the exact end of the same noises, per
    sample; intervals are of the change against diffusers, 95 %.
    """
    from ..bench.output import environment
    from ..bench.tuned import METHODS, Comparison, Digits, Mixture, Size, read_results, report, tuned_table
    from ..files import check_files, write_json
    from ..generation.choices import unknown
    from ..generation.model import DIGITS

    wanted, steps = parse_names("method", methods, METHODS), [_number("--calls", word, 3, 50) for word in _list(calls)]
    guidance = [_number("--guidance-scale", word, 1, 100) for word in _list(scales)]
    if model not in (*DIGITS, "mixture"):
        raise unknown("model", model, (*DIGITS, "mixture"))
    check_files(json_file)
    size = Size(held_out, images, iterations, rounds, polish)
    settings = {"model": model, **asdict(size)}
    results = [] if json_file is None else read_results(json_file, settings)
    for scale in guidance:
        comparison = None
        for count in steps:
            known = [r.method for r in results if (r.guidance_scale, r.calls) == (scale, count)]
            missing = [name for name in wanted if name not in known]
            if not missing and "diffusers" in known:
                continue
            if comparison is None:
                subject = Mixture(scale) if model == "mixture" else Digits(model, scale)
                comparison = Comparison(subject, scale, size, folder / model)
            for result in comparison.measure(int(count), missing):
                if result.method not in known:
                    results.append(result)
                if json_file is not None:
                    write_json(json_file, {**report(settings, results), "environment": environment()})
    results = [r for r in results if r.guidance_scale in guidance and r.calls in steps]
    results.sort(key=lambda r: (r.guidance_scale, r.calls, ["diffusers", *METHODS].index(r.method)))
    click.echo(tuned_table(results))


def _list(words: str) -> list[str]:
    return [word.strip() for word in words.split(",")]


def _number(name: str, word: str, low: int, high: int) -> float:
    try:
        value = float(word)
    except ValueError:
        value = float("nan")
    if not low <= value <= high or (name == "--calls" and value != int(value)):
        raise ValueError(f"{name} {word!r} must be a number from {low} to {high}")
    return value
