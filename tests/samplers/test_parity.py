"""Same options, same images as diffusers' classes; and where we differ on purpose, which of the two is right."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from itertools import product
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from scipy.integrate import quad

from analytic import EDM, FLOW, STABLE_DIFFUSION, ZERO_SNR, Truth, alpha_sigma, kind_of, labels, sample
from fewstep.metrics import GaussianMixture
from fewstep.samplers import DEISScheduler, DPMSolverPPScheduler, UniPCScheduler, dpm_solver
from truth import MIXTURE, lambda_grid

TheirDPM = diffusers.DPMSolverMultistepScheduler
TheirSinglestep = diffusers.DPMSolverSinglestepScheduler
TheirDEIS = diffusers.DEISMultistepScheduler
TheirUniPC = diffusers.UniPCMultistepScheduler
TheirEDM = diffusers.EDMDPMSolverMultistepScheduler

STEPS = (1, 2, 3, 8, 20)
TOLERANCE = 5e-5
RESPACINGS = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas")
SPACINGS: dict[str, dict[str, Any]] = {
    "linspace": {},
    "leading": {"timestep_spacing": "leading", "steps_offset": 1},
    "trailing": {"timestep_spacing": "trailing"},
    "karras": {"use_karras_sigmas": True},
    "exponential": {"use_exponential_sigmas": True},
    "beta": {"use_beta_sigmas": True},
    "lu": {"use_lu_lambdas": True},
}
UNIFORM = ("linspace", "leading", "trailing")
BOOL = (True, False)
PREDICTIONS = ("epsilon", "v_prediction", "sample")
COSINE = {"beta_schedule": "squaredcos_cap_v2", "lambda_min_clipped": -5.1}


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    torch.set_num_threads(threads)


def noise(scale: float = 1.0) -> torch.Tensor:
    return torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(1)) * scale


def tolerance(ours: Any) -> float:
    """Relative difference that float32 coefficients and tensors explain; both sides multiply it by these factors."""
    first = ours.plan.calls[0]
    noise_form = ours.config.prediction_type == "epsilon" or any(call.measure == "noise" for call in ours.plan)
    # diffusers' closed form of the third order of DEIS cancels digits.
    cancelled = 1e-4 if isinstance(ours, DEISScheduler) and ours.config.solver_order == 3 else 0.0
    division = 4e-6 * first.sigma / first.alpha if noise_form else 0.0
    return max(TOLERANCE, cancelled, division, 8e-6 * ours.plan.amplification)


def compare(
    theirs: Any,
    ours: Any,
    problems: list[str],
    case: Any,
    *,
    run: dict[str, Any] | None = None,
    **times: Any,
) -> None:
    """Appends what differs between the two runs."""
    theirs.set_timesteps(**times)
    ours.set_timesteps(**times)
    stochastic = str(theirs.config.get("algorithm_type")).startswith("sde")
    options = {**({"seed": 3} if stochastic else {}), **(run or {})}
    scale = float(theirs.init_noise_sigma)
    if abs(float(ours.init_noise_sigma) - scale) > 1e-6 * scale:
        problems.append(f"{case} {times}: init_noise_sigma {ours.init_noise_sigma}, not {scale}")
    expected, found = (sample(s, noise(scale), **options) for s in (theirs, ours))
    assert torch.isfinite(expected).all(), f"{case} {times}: diffusers' image is not finite; no case for comparison"
    error = float((found - expected).abs().max() / expected.abs().max())
    if not error <= tolerance(ours):
        problems.append(f"{case} {times}: images differ by {error:.2g}")
    if kind_of(ours) == "flow":
        # Theirs are truncated to integers; ours are the levels.
        wrong = not np.allclose(labels(ours), 1000 * ours.sigmas[:-1].double().numpy(), rtol=1e-6)
    elif kind_of(ours) == "edm":
        wrong = not np.allclose(labels(ours), labels(theirs), rtol=0, atol=2e-6)
    else:
        wrong = ours.timesteps.dtype != torch.int64 or ours.timesteps.tolist() != theirs.timesteps.tolist()
    if wrong:
        problems.append(f"{case} {times}: labels {ours.timesteps.tolist()}, not {theirs.timesteps.tolist()}")


def report(problems: list[str]) -> None:
    assert not problems, f"{len(problems)} differences:\n" + "\n".join(problems[:12])


# ------------------------------------------------------------------------------------------------ DPM-Solver


ALGORITHMS = ("dpmsolver++", "sde-dpmsolver++", "dpmsolver", "sde-dpmsolver")


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize(
    ("algorithm", "order"),
    # diffusers has no third order of the noise form of the SDE.
    [pair for pair in product(ALGORITHMS, (1, 2, 3)) if pair != ("sde-dpmsolver", 3)],
)
def test_dpm_multistep(algorithm, order, spacing):
    problems: list[str] = []
    for forms, kind, lower, euler, final in product(
        ("midpoint", "heun") if order == 2 else ("midpoint",), PREDICTIONS, BOOL, BOOL, ("zero", "sigma_min")
    ):
        if final == "zero" and "++" not in algorithm:
            continue  # diffusers refuses it
        if final == "sigma_min" and spacing not in UNIFORM:
            continue  # see test_respaced_runs_to_sigma_min_save_a_call
        options = {
            **STABLE_DIFFUSION,
            **SPACINGS[spacing],
            "prediction_type": kind,
            "solver_order": order,
            "solver_type": forms,
            "algorithm_type": algorithm,
            "lower_order_final": lower,
            "euler_at_final": euler,
            "final_sigmas_type": final,
        }
        theirs = TheirDPM(**options)
        ours = DPMSolverPPScheduler.from_config(theirs.config, diffusers_third_order=True)
        for steps in STEPS:
            compare(theirs, ours, problems, (forms, kind, lower, euler, final), num_inference_steps=steps)
    report(problems)


@pytest.mark.parametrize("spacing", ["linspace", "karras", "exponential", "beta"])
@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("algorithm", ["dpmsolver++", "sde-dpmsolver++", "dpmsolver"])
def test_dpm_singlestep(algorithm, order, spacing):
    problems: list[str] = []
    for form, kind, lower, final, steps in product(
        ("midpoint", "heun"), PREDICTIONS, BOOL, ("zero", "sigma_min"), STEPS
    ):
        if final == "zero" and "++" not in algorithm:
            continue
        if final == "sigma_min" and spacing not in UNIFORM:
            continue
        options = {
            **STABLE_DIFFUSION,
            **SPACINGS[spacing],
            "prediction_type": kind,
            "solver_order": order,
            "solver_type": form,
            "algorithm_type": algorithm,
            "lower_order_final": lower,
            "final_sigmas_type": final,
        }
        # A new one each time: set_timesteps changes the config of diffusers' class.
        theirs = TheirSinglestep(**options)
        ours = DPMSolverPPScheduler.from_config(theirs.config, method="singlestep", diffusers_third_order=True)
        compare(theirs, ours, problems, (form, kind, lower, final), num_inference_steps=steps)
    report(problems)


@pytest.mark.parametrize("method", ["multistep", "singlestep"])
def test_dpm_cosine_with_clipped_lambda(method):
    problems: list[str] = []
    spacings = ("linspace",) if method == "singlestep" else UNIFORM
    for spacing, order, kind, bound, steps in product(
        spacings, (1, 2), ("epsilon", "v_prediction"), (-5.1, -2.0, 0.5), STEPS
    ):
        options = {
            **COSINE,
            **SPACINGS[spacing],
            "lambda_min_clipped": bound,
            "solver_order": order,
            "prediction_type": kind,
            "lower_order_final": True,
        }
        theirs = (TheirSinglestep if method == "singlestep" else TheirDPM)(**options)
        ours = DPMSolverPPScheduler.from_config(theirs.config, method=method)
        theirs.set_timesteps(steps)
        if len(theirs.timesteps) < steps:
            continue  # see test_trailing_with_clipped_lambda_takes_all_steps
        compare(theirs, ours, problems, (spacing, order, kind, bound), num_inference_steps=steps)
    report(problems)


@pytest.mark.parametrize(
    ("schedule", "total"),
    [
        ({"beta_schedule": "linear"}, 1000),
        ({"beta_schedule": "squaredcos_cap_v2"}, 1000),
        ({"trained_betas": [0.01 + 0.002 * k for k in range(100)]}, 100),
        ({"beta_schedule": "scaled_linear", "beta_start": 0.0085, "beta_end": 0.12}, 120),
    ],
)
def test_noise_schedules(schedule, total):
    problems: list[str] = []
    kinds = ("v_prediction", "sample") if schedule == {"beta_schedule": "squaredcos_cap_v2"} else PREDICTIONS
    for spacing, kind, steps in product(UNIFORM, kinds, STEPS):
        options = {**schedule, **SPACINGS[spacing], "num_train_timesteps": total, "prediction_type": kind}
        for their_class, our_class in (
            (TheirDPM, DPMSolverPPScheduler),
            (TheirUniPC, UniPCScheduler),
            (TheirDEIS, DEISScheduler),
        ):
            if their_class is TheirDEIS and "epsilon" not in kinds:
                continue  # sigma / alpha is 20,000 there: the noise form has no digits left in float32
            theirs = their_class(**options)
            ours = our_class.from_config(theirs.config)
            assert torch.equal(ours.alphas_cumprod, theirs.alphas_cumprod)
            compare(theirs, ours, problems, (spacing, kind, our_class.__name__), num_inference_steps=steps)
    report(problems)


@pytest.mark.parametrize("spacing", ["linspace", "leading", "trailing", "exponential"])
@pytest.mark.parametrize("kind", ["v_prediction", "sample"])
def test_zero_terminal_snr(kind, spacing):
    problems: list[str] = []
    for order, algorithm, steps in product((1, 2, 3), ("dpmsolver++", "sde-dpmsolver++"), STEPS):
        options = {
            **STABLE_DIFFUSION,
            "rescale_betas_zero_snr": True,
            "prediction_type": kind,
            "timestep_spacing": "linspace",
            **SPACINGS[spacing],
            "solver_order": order,
        }
        theirs = TheirDPM(**options, algorithm_type=algorithm)
        ours = DPMSolverPPScheduler.from_config(theirs.config, diffusers_third_order=True)
        compare(theirs, ours, problems, (order, algorithm), num_inference_steps=steps)
        unipc = TheirUniPC(**options)
        compare(unipc, UniPCScheduler.from_config(unipc.config), problems, (order, "unipc"), num_inference_steps=steps)
    report(problems)


@pytest.mark.parametrize("algorithm", ["dpmsolver++", "sde-dpmsolver++", "dpmsolver", "sde-dpmsolver"])
def test_dynamic_thresholding(algorithm):
    problems: list[str] = []
    final = "zero" if "++" in algorithm else "sigma_min"
    for ratio, limit, kind, steps in product((0.995, 0.7), (1.0, 1.2, 10.0), PREDICTIONS, STEPS):
        options = {
            **STABLE_DIFFUSION,
            "prediction_type": kind,
            "thresholding": True,
            "dynamic_thresholding_ratio": ratio,
            "sample_max_value": limit,
        }
        theirs = TheirDPM(**options, algorithm_type=algorithm, final_sigmas_type=final)
        ours = DPMSolverPPScheduler.from_config(theirs.config)
        case = (ratio, limit, kind)
        compare(theirs, ours, problems, case, num_inference_steps=steps)
        if steps == 8:
            plain = DPMSolverPPScheduler.from_config(theirs.config, thresholding=False)
            plain.set_timesteps(steps)
            seed = 3 if "sde" in algorithm else None
            unclipped, clipped = sample(plain, noise(), seed=seed), sample(_again(ours, steps), noise(), seed=seed)
            assert (unclipped - clipped).abs().max() > 0.01, "the thresholds were never reached"
        if algorithm == "dpmsolver++":
            single = TheirSinglestep(**options, lower_order_final=True)
            compare(
                single,
                DPMSolverPPScheduler.from_config(single.config, method="singlestep"),
                problems,
                ("2S", *case),
                num_inference_steps=steps,
            )
            unipc = TheirUniPC(**options)
            compare(
                unipc, UniPCScheduler.from_config(unipc.config), problems, ("unipc", *case), num_inference_steps=steps
            )
            deis = TheirDEIS(**options)
            compare(deis, DEISScheduler.from_config(deis.config), problems, ("deis", *case), num_inference_steps=steps)
    report(problems)


def _again(scheduler: Any, steps: int) -> Any:
    scheduler.set_timesteps(steps)
    return scheduler


# ------------------------------------------------------------------------------------------------ DEIS, UniPC, EDM


@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("spacing", UNIFORM)
def test_deis(spacing, order):
    problems: list[str] = []
    for kind, lower in product(PREDICTIONS, BOOL):
        options = {**STABLE_DIFFUSION, **SPACINGS[spacing], "prediction_type": kind, "lower_order_final": lower}
        theirs = TheirDEIS(**options, solver_order=order)
        ours = DEISScheduler.from_config(theirs.config)
        for steps in STEPS:
            compare(theirs, ours, problems, (kind, lower), num_inference_steps=steps)
    report(problems)


@pytest.mark.parametrize("form", ["bh1", "bh2"])
@pytest.mark.parametrize("order", [1, 2, 3, 4])
@pytest.mark.parametrize("spacing", [key for key in SPACINGS if key != "lu"])
def test_unipc(spacing, order, form):
    problems: list[str] = []
    for kind, data, final, lower, disabled in product(
        PREDICTIONS, BOOL, ("zero", "sigma_min"), BOOL, ([], [0], [1, 3, 4])
    ):
        if final == "zero" and (form == "bh1" or not data or not lower):
            continue  # NaN or inf in diffusers: see test_unipc_runs_to_zero_that_diffusers_cannot_do
        if final == "sigma_min" and spacing not in UNIFORM:
            continue
        options = {
            **STABLE_DIFFUSION,
            **SPACINGS[spacing],
            "prediction_type": kind,
            "solver_order": order,
            "solver_type": form,
            "predict_x0": data,
            "final_sigmas_type": final,
            "lower_order_final": lower,
            "disable_corrector": disabled,
        }
        theirs = TheirUniPC(**options)
        ours = UniPCScheduler.from_config(theirs.config)
        for steps in STEPS:
            compare(theirs, ours, problems, (kind, data, final, lower, disabled), num_inference_steps=steps)
    report(problems)


PREDICTORS: list[tuple[str, int, str, str]] = [
    ("ddim", 1, "midpoint", "dpmsolver++"),
    ("dpm++", 2, "midpoint", "dpmsolver++"),
    ("dpm++-heun", 2, "heun", "dpmsolver++"),
    ("dpm", 2, "midpoint", "dpmsolver"),
]


@pytest.mark.parametrize("corrector_order", [1, 2, 3])
@pytest.mark.parametrize(("name", "order", "form", "algorithm"), PREDICTORS)
def test_unipc_over_another_predictor(name, order, form, algorithm, corrector_order):
    """Where the other solver's prediction is the network's output; see test_unipc_predictors_share_a_prediction."""
    problems: list[str] = []
    data = algorithm == "dpmsolver++"
    for final, steps in product(("zero", "sigma_min") if data else ("sigma_min",), STEPS):
        options = {
            **STABLE_DIFFUSION,
            "prediction_type": "sample" if data else "epsilon",
            "final_sigmas_type": final,
        }
        predictor = TheirDPM(**options, solver_order=order, solver_type=form, algorithm_type=algorithm)
        theirs = TheirUniPC(**options, solver_order=corrector_order, predict_x0=data, solver_p=predictor)
        ours = UniPCScheduler(**options, solver_order=corrector_order, predict_x0=data, solver_p=name)
        compare(theirs, ours, problems, final, num_inference_steps=steps)
    report(problems)


@pytest.mark.parametrize("spacing", ["karras", "exponential"])
@pytest.mark.parametrize(
    ("algorithm", "order"),
    # diffusers' EDM class has no third order of the SDE.
    [("dpmsolver++", 1), ("dpmsolver++", 2), ("dpmsolver++", 3), ("sde-dpmsolver++", 1), ("sde-dpmsolver++", 2)],
)
def test_edm(algorithm, order, spacing):
    problems: list[str] = []
    for form, kind, lower, euler, rho in product(
        ("midpoint", "heun") if order == 2 else ("midpoint",), ("epsilon", "v_prediction"), BOOL, BOOL, (7.0, 5.0)
    ):
        options = {
            **EDM,
            "sigma_schedule": spacing,
            "rho": rho,
            "prediction_type": kind,
            "solver_order": order,
            "solver_type": form,
            "algorithm_type": algorithm,
            "lower_order_final": lower,
            "euler_at_final": euler,
        }
        theirs = TheirEDM(**options)
        ours = DPMSolverPPScheduler.from_config(theirs.config, diffusers_third_order=True)
        # One step of its exponential levels begins at sigma_min: see test_edm_exponential_single_step.
        for steps in STEPS[spacing == "exponential" :]:
            compare(theirs, ours, problems, (form, kind, lower, euler, rho), num_inference_steps=steps)
    report(problems)


def test_edm_thresholding():
    problems: list[str] = []
    for limit, ratio, steps in product((1.0, 1.2), (0.995, 0.7), STEPS):
        theirs = TheirEDM(**EDM, thresholding=True, sample_max_value=limit, dynamic_thresholding_ratio=ratio)
        ours = DPMSolverPPScheduler.from_config(theirs.config)
        compare(theirs, ours, problems, (limit, ratio), num_inference_steps=steps)
    report(problems)


# ------------------------------------------------------------------------------------------------ rectified flow


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_flow_dpm(shift):
    problems: list[str] = []
    for order, algorithm, form, lower, steps in product(
        (1, 2, 3), ("dpmsolver++", "sde-dpmsolver++"), ("midpoint", "heun"), BOOL, STEPS
    ):
        options = {**FLOW, "flow_shift": shift, "solver_order": order, "solver_type": form, "lower_order_final": lower}
        theirs = TheirDPM(**options, algorithm_type=algorithm)
        ours = DPMSolverPPScheduler.from_config(theirs.config, diffusers_third_order=True)
        compare(theirs, ours, problems, ("multi", order, algorithm, form, lower), num_inference_steps=steps)
        single = TheirSinglestep(**options, algorithm_type=algorithm)
        ours = DPMSolverPPScheduler.from_config(single.config, method="singlestep", diffusers_third_order=True)
        compare(single, ours, problems, ("single", order, algorithm, form, lower), num_inference_steps=steps)
    report(problems)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_flow_unipc(shift):
    problems: list[str] = []
    for order, terminal, disabled, steps in product((1, 2, 3), (None, 0.1), ([], [0]), STEPS):
        if terminal is not None and steps == 1:
            continue  # diffusers divides 0 by 0
        options = {**FLOW, "flow_shift": shift, "solver_order": order, "shift_terminal": terminal}
        theirs = TheirUniPC(**options, disable_corrector=disabled)
        ours = UniPCScheduler.from_config(theirs.config)
        compare(theirs, ours, problems, (order, terminal, disabled), num_inference_steps=steps)
    report(problems)


@pytest.mark.parametrize("mu", [0.3, 1.15])
def test_flow_dynamic_shift(mu):
    problems: list[str] = []
    options = {**FLOW, "flow_shift": 1.0, "use_dynamic_shifting": True}
    for steps in STEPS:
        for their_class, our_class, own in (
            (TheirDPM, DPMSolverPPScheduler, {}),
            (TheirSinglestep, DPMSolverPPScheduler, {"method": "singlestep"}),
            (TheirUniPC, UniPCScheduler, {}),
        ):
            theirs = their_class(**options)
            ours = our_class.from_config(theirs.config, **own)
            compare(theirs, ours, problems, their_class.__name__, num_inference_steps=steps, mu=mu)
        theirs = TheirUniPC(**{**options, "time_shift_type": "linear"})
        ours = UniPCScheduler.from_config(theirs.config)
        compare(theirs, ours, problems, "linear", num_inference_steps=steps, mu=mu)
    report(problems)


def test_flow_custom_sigmas():
    problems: list[str] = []
    for sigmas, shift in product(([0.9, 0.5, 0.2], [0.99, 0.8, 0.7, 0.35, 0.1, 0.01]), (1.0, 3.0)):
        theirs = TheirUniPC(**{**FLOW, "flow_shift": shift})
        ours = UniPCScheduler.from_config(theirs.config)
        compare(theirs, ours, problems, shift, sigmas=np.array(sigmas))
    report(problems)


def test_flow_karras_in_units_of_sigma_over_alpha():
    problems: list[str] = []
    for order, steps in product((1, 2, 3), STEPS):
        theirs = TheirUniPC(**FLOW, solver_order=order, use_karras_sigmas=True, sigma_min=0.02, sigma_max=50.0)
        ours = UniPCScheduler.from_config(theirs.config)
        compare(theirs, ours, problems, order, num_inference_steps=steps)
    report(problems)


def test_flow_euler_is_diffusers_flow_match_euler():
    theirs = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    ours = DPMSolverPPScheduler.from_config(theirs.config, solver_order=1)
    assert ours.config.use_flow_sigmas
    assert ours.config.prediction_type == "flow_prediction"
    assert ours.config.flow_shift == 3.0
    for sigmas in (np.linspace(1, 1 / 4, 4), np.linspace(1, 1 / 20, 20)):
        theirs.set_timesteps(sigmas=sigmas)
        ours.set_timesteps(sigmas=sigmas)
        np.testing.assert_allclose(labels(ours), labels(theirs), rtol=1e-6)
        x, y = noise(), noise()
        for i, t in enumerate(ours.timesteps):
            alpha, sigma = alpha_sigma("flow", float(ours.sigmas[i]))
            clean = [1.6 * torch.tanh(1.3 * alpha / (alpha**2 + sigma**2) * v + 0.1) for v in (x, y)]
            x = ours.step((x - clean[0]) / sigma, t, x, return_dict=False)[0]
            y = theirs.step((y - clean[1]) / sigma, theirs.timesteps[i], y, return_dict=False)[0]
        torch.testing.assert_close(x, y, rtol=0, atol=TOLERANCE)


# ------------------------------------------------------------------------------------------------ other ways to start


@pytest.mark.parametrize(
    "timesteps", [[999], [999, 500], [900, 700, 400, 100, 10], list(range(990, -1, -90)), [999, 998, 997, 3, 2, 1, 0]]
)
def test_custom_timesteps(timesteps):
    problems: list[str] = []
    for order, algorithm, final in product((1, 2, 3), ("dpmsolver++", "sde-dpmsolver++"), ("zero", "sigma_min")):
        if final == "sigma_min" and timesteps[-1] == 0:
            continue  # the last step would have no length
        options = {**STABLE_DIFFUSION, "solver_order": order, "algorithm_type": algorithm, "final_sigmas_type": final}
        theirs = TheirDPM(**options)
        ours = DPMSolverPPScheduler.from_config(theirs.config, diffusers_third_order=True)
        compare(theirs, ours, problems, ("multi", order, algorithm, final), timesteps=timesteps)
        single = TheirSinglestep(**options, lower_order_final=True)
        ours = DPMSolverPPScheduler.from_config(single.config, method="singlestep", diffusers_third_order=True)
        compare(single, ours, problems, ("single", order, algorithm, final), timesteps=timesteps)
    report(problems)


@pytest.mark.parametrize("begin", [0, 1, 2, 5, 7, 19])
def test_image_to_image(begin):
    problems: list[str] = []
    pairs: list[tuple[Any, Any, dict[str, Any]]] = [
        *((TheirDPM, DPMSolverPPScheduler, {"solver_order": k, "diffusers_third_order": True}) for k in (1, 2, 3)),
        (TheirDPM, DPMSolverPPScheduler, {"algorithm_type": "sde-dpmsolver++"}),
        (TheirDPM, DPMSolverPPScheduler, {"algorithm_type": "sde-dpmsolver", "final_sigmas_type": "sigma_min"}),
        *((TheirDEIS, DEISScheduler, {"solver_order": k}) for k in (1, 2, 3)),
        *((TheirUniPC, UniPCScheduler, {"solver_order": k}) for k in (1, 2, 3)),
        (TheirUniPC, UniPCScheduler, {"solver_order": 3, "disable_corrector": [begin, begin + 1]}),
    ]
    for (their_class, our_class, options), kind, steps in product(pairs, ("epsilon", "v_prediction"), (8, 20)):
        if begin >= steps:
            continue
        known = {key: value for key, value in options.items() if key != "diffusers_third_order"}
        theirs = their_class(**STABLE_DIFFUSION, prediction_type=kind, **known)
        ours = our_class.from_config(theirs.config, **options)
        case = (our_class.__name__, options, kind)
        compare(theirs, ours, problems, case, run={"begin": begin}, num_inference_steps=steps)
        for scheduler in (theirs, ours):
            scheduler.set_timesteps(steps)
            scheduler.set_begin_index(begin)
        at = ours.timesteps[begin : begin + 1].repeat(2)
        noisy = [s.add_noise(noise(0.5), noise(), at) for s in (theirs, ours)]
        torch.testing.assert_close(noisy[1], noisy[0], rtol=0, atol=2e-6)
    report(problems)


@pytest.mark.parametrize("begin", [0, 2, 4])
def test_flow_image_to_image(begin):
    problems: list[str] = []
    for their_class, our_class, order in (
        (TheirDPM, DPMSolverPPScheduler, 2),
        (TheirUniPC, UniPCScheduler, 2),
        (TheirUniPC, UniPCScheduler, 3),
    ):
        theirs = their_class(**FLOW, solver_order=order)
        ours = our_class.from_config(theirs.config)
        compare(theirs, ours, problems, (our_class, order), run={"begin": begin}, num_inference_steps=8)
    report(problems)


# ------------------------------------------------------------------------------------------------ differences on purpose

TRUTH = Truth(GaussianMixture.random(4, 6, seed=3))


def error_of(scheduler: Any, steps: int | None = None, **times: Any) -> float:
    """Distance from the exact solution at level 0, wherever the scheduler ends."""
    if steps is not None:
        times["num_inference_steps"] = steps
    scheduler.set_timesteps(**times)
    kind = kind_of(scheduler)
    first = float(scheduler.sigmas[0])
    result = sample(scheduler, TRUTH.start(kind, first), TRUTH.mixture.clean)
    return float((result - TRUTH.end(kind, first, 0.0)).square().mean().sqrt())


def one_step_error(h: float, *, diffusers_third_order: bool, order: int = 3) -> float:
    """Of one third-order step of length ``h`` from exact predictions."""
    nodes = lambda_grid([-2 * h, -h, 0.0, h])
    rule = dpm_solver.predictor(
        nodes,
        order=order,
        measure="data",
        stochastic=False,
        form="heun",
        lower_order_final=False,
        euler_at_final=False,
        diffusers_third_order=diffusers_third_order,
    ).rule
    points = [(node.alpha, node.sigma) for node in nodes.nodes]
    x = torch.linspace(-1.5, 1.5, 9, dtype=torch.float64)[:, None]
    states = [MIXTURE.solve(x, points[2], end) for end in points]
    weights = rule(2, 3)
    result = weights.state * states[2]
    for k, weight in enumerate(weights.predictions):
        result = result + weight * MIXTURE.clean(states[2 - k], *points[2 - k])
    return float((result - states[3]).square().mean().sqrt())


def test_third_order_multistep_is_of_third_order():
    ours = [one_step_error(h, diffusers_third_order=False) for h in (0.05, 0.025)]
    theirs = [one_step_error(h, diffusers_third_order=True) for h in (0.05, 0.025)]
    # One step of a method of order p is wrong by O(h^(p+1)).
    assert ours[0] / ours[1] > 12
    assert 6 < theirs[0] / theirs[1] < 10
    assert ours[0] < theirs[0]


@pytest.mark.parametrize("method", ["multistep", "singlestep"])
def test_third_order_of_the_sde_integrates_its_drift(method):
    """The drift of a known smooth prediction over one step: ours of third order, diffusers' worse than its second."""

    def error(h: float, order: int, diffusers_third_order: bool) -> float:
        grid = lambda_grid([-2 * h, -h, 0.0, h] if method == "multistep" else [0.0, h / 3, 2 * h / 3, h])
        common = {"measure": "data", "stochastic": True, "form": "heun", "diffusers_third_order": diffusers_third_order}
        if method == "multistep":
            predictor = dpm_solver.predictor(
                grid, order=order, lower_order_final=False, euler_at_final=False, **common
            )
            weights, nodes, start = predictor.rule(2, order), [grid.nodes[2 - k] for k in range(order)], grid.nodes[2]
        else:
            nodes, start = [grid.nodes[0], *reversed(grid.nodes[1:order])], grid.nodes[0]
            group = list(range(order))
            weights = dpm_solver._group_weights(grid.nodes, group, 3, "data", True, "heun")
            if order == 3 and diffusers_third_order:
                weights = dpm_solver._diffusers_third_order_of_group(grid.nodes, group, 3, weights)
        end = grid.nodes[3]
        length = end.half_logsnr - start.half_logsnr
        exact = quad(
            lambda tau: end.alpha * 2 * np.exp(-2 * (length - tau)) * np.sin(1.0 + start.half_logsnr + tau), 0, length
        )[0]
        found = sum(w * np.sin(1.0 + node.half_logsnr) for w, node in zip(weights.predictions, nodes, strict=True))
        return abs(found - exact)

    assert error(0.2, 3, False) / error(0.1, 3, False) > 12
    assert error(0.1, 3, True) > error(0.1, 2, False)
    assert error(0.1, 3, False) < 0.1 * error(0.1, 2, False)


