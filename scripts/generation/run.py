"""Makes the images of a run.

**An image depends on its settings and its own seed, never on the batch that it is made in.** Image ``i`` of a run with
``--seed s`` has the seed ``s + i``: its initial noise comes from ``torch.Generator().manual_seed(s + i)`` on the CPU,
whatever the device, and a stochastic sampler draws from streams of that seed (``PlanScheduler.manual_seed``) or from
the same generator, where the pipeline hands it on. So image ``i`` of ``--seed 7`` is image 0 of ``--seed 7+i`` with the
same condition, and a comparison has the same seeds in every cell.

Equal noise is not yet an equal image: matrix products sum in an order that depends on the number of rows, so a network
gives other last bits in another batch (on CPUs we saw about one part in a million after a single call, which more calls
and rounding to 8 bits make visible now and then). On the CPU, where a batch saves little once a network is large, each
image therefore has the pipeline to itself, and files are equal bit for bit at every ``--batch-size``. On other devices
``--batch-size`` images share a call, images agree up to rounding, and ``--batch-size 1`` gives the same guarantee.
Batches begin at multiples of the batch size and are made whole, so a resumed run repeats the batches of an
uninterrupted one.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
import torch
from PIL import Image
from tqdm import tqdm

from fewstep.samplers import PlanScheduler

from .arguments import pipeline_inputs
from .inputs import open_input
from .model import Model
from .pictures import columns_for, image_grid, labelled_grid, save_image
from .record import GRID, Cell, RunFolder, Settings
from .schedulers import build_scheduler, plain_config, tuning_remarks
from .steered import Steerer, corrected_scheduler

_GRID_IMAGES = 100  # a grid, or a cell of a comparison, shows no more


def generate_images(
    settings: Settings, model: Model, output: Path, batch_size: int
) -> tuple[int, list[dict[str, Any]]]:
    """Makes what is missing of a run: one PNG an image, the grid, and the record.

    Nothing is written before everything has been checked and the first batch has left the pipeline.

    Args:
        settings: checked settings.
        model: the model they name.
        output: the run's folder.
        batch_size: images a call of the pipeline; on the CPU, for inputs of several sizes, and for steered images,
            whose populations are batches of their own, it is always 1.

    Returns:
        The number of images made now, and the accounts of all images if the run is steered.

    Raises:
        ValueError: a scheduler, the pipeline or the folder refuses the settings.
    """
    schedulers = [_build(settings, model, cell) for cell in settings.cells]
    steerers = [
        None if settings.steering is None else Steerer(settings, model, scheduler, cell.steps)
        for cell, scheduler in zip(settings.cells, schedulers, strict=True)
    ]
    folder = RunFolder(output, settings, [plain_config(scheduler) for scheduler in schedulers])
    alone = settings.device == "cpu" or settings.steering is not None or _of_many_sizes(settings)
    size = 1 if alone else batch_size
    missing = {cell: folder.missing(cell) for cell in settings.cells}
    made = sum(map(len, missing.values()))
    if not made and folder.complete:
        return 0, _accounts(settings, folder)
    for remark in tuning_remarks(settings):
        click.echo(remark, err=True)
    total = settings.number * len(settings.cells)
    with tqdm(total=total, initial=total - made, unit="image", file=sys.stderr) as bar:
        for cell, scheduler, steerer in zip(settings.cells, schedulers, steerers, strict=True):
            bar.set_description(f"{cell.name}, {cell.steps} steps")
            for begin in sorted({i // size * size for i in missing[cell]}):
                indices = range(begin, min(begin + size, settings.number))
                if steerer is None:
                    images = call_pipeline(settings, model, scheduler, cell.steps, indices)
                    folder.begin()
                else:
                    image, account = steerer.make(begin)
                    images = [image]
                    folder.begin()
                    folder.save_account(cell, begin, account)
                for i, image in zip(indices, images, strict=True):
                    if i in missing[cell]:
                        save_image(image, folder.image_path(cell, i))
                        bar.update()
    save_image(_picture(settings, folder), output / GRID)
    folder.finish()
    return made, _accounts(settings, folder)


def call_pipeline(
    settings: Settings, model: Model, scheduler: PlanScheduler, steps: int, indices: Sequence[int]
) -> list[Image.Image]:
    """The images of some indices of a run, in one call of the pipeline.

    Args:
        settings: checked settings.
        model: the model they name.
        scheduler: takes the place of the pipeline's.
        steps: of the scheduler.
        indices: which images.

    Raises:
        ValueError: the pipeline refuses a setting, or returns something else than one image an index.
    """
    seeds = [settings.seed_of(i) for i in indices]
    arguments: dict[str, Any] = {
        "num_inference_steps": steps,
        "generator": [torch.Generator().manual_seed(seed) for seed in seeds],
        **pipeline_inputs(settings, model, indices),
    }
    if model.kind == "unconditional":
        arguments["batch_size"] = len(indices)
    scheduler.manual_seed(seeds)
    model.pipeline.scheduler = scheduler
    images = getattr(model.pipeline(**arguments), "images", None)
    if not isinstance(images, list) or len(images) != len(indices) or not isinstance(images[0], Image.Image):
        raise ValueError(f"model {settings.model!r} ({type(model.pipeline).__name__}) does not return images")
    return images


def _build(settings: Settings, model: Model, cell: Cell) -> PlanScheduler:
    if settings.steering is not None and settings.steering.kind.noise == "own":
        return corrected_scheduler(settings, model, cell.steps)
    return build_scheduler(settings, model, cell)


def _accounts(settings: Settings, folder: RunFolder) -> list[dict[str, Any]]:
    return [] if settings.steering is None else folder.accounts()


def _of_many_sizes(settings: Settings) -> bool:
    return len({open_input(name, 1).size for name in settings.inputs}) > 1


def _picture(settings: Settings, folder: RunFolder) -> Image.Image:
    count = min(settings.number, _GRID_IMAGES)
    columns = columns_for(count, len(settings.prompts or settings.classes or settings.inputs))

    def grid(cell: Cell) -> Image.Image:
        images = []
        for i in range(count):
            with Image.open(folder.image_path(cell, i)) as image:
                images.append(image.convert("RGB"))
        return image_grid(images, columns)

    grids = [grid(cell) for cell in settings.cells]
    if not settings.compare:
        return grids[0]
    width = len(settings.steps)
    rows = [grids[r * width : (r + 1) * width] for r in range(len(settings.samplers))]
    names = list(dict.fromkeys(cell.name for cell in settings.cells))
    return labelled_grid(rows, names, [f"{steps} step{'s' * (steps > 1)}" for steps in settings.steps])
