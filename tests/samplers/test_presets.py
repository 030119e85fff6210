"""``preset="accurate"``: a lookup in measurements, and what it gains on problems that nobody measured."""

from __future__ import annotations

import functools
import json
import math
from importlib import resources
from typing import Any

import pytest

from fewstep.samplers import DEISScheduler, DPMSolverPPScheduler, PlanScheduler, UniPCScheduler
from fewstep.samplers.presets import preset_options
from fewstep.scripts.bench.presets import GUIDANCE, MODELS, STEPS, Problem, digits_problem, mixture_problem

CLASSES: dict[str, type[PlanScheduler]] = {c.__name__: c for c in (DPMSolverPPScheduler, DEISScheduler, UniPCScheduler)}
TABLE: dict[str, Any] = json.loads(resources.files("fewstep.samplers").joinpath("presets.json").read_text())
# The table was measured on the mixtures 0 to 3 and on noise 0.
MIXTURES, NOISE = (10, 11), 10

every_class = pytest.mark.parametrize("cls", CLASSES.values())


@functools.cache
def problems(kind: str, guidance: float) -> list[Problem]:
    return [mixture_problem(config, kind, seed, guidance, 8) for config in MODELS[kind] for seed in MIXTURES]


digits = functools.cache(digits_problem)


def gain(cls: type[PlanScheduler], chosen: list[Problem], guidance: float, steps: int) -> float:
    """How many times smaller the error is than with the defaults, averaged over the problems."""
    preset = {"preset": "accurate", "guidance_scale": guidance}
    logs = [math.log(p.error(cls(**p.config), steps) / p.error(cls(**p.config, **preset), steps)) for p in chosen]
    return math.exp(sum(logs) / len(logs))


@every_class
@pytest.mark.parametrize("kind", MODELS)
def test_every_cell_was_measured_and_compiles(cls: type[PlanScheduler], kind: str) -> None:
    columns = TABLE[kind][cls.__name__]
    assert [float(scale) for scale in columns] == list(GUIDANCE)
    for guidance, cells in columns.items():
        assert [int(steps) for steps in cells] == list(STEPS)
        for steps, cell in cells.items():
            assert cell["error"] <= cell["default"]
            scheduler = cls(**MODELS[kind][0], preset="accurate", guidance_scale=float(guidance))
            scheduler.set_timesteps(int(steps))
            assert len(scheduler.plan) == int(steps)
            # The same as with the options by hand.
            by_hand = cls(**MODELS[kind][0], **preset_options(cls.__name__, kind, int(steps), float(guidance)))
            by_hand.set_timesteps(int(steps))
            assert by_hand.plan == scheduler.plan


@every_class
def test_the_nearest_measurement_decides(cls: type[PlanScheduler]) -> None:
    def options(steps: int, guidance: float | None) -> dict[str, Any]:
        return preset_options(cls.__name__, "vp", steps, guidance)

    assert options(1, 1.0) == options(4, 1.0)
    assert options(1000, 7.5) == options(50, 7.5)
    assert options(17, 3.0) in (options(15, 3.0), options(20, 3.0))
    # Without a word about guidance the cautious column; without guidance, or with less than none, the first one.
    assert options(10, None) == options(10, 7.5) == options(10, 30.0)
    assert options(10, 0.0) == options(10, 1.0)


def test_a_preset_that_does_not_exist_or_was_not_measured_is_refused() -> None:
    class OtherScheduler(DPMSolverPPScheduler):
        pass

    with pytest.raises(ValueError, match="accurate"):
        UniPCScheduler(preset="fast")
    with pytest.raises(ValueError, match="OtherScheduler"):
        OtherScheduler(preset="accurate")
    with pytest.raises(ValueError, match="multistep"):
        DPMSolverPPScheduler(preset="accurate", method="singlestep")


@every_class
@pytest.mark.parametrize("steps", [15, 20, 30])
def test_unguided_errors_shrink_on_other_mixtures(cls: type[PlanScheduler], steps: int) -> None:
    assert gain(cls, problems("vp", 1.0), 1.0, steps) > 1.5


@every_class
@pytest.mark.parametrize("steps", [25, 30])
def test_guided_errors_shrink_on_other_mixtures(cls: type[PlanScheduler], steps: int) -> None:
    assert gain(cls, problems("vp", 7.5), 7.5, steps) > 1.5


@every_class
@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_few_steps_do_not_suffer_on_a_trained_model(cls: type[PlanScheduler], guidance: float) -> None:
    """Choices that fit mixtures alone broke digits (0.36 here): high order down to the last step."""
    problem = [digits(NOISE, guidance, 8)]
    assert min(gain(cls, problem, guidance, steps) for steps in (4, 5, 8)) > 0.75
