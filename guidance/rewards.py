"""Rewards: what samples are worth, as plain functions of images or latents."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tqdm import tqdm

from fewstep.samplers import Denoiser

RewardFunction = Callable[[torch.Tensor], torch.Tensor]
"""``function(samples)``: ``(batch, ...)`` to ``(batch,)``, higher is better."""

Decoder = Callable[[torch.Tensor], torch.Tensor]
"""``decoder(samples)``: what a scheduler steps, ``(batch, ...)``, to what a reward looks at."""


class Reward:
    """A reward function with what it takes to ask it.

    Args:
        function: of samples ``(batch, ...)``, decoded where there is a ``decode``; returns ``(batch,)`` finite
            numbers. It need not be differentiable.
        decode: from what the scheduler steps to what the function takes, such as ``decoder_of(pipe)``.
        name: for error messages and the progress bar; the function's own by default.
        batch_size: how many samples are decoded and judged at a time; all by default.
        progress: show a progress bar over the batches, for slow rewards.

    Raises:
        ValueError: impossible options.

    Attributes:
        evaluations: how many samples were judged.
    """

    evaluations: int = 0

    def __init__(
        self,
        function: RewardFunction,
        *,
        decode: Decoder | None = None,
        name: str | None = None,
        batch_size: int | None = None,
        progress: bool = False,
    ) -> None:
        if not callable(function):
            raise ValueError(f"function {function!r} cannot be called; give a function of a batch of samples")
        if batch_size is not None and batch_size < 1:
            raise ValueError(f"batch_size {batch_size} must be at least 1, or None for all samples at a time")
        self.function, self.decode, self.batch_size, self.progress = function, decode, batch_size, progress
        self.name = name or getattr(function, "name", None) or getattr(function, "__name__", type(function).__name__)

    @classmethod
    def of(cls, reward: Reward | RewardFunction) -> Reward:
        """The reward itself, or a function as a reward of samples as they are."""
        return reward if isinstance(reward, Reward) else cls(reward)

    def __call__(self, samples: torch.Tensor, where: str = "the samples") -> torch.Tensor:
        """Judges clean samples.

        Args:
            samples: ``(batch, ...)``, what the scheduler steps.
            where: for error messages.

        Returns:
            ``(batch,)`` in float32 or better.

        Raises:
            ValueError: the function returned another shape, no numbers, NaN or infinity.
        """
        parts = samples.split(self.batch_size or len(samples))
        if self.progress:
            parts = tqdm(parts, desc=f"{self.name}, {where}", mininterval=1.0, leave=False)
        values = torch.cat([self._part(part, where) for part in parts])
        self.evaluations += len(samples)
        return values

    def with_gradient(self, samples: torch.Tensor, where: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Values ``(batch,)`` and their gradients by the samples, shaped like these.

        Raises:
            ValueError: as of a call, or the function cannot be differentiated.
        """
        # Pipelines run without gradients; an inference tensor would refuse them.
        with torch.inference_mode(False), torch.enable_grad():
            x = samples.detach().clone().requires_grad_()
            values = self(x, where)
            if not values.requires_grad:
                raise ValueError(
                    f"reward {self.name!r} has no gradient by its samples; use gradient_scale=0, or a function (and "
                    "decoder) that torch can differentiate"
                )
            (gradient,) = torch.autograd.grad(values.sum(), x)
        return values.detach(), gradient

    def _part(self, samples: torch.Tensor, where: str) -> torch.Tensor:
        seen = samples if self.decode is None else self.decode(samples)
        values = self.function(seen)
        if not isinstance(values, torch.Tensor) or values.shape != (len(samples),):
            found = tuple(values.shape) if isinstance(values, torch.Tensor) else type(values).__name__
            raise ValueError(f"reward {self.name!r} returned {found} at {where}; return a tensor ({len(samples)},)")
        if values.dtype not in (torch.float32, torch.float64):
            values = values.float()
        values = values.to(samples.device)
        if not bool(torch.isfinite(values).all()):
            wrong = (~torch.isfinite(values)).nonzero().flatten().tolist()
            raise ValueError(
                f"reward {self.name!r} is {values[wrong[0]].item()} at {where} (samples {wrong[:8]}); return finite "
                "numbers, a large negative one for what must not be"
            )
        return values