RESPACED = [
    *((TheirDPM, DPMSolverPPScheduler, {key: True, "final_sigmas_type": "sigma_min"}) for key in RESPACINGS),
    (TheirDPM, DPMSolverPPScheduler, {"use_lu_lambdas": True, "final_sigmas_type": "sigma_min"}),
    *((TheirDEIS, DEISScheduler, {key: True}) for key in RESPACINGS),
    *((TheirUniPC, UniPCScheduler, {key: True, "final_sigmas_type": "sigma_min"}) for key in RESPACINGS),
]


@pytest.mark.parametrize(("their_class", "our_class", "options"), RESPACED)
def test_respaced_runs_to_sigma_min_save_a_call(their_class, our_class, options):
    """Diffusers' last call there is a step of no length: N of our calls are N + 1 of its."""
    for steps in (1, 2, 3, 8, 20):
        theirs = their_class(**STABLE_DIFFUSION, **options, lower_order_final=False)
        ours = our_class.from_config(theirs.config)
        theirs.set_timesteps(steps + 1)
        ours.set_timesteps(steps)
        assert float(theirs.sigmas[-1]) == pytest.approx(float(theirs.sigmas[-2]), rel=1e-6)
        assert len(ours.timesteps) == steps
        assert ours.timesteps.tolist() == theirs.timesteps.tolist()[:-1]
        expected, found = sample(theirs, noise(), stop=steps), sample(ours, noise())
        torch.testing.assert_close(found, expected, rtol=0, atol=TOLERANCE * float(expected.abs().max()))


