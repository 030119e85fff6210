"""Prediction types as pairs of numbers: every conversion is ``p * sample + q * model_output``."""

from __future__ import annotations

from .schedule import EDMSchedule, NoiseSchedule

PREDICTION_TYPES = ("epsilon", "sample", "v_prediction", "flow_prediction")

Pair = tuple[float, float]


def conversions(
    schedule: NoiseSchedule, prediction_type: str, level: float, alpha: float, sigma: float
) -> tuple[Pair | None, Pair | None]:
    """The pairs ``(p, q)`` that give the clean sample and the noise at one noise level.

    Args:
        schedule: EDM schedules add the preconditioning of arXiv 2206.00364, equation 7.
        prediction_type: one of ``PREDICTION_TYPES``.
        level: noise level.
        alpha: signal coefficient there.
        sigma: noise coefficient there.

    Returns:
        ``(data, noise)``; an entry is ``None`` where the division has no meaning (``alpha = 0`` or ``sigma = 0``).

    Raises:
        ValueError: an unknown prediction type.
    """
    if prediction_type not in PREDICTION_TYPES:
        raise ValueError(f"prediction_type {prediction_type!r} is unknown; use one of {', '.join(PREDICTION_TYPES)}")
    if isinstance(schedule, EDMSchedule):
        data = _edm(schedule.sigma_data, sigma, prediction_type)
        return data, _noise_from_data(data, alpha, sigma)
    if prediction_type == "epsilon":
        return _data_from_noise((0.0, 1.0), alpha, sigma), (0.0, 1.0)
    if prediction_type == "sample":
        return (0.0, 1.0), _noise_from_data((0.0, 1.0), alpha, sigma)
    if prediction_type == "v_prediction":
        square = alpha * alpha + sigma * sigma
        return (alpha / square, -sigma / square), (sigma / square, alpha / square)
    # Flow: the output is noise - clean. On a flow schedule alpha + sigma = 1; elsewhere the sum appears.
    total = alpha + sigma
    return (1.0 / total, -sigma / total), (1.0 / total, alpha / total)


def _edm(sigma_data: float, sigma: float, prediction_type: str) -> Pair:
    square = sigma * sigma + sigma_data * sigma_data
    skip, out = sigma_data * sigma_data / square, sigma * sigma_data / square**0.5
    if prediction_type == "epsilon":
        return skip, out
    if prediction_type == "v_prediction":
        return skip, -out
    raise ValueError(
        f"prediction_type {prediction_type!r} has no meaning on an EDM schedule; use epsilon or v_prediction"
    )


def _data_from_noise(noise: Pair, alpha: float, sigma: float) -> Pair | None:
    if alpha == 0.0:
        return None
    return (1.0 - sigma * noise[0]) / alpha, -sigma * noise[1] / alpha


def _noise_from_data(data: Pair, alpha: float, sigma: float) -> Pair | None:
    if sigma == 0.0:
        return None
    return (1.0 - alpha * data[0]) / sigma, -alpha * data[1] / sigma
