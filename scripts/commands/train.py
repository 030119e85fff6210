"""``fewstep train``: train the small models that the toolkit measures itself on, or the like of your own images."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from textwrap import shorten
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from diffusers import AutoencoderKL

    from ..training.data import LabelledImages


@dataclass(frozen=True)
class Recipe:
    """What a model is trained with unless the user says otherwise."""

    steps: int
    batch_size: int


RECIPES = {
    "autoencoder": Recipe(2500, 128),
    "digits-small": Recipe(9000, 256),
    "digits-large": Recipe(8000, 128),
    "digits-classifier": Recipe(5000, 128),
    "digits-restore": Recipe(3000, 64),
    "digits-minority": Recipe(4000, 128),
}


@click.command()
@click.argument("recipe", metavar="RECIPE", type=click.Choice(list(RECIPES)))
@click.option("--data", required=True, type=click.Path(path_type=Path), help="An .npz file or a folder of images.")
@click.option("--output", required=True, type=click.Path(path_type=Path), help="Folder of the model.")
@click.option("--steps", type=click.IntRange(1), help="Optimiser steps.  [default: the recipe's]")
@click.option("--batch-size", type=click.IntRange(2), help="Images a step.  [default: the recipe's]")
@click.option("--seed", type=click.IntRange(0, 2**32 - 1), default=0, show_default=True, help="Of weights and draws.")
@click.option("--threads", type=click.IntRange(1), help="CPU threads.  [default: torch's]")
@click.option("--save-every", type=click.IntRange(1), default=500, show_default=True, help="Steps between checkpoints.")
@click.option(
    "--precision",
    type=click.Choice(["float32", "bfloat16"]),
    default="float32",
    show_default=True,
    help="Of the matrix products of digits-small and -large; bfloat16 is the faster one on CPUs with units for it.",
)
@click.option(
    "--autoencoder",
    type=click.Path(path_type=Path),
    help="Folder of the autoencoder that digits-small and digits-large need.",
)
def train(
    recipe: str,
    data: Path,
    output: Path,
    steps: int | None,
    batch_size: int | None,
    seed: int,
    threads: int | None,
    save_every: int,
    precision: str,
    autoencoder: Path | None,
) -> None:
    """Train RECIPE on labelled images and write the model to a folder.

    DATA is an .npz file with x_train, y_train, x_test, y_test (uint8), or a folder <split>/<class>/<image>.
    Images become 32 x 32. RECIPE is one of

    \b
    autoencoder        an AutoencoderKL, for the next two
    digits-small       a DiTPipeline of diffusers; wants an autoencoder that was trained before
    digits-large       the same, eight times as costly
    digits-classifier  a classifier, and the reference statistics of its features
    digits-restore     a RestorationPipeline, which undoes blur and noise, drawn anew in every step
    digits-minority    a classifier of rare digits in the noise of the bundled digits-small and -large

    A training that was stopped goes on from its last checkpoint when the same command is given again, and
    ends with the same weights, bit for bit on the same machine and number of threads.
    """  # noqa: D301  click wants the backspace itself
    import torch

    from fewstep.metrics import DigitsClassifier

    from ..files import write_json
    from ..generation.model import load_model
    from ..training.autoencoder import fingerprint, reconstruction_error, train_autoencoder
    from ..training.classifier import accuracy, reference_statistics, train_classifier
    from ..training.data import load_images
    from ..training.diffusion import NULL_LABEL, train_diffusion
    from ..training.minority import train_minority
    from ..training.restoration import train_restoration

    if threads is not None:
        torch.set_num_threads(threads)
    chosen = RECIPES[recipe]
    steps, batch_size = steps or chosen.steps, batch_size or chosen.batch_size
    if (output / "training.json").exists():
        raise ValueError(f"--output {output} holds a finished training already; name another folder or remove it")
    if output.exists() and not output.is_dir():
        raise ValueError(f"--output {output} is a file; name a folder")
    if output.is_dir() and any(output.iterdir()) and not _settings_file(output / "checkpoint").is_file():
        raise ValueError(f"--output {output} is not empty and holds no training of {recipe}; name a new folder")
    diffusion = recipe in ("digits-small", "digits-large")
    if diffusion and autoencoder is None:
        raise ValueError(f"{recipe} needs --autoencoder; make one with: fewstep train autoencoder")
    if not diffusion and autoencoder is not None:
        raise ValueError(f"--autoencoder is for digits-small and digits-large; {recipe} does not take it")
    if not diffusion and precision != "float32":
        raise ValueError(f"--precision is for digits-small and digits-large; {recipe} trains in float32")
    images = load_images(data)
    if len(images.names) > NULL_LABEL:
        raise ValueError(f"--data {data} has {len(images.names)} classes; at most {NULL_LABEL} can be told apart")
    settings = {
        "recipe": recipe,
        "steps": steps,
        "batch_size": batch_size,
        "seed": seed,
        "precision": precision,
        "data": {"images": len(images), "classes": len(images.names), "sha256": images.fingerprint},
    }
    work = output / "checkpoint"
    extra: dict[str, Any]
    if diffusion:
        assert autoencoder is not None
        vae = _load_autoencoder(autoencoder, images)
        settings["autoencoder"] = fingerprint(vae)
        _begin(work, settings)
        pipeline, record = train_diffusion(
            images,
            vae,
            work,
            size=recipe.removeprefix("digits-"),
            steps=steps,
            batch_size=batch_size,
            precision=getattr(torch, precision),
            seed=seed,
            save_every=save_every,
        )
        pipeline.save_pretrained(output)
        extra = {}
    elif recipe == "autoencoder":
        _begin(work, settings)
        vae, record = train_autoencoder(
            images, work, steps=steps, batch_size=batch_size, seed=seed, save_every=save_every
        )
        vae.save_pretrained(output)
        extra = {"root_mean_square_error": reconstruction_error(vae, images)}
    elif recipe == "digits-restore":
        _begin(work, settings)
        restorer, record = train_restoration(
            images, work, steps=steps, batch_size=batch_size, seed=seed, save_every=save_every
        )
        restorer.save_pretrained(output)
        extra = {}
    elif recipe == "digits-minority":
        if images.images.shape[1] != 1 or len(images.names) > 10:
            raise ValueError(f"--data {data}: digits-minority takes grey images of at most 10 classes, MNIST's")
        test = _test_images(data, images)
        _begin(work, settings)
        model = load_model("digits-small", "float32", "cpu").pipeline
        minority, record, extra = train_minority(
            images,
            test,
            model,
            DigitsClassifier.bundled(),
            work,
            steps=steps,
            batch_size=batch_size,
            seed=seed,
            save_every=save_every,
        )
        minority.save_pretrained(output)
    else:
        splits = {"train": images, "test": _test_images(data, images)}
        _begin(work, settings)
        classifier, record = train_classifier(
            images, work, steps=steps, batch_size=batch_size, seed=seed, save_every=save_every
        )
        classifier.save_pretrained(output)
        for split, part in splits.items():
            reference_statistics(classifier, part).save(output / f"{data.stem}-{split}.safetensors")
        extra = {"test_accuracy": accuracy(classifier, splits["test"])}
    summary = {
        **settings,
        "images_seen": record["images"],
        "minutes": record["minutes"],
        "loss": record["loss"],
        **extra,
        "versions": {name: version(name) for name in ("fewstep", "torch", "diffusers")},
    }
    write_json(output / "training.json", summary)
    shutil.rmtree(work)
    told = "".join(f", {name.replace('_', ' ')} {value:.4g}" for name, value in extra.items())
    click.echo(f"{recipe}: {steps} steps, loss {record['loss']:.4g}{told}; written to {output}")


def _test_images(data: Path, images: LabelledImages) -> LabelledImages:
    """The test images beside those of training."""
    from ..training.data import load_images

    test = load_images(data, split="test")
    if test.images.shape[1] != images.images.shape[1]:
        raise ValueError(f"--data {data}: its train and test images differ in the number of colour channels")
    return test


def _load_autoencoder(path: Path, images: LabelledImages) -> AutoencoderKL:
    """The autoencoder in ``path`` (its own folder, or a pipeline's), if it suits the images."""
    from diffusers import AutoencoderKL
    from safetensors import SafetensorError

    folder = path / "vae" if (path / "vae").is_dir() else path
    try:
        vae = AutoencoderKL.from_pretrained(folder, use_safetensors=True, local_files_only=True)
    except (OSError, ValueError, SafetensorError) as error:
        reason = shorten(str(error), 300, placeholder=" ...")
        raise ValueError(f"--autoencoder {path} holds no autoencoder that can be read: {reason}") from error
    channels, factor = images.images.shape[1], 2 ** (len(vae.config.block_out_channels) - 1)
    if vae.config.in_channels != channels or vae.config.latent_channels != 4 or factor != 4:
        raise ValueError(
            f"--autoencoder {path} has {vae.config.in_channels} colour and {vae.config.latent_channels} latent "
            f"channels at 1/{factor} of the resolution; needed are {channels} and 4 at 1/4: train one on the same data"
        )
    return vae.eval()


def _begin(work: Path, settings: dict[str, Any]) -> None:
    """Makes the checkpoint's folder, or sees to it that the checkpoint in it is one of the same training."""
    from ..files import changed_settings, write_json

    path = _settings_file(work)
    different = changed_settings(path, settings)
    if different:
        raise ValueError(
            f"--output {work.parent} holds a checkpoint of a training with other settings "
            f"({', '.join(different)}); give the same ones, or remove {work} to begin anew"
        )
    if different is None:
        write_json(path, settings)


def _settings_file(work: Path) -> Path:
    return work / "settings.json"