# UniPC is not among them: there diffusers' last call does correct the last step.
@pytest.mark.parametrize(("their_class", "our_class", "options"), RESPACED[:7])
def test_respaced_runs_to_sigma_min_are_more_accurate(their_class, our_class, options):
    """With equal numbers of calls, against the exact solution at sigma_min: over all of 6 to 30 steps."""
    ratios = []
    for steps in range(6, 31, 2):
        theirs = their_class(**STABLE_DIFFUSION, **options, lower_order_final=False)
        ours = our_class.from_config(theirs.config)
        for scheduler in (theirs, ours):
            scheduler.set_timesteps(steps)
        ratios.append(TRUTH.error(ours) / TRUTH.error(theirs))
    assert np.exp(np.mean(np.log(ratios))) < 0.97, ratios


def test_third_order_respaced_runs_to_sigma_min_are_finite():
    options = {**STABLE_DIFFUSION, "final_sigmas_type": "sigma_min", "solver_order": 3, "use_karras_sigmas": True}
    theirs = TheirDPM(**options)
    ours = DPMSolverPPScheduler.from_config(theirs.config)
    assert np.isnan(error_of(theirs, 20))
    assert error_of(ours, 20) < 0.05


def test_deis_flow_runs_end_at_zero():
    for steps in (4, 20):
        theirs = TheirDEIS(**FLOW, lower_order_final=False)
        ours = DEISScheduler.from_config(theirs.config)
        theirs.set_timesteps(steps)
        ours.set_timesteps(steps)
        # The same run up to diffusers' last level, where it stops and still holds noise.
        before, stopped = sample(ours, noise(), stop=steps - 1), sample(theirs, noise())
        torch.testing.assert_close(before, stopped, rtol=0, atol=tolerance(ours) * float(stopped.abs().max()))
        assert float(theirs.sigmas[-1]) > 0.05
        assert float(ours.sigmas[-1]) == 0.0
        assert error_of(ours, steps) < 0.8 * error_of(theirs, steps)


