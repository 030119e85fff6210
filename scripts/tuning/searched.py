"""``--method s3``: the times and the solver of every step by evolutionary search."""

from __future__ import annotations

from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from diffusers import DiTPipeline
from tqdm import tqdm

from fewstep.metrics import DigitsClassifier, FeatureStatistics, digits_statistics, frechet_distance
from fewstep.samplers import PlanScheduler, SearchedScheduler, SearchSettings, search_schedule, trajectory_fitness
from fewstep.samplers.usf.evolution import Fitness

from ..bench.digits import features_of, generate
from ..generation.model import BUNDLED, Model
from .task import Batch


def search(
    start: PlanScheduler,
    fitness: Fitness,
    final_fitness: Fitness,
    *,
    rounds: int,
    refinement: int,
    seed: int,
    archive: Path,
) -> tuple[SearchedScheduler, dict[str, Any]]:
    """Searches a schedule; a search that was stopped goes on from its archive.

    Args:
        start: any sampler of the model, with its timesteps set.
        fitness: what is minimised.
        final_fitness: what chooses among the finalists.
        rounds: of the evolution.
        refinement: evaluations of continuous changes afterwards.
        seed: of the search.
        archive: file of all evaluations.

    Returns:
        the scheduler, and what the report says of the search.
    """
    with tqdm(desc="search", unit="schedule") as bar:

        def show(stage: str, evaluations: int, best: float) -> None:
            bar.update(evaluations - bar.n)
            bar.set_postfix(stage=stage, best=f"{best:.4f}")

        found = search_schedule(
            start,
            fitness,
            settings=SearchSettings(rounds=rounds, refinement=refinement),
            final_fitness=final_fitness,
            archive=archive,
            progress=show,
            seed=seed,
        )
    best = [entry.fitness for entry in found.evaluations]
    return SearchedScheduler.from_config(start.config, decisions=found.schedule), {
        "evaluations": len(best),
        "best_known_solver": found.known,
        "final_fitness": found.fitness,
        "history": list(accumulate(best, min)),
    }


def error_fitness(batch: Batch) -> Fitness:
    """The distance to the exact ends of the noises."""
    return trajectory_fitness(batch.network, batch.noise, batch.truth)


def frechet_fitness(model: Model, guidance_scale: float, steps: int, seeds: range) -> Fitness:
    """The Frechet distance of generated digits, in the features of the bundled classifier.

    Raises:
        ValueError: a model that does not draw digits.
    """
    pipeline = model.pipeline
    if model.name not in BUNDLED or not isinstance(pipeline, DiTPipeline):
        raise ValueError(
            f"--fitness frechet needs a bundled model of digits, whose reference comes with the package, and "
            f"{model.name!r} is none; use error, or search_schedule in Python with a distance of your own"
        )
    classifier = DigitsClassifier.bundled()
    reference = digits_statistics("train", classifier)

    def fitness(scheduler: SearchedScheduler) -> float:
        pipeline.scheduler = scheduler
        statistics = FeatureStatistics(classifier.config["feature_size"])
        for begin in range(0, len(seeds), 100):
            part = seeds[begin : begin + 100]
            images = generate(pipeline, part, steps=steps, scale=guidance_scale, seed=0).cpu()
            with torch.no_grad():
                statistics.update(features_of(classifier, images))
        return frechet_distance(*statistics.compute(), reference.mean, reference.covariance)

    return fitness
