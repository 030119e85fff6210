"""The recipe of the latent space that the bundled digit models share."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL

from .data import LabelledImages
from .loop import train


def train_autoencoder(
    data: LabelledImages,
    work: Path,
    *,
    steps: int = 2500,
    batch_size: int = 128,
    kl_weight: float = 1e-3,
    seed: int = 0,
    save_every: int = 500,
) -> tuple[AutoencoderKL, dict[str, float]]:
    """Trains a KL autoencoder with 4 latent channels at a quarter of the resolution.

    The loss is L1 + L2 reconstruction and ``kl_weight`` times the mean KL divergence. The
    ``scaling_factor`` of the config is set such that latents have unit variance.

    Args:
        data: images; their size must be a multiple of 8.
        work: folder of the checkpoint.
        steps: optimiser steps.
        batch_size: images a step.
        kl_weight: weight of the KL term, a latent element.
        seed: of the initial weights and of every draw.
        save_every: steps between checkpoints.

    Returns:
        The autoencoder and the loop's record.
    """
    torch.manual_seed(seed)
    channels = data.images.shape[1]
    vae = AutoencoderKL(
        in_channels=channels,
        out_channels=channels,
        down_block_types=["DownEncoderBlock2D"] * 3,
        up_block_types=["UpDecoderBlock2D"] * 3,
        block_out_channels=(8, 16, 32),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=data.images.shape[-1],
    )

    def loss_of(generator: torch.Generator) -> torch.Tensor:
        index = torch.randint(len(data), (batch_size,), generator=generator)
        images = data.float_images(index)
        posterior = vae.encode(images).latent_dist
        decoded = vae.decode(posterior.sample(generator)).sample
        error = decoded - images
        kl = 0.5 * (posterior.mean**2 + posterior.var - 1.0 - posterior.logvar).mean()
        return error.abs().mean() + error.square().mean() + kl_weight * kl

    record = train(
        vae,
        loss_of,
        steps=steps,
        learning_rate=2e-3,
        checkpoint=work / "autoencoder.safetensors",
        save_every=save_every,
        seed=seed,
    )
    mean, std = encode(vae, data, scale=1.0)
    variance = (std.square() + mean.square()).mean() - mean.mean() ** 2
    vae.register_to_config(scaling_factor=float(variance.rsqrt()))
    return vae, {**record, "images": steps * batch_size}


@torch.no_grad()
def encode(
    vae: AutoencoderKL, data: LabelledImages, *, scale: float | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and standard deviation of every image's latent posterior, times the scaling factor."""
    factor = vae.config.scaling_factor if scale is None else scale
    means, stds = [], []
    for begin in range(0, len(data), 500):
        posterior = vae.encode(data.float_images(slice(begin, begin + 500))).latent_dist
        means.append(posterior.mean * factor)
        stds.append(posterior.std * factor)
    return torch.cat(means), torch.cat(stds)


def fingerprint(vae: AutoencoderKL) -> str:
    """SHA-256 of the weights: the identity of a latent space."""
    digest = hashlib.sha256()
    for name, tensor in sorted(vae.state_dict().items()):
        digest.update(name.encode() + tensor.detach().float().contiguous().numpy().tobytes())
    return digest.hexdigest()


@torch.no_grad()
def reconstruction_error(vae: AutoencoderKL, data: LabelledImages, count: int = 1000) -> float:
    """Root mean square error of reconstructed images in [-1, 1]."""
    images = data.float_images(slice(0, count))
    return float(F.mse_loss(vae(images).sample, images).sqrt())