@pytest.mark.parametrize(
    "options",
    [
        {"solver_type": "bh1"},
        {"solver_type": "bh1", "solver_order": 3},
        {"lower_order_final": False},
        {"lower_order_final": False, "solver_order": 3},
        {"predict_x0": False},
    ],
)
def test_unipc_runs_to_zero_that_diffusers_cannot_do(options):
    """NaN, inf or an error there; here about as accurate as what works there."""
    theirs = TheirUniPC(**STABLE_DIFFUSION, **options)
    try:
        assert not np.isfinite(error_of(theirs, 20))
    except (RuntimeError, np.linalg.LinAlgError):
        pass
    working = TheirUniPC(**STABLE_DIFFUSION)
    # The noise form needs smaller steps.
    for steps in (1, 2, 3, 8, 20, 60) if "predict_x0" not in options else (1, 8, 20, 60):
        ours = UniPCScheduler.from_config(theirs.config)
        assert error_of(ours, steps) < 1.6 * error_of(working, steps) + 1e-3, steps


@pytest.mark.parametrize(
    ("their_class", "our_class", "respacing"),
    [
        *((TheirDPM, DPMSolverPPScheduler, key) for key in (*RESPACINGS, "use_lu_lambdas")),
        *((TheirDEIS, DEISScheduler, key) for key in RESPACINGS),
        *((TheirUniPC, UniPCScheduler, key) for key in RESPACINGS),
    ],
)
def test_flow_and_respacing(their_class, our_class, respacing):
    theirs = their_class(**FLOW, **{respacing: True})
    if not (their_class is TheirUniPC and respacing == "use_karras_sigmas"):
        assert not np.isfinite(error_of(theirs, 10))
    ours = [error_of(our_class.from_config(theirs.config), steps) for steps in (5, 20, 80)]
    assert ours[1] < 0.7 * ours[0]
    assert ours[2] < 0.7 * ours[1]
    assert ours[2] < 0.02


