"""Where our times differ from diffusers' on purpose: which of the two is right."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from analytic import EDM, FLOW, STABLE_DIFFUSION, labels, sample
from comparison import (
    RESPACINGS,
    TRUTH,
    TheirDEIS,
    TheirDPM,
    TheirEDM,
    TheirSinglestep,
    TheirUniPC,
    error_of,
    in_double,
    noise,
)
from fewstep.samplers import DEISScheduler, DPMSolverPPScheduler, UniPCScheduler

COSINE = {"beta_schedule": "squaredcos_cap_v2"}
TOLERANCE = 5e-5


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
        theirs.sigmas = theirs.sigmas.double()
        start = noise()
        with in_double(theirs):
            stopped = sample(theirs, start)
        torch.testing.assert_close(sample(ours, start, stop=steps - 1), stopped, rtol=0, atol=1e-4)
        assert float(theirs.sigmas[-1]) > 0.05
        assert float(ours.sigmas[-1]) == 0.0
        assert error_of(ours, steps) < 0.8 * error_of(theirs, steps)


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
    theirs = TheirDPM(**COSINE, use_karras_sigmas=True)
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
    theirs = their_class(**COSINE, use_karras_sigmas=True, prediction_type="v_prediction")
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
