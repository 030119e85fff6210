"""The samplers that mean-reverting diffusion came with (arXiv 2301.11699): what the MR Sampler is compared with.

The released code of the comparison visits N of the 100 times and goes on with the coefficients of neighbouring times,
which leaves most of the noise in the image; here every step has those of its own length.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from diffusers.utils.torch_utils import randn_tensor

from fewstep.samplers import MRSamplerScheduler, RestorationPipeline

Step = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, float, float, float, torch.Tensor], torch.Tensor]
"""Sample, clean prediction, condition, alpha there, alpha where the step ends, sigma_inf, normal noise -> sample."""


def posterior_step(
    x: torch.Tensor,
    clean: torch.Tensor,
    mu: torch.Tensor,
    alpha: float,
    alpha_next: float,
    sigma_inf: float,
    z: torch.Tensor,
) -> torch.Tensor:
    """A draw of the next sample given this one and the clean image, exact for a step of any length.

    Args:
        x: the sample.
        clean: the predicted clean image.
        mu: the degraded image.
        alpha: of the sample.
        alpha_next: of the next sample; at 1 it is the clean prediction.
        sigma_inf: of the model.
        z: standard normal.
    """
    ratio = alpha / alpha_next
    here, there, between = (1.0 - a * a for a in (alpha, alpha_next, ratio))
    mean = mu + ratio * there / here * (x - mu) + alpha_next * between / here * (clean - mu)
    return mean + sigma_inf * math.sqrt(between * there / here) * z


def euler_step(
    x: torch.Tensor,
    clean: torch.Tensor,
    mu: torch.Tensor,
    alpha: float,
    alpha_next: float,
    sigma_inf: float,
    z: torch.Tensor,
) -> torch.Tensor:
    """Euler-Maruyama on the reverse SDE ``dx = (theta (mu - x) - 2 theta sigma_inf^2 score) dt + ... dw``.

    The step that ends at the clean image adds no noise, which nothing would remove.

    Args:
        x: the sample.
        clean: the predicted clean image.
        mu: the degraded image.
        alpha: of the sample.
        alpha_next: of the next sample.
        sigma_inf: of the model.
        z: standard normal.
    """
    length = math.log(alpha_next / alpha)  # the integral of theta over the step
    score = (alpha * clean + (1.0 - alpha) * mu - x) / (sigma_inf**2 * (1.0 - alpha * alpha))
    following = x - length * (mu - x) + 2.0 * length * sigma_inf**2 * score
    return following + sigma_inf * math.sqrt(2.0 * length) * z if alpha_next < 1.0 else following


@torch.no_grad()
def restore(
    pipeline: RestorationPipeline, step: Step, image: torch.Tensor, steps: int, generators: Sequence[torch.Generator]
) -> torch.Tensor:
    """Restores a batch as the pipeline does, with one of the steps above and evenly spaced labels.

    Args:
        pipeline: gives network and process; of velocity prediction.
        step: ``posterior_step`` or ``euler_step``.
        image: degraded, ``(batch, C, H, W)`` in [0, 1], of a size that the network can halve.
        steps: network calls.
        generators: one an image.

    Returns:
        the restored images, in [0, 1].

    Raises:
        ValueError: a network of another prediction.
    """
    config = pipeline.scheduler.config
    if config.prediction_type != "v_prediction":
        raise ValueError(f"model predicts {config.prediction_type}; the reverse SDE is measured on v_prediction")
    scheduler = MRSamplerScheduler.from_config(config, final_sigmas_type="zero")
    scheduler.set_timesteps(steps)
    schedule, sigma_inf = scheduler.schedule, config.sigma_inf
    alphas = [*schedule.alpha_sigma(schedule.level(scheduler.timesteps.double().numpy()))[0].tolist(), 1.0]
    mu = image.to(pipeline.device)
    x = mu + sigma_inf * randn_tensor(mu.shape, list(generators), mu.device, mu.dtype)
    for i, t in enumerate(scheduler.timesteps):
        velocity = pipeline.unet(torch.cat([x - mu, mu], dim=1), t, return_dict=False)[0]
        clean = alphas[i] * x + (1.0 - alphas[i]) * mu - math.sqrt(1.0 - alphas[i] ** 2) * velocity
        z = randn_tensor(mu.shape, list(generators), mu.device, mu.dtype)
        x = step(x, clean, mu, alphas[i], alphas[i + 1], sigma_inf, z)
    return x.clamp(0.0, 1.0)
