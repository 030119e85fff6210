"""The search for solver schedules: what it finds, its budget, and that a killed one goes on as if nothing had been."""

from __future__ import annotations

import dataclasses
import json
import math
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from analytic import STABLE_DIFFUSION, sample
from fewstep.metrics import GaussianMixture
from fewstep.samplers import DPMSolverPPScheduler, SearchedScheduler, fine_trajectory
from fewstep.samplers.trajectory import Network
from fewstep.samplers.usf.archive import SearchArchive
from fewstep.samplers.usf.decisions import SolverSchedule
from fewstep.samplers.usf.evolution import (
    Fitness,
    ScheduleSearch,
    SearchSettings,
    initial_schedules,
    search_schedule,
    trajectory_fitness,
)
from fewstep.samplers.usf.known import KNOWN_SOLVERS, known_schedule
from fewstep.samplers.usf.mutation import MutationSettings, SearchSpace
from fewstep.samplers.usf.ranking import RankingSettings

RANKING = RankingSettings(
    time_embedding=(16, 8), order_embedding=4, decision_hidden=8, hidden=16, head=(16,), epochs=10
)
QUICK = SearchSettings(rounds=2, evaluations=6, generations=2, children=10, refinement=15, finalists=3, ranking=RANKING)
DATA = GaussianMixture.random(4, 6, seed=3)


def scheduler_of(calls: int, **options: Any) -> DPMSolverPPScheduler:
    scheduler = DPMSolverPPScheduler(**{**STABLE_DIFFUSION, "fractional_timesteps": True, **options})
    scheduler.set_timesteps(calls)
    return scheduler


def network_of(scheduler: DPMSolverPPScheduler) -> Network:
    def network(x: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        alpha, sigma = scheduler.schedule.alpha_sigma(scheduler.schedule.level(float(timestep)))
        return DATA.predict(x, float(alpha), float(sigma), scheduler.config.prediction_type)

    return network


def fitness_of(scheduler: DPMSolverPPScheduler, seed: int, count: int = 24) -> Fitness:
    noise = torch.randn(count, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    network = network_of(scheduler)
    return trajectory_fitness(network, noise, fine_trajectory(scheduler, network, noise, steps=200))


def search(archive: Path | None = None, fitness: Fitness | None = None, **changes: Any) -> ScheduleSearch:
    scheduler = scheduler_of(4)
    fitness = fitness or fitness_of(scheduler, 0)
    settings = {key: changes.pop(key) for key in list(changes) if key in vars(QUICK)}
    return search_schedule(
        scheduler, fitness, settings=dataclasses.replace(QUICK, **settings), archive=archive, **changes
    )


def test_the_fitness_is_the_mean_of_the_samples_errors():
    scheduler = scheduler_of(5)
    network = network_of(scheduler)
    noise = torch.randn(3, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    truth = fine_trajectory(scheduler, network, noise, steps=100)
    for afs, calls in (("none", 5), ("zero_x0", 4)):
        schedule = dataclasses.replace(known_schedule("unipc", scheduler._grid), afs=afs)
        searched = SearchedScheduler.from_config(scheduler.config, decisions=schedule)
        searched.set_timesteps(calls)
        found = trajectory_fitness(network, noise, truth)(searched)
        x = noise
        for t in searched.timesteps:
            x = searched.step(network(searched.scale_model_input(x, t), t), t, x, return_dict=False)[0]
        expected = sum(float((a - b).square().mean().sqrt()) for a, b in zip(x, truth.samples[-1], strict=True)) / 3
        assert found == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("calls", [1, 4, 10])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"final_sigmas_type": "sigma_min"},
        {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 3.0},
        {"sigma_data": 0.5, "sigma_min": 0.002, "sigma_max": 80.0},
    ],
)
def test_it_begins_with_the_known_solvers(options, calls):
    scheduler = scheduler_of(calls, **options)
    grid, last = scheduler._grid, float(scheduler._grid.levels[-1])
    low = scheduler.schedule.min_level
    ends = (0.1 * low, low) if last == 0.0 else (last, last)
    space = SearchSpace(scheduler.schedule, calls, ends, last == 0.0, True)
    schedules = initial_schedules(grid, space)
    assert all(schedule.calls == calls for schedule in schedules)
    assert all(schedule.levels[0] == grid.levels[0] for schedule in schedules)
    for solver in KNOWN_SOLVERS:
        assert known_schedule(solver, grid) in schedules
    plain = [schedule for schedule in schedules if schedule.afs == "none"]
    spacings = {schedule.levels for schedule in plain}
    assert len(spacings) == (1 + 3 * (2 if last == 0.0 else 1) if calls > 1 else len(spacings))
    assert any(schedule.afs == "zero_x0" and len(schedule.steps) == calls + 1 for schedule in schedules)
    for schedule in schedules:
        SearchedScheduler.from_config(scheduler.config, decisions=schedule).set_timesteps(calls)


