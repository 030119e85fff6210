"""Feynman-Kac correctors (arXiv 2503.02819): weights that make products and powers of models what they claim to be."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from fewstep.samplers.guided import GuidedRun, GuidedStep

from .populations import precise
from .potentials import Potential

Expert = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""``expert(x, t)``: what its network returns for samples ``(batch, ...)``, scaled as ``scale_model_input`` does, at a
time label ``()``; a ``Denoiser`` is one."""


def spread_of(exponents: Sequence[float], predictions: Sequence[torch.Tensor], mean: torch.Tensor) -> torch.Tensor:
    """``sum g_i |e_i - m|^2``, ``(batch,)``, of noise predictions ``e_i`` around their weighted mean ``m``."""
    total = torch.zeros(len(mean), dtype=precise(mean), device=mean.device)
    if len(predictions) > 1:
        for exponent, prediction in zip(exponents, predictions, strict=True):
            total = total + exponent * _square(prediction - mean)
    return total


def power_weights(total: float, churn: float, length: float, noisiness: float) -> tuple[float, float]:
    """The log-weight of an interval for the power ``q^G``: half of ``G (G - 1) |e|^2`` integrated over ``log u``.

    Over short intervals this is the trapezium of both ends' ``|e|^2``. Over long ones, as the first of a run are,
    particles forget where they came from and the ends say less. There it is the mean of the weight given both ends for
    Gaussian data (Mehler's kernel of the weighted process over that of the unweighted).

    Args:
        total: ``G``, above 0.
        churn: of the proposals, above -1.
        length: of the interval in ``log u = log sigma^2 / alpha^2``.
        noisiness: variance of the noise in that of the samples, at most 1.

    Returns:
        coefficient of ``|e|^2`` at each end, and a constant for each dimension; both exactly 0 for ``G = 1``.
    """
    if total == 1.0:
        return 0.0, 0.0
    # Rates of forgetting of the proposals, and of those under the weights; only their squares matter.
    free = max(abs((1.0 + 0.5 * churn) * total * noisiness - 0.5), 1e-7)
    square = free**2 - (1.0 + churn) * total * (total - 1.0) * noisiness**2
    if square <= 0.0:  # too little churn for weights of finite mean over long intervals
        return 0.25 * total * (total - 1.0) * length, 0.0
    bound = max(math.sqrt(square), 1e-7)
    ends = (free * math.tanh(free * length / 2) - bound * math.tanh(bound * length / 2)) / (2.0 * (1.0 + churn))
    sinhs = _log_sinh_over(free, length) - _log_sinh_over(bound, length)
    apart = length * (_over_sinh(bound, length) - _over_sinh(free, length))
    return ends / noisiness**2, 0.5 * (sinhs - apart)


def _over_sinh(rate: float, length: float) -> float:
    """``rate / sinh(rate * length)``."""
    x = rate * length
    return 2.0 * rate * math.exp(-x) / -math.expm1(-2.0 * x)


def _log_sinh_over(rate: float, length: float) -> float:
    """``log(sinh(rate * length) / rate)``, up to a constant."""
    x = rate * length
    return x + math.log(-math.expm1(-2.0 * x)) - math.log(rate)


def _square(v: torch.Tensor) -> torch.Tensor:
    return v.flatten(1).to(precise(v)).square().sum(1)


class GuidanceBranches:
    """Records both branches of classifier-free guidance, which schedulers only see put together.

    Args:
        pipeline: with ``unet`` or ``transformer``, which it calls once for both branches or once for each.

    Raises:
        ValueError: another pipeline.
    """

    def __init__(self, pipeline: Any) -> None:
        networks = [getattr(pipeline, name, None) for name in ("unet", "transformer")]
        found = [network for network in networks if isinstance(network, torch.nn.Module)]
        if not found:
            raise ValueError(f"{type(pipeline).__name__} has neither unet nor transformer whose branches to record")
        self._pipeline, self._outputs = pipeline, list[torch.Tensor]()
        self._handle = found[0].register_forward_hook(self._record)

    def remove(self) -> None:
        """Stops recording."""
        self._handle.remove()

    def _record(self, module: torch.nn.Module, args: Any, output: Any) -> None:
        self._outputs.append(output[0] if isinstance(output, tuple) else output.sample)

    def start(self) -> None:
        """Checks how the pipeline puts the branches together.

        Raises:
            ValueError: not on the line through both.
        """
        if getattr(self._pipeline, "guidance_rescale", 0.0) > 0.0:
            raise ValueError("guidance_rescale changes the guided density; call the pipeline with guidance_rescale=0")

    def take(self, output: torch.Tensor) -> torch.Tensor | None:
        """``w (w - 1) |c - u|^2`` of the guided output ``u + w (c - u)``, ``(batch,)``.

        It is ``<g - u, g - c>``, which needs neither the scale ``w`` nor which branch is which.

        Args:
            output: what the scheduler was given, ``(batch, C, ...)``.

        Returns:
            ``None`` where the pipeline ran without guidance.

        Raises:
            ValueError: calls of the network that are not two branches.
        """
        recorded, self._outputs = self._outputs, []
        batch, channels = output.shape[:2]
        rows = [len(one) for one in recorded]
        if rows == [batch, batch]:
            halves = recorded
        elif rows == [2 * batch]:
            halves = list(recorded[0].chunk(2))
        elif rows == [batch] and batch % 2 == 0 and torch.equal(*output.chunk(2)):
            # DiT hands both halves of its doubled batch to the scheduler, with the guided output twice.
            halves = [torch.cat([half, half]) for half in recorded[0].chunk(2)]
        elif rows == [batch]:
            return None
        else:
            raise ValueError(
                f"the network was called for {rows} samples where the scheduler got {batch}; only classifier-free "
                "guidance of two branches can be corrected, without skipped layers or further networks"
            )
        # A network that predicts variances too has twice the channels.
        first, second = (output.to(half.dtype) - half[:, :channels] for half in halves)
        wide = precise(output)
        return (first.flatten(1).to(wide) * second.flatten(1).to(wide)).sum(1)


