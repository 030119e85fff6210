"""How large steps may be: limits of absolute stability of PLMS with momentum (arXiv 2307.11118)."""

from __future__ import annotations

from .ghvb import difference_weights


def stability_limit(order: int, damping: float = 1.0, *, generalized: bool = False) -> float:
    """The most negative ``step * eigenvalue`` at which oscillations do not grow.

    For the test equation ``dy / dt = eigenvalue * y`` with a negative eigenvalue and equal steps; in sampling ``y`` is
    ``x / alpha``, ``t`` falls with ``sigma / alpha``, and guidance multiplies the eigenvalue. On the real axis all
    these methods lose stability at the root -1 of their characteristic equation; a backward difference is 2 there, so

        limit = -2 (2 - damping) / sum_j w_j 2^j

    with the weights ``w_j`` in backward differences. PLMS of orders 1 to 5: -2, -1, -6/11, -3/10, -90/551; HB times
    ``(2 - damping) / damping``; GHVB at most about twice that of PLMS, towards the limit of one order less.

    Args:
        order: 1 to 5, of the PLMS under HB, or of GHVB.
        damping: ``beta`` in (0, 1]; 1 is PLMS.
        generalized: GHVB instead of HB.

    Returns:
        the limit, below 0.

    Raises:
        ValueError: order or damping out of range.
    """
    momentum = sum(weight * 2.0**j for j, weight in enumerate(difference_weights(order, damping)))
    if not generalized:
        momentum = damping * sum(weight * 2.0**j for j, weight in enumerate(difference_weights(order, 1.0)))
    return -2.0 * (2.0 - damping) / momentum