def test_it_finds_better_schedules_also_for_noises_that_it_never_saw():
    """Against the best known solver on the same noises, of all that it began with."""
    scheduler = scheduler_of(5)
    held_out = fitness_of(scheduler, 99, 200)
    settings = SearchSettings(rounds=3, evaluations=16, refinement=300, ranking=RANKING)
    found = search_schedule(scheduler, fitness_of(scheduler, 0, 100), settings=settings)
    known = [entry.schedule for entry in found.evaluations if entry.stage == "initial"]

    def error(schedule: SolverSchedule) -> float:
        searched = SearchedScheduler.from_config(scheduler.config, decisions=schedule)
        searched.set_timesteps(5)
        return held_out(searched)

    assert found.fitness < 0.75 * found.known
    assert error(found.schedule) < 0.75 * min(error(schedule) for schedule in known)


@pytest.mark.parametrize("kind", ["vp", "flow", "edm"])
def test_every_evaluated_schedule_keeps_the_budget(kind):
    """Analytic steps and implicit correctors count."""
    options = {
        "vp": {},
        "flow": {"use_flow_sigmas": True, "prediction_type": "flow_prediction"},
        "edm": {"sigma_data": 0.5, "sigma_min": 0.002, "sigma_max": 80.0},
    }[kind]
    scheduler = scheduler_of(5, **options)
    mutation = MutationSettings(corrections=(0.3, 0.3, 0.4), start=0.2, correction=0.5)
    calls = []

    def fitness(searched: SearchedScheduler) -> float:
        calls.append(len(searched.timesteps))
        plan = searched.plan
        return 1.0 + plan.amplification % 0.1 + 0.01 * plan.slots

    settings = dataclasses.replace(QUICK, evaluations=30, refinement=10, mutation=mutation)
    found = search_schedule(scheduler, fitness, settings=settings)
    schedules = [entry.schedule for entry in found.evaluations]
    assert set(calls) == {5}
    assert any(step.correction and step.correction.implicit for schedule in schedules for step in schedule.steps)
    lengths = {len(schedule.steps) for schedule in schedules}
    assert min(lengths) < 5
    assert (max(lengths) > 5) == (kind != "flow")
    assert {schedule.levels[-1] == 0.0 for schedule in schedules} == {True, False}


def test_the_same_seed_finds_the_same_and_others_search_elsewhere():
    first, again, other = search(seed=3), search(seed=3), search(seed=4)
    assert first == again
    assert [entry.schedule for entry in other.evaluations] != [entry.schedule for entry in first.evaluations]


PROGRAM = """
import os, signal, sys
from pathlib import Path
sys.path[:0] = [sys.argv[1], sys.argv[1] + "/samplers"]
from test_evolution import fitness_of, scheduler_of, search
import torch
torch.set_num_threads(1)
inner, count = fitness_of(scheduler_of(4), 0), 0
def fitness(scheduler):
    global count
    count += 1
    if count > int(sys.argv[3]):
        os.kill(os.getpid(), signal.SIGKILL)
    return inner(scheduler)
search(Path(sys.argv[2]), fitness, seed=5)
"""


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[ScheduleSearch, bytes]:
    """A search that nothing interrupted, and its archive."""
    path = tmp_path_factory.mktemp("whole") / "archive.jsonl"
    return search(path, seed=5), path.read_bytes()


