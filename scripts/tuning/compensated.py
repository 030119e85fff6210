"""``--method dc``: the ratios of DC-Solver."""

from __future__ import annotations

from typing import Any

from tqdm import tqdm

from fewstep.samplers import DCSolverScheduler, search_ratios

from .task import Batch, scheduler_steps


def fit_ratios(scheduler: DCSolverScheduler, seen: Batch, refinement: int) -> tuple[DCSolverScheduler, dict[str, Any]]:
    """Searches the ratios.

    Args:
        scheduler: with its timesteps set.
        seen: noises to fit to.
        refinement: joint adjustments after the paper's search.

    Returns:
        the scheduler with its ratios, and what the report says of them.
    """
    steps = scheduler_steps(scheduler)
    with tqdm(total=steps, desc="ratios", unit="step") as bar:
        found = search_ratios(
            scheduler,
            seen.network,
            seen.noise,
            truth=seen.truth,
            refinement=refinement,
            progress=lambda index, ratio, error: bar.update(),
        )
    tuned = DCSolverScheduler.from_config(scheduler.config, ratios=found.ratios)
    return tuned, {"ratios": found.ratios, "network_calls": found.calls, "refinement": refinement}
