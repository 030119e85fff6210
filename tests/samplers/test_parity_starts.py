"""Same images as diffusers' classes from custom timesteps, from later starts and in single precision."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch

from analytic import EDM, FLOW, STABLE_DIFFUSION, ZERO_SNR, sample
from comparison import Comparison, TheirDEIS, TheirDPM, TheirEDM, TheirSinglestep, TheirUniPC, noise
from fewstep.samplers import DEISScheduler, DPMSolverPPScheduler, UniPCScheduler


@pytest.mark.parametrize(
    "timesteps", [[999], [999, 500], [900, 700, 400, 100, 10], list(range(990, -1, -90)), [999, 998, 997, 3, 2, 1, 0]]
)
def test_custom_timesteps(timesteps):
    comparison = Comparison()
    for order, algorithm, final in product((1, 2, 3), ("dpmsolver++", "sde-dpmsolver++"), ("zero", "sigma_min")):
        if final == "sigma_min" and timesteps[-1] == 0:
            continue  # the last step would have no length
        options = {**STABLE_DIFFUSION, "solver_order": order, "algorithm_type": algorithm, "final_sigmas_type": final}
        theirs = TheirDPM(**options)
        ours = DPMSolverPPScheduler.from_config(theirs.config, diffusers_third_order=True)
        comparison.images(theirs, ours, ("multi", order, algorithm, final), timesteps=timesteps)
        single = TheirSinglestep(**options, lower_order_final=True)
        ours = DPMSolverPPScheduler.from_config(single.config, method="singlestep", diffusers_third_order=True)
        comparison.images(single, ours, ("single", order, algorithm, final), timesteps=timesteps)
    comparison.report(1)


@pytest.mark.parametrize("begin", [0, 1, 2, 5, 7, 19])
def test_image_to_image(begin):
    comparison = Comparison()
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
        comparison.images(theirs, ours, case, run={"begin": begin}, num_inference_steps=steps)
        for scheduler in (theirs, ours):
            scheduler.set_timesteps(steps)
            scheduler.set_begin_index(begin)
        at = ours.timesteps[begin : begin + 1].repeat(2)
        noisy = [s.add_noise(noise(0.5), noise(), at) for s in (theirs, ours)]
        torch.testing.assert_close(noisy[1], noisy[0], rtol=0, atol=2e-6)
    comparison.report(1)


def test_zero_snr_config_names_the_same_levels():
    theirs = TheirDPM(**ZERO_SNR)
    theirs.set_timesteps(10)
    ours = DPMSolverPPScheduler.from_config(theirs.config)
    ours.set_timesteps(10)
    torch.testing.assert_close(ours.sigmas, theirs.sigmas, rtol=2e-7, atol=0)


PAIRS: list[tuple[Any, Any, dict[str, Any]]] = [
    *((TheirDPM, DPMSolverPPScheduler, {"solver_order": k, "diffusers_third_order": True}) for k in (1, 2, 3)),
    (TheirDPM, DPMSolverPPScheduler, {"algorithm_type": "sde-dpmsolver++"}),
    (TheirSinglestep, DPMSolverPPScheduler, {"method": "singlestep"}),
    (TheirDEIS, DEISScheduler, {}),
    *((TheirUniPC, UniPCScheduler, {"solver_order": k}) for k in (1, 2, 3)),
]


@pytest.mark.parametrize("model", [STABLE_DIFFUSION, ZERO_SNR, FLOW, EDM], ids=["vp", "zero_snr", "flow", "edm"])
def test_single_precision(model):
    """In the dtype that pipelines run in, as diffusers ships it: equal to float32 rounding."""
    pairs = [(TheirEDM, DPMSolverPPScheduler, {})] if model is EDM else PAIRS
    compared = 0
    for (their_class, our_class, options), steps in product(pairs, (5, 20)):
        if their_class is TheirDEIS and model is not STABLE_DIFFUSION:
            continue  # it has no zero terminal SNR, and stops flow runs early
        if their_class is TheirSinglestep and model is ZERO_SNR:
            continue  # it has none
        known = {key: value for key, value in options.items() if key not in ("method", "diffusers_third_order")}
        theirs = their_class(**model, **known)
        ours = our_class.from_config(theirs.config, **options)
        images = []
        for scheduler in (theirs, ours):
            scheduler.set_timesteps(steps)
            start = noise(float(scheduler.init_noise_sigma), torch.float32)
            images.append(sample(scheduler, start, seed=3 if "sde" in str(options) else None))
        assert images[1].dtype == torch.float32
        bound = 2e-5 * float(images[0].abs().max())
        torch.testing.assert_close(
            images[1], images[0], rtol=0, atol=bound, msg=lambda m, c=(options, steps): f"{c}: {m}"
        )
        compared += 1
    assert compared >= 2
