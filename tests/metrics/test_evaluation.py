from __future__ import annotations

import dataclasses
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import scipy.linalg
import torch

from fewstep.metrics import (
    IMAGE_METRICS,
    FrechetDistance,
    ImageMetrics,
    ReferenceStatistics,
    density_coverage,
    digits_statistics,
    feature_extractor,
    frechet_distance_infinity,
    inception_score,
    jackknife_groups,
    kernel_distance,
    precision_recall,
)

SIZE = 5
SPLITS = 4


def points(count: int, seed: int, size: int = SIZE) -> torch.Tensor:
    return torch.randn(count, size, generator=torch.Generator().manual_seed(seed))


def reference_of(features: torch.Tensor, **changes: Any) -> ReferenceStatistics:
    x = features.double()
    fields = {"extractor": "aa", "data": "bb", "preprocessing": "none", "features": features}
    return ReferenceStatistics(x.mean(0), torch.cov(x.T), len(x), **{**fields, **changes})


REFERENCE = reference_of(points(150, 0))
FEATURES, LOGITS = 0.3 + 0.9 * points(120, 1), points(120, 2, 7)


def metrics_of(rows: torch.Tensor, batch: int, names: Any = IMAGE_METRICS, **options: Any) -> ImageMetrics:
    metrics = ImageMetrics(names, REFERENCE, splits=SPLITS, **options)
    for part in rows.split(batch):
        metrics.update(FEATURES[part], part, logits=LOGITS[part])
    return metrics


def test_figures_are_those_of_the_functions_and_of_scipy() -> None:
    found = metrics_of(torch.arange(120), 25).compute()
    assert list(found) == ["fid", "is", "is_spread", *IMAGE_METRICS[2:]]
    x, real = FEATURES.double(), REFERENCE.features
    assert real is not None
    covariance = torch.cov(x.T)
    root = scipy.linalg.sqrtm((covariance @ REFERENCE.covariance).numpy()).real
    fid = float((x.mean(0) - REFERENCE.mean).square().sum() + covariance.trace() + REFERENCE.covariance.trace())
    assert found["fid"] == pytest.approx(fid - 2.0 * root.trace(), rel=1e-6)
    score = inception_score(LOGITS.double().softmax(1), SPLITS)
    assert (found["is"], found["is_spread"]) == pytest.approx(score, rel=1e-12)
    assert found["kid"] == pytest.approx(kernel_distance(real, FEATURES), rel=1e-12)
    assert (found["precision"], found["recall"]) == precision_recall(real, FEATURES)
    assert (found["density"], found["coverage"]) == pytest.approx(density_coverage(real, FEATURES), rel=1e-12)
    to_reference = FrechetDistance(REFERENCE.mean, REFERENCE.covariance)
    assert found["fid_infinity"] == pytest.approx(frechet_distance_infinity(FEATURES, to_reference), rel=1e-12)


def test_processes_batches_and_order_change_no_bit() -> None:
    whole = metrics_of(torch.arange(120), 120)
    expected, estimates = whole.compute(), whole.estimates()
    order = torch.randperm(120, generator=torch.Generator().manual_seed(3))
    assert metrics_of(order, 7).compute() == expected
    first, second = metrics_of(order[:33], 5), metrics_of(order[33:], 50)
    first.merge_state(second)
    assert first.compute() == expected
    assert first.estimates() == estimates


def test_gathers_over_processes() -> None:
    here, there = metrics_of(torch.arange(0, 120, 2), 9), metrics_of(torch.arange(1, 120, 2), 60)
    others = [torch.cat(state) for state in (there.features, there.logits, there.numbers)]
    queue = [*others, *others]
    here.dist_sync_fn = lambda state, group: [state, queue.pop(0)]
    here.distributed_available_fn = lambda: True
    whole = metrics_of(torch.arange(120), 120)
    assert here.compute() == whole.compute()
    assert here.estimates() == whole.estimates()
    assert not queue
    here.distributed_available_fn = lambda: False
    assert sum(map(len, here.numbers)) == 60  # each process keeps its own share


