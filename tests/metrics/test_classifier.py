from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fewstep.metrics import DigitsClassifier


def images(count: int) -> torch.Tensor:
    return torch.rand(count, 1, 32, 32, generator=torch.Generator().manual_seed(0)) * 2.0 - 1.0


def strokes() -> torch.Tensor:
    """A vertical bar (a one) and a ring (a zero), white on black with soft edges."""
    y, x = torch.meshgrid(torch.arange(32) - 15.5, torch.arange(32) - 15.5, indexing="ij")
    bar = torch.sigmoid(2.0 * (1.5 - x.abs())) * torch.sigmoid(2.0 * (9.0 - y.abs()))
    ring = torch.sigmoid(2.0 * (1.5 - ((x / 0.75) ** 2 + y**2).sqrt().sub(8.0).abs()))
    return torch.stack([bar, ring])[:, None] * 2.0 - 1.0


@torch.no_grad()
def test_bundled_classifier_reads_strokes() -> None:
    classifier = DigitsClassifier.bundled()
    probabilities = classifier(strokes()).softmax(1)
    assert probabilities.argmax(1).tolist() == [1, 0]
    assert float(probabilities.max(1).values.min()) > 0.9
    assert not classifier.training


@torch.no_grad()
def test_features_do_not_depend_on_the_batch() -> None:
    classifier = DigitsClassifier().eval()
    x = images(5)
    features = classifier.features(x)
    assert features.shape == (5, 64)
    torch.testing.assert_close(features[2:3], classifier.features(x[2:3]), rtol=1e-5, atol=1e-6)
    assert torch.equal(classifier(x), classifier.classify(features))


@torch.no_grad()
def test_returns_from_disk_with_the_same_features_and_fingerprint(tmp_path: Path) -> None:
    torch.manual_seed(0)
    classifier = DigitsClassifier(channels=3, classes=4, feature_size=16).eval()
    before = classifier.fingerprint
    classifier.save_pretrained(tmp_path / "model")
    found = DigitsClassifier.from_pretrained(tmp_path / "model")
    x = images(2).expand(-1, 3, -1, -1)
    assert torch.equal(found.features(x), classifier.features(x))
    assert found.fingerprint == classifier.fingerprint == found.half().fingerprint != before
    assert sorted(p.name for p in (tmp_path / "model").iterdir()) == ["config.json", "model.safetensors"]
    found.head.bias[0] += 1.0
    assert found.fingerprint != classifier.fingerprint


def test_bad_input(tmp_path: Path) -> None:
    classifier = DigitsClassifier()
    with pytest.raises(ValueError, match=r"takes \(B, 1, 32, 32\)"):
        classifier(torch.zeros(2, 1, 28, 28))
    with pytest.raises(ValueError, match="give floating point"):
        classifier(torch.zeros(2, 1, 32, 32, dtype=torch.uint8))
    with pytest.raises(ValueError, match="holds no classifier"):
        DigitsClassifier.from_pretrained(tmp_path)
    classifier.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"channels": 2}')
    with pytest.raises(ValueError, match="another kind of model"):
        DigitsClassifier.from_pretrained(tmp_path)
