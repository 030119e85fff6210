"""The loop that all multistep solvers share: evaluate, correct, remember, predict."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Literal

from .builder import PlanBuilder, Value
from .plan import Plan
from .weights import Measure, Node, Weights, lambda_weights

Rule = Callable[[int, int], Weights]
"""``rule(i, known)``: weights of the step from node ``i`` to ``i + 1`` with ``known`` predictions, newest first."""

Corrector = Callable[[int, int], Weights | None]
"""``corrector(i, known)``: weights of the step from node ``i`` to ``i + 1`` whose first prediction is the one at node
``i + 1``; ``None`` leaves the step uncorrected."""

Compensator = Callable[[int, int], Sequence[float] | None]
"""``compensator(i, known)``: weights of the last predictions, newest first, that replace the one at node ``i`` for
good, after the corrector has read it; ``None`` leaves it."""

CorrectorForm = Literal["classic", "delta"]


@dataclass(frozen=True)
class Predictor:
    """A multistep solver.

    Attributes:
        measure: what its predictions are.
        rule: its weights.
        stochastic: whether the first step of a run that begins at ``alpha = 0`` adds noise.
    """

    measure: Measure
    rule: Rule
    stochastic: bool = False


def multistep(
    plan: PlanBuilder,
    predictor: Predictor,
    corrector: Corrector | None = None,
    *,
    compensator: Compensator | None = None,
    form: CorrectorForm = "classic",
    stop: int | None = None,
) -> Plan:
    """Writes the plan of a predictor, or of a predictor with a corrector that costs no network call.

    Args:
        plan: where to write.
        predictor: the solver.
        corrector: its weights.
        compensator: moves predictions before the steps read them.
        form: ``"classic"`` corrects from the last corrected sample (and discards what a callback changed in the
            predicted one); ``"delta"`` adds the difference to the predicted sample and keeps such changes.
        stop: ends with the sample at this inner node, as the step from there would read it: corrected, at the
            price of a call.
    """
    grid = plan.grid
    end = grid.steps if stop is None else stop
    x = base = plan.initial
    history: list[Value] = []
    last: Weights | None = None
    for i in range(plan.start, grid.steps):
        node, target = grid.nodes[i], grid.nodes[i + 1]
        # At alpha = 0 the noise prediction is the sample itself: only the data form tells where to go.
        measure: Measure = "data" if node.alpha == 0.0 else predictor.measure
        weights = corrector(i - 1, len(history)) if corrector and history else None
        if i == end and weights is None:
            break
        m = plan.evaluate(x, i, measure)
        corrected = x
        if weights is not None and last is not None:
            values = [m, *history]
            if form == "classic":
                corrected = plan.combine([(base, weights.state), *zip(values, weights.predictions, strict=False)])
            else:
                changes = [c - p for c, p in zip_longest(weights.predictions, (0.0, *last.predictions), fillvalue=0.0)]
                corrected = plan.combine([(x, 1.0), *zip(values, changes, strict=False)])
        base = corrected
        if i == end:
            x = corrected
            break
        if measure != predictor.measure:
            last = None
            first = lambda_weights(node, target, (), measure=measure, stochastic=predictor.stochastic)
            x = plan.combine([(base, first.state), (m, first.predictions[0])], noise=first.noise)
            continue
        history.insert(0, m)
        moved = compensator(i, len(history)) if compensator else None
        if moved is not None:
            history[0] = plan.combine(zip(history, moved, strict=False))
        last = predictor.rule(i, len(history))
        x = plan.combine([(base, last.state), *zip(history, last.predictions, strict=False)], noise=last.noise)
    return plan.finish(x)


def older(nodes: Sequence[Node], i: int, count: int) -> list[Node]:
    """The ``count`` nodes before node ``i``, newest first."""
    return [nodes[k] for k in range(i - 1, i - 1 - count, -1)]


def final_order(order: int, i: int, steps: int, *, lower_order_final: bool, end_first: bool) -> int:
    """The order that the last steps allow.

    Args:
        order: wanted.
        i: index of the step.
        steps: number of steps of the whole grid.
        lower_order_final: below 15 steps, order at most ``k`` on the ``k``-th step from the end.
        end_first: order 1 on the last step in any case.
    """
    if lower_order_final and steps < 15:
        order = min(order, steps - i)
    return 1 if end_first and i == steps - 1 else order
