"""DPM-Solver and DPM-Solver++ (arXiv 2206.00927, arXiv 2211.01095), ODE and SDE, multistep and singlestep."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from .builder import PlanBuilder, Value
from .grid import Grid
from .multistep import Predictor, final_order, multistep, older
from .options import ScheduleConfig, scheduler_options
from .plan import Plan
from .registry import register
from .scheduler import PlanScheduler
from .weights import Measure, Node, Weights, close, lambda_weights, slope_weights

if TYPE_CHECKING:
    from typing_extensions import Unpack

Form = Literal["midpoint", "heun"]

_ALGORITHMS: Mapping[str, tuple[Measure, bool]] = {
    "dpmsolver++": ("data", False),
    "dpmsolver": ("noise", False),
    "sde-dpmsolver++": ("data", True),
    "sde-dpmsolver": ("noise", True),
}
_FOREIGN_ALGORITHMS = {"deis": "dpmsolver++", "data_prediction": "dpmsolver++", "noise_prediction": "dpmsolver"}
_FOREIGN_FORMS = ("logrho", "bh1", "bh2", "tab", "rhoab", "rhork", "ipndm")


def predictor(
    grid: Grid,
    *,
    order: int,
    measure: Measure,
    stochastic: bool,
    form: Form,
    lower_order_final: bool,
    euler_at_final: bool,
    diffusers_third_order: bool,
) -> Predictor:
    """Multistep DPM-Solver(++): arXiv 2211.01095, algorithm 2, and its continuation to order 3.

    Args:
        grid: the run's times.
        order: 1 to 3.
        measure: data prediction is DPM-Solver++, noise prediction DPM-Solver.
        stochastic: the SDE solver of arXiv 2211.01095, appendix.
        form: of the second order: ``midpoint``, or ``heun`` (exact on predictions linear in lambda).
        lower_order_final: lower orders at the end, below 15 steps.
        euler_at_final: first order on the last step in any case.
        diffusers_third_order: diffusers' weights of the third order, which converge with order 2.
    """
    nodes = grid.nodes

    def rule(i: int, known: int) -> Weights:
        end_first = euler_at_final or nodes[i + 1].sigma == 0.0
        wanted = final_order(order, i, grid.steps, lower_order_final=lower_order_final, end_first=end_first)
        used = min(wanted, known)
        past = older(nodes, i, used - 1)
        if used == 2 and form == "midpoint":
            return slope_weights(nodes[i], nodes[i + 1], past[0], 0.5, measure=measure, stochastic=stochastic)
        if used == 3 and diffusers_third_order:
            return _diffusers_third_order(nodes[i], nodes[i + 1], past, measure, stochastic)
        return lambda_weights(nodes[i], nodes[i + 1], past, measure=measure, stochastic=stochastic)

    return Predictor(measure, rule, stochastic)


def singlestep(
    plan: PlanBuilder,
    *,
    order: int,
    measure: Measure,
    stochastic: bool,
    form: Form,
    lower_order_final: bool,
    euler_at_final: bool,
    diffusers_third_order: bool,
) -> Plan:
    """Singlestep DPM-Solver(++): arXiv 2211.01095, algorithm 1 (2S), and order 3.

    Groups of ``order`` consecutive grid nodes make one step: every call inside a group restarts from the group's
    first sample, the last one with the full order. So a run of N steps has N network calls, whatever the order.

    Args:
        plan: where to write.
        order: 1 to 3.
        measure: data or noise prediction.
        stochastic: the SDE, with fresh noise in every call.
        form: ``midpoint``, or ``heun`` (at order 3 exact for any position of the inner nodes).
        lower_order_final: end with lower orders rather than with a full group.
        euler_at_final: first order on the last step in any case.
        diffusers_third_order: diffusers' constant in the third order of the SDE's ``heun`` form.
    """
    nodes, steps = plan.grid.nodes, plan.grid.steps
    orders = singlestep_orders(order, steps, lower_order_final or nodes[-1].sigma == 0.0)
    if euler_at_final or nodes[-1].sigma == 0.0:
        orders[-1] = 1
    x = base = plan.initial
    group: list[tuple[int, Value]] = []
    for i in range(plan.start, steps):
        first = group[0][0] if group else i
        now = min(orders[i], len(group) + 1)
        if now == 1 or nodes[first].alpha == 0.0:
            group, base, now, first = [], x, 1, i
        kind: Measure = "data" if nodes[i].alpha == 0.0 else measure
        m = plan.evaluate(x, i, kind)
        group = [*group[: now - 1], (i, m)]
        weights = _group_weights(nodes, [k for k, _ in group], i + 1, kind, stochastic, form)
        if now == 3 and stochastic and form == "heun" and diffusers_third_order:
            weights = _diffusers_third_order_of_group(nodes, [k for k, _ in group], i + 1, weights)
        values = [group[0][1], *(value for _, value in reversed(group[1:]))]
        x = plan.combine([(base, weights.state), *zip(values, weights.predictions, strict=False)], noise=weights.noise)
    return plan.finish(x)


def singlestep_orders(order: int, steps: int, lower_order_final: bool) -> list[int]:
    """The order of every call of a singlestep run (arXiv 2206.00927, appendix D.3, as in diffusers)."""
    groups = list(range(1, order + 1))
    if not lower_order_final and steps % order == 0:
        return groups * (steps // order)
    if order == 3:
        ends = {0: [1, 2, 1], 1: [1], 2: [1, 2]}
        return (groups * (steps // 3 - (steps % 3 == 0)) + ends[steps % 3])[:steps]
    if order == 2:
        return groups * (steps // 2 - 1) + [1, 1] if steps % 2 == 0 else groups * (steps // 2) + [1]
    return [1] * steps


def _group_weights(
    nodes: Sequence[Node], group: list[int], target: int, measure: Measure, stochastic: bool, form: Form
) -> Weights:
    """Weights from the first node of a group to the target; predictions: the first node's, then newest first."""
    start, inner = nodes[group[0]], [nodes[k] for k in reversed(group[1:])]
    if form == "midpoint":
        if len(inner) == 1:
            return slope_weights(start, nodes[target], inner[0], 0.5, measure=measure, stochastic=stochastic)
        inner = inner[:1]
    return lambda_weights(start, nodes[target], inner, measure=measure, stochastic=stochastic)


