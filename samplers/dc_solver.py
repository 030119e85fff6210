"""DC-Solver (arXiv 2409.03755): predictions moved along the time axis before a multistep solver reads them.

A predictor-corrector evaluates the network at the predicted sample and goes on from the corrected one: the prediction
is out of place. Before the step from node ``i`` it is replaced by a Lagrange interpolation of itself and older ones,

    m'_i = sum_k ell_k(t'_i) m_{i-k},    t'_i = ratio_i t_i + (1 - ratio_i) t_{i-1}

in the time label ``t``. That is linear, so it is a row of the plan. ``compensation.py`` searches the ratios,
``cascade.py`` predicts them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from .builder import PlanBuilder
from .cascade import CascadeRegression
from .grid import Grid
from .multistep import Compensator, multistep
from .options import ScheduleConfig, scheduler_options
from .plan import Plan
from .registry import SAMPLERS, register
from .scheduler import PlanScheduler
from .unipc import UniPCScheduler
from .weights import close, polynomial_weights

if TYPE_CHECKING:
    from typing_extensions import Unpack


def compensation_weights(times: Sequence[float], ratio: float) -> tuple[float, ...]:
    """The Lagrange basis at ``ratio * times[0] + (1 - ratio) * times[1]`` (arXiv 2409.03755, equation 7).

    Args:
        times: labels of the predictions, newest first, at least 2.
        ratio: 1 is no change; above 1 extrapolates to lower noise.

    Returns:
        one weight a time, with sum 1.

    Raises:
        ValueError: equal times.
    """
    if len(set(times)) < len(times):
        raise ValueError(f"compensation needs distinct timesteps, got {list(times)}; use fewer steps")
    target = ratio * times[0] + (1.0 - ratio) * times[1]
    weights = polynomial_weights(times, (np.array([target]), np.ones(1)))
    return tuple(close(weights, 1.0).tolist())


def compensator(grid: Grid, ratios: Sequence[float], dc_order: int) -> Compensator:
    """Dynamic compensation with given ratios.

    Args:
        grid: the run's times.
        ratios: one a step; 1 leaves a step alone, and so does having fewer than ``dc_order + 1`` predictions.
        dc_order: degree of the interpolation.
    """

    def rule(i: int, known: int) -> tuple[float, ...] | None:
        if ratios[i] == 1.0 or known <= dc_order:
            return None
        return compensation_weights([float(grid.timesteps[k]) for k in range(i, i - dc_order - 1, -1)], ratios[i])

    return rule


class DCSolverScheduler(UniPCScheduler):
    """DC-Solver (arXiv 2409.03755): dynamic compensation on UniPC, or on a predictor alone.

    Without ``ratios`` and ``regression`` it is the sampler beneath, bit for bit. Ratios are found for a model, a number
    of steps, a guidance scale and a grid by ``search_ratios``; with other numbers of steps they are refused. The
    interpolation is in the time label that the network gets, as in the authors' code: the timestep of VP and flow
    models, ``log(sigma) / 4`` of EDM models (where the paper says nothing). The method is of first order unless all
    ratios are 1, a device for few steps. A run that begins in the middle compensates from its own
    ``dc_order + 1``-th prediction on.

    Args:
        ratios: compensation ratio of every step. The first ``dc_order`` must be 1.
        regression: ``CascadeRegression``, or its ``to_dict()``, which gives ratios for a range of steps and guidance
            scales; needs ``guidance_scale``.
        dc_order: degree of the interpolation, 1 to 3; the paper's choice is 2.
        corrector: UniC on top; without it ``solver_p`` alone is compensated (DDIM, DPM-Solver++, DEIS), or UniP.
        solver_order: of UniPC, 1 to 4.
        solver_type: ``bh1`` or ``bh2``.
        predict_x0: data prediction, or noise prediction.
        lower_order_final: lower orders on the last steps.
        disable_corrector: steps whose result is not corrected; ``[0]`` in the paper's runs of Stable Diffusion.
        solver_p: another predictor: the name of a registered multistep sampler, or one of our schedulers.
        corrector_form: ``classic`` or ``delta``.
        schedule: options of ``ScheduleConfig``; ``final_sigmas_type`` is by default that of the sampler beneath.

    Raises:
        ValueError: unknown or contradicting options.
    """

    @scheduler_options(final_sigmas_type=None)
    def __init__(
        self,
        *,
        ratios: Sequence[float] | None = None,
        regression: CascadeRegression | Mapping[str, Any] | None = None,
        dc_order: int = 2,
        corrector: bool = True,
        solver_order: int = 2,
        solver_type: str = "bh2",
        predict_x0: bool = True,
        lower_order_final: bool = True,
        disable_corrector: Sequence[int] = (),
        solver_p: str | PlanScheduler | None = None,
        corrector_form: str = "classic",
        **schedule: Unpack[ScheduleConfig],
    ) -> None:
        if dc_order not in (1, 2, 3):
            raise ValueError(f"dc_order {dc_order} must be 1, 2 or 3; the paper uses 2")
        if ratios is not None and regression is not None:
            raise ValueError("ratios and regression are both given; leave one of them out")
        if ratios is not None:
            self.register_to_config(ratios=_checked(ratios, dc_order))
        if isinstance(regression, CascadeRegression):
            self.register_to_config(regression=regression.to_dict())
        if self.config.regression is not None:
            cascade = CascadeRegression.from_dict(self.config.regression)
            if cascade.dc_order != dc_order:
                raise ValueError(f"regression was fitted with dc_order {cascade.dc_order}, not {dc_order}; set it so")
            cascade.check_guidance_scale(self.config.guidance_scale)
        self._check()
        self._setup()

    def _setup(self) -> None:
        if self.config.final_sigmas_type is None:
            ending = "zero"
            if self._beneath is not None:
                sampler = SAMPLERS[self._beneath]
                model = {"use_flow_sigmas": self.config.use_flow_sigmas}
                ending = sampler.scheduler(**{**sampler.options, **model}).config.final_sigmas_type
            self.register_to_config(final_sigmas_type=ending)
        super()._setup()

    @property
    def _beneath(self) -> str | None:
        """The sampler that stands without a corrector, whose grids are kept."""
        name: str | None = None if self.config.corrector else self.config.solver_p
        return name

    def _options(self, steps: int | None) -> dict[str, Any]:
        options = super()._options(steps)
        if self._beneath is not None:
            options["flow_grid"] = SAMPLERS[self._beneath].scheduler._flow_grid
        return options

    def _write(self, plan: PlanBuilder, options: Mapping[str, Any]) -> Plan:
        return self.write_compensated(plan, options, _ratios(options, plan.grid.steps))

    def write_compensated(
        self, plan: PlanBuilder, options: Mapping[str, Any], ratios: Sequence[float], stop: int | None = None
    ) -> Plan:
        """Writes the plan with ratios of the caller's, perhaps only up to a node.

        Args:
            plan: where to write.
            options: of the run.
            ratios: one a step.
            stop: see ``multistep``.
        """
        chosen, rule = self._parts(plan, options)
        moved = compensator(plan.grid, ratios, options["dc_order"])
        form = options["corrector_form"]
        return multistep(plan, chosen, rule if options["corrector"] else None, compensator=moved, form=form, stop=stop)


def _checked(ratios: Sequence[float], dc_order: int) -> list[float]:
    try:
        numbers = [float(ratio) for ratio in ratios]
    except (TypeError, ValueError):
        raise ValueError(f"ratios must be a list of numbers, one a step, got {ratios!r}") from None
    if not numbers or not all(map(math.isfinite, numbers)):
        raise ValueError(f"ratios must be finite numbers, one a step, got {numbers}")
    if any(ratio != 1.0 for ratio in numbers[:dc_order]):
        raise ValueError(
            f"the first {dc_order} ratios must be 1, since dc_order {dc_order} needs {dc_order + 1} predictions; "
            f"got {numbers}"
        )
    return numbers


def _ratios(options: Mapping[str, Any], steps: int) -> Sequence[float]:
    if options["regression"] is not None:
        return CascadeRegression.from_dict(options["regression"]).predict(steps, options["guidance_scale"])
    ratios: Sequence[float] | None = options["ratios"]
    if ratios is None:
        return [1.0] * steps
    if len(ratios) != steps:
        raise ValueError(
            f"ratios are those of a run of {len(ratios)} steps, and this one has {steps}; "
            f"use {len(ratios)} steps, search ratios for {steps}, or set ratios=None"
        )
    return ratios


_PAPER = "arXiv 2409.03755"
register("dc-solver", DCSolverScheduler, order=3, paper=_PAPER)
register("dc-ddim", DCSolverScheduler, order=1, paper=_PAPER, solver_p="ddim", corrector=False)
register("dc-dpm++", DCSolverScheduler, order=2, paper=_PAPER, solver_p="dpm++", corrector=False)
register("dc-deis", DCSolverScheduler, order=2, paper=_PAPER, solver_p="deis", corrector=False)
