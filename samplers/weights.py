"""The weight engine: one step's coefficients from measure, interpolation variable and nodes, in float64.

With ``lambda = log(alpha / sigma)`` the exact solutions between two nodes ``s`` and ``t`` are (arXiv 2211.01095,
equation 8; arXiv 2206.00927, equation 3.4)

    data:   x_t = sigma_t / sigma_s x_s + sigma_t int e^lambda x0(lambda) dlambda
    noise:  x_t = alpha_t / alpha_s x_s + alpha_t int eps drho,   rho = sigma / alpha

A multistep method replaces the prediction by a polynomial through known nodes; what it is a polynomial in (lambda,
rho, time) is what tells DPM-Solver++, UniPC and the forms of DEIS apart.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from .schedule import Array

Measure = Literal["data", "noise"]


@dataclass(frozen=True)
class Node:
    """A point of the trajectory: ``x = alpha x_0 + sigma noise``."""

    alpha: float
    sigma: float

    @property
    def half_logsnr(self) -> float:
        """``log(alpha / sigma)``, infinite at the ends."""
        if self.alpha == 0.0:
            return -math.inf
        return math.inf if self.sigma == 0.0 else math.log(self.alpha) - math.log(self.sigma)

    @property
    def rho(self) -> float:
        """``sigma / alpha``, infinite where ``alpha`` is 0."""
        return math.inf if self.alpha == 0.0 else self.sigma / self.alpha


@dataclass(frozen=True)
class Weights:
    """``x_t = state * x_s + sum predictions[k] * m_k + noise * xi``.

    Attributes:
        state: coefficient of the sample at the step's start.
        predictions: coefficients of the predictions, newest first (of the nodes handed to the engine).
        noise: standard deviation of the fresh Gaussian noise.
    """

    state: float
    predictions: tuple[float, ...]
    noise: float = 0.0


def phi(order: int, z: float) -> float:
    """``phi_0 = e^z``, ``phi_{k+1} = (phi_k - 1/k!) / z``: the series below 1, the recursion above."""
    if abs(z) < 1.0:
        term = total = 1.0 / math.factorial(order)
        for n in range(1, 30):
            term *= z / (order + n)
            total += term
        return total
    value = math.expm1(z) / z if order else math.exp(z)
    for k in range(1, order):
        value = (value - 1.0 / math.factorial(k)) / z
    return value


def lambda_weights(
    start: Node, target: Node, others: Sequence[Node], *, measure: Measure, stochastic: bool = False
) -> Weights:
    """Exponential integrator that interpolates in ``lambda`` through the start node and the others.

    With ``others`` the older nodes it is the exponential Adams-Bashforth rule (UniP, DEIS in log rho, the exact
    third order of DPM-Solver++); with the target among them Adams-Moulton (UniC). Nodes at ``alpha = 0`` lie
    infinitely far away and get weight 0; from ``alpha = 0`` or to ``sigma = 0`` the rule is of first order.

    Args:
        start: node of the sample that is propagated, whose prediction comes first.
        target: node of the result.
        others: further nodes, their predictions in this order.
        measure: what the predictions are.
        stochastic: the reverse SDE instead of the probability flow ODE.

    Returns:
        ``1 + len(others)`` prediction weights.
    """
    # The noise form of the SDE does not end at sigma = 0; the clean prediction does, and adds no noise.
    stochastic = stochastic and not (measure == "noise" and target.sigma == 0.0)
    state, noise = _state_and_noise(start, target, measure, stochastic)
    zeroth = _zeroth_moment(start, target, state, measure, stochastic)
    h = target.half_logsnr - start.half_logsnr
    usable = [k for k, node in enumerate(others) if math.isfinite(node.half_logsnr)]
    weights = np.zeros(1 + len(others))
    if not usable or not math.isfinite(h):
        weights[0] = zeroth
        return Weights(state, tuple(weights.tolist()), noise)
    r = np.array([0.0] + [(others[k].half_logsnr - start.half_logsnr) / h for k in usable])
    moments = np.array([_moment(j, h, target, measure, stochastic) for j in range(len(r))])
    solved = np.linalg.solve(np.vander(r, increasing=True).T, moments)
    weights[[0] + [1 + k for k in usable]] = close(solved, zeroth)
    return Weights(state, tuple(weights.tolist()), noise)


def slope_weights(
    start: Node,
    target: Node,
    other: Node,
    slope: float,
    *,
    measure: Measure,
    stochastic: bool = False,
) -> Weights:
    """Second order by a shortcut: ``m_start + slope * (m_other - m_start) / r`` held over the whole step.

    ``r = (lambda_other - lambda_start) / h``. With ``slope = 1/2`` this is the midpoint form of DPM-Solver++ (arXiv
    2211.01095, algorithm 2) and UniP-2 with B2.

    Returns:
        the weights of the predictions at ``start`` and at ``other``.
    """
    # The noise form of the SDE does not end at sigma = 0; the clean prediction does, and adds no noise.
    stochastic = stochastic and not (measure == "noise" and target.sigma == 0.0)
    state, noise = _state_and_noise(start, target, measure, stochastic)
    zeroth = _zeroth_moment(start, target, state, measure, stochastic)
    h = target.half_logsnr - start.half_logsnr
    if not math.isfinite(h) or not math.isfinite(other.half_logsnr):
        return Weights(state, (zeroth, 0.0), noise)
    moved = zeroth * slope * h / (other.half_logsnr - start.half_logsnr)
    return Weights(state, (zeroth - moved, moved), noise)


def polynomial_weights(points: Sequence[float], quadrature: tuple[Array, Array]) -> Array:
    """``int ell_k(u) g(u) du`` for the Lagrange basis ``ell_k`` on the points.

    Args:
        points: distinct values of the interpolation variable, newest first.
        quadrature: abscissae and weights that include the density ``g``.
    """
    u, w = quadrature
    basis = np.ones((len(points), len(u)))
    for k, own in enumerate(points):
        for l, other in enumerate(points):
            if l != k:
                basis[k] *= (u - other) / (own - other)
    return basis @ w


def close(weights: Array, zeroth: float) -> Array:
    """Replaces the largest weight by what the others leave of the known sum: exact on constants to rounding."""
    weights = np.array(weights, np.float64)
    largest = int(np.abs(weights).argmax())
    weights[largest] = zeroth - (weights.sum() - weights[largest])
    # One more pass removes what the subtraction above rounded.
    weights[largest] += zeroth - math.fsum(weights)
    return weights


def noise_zeroth_moment(start: Node, target: Node) -> float:
    """``alpha_t (rho_t - rho_s)``: the sum of all weights of a noise form."""
    if target.sigma == 0.0:
        return -target.alpha * start.rho
    return -target.sigma * math.expm1(target.half_logsnr - start.half_logsnr)


def _state_and_noise(start: Node, target: Node, measure: Measure, stochastic: bool) -> tuple[float, float]:
    h = target.half_logsnr - start.half_logsnr
    if measure == "noise":
        return target.alpha / start.alpha, target.sigma * math.sqrt(math.expm1(2.0 * h)) if stochastic else 0.0
    state = target.sigma / start.sigma
    if not stochastic:
        return state, 0.0
    return state * math.exp(-h), target.sigma * math.sqrt(-math.expm1(-2.0 * h))


def _zeroth_moment(start: Node, target: Node, state: float, measure: Measure, stochastic: bool) -> float:
    if measure == "noise":
        return noise_zeroth_moment(start, target) * (2.0 if stochastic else 1.0)
    h = target.half_logsnr - start.half_logsnr
    if math.isfinite(h):
        return -target.alpha * math.expm1(-2.0 * h if stochastic else -h)
    return target.alpha - state * start.alpha


def _moment(j: int, h: float, target: Node, measure: Measure, stochastic: bool) -> float:
    """``int (tau / h)^j`` against the kernel of the exact solution, ``tau`` from 0 to ``h``."""
    if measure == "noise":
        return -target.sigma * h * math.factorial(j) * phi(j + 1, h) * (2.0 if stochastic else 1.0)
    step = 2.0 * h if stochastic else h
    return target.alpha * step * math.factorial(j) * phi(j + 1, -step)