def test_cosine_and_karras():
    """Repeated labels; diffusers looks its index up by them and truncates what it rounds elsewhere."""
    theirs = TheirDPM(beta_schedule="squaredcos_cap_v2", use_karras_sigmas=True)
    ours = DPMSolverPPScheduler.from_config(theirs.config)
    theirs.set_timesteps(20)
    ours.set_timesteps(20)
    torch.testing.assert_close(ours.sigmas, theirs.sigmas, rtol=1e-5, atol=0)
    fractional = ours.schedule.timestep(ours.sigmas[:-1].double().numpy())
    assert np.abs(labels(ours) - fractional).max() <= 0.5
    assert 0.5 < np.abs(labels(theirs) - fractional).max() < 1
    with pytest.raises(IndexError):
        sample(theirs, noise())
    theirs.set_timesteps(20)
    started = sample(theirs, noise(), begin=0)
    torch.testing.assert_close(sample(ours, noise()), started, rtol=0, atol=TOLERANCE * float(started.abs().max()))
    smooth = DPMSolverPPScheduler.from_config(theirs.config, fractional_timesteps=True)
    smooth.set_timesteps(20)
    assert (np.diff(labels(smooth)) < 0).all()
    assert smooth.timesteps.dtype == torch.float32


@pytest.mark.parametrize("their_class", [TheirDEIS, TheirUniPC, TheirSinglestep])
def test_cosine_and_karras_elsewhere(their_class):
    ours_of = {TheirDEIS: DEISScheduler, TheirUniPC: UniPCScheduler, TheirSinglestep: DPMSolverPPScheduler}
    theirs = their_class(beta_schedule="squaredcos_cap_v2", use_karras_sigmas=True, prediction_type="v_prediction")
    ours = ours_of[their_class].from_config(theirs.config)
    # DEIS has one point more, in the place of diffusers' last step of no length.
    theirs.set_timesteps(20 + (their_class is TheirDEIS))
    ours.set_timesteps(20)
    assert ours.timesteps.tolist() == theirs.timesteps.tolist()[:20]


