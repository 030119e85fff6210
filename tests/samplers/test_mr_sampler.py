"""The scheduler of mean-reverting diffusion: forward process, times, dtypes, saving, and refusals."""

from __future__ import annotations

import math
from typing import Any

import diffusers
import numpy as np
import pytest
import torch

from fewstep.samplers.mr_sampler import MRSamplerScheduler
from mean_reverting import SIGMA_INF, tensor


def test_the_forward_process_and_its_velocity() -> None:
    scheduler = MRSamplerScheduler()
    generator = torch.Generator().manual_seed(7)
    clean, mu, noise = torch.rand(3, 2, 1, 4, 4, generator=generator, dtype=torch.float64)
    scheduler.set_condition(mu)
    alpha = torch.tensor([0.985365, 0.195370], dtype=torch.float64).view(2, 1, 1, 1)
    w = (1 - alpha**2).sqrt()
    labels = torch.tensor([10, 60])
    noised = alpha * clean + (1 - alpha) * mu + SIGMA_INF * w * noise
    torch.testing.assert_close(scheduler.add_noise(clean, noise, labels), noised, rtol=0, atol=3e-6)
    velocity = alpha * SIGMA_INF * noise - w * (clean - mu)
    torch.testing.assert_close(scheduler.get_velocity(clean, noise, labels), velocity, rtol=0, atol=3e-6)
    torch.testing.assert_close(scheduler.prior_sample(noise), mu + SIGMA_INF * noise)


def test_the_times_of_a_run_are_fractions_of_all_labels() -> None:
    scheduler = MRSamplerScheduler()
    scheduler.set_timesteps(8)
    assert scheduler.timesteps.tolist() == [100.0, 87.5, 75.0, 62.5, 50.0, 37.5, 25.0, 12.5]
    assert scheduler.sigmas[-1] == 0.0
    assert scheduler.sigmas[0] == pytest.approx(math.sqrt(1 - 0.005**2) / 0.005, rel=1e-6)


def test_levels_below_the_released_tables_get_their_first_label() -> None:
    scheduler = MRSamplerScheduler(mr_sampler_tables=True)
    scheduler.set_timesteps(sigmas=[1.0, 0.005, 0.0])
    assert scheduler.timesteps[-1] == 0.0
    assert 0.0 < scheduler.timesteps[0] < 100.0


def test_a_run_begins_at_the_first_call_of_a_step() -> None:
    scheduler = MRSamplerScheduler(solver="deis-rk4")
    assert scheduler.order == 4
    scheduler.set_timesteps(5)
    scheduler.set_condition(tensor(0.4))
    scheduler.set_begin_index(4)
    assert len(scheduler.plan) == len(scheduler.timesteps) - 4
    scheduler.set_begin_index(5)
    with pytest.raises(ValueError, match="begin_index 5 lies inside a step; use the first of its 4 calls"):
        scheduler.step(tensor(0.0), scheduler.timesteps[5], tensor(0.5))


def test_half_precision_comes_back_and_is_computed_in_float32() -> None:
    scheduler = MRSamplerScheduler(prediction_type="sample")
    mu = torch.rand(1, 1, 4, 4, generator=torch.Generator().manual_seed(8)).half()
    scheduler.set_condition(mu)
    scheduler.set_timesteps(1)
    result = scheduler.step(mu * 0.5, 100, mu + 0.1)
    assert not isinstance(result, tuple)
    assert result.prev_sample.dtype is result.pred_original_sample.dtype is torch.float16
    torch.testing.assert_close(result.prev_sample, mu * 0.5, rtol=0, atol=6e-4)


def test_a_saved_scheduler_makes_the_same_plan(tmp_path: Any) -> None:
    options = {"solver_order": 3, "solver_type": "bh1"}
    scheduler = MRSamplerScheduler(solver="unipc", solver_options=options, theta_schedule="linear", sigma_inf=0.1)
    scheduler.save_pretrained(tmp_path)
    loaded = MRSamplerScheduler.from_pretrained(tmp_path)
    for each in (scheduler, loaded):
        each.set_timesteps(5)
    assert loaded.plan == scheduler.plan
    assert loaded.config.sigma_inf == 0.1
    plain = MRSamplerScheduler(solver="unipc", theta_schedule="linear", sigma_inf=0.1)
    plain.set_timesteps(5)
    assert plain.plan != scheduler.plan


