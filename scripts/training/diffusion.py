"""The recipe of the bundled class-conditional diffusion models."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline, DiTTransformer2DModel
from torch import nn

from .autoencoder import encode
from .data import LabelledImages
from .loop import train

NULL_LABEL = 1000
"""The label of the unconditional branch, fixed by diffusers' DiTPipeline."""


@dataclass(frozen=True)
class Architecture:
    """Size of a diffusion transformer."""

    heads: int
    head_dim: int
    layers: int


ARCHITECTURES = {"small": Architecture(5, 16, 3), "large": Architecture(6, 32, 6)}


def train_diffusion(
    data: LabelledImages,
    vae: AutoencoderKL,
    work: Path,
    *,
    size: str,
    steps: int,
    batch_size: int = 256,
    learning_rate: float = 1e-3,
    label_dropout: float = 0.1,
    precision: torch.dtype = torch.float32,
    seed: int = 0,
    save_every: int = 500,
) -> tuple[DiTPipeline, dict[str, float]]:
    """Trains a DiT (arXiv 2212.09748) with velocity prediction on the autoencoder's latents.

    Args:
        data: images with labels below ``NULL_LABEL``.
        vae: the latent space.
        work: folder of the checkpoint.
        size: a key of ``ARCHITECTURES``.
        steps: optimiser steps.
        batch_size: images a step.
        learning_rate: peak of AdamW.
        label_dropout: share of samples trained without label, for classifier-free guidance.
        precision: of the matrix products; bfloat16 is the faster one on CPUs with units for it.
        seed: of the initial weights and of every draw.
        save_every: steps between checkpoints.

    Returns:
        A pipeline in half precision storage, and the loop's record.
    """
    torch.manual_seed(seed)
    architecture = ARCHITECTURES[size]
    side = data.images.shape[-1] // 4
    transformer = DiTTransformer2DModel(
        num_attention_heads=architecture.heads,
        attention_head_dim=architecture.head_dim,
        in_channels=4,
        out_channels=4,
        num_layers=architecture.layers,
        sample_size=side,
        patch_size=2,
        num_embeds_ada_norm=NULL_LABEL,
    )
    _zero_gates(transformer)
    scheduler = DDIMScheduler(prediction_type="v_prediction", clip_sample=False, timestep_spacing="trailing")
    means, stds = encode(vae, data)
    alphas_cumprod = scheduler.alphas_cumprod

    def loss_of(generator: torch.Generator) -> torch.Tensor:
        index = torch.randint(len(data), (batch_size,), generator=generator)
        shape = (batch_size, *means.shape[1:])
        latents = means[index] + stds[index] * torch.randn(shape, generator=generator)
        noise = torch.randn(shape, generator=generator)
        # One stratum a sample: timesteps cover the range evenly in every batch.
        uniform = (torch.arange(batch_size) + torch.rand(batch_size, generator=generator)) / batch_size
        timesteps = (uniform * len(alphas_cumprod)).long()
        alpha = alphas_cumprod[timesteps].sqrt().view(-1, 1, 1, 1)
        sigma = (1 - alphas_cumprod[timesteps]).sqrt().view(-1, 1, 1, 1)
        dropped = torch.rand(batch_size, generator=generator) < label_dropout
        labels = torch.where(dropped, NULL_LABEL, data.labels[index])
        with torch.autocast("cpu", precision, enabled=precision != torch.float32):
            output = transformer(alpha * latents + sigma * noise, timesteps, labels).sample
        return (output.float() - (alpha * noise - sigma * latents)).square().mean()

    record = train(
        transformer,
        loss_of,
        steps=steps,
        learning_rate=learning_rate,
        weight_decay=0.01,
        average=0.9995,
        checkpoint=work / f"{size}.safetensors",
        save_every=save_every,
        seed=seed,
    )
    # Rows of classes that the data does not have were never trained; zeros compress and tell it.
    for module in transformer.modules():
        if isinstance(module, nn.Embedding):
            with torch.no_grad():
                module.weight[len(data.names) : NULL_LABEL].zero_()
    pipeline = DiTPipeline(transformer=transformer.half(), vae=vae.half(), scheduler=scheduler)
    # diffusers reads the names from model_index.json but does not write them.
    pipeline.register_to_config(id2label={str(label): name for label, name in enumerate(data.names)})
    return pipeline, {**record, "images": steps * batch_size}


def _zero_gates(transformer: DiTTransformer2DModel) -> None:
    """The identity at the start: gates and output at zero (adaLN-Zero, arXiv 2212.09748, section 3.2)."""
    for block in transformer.transformer_blocks:
        # The recipe drops labels itself, once a sample: the module would draw anew in every block.
        block.norm1.emb.class_embedder.dropout_prob = 0.0
        nn.init.zeros_(block.norm1.linear.weight)
        nn.init.zeros_(block.norm1.linear.bias)
        nn.init.normal_(block.norm1.emb.class_embedder.embedding_table.weight, std=0.02)
    for layer in (transformer.proj_out_1, transformer.proj_out_2):
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
