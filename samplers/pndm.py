"""F-PNDM (arXiv 2202.09778): pseudo Runge-Kutta steps, then pseudo Adams-Bashforth."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from .builder import PlanBuilder, Value
from .deis import ADAMS_BASHFORTH
from .options import ScheduleConfig, scheduler_options
from .plan import Plan
from .schedule import DiscreteVPSchedule
from .scheduler import PlanScheduler
from .weights import Node, lambda_weights, noise_zeroth_moment

if TYPE_CHECKING:
    from typing_extensions import Unpack


def f_pndm(plan: PlanBuilder) -> Plan:
    """F-PNDM (arXiv 2202.09778, algorithm 2): three pseudo Runge-Kutta steps, then Adams-Bashforth of four.

    Every stage is a DDIM step with the last noise prediction, the inner ones to the middle of the time labels (for
    models with whole labels, the whole one below). A Runge-Kutta step takes four network calls. A step that has no last
    stage, to ``sigma = 0``, and those after the third take Adams-Bashforth of what predictions there are.
    """
    grid, schedule = plan.grid, plan.grid.schedule
    final = float(schedule.timestep(grid.levels[-1])) if grid.levels[-1] > 0.0 else 0.0
    whole = isinstance(schedule, DiscreteVPSchedule) and bool((grid.timesteps == np.round(grid.timesteps)).all())
    labels = [*grid.timesteps.tolist(), final]
    x = plan.initial
    history: list[Value] = []
    for i in range(plan.start, grid.steps):
        start, target = grid.nodes[i], grid.nodes[i + 1]
        if start.alpha == 0.0:
            first = lambda_weights(start, target, (), measure="data")
            x = plan.combine([(x, first.state), (plan.evaluate(x, i, "data"), first.predictions[0])])
            continue
        slopes = [plan.evaluate(x, i, "noise")]
        history.insert(0, slopes[0])
        weights: Sequence[float] = ADAMS_BASHFORTH[min(len(history), 4)]
        if i < 3 and target.sigma > 0.0:
            middle = (labels[i] + labels[i + 1]) / 2
            label = math.floor(middle) if whole else middle
            for time in (label, label, labels[i + 1]):
                level = float(grid.levels[i + 1] if time == labels[i + 1] else schedule.level(time))
                stage = Node(*(float(value) for value in schedule.alpha_sigma(level)))
                moved = noise_zeroth_moment(start, stage)
                u = plan.combine([(x, stage.alpha / start.alpha), (slopes[-1], moved)])
                slopes.append(plan.evaluate_at_timestep(u, float(time), "noise", level=level))
            weights = (1 / 6, 1 / 3, 1 / 3, 1 / 6)
        values = slopes if len(slopes) > 1 else history
        width = noise_zeroth_moment(start, target)
        terms = [(value, width * weight) for value, weight in zip(values, weights, strict=False)]
        x = plan.combine([(x, target.alpha / start.alpha), *terms])
    return plan.finish(x)


class FPNDMScheduler(PlanScheduler):
    """F-PNDM (arXiv 2202.09778), as diffusers' ``PNDMScheduler`` with ``skip_prk_steps=False``.

    ``N`` steps take ``N + 9`` network calls. ``ipndm`` saves those nine.

    Args:
        schedule: options of ``ScheduleConfig``; ``final_sigmas_type`` is ``sigma_min`` by default, and ``zero`` for
            flow models.
    """

    @scheduler_options(final_sigmas_type=None)
    def __init__(self, **schedule: Unpack[ScheduleConfig]) -> None:
        if self.config.final_sigmas_type is None:
            self.register_to_config(final_sigmas_type="zero" if self.config.use_flow_sigmas else "sigma_min")
        self._setup()

    def _write(self, plan: PlanBuilder, options: Mapping[str, Any]) -> Plan:
        return f_pndm(plan)