def decoder_of(source: Any) -> Decoder:
    """Images in [0, 1], ``(batch, C, H, W)``, from what a pipeline's scheduler steps.

    Args:
        source: a ``Denoiser`` of a pipeline, whose own decoding it is; or a pipeline whose latents are those of its
            ``vae``, or that samples images in [-1, 1]. Gradients flow through where they do in the model.

    Raises:
        ValueError: neither.
    """
    if isinstance(source, Denoiser):
        return lambda latents: source.decode(latents, "pt")
    vae = getattr(source, "vae", None)
    if vae is None:
        if not hasattr(source, "unet"):
            raise ValueError(
                f"{type(source).__name__} has neither vae nor unet; pass Denoiser.from_pipeline(pipe, ...)"
            )
        return lambda samples: (samples / 2 + 0.5).clamp(0.0, 1.0)
    config = vae.config

    def decode(latents: torch.Tensor) -> torch.Tensor:
        if latents.ndim != 4 or latents.shape[1] != config.latent_channels:
            raise ValueError(
                f"latents have shape {tuple(latents.shape)}, which the vae of {config.latent_channels} channels cannot "
                "decode as they are; pass decoder_of(Denoiser.from_pipeline(pipe, ...)), which unpacks them"
            )
        scaled = latents.to(vae.dtype) / config.scaling_factor + (config.get("shift_factor") or 0.0)
        images: torch.Tensor = vae.decode(scaled, return_dict=False)[0]
        return (images.float() / 2 + 0.5).clamp(0.0, 1.0)

    return decode


# ------------------------------------------------------------------------------------------------ ready-made functions


def class_log_probability(classifier: Callable[[torch.Tensor], torch.Tensor], label: int | Sequence[int]) -> Any:
    """Log-probability of a class, or of any of several, by a classifier.

    Args:
        classifier: samples ``(batch, ...)`` to logits ``(batch, classes)``, such as ``DigitsClassifier.bundled()``
            (images in [-1, 1]: the samples of a pixel model, undecoded).
        label: of the class, or several.

    Returns:
        a reward function.
    """
    labels = [label] if isinstance(label, int) else list(label)
    if not labels:
        raise ValueError(f"label {label!r} names no class; give a number, or several")

    def class_log_probability(samples: torch.Tensor) -> torch.Tensor:
        logits = classifier(samples)
        if max(labels) >= logits.shape[1] or min(labels) < 0:
            raise ValueError(f"label {label!r} must lie in 0 to {logits.shape[1] - 1}, the classifier's classes")
        log_probabilities = torch.log_softmax(logits, dim=1)
        return log_probabilities[:, labels].logsumexp(1)

    return class_log_probability


def brightness(images: torch.Tensor) -> torch.Tensor:
    """Mean of each image ``(batch, C, H, W)``; of digits in white on black, their ink."""
    return images.flatten(1).mean(1)


def compressibility(image_format: str = "jpeg", quality: int = 95) -> RewardFunction:
    """Minus the size of each image's file in kilobytes (1000 bytes).

    Args:
        image_format: ``jpeg`` or ``png``.
        quality: of JPEG, 1 to 95.

    Returns:
        a reward function of images in [0, 1], ``(batch, 1 or 3, H, W)``.

    Raises:
        ValueError: another format or quality.
    """
    if image_format not in ("jpeg", "png"):
        raise ValueError(f"image_format {image_format!r} is unknown; use jpeg or png")
    if not 1 <= quality <= 95:
        raise ValueError(f"quality {quality} must lie in 1 to 95")
    options: dict[str, Any] = {"quality": quality} if image_format == "jpeg" else {"optimize": True}

    def compressibility(images: torch.Tensor) -> torch.Tensor:
        if images.ndim != 4 or images.shape[1] not in (1, 3):
            raise ValueError(f"images have shape {tuple(images.shape)}; files are made of (batch, 1 or 3, H, W)")
        pixels = (images.detach().float().clamp(0.0, 1.0) * 255.0).round().to("cpu", torch.uint8)
        sizes = []
        for image in pixels.permute(0, 2, 3, 1).numpy():
            file = io.BytesIO()
            Image.fromarray(image.squeeze(2) if image.shape[2] == 1 else image).save(file, image_format, **options)
            sizes.append(file.tell() / 1000.0)
        return -torch.tensor(sizes)

    return compressibility