def test_flow_custom_sigmas_of_exactly_one():
    """Ours start at alpha = 0 itself, where diffusers' UniPC moves the level."""
    for order in (1, 2, 3):
        errors = []
        for steps in (5, 10, 40):
            sigmas = np.linspace(1.0, 1.0 / steps, steps)
            theirs = TheirUniPC(**{**FLOW, "flow_shift": 1.0}, solver_order=order)
            ours = UniPCScheduler.from_config(theirs.config)
            errors.append((error_of(ours, sigmas=sigmas), error_of(theirs, sigmas=sigmas)))
            assert float(ours.sigmas[0]) == 1.0
            assert float(ours.timesteps[0]) == 1000.0
            assert float(theirs.sigmas[0]) < 1.0
        assert errors[2][0] < 0.3 * errors[0][0], errors
        for ours_error, their_error in errors:
            assert ours_error < 1.25 * their_error, errors
    # A level of 1 and one just below are the same run, but for the first step's part of a second order.
    one, below = (UniPCScheduler(**FLOW, solver_order=1) for _ in range(2))
    one.set_timesteps(sigmas=[1.0, 0.6, 0.3])
    below.set_timesteps(sigmas=[1.0 - 1e-7, 0.6, 0.3])
    torch.testing.assert_close(sample(one, noise()), sample(below, noise()), rtol=0, atol=1e-4)