def test_a_run_without_a_fitting_condition_says_what_to_do() -> None:
    scheduler = MRSamplerScheduler()
    scheduler.set_timesteps(4)
    x = torch.zeros(2, 1, 4, 4)
    with pytest.raises(ValueError, match=r"mu is missing: .* set_condition\(mu\)"):
        scheduler.step(x, 100, x)
    with pytest.raises(ValueError, match="mu is missing"):
        scheduler.prior_sample(x)
    scheduler.set_condition(torch.zeros(1, 1, 4, 4))
    with pytest.raises(ValueError, match=r"mu has shape \(1, 1, 4, 4\) and the sample \(2, 1, 4, 4\)"):
        scheduler.step(x, 100, x)
    with pytest.raises(ValueError, match=r"mu is a tensor of torch.uint8; .* scaled to \[0, 1\]"):
        scheduler.set_condition(torch.zeros(2, 1, 4, 4, dtype=torch.uint8))
    with pytest.raises(ValueError, match="mu is ndarray; pass a floating point tensor"):
        scheduler.set_condition(np.zeros((2, 1, 4, 4)))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"theta_schedule": "quadratic"}, "theta_schedule 'quadratic' is unknown; use one of constant, linear, cosine"),
        ({"sigma_inf": 0.0}, "sigma_inf 0.0 must be positive"),
        ({"final_alpha": 1.0}, "final_alpha 1.0 must lie between 0 and 1"),
        ({"num_train_timesteps": 0}, "num_train_timesteps 0 must be a whole number of at least 2"),
        ({"solver": "heun"}, "solver 'heun' is unknown; use one of unipc"),
        ({"solver_options": {"damping": 0.5}}, "solver_options 'damping' is no option of solver 'dpm\\+\\+-heun'"),
        (
            {"solver": "ts-ddim", "solver_options": {"cutoff": 20}},
            "cutoff 20 of solver 'ts-ddim' .* give at least 100",
        ),
        ({"solver_options": {"solver_order": 4}}, "solver_order 4 must be 1, 2 or 3"),
        ({"prediction_type": "flow_prediction"}, "prediction_type 'flow_prediction' has no meaning"),
        ({"thresholding": True}, "thresholding True has no meaning"),
        ({"trained_betas": [0.1] * 100}, "trained_betas .*theta_schedule and sigma_inf describe the model"),
        ({"use_flow_sigmas": True}, "use_flow_sigmas True has no meaning"),
        ({"preset": "accurate"}, "preset 'accurate' was not measured for MRSamplerScheduler"),
    ],
)
def test_options_without_meaning_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MRSamplerScheduler(**options)


def test_the_config_of_another_process_is_refused() -> None:
    config = diffusers.DDIMScheduler(beta_schedule="scaled_linear").config
    with pytest.raises(
        ValueError, match="describes no mean-reverting diffusion; make the scheduler from theta_schedule"
    ):
        MRSamplerScheduler.from_config(config)
    with pytest.raises(ValueError, match="config of UniPCScheduler describes no mean-reverting"):
        MRSamplerScheduler.from_config({"_class_name": "UniPCScheduler", "num_train_timesteps": 1000})
    with pytest.raises(ValueError, match="beta_schedule 'scaled_linear' has no meaning in mean-reverting diffusion"):
        MRSamplerScheduler.from_config({"beta_schedule": "scaled_linear"})
    again = MRSamplerScheduler.from_config(MRSamplerScheduler(theta_schedule="constant").config, sigma_inf=0.2)
    assert (again.config.theta_schedule, again.config.sigma_inf) == ("constant", 0.2)
