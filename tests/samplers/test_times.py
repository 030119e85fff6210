"""The times of a run: spacings, custom times, shifts, labels, and what is refused."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import beta

from analytic import EDM, FLOW, STABLE_DIFFUSION, ZERO_SNR, labels
from comparison import SPACINGS, TheirDEIS, TheirDPM, TheirSinglestep, TheirUniPC
from fewstep.samplers import SAMPLERS, DEISScheduler, DPMSolverPPScheduler, UniPCScheduler

COUNTS = (1, 2, 3, 4, 5, 7, 10, 13, 15, 20, 25, 28, 30, 37, 40, 50, 64, 75, 99, 100)


def levels(scheduler: Any) -> np.ndarray:
    """``sigmas`` as float64 numbers."""
    return np.asarray(scheduler.sigmas.double().numpy())


def with_times(scheduler: Any, *args: Any, **times: Any) -> Any:
    scheduler.set_timesteps(*args, **times)
    return scheduler


# ------------------------------------------------------------------------------------------------ spacings


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("model", [STABLE_DIFFUSION, {"beta_schedule": "linear"}], ids=["scaled_linear", "linear"])
def test_labels_and_levels_are_those_of_diffusers(model, spacing):
    theirs = TheirDPM(**model, **SPACINGS[spacing])
    ours = DPMSolverPPScheduler.from_config(theirs.config, solver_order=1)
    for steps in COUNTS:
        with_times(theirs, steps)
        with_times(ours, steps)
        assert ours.timesteps.dtype == torch.int64
        assert ours.timesteps.tolist() == theirs.timesteps.tolist(), steps
        torch.testing.assert_close(ours.sigmas, theirs.sigmas, rtol=4e-6, atol=1e-7)
        assert ours.num_inference_steps == steps


@pytest.mark.parametrize("offset", [0, 1, 3])
@pytest.mark.parametrize(
    ("their_class", "our_class"),
    [(TheirDEIS, DEISScheduler), (TheirUniPC, UniPCScheduler), (TheirSinglestep, DPMSolverPPScheduler)],
)
def test_labels_of_the_other_classes(their_class, our_class, offset):
    spacings = ("linspace",) if their_class is TheirSinglestep else ("linspace", "leading", "trailing")
    for spacing in spacings:
        known = {} if their_class is TheirSinglestep else {"timestep_spacing": spacing, "steps_offset": offset}
        theirs = their_class(**STABLE_DIFFUSION, **known)
        ours = our_class.from_config(theirs.config)
        for steps in COUNTS:
            assert with_times(ours, steps).timesteps.tolist() == with_times(theirs, steps).timesteps.tolist()


@pytest.mark.parametrize("steps", [61, 103, 121, 122, 201])
def test_trailing_has_as_many_steps_as_asked_for(steps):
    """There diffusers' range of floats gains an entry of -1."""
    options = {**STABLE_DIFFUSION, "timestep_spacing": "trailing"}
    ours, theirs = with_times(DPMSolverPPScheduler(**options), steps), with_times(TheirDPM(**options), steps)
    assert theirs.timesteps.tolist() == [*ours.timesteps.tolist(), -1]
    assert ours.timesteps[0] == 999
    assert np.abs(np.diff(labels(ours)) + 1000 / steps).max() <= 1


def test_respacings_are_their_definitions():
    """Against the formulas of their papers, between the ends of the schedule."""
    schedule = DPMSolverPPScheduler(**STABLE_DIFFUSION).schedule
    low, high, ramp = schedule.min_level, schedule.max_level, np.linspace(0, 1, 12)
    expected = {
        "use_karras_sigmas": (high ** (1 / 7) + ramp * (low ** (1 / 7) - high ** (1 / 7))) ** 7,
        "use_exponential_sigmas": high * (low / high) ** ramp,
        "use_lu_lambdas": np.exp(-np.linspace(-math.log(high), -math.log(low), 12)),
        "use_beta_sigmas": low + (high - low) * beta.ppf(1 - ramp, 0.6, 0.6),
    }
    for option, formula in expected.items():
        zero = with_times(DPMSolverPPScheduler(**STABLE_DIFFUSION, **{option: True}), 12)
        np.testing.assert_allclose(levels(zero), [*formula, 0.0], rtol=1e-6)
        # Down to sigma_min the last level is the end.
        minimal = {**STABLE_DIFFUSION, option: True, "final_sigmas_type": "sigma_min"}
        np.testing.assert_allclose(levels(with_times(DPMSolverPPScheduler(**minimal), 11)), formula, rtol=1e-6)