def test_edm_exponential_single_step():
    """Diffusers' linspace of one point is the wrong end: it takes noise of sigma_max for noise of sigma_min."""
    theirs = TheirEDM(**EDM, sigma_schedule="exponential")
    ours = DPMSolverPPScheduler.from_config(theirs.config)
    for scheduler, level in ((theirs, 0.002), (ours, 80.0)):
        scheduler.set_timesteps(1)
        assert float(scheduler.sigmas[0]) == pytest.approx(level)
    start = TRUTH.start("edm", 80.0)
    exact = TRUTH.end("edm", 80.0, 0.0)
    assert (sample(ours, start, TRUTH.mixture.clean) - exact).abs().mean() < 2
    assert (sample(theirs, start, TRUTH.mixture.clean) - exact).abs().mean() > 20


@pytest.mark.parametrize("bound", [-2.0, 0.5])
def test_trailing_with_clipped_lambda_takes_all_steps(bound):
    """Diffusers divides the whole schedule, so that a clipped one gives fewer steps than were asked for."""
    options = {**COSINE, "lambda_min_clipped": bound, "timestep_spacing": "trailing"}
    theirs = TheirDPM(**options)
    ours = DPMSolverPPScheduler.from_config(theirs.config)
    for steps in (20, 30, 50):
        theirs.set_timesteps(steps)
        ours.set_timesteps(steps)
        assert len(theirs.timesteps) < steps == len(ours.timesteps)
        assert ours.timesteps[0] == theirs.timesteps[0]
        assert error_of(ours, steps) < error_of(theirs, steps)


