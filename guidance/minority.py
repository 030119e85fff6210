"""Minority guidance: towards samples that are rare in the data, with a classifier or by the model alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch

from fewstep.samplers import Denoiser, PlanScheduler
from fewstep.samplers.guided import Guidance, GuidedRun, GuidedStep
from fewstep.samplers.noise import NoiseStreams
from fewstep.samplers.trajectory import Network, network_output

from .minority_scores import Distance, Reconstruction, checked_distances, squared_distance
from .rewards import Decoder, class_log_probability

NoisyClassifier = Callable[[torch.Tensor, float, float], torch.Tensor]
"""``classifier(sample, alpha, sigma)``: logits ``(batch, classes)`` of ``sample = alpha * clean + sigma * noise``. One
that was trained with time labels is ``lambda x, alpha, sigma: network(x, schedule.timestep(sigma / alpha))``."""


class MinorityGuidance(Guidance):
    """Guidance towards a class of a classifier of noised samples (arXiv 2301.12334, equation 11).

    ``scheduler.guide(MinorityGuidance(MinorityClassifier.bundled(), target=9, scale=2.0))`` works in any pipeline, with
    any sampler, at no network call. The score becomes ``s + scale * grad log p(target | x_t)``, so the predicted clean
    sample moves by ``scale * sigma^2 / alpha`` times the gradient, whatever the model predicts. With a scale of 1 and
    the true posterior the results follow the data of the class; larger scales go beyond.

    At pure noise (``alpha = 0``) a sample says nothing about its class, and nothing is changed.

    Args:
        classifier: of noised samples, such as ``MinorityClassifier.bundled()`` for the bundled digit models. Gradients
            flow through it alone, not through the model.
        target: of its classes; the last is the rarest, 0 the commonest. Or several, any of which will do.
        scale: 0 changes nothing; the paper takes 3.5 with 250 steps on bedrooms.

    Raises:
        ValueError: a scale that is negative or not finite; in a step, logits that do not fit.
    """

    def __init__(self, classifier: NoisyClassifier, target: int | Sequence[int], scale: float) -> None:
        _check_scale(scale, "target=0 of the minority classes leads to common samples")
        self.classifier, self.target, self.scale = classifier, target, scale

    def act(self, step: GuidedStep) -> None:
        alpha, sigma = step.call.alpha, step.call.sigma
        if self.scale == 0.0 or alpha == 0.0:
            return
        log_probability = class_log_probability(lambda x: self._logits(x, alpha, sigma), self.target)
        with torch.inference_mode(False), torch.enable_grad():
            x = step.sample.detach().clone().requires_grad_()
            values = log_probability(x)
            if not values.requires_grad:
                raise ValueError("classifier has no gradient by its samples; give one that torch can differentiate")
            (gradient,) = torch.autograd.grad(values.sum(), x)
        step.predict(torch.add(step.clean, gradient, alpha=self.scale * sigma**2 / alpha))

    def _logits(self, x: torch.Tensor, alpha: float, sigma: float) -> torch.Tensor:
        logits = self.classifier(x, alpha, sigma)
        if not isinstance(logits, torch.Tensor) or logits.ndim != 2 or len(logits) != len(x):
            found = tuple(logits.shape) if isinstance(logits, torch.Tensor) else type(logits).__name__
            raise ValueError(f"classifier returned {found}; return logits ({len(x)}, classes)")
        return logits


class SelfMinorityGuidance(Guidance):
    """Guidance towards rare samples by the model alone, without a classifier (arXiv 2407.11555).

    A guided step noises the predicted clean sample anew, lets the model predict it again, and moves the sample such
    that the two differ more: ``g`` is the gradient of their distance, through the first prediction, divided by its
    largest entry in each sample. The score becomes ``s + scale * g``, in the coordinates of a variance preserving
    model, so that a scale means the same for every schedule.

    It costs two calls of ``network`` in each guided step, one of them with a backward pass: ``network`` must know the
    prompts of the run. For a pipeline that is ``Denoiser.from_pipeline(pipe, ...)`` with the arguments of its call.

    Args:
        network: a ``Denoiser``, or any function ``network(x, t)``.
        scheduler: of the run; its schedule and prediction type are what counts.
        scale: 0 changes nothing and costs nothing; the paper takes 0.2 to 0.4 with 250 steps.
        timestep: label of the noise level of the second prediction; the paper takes 0.8 of the training's timesteps,
            800 of 1000.
        distance: of decoded samples, differentiable; the paper takes LPIPS with AlexNet.
        decode: from what the scheduler steps to what the distance compares, with gradients; nothing by default.
        every: acts in the first of every so many network calls; the paper takes 5 with 250 steps.
        seeds: of the noise: of sample 0 (sample ``k`` then has ``seeds + k``), or one a sample.

    Raises:
        ValueError: impossible options.
    """

    def __init__(
        self,
        network: Network | Denoiser,
        scheduler: PlanScheduler,
        *,
        scale: float,
        timestep: float,
        distance: Distance = squared_distance,
        decode: Decoder | None = None,
        every: int = 1,
        seeds: int | Sequence[int] = 0,
    ) -> None:
        _check_scale(scale, "there is no guidance to common samples without classifier")
        if every < 1:
            raise ValueError(f"every {every} must be at least 1, which guides every step")
        self._reconstruction = Reconstruction(network, scheduler)
        self._level = self._reconstruction.level(timestep)
        self.scale, self.every, self._distance, self._decode = scale, every, distance, decode
        self._streams = NoiseStreams(seeds)

    def start(self, run: GuidedRun) -> None:
        # A pipeline that doubles its batch for guidance (DiT) goes on from the first half.
        halves = run.sample.chunk(2)
        size = getattr(self._reconstruction.network, "batch_size", None)
        self._doubled = len(run.sample) == 2 * (size or 0) and torch.equal(*halves)

    def act(self, step: GuidedStep) -> None:
        alpha, sigma = step.call.alpha, step.call.sigma
        if self.scale == 0.0 or step.index % self.every or alpha == 0.0:
            return
        sample = step.sample.chunk(2)[0] if self._doubled else step.sample
        gradient = self._gradient(step, sample)
        if self._doubled:
            gradient = torch.cat([gradient, gradient])
        rho = sigma / alpha
        step.predict(torch.add(step.clean, gradient, alpha=self.scale * rho * rho / math.hypot(1.0, rho)))

    def _gradient(self, step: GuidedStep, sample: torch.Tensor) -> torch.Tensor:
        """Of the distance, by the sample, with 1 as the largest entry of each."""
        reconstruction, call = self._reconstruction, step.call
        p, q = call.clean
        with torch.inference_mode(False), torch.enable_grad():
            x = sample.detach().clone().requires_grad_()
            clean = p * x + q * network_output(reconstruction.scheduler, reconstruction.network, x, call)
            with torch.no_grad():
                noise = self._streams.draw(step.index, x.shape, x.device, x.dtype)
                again = reconstruction.clean(reconstruction.noised(clean, self._level, noise), self._level)
                shown = again if self._decode is None else self._decode(again)
            values = self._distance(clean if self._decode is None else self._decode(clean), shown)
            checked_distances(values, x)
            if not values.requires_grad:
                raise ValueError("distance has no gradient by the sample; give functions that torch can differentiate")
            (gradient,) = torch.autograd.grad(values.sum(), x)
        largest = gradient.abs().flatten(1).amax(1).view(-1, *[1] * (x.ndim - 1))
        return gradient / largest.clamp(min=torch.finfo(gradient.dtype).tiny)


def _check_scale(scale: float, remedy: str) -> None:
    if not 0.0 <= scale < math.inf:
        raise ValueError(f"scale {scale} must be finite and at least 0; {remedy}")