def test_edm_levels():
    """Equation 5 of arXiv 2206.00364, and its labels ``ln(sigma) / 4``."""
    for rho in (7.0, 3.0):
        scheduler = with_times(DPMSolverPPScheduler(**{**EDM, "rho": rho}), 10)
        i = np.arange(10)
        expected = (80 ** (1 / rho) + i / 9 * (0.002 ** (1 / rho) - 80 ** (1 / rho))) ** rho
        np.testing.assert_allclose(levels(scheduler), [*expected, 0.0], rtol=1e-6)
        np.testing.assert_allclose(labels(scheduler), np.log(expected) / 4, rtol=1e-6)
    assert scheduler.init_noise_sigma == pytest.approx(math.sqrt(80**2 + 1))
    exponential = with_times(DPMSolverPPScheduler(**EDM, sigma_schedule="exponential"), 10)
    np.testing.assert_allclose(np.diff(np.log(levels(exponential)[:-1])), math.log(0.002 / 80) / 9, rtol=1e-5)


@pytest.mark.parametrize("scheduler_class", [DPMSolverPPScheduler, DEISScheduler, UniPCScheduler])
@pytest.mark.parametrize("spacing", SPACINGS)
def test_fractional_labels_are_exact(scheduler_class, spacing):
    """On a VP schedule they name the level to more digits than the table has; without them labels are integers."""
    options = {**STABLE_DIFFUSION, **SPACINGS[spacing]}
    rounded, exact = (
        with_times(scheduler_class(**options, fractional_timesteps=fractional), 7) for fractional in (False, True)
    )
    assert rounded.timesteps.dtype == torch.int64
    assert np.abs(labels(exact) - labels(rounded)).max() <= (1.0 if spacing != "leading" else 8.0)
    table = np.log(levels_of_training(exact))
    # Between two training timesteps diffusers is linear in the level one way and in its logarithm the other.
    error = np.interp(labels(exact), np.arange(1000), table) - np.log(levels(exact)[:-1])
    assert np.abs(error).max() < 2e-2
    assert np.isin(labels(exact) % 1.0, [0.0]).sum() < 7 or spacing in ("linspace", "trailing", "leading")


def levels_of_training(scheduler: Any) -> np.ndarray:
    cumulated = scheduler.alphas_cumprod.double().numpy()
    return np.asarray(np.sqrt((1 - cumulated) / cumulated))


def test_zero_terminal_snr_starts_at_the_last_timestep():
    for scheduler_class in (DPMSolverPPScheduler, DEISScheduler, UniPCScheduler):
        scheduler = with_times(scheduler_class(**ZERO_SNR), 5)
        assert scheduler.timesteps.tolist() == [999, 799, 599, 399, 199]
        assert float(scheduler.sigmas[0]) == pytest.approx(4096.0, rel=1e-3)


def test_lambda_min_clipped_drops_noisy_timesteps():
    options = {"beta_schedule": "squaredcos_cap_v2", "timestep_spacing": "linspace"}
    for bound in (-5.1, -2.0, 1.0):
        scheduler = with_times(DPMSolverPPScheduler(**options, lambda_min_clipped=bound), 10)
        table = -np.log(levels_of_training(scheduler))
        first = int(scheduler.timesteps[0])
        assert table[first] >= bound > table[first + 1]


# ------------------------------------------------------------------------------------------------ custom times


