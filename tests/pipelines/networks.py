"""Networks of diffusers' pipelines with a few thousand random weights; made once, and never written to."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import diffusers
import torch


def _eval(seed: int, build: Callable[[], torch.nn.Module]) -> Any:
    torch.manual_seed(seed)
    return build().eval().requires_grad_(False)


@functools.cache
def vae(channels: int = 4, shifted: bool = False) -> Any:
    extra: dict[str, Any] = {}
    if shifted:
        extra = {
            "shift_factor": 0.0609,
            "scaling_factor": 1.5035,
            "use_quant_conv": False,
            "use_post_quant_conv": False,
        }
    return _eval(
        1,
        lambda: diffusers.AutoencoderKL(
            block_out_channels=[4],
            down_block_types=["DownEncoderBlock2D"],
            up_block_types=["UpDecoderBlock2D"],
            layers_per_block=1,
            latent_channels=channels,
            norm_num_groups=1,
            sample_size=8,
            **extra,
        ),
    )


@functools.cache
def text_unet(in_channels: int = 4, extra_large: bool = False) -> Any:
    extra: dict[str, Any] = {"cross_attention_dim": 8, "attention_head_dim": 4}
    if extra_large:
        extra = {
            "cross_attention_dim": 16,
            "attention_head_dim": (2, 4),
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 8,
            "projection_class_embeddings_input_dim": 80,
            "transformer_layers_per_block": (1, 1),
            "use_linear_projection": True,
        }
    return _eval(
        0,
        lambda: diffusers.UNet2DConditionModel(
            block_out_channels=(4, 8),
            layers_per_block=1,
            sample_size=8,
            in_channels=in_channels,
            out_channels=4,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            norm_num_groups=2,
            **extra,
        ),
    )


@functools.cache
def sd3_transformer(channels: int = 4) -> Any:
    return _eval(
        0,
        lambda: diffusers.SD3Transformer2DModel(
            sample_size=8,
            patch_size=1,
            in_channels=channels,
            num_layers=1,
            attention_head_dim=8,
            num_attention_heads=4,
            caption_projection_dim=32,
            joint_attention_dim=32,
            pooled_projection_dim=64,
            out_channels=channels,
        ),
    )


@functools.cache
def flux_transformer(guidance_embeds: bool = False) -> Any:
    return _eval(
        0,
        lambda: diffusers.FluxTransformer2DModel(
            patch_size=1,
            in_channels=4,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=32,
            pooled_projection_dim=32,
            axes_dims_rope=[4, 4, 8],
            guidance_embeds=guidance_embeds,
        ),
    )


@functools.cache
def dit_transformer(learned_sigma: bool = False) -> Any:
    return _eval(
        0,
        lambda: diffusers.DiTTransformer2DModel(
            sample_size=8,
            num_layers=2,
            patch_size=4,
            attention_head_dim=8,
            num_attention_heads=2,
            in_channels=4,
            out_channels=8 if learned_sigma else 4,
            attention_bias=True,
            activation_fn="gelu-approximate",
            num_embeds_ada_norm=1000,
            norm_type="ada_norm_zero",
            norm_elementwise_affine=False,
        ),
    )


@functools.cache
def pixel_unet() -> Any:
    return _eval(
        0,
        lambda: diffusers.UNet2DModel(
            block_out_channels=(4, 8),
            layers_per_block=1,
            norm_num_groups=4,
            sample_size=8,
            in_channels=3,
            out_channels=3,
            down_block_types=("DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D"),
            attention_head_dim=4,
        ),
    )


@functools.cache
def wan_transformer() -> Any:
    return _eval(
        0,
        lambda: diffusers.WanTransformer3DModel(
            patch_size=(1, 2, 2),
            num_attention_heads=2,
            attention_head_dim=12,
            in_channels=16,
            out_channels=16,
            text_dim=32,
            freq_dim=256,
            ffn_dim=32,
            num_layers=2,
            cross_attn_norm=True,
            qk_norm="rms_norm_across_heads",
            rope_max_seq_len=32,
        ),
    )


@functools.cache
def wan_vae() -> Any:
    return _eval(
        1,
        lambda: diffusers.AutoencoderKLWan(
            base_dim=3,
            z_dim=16,
            dim_mult=[1, 1, 1, 1],
            num_res_blocks=1,
            temperal_downsample=[False, True, True],
        ),
    )