def clip_score(prompt: str, model: str = "openai/clip-vit-base-patch32", *, local_files_only: bool = True) -> Any:
    """Cosine similarity of images and a prompt by CLIP, times 100 (arXiv 2104.08718 without its factor 2.5).

    Args:
        prompt: what the images should show.
        model: name on the hub or folder.
        local_files_only: look for the weights on this machine only.

    Returns:
        a reward function of images in [0, 1], ``(batch, 3, H, W)``; differentiable.

    Raises:
        ValueError: transformers is not installed, or the weights are not there.
    """
    try:
        from transformers import AutoConfig, AutoProcessor, CLIPModel
    except ImportError:
        raise ValueError("clip_score needs transformers; install fewstep[text]") from None
    try:
        if (kind := AutoConfig.from_pretrained(model, local_files_only=local_files_only).model_type) != "clip":
            raise ValueError(f"model {model!r} is a {kind} model; give a CLIP model")
        network = CLIPModel.from_pretrained(model, local_files_only=local_files_only).eval().requires_grad_(False)
        processor = AutoProcessor.from_pretrained(model, local_files_only=local_files_only)
    except (OSError, ValueError) as error:
        if Path(model).is_dir():
            raise ValueError(f"folder {model} holds no CLIP model; give one of a model and its processor") from None
        if isinstance(error, ValueError):
            raise
        raise ValueError(
            f"model {model!r} is not on this machine; download it first (hf download {model}), or use "
            "local_files_only=False"
        ) from None
    size = network.config.vision_config.image_size
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (_CLIP_MEAN, _CLIP_STD))
    tokens = processor.tokenizer([prompt], padding=True, truncation=True, return_tensors="pt")
    with torch.no_grad():
        text = torch.nn.functional.normalize(_features(network.get_text_features(**tokens)), dim=-1)

    def clip_score(images: torch.Tensor) -> torch.Tensor:
        network.to(images.device)
        resized = torch.nn.functional.interpolate(images.float(), (size, size), mode="bicubic", antialias=True)
        pixels = (resized.clamp(0.0, 1.0) - mean.to(images.device)) / std.to(images.device)
        found = torch.nn.functional.normalize(_features(network.get_image_features(pixel_values=pixels)), dim=-1)
        return 100.0 * (found @ text.to(images.device).T).squeeze(1)

    return clip_score


# Of the released models' image processor.
_CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
_CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


def _features(output: Any) -> torch.Tensor:
    """The projected features, which newer transformers wrap."""
    features: torch.Tensor = output if isinstance(output, torch.Tensor) else output.pooler_output
    return features


def metric_reward(metric: Any, *targets: Any, sign: float = 1.0) -> RewardFunction:
    """Any image metric of torchmetrics as a reward, computed image by image.

    Args:
        metric: an instance, such as ``torchmetrics.image.TotalVariation()``; its value is one number.
        targets: further arguments of its ``update``, such as a reference image ``(1, C, H, W)``.
        sign: -1 where lower is better.

    Returns:
        a reward function.

    Raises:
        ValueError: it is no metric.
    """
    if not all(callable(getattr(metric, name, None)) for name in ("update", "compute", "reset")):
        raise ValueError(f"metric {metric!r} is no metric of torchmetrics; give an instance of one")

    def metric_reward(images: torch.Tensor) -> torch.Tensor:
        metric.to(images.device)
        values = []
        for image in images.split(1):
            metric.reset()
            metric.update(image, *targets)
            values.append(sign * metric.compute().reshape(()))
        return torch.stack(values)

    metric_reward.__name__ = type(metric).__name__
    return metric_reward