@pytest.mark.parametrize("scheduler_class", [DPMSolverPPScheduler, DEISScheduler, UniPCScheduler])
@pytest.mark.parametrize("form", [list, tuple, np.array, torch.tensor])
def test_custom_timesteps_are_kept(scheduler_class, form):
    given = [951, 800, 433, 12]
    scheduler = with_times(scheduler_class(**STABLE_DIFFUSION), timesteps=form(given))
    assert scheduler.timesteps.tolist() == given
    table = levels_of_training(scheduler)
    np.testing.assert_allclose(levels(scheduler)[:-1], table[given], rtol=1e-6)
    fractional = with_times(scheduler_class(**STABLE_DIFFUSION), timesteps=form([951.5, 800.25, 12.0]))
    assert fractional.timesteps.tolist() == [951.5, 800.25, 12.0]
    assert table[951] < levels(fractional)[0] < table[952]


@pytest.mark.parametrize("model", ["vp", "flow", "edm"])
@pytest.mark.parametrize("scheduler_class", [DPMSolverPPScheduler, DEISScheduler, UniPCScheduler])
@pytest.mark.parametrize("form", [list, np.array, lambda v: np.array(v, np.float32), torch.tensor])
def test_custom_sigmas_are_kept(scheduler_class, form, model):
    """With the terminal level or without it."""
    config = {"vp": STABLE_DIFFUSION, "flow": {**FLOW, "flow_shift": 1.0}, "edm": EDM}[model]
    given = [0.93, 0.7, 0.31, 0.05]
    for end, times in ((0.0, [*given, 0.0]), (0.0, given)):
        scheduler = with_times(scheduler_class(**config, final_sigmas_type="zero"), sigmas=form(times))
        np.testing.assert_array_equal(levels(scheduler), np.float32([*given, end]).astype(np.float64))
        assert len(scheduler.timesteps) == 4
    if model == "flow":
        np.testing.assert_allclose(labels(scheduler), [930, 700, 310, 50], rtol=1e-6)
    if model == "edm":
        np.testing.assert_allclose(labels(scheduler), np.log(given) / 4, rtol=1e-6)
    minimal = scheduler_class(**config, final_sigmas_type="sigma_min")
    low = minimal.schedule.min_level
    for times in (given, [*given, low]):
        with_times(minimal, sigmas=form(times))
        np.testing.assert_allclose(levels(minimal), [*given, low], rtol=1e-6)


def test_sigmas_and_timesteps_together():
    """The levels of one list, the labels of the other."""
    scheduler = DPMSolverPPScheduler(**STABLE_DIFFUSION)
    for sigmas in ([9.0, 2.0, 0.4], [9.0, 2.0, 0.4, 0.0]):
        with_times(scheduler, sigmas=sigmas, timesteps=[950, 500, 100])
        assert scheduler.timesteps.tolist() == [950, 500, 100]
        np.testing.assert_allclose(levels(scheduler), [9.0, 2.0, 0.4, 0.0], rtol=1e-6)
    with pytest.raises(ValueError, match=r"timesteps has 2 .* sigmas 3"):
        with_times(scheduler, sigmas=[9.0, 2.0, 0.4], timesteps=[950, 500])


def test_custom_sigmas_of_flow_models_are_shifted():
    """As diffusers does, and as the pipelines that hand them over expect."""
    scheduler = with_times(UniPCScheduler(**FLOW), sigmas=[0.9, 0.5, 0.2])
    expected = [3 * s / (1 + 2 * s) for s in (0.9, 0.5, 0.2)]
    np.testing.assert_allclose(levels(scheduler), [*expected, 0.0], rtol=1e-6)
    np.testing.assert_allclose(labels(scheduler), 1000 * np.array(expected), rtol=1e-6)


def test_denoise_to_zero_is_one_more_call():
    options = {**STABLE_DIFFUSION, "final_sigmas_type": "sigma_min"}
    plain, more = (with_times(DPMSolverPPScheduler(**options, denoise_to_zero=more), 6) for more in (False, True))
    assert more.timesteps.tolist() == [*plain.timesteps.tolist(), 0]
    np.testing.assert_array_equal(levels(more), [*levels(plain), 0.0])


# ------------------------------------------------------------------------------------------------ shifts


