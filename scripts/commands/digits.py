"""``fewstep bench digits``: how good a digit model's images are, with one sampler and several guidance scales."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path
from typing import Any

import click
from diffusers import DiTPipeline

from fewstep.metrics import (
    DigitsClassifier,
    digits_statistics,
    frechet_distance,
)
from fewstep.samplers import SAMPLERS

from ..bench.digits import measure, sampling_bias
from ..files import check_files, write_json
from ..generation.choices import unknown
from ..generation.model import load_model, resolve_device, resolve_name


@click.command()
@click.option("--model", required=True, help="Folder of a DiTPipeline of digits, or a bundled model's name.")
@click.option("--sampler", default="dpm++", show_default=True, help="Name of a sampler.")
@click.option("--steps", type=click.IntRange(1), default=50, show_default=True, help="Sampling steps.")
@click.option("--count", type=click.IntRange(100), default=10000, show_default=True, help="Images a guidance scale.")
@click.option("--guidance-scale", default="1.0", show_default=True, help="One, or several with commas between.")
@click.option("--batch-size", type=click.IntRange(1), default=250, show_default=True, help="Images at a time.")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Seed of the first image.")
@click.option("--device", default="auto", show_default=True, help="cpu, cuda, mps or auto.")
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="File for the figures.")
def digits(
    model: str,
    sampler: str,
    steps: int,
    count: int,
    guidance_scale: str,
    batch_size: int,
    seed: int,
    device: str,
    json_file: Path | None,
) -> None:
    """Measure the images of a digit model.

    The classes 0 to 9 in turn, image K from seed SEED + K whatever the batch. Prints, for every guidance
    scale: the Frechet distance of the bundled classifier's features to MNIST's training set, the inception
    score, the share of images that the classifier takes for the class asked for with its 95 % confidence
    interval, and images a second.

    Few images make a distance larger, whatever their quality. So the floor is printed for as many images: the
    distance of MNIST's 10,000 test images to the training set, and for other counts that distance with the
    sampling bias exchanged for the bias of the count.
    """
    scales = _parse_scales(guidance_scale)
    if sampler not in SAMPLERS:
        raise unknown("sampler", sampler, SAMPLERS)
    check_files(json_file)
    loaded = load_model(resolve_name(model), "float32", resolve_device(device))
    classifier = DigitsClassifier.bundled()
    pipeline = loaded.pipeline
    if not isinstance(pipeline, DiTPipeline) or pipeline.vae.config.out_channels != 1:
        raise ValueError(f"--model {model} is no DiTPipeline of grey images")
    if loaded.classes[:10] != tuple(range(10)):
        raise ValueError(f"--model {model} has {len(loaded.classes)} classes; the digits need 0 to 9")
    pipeline.scheduler = SAMPLERS[sampler].build(loaded.scheduler_config)
    train, test = (digits_statistics(split, classifier) for split in ("train", "test"))
    test_distance = frechet_distance(test.mean, test.covariance, train.mean, train.covariance)
    floor = test_distance + sampling_bias(train, count) - sampling_bias(train, test.count)
    report: dict[str, Any] = {
        "model": model,
        "sampler": sampler,
        "steps": steps,
        "count": count,
        "seed": seed,
        "reference_count": train.count,
        "test_set": {"frechet_distance": test_distance, "count": test.count},
        "floor": {"frechet_distance": floor, "count": count},
        "results": [],
        "versions": {name: version(name) for name in ("fewstep", "torch", "diffusers")},
    }
    click.echo(f"{model}, {sampler}, {steps} steps, {count} images")
    click.echo(
        f"Frechet distances are to {train.count} training images; floor: {floor:.3f} for {count} test images"
        + ("" if count == test.count else f" (extrapolated from {test_distance:.3f} for {test.count})")
    )
    click.echo("guidance  Frechet  inception score  agreement (95 %)        images/s")
    for scale in scales:
        figures = measure(
            pipeline, classifier, train, steps=steps, count=count, scale=scale, batch_size=batch_size, seed=seed
        )
        report["results"].append(figures)
        low, high = figures["class_agreement_interval"]
        click.echo(
            f"{scale:8g}  {figures['frechet_distance']:7.3f}  "
            f"{figures['inception_score']:6.3f} +- {figures['inception_score_spread']:.3f}  "
            f"{figures['class_agreement']:.4f} ({low:.4f} - {high:.4f})  {figures['images_per_second']:8.1f}"
        )
        if json_file is not None:
            write_json(json_file, report)


def _parse_scales(text: str) -> list[float]:
    try:
        scales = [float(part) for part in text.split(",")]
    except ValueError:
        scales = []
    if not scales or not all(1.0 <= scale < 100.0 for scale in scales):
        raise ValueError(f"--guidance-scale {text!r}: give numbers from 1 (no guidance), such as 1,1.5,2")
    return scales
