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
from fewstep.samplers import SAMPLERS, DEISScheduler, DPMSolverPPScheduler, PlanScheduler, UniPCScheduler

MEAN, STD = 0.7, 0.5
STEPS = (1, 2, 3, 20)
MODELS: dict[str, dict[str, Any]] = {
    "vp": STABLE_DIFFUSION,
    "zero_snr": {key: value for key, value in ZERO_SNR.items() if key != "timestep_spacing"},
    "flow": FLOW,
    "edm": EDM,
}
RESPACED = {
    name: {f"use_{name}": True} for name in ("karras_sigmas", "exponential_sigmas", "beta_sigmas", "lu_lambdas")
}
UNIFORM = {name: {"timestep_spacing": name} for name in ("linspace", "leading", "trailing")}
SPACINGS: dict[str, dict[str, dict[str, Any]]] = {
    "vp": {**UNIFORM, **RESPACED},
    "zero_snr": {**UNIFORM, **RESPACED},
    "flow": {"default": {}, **RESPACED},
    "edm": {"karras": {}, "exponential": {"sigma_schedule": "exponential"}},
}
Options = dict[str, Any]


def solvers() -> Iterator[tuple[str, type[PlanScheduler], Options]]:
    """Every form of the three families, with the kind of its weights.

    ``steady`` weights stay bounded whatever the step; stages, correctors and SDEs of the noise form multiply
    errors by the ratio of sigma / alpha over a step, and need short steps at the noisy end.
    """
    algorithms = ("dpmsolver++", "sde-dpmsolver++", "dpmsolver", "sde-dpmsolver")
    for order, form, algorithm, method in product(
        (1, 2, 3), ("midpoint", "heun"), algorithms, ("multistep", "singlestep")
    ):
        if (algorithm, method) == ("sde-dpmsolver", "singlestep"):
            continue  # refused, see test_impossible_options_are_refused_at_construction
        noise_form = algorithm == "sde-dpmsolver" or (algorithm, method) == ("dpmsolver", "singlestep")
        options = {"solver_order": order, "solver_type": form, "algorithm_type": algorithm, "method": method}
        yield "noise form" if noise_form else "steady", DPMSolverPPScheduler, options
    for order, form in product((1, 2, 3, 4), ("logrho", "tab", "rhoab", "ipndm")):
        yield "steady", DEISScheduler, {"solver_order": order, "solver_type": form}
    for order in (2, 3, 4):
        yield "noise form", DEISScheduler, {"solver_order": order, "solver_type": "rhork"}
    for order, form, data in product((1, 2, 3, 4), ("bh1", "bh2"), (True, False)):
        options = {"solver_order": order, "solver_type": form, "predict_x0": data}
        yield "steady" if data else "noise form", UniPCScheduler, options


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


SWEEP = [(model, spacing, final) for model in MODELS for spacing in SPACINGS[model] for final in ("zero", "sigma_min")]


@pytest.mark.parametrize(("model", "spacing", "final"), SWEEP)
def test_sweep(model, spacing, final):
    """About 26,000 runs in all, none of them refused."""
    problems = []
    for (kind, scheduler_class, own), lower in product(solvers(), (True, False)):
        options = {**MODELS[model], **SPACINGS[model][spacing], "final_sigmas_type": final, "lower_order_final": lower}
        scheduler = scheduler_class(**options, **own)
        for steps in STEPS:
            mean, std = sampled(scheduler, steps)
            case = f"{scheduler_class.__name__} {own} lower_order_final={lower} {steps} steps"
            if not (math.isfinite(mean) and math.isfinite(std)):
                problems.append(f"{case}: not finite")
                continue
            # The mean follows a straight line: exact for every method.
            if abs(mean) > 1e-8:
                problems.append(f"{case}: mean off by {mean:.2g}")
            if kind != "steady":
                continue  # see test_runs_converge
            # Extrapolation multiplies what the first order gets wrong by the plan's amplification at most.
            first = first_order(model, spacing, final, "sde" in str(own), steps)
            allowed = first + 0.2 * max(1.0, scheduler.plan.amplification)
            if abs(std) > allowed:
                problems.append(f"{case}: standard deviation off by {std:.3g}, allowed {allowed:.3g}")
            if steps == 1 and abs(abs(std) - first) > 1e-3:
                problems.append(f"{case}: one step is not the first order: {std:.3g}")
    assert not problems, f"{len(problems)}:\n" + "\n".join(problems[:10])


