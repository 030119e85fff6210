"""Whole generations: pipelines of diffusers with its scheduler and with ours, our loop, and its CUDA graph."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import diffusers
import torch

from fewstep.samplers import Denoiser, DPMSolverPPScheduler, clear_graphs, sample

from ..generation.model import load_model
from .output import STABLE_DIFFUSION, table
from .traffic import seconds_of

STEPS = 20


@dataclass(frozen=True)
class LoopModel:
    """A model that is timed.

    Attributes:
        make: makes its pipeline, of a dtype on a device.
        inputs: makes the arguments of a call for so many images.
        batch: images at a time where it is throughput that counts.
    """

    make: Callable[[str, str], Any]
    inputs: Callable[[Any, int], dict[str, Any]]
    batch: int


def _placed(pipe: Any, dtype: str, device: str) -> Any:
    pipe.set_progress_bar_config(disable=True)
    for part in pipe.components.values():
        if isinstance(part, torch.nn.Module):
            torch.nn.Module.to(part.eval(), device, getattr(torch, dtype))  # diffusers' own would warn of nothing
    return pipe


def _vae(blocks: int) -> Any:
    return diffusers.AutoencoderKL(
        block_out_channels=[32] * blocks,
        down_block_types=["DownEncoderBlock2D"] * blocks,
        up_block_types=["UpDecoderBlock2D"] * blocks,
        latent_channels=4,
    )


def _dit(dtype: str, device: str) -> Any:
    """Of the size of DiT-S/2 (arXiv 2212.09748, table 1), with random weights."""
    torch.manual_seed(0)
    transformer = diffusers.DiTTransformer2DModel(
        sample_size=32, num_layers=12, patch_size=2, attention_head_dim=64, num_attention_heads=6, out_channels=8
    )
    scheduler = diffusers.DDIMScheduler(beta_schedule="linear")
    return _placed(diffusers.DiTPipeline(transformer, _vae(4), scheduler), dtype, device)


def _stable_diffusion(dtype: str, device: str) -> Any:
    """Of the shape of Stable Diffusion 1.5's network, with random weights."""
    torch.manual_seed(0)
    unet = diffusers.UNet2DConditionModel(sample_size=64, cross_attention_dim=768)
    parts = dict.fromkeys(("text_encoder", "tokenizer", "safety_checker", "feature_extractor"))
    scheduler = diffusers.DDIMScheduler(**STABLE_DIFFUSION)
    pipe = diffusers.StableDiffusionPipeline(
        unet=unet, vae=_vae(4), scheduler=scheduler, requires_safety_checker=False, **parts
    )
    return _placed(pipe, dtype, device)


def _classes(pipe: Any, count: int) -> dict[str, Any]:
    return {"class_labels": [k % 10 for k in range(count)]}


def _embeddings(pipe: Any, count: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    both = torch.randn(2, count, 77, 768, generator=generator).to(pipe.device, pipe.dtype)
    return {"prompt_embeds": both[0], "negative_prompt_embeds": both[1]}


def _bundled(name: str) -> Callable[[str, str], Any]:
    return lambda dtype, device: load_model(name, dtype, device).pipeline


MODELS: Mapping[str, LoopModel] = {
    "digits-small": LoopModel(_bundled("digits-small"), _classes, 64),
    "digits-large": LoopModel(_bundled("digits-large"), _classes, 64),
    "dit-s2": LoopModel(_dit, _classes, 16),
    "sd-unet": LoopModel(_stable_diffusion, _embeddings, 4),
}
"""What is timed, by name: bundled models, and shapes of larger ones with random weights."""


def _ways(pipe: Any, inputs: dict[str, Any], steps: int, device: str) -> dict[str, Callable[[], Any]]:
    """The ways to generate a batch, each to arrays of pixels."""
    theirs = diffusers.DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
    ours = DPMSolverPPScheduler.from_config(theirs.config, diffusers_third_order=True)
    denoiser = Denoiser.from_pipeline(pipe, **inputs)

    def through(scheduler: Any) -> Callable[[], Any]:
        def generate() -> Any:
            pipe.scheduler = scheduler
            return pipe(
                **inputs, num_inference_steps=steps, generator=torch.Generator().manual_seed(0), output_type="np"
            ).images

        return generate

    def loop(graph: bool) -> Callable[[], Any]:
        def generate() -> Any:
            generator = torch.Generator().manual_seed(0)
            return denoiser.decode(sample(denoiser, ours, steps, generator=generator, graph=graph), "np")

        return generate

    ways = {"diffusers": through(theirs), "ours in the pipeline": through(ours), "our loop": loop(False)}
    if torch.device(device).type == "cuda":
        ways["our graph"] = loop(True)
    return ways


def measure(
    name: str,
    seconds: float,
    *,
    device: str = "cpu",
    dtype: str = "float32",
    steps: int = STEPS,
    batch: int | None = None,
) -> dict[str, Any]:
    """Times one model in all ways.

    Args:
        name: key of ``MODELS``.
        seconds: how long each way, at least; never fewer than three runs.
        device: of the model.
        dtype: of the model.
        steps: network calls of a generation.
        batch: images at a time for the throughput; the model's own by default.

    Returns:
        by way, the median latency of one image in milliseconds, and images a second of a batch.
    """
    model = MODELS[name]
    pipe = model.make(dtype, device)
    many = batch or model.batch
    latency: dict[str, float] = {}
    rate: dict[str, float] = {}
    first = pipe.scheduler
    for count in (1, many):
        for way, generate in _ways(pipe, model.inputs(pipe, count), steps, device).items():
            generate()
            taken = statistics.median(seconds_of(generate, device, seconds))
            if count == 1:
                latency[way] = 1e3 * taken
            if count == many:
                rate[way] = many / taken
        pipe.scheduler = first
    clear_graphs()
    return {"model": name, "dtype": dtype, "steps": steps, "batch": many, "latency_ms": latency, "images_per_s": rate}


def loop_table(results: Sequence[Mapping[str, Any]]) -> str:
    """The results as text, a line a model and way."""
    header = ["generation", "ms at batch 1", "speed-up", "batch", "images/s", "speed-up"]
    rows = []
    for result in results:
        latency, rate = result["latency_ms"], result["images_per_s"]
        rows += [
            [
                f"{result['model']}, {way}",
                f"{latency[way]:.1f}",
                f"{latency['diffusers'] / latency[way]:.2f}",
                str(result["batch"]),
                f"{rate[way]:.2f}",
                f"{rate[way] / rate['diffusers']:.2f}",
            ]
            for way in latency
        ]
    return table(header, rows)
