"""The recipe of the bundled restoration model: mean-reverting diffusion that undoes blur and noise."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import UNet2DModel

from fewstep.samplers import MRSamplerScheduler, RestorationPipeline

from .data import LabelledImages
from .degradation import degrade
from .loop import train


def train_restoration(
    data: LabelledImages,
    work: Path,
    *,
    steps: int,
    batch_size: int = 64,
    learning_rate: float = 2e-3,
    seed: int = 0,
    save_every: int = 500,
) -> tuple[RestorationPipeline, dict[str, float]]:
    """Trains a U-Net in pixels with velocity prediction on images that are degraded anew in every step.

    The velocity of the residual is the clean image where there is much noise and the noise where there is little, so
    one weight serves all times; labels are drawn from the whole interval, fractions included.

    Args:
        data: images; their size must be a multiple of 8.
        work: folder of the checkpoint.
        steps: optimiser steps.
        batch_size: images a step.
        learning_rate: peak of AdamW.
        seed: of the initial weights and of every draw.
        save_every: steps between checkpoints.

    Returns:
        A pipeline in half precision storage, and the loop's record.
    """
    torch.manual_seed(seed)
    channels = data.images.shape[1]
    unet = UNet2DModel(
        sample_size=data.images.shape[-1],
        in_channels=2 * channels,
        out_channels=channels,
        down_block_types=("DownBlock2D",) * 4,
        up_block_types=("UpBlock2D",) * 4,
        block_out_channels=(16, 32, 64, 96),
        layers_per_block=1,
        norm_num_groups=8,
        attention_head_dim=16,
    )
    scheduler = MRSamplerScheduler(prediction_type="v_prediction")

    def loss_of(generator: torch.Generator) -> torch.Tensor:
        index = torch.randint(len(data), (batch_size,), generator=generator)
        images = data.images[index].float() / 255.0
        mu = degrade(images, torch.randint(2**62, (batch_size,), generator=generator).tolist())
        noise = torch.randn(images.shape, generator=generator)
        # One stratum a sample: labels cover the range evenly in every batch.
        uniform = (torch.arange(batch_size) + torch.rand(batch_size, generator=generator)) / batch_size
        labels = uniform * scheduler.config.num_train_timesteps
        scheduler.set_condition(mu)
        seen = torch.cat([scheduler.add_noise(images, noise, labels) - mu, mu], dim=1)
        # A U-Net is faster on a CPU with the channels last.
        output = unet(seen.to(memory_format=torch.channels_last), labels).sample
        error = output - scheduler.get_velocity(images, noise, labels)
        return error.div(scheduler.config.sigma_inf).square().mean()

    record = train(
        unet,
        loss_of,
        steps=steps,
        learning_rate=learning_rate,
        weight_decay=0.01,
        average=0.998,
        checkpoint=work / "restoration.safetensors",
        save_every=save_every,
        seed=seed,
    )
    return RestorationPipeline(unet.half(), scheduler), {**record, "images": steps * batch_size}