@pytest.mark.parametrize("corrector_order", [1, 2])
def test_unipc_predictors_share_a_prediction(corrector_order):
    """With solver_p diffusers converts the network's output a second time, at the corrected sample.

    Its image then depends on what the network predicts; ours does not.
    """
    ours, theirs = [], []
    for kind in PREDICTIONS:
        options = {**STABLE_DIFFUSION, "prediction_type": kind}
        predictor = TheirDPM(**options)
        pair = (
            UniPCScheduler(**options, solver_order=corrector_order, solver_p="dpm++"),
            TheirUniPC(**options, solver_order=corrector_order, solver_p=predictor),
        )
        for scheduler, results in zip(pair, (ours, theirs), strict=True):
            scheduler.set_timesteps(10)
            results.append(sample(scheduler, TRUTH.start("vp", float(scheduler.sigmas[0])), TRUTH.mixture.clean))
    for k in (1, 2):
        torch.testing.assert_close(ours[k], ours[0], rtol=0, atol=1e-9)
    torch.testing.assert_close(ours[2], theirs[2], rtol=0, atol=TOLERANCE)
    assert (theirs[0] - theirs[2]).abs().max() > 1e-3


def test_zero_snr_config_names_the_same_levels():
    theirs = TheirDPM(**ZERO_SNR)
    theirs.set_timesteps(10)
    ours = DPMSolverPPScheduler.from_config(theirs.config)
    ours.set_timesteps(10)
    torch.testing.assert_close(ours.sigmas, theirs.sigmas, rtol=2e-7, atol=0)
