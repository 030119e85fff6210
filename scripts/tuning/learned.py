"""``--method learned``: times, labels and coefficients by the Gauss-Newton method."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tqdm import tqdm

from fewstep.samplers import FitStep, LearnedScheduler, PlanScheduler, Problem, fit_plan

from .task import Batch


def fit_table(
    start: PlanScheduler,
    seen: Sequence[Batch],
    validation: Sequence[Batch],
    *,
    free: Sequence[str],
    iterations: int,
    checkpoint: Path,
) -> tuple[LearnedScheduler, dict[str, Any]]:
    """Fits a plan; a fit that was stopped goes on from its checkpoint.

    Args:
        start: where it begins, with its timesteps set.
        seen: noises to fit to.
        validation: noises that choose when to stop.
        free: what is fitted.
        iterations: at most.
        checkpoint: file.

    Returns:
        the scheduler, and what the report says of the fit.
    """
    with tqdm(desc="fit", unit="iteration") as bar:

        def show(step: FitStep) -> None:
            bar.update()
            bar.set_postfix(start=step.reach, error=f"{step.error:.4f}", validation=f"{step.validation:.4f}")

        found = fit_plan(
            start,
            [_problem(batch) for batch in seen],
            validation=[_problem(batch) for batch in validation],
            free=free,
            iterations=iterations,
            checkpoint=checkpoint,
            progress=show,
        )
    fitted = LearnedScheduler.from_config(start.config, table=found.table)
    before = [float(level) for level in start.sigmas]
    return fitted, {
        "free": list(free),
        "history": [asdict(step) for step in found.history],
        "levels_before": before,
        "levels_after": list(found.table.levels),
    }


def _problem(batch: Batch) -> Problem:
    return Problem(batch.network, batch.truth.samples[0], batch.truth.samples[-1])
