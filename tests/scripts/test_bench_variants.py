"""``fewstep bench variants``: pairs on the same noises, and that a run goes on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fewstep.scripts.bench.variants import parse_sampler
from model_folders import assert_refused, invoke

CALL = ("bench", "variants", "--model", "digits-small", "--steps", 3, "--count", 100, "--guidance-scale", 2)


def test_variants_are_compared_with_the_first(tmp_path: Path) -> None:
    file = tmp_path / "v.json"
    # A momentum number of 2 is PLMS of order 2, so nothing changes.
    result = invoke(*CALL, "--samplers", "ipndm:solver_order=2,ghvb1.8:momentum_number=2", "--json", file)
    assert result.exit_code == 0, (result.output, result.exception)
    base, same = json.loads(file.read_text())["points"]
    assert base["calls"] == same["calls"] == 3
    for name in ("frechet", "magnitude"):
        assert same[name]["value"] == pytest.approx(base[name]["value"], abs=1e-4)
    assert "+0.000 +- 0.000" in result.stdout or "-0.000 +- 0.000" in result.stdout

    again = invoke(*CALL, "--samplers", "ipndm:solver_order=2,ddim", "--json", file)
    assert again.exit_code == 0, (again.output, again.exception)
    assert [point["sampler"] for point in json.loads(file.read_text())["points"]] == [
        "ipndm:solver_order=2", "ghvb1.8:momentum_number=2", "ddim",
    ]  # fmt: skip
    assert [line.split()[0] for line in again.stdout.splitlines()[1:]] == ["ipndm:solver_order=2", "ddim"]
    assert_refused(invoke(*CALL, "--steps", 4, "--json", file), "other settings")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--samplers", "plms5"), "sampler"),
        (("--samplers", "ghvb1.8:momentum_number"), "key=value"),
        (("--samplers", "ipndm,ipndm:momentum=1"), "option of sampler ipndm 'momentum' is not known"),
        (("--samplers", "ipndm:solver_order=two"), "option solver_order"),
        (("--guidance-scale", "0.5"), "from 1 to 100"),
        (("--model", "digits-restore"), "digits-large"),
    ],
)
def test_refusals(words: tuple[str, ...], message: str) -> None:
    assert_refused(invoke(*CALL, *words), message)


def test_options_of_a_sampler() -> None:
    assert parse_sampler("hb-ipndm:damping=0.9:solver_options={}") == (
        "hb-ipndm", {"damping": 0.9, "solver_options": {}},
    )  # fmt: skip
