"""``fewstep tune``: fit a sampler to a model, a number of steps and a guidance scale."""

from __future__ import annotations

import shlex
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from fewstep.samplers import PlanScheduler

    from ..generation.model import Model

NOISES = {"dc": 10, "s3": 40, "learned": 50}
"""Initial noises that each method's fit sees, unless the user says otherwise."""

_METHODS = {
    "refinement": "dc",
    **dict.fromkeys(("fitness", "images", "rounds", "polish"), "s3"),
    **dict.fromkeys(("free", "iterations"), "learned"),
}
"""Options of one method -> that method."""


@click.command(context_settings={"show_default": True})
@click.option("--model", required=True, help="digits-small, digits-large, a folder or a hub id.")
@click.option(
    "--method",
    type=click.Choice(list(NOISES)),
    default="dc",
    help="dc: the ratios of DC-Solver; s3: a searched schedule; learned: times and coefficients.",
)
@click.option("--steps", type=click.IntRange(3), required=True, help="Network calls of the runs to be tuned.")
@click.option("--guidance-scale", type=click.FloatRange(1.0), default=1.0, help="Classifier-free guidance; 1 is none.")
@click.option("--prompt", "prompts", multiple=True, help="Of a text model; repeatable, taken in turn.")
@click.option("--option", "options", multiple=True, metavar="KEY=VALUE", help="Option of the scheduler; repeatable.")
@click.option("--noises", type=click.IntRange(1), help="Noises that the fit sees.  [default: 10, 40 or 50 by method]")
@click.option("--held-out", type=click.IntRange(2), default=100, help="Others, on which the result is measured.")
@click.option(
    "--refinement", type=click.IntRange(0), default=40, help="dc: joint adjustments after the paper's search."
)
@click.option("--fitness", type=click.Choice(["error", "frechet"]), default="error", help="s3: what is minimised.")
@click.option("--images", type=click.IntRange(100), default=500, help="s3: of a Frechet distance.")
@click.option("--rounds", type=click.IntRange(0), default=8, help="s3: of the evolution.")
@click.option("--polish", type=click.IntRange(0), default=400, help="s3: evaluations of continuous changes at the end.")
@click.option("--free", default="times,end,labels,scales,weights", help="learned: what is fitted.")
@click.option("--iterations", type=click.IntRange(1), default=30, help="learned: at most.")
@click.option("--seed", type=click.IntRange(0), default=0, help="Of the noises and of the search.")
@click.option("--device", default="auto", help="cpu, cuda, mps or auto.")
@click.option("--output", type=click.Path(path_type=Path), required=True, help="New folder of the scheduler.")
@click.option("--plot", "picture", type=click.Path(path_type=Path), help="Of what was minimised: .png, .svg or .pdf.")
@click.pass_context
def tune(
    ctx: click.Context,
    model: str,
    method: str,
    steps: int,
    guidance_scale: float,
    prompts: tuple[str, ...],
    options: tuple[str, ...],
    noises: int | None,
    held_out: int,
    refinement: int,
    fitness: str,
    images: int,
    rounds: int,
    polish: int,
    free: str,
    iterations: int,
    seed: int,
    device: str,
    output: Path,
    picture: Path | None,
) -> None:
    """Fit a sampler to a model, a number of steps and a guidance scale.

    Writes a scheduler folder, which generate --sampler FOLDER and from_pretrained read, and tuning.json with the
    errors to the exact end of the same noises, UniPC's before and the fitted sampler's after, on noises that the fit
    never saw. A search or fit that was stopped goes on when the same command is given again.

    \b
    fewstep tune --model digits-large --steps 5 --method learned --output tuned
    fewstep generate --model digits-large --sampler tuned --steps 5 --guidance-scale 1
    """  # noqa: D301  click wants the backspace itself
    from ..files import check_files, write_json
    from ..generation.model import load_model, resolve_device, resolve_name
    from ..generation.options import parse_options
    from ..generation.record import check_writable
    from ..plots import check_plot
    from ..tuning.compensated import fit_ratios
    from ..tuning.learned import fit_table
    from ..tuning.report import REPORT, begin, describe, plot
    from ..tuning.searched import error_fitness, frechet_fitness, search
    from ..tuning.task import Conditions, compare

    _check_method(ctx, method, fitness)
    if picture is not None:
        check_plot(picture)
        check_files(picture)
        if method == "dc":
            raise ValueError(f"--plot {picture}: the search of ratios goes step by step, without a curve; leave it out")
    seen_count = noises or NOISES[method]
    own: dict[str, dict[str, Any]] = {
        "dc": {"refinement": refinement},
        "s3": {"fitness": fitness, "images": images, "rounds": rounds, "polish": polish},
        "learned": {"free": _names(free), "iterations": iterations},
    }
    settings: dict[str, Any] = {
        "model": resolve_name(model),
        "method": method,
        "steps": steps,
        "guidance_scale": guidance_scale,
        "prompts": list(prompts),
        "options": parse_options(options),
        "noises": seen_count,
        "held_out": held_out,
        "seed": seed,
        **own[method],
    }
    check_writable(output)
    loaded = load_model(settings["model"], "float32", resolve_device(device))
    if loaded.kind == "restoration":
        raise ValueError(
            f"--model {model} restores images; tune fits samplers of models that generate, such as digits-small"
        )
    conditions = Conditions(loaded, prompts, guidance_scale)
    before = _scheduler("dc-solver", loaded, options, steps)
    judges = None
    if fitness == "frechet":
        judges = [frechet_fitness(loaded, guidance_scale, steps, range(begin, begin + images)) for begin in (0, images)]
    begin(output, settings)

    # Half as many again for when to stop and which to take; none of them is measured on.
    chosen = seen_count // 2 + 1 if method != "dc" else 0
    first, second = seed + seen_count, seed + seen_count + chosen
    seen = conditions.batches(before, range(seed, first))
    validation = conditions.batches(before, range(first, second))
    unseen = conditions.batches(before, range(second, second + held_out))
    tuned: PlanScheduler
    if method == "dc":
        tuned, found = fit_ratios(before, seen[0], refinement)
    elif method == "s3":
        tuned, found = search(
            before,
            *(judges or [error_fitness(batches[0]) for batches in (seen, validation)]),
            rounds=rounds,
            refinement=polish,
            seed=seed,
            archive=output / "schedules.jsonl",
        )
    else:
        start = _scheduler("ddim", loaded, options, steps)
        tuned, found = fit_table(
            start, seen, validation, free=_names(free), iterations=iterations, checkpoint=output / "fit.json"
        )
    errors = {name: compare(before, tuned, batches, steps) for name, batches in (("seen", seen), ("held_out", unseen))}
    tuned.save_pretrained(output)
    versions = {name: version(name) for name in ("fewstep", "torch", "diffusers")}
    write_json(output / REPORT, {**settings, "found": found, "errors": errors, "versions": versions})
    if picture is not None:
        curves = {"best": found["history"]} if method == "s3" else _curves(found["history"])
        plot(picture, curves, "schedules" if method == "s3" else "iterations")
    click.echo(describe(errors))
    words = ["fewstep", "generate", "--model", model, "--sampler", str(output), "--steps", str(steps)]
    if "guidance_scale" in loaded.parameters:
        words += ["--guidance-scale", f"{guidance_scale:.12g}"]
    words += [word for prompt in prompts for word in ("--prompt", prompt)]
    click.echo(f"written to {output}; use it by: {shlex.join(words)}")


