from __future__ import annotations

import math

import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderTiny

from fewstep.metrics.artifacts import STABLE_DIFFUSION_LATENTS, ChannelNormalization, magnitude_score

UNIT = ChannelNormalization((0.0,), (1.0,))


def by_loops(samples: torch.Tensor, normalization: ChannelNormalization, threshold: float, window: int) -> list[float]:
    """Value by value."""
    batch, channels, height, width = samples.shape
    scores = []
    for b in range(batch):
        cells = []
        for top in range(0, height, window):
            for left in range(0, width, window):
                largest = max(
                    abs((float(samples[b, c, y, x]) - normalization.mean[c]) / normalization.std[c])
                    for c in range(channels)
                    for y in range(top, min(top + window, height))
                    for x in range(left, min(left + window, width))
                )
                cells.append(largest if largest >= threshold else 0.0)
        scores.append(sum(cells) / len(cells))
    return scores


@pytest.mark.parametrize(("size", "window", "threshold"), [((16, 16), 4, 3.0), ((7, 10), 4, 2.0), ((6, 6), 3, 0.0)])
def test_score_value_by_value(size: tuple[int, int], window: int, threshold: float) -> None:
    samples = 2.0 * torch.randn(3, 4, *size, generator=torch.Generator().manual_seed(0))
    scores = magnitude_score(samples, STABLE_DIFFUSION_LATENTS, threshold=threshold, window=window)
    expected = by_loops(samples, STABLE_DIFFUSION_LATENTS, threshold, window)
    torch.testing.assert_close(scores, torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=0)


def test_a_spot_counts_by_its_height_and_a_flat_sample_not_at_all() -> None:
    samples = torch.zeros(3, 1, 64, 64)
    samples[1, 0, 5, 9] = -10.0
    samples[2] = 2.999
    assert magnitude_score(samples, UNIT).tolist() == [0.0, 10.0 / 256, 0.0]
    # At the threshold it counts.
    assert float(magnitude_score(torch.full((1, 1, 8, 8), 3.0), UNIT)) == 3.0


def test_stable_diffusions_latents_have_four_channels() -> None:
    at_mean = torch.tensor(STABLE_DIFFUSION_LATENTS.mean).view(1, 4, 1, 1).expand(1, 4, 64, 64)
    assert float(magnitude_score(at_mean, STABLE_DIFFUSION_LATENTS)) == 0.0
    beyond = at_mean.clone()
    beyond[:, 3] += 5 * 0.72270846
    assert float(magnitude_score(beyond, STABLE_DIFFUSION_LATENTS)) == pytest.approx(5.0, rel=1e-6)


