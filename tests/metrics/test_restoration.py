from __future__ import annotations

import math

import pytest
import torch
from torchmetrics.image import PeakSignalNoiseRatio, StructuralSimilarityIndexMeasure

from fewstep.metrics import restoration_scores


def images(count: int, seed: int, channels: int = 3) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(256, (count, channels, 16, 24), generator=generator, dtype=torch.uint8)


@pytest.mark.parametrize("channels", [1, 3])
def test_scores_are_torchmetrics_of_each_image(channels: int) -> None:
    restored, originals = images(4, 0, channels), images(4, 1, channels)
    restored[1] = originals[1] // 2
    found = restoration_scores(restored, originals)
    ratio, similarity = PeakSignalNoiseRatio(data_range=255.0), StructuralSimilarityIndexMeasure(data_range=255.0)
    for k in range(4):
        a, b = restored[k : k + 1].double(), originals[k : k + 1].double()
        assert float(found.psnr[k]) == pytest.approx(float(ratio(a, b)), rel=1e-6)
        assert float(found.ssim[k]) == pytest.approx(float(similarity(a, b)), rel=1e-6)


def test_ratio_is_its_definition_and_equal_images_have_the_best() -> None:
    originals = images(2, 2)
    off_by_one = torch.where(originals == 255, 254, originals + 1).to(torch.uint8)
    found = restoration_scores(off_by_one, originals)
    torch.testing.assert_close(found.psnr, torch.full((2,), 20.0 * math.log10(255.0), dtype=torch.float64))
    best = restoration_scores(originals, originals)
    assert best.psnr.isinf().all()
    torch.testing.assert_close(best.ssim, torch.ones(2, dtype=torch.float64))


def test_refusals() -> None:
    x = images(2, 0)
    with pytest.raises(ValueError, match="disagree; give both"):
        restoration_scores(x, x[:1])
    with pytest.raises(ValueError, match=r"restored are torch\.float32"):
        restoration_scores(x.float(), x)
    with pytest.raises(ValueError, match=r"images are \(8, 24\); the similarity's window takes 11 x 11"):
        restoration_scores(x[:, :, :8], x[:, :, :8])
