from __future__ import annotations

import dataclasses
import re
from collections import Counter
from pathlib import Path

import pytest
import torch

from fewstep.metrics import ReferenceStatistics, compute_reference, feature_extractor, images_fingerprint
from fewstep.metrics.reference import _Reservoir


def digits(count: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(256, (count, 1, 32, 32), generator=generator, dtype=torch.uint8)


def test_statistics_are_those_of_the_features(tmp_path: Path) -> None:
    extractor, images = feature_extractor("digits"), digits(90)
    seen: list[int] = []
    found = compute_reference(images, extractor, batch_size=40, progress=seen.append)
    features = extractor(images)
    torch.testing.assert_close(found.mean, features.double().mean(0), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found.covariance, torch.cov(features.double().T), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.features, features, rtol=1e-4, atol=1e-5)
    assert (found.count, found.image_shape, seen) == (90, (1, 32, 32), [40, 40, 10])
    assert (found.extractor, found.data) == (extractor.fingerprint, images_fingerprint(images))
    assert not found.singular
    assert compute_reference(images[:64], extractor).singular
    assert compute_reference(images, extractor, keep_features=0).features is None


def test_file_holds_everything_and_is_refused_where_anything_differs(tmp_path: Path) -> None:
    extractor = feature_extractor("digits")
    made = compute_reference(digits(70), extractor, keep_features=20, size=32, channels=1)
    path = tmp_path / "reference.safetensors"
    made.save(path)
    found = ReferenceStatistics.load(path, extractor=made.extractor, data=made.data, preprocessing=made.preprocessing)
    for field in dataclasses.fields(ReferenceStatistics):
        ours, theirs = getattr(made, field.name), getattr(found, field.name)
        assert torch.equal(ours, theirs) if isinstance(ours, torch.Tensor) else ours == theirs, field.name
    prepared = "made grey; shorter side to 32 by Pillow's bicubic filter, middle 32 x 32; uint8 32 x 32"
    assert made.preprocessing.startswith(prepared)
    assert made.fingerprint == found.fingerprint
    for changed, said in {
        "extractor": "made with extractor .* not other",
        "data": "made of images .* not other",
        "preprocessing": "made of images prepared by .*, not by 'other'",
    }.items():
        expected = {"extractor": made.extractor, changed: "other"}
        with pytest.raises(ValueError, match=said):
            ReferenceStatistics.load(path, **expected)
        assert dataclasses.replace(made, **{changed: "other"}).fingerprint != made.fingerprint  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="keep_features -1"):
        compute_reference(digits(3), extractor, keep_features=-1)
    with pytest.raises(ValueError, match="at least 2 feature vectors, not 1"):
        compute_reference(digits(1), extractor)
    with pytest.raises(ValueError, match=re.escape("images are 16 x 16")):
        compute_reference(digits(3), extractor, size=16)


def test_kept_features_are_a_fair_sample_in_order_whatever_the_batches() -> None:
    rows = torch.arange(1000.0)[:, None]
    samples = []
    for batch in (1, 7, 1000):
        reservoir = _Reservoir(100, 1)
        for part in rows.split(batch):
            reservoir.add(part)
        samples.append(reservoir.features()[:, 0])
    assert torch.equal(samples[0], samples[1])
    assert torch.equal(samples[0], samples[2])
    assert torch.equal(samples[0], samples[0].unique())
    quarters = Counter((samples[0] // 250).int().tolist())
    assert all(10 <= quarters[k] <= 40 for k in range(4))  # 25 +- 3 deviations
