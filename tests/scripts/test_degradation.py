"""The degradation that restoration models undo: its blur and noise, and that it is each image's own."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter

from fewstep.scripts.training import degradation
from fewstep.scripts.training.degradation import BLUR, NOISE, degrade, gaussian_blur


@pytest.mark.parametrize("width", [0.4, 1.0, 2.7])
def test_blur_is_the_convolution_of_scipy(width: float) -> None:
    """Weights inside the image sum to 1, so scipy's result with zeros around is divided by that of a white image."""
    image = np.random.default_rng(0).random((2, 19, 32))
    found = gaussian_blur(torch.from_numpy(image), width).numpy()
    for channel, result in zip(image, found, strict=True):
        options = {"sigma": width, "mode": "constant", "truncate": 40.0}
        expected = gaussian_filter(channel, **options) / gaussian_filter(np.ones_like(channel), **options)
        np.testing.assert_allclose(result, expected, rtol=1e-10)


def test_an_image_is_degraded_by_its_own_seed_alone() -> None:
    images = torch.rand(3, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    batch = degrade(images, [5, 6, 7])
    assert torch.equal(degrade(images[1:2], [6])[0], batch[1])
    assert torch.equal(degrade(images, [5, 6, 7]), batch)
    assert not torch.equal(degrade(images[1:2], [5])[0], batch[1])
    assert batch.min() >= 0.0
    assert batch.max() <= 1.0


def test_noise_and_widths_have_the_stated_distributions(monkeypatch: pytest.MonkeyPatch) -> None:
    grey = torch.full((64, 1, 16, 16), 0.5)
    noise = degrade(grey, range(64)) - grey
    assert float(noise.std()) == pytest.approx(NOISE, rel=0.02)
    assert abs(float(noise.mean())) < 0.003
    # Of a point of light the blur's variance is left, along each axis.
    monkeypatch.setattr(degradation, "NOISE", 0.0)
    points = torch.zeros(400, 1, 33, 33)
    points[:, :, 16, 16] = 1.0
    place = torch.arange(33) - 16.0
    widths = (degrade(points, range(400)).sum((1, 2)) @ place.square()).sqrt()
    quantiles = torch.quantile(widths, torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0])).tolist()
    assert quantiles == pytest.approx(np.linspace(*BLUR, 5).tolist(), abs=0.08)


def test_another_number_of_seeds_is_refused() -> None:
    with pytest.raises(ValueError, match="seeds has 2 entries for 3 images; give one an image"):
        degrade(torch.zeros(3, 1, 8, 8), [0, 1])