@pytest.mark.parametrize("shift", [1.0, 3.0, 5.0])
def test_static_shift(shift):
    """Equation 23 of arXiv 2403.03206 on diffusers' uniform levels."""
    scheduler = with_times(DPMSolverPPScheduler(**{**FLOW, "flow_shift": shift}), 10)
    s = np.linspace(0, 0.999, 11)[:0:-1]
    np.testing.assert_allclose(levels(scheduler), [*(shift * s / (1 + (shift - 1) * s)), 0.0], rtol=1e-6)


@pytest.mark.parametrize("mu", [0.5, 1.15, 2.0])
@pytest.mark.parametrize("kind", ["exponential", "linear"])
def test_dynamic_shift(kind, mu):
    """The static shift by ``exp(mu)`` or ``mu``; without touching the config."""
    options = {**FLOW, "flow_shift": 7.0, "use_dynamic_shifting": True, "time_shift_type": kind}
    factor = math.exp(mu) if kind == "exponential" else mu
    for scheduler_class in (DPMSolverPPScheduler, DEISScheduler, UniPCScheduler):
        dynamic = scheduler_class(**options)
        before = dict(dynamic.config)
        static = with_times(scheduler_class(**{**FLOW, "flow_shift": factor}), 8)
        np.testing.assert_allclose(levels(with_times(dynamic, 8, mu=mu)), levels(static), rtol=1e-6)
        assert dict(dynamic.config) == before
        sigmas = np.linspace(0.95, 0.1, 5)
        shifted = with_times(dynamic, sigmas=sigmas, mu=mu)
        np.testing.assert_allclose(levels(shifted)[:-1], factor * sigmas / (1 + (factor - 1) * sigmas), rtol=1e-6)
        # The same count with another mu is another run.
        assert float(with_times(dynamic, 8, mu=mu + 0.5).sigmas[3]) > float(static.sigmas[3])


@pytest.mark.parametrize("scheduler_class", [DPMSolverPPScheduler, UniPCScheduler])
@pytest.mark.parametrize("terminal", [0.1, 0.02])
def test_shift_terminal_moves_the_last_level_before_the_end(scheduler_class, terminal):
    for steps in (2, 8, 30):
        scheduler = with_times(scheduler_class(**FLOW, shift_terminal=terminal), steps)
        assert levels(scheduler)[-2] == pytest.approx(terminal, rel=1e-5)
        assert levels(scheduler)[-1] == 0.0
        assert levels(scheduler)[0] > 0.99


def test_one_step_of_every_spacing():
    for spacing in SPACINGS.values():
        for scheduler_class in (DPMSolverPPScheduler, DEISScheduler, UniPCScheduler):
            scheduler = with_times(scheduler_class(**STABLE_DIFFUSION, **spacing), 1)
            assert len(scheduler.timesteps) == 1
            assert len(scheduler.sigmas) == 2
            assert scheduler.sigmas[0] > scheduler.sigmas[1]


@pytest.mark.parametrize("scheduler_class", [DPMSolverPPScheduler, DEISScheduler, UniPCScheduler])
def test_one_step_of_flow_models(scheduler_class):
    """From the noisy end to the image, whatever is asked of the levels between."""
    for options in ({}, {"shift_terminal": 0.1}, *({key: True} for key in ("use_karras_sigmas", "use_lu_lambdas"))):
        scheduler = with_times(scheduler_class(**FLOW, **options), 1)
        assert levels(scheduler)[0] > 0.99
        assert levels(scheduler)[1] == 0.0
        pipelines = with_times(scheduler_class(**FLOW, **options), sigmas=[1.0])
        assert levels(pipelines)[0] == pytest.approx(1.0, abs=2e-6)
        assert len(pipelines.timesteps) == 1


def test_a_run_on_a_device_begins_where_its_label_lies() -> None:
    """Image to image without begin_index: nothing is read from the device, which meta could not."""
    for label in (lambda t: t, lambda t: t.expand(2)):
        scheduler = SAMPLERS["unipc"].build(STABLE_DIFFUSION)
        scheduler.set_timesteps(10, device="meta")
        x = torch.zeros(2, 3, device="meta")
        for k, t in enumerate(scheduler.timesteps[6:]):
            scheduler.step(x, label(t), x)
            assert scheduler.step_index == 7 + k
