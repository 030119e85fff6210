"""The model of a diffusers pipeline as a function (x, t) -> prediction, guidance included."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch


class Start(NamedTuple):
    """The start of a run.

    Attributes:
        latents: the first samples, ``(batch, *shape)``, at the level of the first timestep.
        timesteps: to go through; all of the scheduler's, unless the pipeline starts from an image.
    """

    latents: torch.Tensor
    timesteps: torch.Tensor


class Branches(NamedTuple):
    """The two predictions of classifier-free guidance, each shaped like the samples."""

    conditional: torch.Tensor
    unconditional: torch.Tensor


class Denoiser(ABC):
    """The model of a diffusers pipeline with its inputs: ``denoiser(x, t)`` is what the pipeline hands to ``step``.

    Prompts are encoded once. Nothing here disables gradients: where they are enabled, they flow through the network,
    the guidance and ``decode``. The pipeline is not changed; components that are replaced later are not followed.

    For loops and searches of one's own: ``fine_trajectory``, ``search_ratios`` and ``sample`` take it as it is.

    Attributes:
        scheduler_config: of the scheduler that the pipeline came with, to build any other one from; it says what the
            prediction is.
        calls: how often the network was asked; both branches of guidance are one call.
        evaluations: the same, counted for each sample of a batch.
    """

    scheduler_config: Mapping[str, Any]
    calls: int = 0
    evaluations: int = 0

    @classmethod
    def from_pipeline(cls, pipeline: Any, *, num_images_per_prompt: int = 1, **inputs: Any) -> Denoiser:
        """Makes the denoiser of any pipeline.

        Stable Diffusion 1 and 2, SDXL, SD3, Flux, DiT and DDPM are taken apart (``BranchedDenoiser``): the branches of
        guidance can be had by themselves, batches may grow, every sample may have its own timestep. All other
        pipelines, and inputs of these that work step by step (IP-Adapter, skipped layers), are driven as they are
        (``DrivenDenoiser``).

        Args:
            pipeline: of diffusers.
            num_images_per_prompt: samples of each prompt, or class label, or of an unconditional model; neighbours in
                the batch.
            inputs: arguments of the pipeline's call: ``prompt``, ``negative_prompt``, ``class_labels``,
                ``guidance_scale``, ``guidance_rescale``, ``height``, ``width``, ``prompt_embeds``, ...; the pipeline's
                own defaults for the others.

        Raises:
            ValueError: an input that the pipeline does not take, lacks or refuses, or a pipeline without scheduler.
        """
        from .branched import BranchedDenoiser
        from .driven import DrivenDenoiser

        chosen = BranchedDenoiser if BranchedDenoiser.takes(pipeline, inputs) else DrivenDenoiser
        return chosen(pipeline, num_images_per_prompt=num_images_per_prompt, **inputs)

    @property
    @abstractmethod
    def batch_size(self) -> int:
        """Number of samples that ``prepare`` and ``noise`` make."""

    @property
    @abstractmethod
    def shape(self) -> tuple[int, ...]:
        """Of the latents of one sample: ``(C, H, W)``, of Flux ``(tokens, C)``, of videos ``(C, frames, H, W)``."""

    @abstractmethod
    def __call__(self, x: torch.Tensor, t: float | torch.Tensor) -> torch.Tensor:
        """The model's prediction with guidance.

        Args:
            x: ``(batch, *shape)`` of any floating dtype; of EDM models as ``scale_model_input`` scales it.
            t: time label as in a scheduler's ``timesteps``; or one a sample, ``(batch,)``.

        Returns:
            what the pipeline's scheduler would get, in the dtype of ``x``: shaped like ``x``; of a DDPM network with
            learned variances, with twice the channels.

        Raises:
            ValueError: shapes that do not fit.
        """

    @abstractmethod
    def prepare(
        self,
        scheduler: Any,
        num_inference_steps: int,
        *,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
    ) -> Start:
        """Begins a run as the pipeline does: sets the scheduler's timesteps and draws the first latents.

        Custom sigmas, dynamic shifting and the scale of the noise are the pipeline's; the same generator gives the same
        latents.

        Args:
            scheduler: any that serves in the pipeline.
            num_inference_steps: number of steps.
            generator: of the noise; a list gives each sample its own.
            latents: standard normal noise in the place of drawn one, ``(batch, *shape)``.

        Raises:
            ValueError: a scheduler, generators or latents that the pipeline cannot take.
        """

    @abstractmethod
    def noise(self, generator: torch.Generator | Sequence[torch.Generator] | None = None) -> torch.Tensor:
        """Standard normal noise, ``(batch_size, *shape)``, for ``fine_trajectory``, searches and ``prepare``."""

    @abstractmethod
    def decode(self, latents: torch.Tensor, output_type: str = "pil") -> Any:
        """Images (videos, ...) as the pipeline makes them: its autoencoder, safety checker and image processor.

        Args:
            latents: the end of a run, ``(batch, *shape)``.
            output_type: ``pil``, ``np``, ``pt`` or what else the pipeline knows; ``"pt"`` images in [0, 1] can be
                differentiated through where the pipeline's post-processing can.

        Raises:
            ValueError: another shape, or an output type that the pipeline refuses.
        """

    def branches(self, x: torch.Tensor, t: float | torch.Tensor) -> Branches:
        """Both branches of guidance in one call, each like the result of a call.

        Raises:
            ValueError: there is no unconditional branch, or the pipeline cannot be taken apart.
        """
        raise ValueError(
            f"the branches of a {type(self).__name__} cannot be told apart; a pipeline of Stable Diffusion, SDXL, SD3, "
            "Flux or DiT has them, without IP-Adapter and skipped layers"
        )

    def _count(self, x: torch.Tensor) -> None:
        self.calls += 1
        self.evaluations += len(x)


def time_label(t: float | torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """A time label as a tensor ``()`` or ``(batch,)`` on the device of ``x``.

    Raises:
        ValueError: another shape.
    """
    if not isinstance(t, torch.Tensor):
        t = torch.tensor(t, dtype=torch.int64 if isinstance(t, int) else torch.float32)
    if t.ndim > 1 or (t.ndim == 1 and len(t) != len(x)):
        raise ValueError(f"t has shape {tuple(t.shape)} for a batch of {len(x)}; give one label, or one a sample")
    return t.to(x.device)


def check_samples(name: str, x: torch.Tensor, shape: tuple[int, ...]) -> None:
    """Refuses samples of another shape.

    Raises:
        ValueError: ``x`` is no ``(batch, *shape)``.
    """
    if tuple(x.shape[1:]) != shape or len(x) == 0:
        raise ValueError(f"{name} has shape {tuple(x.shape)}; it must be (batch, {', '.join(map(str, shape))})")