def test_estimates_are_the_figures_and_those_of_what_is_left() -> None:
    metrics = metrics_of(torch.arange(120), 60)
    figures, estimates = metrics.compute(), metrics.estimates(groups=6)
    assert list(estimates) == list(IMAGE_METRICS)
    group = jackknife_groups(120, 6)
    for name, estimate in estimates.items():
        assert estimate.value == pytest.approx(figures[name], rel=1e-12)
        low, high = estimate.interval()
        assert low < estimate.value < high
    for g in range(6):
        kept = torch.nonzero(group != g)[:, 0]
        parts = metrics_of(kept, 60).compute()
        # The inception score's parts stay what they were.
        parts["is"] = inception_score(LOGITS.double().softmax(1), SPLITS, kept=kept).mean
        for name in IMAGE_METRICS[:-1]:
            assert estimates[name].left_out[g] == pytest.approx(parts[name], rel=1e-9), name


def test_intervals_of_the_distance_cover_its_spread() -> None:
    """The distance of 400 draws of one Gaussian: its mean lies in 90 % of the intervals."""
    draws = [0.5 + points(400, 100 + k) for k in range(60)]
    values, intervals = [], []
    for x in draws:
        metrics = ImageMetrics(["fid"], REFERENCE)
        metrics.update(x, range(400))
        estimate = metrics.estimates()["fid"]
        values.append(estimate.value)
        intervals.append(estimate.interval(0.9))
    mean = sum(values) / 60
    held = sum(low <= mean <= high for low, high in intervals)
    assert abs(held - 54) < 3 * (60 * 0.09) ** 0.5


def test_intervals_of_classes_in_turn() -> None:
    """Classes far apart, the same number of each in every set: their distances are no chance, and not in the spread."""
    centres = 3.0 * points(10, 7)
    reference = reference_of(centres.repeat(100, 1) + points(1000, 8))
    values, widths = [], {1: [], 10: []}
    for k in range(40):
        metrics = ImageMetrics(["fid"], reference)
        metrics.update(centres.repeat(40, 1) + points(400, 100 + k), range(400))
        for turn, found in widths.items():
            estimate = metrics.estimates(turn=turn)["fid"]
            found.append(estimate.half_width(0.9))
        values.append(estimate.value)
    spread = torch.tensor(values).std()
    ratios = {turn: float(torch.tensor(found).mean() / (1.729 * spread)) for turn, found in widths.items()}
    assert 0.75 < ratios[10] < 1.4
    assert ratios[1] > 2.0


def test_a_process_without_images_takes_part(tmp_path: Path) -> None:
    code = """
import sys, torch, torch.distributed as d
from fewstep.metrics import ImageMetrics, ReferenceStatistics
rank, file = int(sys.argv[1]), sys.argv[2]
d.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
x = torch.randn(60, 3, generator=torch.Generator().manual_seed(0))
r = x.double()
metrics = ImageMetrics(["fid", "is"], ReferenceStatistics(r.mean(0), torch.cov(r.T), 60, "aa", "bb", "none", x))
if rank == 0:
    metrics.update(x + 1.0, range(60), logits=x)
print(metrics.compute(), metrics.estimates()["fid"], metrics.remarks(), sum(map(len, metrics.numbers)))
"""
    runs = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(rank), str(tmp_path / "meet")], stdout=subprocess.PIPE, text=True
        )
        for rank in range(2)
    ]
    first, second = (run.communicate(timeout=120)[0] for run in runs)
    assert first.endswith(" () 60\n")
    assert second == first.removesuffix("60\n") + "0\n"


def test_pairs_are_of_the_first_images() -> None:
    names = ("kid", "precision", "recall", "density", "coverage")
    some = metrics_of(torch.arange(120).flip(0), 50, names, pairs=70)
    first = metrics_of(torch.arange(70), 50, names)
    with pytest.warns(UserWarning, match=r"^kid, precision.*: of the first 70 of 120 images \(pairs=70\)$"):
        assert some.compute() == first.compute()
    assert some.estimates() == first.estimates()