def _check_method(ctx: click.Context, method: str, fitness: str) -> None:
    """Refuses options that were given and that the method does not read."""
    for name, owner in _METHODS.items():
        if ctx.get_parameter_source(name) is not click.core.ParameterSource.COMMANDLINE:
            continue
        if owner != method:
            raise ValueError(f"--{name} is for --method {owner}; leave it out or give --method {owner}")
        if name == "images" and fitness != "frechet":
            raise ValueError("--images is for --fitness frechet; leave it out or give --fitness frechet")


def _names(free: str) -> list[str]:
    from fewstep.samplers.plan_numbers import FREE

    names = [name.strip() for name in free.split(",")]
    if unknown := [name for name in names if name not in FREE]:
        raise ValueError(f"--free {unknown[0]!r} is unknown; use some of {','.join(FREE)}")
    return names


def _scheduler(name: str, model: Model, options: tuple[str, ...], steps: int) -> Any:
    """A sampler of the model with its timesteps set."""
    from fewstep.samplers import SAMPLERS

    from ..generation.schedulers import parsed_options

    sampler = SAMPLERS[name]
    scheduler = parsed_options(sampler.scheduler, model, options, **sampler.options)
    scheduler.set_timesteps(steps)
    return scheduler


def _curves(history: list[dict[str, Any]]) -> dict[str, list[float]]:
    """Seen and validation error from every start."""
    return {
        f"{name}, start {reach:g}": [step[key] for step in history if step["reach"] == reach]
        for reach in dict.fromkeys(step["reach"] for step in history)
        for name, key in (("seen", "error"), ("validation", "validation"))
    }
