"""Writes a schedule of the unified sampling framework (arXiv 2312.07243) as the rows of a plan."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from ..builder import PlanBuilder, Value
from ..plan import SAMPLE, Plan, Row
from ..schedule import Array
from ..weights import Measure, Node, Weights, close, lambda_weights, phi
from .decisions import Derivative, SolverSchedule, SolverStep

Terms = list[tuple[Value, float]]

_RELAXATIONS: dict[str, Callable[[float, float, float], float]] = {
    "none": lambda z, h, c: 1.0,
    "dpmsolver-2": lambda z, h, c: 0.5 * phi(1, z) / phi(2, z),
    "unipc-bh1": lambda z, h, c: 0.5 / phi(2, z),
    "unipc-bh2": lambda z, h, c: 0.5 * phi(1, z) / phi(2, z),
    "0.5exp": lambda z, h, c: 1.0 + 0.5 * math.expm1(z),
    "-0.5exp": lambda z, h, c: 1.0 - 0.5 * math.expm1(z),
    "linear": lambda z, h, c: 1.0 + c * h,
}


def taylor_weights(
    start: Node,
    target: Node,
    derivatives: Sequence[tuple[Sequence[int], float]],
    nodes: Sequence[Node],
    *,
    measure: Measure,
) -> Weights:
    """The Taylor expansion of the exact solution around the start, with derivatives by differences.

    With ``h = lambda_t - lambda_s``, ``z = -h`` (data) or ``h`` (noise) and ``S = alpha_t`` or ``-sigma_t``,

        x_t = state x_s + S sum_j h^(j+1) phi_{j+1}(z) R_j d_j,   d_0 = m_s,
        d_j = sum_p a_p (m_p - m_s),   sum_p a_p (lambda_p - lambda_s)^n / n! = [n = j],  n = 1..len(points)

    Args:
        start: node of the sample that is propagated.
        target: node of the result.
        derivatives: for ``j = 1, 2, ...`` the numbers of the active points in ``nodes`` and the factor ``R_j``.
        nodes: all other nodes; at finite distances in half log-SNR where they are active.
        measure: what the predictions are.

    Returns:
        ``1 + len(nodes)`` prediction weights, the first of the start.
    """
    first = lambda_weights(start, target, (), measure=measure)
    (zeroth,) = first.predictions
    h = target.half_logsnr - start.half_logsnr
    weights: Array = np.zeros(1 + len(nodes))
    for j, (points, factor) in enumerate(derivatives, 1):
        r = np.array([(nodes[p].half_logsnr - start.half_logsnr) / h for p in points])
        powers = np.vander(r, len(points) + 1, increasing=True).T[1:]
        moments = np.zeros(len(points))
        moments[j - 1] = math.factorial(j)
        moment = -h * target.sigma * phi(j + 1, h) if measure == "noise" else h * target.alpha * phi(j + 1, -h)
        for p, a in zip(points, np.linalg.solve(powers, moments), strict=True):
            weights[1 + p] += factor * moment * a
    weights[0] = zeroth - weights.sum()
    return Weights(first.state, tuple(close(weights, zeroth).tolist()))


@dataclass(frozen=True)
class _Known:
    """A node of the past.

    Attributes:
        node: its place.
        state: its sample, corrected where there was a corrector.
        data: the clean prediction there, of the sample that the network saw.
        noise: the noise prediction there.
    """

    node: Node
    state: Terms
    data: Terms
    noise: Terms


def write_schedule(plan: PlanBuilder, schedule: SolverSchedule) -> Plan:
    """Writes the plan of a schedule.

    What a run that begins in the middle does not know is left out: estimates lose the points that lie before its
    start, and orders fall where too few are left.

    Args:
        plan: on the schedule's own grid.
        schedule: the decisions.
    """
    grid = plan.grid
    before = grid.nodes[0]
    analytic = schedule.afs != "none" and plan.start == 0
    measures = _stored_measures(schedule, grid.nodes)
    known: list[_Known] = []
    x: Terms = []
    if analytic:
        # x_0 = 0 makes the first step x <- (sigma_1 / sigma_0) x, which _scaled puts before the first call.
        after = grid.nodes[1]
        state = [(plan.initial, before.sigma / after.sigma)]
        known.append(_Known(before, state, [], [(plan.initial, 1.0 / after.sigma)]))
    for i in range(plan.start + analytic, grid.steps):
        value = plan.initial if i == plan.start + analytic else plan.combine(x)
        known.append(_evaluated(plan, value, i, measures[i]))
        if analytic and i == 1:
            # A copy, because the sample that the pipeline holds at this call is not scaled.
            copied = plan.combine([(plan.initial, 1.0)])
            known = [_renamed(entry, plan.initial, copied) for entry in known]
        correction = schedule.steps[i - 1].correction if i > plan.start else None
        if correction is not None:
            step = SolverStep(schedule.steps[i - 1].measure, correction.start, correction.derivatives)
            corrected = _update(step, known, grid.nodes[i], new=True)
            value = plan.combine(corrected)
            known[-1] = dataclasses.replace(known[-1], state=[(value, 1.0)])
            if correction.implicit:
                known[-1] = _evaluated(plan, value, i, measures[i])
        x = _update(schedule.steps[i], known, grid.nodes[i + 1])
    result = plan.finish(plan.combine(x))
    return _scaled(result, grid.nodes[1].sigma / before.sigma) if analytic else result


def _evaluated(plan: PlanBuilder, x: Value, i: int, measure: Measure) -> _Known:
    node = plan.grid.nodes[i]
    prediction = plan.evaluate(x, i, measure)
    data: Terms = [(prediction, 1.0)]
    noise: Terms = [(prediction, 1.0)]
    if measure == "data":
        noise = [(x, 1.0 / node.sigma), (prediction, -node.alpha / node.sigma)]
    else:
        data = [(x, 1.0 / node.alpha), (prediction, -node.sigma / node.alpha)]
    return _Known(node, [(x, 1.0)], data, noise)


def relaxation_factor(derivative: Derivative, measure: Measure, h: float) -> float:
    """What a first derivative is multiplied by in a step of length ``h`` in half log-SNR."""
    return _RELAXATIONS[derivative.relaxation](-h if measure == "data" else h, h, derivative.coefficient)


def _update(step: SolverStep, known: Sequence[_Known], target: Node, *, new: bool = False) -> Terms:
    """The sample at the target; with ``new`` the last known node is the target itself, and no step starts there."""
    count = len(known)
    start = count + step.start if count + step.start >= 0 else count - 1 - new
    origin, measure = known[start], step.measure
    derivatives: tuple[Derivative, ...] = step.derivatives
    if origin.node.alpha == 0.0 or target.sigma == 0.0:
        derivatives = ()
    if origin.node.alpha == 0.0:
        measure = "data"
    h = target.half_logsnr - origin.node.half_logsnr
    estimates: list[tuple[list[int], float]] = []
    for j, derivative in enumerate(derivatives, 1):
        wanted = (count + p for p in derivative.active_points)
        points = [k for k in wanted if k >= 0 and k != start and known[k].node.alpha != 0.0]
        if len(points) < j:
            break
        estimates.append((points, relaxation_factor(derivative, measure, h)))
    used = sorted({k for points, _ in estimates for k in points}, reverse=True)
    weights = taylor_weights(
        origin.node,
        target,
        [([used.index(k) for k in points], factor) for points, factor in estimates],
        [known[k].node for k in used],
        measure=measure,
    )
    terms = [(value, weights.state * c) for value, c in origin.state]
    for entry, weight in zip((origin, *(known[k] for k in used)), weights.predictions, strict=True):
        terms += [(value, weight * c) for value, c in (entry.data if measure == "data" else entry.noise)]
    return terms


def _stored_measures(schedule: SolverSchedule, nodes: Sequence[Node]) -> list[Measure]:
    """What to keep of every node: what the steps read; of both, what the other follows from with smaller factors."""
    read: list[set[Measure]] = [set() for _ in schedule.steps]
    for i, step in enumerate(schedule.steps):
        updates = [(i + 1, step.start, step.derivatives)]
        if step.correction is not None:
            updates.append((i + 2, step.correction.start, step.correction.derivatives))
        for known, start, derivatives in updates:
            for p in (start, *(p for derivative in derivatives for p in derivative.active_points)):
                read[known + p].add(step.measure)
    kept: list[Measure] = []
    for i, (measures, node) in enumerate(zip(read, nodes, strict=False)):
        first_call = schedule.afs != "none" and i == 1
        if len(measures) == 1 and node.alpha != 0.0 and not first_call:
            kept.append(next(iter(measures)))
        else:
            # The first call after an analytic step scales its sample, which thresholding knows of data alone.
            kept.append("data" if node.sigma >= node.alpha or first_call else "noise")
    return kept


def _renamed(entry: _Known, old: Value, new: Value) -> _Known:
    def rename(terms: Terms) -> Terms:
        return [(new if value == old else value, c) for value, c in terms]

    return _Known(entry.node, rename(entry.state), rename(entry.data), rename(entry.noise))


def _scaled(plan: Plan, factor: float) -> Plan:
    """The plan whose first sample must be multiplied by a factor, which becomes one on the network's input."""
    first = plan.calls[0]
    pairs = [(p * factor, q) for p, q in (first.prediction, first.clean)]
    rows = tuple(
        Row(row.out, tuple((slot, c * factor if slot == SAMPLE else c) for slot, c in row.terms)) for row in first.rows
    )
    scaled = dataclasses.replace(
        first, in_scale=first.in_scale * factor, prediction=pairs[0], clean=pairs[1], rows=rows
    )
    return dataclasses.replace(plan, calls=(scaled, *plan.calls[1:]))
