"""Generalized heavy-ball momentum, GHVB (arXiv 2307.11118): PLMS between the orders.

Where HB (``heavy_ball.py``) damps the direction of a solver, GHVB damps the noise predictions first and corrects for
the lag by its weights, so that the order of convergence stays:

    v_{n+1} = (1 - beta) v_n + beta eps_n,    x / alpha moves along sum_k c_k v_{n+1-k} over sigma / alpha
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import TYPE_CHECKING, Any

from .builder import PlanBuilder, Value
from .grid import Grid
from .multistep import Predictor, multistep
from .options import ScheduleConfig, scheduler_options
from .plan import Plan
from .registry import register
from .scheduler import PlanScheduler
from .weights import Weights, lambda_weights, noise_zeroth_moment

if TYPE_CHECKING:
    from typing_extensions import Unpack

_SERIES = tuple(Fraction(*pair) for pair in ((1, 1), (1, 2), (5, 12), (3, 8), (251, 720)))
"""Adams-Bashforth of any order, by truncation: ``sum_j a_j D^j`` with the backward difference ``D``."""


def difference_weights(order: int, damping: float) -> tuple[float, ...]:
    """GHVB in backward differences: ``(w_0, w_1, ...)``, the direction being ``sum_j w_j D^j v / damping``.

    The series of Adams-Bashforth times ``damping + (1 - damping) D``, which undoes the lag of the velocity, cut after
    ``order`` terms: beta, (2 - beta) / 2, (6 - beta) / 12, (10 - beta) / 24, (270 - 19 beta) / 720, exactly rounded.
    The ``c_k`` of arXiv 2307.11118 are their expansion.

    Args:
        order: 1 to 5.
        damping: ``beta`` in (0, 1]; 1 is Adams-Bashforth.

    Raises:
        ValueError: order or damping out of range.
    """
    if order not in range(1, len(_SERIES) + 1):
        raise ValueError(f"order {order} must be 1 to {len(_SERIES)}")
    if not 0.0 < damping <= 1.0:
        raise ValueError(f"damping {damping} must lie in (0, 1]; 1 is no momentum")
    return tuple(float(weight) for weight in _differences(order, damping))


def order_and_damping(momentum_number: float) -> tuple[int, float]:
    """What a momentum number stands for: GHVB of order ``ceil(M)`` with damping ``M - (order - 1)``.

    An integer has damping 1 and is PLMS (iPNDM) of that order; below 1 it is Euler's method with HB.

    Raises:
        ValueError: the number is not in (0, 5].
    """
    if not 0.0 < momentum_number <= len(_SERIES):
        raise ValueError(f"momentum_number {momentum_number} must lie in (0, {len(_SERIES)}]; 3.5 is usual")
    # Decimals are meant: in binary 2.8 - 2 is not 0.8.
    number = max(round(float(momentum_number), 6), 1e-6)
    order = math.ceil(number)
    return order, round(number - (order - 1), 6)


def generalized_heavy_ball(plan: PlanBuilder, order: int, damping: float) -> Plan:
    """Writes the plan of GHVB (arXiv 2307.11118).

    The first velocity is the first noise prediction, and orders rise with the number of velocities. Kept are the
    velocity and the last ``order - 2`` lags ``eps_n - v_n``: over these no coefficient grows as damping falls, while
    the ``c_k`` over velocities grow with ``1 / damping``. Weights are those of equal steps in ``sigma / alpha`` on any
    grid, as in the authors' code. A step of order 1 to ``sigma = 0`` is without momentum.

    Args:
        plan: where to write.
        order: 1 to 5.
        damping: ``beta`` in (0, 1]; 1 gives PLMS.
    """
    grid = plan.grid
    if damping == 1.0:
        return multistep(plan, _plms(grid, order))
    x = plan.initial
    velocity: Value | None = None
    lags: list[Value] = []
    for i in range(plan.start, grid.steps):
        node, target = grid.nodes[i], grid.nodes[i + 1]
        if node.alpha == 0.0:
            first = lambda_weights(node, target, (), measure="data")
            x = plan.combine([(x, first.state), (plan.evaluate(x, i, "data"), first.predictions[0])])
            continue
        m = plan.evaluate(x, i, "noise")
        state, width = target.alpha / node.alpha, noise_zeroth_moment(node, target)
        if velocity is None or (order == 1 and target.sigma == 0.0):
            velocity = m
            x = plan.combine([(x, state), (m, width)])
            continue
        lags.insert(0, plan.combine([(m, 1.0), (velocity, -1.0)]))
        velocity = plan.combine([(velocity, 1.0), (lags[0], damping)])
        # D v = damping * lag, so the D^j v / damping are differences of lags; there is a lag less than velocities.
        used = min(order, len(lags) + 1)
        weights = _expanded(_differences(used, damping)[1:])
        x = plan.combine(
            [(x, state), (velocity, width), *((w, width * c) for w, c in zip(lags, weights, strict=False))]
        )
    return plan.finish(x)


def _plms(grid: Grid, order: int) -> Predictor:
    """Adams-Bashforth of equal steps, on the noise prediction over ``sigma / alpha``."""

    def rule(i: int, known: int) -> Weights:
        start, target = grid.nodes[i], grid.nodes[i + 1]
        width = noise_zeroth_moment(start, target)
        weights = _expanded(_SERIES[: min(order, known)])
        return Weights(target.alpha / start.alpha, tuple(width * c for c in weights))

    return Predictor("noise", rule)


def _differences(order: int, damping: float) -> tuple[Fraction, ...]:
    beta = Fraction(damping)
    return (beta, *(beta * _SERIES[j] + (1 - beta) * _SERIES[j - 1] for j in range(1, order)))


def _expanded(differences: Sequence[Fraction]) -> tuple[float, ...]:
    """``sum_j differences[j] D^j`` as weights of values, newest first."""
    count = len(differences)
    return tuple(
        float(sum((math.comb(j, k) * differences[j] for j in range(k, count)), start=Fraction(0)) * (-1) ** k)
        for k in range(count)
    )


class GHVBScheduler(PlanScheduler):
    """Generalized heavy-ball momentum, GHVB (arXiv 2307.11118): PLMS between the orders.

    Less accurate than PLMS of the next higher integer and more stable, and the reverse for the next lower. The authors
    use 3.5, 3.2 and 3.1 at guidance scales of 7.5, 15 and 22.5 with Stable Diffusion, and 3.8 to 3.9 with DiT.

    Args:
        momentum_number: in (0, 5]; its integer part and the rest are order and damping (see ``order_and_damping``).
            Integers are PLMS, that is iPNDM; below 1 it is DDIM with HB.
        schedule: options of ``ScheduleConfig``; ``final_sigmas_type`` is ``sigma_min`` by default, and ``zero`` for
            flow models.

    Raises:
        ValueError: a number outside (0, 5].
    """

    @scheduler_options(final_sigmas_type=None)
    def __init__(self, *, momentum_number: float = 3.5, **schedule: Unpack[ScheduleConfig]) -> None:
        order_and_damping(momentum_number)
        if self.config.final_sigmas_type is None:
            self.register_to_config(final_sigmas_type="zero" if self.config.use_flow_sigmas else "sigma_min")
        self._setup()

    def _write(self, plan: PlanBuilder, options: Mapping[str, Any]) -> Plan:
        return generalized_heavy_ball(plan, *order_and_damping(options["momentum_number"]))


def _register() -> None:
    # Weights of an equidistant grid: of second order on any other.
    for number in (0.8, 1.8, 2.8, 3.5):
        options = {"momentum_number": number}
        register(f"ghvb{number}", GHVBScheduler, order=min(math.ceil(number), 2), paper="arXiv 2307.11118", **options)


_register()
