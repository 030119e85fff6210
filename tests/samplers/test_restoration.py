"""The restoration pipeline, with networks whose restored images are known."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from diffusers import UNet2DModel

from fewstep.samplers.mr_sampler import MRSamplerScheduler
from fewstep.samplers.restoration import RestorationPipeline


def small_unet(channels: int = 1) -> UNet2DModel:
    torch.manual_seed(0)
    return UNet2DModel(
        in_channels=2 * channels,
        out_channels=channels,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
    )


class HalvingUNet(UNet2DModel):
    """Knows that the clean image is half the degraded one, and what it is shown: ``x - mu`` and ``mu``."""

    scheduler: Any

    def forward(self, sample: torch.Tensor, timestep: torch.Tensor, return_dict: bool = True) -> tuple[torch.Tensor]:
        difference, mu = sample.double().chunk(2, dim=1)
        assert sample.shape[-1] % 4 == sample.shape[-2] % 4 == 0
        alpha, sigma = self.scheduler.schedule.alpha_sigma(self.scheduler.schedule.level(float(timestep)))
        noise = (difference + float(alpha) * mu / 2) / (float(sigma) * self.scheduler.config.sigma_inf)
        return (noise.to(sample.dtype),)


def halving_pipeline(**options: Any) -> RestorationPipeline:
    unet = HalvingUNet(
        in_channels=6,
        out_channels=3,
        block_out_channels=(8, 8, 8),
        layers_per_block=1,
        norm_num_groups=4,
        down_block_types=("DownBlock2D",) * 3,
        up_block_types=("UpBlock2D",) * 3,
    )
    unet.scheduler = MRSamplerScheduler(**options)
    return quiet(RestorationPipeline(unet, unet.scheduler))


def quiet(pipeline: RestorationPipeline) -> RestorationPipeline:
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"solver": "unipc", "theta_schedule": "linear"},
        {"solver": "sde-dpm++", "sigma_inf": 0.3},
        {"solver": "deis-rk4"},
    ],
    ids=str,
)
def test_it_restores_what_the_network_knows(options: dict[str, Any]) -> None:
    """At every size: padding is cut off again."""
    pipeline = halving_pipeline(**options)
    for height, width in ((8, 8), (9, 14)):
        degraded = torch.rand(2, 3, height, width, generator=torch.Generator().manual_seed(height))
        restored = pipeline(degraded, 6, torch.Generator().manual_seed(1), output_type="pt").images
        torch.testing.assert_close(restored, degraded / 2, rtol=0, atol=2e-4)


def test_pictures_come_back_as_they_came() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (2, 10, 13, 3), dtype=np.uint8)
    pictures = [PIL.Image.fromarray(each) for each in pixels]
    restored = halving_pipeline()(pictures, 5).images
    assert [each.size for each in restored] == [(13, 10)] * 2
    found = np.stack([np.asarray(each) for each in restored]).astype(float)
    assert np.abs(found - pixels / 2).max() <= 0.6
    (array,) = halving_pipeline()(pixels / 255.0, 5, output_type="np", return_dict=False)
    np.testing.assert_allclose(array, pixels / 510.0, atol=2e-4)


def test_a_saved_pipeline_restores_the_same_images(tmp_path: Path) -> None:
    scheduler = MRSamplerScheduler(solver="unipc", solver_options={"solver_order": 3}, sigma_inf=0.1)
    pipeline = quiet(RestorationPipeline(small_unet(), scheduler))
    pipeline.save_pretrained(tmp_path)
    files = {path.suffix for path in tmp_path.rglob("*") if path.is_file()}
    assert files == {".json", ".safetensors"}
    loaded = quiet(RestorationPipeline.from_pretrained(tmp_path))
    degraded = torch.rand(2, 1, 9, 8, generator=torch.Generator().manual_seed(0))
    images = [each(degraded, 3, torch.Generator().manual_seed(5), "pt").images for each in (pipeline, loaded)]
    torch.testing.assert_close(images[1], images[0], rtol=0, atol=0)
    other = pipeline(degraded, 3, torch.Generator().manual_seed(6), "pt").images
    assert not torch.equal(other, images[0])


def test_generators_of_their_own_make_images_independent_of_the_batch() -> None:
    pipeline = quiet(RestorationPipeline(small_unet(), MRSamplerScheduler(solver="sde-dpm++")))
    degraded = torch.rand(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    seeds = [torch.Generator().manual_seed(seed) for seed in (3, 4)]
    both = pipeline(degraded, 3, seeds, "pt").images
    alone = pipeline(degraded[1:], 3, [torch.Generator().manual_seed(4)], "pt").images
    torch.testing.assert_close(both[1:], alone, rtol=0, atol=1e-5)


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match=r"unet has 3 input and 3 output channels; .* in_channels=6"):
        RestorationPipeline(
            UNet2DModel(block_out_channels=(32,), down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",)),
            MRSamplerScheduler(),
        )
    pipeline = quiet(RestorationPipeline(small_unet(), MRSamplerScheduler()))
    image = torch.zeros(1, 1, 8, 8)
    with pytest.raises(ValueError, match="image has 3 channels and the unet makes 1"):
        pipeline(torch.zeros(1, 3, 8, 8))
    with pytest.raises(ValueError, match=r"image has values from 0 to 2; scale them to \[0, 1\]"):
        pipeline(torch.cat([image, image + 2.0], dim=-1))
    with pytest.raises(ValueError, match="image of 1 x 8 pixels is too small to be padded to multiples of 2"):
        pipeline(image[:, :, :1])
    with pytest.raises(ValueError, match="output_type 'latent' is unknown; use one of pil, np, pt"):
        pipeline(image, output_type="latent")