def _diffusers_third_order(start: Node, target: Node, past: list[Node], measure: Measure, stochastic: bool) -> Weights:
    """The third order as diffusers weights it: half the second derivative; in the SDE a constant of wrong sign."""
    exact = lambda_weights(start, target, past, measure=measure, stochastic=stochastic)
    h = target.half_logsnr - start.half_logsnr
    r0 = (start.half_logsnr - past[0].half_logsnr) / h
    r1 = (past[0].half_logsnr - past[1].half_logsnr) / h
    second = (np.array([1 / r0, -1 / r0, 0.0]) - np.array([0.0, 1 / r1, -1 / r1])) / (r0 + r1)
    step = 2 * h if stochastic else h
    if measure == "data":
        # step phi_3(-step), and for the SDE diffusers' constant -1/2 in the place of +1/2.
        third = 0.5 + (-np.expm1(-step) - step) / step**2
        change = target.alpha * ((third - 1.0) - 2 * third if stochastic else -third)
    else:
        change = target.sigma * ((np.expm1(h) - h) / h**2 - 0.5)
    weights = close(np.array(exact.predictions) + change * second, float(np.sum(exact.predictions)))
    return Weights(exact.state, tuple(weights.tolist()), exact.noise)


def _diffusers_third_order_of_group(nodes: Sequence[Node], group: list[int], target: int, exact: Weights) -> Weights:
    """The third order of diffusers' singlestep SDE: -1/2 in the place of +1/2 before the second derivative."""
    start, older_, newer = (nodes[k].half_logsnr for k in group)
    h = nodes[target].half_logsnr - start
    r0, r1 = (newer - start) / h, (older_ - start) / h
    second = 2 * (np.array([-1 / r0, 1 / r0, 0.0]) - np.array([-1 / r1, 0.0, 1 / r1])) / (r0 - r1)
    weights = close(np.array(exact.predictions) - nodes[target].alpha * second, float(np.sum(exact.predictions)))
    return Weights(exact.state, tuple(weights.tolist()), exact.noise)