class FeynmanKacCorrector(Potential):
    """Weights of a run whose proposals follow ``sum g_i score_i`` (arXiv 2503.02819).

    They grow by half of ``|sum g_i e_i|^2 - sum g_i |e_i|^2`` over ``d log(sigma^2 / alpha^2)``, with the noise
    predictions ``e_i`` (proposition D.5 there, of which 3.1 to 3.3 are cases). A last step to ``sigma = 0`` only
    denoises: the density is that of the level before it.

    Args:
        exponents: ``g_i`` of the pipeline's own network and of the experts.
        churn: of the proposals.
        experts: the networks beside it. Their time labels, noise schedule and prediction type are the scheduler's.
        branches: of the pipeline's guidance, whose density is then ``q_u^(1-w) q_c^w``; without them, the guided
            prediction counts as a model of its own.
    """

    def __init__(
        self,
        exponents: Sequence[float],
        *,
        churn: float,
        experts: Sequence[Expert] = (),
        branches: GuidanceBranches | None = None,
    ) -> None:
        self.exponents, self.churn = list(exponents), churn
        self.experts, self.branches = list(experts), branches

    def start(self, run: GuidedRun) -> None:
        if len(self.exponents) != 1 + len(self.experts):
            raise ValueError(
                f"exponents {self.exponents} are those of {len(self.exponents)} networks, but {1 + len(self.experts)} "
                "are there; hand the others to with_experts"
            )
        if self.branches is not None:
            self.branches.start()
        self._last = len(run.plan) - 1
        self._before: tuple[torch.Tensor, torch.Tensor] | None = None
        self._length = self._noisiness = 0.0

    def weigh(self, step: GuidedStep, *, active: bool, turn: bool) -> torch.Tensor | None:
        call = step.call
        guided = None if self.branches is None else self.branches.take(step.model_output)
        length = _length((call.alpha, call.sigma), step.following)
        if length == 0.0:  # the call that scales the noise; nobody reads its prediction
            return None
        predictions = self._predictions(step)
        before, self._before = self._before, None
        if not active:
            return None
        total = sum(self.exponents)
        mean = predictions[0]
        if len(predictions) > 1:
            mean = torch.stack([g / total * e for g, e in zip(self.exponents, predictions, strict=True)]).sum(0)
        spread = spread_of(self.exponents, predictions, mean)
        if guided is not None:
            spread = spread - self.exponents[0] * _noise_slope(step) ** 2 * guided
        here = _square(mean), spread
        dimensions = mean[0].numel()
        increment = None if before is None else self._over(self._length, before, here, dimensions, self._noisiness)
        self._before, self._length = here, length
        # In the middle of the interval, for data of unit variance.
        u = (call.sigma / call.alpha) ** 2 * math.exp(-0.5 * length) if math.isfinite(length) else math.inf
        self._noisiness = 1.0 / (1.0 + 1.0 / u) if u > 0.0 else 0.0
        if step.index == self._last and step.following[1] > 0.0:
            # No prediction is known at the end: the score, e / sigma, is taken for constant.
            end = math.exp(-length) * here[0], math.exp(-length) * here[1]
            last = self._over(length, here, end, dimensions, self._noisiness)
            increment = last if increment is None else increment + last
        return increment

    def follow(self, ancestors: torch.Tensor) -> None:
        if self._before is not None:
            square, spread = self._before
            self._before = square.index_select(0, ancestors), spread.index_select(0, ancestors)

    def _over(
        self,
        length: float,
        start: tuple[torch.Tensor, torch.Tensor],
        end: tuple[torch.Tensor, torch.Tensor],
        dimensions: int,
        noisiness: float,
    ) -> torch.Tensor:
        """The log-weight of an interval, by ``|m|^2`` and ``sum g_i |e_i - m|^2`` at its ends."""
        if math.isinf(length):
            # From pure noise, where all models agree, the spread grows with 1 / u.
            return -0.5 * end[1]
        ends, constant = power_weights(sum(self.exponents), self.churn, length, noisiness)
        return ends * (start[0] + end[0]) + constant * dimensions - 0.25 * length * (start[1] + end[1])

    def _predictions(self, step: GuidedStep) -> list[torch.Tensor]:
        """Noise predictions of all networks; the step gets the mean of their clean samples."""
        call = step.call
        cleans = [step.clean]
        if self.experts:
            label = torch.tensor(call.timestep, device=step.sample.device)
            seen = step.sample * call.in_scale
            p, q = call.clean
            outputs = [expert(seen, label).to(step.sample.dtype) for expert in self.experts]
            cleans += [p * step.sample + q * output for output in outputs]
            total = sum(self.exponents)
            step.predict(torch.stack([g / total * c for g, c in zip(self.exponents, cleans, strict=True)]).sum(0))
        return [(step.sample - call.alpha * clean) / call.sigma for clean in cleans]


def _length(start: tuple[float, float], end: tuple[float, float]) -> float:
    """``log`` of the ratio of ``sigma^2 / alpha^2``; infinite at the ends."""
    if start[0] == 0.0 or end[1] == 0.0:
        return math.inf
    return 2.0 * (math.log(start[1]) - math.log(start[0]) - math.log(end[1]) + math.log(end[0]))


def _noise_slope(step: GuidedStep) -> float:
    """How the noise prediction changes with the model's output."""
    return -step.call.alpha * step.call.clean[1] / step.call.sigma