@pytest.mark.parametrize(
    ("model", "spacing", "final"),
    # Quantiles between sigma / alpha = 0.03 and 4096 leave the image to a few steps at any number. The respacings have
    # the same levels with both endings, up to one.
    [
        (model, spacing, final)
        for model, spacing, final in SWEEP
        if (model, spacing) != ("zero_snr", "beta_sigmas") and (final == "zero" or spacing in (*UNIFORM, "default"))
    ],
)
def test_runs_converge(model, spacing, final):
    """Four times the steps: as near to the truth as the first order on the same levels, or half as far from it."""
    problems = []
    for _, scheduler_class, own in solvers():
        scheduler = scheduler_class(**MODELS[model], **SPACINGS[model][spacing], final_sigmas_type=final, **own)
        calls = own["solver_order"] if own["solver_type"] == "rhork" else 1
        few, many = (abs(sampled(scheduler, steps // calls)[1]) for steps in (18, 72))
        # Singlestep SDEs draw fresh noise in every stage, as diffusers' do: their variance is a matter of small steps.
        restarted = "sde" in str(own) and own["method"] == "singlestep"
        near = first_order(model, spacing, final, "sde" in str(own), 72 // calls) + (0.2 if restarted else 0.05)
        if not (many < near or many < 0.5 * few):
            problems.append(f"{scheduler_class.__name__} {own}: {few:.3g} with 18 calls, {many:.3g} with 72")
    assert not problems, f"{len(problems)}:\n" + "\n".join(problems[:40])


@pytest.mark.parametrize("final", ["zero", "sigma_min"])
@pytest.mark.parametrize("spacing", ["linspace", "leading", "trailing", "karras_sigmas"])
def test_usual_runs_are_no_worse_than_the_first_order(spacing, final):
    """20 and 50 steps of multistep samplers, as Stable Diffusion's pipelines run them."""
    problems = []
    for (kind, scheduler_class, own), steps in product(solvers(), (20, 50)):
        if kind != "steady" or own.get("method") == "singlestep":
            continue
        # Down to sigma_min the last step is long: DPM-Solver has an option for that.
        short = scheduler_class is DPMSolverPPScheduler and final == "sigma_min"
        ending = {"final_sigmas_type": final, **({"euler_at_final": True} if short else {})}
        scheduler = scheduler_class(**STABLE_DIFFUSION, **SPACINGS["vp"][spacing], **ending, **own)
        _, std = sampled(scheduler, steps)
        allowed = first_order("vp", spacing, final, "sde" in str(own), steps) + 0.06
        if abs(std) > allowed:
            problems.append(f"{scheduler_class.__name__} {own} {steps} steps: {std:.3g}, allowed {allowed:.3g}")
    assert not problems, f"{len(problems)}:\n" + "\n".join(problems[:40])


@pytest.mark.parametrize("model", MODELS)
def test_sweep_of_other_endings(model):
    """``euler_at_final``, ``denoise_to_zero``, fractional labels, and the corrector's options."""
    for (kind, scheduler_class, own), steps in product(solvers(), STEPS):
        extra: list[Options] = [{"fractional_timesteps": True}]
        if scheduler_class is DPMSolverPPScheduler:
            extra += [{"euler_at_final": True}, {"final_sigmas_type": "sigma_min", "denoise_to_zero": True}]
            extra += [{"diffusers_third_order": True}] if own["solver_order"] == 3 else []
        if scheduler_class is UniPCScheduler:
            extra += [{"disable_corrector": [0, 1]}, {"corrector_form": "delta"}]
        for options, spacing in product(extra, list(SPACINGS[model])[:1]):
            scheduler = scheduler_class(**MODELS[model], **SPACINGS[model][spacing], **own, **options)
            mean, std = sampled(scheduler, steps)
            case = (scheduler_class.__name__, own, options, steps)
            assert abs(mean) < 1e-8, case
            assert math.isfinite(std), case
            if kind == "steady":
                final = scheduler.config.final_sigmas_type
                first = first_order(model, spacing, final, "sde" in str(own), steps)
                assert abs(std) < first + 0.2 * max(1.0, scheduler.plan.amplification), (case, std)


PREDICTORS = [
    name
    for name, s in SAMPLERS.items()
    if hasattr(s.scheduler, "_predictor")
    and not s.stochastic
    and s.options.get("method") != "singlestep"
    and s.options.get("solver_type") != "rhork"
]


@pytest.mark.parametrize("model", MODELS)
def test_sweep_of_correctors_on_other_predictors(model):
    """UniC on top of every multistep sampler."""
    for name, order, form, final in product(PREDICTORS, (1, 2, 3), ("classic", "delta"), ("zero", "sigma_min")):
        options = {"solver_p": name, "solver_order": order, "corrector_form": form, "final_sigmas_type": final}
        scheduler = UniPCScheduler(**MODELS[model], **options)
        for steps in STEPS:
            mean, std = sampled(scheduler, steps)
            assert abs(mean) < 1e-8, (options, steps, mean)
            assert math.isfinite(std), (options, steps, std)


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
    spacing = {"use_lu_lambdas": True} if model == "vp" else {"sigma_schedule": "exponential"}
    for kind, scheduler_class, own in solvers():
        if kind == "steady":
            continue
        scheduler = scheduler_class(**MODELS[model], **spacing, final_sigmas_type="sigma_min", **own)
        _, std = sampled(scheduler, 40)
        assert np.diff([-math.log(call.level) for call in scheduler.plan]).max() < 1.0
        if not abs(std) < 0.1:
            problems.append(f"{scheduler_class.__name__} {own}: standard deviation off by {std:.3g}")
    assert not problems, "\n".join(problems)


def test_euler_at_final_is_first_order_at_the_end():
    """In every method of DPM-Solver: the last step reads one prediction."""
    for order, method in product((2, 3), ("multistep", "singlestep")):
        options = {**STABLE_DIFFUSION, "final_sigmas_type": "sigma_min", "solver_order": order, "method": method}
        scheduler = DPMSolverPPScheduler(**options, euler_at_final=True, lower_order_final=False)
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
