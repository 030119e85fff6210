"""Image restoration by mean-reverting diffusion as a diffusers pipeline."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import DiffusionPipeline, ImagePipelineOutput, UNet2DModel
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils.torch_utils import randn_tensor

from .mr_sampler import MRSamplerScheduler

_OUTPUTS = ("pil", "np", "pt")

# No postponed annotations: diffusers reads the types of the components off ``__init__``.


class RestorationPipeline(DiffusionPipeline):
    """Restores degraded images: ``pipe(images, num_inference_steps=10).images`` (arXiv 2301.11699).

    Saved with ``save_pretrained``, it is loaded with ``RestorationPipeline.from_pretrained``.

    Args:
        unet: with twice as many input as output channels. Like the networks of IR-SDE it sees ``x - mu`` and ``mu``.
        scheduler: of the process that the network was trained on.

    Raises:
        ValueError: a network of other channels.
    """

    model_cpu_offload_seq = "unet"

    def __init__(self, unet: UNet2DModel, scheduler: MRSamplerScheduler) -> None:
        super().__init__()
        channels = unet.config.in_channels, unet.config.out_channels
        if channels[0] != 2 * channels[1]:
            raise ValueError(
                f"unet has {channels[0]} input and {channels[1]} output channels; it sees x - mu and mu, so give it "
                f"in_channels={2 * channels[1]}"
            )
        self.register_modules(unet=unet, scheduler=scheduler)
        self.image_processor = VaeImageProcessor(do_resize=False, do_normalize=False)

    @torch.no_grad()
    def __call__(
        self,
        image: Any,
        num_inference_steps: int = 10,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> ImagePipelineOutput | tuple[Any]:
        """Restores a batch of images.

        Args:
            image: one or more degraded images of one size: PIL, NumPy ``(batch, H, W, C)`` or torch
                ``(batch, C, H, W)``, the latter two in [0, 1].
            num_inference_steps: number of steps; a step is one call of the network for most samplers.
            generator: of the first noise and of stochastic samplers; a list gives each image its own.
            output_type: ``pil``, ``np`` or ``pt``.
            return_dict: an ``ImagePipelineOutput``; or else ``(images,)``.

        Returns:
            the restored images, of the size of the degraded ones.

        Raises:
            ValueError: images with other channels than the network's, outside [0, 1], or too small for it; or an
                unknown ``output_type``.
        """
        if output_type not in _OUTPUTS:
            raise ValueError(f"output_type {output_type!r} is unknown; use one of {', '.join(_OUTPUTS)}")
        degraded = self.image_processor.preprocess(image).to(self._execution_device, torch.float32)
        if degraded.shape[1] != self.unet.config.out_channels:
            raise ValueError(
                f"image has {degraded.shape[1]} channels and the unet makes {self.unet.config.out_channels}; convert it"
            )
        if degraded.min() < 0.0 or degraded.max() > 1.0:
            raise ValueError(f"image has values from {degraded.min():g} to {degraded.max():g}; scale them to [0, 1]")
        lower, right = self.padding(*degraded.shape[-2:])
        mu = F.pad(degraded, (0, right, 0, lower), mode="reflect")
        noise = randn_tensor(mu.shape, generator=generator, device=mu.device, dtype=mu.dtype)
        self.scheduler.set_timesteps(num_inference_steps, device=mu.device)
        self.scheduler.set_condition(mu)
        x = self.scheduler.prior_sample(noise)
        for t in self.progress_bar(self.scheduler.timesteps):
            seen = torch.cat([x - mu, mu], dim=1).to(self.unet.dtype)
            output = self.unet(seen, t, return_dict=False)[0]
            x = self.scheduler.step(output, t, x, generator=generator, return_dict=False)[0]
        restored = x[..., : degraded.shape[-2], : degraded.shape[-1]].clamp(0.0, 1.0)
        images = self.image_processor.postprocess(
            restored, output_type=output_type, do_denormalize=[False] * len(restored)
        )
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def padding(self, height: int, width: int) -> tuple[int, int]:
        """Rows below and columns at the right that an image is mirrored into: the network halves sizes.

        Args:
            height: in pixels.
            width: in pixels.

        Raises:
            ValueError: the image is too small for it.
        """
        multiple = 2 ** (len(self.unet.config.block_out_channels) - 1)
        lower, right = -height % multiple, -width % multiple
        if lower >= height or right >= width:
            raise ValueError(
                f"image of {height} x {width} pixels is too small to be padded to multiples of {multiple}; enlarge it"
            )
        return lower, right
