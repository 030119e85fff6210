from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from fewstep.metrics import DigitsClassifier, FeatureStatistics, ReferenceStatistics, digits_statistics


def features(count: int, size: int = 5, seed: int = 0) -> torch.Tensor:
    return 3.0 + torch.randn(count, size, generator=torch.Generator().manual_seed(seed))


def test_batches_give_the_moments_of_the_whole() -> None:
    x = features(103)
    statistics = FeatureStatistics(5)
    for part in x.split(10):
        statistics.update(part)
    mean, covariance = statistics.compute()
    assert statistics.count == 103
    assert mean.dtype == covariance.dtype == torch.float64
    torch.testing.assert_close(mean, x.double().mean(0), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(covariance, torch.cov(x.double().T), rtol=1e-11, atol=1e-11)
    assert torch.equal(covariance, covariance.T)


def test_float64_holds_where_single_precision_would_not() -> None:
    x = 1000.0 + 1e-2 * features(500).double()
    statistics = FeatureStatistics(5)
    statistics.update(x)
    torch.testing.assert_close(statistics.compute()[1], torch.cov(x.T), rtol=1e-4, atol=1e-8)


def test_states_add_up_and_reset() -> None:
    x = features(60)
    parts = [FeatureStatistics(5), FeatureStatistics(5)]
    parts[0].update(x[:25])
    parts[1].update(x[25:])
    parts[0].merge_state(parts[1])
    torch.testing.assert_close(parts[0].compute()[1], torch.cov(x.double().T), rtol=1e-11, atol=1e-11)
    parts[0].reset()
    assert parts[0].count == 0
    with pytest.raises(ValueError, match="at least 2"):
        parts[0].compute()


def test_synchronises_over_processes_by_summing() -> None:
    x = features(40)
    here, there = FeatureStatistics(5), FeatureStatistics(5)
    here.update(x[:15])
    there.update(x[15:])
    others = iter([there.number, there.total, there.products])
    here.dist_sync_fn = lambda state, group: [state, next(others)]
    here.distributed_available_fn = lambda: True
    mean, covariance = here.compute()
    torch.testing.assert_close(mean, x.double().mean(0), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(covariance, torch.cov(x.double().T), rtol=1e-11, atol=1e-11)
    assert here.count == 15  # each process keeps its own share


def test_a_refused_batch_leaves_nothing_behind() -> None:
    statistics = FeatureStatistics(5)
    statistics.update(features(4))
    with pytest.raises(ValueError, match=r"give \(B, 5\)"):
        statistics.update(features(4, size=6))
    with pytest.raises(ValueError, match="not finite"):
        statistics.update(features(4) / 0.0)
    assert statistics.count == 4
    with pytest.raises(ValueError, match="size=0"):
        FeatureStatistics(0)


def test_reference_statistics_return_from_disk(tmp_path: Path) -> None:
    x = features(30).double()
    kept = ReferenceStatistics(x.mean(0), torch.cov(x.T), 30, extractor="aa", data="bb", preprocessing="none")
    kept.save(tmp_path / "x.safetensors")
    found = ReferenceStatistics.load(tmp_path / "x.safetensors", extractor="aa")
    assert torch.equal(found.mean, kept.mean)
    assert torch.equal(found.covariance, kept.covariance)
    assert (found.count, found.extractor, found.data, found.preprocessing) == (30, "aa", "bb", "none")
    assert [p.name for p in tmp_path.iterdir()] == ["x.safetensors"]


def test_reference_statistics_of_another_extractor_are_refused(tmp_path: Path) -> None:
    x = features(30).double()
    ReferenceStatistics(x.mean(0), torch.cov(x.T), 30, extractor="aa", data="bb", preprocessing="none").save(
        tmp_path / "x.safetensors"
    )
    with pytest.raises(ValueError, match="made with extractor aa, not cc"):
        ReferenceStatistics.load(tmp_path / "x.safetensors", extractor="cc")
    (tmp_path / "y.safetensors").write_bytes(b"no tensors")
    for name in ("y.safetensors", "z.safetensors"):
        with pytest.raises(ValueError, match="no reference statistics"):
            ReferenceStatistics.load(tmp_path / name, extractor="aa")


def test_bundled_statistics_belong_to_the_bundled_classifier() -> None:
    classifier = DigitsClassifier.bundled()
    train, test = (digits_statistics(split, classifier) for split in ("train", "test"))
    assert (train.count, test.count) == (60000, 10000)
    assert train.data != test.data
    for found in (train, test):
        assert found.mean.shape == (classifier.config["feature_size"],)
        assert float(torch.linalg.eigvalsh(found.covariance)[0]) > -1e-12
        assert dataclasses.replace(found).extractor == classifier.fingerprint
    with pytest.raises(ValueError, match="different extractors"):
        digits_statistics("train", DigitsClassifier())
    with pytest.raises(ValueError, match="split='valid'"):
        digits_statistics("valid", classifier)
