"""Real diffusers pipelines with a few thousand random weights: what they are, how they are called, what comes back.

Text encoders and tokenizers are left out and embeddings passed, so nothing is downloaded and a run takes a hundredth of
a second.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import diffusers
import pytest
import torch
from diffusers import DiffusionPipeline, SchedulerMixin

from pipelines.networks import (
    dit_transformer,
    flux_transformer,
    pixel_unet,
    sd3_transformer,
    text_unet,
    vae,
    wan_transformer,
    wan_vae,
)

STEPS = 4
SD_BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
FLUX_SHIFT = {"shift": 3.0, "use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 1.15}
DENOISERS = ("unet", "transformer")


def seeded(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Standard normal numbers that depend on the shape and the seed alone."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


# -------------------------------------------------------------------------------------------------- stock schedulers


def pndm() -> SchedulerMixin:
    return diffusers.PNDMScheduler(**SD_BETAS, skip_prk_steps=True, set_alpha_to_one=False, steps_offset=1)


def euler() -> SchedulerMixin:
    return diffusers.EulerDiscreteScheduler(**SD_BETAS, timestep_spacing="leading", steps_offset=1)


def flow_euler(**options: Any) -> SchedulerMixin:
    return diffusers.FlowMatchEulerDiscreteScheduler(**{"shift": 3.0, **options})


def wan_unipc() -> SchedulerMixin:
    return diffusers.UniPCMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0)


# --------------------------------------------------------------------------------------------------------- the cases


def _embeds(width: int, pooled: int | None, prefix: str = "", seed: int = 10) -> dict[str, torch.Tensor]:
    embeds = {f"{prefix}prompt_embeds": seeded(1, 7, width, seed=seed)}
    if pooled is not None:
        embeds[f"{prefix}pooled_prompt_embeds"] = seeded(1, pooled, seed=seed + 1)
    return embeds


def _guided(width: int, pooled: int | None = None) -> dict[str, torch.Tensor]:
    return {**_embeds(width, pooled), **_embeds(width, pooled, "negative_", 20)}


def _image(size: int = 8) -> torch.Tensor:
    return seeded(1, 3, size, size, seed=30).clamp(-1, 1)


def _mask(size: int = 8) -> torch.Tensor:
    mask = torch.zeros(1, 1, size, size)
    mask[..., size // 2 :] = 1.0
    return mask


def batched(inputs: Mapping[str, Any], count: int) -> dict[str, Any]:
    """The same prompt or class several times."""
    grown = dict(inputs)
    for key, value in inputs.items():
        if key == "class_labels":
            grown[key] = value * count
        elif key.endswith("_embeds"):
            grown[key] = value.expand(count, *value.shape[1:])
    return grown


@dataclass(frozen=True)
class Case:
    """A pipeline, its stock scheduler and a call.

    Attributes:
        pipeline: class name in diffusers.
        modules: makes the components beside the scheduler.
        scheduler: makes the scheduler that the model's authors ship.
        inputs: arguments of the call beside steps, generator and output type.
        shape: of the latents of one sample, with the batch.
        kind: ``"vp"``, ``"flow"`` or ``"edm"``.
        from_image: the run starts from an image, with ``strength``.
    """

    pipeline: str
    modules: Callable[[], dict[str, Any]]
    scheduler: Callable[[], SchedulerMixin]
    inputs: Callable[[], dict[str, Any]]
    shape: tuple[int, ...]
    kind: str
    from_image: bool = False

    def build(self, scheduler: SchedulerMixin | None = None, **modules: Any) -> Any:
        """The pipeline, with its stock scheduler or another one."""
        cls: Any = getattr(diffusers, self.pipeline)
        pipe = cls(**{**self.modules(), **modules}, scheduler=self.scheduler())
        pipe.set_progress_bar_config(disable=True)
        if scheduler is not None:
            pipe.scheduler = scheduler
        return pipe

    def call(self, pipe: DiffusionPipeline, steps: int = STEPS, seed: int = 7, **overrides: Any) -> torch.Tensor:
        """Runs the pipeline and returns the final latents, the conditional half of them where it doubles the batch."""
        inputs = {**self.inputs(), "generator": torch.Generator().manual_seed(seed), **overrides}
        if self.pipeline not in _DECODING:
            inputs = {"output_type": "latent", **inputs}
        with recorded(pipe.scheduler) as record:
            output = pipe(num_inference_steps=steps, **inputs)
        if self.pipeline in _DECODING:
            latents = record[-1].result
            return latents.chunk(2)[0] if self.pipeline == "DiTPipeline" else latents
        latents = output.frames if "frames" in output else output.images
        assert isinstance(latents, torch.Tensor)
        return latents


# These decode and clamp whatever is asked for; their latents are what the last step returned.
_DECODING = ("DiTPipeline", "DDPMPipeline")


def _sd(in_channels: int = 4) -> dict[str, Any]:
    return {
        "unet": text_unet(in_channels),
        "vae": vae(),
        **dict.fromkeys(("text_encoder", "tokenizer", "safety_checker", "feature_extractor")),
        "requires_safety_checker": False,
    }


def _sdxl(in_channels: int = 4) -> dict[str, Any]:
    return {
        "unet": text_unet(in_channels, extra_large=True),
        "vae": vae(),
        **dict.fromkeys(("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")),
    }


def _sd3(channels: int = 4) -> dict[str, Any]:
    parts = (f"{part}{number}" for part in ("text_encoder", "tokenizer") for number in ("", "_2", "_3"))
    return {"transformer": sd3_transformer(channels), "vae": vae(channels, shifted=True), **dict.fromkeys(parts)}


def _flux(guidance_embeds: bool = False) -> dict[str, Any]:
    return {
        "transformer": flux_transformer(guidance_embeds),
        "vae": vae(1, shifted=True),
        **dict.fromkeys(("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")),
    }


def _wan() -> dict[str, Any]:
    return {"transformer": wan_transformer(), "vae": wan_vae(), "text_encoder": None, "tokenizer": None}


def _sized(size: int, inputs: Mapping[str, Any], **extra: Any) -> dict[str, Any]:
    return {**inputs, "height": size, "width": size, **extra}


SD_SHAPE, FLUX_SHAPE = (1, 4, 8, 8), (1, 64, 4)
IMAGE = {"strength": 0.6}
EDIT = {"strength": 0.8}

CASES: dict[str, Case] = {
    "sd": Case("StableDiffusionPipeline", _sd, pndm, lambda: _sized(8, _guided(8)), SD_SHAPE, "vp"),
    "sdxl": Case("StableDiffusionXLPipeline", _sdxl, euler, lambda: _sized(8, _guided(16, 32)), SD_SHAPE, "vp"),
    "sdxl-edm": Case(
        "StableDiffusionXLPipeline",
        _sdxl,
        diffusers.EDMDPMSolverMultistepScheduler,
        lambda: _sized(8, _guided(16, 32)),
        SD_SHAPE,
        "edm",
    ),
    "sd3": Case("StableDiffusion3Pipeline", _sd3, flow_euler, lambda: _sized(8, _guided(32, 64)), SD_SHAPE, "flow"),
    "sd3-dynamic": Case(
        "StableDiffusion3Pipeline",
        _sd3,
        lambda: flow_euler(**FLUX_SHIFT),
        lambda: _sized(8, _guided(32, 64)),
        SD_SHAPE,
        "flow",
    ),
    "flux": Case(
        "FluxPipeline", _flux, lambda: flow_euler(shift=1.0), lambda: _sized(16, _embeds(32, 32)), FLUX_SHAPE, "flow"
    ),
    "flux-dynamic": Case(
        "FluxPipeline",
        lambda: _flux(guidance_embeds=True),
        lambda: flow_euler(**FLUX_SHIFT),
        lambda: _sized(16, _guided(32, 32), true_cfg_scale=2.0),
        FLUX_SHAPE,
        "flow",
    ),
    "wan": Case(
        "WanPipeline", _wan, wan_unipc, lambda: _sized(16, _guided(32), num_frames=9), (1, 16, 3, 2, 2), "flow"
    ),
    "wan-euler": Case(
        "WanPipeline", _wan, flow_euler, lambda: _sized(16, _guided(32), num_frames=9), (1, 16, 3, 2, 2), "flow"
    ),
    "dit": Case(
        "DiTPipeline",
        lambda: {"transformer": dit_transformer(), "vae": vae()},
        diffusers.DDIMScheduler,
        lambda: {"class_labels": [1]},
        SD_SHAPE,
        "vp",
    ),
    "dit-learned": Case(
        "DiTPipeline",
        lambda: {"transformer": dit_transformer(learned_sigma=True), "vae": vae()},
        diffusers.DDIMScheduler,
        lambda: {"class_labels": [1]},
        SD_SHAPE,
        "vp",
    ),
    "ddpm": Case("DDPMPipeline", lambda: {"unet": pixel_unet()}, diffusers.DDPMScheduler, dict, (1, 3, 8, 8), "vp"),
    "sd-img2img": Case(
        "StableDiffusionImg2ImgPipeline",
        _sd,
        pndm,
        lambda: {**_guided(8), "image": _image(), **IMAGE},
        SD_SHAPE,
        "vp",
        True,
    ),
    "sdxl-img2img": Case(
        "StableDiffusionXLImg2ImgPipeline",
        _sdxl,
        euler,
        lambda: {**_guided(16, 32), "image": _image(), **IMAGE},
        SD_SHAPE,
        "vp",
        True,
    ),
    "sd3-img2img": Case(
        "StableDiffusion3Img2ImgPipeline",
        _sd3,
        flow_euler,
        lambda: _sized(8, _guided(32, 64), image=_image(), **IMAGE),
        SD_SHAPE,
        "flow",
        True,
    ),
    "flux-img2img": Case(
        "FluxImg2ImgPipeline",
        _flux,
        lambda: flow_euler(**FLUX_SHIFT),
        lambda: _sized(16, _embeds(32, 32), image=_image(16), **IMAGE),
        FLUX_SHAPE,
        "flow",
        True,
    ),
    "sd-inpaint": Case(
        "StableDiffusionInpaintPipeline",
        _sd,
        pndm,
        lambda: _sized(8, _guided(8), image=_image(), mask_image=_mask(), **EDIT),
        SD_SHAPE,
        "vp",
        True,
    ),
    "sd-inpaint9": Case(
        "StableDiffusionInpaintPipeline",
        lambda: _sd(9),
        pndm,
        lambda: _sized(8, _guided(8), image=_image(), mask_image=_mask(), strength=1.0),
        SD_SHAPE,
        "vp",
        True,
    ),
    "sdxl-inpaint": Case(
        "StableDiffusionXLInpaintPipeline",
        _sdxl,
        euler,
        lambda: _sized(8, _guided(16, 32), image=_image(), mask_image=_mask(), **EDIT),
        SD_SHAPE,
        "vp",
        True,
    ),
    "sd3-inpaint": Case(
        "StableDiffusion3InpaintPipeline",
        lambda: _sd3(16),
        flow_euler,
        lambda: _sized(8, _guided(32, 64), image=_image(), mask_image=_mask(), **EDIT),
        (1, 16, 8, 8),
        "flow",
        True,
    ),
    "flux-inpaint": Case(
        "FluxInpaintPipeline",
        _flux,
        lambda: flow_euler(**FLUX_SHIFT),
        lambda: _sized(16, _embeds(32, 32), image=_image(16), mask_image=_mask(16), **EDIT),
        FLUX_SHAPE,
        "flow",
        True,
    ),
}


def missing(case: str) -> dict[str, None]:
    """The components that a case leaves out, which loading it wants to be told."""
    return {name: None for name, module in CASES[case].modules().items() if module is None}


# --------------------------------------------------------------------------------------------------------- recording


@dataclass(frozen=True)
class StepRecord:
    """What a pipeline handed to ``step`` and got back."""

    model_output: torch.Tensor
    timestep: float
    sample: torch.Tensor
    result: torch.Tensor


@contextmanager
def recorded(scheduler: SchedulerMixin) -> Iterator[list[StepRecord]]:
    """Records the steps of a run; the signature that pipelines inspect stays the scheduler's."""
    records: list[StepRecord] = []
    step = scheduler.step

    @functools.wraps(step)
    def recording(model_output: torch.Tensor, timestep: Any, sample: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        before = sample.clone()
        output = step(model_output, timestep, sample, *args, **kwargs)
        result = output[0] if isinstance(output, tuple) else output.prev_sample
        records.append(StepRecord(model_output.clone(), float(timestep), before, result.clone()))
        return output

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scheduler, "step", recording)
        yield records


@contextmanager
def counted(pipe: DiffusionPipeline) -> Iterator[list[float]]:
    """The time labels with which the pipeline calls its network."""
    labels: list[float] = []
    network: Any = next(getattr(pipe, name) for name in DENOISERS if hasattr(pipe, name))

    def note(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        label = kwargs["timestep"] if "timestep" in kwargs else args[1]
        labels.append(float(torch.as_tensor(label).flatten()[0]))

    handle = network.register_forward_pre_hook(note, with_kwargs=True)
    try:
        yield labels
    finally:
        handle.remove()
