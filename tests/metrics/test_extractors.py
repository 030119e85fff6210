from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.kid import KernelInceptionDistance

from fewstep.metrics import DigitsClassifier, feature_extractor, frechet_distance, kernel_distance


def digits(count: int, edge: int = 32, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(256, (count, 1, edge, edge), generator=generator, dtype=torch.uint8)


def test_digits_are_the_bundled_classifiers_features_and_logits() -> None:
    extractor, classifier = feature_extractor("digits"), DigitsClassifier.bundled()
    images = digits(5)
    features, logits = extractor.features_and_logits(images)
    with torch.no_grad():
        expected = classifier.features(images.float() / 127.5 - 1.0)
        torch.testing.assert_close(features, expected, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(logits, classifier.classify(expected), rtol=1e-5, atol=1e-5)
    assert torch.equal(extractor(images), features)
    assert torch.equal(extractor.logits(images), logits)
    assert (extractor.size, extractor.classes) == (64, 10)
    assert extractor.fingerprint == classifier.fingerprint
    assert not features.requires_grad
    assert not extractor.train().training
    # Smaller images get a black frame, as those that the bundled statistics are made of.
    small = digits(2, 28)
    padded = torch.zeros(2, 1, 32, 32, dtype=torch.uint8)
    padded[:, :, 2:30, 2:30] = small
    assert torch.equal(extractor(small), extractor(padded))


def test_features_do_not_depend_on_the_batch() -> None:
    extractor, images = feature_extractor("digits"), digits(9)
    together = extractor(images)
    for k in range(9):
        torch.testing.assert_close(extractor(images[k : k + 1]), together[k : k + 1], rtol=1e-5, atol=1e-5)


def test_another_classifier_has_another_fingerprint(tmp_path: Path) -> None:
    torch.manual_seed(0)
    DigitsClassifier(channels=3, classes=4, feature_size=16).save_pretrained(tmp_path)
    extractor = feature_extractor("digits", tmp_path)
    assert extractor.fingerprint not in ("", feature_extractor("digits").fingerprint)
    assert extractor(torch.zeros(2, 3, 32, 32, dtype=torch.uint8)).shape == (2, 16)


def test_serves_torchmetrics_as_it_is() -> None:
    extractor = feature_extractor("digits")
    real, fake = digits(120), digits(120, 28, seed=1)
    distance, kernel = FrechetInceptionDistance(extractor), KernelInceptionDistance(extractor, 1, 120)
    moments = []
    for images, is_real in ((real, True), (fake, False)):
        distance.update(images, real=is_real)
        kernel.update(images, real=is_real)
        features = extractor(images).double()
        moments += [features.mean(0), torch.cov(features.T)]
    distance.orig_dtype = torch.float64
    assert frechet_distance(*moments) == pytest.approx(float(distance.compute()), rel=1e-6)
    assert kernel_distance(extractor(real), extractor(fake)) == pytest.approx(float(kernel.compute()[0]), rel=1e-4)


def test_refusals(tmp_path: Path) -> None:
    extractor = feature_extractor("digits")
    with pytest.raises(ValueError, match="name 'vgg' is no feature extractor; use digits, inception, dinov2, clip"):
        feature_extractor("vgg")
    with pytest.raises(ValueError, match="weights of inception are missing: give the safetensors file"):
        feature_extractor("inception")
    with pytest.raises(ValueError, match="weights of dinov2 are missing: give a folder or a hub id"):
        feature_extractor("dinov2")
    with pytest.raises(ValueError, match="holds no classifier"):
        feature_extractor("digits", tmp_path)
    with pytest.raises(ValueError, match=r"shape \(2, 32, 32\); give \(B, 3, H, W\)"):
        extractor(torch.zeros(2, 32, 32, dtype=torch.uint8))
    with pytest.raises(ValueError, match=r"images are torch\.float32; give uint8"):
        extractor(torch.zeros(2, 1, 32, 32))
    with pytest.raises(ValueError, match="not empty"):
        extractor(torch.zeros(0, 1, 32, 32, dtype=torch.uint8))
    with pytest.raises(ValueError, match="images have 3 channels; the digit classifier takes 1"):
        extractor(torch.zeros(2, 3, 32, 32, dtype=torch.uint8))
    with pytest.raises(ValueError, match="images are 64 x 32; the digit classifier takes 32 x 32"):
        extractor(torch.zeros(2, 1, 64, 32, dtype=torch.uint8))
