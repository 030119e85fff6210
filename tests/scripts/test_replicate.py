"""``fewstep replicate``: verdicts do not get worse, and a run goes on."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from fewstep.metrics import Estimate
from fewstep.scripts.replication import catalogue
from fewstep.scripts.replication import run as running
from fewstep.scripts.replication.catalogue import CLAIMS
from fewstep.scripts.replication.claims import (
    HOLDS,
    IN_PART,
    NOT_HERE,
    VERDICTS,
    Claim,
    Finding,
    Measurement,
    Scale,
    percent,
)
from fewstep.scripts.replication.report import markdown, page
from model_folders import assert_refused, invoke

EXPECTED = {
    "dpm-solver++": IN_PART,  # at 10 calls the mixture shows no difference
    "noise-form": NOT_HERE,
    "deis": HOLDS,
    "unipc": IN_PART,  # on the mixture it is as good as DPM-Solver++
    "momentum": IN_PART,  # solvers of order 2 have nothing to be damped
    "dc-solver": HOLDS,
    "s3": IN_PART,
    "learned": HOLDS,
    "time-shift": IN_PART,  # few images leave wide intervals
    "t-stitch": HOLDS,
    "mean-reverting": HOLDS,
}


def test_verdicts_are_no_worse_than_they_were(tmp_path: Path) -> None:
    result = invoke("replicate", "--quick", "--claims", ",".join(EXPECTED), "--output", tmp_path)
    assert result.exit_code == 0, (result.output, result.exception)
    claims = json.loads((tmp_path / "report.json").read_text())["claims"]
    worse = {
        key: entry["findings"]
        for key, entry in claims.items()
        if VERDICTS.index(entry["verdict"]) < VERDICTS.index(EXPECTED[key])
    }
    assert list(claims) == list(EXPECTED)
    assert not worse
    text, html = ((tmp_path / f"report.{suffix}").read_text() for suffix in ("md", "html"))
    for key, entry in claims.items():
        assert f"fewstep replicate --claims {key}" in text
        assert f"id='{key}'" in html
        for finding in entry["findings"]:
            assert f"{finding['value']:+.{1 if finding['unit'] == '%' else 3}f}" in text
    assert html.count("<img src='data:image/png;base64,") == len(claims) + 1  # and the picture of DPM-Solver++
    assert "http" not in html.replace("https://arxiv.org/abs/", "")


def test_every_claim_has_a_key_of_its_own() -> None:
    assert len({claim.key for claim in CLAIMS}) == len(CLAIMS) >= len(EXPECTED)


@pytest.mark.parametrize(
    ("rule", "bound", "low", "high", "verdict"),
    [
        ("at most", -15.0, -20.0, -16.0, HOLDS),
        ("at most", -15.0, -20.0, -14.0, IN_PART),
        ("at most", -15.0, -20.0, 1.0, NOT_HERE),
        ("at most", 0.0, -2.0, 0.1, NOT_HERE),
        ("at least", 0.0, 0.5, 2.0, HOLDS),
        ("at least", 3.0, 0.5, 5.0, IN_PART),
        ("at least", 0.0, -0.5, 2.0, NOT_HERE),
        ("no more than", 0.0, -0.5, 2.0, HOLDS),
        ("no more than", 0.0, 0.1, 2.0, NOT_HERE),
    ],
)
def test_verdict_of_a_number(rule: str, bound: float, low: float, high: float, verdict: str) -> None:
    assert Finding("", (low + high) / 2.0, low, high, bound, rule).verdict == verdict  # type: ignore[arg-type]


def test_a_claim_holds_in_part_where_some_numbers_keep_it() -> None:
    good, bad = Finding("", -2.0, -3.0, -1.0), Finding("", 2.0, 1.0, 3.0)
    assert Measurement([good, good]).verdict == HOLDS
    assert Measurement([good, bad]).verdict == IN_PART
    assert Measurement([bad]).verdict == NOT_HERE


def test_changes_in_percent_are_between_pairs() -> None:
    old = Estimate(2.0, tuple(2.0 + k for k in range(20)))
    value, low, high = percent(old, Estimate(1.0, tuple(0.5 * one for one in old.left_out)))
    assert value == low == high == -50.0


def test_what_was_measured_is_kept(tmp_path: Path) -> None:
    measured = []

    def measure(scale: Scale) -> Measurement:
        measured.append(scale)
        return Measurement([Finding("a < b", -1.0, -1.5, -0.5)])

    claims = [Claim("one", "1234.56789", "One", "1 is < 2.", "fewstep --help", measure)]
    scale = Scale(quick=True, folder=tmp_path)
    first = running.replicate(claims, scale, tmp_path)
    again = running.replicate(claims, scale, tmp_path)
    assert len(measured) == 1
    assert markdown(first, quick=True) == markdown(again, quick=True)
    assert "1 is &lt; 2." in page(again, quick=True)
    with pytest.raises(ValueError, match="measured with other quick"):
        running.replicate(claims, Scale(quick=False, folder=tmp_path), tmp_path)
    (tmp_path / "claims" / "one.json").write_text("{}")
    with pytest.raises(ValueError, match="holds no outcome"):
        running.replicate(claims, scale, tmp_path)


def test_outcomes_belong_to_their_data(tmp_path: Path) -> None:
    claims = [Claim("one", "", "One", "1 < 2.", "", lambda scale: Measurement([Finding("", -1.0, -1.5, -0.5)]))]
    scale = Scale(quick=True, folder=tmp_path, data=save_digits(tmp_path / "digits.npz"))
    running.replicate(claims, scale, tmp_path)
    running.replicate(claims, scale, tmp_path)
    save_digits(tmp_path / "digits.npz", 1)
    for other in (scale, Scale(quick=True, folder=tmp_path)):
        with pytest.raises(ValueError, match="measured with other data"):
            running.replicate(claims, other, tmp_path)


def test_files_are_checked_before_the_first_claim(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def measure(scale: Scale) -> Measurement:
        raise AssertionError

    monkeypatch.setattr(catalogue, "CLAIMS", [replace(claim, measure=measure) for claim in CLAIMS])
    np.savez(tmp_path / "bad.npz", x_train=np.zeros((10, 28, 28), np.uint8))
    (tmp_path / "out" / "claims").mkdir(parents=True)
    (tmp_path / "out" / "claims" / "deis.json").write_text("{}")
    common = ("replicate", "--quick", "--claims", "unipc,deis")
    for words, message in (
        (("--data", tmp_path / "bad.npz", "--output", tmp_path / "new"), "x_test"),
        (("--data", save_digits(tmp_path / "one.npz", classes=1), "--output", tmp_path / "new"), "the classes 0 to 9"),
        (("--output", tmp_path / "bad.npz" / "new"), "not a writable folder"),
    ):
        assert_refused(invoke(*common, *words), message)
    told = invoke(*common, "--output", tmp_path / "out")
    assert told.exit_code == 2
    assert "deis.json holds no outcome" in told.stderr
    assert not (tmp_path / "new").exists()


def save_digits(path: Path, seed: int = 0, classes: int = 10) -> Path:
    pixels = np.random.default_rng(seed).integers(0, 256, (20, 28, 28), dtype=np.uint8)
    np.savez(path, x_test=pixels, y_test=np.arange(20) % classes)
    return path


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--claims", "unipcc"), "unipc"),
        (("--data", "nowhere.npz"), "nowhere.npz is no file"),
        (("--output", __file__), "is a file"),
    ],
)
def test_refusals(words: tuple[str, ...], message: str, tmp_path: Path) -> None:
    assert_refused(invoke("replicate", "--quick", "--output", tmp_path / "new", *words), message)
    assert not (tmp_path / "new").exists()