@pytest.mark.parametrize(("stage", "number"), [("evolution", 2), ("refinement", 0)])
def test_a_killed_search_goes_on_to_the_same_result(stage, number, whole, tmp_path):
    """Killed in the middle of the second round, or of the refinement."""
    expected, content = whole
    places = [k for k, entry in enumerate(expected.evaluations) if (entry.stage, entry.round) == (stage, number)]
    alive = places[len(places) // 2]
    tests = str(Path(__file__).parents[1])
    path = tmp_path / "killed.jsonl"
    command = [sys.executable, "-c", PROGRAM, tests, str(path), str(alive)]
    killed = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert path.read_bytes() == b"".join(content.splitlines(keepends=True)[: 1 + alive])
    evaluated = 0
    inner = fitness_of(scheduler_of(4), 0)

    def fitness(scheduler: SearchedScheduler) -> float:
        nonlocal evaluated
        evaluated += 1
        return inner(scheduler)

    assert search(path, fitness, seed=5) == expected
    assert evaluated == len(expected.evaluations) - alive
    assert path.read_bytes() == content
    # A finished search is only read again.
    assert search(path, fitness, seed=5) == expected
    assert evaluated == len(expected.evaluations) - alive


def test_a_last_line_that_was_cut_off_is_evaluated_again(tmp_path):
    path = tmp_path / "archive.jsonl"
    whole = search(path)
    content = path.read_bytes()
    for lost in (1, 40, len(content.splitlines()[-1])):
        path.write_bytes(content[:-lost])
        assert search(path) == whole
        assert path.read_bytes() == content
    path.write_bytes(content[:20])
    assert search(path) == whole


def test_other_files_are_refused_and_left_alone(tmp_path):
    path = tmp_path / "archive.jsonl"
    search(path)
    lines = path.read_text().splitlines(keepends=True)
    with pytest.raises(ValueError, match="is of a search with seed 0, not 1; go on with the same one"):
        search(path, seed=1)
    with pytest.raises(ValueError, match="is of a search with rounds 2, not 3"):
        search(path, rounds=3)
    for damaged, message in (
        ([*lines[:3], lines[3][:50] + "\n", *lines[4:]], "damaged in line 4"),
        ([*lines[:3], '{"stage": "initial"}\n', *lines[4:]], "damaged in line 4"),
        (["a,b\n", "1,2\n"], "damaged in line 1"),
        (['{"a": 1}\n'], r"is no fewstep\.usf_archive"),
        (["notes without an end"], r"is no fewstep\.usf_archive"),
    ):
        text = "".join(damaged)
        path.write_text(text)
        with pytest.raises(ValueError, match=message):
            search(path)
        assert path.read_text() == text


def test_every_evaluation_is_kept_as_json(tmp_path):
    path = tmp_path / "archive.jsonl"
    seen: list[tuple[str, int, float]] = []
    found = search(path, progress=lambda *news: seen.append(news))
    header, *lines = [json.loads(line, parse_constant=pytest.fail) for line in path.read_text().splitlines()]
    assert header["search"]["calls"] == 4
    assert len(lines) == len(found.evaluations) == len(seen)
    assert [SolverSchedule.from_dict(line["schedule"]) for line in lines] == [e.schedule for e in found.evaluations]
    assert [line["fitness"] for line in lines] == [entry.fitness for entry in found.evaluations]
    assert [stage for stage, _, _ in seen] == [line["stage"] for line in lines]
    assert [count for _, count, _ in seen] == list(range(1, len(seen) + 1))
    bests = [best for _, _, best in seen]
    assert bests == sorted(bests, reverse=True)
    assert bests[-1] == found.fitness == min(entry.fitness for entry in found.evaluations)
    stages = [entry.stage for entry in found.evaluations]
    assert stages.count("refinement") <= QUICK.refinement
    assert stages.count("evolution") <= QUICK.rounds * QUICK.evaluations
    assert list(dict.fromkeys(stages)) == ["initial", "evolution", "refinement"]


def test_what_is_not_finite_is_the_worst(tmp_path):
    path = tmp_path / "archive.jsonl"
    inner = fitness_of(scheduler_of(4), 0)

    def fitness(scheduler: SearchedScheduler) -> float:
        return math.nan if any(step.order > 1 for step in scheduler.solver_schedule.steps) else inner(scheduler)

    found = search(path, fitness, refinement=0)
    assert math.isfinite(found.fitness)
    assert any(math.isinf(entry.fitness) for entry in found.evaluations)
    assert search(path, fitness, refinement=0) == found
    with pytest.raises(ValueError, match="fitness is finite for none of the known solvers"):
        search(None, lambda scheduler: math.inf)


def test_it_ends_where_nothing_improves():
    found = search(None, lambda scheduler: 1.0, rounds=9, patience=2, refinement=0)
    assert max(entry.round for entry in found.evaluations) == 2


def test_the_second_fitness_chooses_among_the_finalists(tmp_path):
    path = tmp_path / "archive.jsonl"
    first = search()
    ranked = sorted(first.evaluations, key=lambda entry: entry.fitness)
    asked = []

    def second(scheduler: SearchedScheduler) -> float:
        asked.append(scheduler.solver_schedule)
        return 5.0 - len(asked)

    found = search(path, final_fitness=second)
    assert asked == [entry.schedule for entry in ranked[:3]]
    assert found.schedule == asked[2]
    assert found.fitness == 2.0
    assert [entry.stage for entry in found.evaluations[-3:]] == ["final"] * 3
    assert search(path, final_fitness=second) == found
    assert len(asked) == 3


def test_archives_without_a_file_remember():
    archive = SearchArchive(None, {})
    schedule = known_schedule("ddim", scheduler_of(3)._grid)
    assert archive.get(schedule) is None
    assert archive.evaluations == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"evaluations": 0}, "evaluations 0 must be at least 1"),
        ({"rounds": -1}, "rounds -1 must be at least 0, which leaves this stage out"),
        ({"refinement": -5}, "refinement -5 must be at least 0"),
        ({"unscreened": 1.5}, "unscreened 1.5 must be a share"),
    ],
)
def test_impossible_budgets_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        SearchSettings(**changes)


def test_a_scheduler_without_times_is_refused():
    with pytest.raises(ValueError, match="call its set_timesteps first"):
        search_schedule(DPMSolverPPScheduler(), lambda scheduler: 1.0)


def test_what_was_found_runs_in_a_plain_loop():
    found = search()
    scheduler = scheduler_of(4)
    searched = SearchedScheduler.from_config(scheduler.config, decisions=found.schedule)
    searched.set_timesteps(4)
    x = torch.randn(5, 6, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    if found.schedule.afs == "none":
        assert sample(searched, x, DATA.clean).isfinite().all()
    assert len(searched.timesteps) == 4
