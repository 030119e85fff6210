"""Every combination of options gives a finite, exact or near result, or is refused: nothing returns NaN.

The model is one Gaussian, N(0.7, 0.5^2). Its denoiser is affine in the sample, so a run is too: feeding it the mean,
one standard deviation and one unit of noise a step gives the exact mean and standard deviation of what it samples.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch

from analytic import EDM, FLOW, STABLE_DIFFUSION, ZERO_SNR
from fewstep.samplers import DEISScheduler, DPMSolverPPScheduler, PlanScheduler, UniPCScheduler

MEAN, STD = 0.7, 0.5
STEPS = (1, 2, 3, 20)
MODELS: dict[str, dict[str, Any]] = {
    "vp": STABLE_DIFFUSION,
    "zero_snr": {key: value for key, value in ZERO_SNR.items() if key != "timestep_spacing"},
    "flow": FLOW,
    "edm": EDM,
}
RESPACED = {name: {f"use_{name}": True} for name in ("karras_sigmas", "exponential_sigmas", "beta_sigmas", "lu_lambdas")}
UNIFORM = {name: {"timestep_spacing": name} for name in ("linspace", "leading", "trailing")}
SPACINGS: dict[str, dict[str, dict[str, Any]]] = {
    "vp": {**UNIFORM, **RESPACED},
    "zero_snr": {**UNIFORM, **RESPACED},
    "flow": {"default": {}, **RESPACED},
    "edm": {"karras": {}, "exponential": {"sigma_schedule": "exponential"}},
}
Options = dict[str, Any]


def solvers() -> Iterator[tuple[str, type[PlanScheduler], Options]]:
    """Every form of the three families, with the kind of its weights."""
    algorithms = ("dpmsolver++", "sde-dpmsolver++", "dpmsolver", "sde-dpmsolver")
    for order, form, algorithm, method in product(
        (1, 2, 3), ("midpoint", "heun"), algorithms, ("multistep", "singlestep")
    ):
        kind = {"dpmsolver++": "steady", "sde-dpmsolver++": "steady", "sde-dpmsolver": "noise sde"}.get(
            algorithm, "steady" if method == "multistep" else "noise stages"
        )
        options = {"solver_order": order, "solver_type": form, "algorithm_type": algorithm, "method": method}
        yield kind, DPMSolverPPScheduler, options
    for order, form in product((1, 2, 3, 4), ("logrho", "tab", "rhoab", "ipndm")):
        yield "steady", DEISScheduler, {"solver_order": order, "solver_type": form}
    for order in (2, 3, 4):
        yield "noise stages", DEISScheduler, {"solver_order": order, "solver_type": "rhork"}
    for order, form, data in product((1, 2, 3, 4), ("bh1", "bh2"), (True, False)):
        options = {"solver_order": order, "solver_type": form, "predict_x0": data}
        yield "steady" if data else "noise stages", UniPCScheduler, options


def std_at(alpha: float, sigma: float) -> float:
    return math.hypot(alpha * STD, sigma)


def sampled(scheduler: PlanScheduler, steps: int) -> tuple[float, float]:
    """Errors of the sampled mean and, relative, of the sampled standard deviation; started at the exact ones."""
    scheduler.set_timesteps(steps)
    plan = scheduler.plan
    first = plan.calls[0]
    x = torch.full((2 + len(plan), 1), first.alpha * MEAN, dtype=torch.float64)
    x[1] += std_at(first.alpha, first.sigma)
    for k, call in enumerate(plan):
        gain = call.alpha * STD**2 / std_at(call.alpha, call.sigma) ** 2
        clean = MEAN + gain * (x - call.alpha * MEAN)
        p, q = call.clean
        noise = torch.zeros_like(x)
        noise[2 + k] = 1.0
        x = scheduler.step((clean - p * x) / q, scheduler.timesteps[k], x, variance_noise=noise, return_dict=False)[0]
    mean = float(x[0])
    std = float((x[1:] - x[0]).square().sum().sqrt())
    return mean - plan.final_alpha * MEAN, std / std_at(plan.final_alpha, plan.final_sigma) - 1.0


@functools.cache
def first_order(model: str, spacing: str, final: str, stochastic: bool, steps: int) -> float:
    algorithm = "sde-dpmsolver++" if stochastic else "dpmsolver++"
    options = {**MODELS[model], **SPACINGS[model][spacing], "final_sigmas_type": final}
    return abs(sampled(DPMSolverPPScheduler(**options, solver_order=1, algorithm_type=algorithm), steps)[1])


@pytest.mark.parametrize("final", ["zero", "sigma_min"])
@pytest.mark.parametrize(("model", "spacing"), [(model, spacing) for model in MODELS for spacing in SPACINGS[model]])
def test_sweep(model, spacing, final):
    """About 28,000 runs in all."""
    problems = []
    runs = 0
    for (kind, scheduler_class, own), lower in product(solvers(), (True, False)):
        options = {**MODELS[model], **SPACINGS[model][spacing], "final_sigmas_type": final, "lower_order_final": lower}
        try:
            scheduler = scheduler_class(**options, **own)
        except ValueError:
            continue
        for steps in STEPS:
            case = f"{scheduler_class.__name__} {own} lower_order_final={lower} {steps} steps"
            try:
                mean, std = sampled(scheduler, steps)
            except ValueError:
                continue
            runs += 1
            if not (math.isfinite(mean) and math.isfinite(std)):
                problems.append(f"{case}: not finite")
                continue
            # The mean follows a straight line: exact for every method.
            if abs(mean) > 1e-8:
                problems.append(f"{case}: mean off by {mean:.2g}")
            if kind != "steady":
                continue  # see test_noise_forms
            # Extrapolation multiplies what the first order gets wrong by the plan's amplification at most.
            stochastic = scheduler.plan.is_stochastic or "sde" in str(own)
            allowed = first_order(model, spacing, final, stochastic, steps) + 0.2 * max(
                1.0, scheduler.plan.amplification
            )
            if abs(std) > allowed:
                problems.append(f"{case}: standard deviation off by {std:.3g}, allowed {allowed:.3g}")
            if steps == 1 and abs(abs(std) - first_order(model, spacing, final, stochastic, 1)) > 1e-3:
                problems.append(f"{case}: one step is not the first order: {std:.3g}")
    assert runs > 600, f"most combinations are refused: {runs} runs"
    assert not problems, f"{len(problems)} of {runs}:\n" + "\n".join(problems[:10])


def with_short_end(scheduler_class: type[PlanScheduler], final: str) -> Options:
    """Down to sigma_min the last step is long: DPM-Solver has an option for that."""
    return {"euler_at_final": True} if scheduler_class is DPMSolverPPScheduler and final == "sigma_min" else {}


@pytest.mark.parametrize("final", ["zero", "sigma_min"])
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("kind", ["steady", "noise stages", "noise sde"])
def test_usual_runs_are_no_worse_than_the_first_order(kind, model, final):
    """20 and 50 steps of the spacings that pipelines use."""
    usual = {"vp": ["linspace", "leading", "trailing", "karras_sigmas"], "zero_snr": ["trailing"]}
    usual.update({"flow": ["default"], "edm": ["karras"]})
    problems = []
    for spacing, steps in product(usual[model], (20, 50)):
        for own_kind, scheduler_class, own in solvers():
            if own_kind != kind:
                continue
            options = {**MODELS[model], **SPACINGS[model][spacing], "final_sigmas_type": final}
            try:
                scheduler = scheduler_class(**options, **own, **with_short_end(scheduler_class, final))
                _, std = sampled(scheduler, steps)
            except ValueError:
                continue
            # Singlestep SDEs draw fresh noise in every stage.
            restarted = "sde" in str(own) and own["method"] == "singlestep"
            allowed = first_order(model, spacing, final, "sde" in str(own), steps) + (0.1 if restarted else 0.06)
            if abs(std) > allowed:
                problems.append(
                    f"{scheduler_class.__name__} {own} {spacing} {steps} steps: standard deviation off by {std:.3g}, "
                    f"allowed {allowed:.3g}"
                )
    assert not problems, f"{len(problems)}:\n" + "\n".join(problems[:40])


@pytest.mark.parametrize("model", ["zero_snr", "flow"])
def test_noise_stages_at_the_noisy_end(model):
    """Stages and correctors of the noise form amplify by the length of a step: from sigma / alpha in the thousands."""
    problems = []
    for spacing, (kind, scheduler_class, own) in product(("karras_sigmas", "exponential_sigmas", "lu_lambdas"), solvers()):
        if kind != "noise stages":
            continue
        try:
            scheduler = scheduler_class(**MODELS[model], **SPACINGS[model][spacing], final_sigmas_type="zero", **own)
            _, std = sampled(scheduler, 20)
        except ValueError:
            continue
        allowed = first_order(model, spacing, "zero", False, 20) + 0.15
        if abs(std) > allowed:
            problems.append(f"{own} {spacing}: standard deviation off by {std:.3g}, allowed {allowed:.3g}")
    assert not problems, f"{len(problems)}:\n" + "\n".join(problems[:40])


@pytest.mark.parametrize("algorithm", ["dpmsolver++", "sde-dpmsolver++"])
def test_euler_at_final_helps_where_the_last_step_is_long(algorithm):
    options = {**STABLE_DIFFUSION, "final_sigmas_type": "sigma_min", "solver_order": 3, "algorithm_type": algorithm}
    errors = [abs(sampled(DPMSolverPPScheduler(**options, euler_at_final=euler), 20)[1]) for euler in (False, True)]
    assert errors[1] < 0.25
    assert errors[1] < errors[0]


@pytest.mark.parametrize("model", ["vp", "edm"])
def test_noise_forms_with_short_steps(model):
    """Methods that evaluate the noise prediction within a step are right where no step exceeds 1 in half log-SNR."""
    problems = []
    checked = 0
    for kind, scheduler_class, own in solvers():
        if kind == "steady":
            continue
        options = {**MODELS[model], "final_sigmas_type": "sigma_min"}
        spacing = {"use_lu_lambdas": True} if model == "vp" else {"sigma_schedule": "exponential"}
        try:
            scheduler = scheduler_class(**options, **spacing, **own)
            _, std = sampled(scheduler, 40)
        except ValueError:
            continue
        checked += 1
        lambdas = np.array([-math.log(call.level) for call in scheduler.plan])
        assert np.diff(lambdas).max() < 1.0
        if not abs(std) < 0.1:
            problems.append(f"{scheduler_class.__name__} {own}: standard deviation off by {std:.3g}")
    assert checked > 15
    assert not problems, "\n".join(problems)


def test_euler_at_final_is_first_order_at_the_end():
    """In every method of DPM-Solver: the last step reads one prediction."""
    for order, method in product((2, 3), ("multistep", "singlestep")):
        options = {**STABLE_DIFFUSION, "final_sigmas_type": "sigma_min", "solver_order": order, "method": method}
        try:
            scheduler = DPMSolverPPScheduler(**options, euler_at_final=True, lower_order_final=False)
        except ValueError:
            continue
        scheduler.set_timesteps(6 * order)
        last = scheduler.plan.calls[-1]
        assert [slot for row in last.rows for slot, _ in row.terms] == ["sample", "prediction"], (order, method)


def test_image_to_image_starts():
    """Every start inside the grid, of every form: exact mean, and no worse than the first order from there."""
    problems = []
    for (kind, scheduler_class, own), begin in product(solvers(), (1, 2, 7, 12, 17, 19)):
        if own["solver_type"] == "rhork":
            begin *= own["solver_order"]
        scheduler = scheduler_class(**STABLE_DIFFUSION, final_sigmas_type="sigma_min", **own)
        scheduler.set_timesteps(20)
        if begin >= len(scheduler.timesteps):
            continue
        scheduler.set_begin_index(begin)
        plan = scheduler.plan
        first = plan.calls[0]
        assert first.level == pytest.approx(float(scheduler.sigmas[begin]))
        x = torch.tensor(
            [[first.alpha * MEAN], [first.alpha * MEAN + std_at(first.alpha, first.sigma)]], dtype=torch.float64
        )
        for k, call in enumerate(plan):
            gain = call.alpha * STD**2 / std_at(call.alpha, call.sigma) ** 2
            p, q = call.clean
            clean = MEAN + gain * (x - call.alpha * MEAN)
            zero = torch.zeros_like(x)
            x = scheduler.step(
                (clean - p * x) / q, scheduler.timesteps[begin + k], x, variance_noise=zero, return_dict=False
            )[0]
        if abs(float(x[0]) - plan.final_alpha * MEAN) > 1e-9:
            problems.append(f"{own} from {begin}: mean {float(x[0])}")
        std = abs(float(x[1] - x[0]))
        if kind == "steady" and not plan.is_stochastic and not 0.2 < std / STD < 1.8:
            problems.append(f"{own} from {begin}: standard deviation {std}")
    assert not problems, problems[:10]


@pytest.mark.parametrize(
    ("scheduler_class", "options", "words"),
    [
        (DPMSolverPPScheduler, {"solver_order": 4}, ["solver_order", "4"]),
        (DPMSolverPPScheduler, {"solver_order": 0}, ["solver_order", "0"]),
        (DPMSolverPPScheduler, {"algorithm_type": "euler"}, ["algorithm_type", "euler", "dpmsolver++"]),
        (DPMSolverPPScheduler, {"solver_type": "rk"}, ["solver_type", "rk", "midpoint"]),
        (DPMSolverPPScheduler, {"method": "adaptive"}, ["method", "adaptive", "multistep"]),
        (DPMSolverPPScheduler, {"denoise_to_zero": True}, ["denoise_to_zero", "sigma_min"]),
        (DPMSolverPPScheduler, {"final_sigmas_type": "one"}, ["final_sigmas_type", "one", "zero"]),
        (DPMSolverPPScheduler, {"timestep_spacing": "log"}, ["timestep_spacing", "log", "trailing"]),
        (DPMSolverPPScheduler, {"prediction_type": "score"}, ["prediction_type", "score", "epsilon"]),
        (DPMSolverPPScheduler, {"use_karras_sigmas": True, "use_beta_sigmas": True}, ["karras", "beta", "False"]),
        (DPMSolverPPScheduler, {"use_lu_lambdas": True, "use_beta_sigmas": True}, ["lu", "beta", "False"]),
        (DPMSolverPPScheduler, {"beta_schedule": "cubic"}, ["beta_schedule", "cubic", "linear"]),
        (DPMSolverPPScheduler, {"trained_betas": [0.1, 0.2]}, ["trained_betas", "2", "1000"]),
        (DPMSolverPPScheduler, {"thresholding": True, "sample_max_value": 0.5}, ["sample_max_value", "0.5", "1"]),
        (
            DPMSolverPPScheduler,
            {"thresholding": True, "dynamic_thresholding_ratio": 1.5},
            ["dynamic_thresholding_ratio", "1.5"],
        ),
        (DPMSolverPPScheduler, {**EDM, "prediction_type": "sample"}, ["prediction_type", "sample", "EDM"]),
        (DPMSolverPPScheduler, {"sigma_data": -1.0}, ["sigma_data", "-1"]),
        (DPMSolverPPScheduler, {**EDM, "sigma_schedule": "lu"}, ["sigma_schedule", "lu", "karras"]),
        (DPMSolverPPScheduler, {"preset": "best"}, ["preset", "best", "accurate"]),
        (DEISScheduler, {"solver_order": 5}, ["solver_order", "5"]),
        (DEISScheduler, {"solver_order": 1, "solver_type": "rhork"}, ["solver_order", "1", "rhork", "2"]),
        (DEISScheduler, {"solver_type": "spline"}, ["solver_type", "spline", "tab"]),
        (DEISScheduler, {"algorithm_type": "sde-dpmsolver++"}, ["algorithm_type", "sde-dpmsolver++", "deis"]),
        (UniPCScheduler, {"solver_order": 5}, ["solver_order", "5"]),
        (UniPCScheduler, {"solver_type": "bh3"}, ["solver_type", "bh3", "bh1"]),
        (UniPCScheduler, {"corrector_form": "both"}, ["corrector_form", "both", "delta"]),
        (UniPCScheduler, {"solver_p": "heun"}, ["solver_p", "heun", "dpm++"]),
        (UniPCScheduler, {"solver_p": "dpm++2s"}, ["solver_p", "dpm++2s", "dpm++"]),
        (UniPCScheduler, {"solver_p": "sde-dpm++"}, ["solver_p", "sde-dpm++", "dpm++"]),
    ],
)
def test_impossible_options_are_refused_at_construction(scheduler_class, options, words):
    with pytest.raises(ValueError, match=r".+") as caught:
        scheduler_class(**options)
    for word in words:
        assert word in str(caught.value), f"{word!r} is not named in: {caught.value}"


@pytest.mark.parametrize("scheduler_class", [DPMSolverPPScheduler, DEISScheduler, UniPCScheduler])
def test_foreign_values_are_mapped(scheduler_class):
    for form in ("midpoint", "heun", "logrho", "bh1", "bh2"):
        scheduler_class(solver_type=form).set_timesteps(3)
    if scheduler_class is not UniPCScheduler:
        for algorithm in ("dpmsolver", "dpmsolver++", "deis", "data_prediction", "noise_prediction"):
            scheduler_class(algorithm_type=algorithm).set_timesteps(3)
