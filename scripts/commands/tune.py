"""``fewstep tune``: fit a sampler to a model, a number of steps and a guidance scale."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path
from typing import Any

import click
import torch
from tqdm import tqdm

from fewstep.samplers import DCSolverScheduler, PlanScheduler, fine_trajectory, search_ratios
from fewstep.samplers.trajectory import Network

from ..files import write_json
from ..generation.model import load_model, resolve_device, resolve_name
from ..generation.network import guided_network, latent_shape
from ..generation.record import check_writable
from ..generation.schedulers import parsed_options

_FINE = 200
"""Steps of the runs that count as exact."""


@click.command(context_settings={"show_default": True})
@click.option("--model", required=True, help="digits-small, digits-large, or the folder of a DiT pipeline.")
@click.option("--method", type=click.Choice(["dc"]), default="dc", help="dc: the ratios of DC-Solver.")
@click.option("--steps", type=click.IntRange(3), required=True, help="Network calls of the runs to be tuned.")
@click.option("--guidance-scale", type=click.FloatRange(1.0), default=1.0, help="Classifier-free guidance; 1 is none.")
@click.option("--option", "options", multiple=True, metavar="KEY=VALUE", help="Option of the scheduler; repeatable.")
@click.option("--noises", type=click.IntRange(1), default=10, help="Initial noises that the search sees.")
@click.option("--held-out", type=click.IntRange(2), default=60, help="Others, on which the result is measured.")
@click.option("--refinement", type=click.IntRange(0), default=40, help="Joint adjustments after the paper's search.")
@click.option("--seed", type=click.IntRange(0), default=0, help="Of the noises.")
@click.option("--device", default="auto", help="cpu, cuda, mps or auto.")
@click.option("--output", type=click.Path(path_type=Path), required=True, help="New folder of the scheduler.")
def tune(
    model: str,
    method: str,
    steps: int,
    guidance_scale: float,
    options: tuple[str, ...],
    noises: int,
    held_out: int,
    refinement: int,
    seed: int,
    device: str,
    output: Path,
) -> None:
    """Fit a sampler to a model, a number of steps and a guidance scale.

    Writes a scheduler folder, which generate --sampler FOLDER and DCSolverScheduler.from_pretrained read, and
    tuning.json with the errors to the exact end of the same noises before and after, on noises that the search
    never saw.

    \b
    fewstep tune --model digits-large --steps 5 --guidance-scale 1 --output tuned
    fewstep generate --model digits-large --sampler tuned --steps 5 --guidance-scale 1
    """  # noqa: D301  click wants the backspace itself
    if output.exists() and any(output.iterdir() if output.is_dir() else [output]):
        raise ValueError(f"output {output} exists already; name a new folder")
    check_writable(output)
    loaded = load_model(resolve_name(model), "float32", resolve_device(device))
    scheduler: DCSolverScheduler = parsed_options(DCSolverScheduler, loaded, options)
    scheduler.set_timesteps(steps)
    classes = torch.tensor(loaded.classes)
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(noises + held_out, *latent_shape(loaded), generator=generator).to(loaded.pipeline.device)
    labels = classes[torch.arange(noises + held_out) % len(classes)]
    seen, unseen = drawn[:noises], drawn[noises:]
    networks = [guided_network(loaded, part, guidance_scale) for part in (labels[:noises], labels[noises:])]
    truths = [
        fine_trajectory(scheduler, network, noise, steps=max(_FINE, steps))
        for network, noise in zip(networks, (seen, unseen), strict=True)
    ]
    with tqdm(total=steps, desc="ratios", unit="step") as bar:
        found = search_ratios(
            scheduler,
            networks[0],
            seen,
            truth=truths[0],
            refinement=refinement,
            progress=lambda index, ratio, error: bar.update(),
        )
    tuned = DCSolverScheduler.from_config(scheduler.config, ratios=found.ratios)
    errors = {
        name: _compare(scheduler, tuned, network, noise, truth.samples[-1], steps)
        for name, network, noise, truth in zip(("seen", "held_out"), networks, (seen, unseen), truths, strict=True)
    }
    tuned.save_pretrained(output)
    report = {
        "model": model,
        "method": method,
        "steps": steps,
        "guidance_scale": guidance_scale,
        "noises": noises,
        "seed": seed,
        "refinement": refinement,
        "ratios": found.ratios,
        "network_calls": found.calls,
        "errors": errors,
        "versions": {name: version(name) for name in ("fewstep", "torch", "diffusers")},
    }
    write_json(output / "tuning.json", report)
    click.echo("ratios " + " ".join(f"{ratio:.4f}" for ratio in found.ratios))
    for name, figures in errors.items():
        low, high = figures["change_interval"]
        click.echo(
            f"{name.replace('_', ' '):>8}, {figures['samples']} noises: error {figures['before']:.4f} -> "
            f"{figures['after']:.4f} (median {figures['median_before']:.4f} -> {figures['median_after']:.4f}), "
            f"change {figures['change']:+.1%} (95 %: {low:+.1%} to {high:+.1%})"
        )


def _compare(
    before: PlanScheduler, after: PlanScheduler, network: Network, noise: torch.Tensor, end: torch.Tensor, steps: int
) -> dict[str, Any]:
    """Errors of two schedulers on the same noises, a root mean square over each sample; their mean and median."""
    old, new = ((_run(s, network, noise, steps) - end).flatten(1).square().mean(1).sqrt() for s in (before, after))
    draws = torch.randint(len(noise), (2000, len(noise)), generator=torch.Generator().manual_seed(0))
    changes = new.cpu()[draws].mean(1) / old.cpu()[draws].mean(1) - 1.0
    return {
        "samples": len(noise),
        "before": float(old.mean()),
        "after": float(new.mean()),
        "median_before": float(old.median()),
        "median_after": float(new.median()),
        "change": float(new.mean() / old.mean() - 1.0),
        "change_interval": [float(changes.quantile(q)) for q in (0.025, 0.975)],
    }


def _run(scheduler: PlanScheduler, network: Network, noise: torch.Tensor, steps: int) -> torch.Tensor:
    scheduler.set_timesteps(steps)
    sample = noise * scheduler.init_noise_sigma
    for label in scheduler.timesteps:
        scaled = scheduler.scale_model_input(sample, label)
        sample = scheduler.step(network(scaled, label), label, sample, return_dict=False)[0]
    return sample