def test_normalization_of_a_stream_is_that_of_all_its_data() -> None:
    # A mean far from 0 shows lost digits.
    data = 1e4 + torch.randn(50, 3, 8, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    found = ChannelNormalization.of_data(data.split([7, 1, 42]))
    torch.testing.assert_close(torch.tensor(found.mean), data.mean((0, 2, 3)).float())
    std = data.std((0, 2, 3), correction=0)
    torch.testing.assert_close(torch.tensor(found.std, dtype=torch.float64), std, rtol=1e-10, atol=0)
    normalised = found(data)
    torch.testing.assert_close(normalised.mean((0, 2, 3)), torch.zeros(3, dtype=torch.float64), rtol=0, atol=1e-8)
    torch.testing.assert_close(normalised.square().mean((0, 2, 3)), torch.ones(3, dtype=torch.float64))


def test_score_does_not_depend_on_the_units_of_the_space() -> None:
    clean = torch.randn(20, 4, 8, 8, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    samples = 3.0 * clean[:5]
    scales, shifts = torch.tensor([0.2, 1.0, 7.0, 3.0]).view(1, 4, 1, 1), torch.tensor(0.3)
    first = magnitude_score(samples, ChannelNormalization.of_data([clean]))
    second = magnitude_score(samples * scales + shifts, ChannelNormalization.of_data([clean * scales + shifts]))
    assert float(first.min()) > 0.0
    torch.testing.assert_close(first, second, rtol=1e-6, atol=0)


@pytest.mark.parametrize("shift", [None, 0.4])
def test_normalization_of_an_autoencoder(shift: float | None) -> None:
    torch.manual_seed(0)
    vae = AutoencoderKL(block_out_channels=(8,), norm_num_groups=2, scaling_factor=0.3, shift_factor=shift).eval()
    images = torch.rand(6, 3, 8, 8, generator=torch.Generator().manual_seed(3)) * 2 - 1
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        parts = [vae.encode(part).latent_dist.sample(generator) for part in images.split(4)]
    latents = (torch.cat(parts) - (shift or 0.0)) * 0.3
    found = ChannelNormalization.of_vae(vae, images.split(4))
    torch.testing.assert_close(torch.tensor(found.mean), latents.mean((0, 2, 3)))
    torch.testing.assert_close(torch.tensor(found.std), latents.std((0, 2, 3), correction=0))
    assert ChannelNormalization.of_vae(vae, images.split(4)) == found


def test_normalization_of_an_autoencoder_has_the_spread_of_its_samples() -> None:
    """The variance of the modes and the encoder's own."""
    torch.manual_seed(0)
    vae = AutoencoderKL(block_out_channels=(8,), norm_num_groups=2, scaling_factor=1.0).eval()
    images = torch.rand(60, 3, 16, 16, generator=torch.Generator().manual_seed(5)) * 2 - 1
    with torch.no_grad():
        encoder = vae.encode(images).latent_dist
    spread = (encoder.mean.var((0, 2, 3)) + encoder.var.mean((0, 2, 3))).sqrt()
    found = ChannelNormalization.of_vae(vae, [images])
    torch.testing.assert_close(torch.tensor(found.std), spread, rtol=0.03, atol=0)
    assert bool((spread > 1.1 * encoder.mean.std((0, 2, 3))).all())


def test_normalization_of_an_autoencoder_with_means_of_its_own() -> None:
    torch.manual_seed(0)
    means, stds = [0.1, -0.2, 0.3, 0.0], [2.0, 1.0, 0.5, 3.0]
    vae = AutoencoderKL(block_out_channels=(8,), norm_num_groups=2, latents_mean=means, latents_std=stds).eval()
    images = torch.rand(6, 3, 8, 8, generator=torch.Generator().manual_seed(3)) * 2 - 1
    with torch.no_grad():
        raw = vae.encode(images).latent_dist.sample(torch.Generator().manual_seed(0))
    raw = (raw - torch.tensor(means).view(1, 4, 1, 1)) * vae.config.scaling_factor / torch.tensor(stds).view(1, 4, 1, 1)
    found = ChannelNormalization.of_vae(vae, [images])
    torch.testing.assert_close(torch.tensor(found.mean), raw.mean((0, 2, 3)))
    torch.testing.assert_close(torch.tensor(found.std), raw.std((0, 2, 3), correction=0))


def test_normalization_of_a_tiny_autoencoder() -> None:
    torch.manual_seed(0)
    shape = {"encoder_block_out_channels": (8, 8), "decoder_block_out_channels": (8, 8)}
    blocks = {"num_encoder_blocks": (1, 1), "num_decoder_blocks": (1, 1)}
    vae = AutoencoderTiny(**shape, **blocks, scaling_factor=0.5).eval()
    images = torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(4)) * 2 - 1
    with torch.no_grad():
        latents = 0.5 * vae.encode(images).latents
    found = ChannelNormalization.of_vae(vae, [images])
    torch.testing.assert_close(torch.tensor(found.mean), latents.mean((0, 2, 3)))


def test_refusals() -> None:
    with pytest.raises(ValueError, match=r"shape \(4, 8, 8\); give \(B, 1, H, W\)"):
        magnitude_score(torch.zeros(4, 8, 8), UNIT)
    with pytest.raises(ValueError, match=r"give \(B, 1, H, W\)"):
        magnitude_score(torch.zeros(2, 3, 8, 8), UNIT)
    with pytest.raises(ValueError, match="not empty"):
        magnitude_score(torch.zeros(0, 1, 8, 8), UNIT)
    with pytest.raises(ValueError, match="not finite"):
        magnitude_score(torch.full((1, 1, 8, 8), math.inf), UNIT)
    with pytest.raises(ValueError, match="threshold -1"):
        magnitude_score(torch.zeros(1, 1, 8, 8), UNIT, threshold=-1)
    with pytest.raises(ValueError, match="window 0"):
        magnitude_score(torch.zeros(1, 1, 8, 8), UNIT, window=0)
    with pytest.raises(ValueError, match="batches is empty"):
        ChannelNormalization.of_data([])
    with pytest.raises(ValueError, match=r"give \(B, 2, H, W\)"):
        ChannelNormalization.of_data([torch.zeros(1, 2, 4, 4), torch.zeros(1, 3, 4, 4)])
    with pytest.raises(ValueError, match="must be positive"):
        ChannelNormalization.of_data([torch.ones(2, 1, 4, 4)])
    with pytest.raises(ValueError, match="mean has 2 entries and std 1"):
        ChannelNormalization((0.0, 1.0), (1.0,))