def test_images_go_through_the_extractor() -> None:
    extractor = feature_extractor("digits")
    reference = digits_statistics("test", extractor.network)
    generator = torch.Generator().manual_seed(5)
    images = torch.randint(256, (80, 1, 32, 32), generator=generator, dtype=torch.uint8)
    metrics = ImageMetrics(["fid", "is"], reference, extractor=extractor, splits=2)
    by_hand = ImageMetrics(["fid", "is"], reference, splits=2)
    for begin in (0, 40):
        part, numbers = images[begin : begin + 40], range(begin, begin + 40)
        metrics.update(part, numbers)
        features, logits = extractor.features_and_logits(part)
        by_hand.update(features, numbers, logits=logits)
    assert metrics.compute() == by_hand.compute()
    alone = ImageMetrics(["is"], extractor=extractor, splits=2)
    alone.update(images[:40], range(40))
    alone.update(images[40:], range(40, 80))
    assert alone.compute()["is"] == metrics.compute()["is"]


def test_singular_covariances_are_told() -> None:
    metrics = ImageMetrics(["fid"], reference_of(points(4, 0)))
    metrics.update(points(5, 1), range(5))
    said = ("5 generated images are too few for 5 features", "4 reference images are too few for 5 features")
    assert [remark[: len(begin)] for remark, begin in zip(metrics.remarks(), said, strict=True)] == list(said)
    with pytest.warns(UserWarning, match="too few for 5 features: their covariance is singular") as caught:
        assert metrics.compute()["fid"] > 0.0
    assert len(caught) == 2
    metrics = ImageMetrics(["fid"], reference_of(points(6, 0)))
    metrics.update(points(6, 1), range(6))
    assert metrics.remarks() == ()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        metrics.compute()


def test_a_refused_batch_leaves_nothing_behind() -> None:
    metrics = ImageMetrics(["fid", "is"], REFERENCE)
    grey = torch.zeros(2, 1, 32, 32, dtype=torch.uint8)
    for images, numbers, logits, said in (
        (points(3, 0), range(2), points(3, 1), r"numbers have shape \(2,\); give one for each of 3"),
        (points(3, 0, 4), range(3), points(3, 1), r"features have shape \(3, 4\); give \(B, 5\)"),
        (points(3, 0) / 0.0, range(3), points(3, 1), "not finite"),
        (points(3, 0), range(3), None, "logits are missing; 'is' needs"),
        (points(3, 0), range(3), points(2, 1), r"logits are of shape \(2, 5\)"),
        (grey, range(2), None, "images need an extractor"),
        (grey.float(), range(2), None, "images are torch.float32; give uint8 from 0 to 255, or their features"),
        (points(3, 0), range(3), points(3, 1) / 0.0, "logits have values that are not finite"),
    ):
        with pytest.raises(ValueError, match=said):
            metrics.update(images, numbers, logits=logits)
    with pytest.raises(ValueError, match="no images were added"):
        metrics.compute()
    metrics.update(points(3, 0), [4, 7, 4], logits=points(3, 1))
    with pytest.raises(ValueError, match="logits have 4 classes, those before 5"):
        metrics.update(points(3, 0), range(3), logits=points(3, 1, 4))
    with pytest.raises(ValueError, match="image number 4 was added twice"):
        metrics.estimates()


def test_refusals() -> None:
    extractor = feature_extractor("digits")
    digits = digits_statistics("test", extractor.network)
    for names, reference, options, said in (
        (["fid", "fad"], REFERENCE, {}, "metrics fad: use some of fid, is, kid"),
        ([], REFERENCE, {}, "metrics is empty: use some of"),
        (["fid"], None, {}, "reference is missing"),
        (["fid"], REFERENCE, {"extractor": extractor}, "reference was made with extractor aa, not digits"),
        (["kid", "fid"], digits, {"extractor": extractor}, "reference holds no features, which kid need"),
        (["is"], None, {"splits": 0}, "splits 0 must be at least 1"),
        (["kid"], REFERENCE, {"pairs": 1}, "pairs 1 at least 2"),
    ):
        with pytest.raises(ValueError, match=said):
            ImageMetrics(names, reference, **options)
    colour = dataclasses.replace(digits, image_shape=(3, 32, 32))
    metrics = ImageMetrics(["fid"], colour, extractor=extractor)
    with pytest.raises(ValueError, match="images are grey, the reference's are RGB; make them alike"):
        metrics.update(torch.zeros(2, 1, 32, 32, dtype=torch.uint8), range(2))
    few = metrics_of(torch.arange(30), 30, ["fid"])
    with pytest.raises(ValueError, match="groups=20 of 30 images"):
        few.estimates()