class DPMSolverPPScheduler(PlanScheduler):
    """DPM-Solver++ and DPM-Solver (arXiv 2211.01095, arXiv 2206.00927).

    Reads the configs of diffusers' ``DPMSolverMultistepScheduler`` and ``DPMSolverSinglestepScheduler`` and gives their
    images. Two things differ on purpose: the third order carries the full second derivative (diffusers halves it and
    converges with order 2; ``diffusers_third_order=True`` reproduces that), and re-spaced grids that end at
    ``sigma_min`` have no last step of length zero.

    Args:
        solver_order: 1, 2 or 3. Order 2 for guided sampling, 3 for unconditional.
        algorithm_type: ``dpmsolver++``, ``dpmsolver``, ``sde-dpmsolver++`` or ``sde-dpmsolver``.
        solver_type: ``midpoint`` or ``heun``.
        method: ``multistep`` or ``singlestep`` (2S, 3S; a step is one network call in both; not ``sde-dpmsolver``).
        lower_order_final: lower orders on the last steps, below 15 steps (multistep), or always (singlestep).
        euler_at_final: first order on the last step.
        denoise_to_zero: one more call that goes from ``sigma_min`` to 0 by the clean prediction; needs
            ``final_sigmas_type="sigma_min"``.
        diffusers_third_order: see above.
        schedule: options of ``ScheduleConfig``.

    Raises:
        ValueError: unknown or contradicting options.
    """

    @scheduler_options()
    def __init__(
        self,
        *,
        solver_order: int = 2,
        algorithm_type: str = "dpmsolver++",
        solver_type: str = "midpoint",
        method: str = "multistep",
        lower_order_final: bool = True,
        euler_at_final: bool = False,
        denoise_to_zero: bool = False,
        diffusers_third_order: bool = False,
        **schedule: Unpack[ScheduleConfig],
    ) -> None:
        if algorithm_type in _FOREIGN_ALGORITHMS:
            self.register_to_config(algorithm_type=_FOREIGN_ALGORITHMS[algorithm_type])
        elif algorithm_type not in _ALGORITHMS:
            raise ValueError(f"algorithm_type {algorithm_type!r} is unknown; use one of {', '.join(_ALGORITHMS)}")
        if solver_type in _FOREIGN_FORMS:
            self.register_to_config(solver_type="midpoint")
        elif solver_type not in ("midpoint", "heun"):
            raise ValueError(f"solver_type {solver_type!r} is unknown; use midpoint or heun")
        if solver_order not in (1, 2, 3):
            raise ValueError(f"solver_order {solver_order} must be 1, 2 or 3")
        if method not in ("multistep", "singlestep"):
            raise ValueError(f"method {method!r} is unknown; use multistep or singlestep")
        if method == "singlestep" and self.config.algorithm_type == "sde-dpmsolver":
            raise ValueError(
                "algorithm_type 'sde-dpmsolver' has no singlestep form: it multiplies the noise of its stages by "
                'sigma / alpha; use method="multistep" or algorithm_type="sde-dpmsolver++"'
            )
        if denoise_to_zero and self.config.final_sigmas_type != "sigma_min":
            raise ValueError(
                'denoise_to_zero needs final_sigmas_type="sigma_min"; a run to zero needs no more denoising'
            )
        if self.config.preset is not None and (method == "singlestep" or self.config.algorithm_type != "dpmsolver++"):
            raise ValueError('preset was measured for the multistep ODE only; use method="multistep" and "dpmsolver++"')
        self._setup()

    def _write(self, plan: PlanBuilder, options: Mapping[str, Any]) -> Plan:
        if options["method"] == "singlestep":
            return singlestep(plan, **_solver_options(options))
        return multistep(plan, self._predictor(plan.grid, options))

    def _predictor(self, grid: Grid, options: Mapping[str, Any]) -> Predictor:
        return predictor(grid, **_solver_options(options))


def _solver_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """What ``predictor`` and ``singlestep`` take, of a scheduler's options."""
    measure, stochastic = _ALGORITHMS[options["algorithm_type"]]
    same = ("lower_order_final", "euler_at_final", "diffusers_third_order")
    return {
        "order": options["solver_order"],
        "measure": measure,
        "stochastic": stochastic,
        "form": options["solver_type"],
        **{name: options[name] for name in same},
    }


_PAPER = "arXiv 2211.01095"
register("ddim", DPMSolverPPScheduler, order=1, paper="arXiv 2010.02502", solver_order=1)
register("dpm++", DPMSolverPPScheduler, order=2, paper=_PAPER)
register("dpm++-heun", DPMSolverPPScheduler, order=2, paper=_PAPER, solver_type="heun")
register("dpm++3m", DPMSolverPPScheduler, order=3, paper=_PAPER, solver_order=3)
register("dpm++2s", DPMSolverPPScheduler, order=2, paper=_PAPER, method="singlestep")
register(
    "dpm++3s", DPMSolverPPScheduler, order=3, paper=_PAPER, method="singlestep", solver_order=3, solver_type="heun"
)
register("dpm", DPMSolverPPScheduler, order=2, paper="arXiv 2206.00927", algorithm_type="dpmsolver")
register("dpm3m", DPMSolverPPScheduler, order=3, paper="arXiv 2206.00927", algorithm_type="dpmsolver", solver_order=3)
register("sde-dpm++1", DPMSolverPPScheduler, order=1, paper=_PAPER, algorithm_type="sde-dpmsolver++", solver_order=1)
register("sde-dpm++", DPMSolverPPScheduler, order=2, paper=_PAPER, algorithm_type="sde-dpmsolver++")
register("sde-dpm++3m", DPMSolverPPScheduler, order=3, paper=_PAPER, algorithm_type="sde-dpmsolver++", solver_order=3)
register("sde-dpm", DPMSolverPPScheduler, order=2, paper=_PAPER, algorithm_type="sde-dpmsolver")
