"""Configs of all of diffusers' schedulers: read as what they mean, or refused, and never taken for something else."""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping
from typing import Any

import diffusers.schedulers
import pytest
import torch
from diffusers import ConfigMixin

from fewstep.samplers import DEISScheduler, DPMSolverPPScheduler, UniPCScheduler

OURS: list[Any] = [DPMSolverPPScheduler, DEISScheduler, UniPCScheduler]

# Variance preserving, rectified flow and EDM models, which our schedulers sample.
READ = {
    "vp": (
        "DDIMInverseScheduler",
        "DDIMParallelScheduler",
        "DDIMScheduler",
        "DDPMParallelScheduler",
        "DDPMScheduler",
        "DEISMultistepScheduler",
        "DPMSolverMultistepInverseScheduler",
        "DPMSolverMultistepScheduler",
        "DPMSolverSDEScheduler",
        "DPMSolverSinglestepScheduler",
        "EulerAncestralDiscreteScheduler",
        "EulerDiscreteScheduler",
        "HeunDiscreteScheduler",
        "KDPM2AncestralDiscreteScheduler",
        "KDPM2DiscreteScheduler",
        "LCMScheduler",
        "LMSDiscreteScheduler",
        "PNDMScheduler",
        "RePaintScheduler",
        "SASolverScheduler",
        "TCDScheduler",
        "UniPCMultistepScheduler",
    ),
    "flow": ("FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler", "FlowMatchLCMScheduler"),
    "edm": ("EDMDPMSolverMultistepScheduler", "EDMEulerScheduler"),
}
# Other processes, other outputs of the network or other time labels.
REFUSED = (
    "CMStochasticIterativeScheduler",
    "ConsistencyDecoderScheduler",
    "DDPMWuerstchenScheduler",
    "FlowMapEulerDiscreteScheduler",
    "IPNDMScheduler",
    "KarrasVeScheduler",
    "PiflowScheduler",
    "SCMScheduler",
    "ScoreSdeVeScheduler",
    "ScoreSdeVpScheduler",
)


def stock_classes() -> dict[str, Any]:
    """The scheduler classes that can be made here without arguments."""
    found = {}
    for name in dir(diffusers.schedulers):
        cls = getattr(diffusers.schedulers, name)
        if inspect.isclass(cls) and issubclass(cls, ConfigMixin):
            try:
                cls()
            except (TypeError, ImportError):
                continue
            found[name] = cls
    return found


STOCK = stock_classes()
KINDS = {name: kind for kind, names in READ.items() for name in names if name in STOCK}
OTHERS = sorted(set(STOCK) - set(KINDS) - set(REFUSED))


def config_of(name: str, form: str, **options: Any) -> Mapping[str, Any]:
    """A new object's config, which marks its defaults and tells no class, or a file's, the other way round."""
    scheduler = STOCK[name](**options)
    if form == "object":
        assert "_class_name" not in scheduler.config
        return scheduler.config  # type: ignore[no-any-return]
    data: Mapping[str, Any] = json.loads(scheduler.to_json_string())
    assert data["_class_name"] == name
    return data


def assert_same_model(ours: Any, theirs: Any) -> None:
    kind = KINDS.get(type(theirs).__name__, ours.schedule.kind)
    assert ours.schedule.kind == kind
    assert ours.config.num_train_timesteps == theirs.config.num_train_timesteps
    if kind == "vp":
        torch.testing.assert_close(ours.alphas_cumprod, theirs.alphas_cumprod, rtol=1e-6, atol=0)
        assert ours.config.prediction_type == theirs.config.get("prediction_type", "epsilon")
    elif kind == "flow":
        assert ours.config.prediction_type == "flow_prediction"
        assert ours.config.flow_shift == theirs.config.shift
    else:
        for key in ("sigma_min", "sigma_max", "sigma_data", "prediction_type", "rho"):
            assert ours.config[key] == theirs.config[key]
    ours.set_timesteps(4)
    assert ours.sigmas.isfinite().all()


every_class = pytest.mark.parametrize("cls", OURS)
every_form = pytest.mark.parametrize("form", ["object", "file"])


@every_class
@every_form
@pytest.mark.parametrize("name", KINDS)
def test_the_config_of_a_model_that_can_be_sampled_is_read(name: str, form: str, cls: Any) -> None:
    assert_same_model(cls.from_config(config_of(name, form)), STOCK[name]())


@every_class
@every_form
@pytest.mark.parametrize("name", [name for name in REFUSED if name in STOCK])
def test_the_config_of_another_process_is_refused(name: str, form: str, cls: Any) -> None:
    config = config_of(name, form)
    if form == "object" and set(config) == set(STOCK["FlowMatchHeunDiscreteScheduler"]().config):
        pytest.skip("nothing in this config tells it from a flow matching one")
    keys = [key for key in config if not key.startswith("_")]
    with pytest.raises(ValueError, match="|".join([name, *keys])):
        cls.from_config(config)


@every_class
@every_form
@pytest.mark.parametrize("name", OTHERS)
def test_any_other_config_is_read_as_what_it_means_or_refused(name: str, form: str, cls: Any) -> None:
    theirs = STOCK[name]()
    try:
        ours = cls.from_config(config_of(name, form))
    except ValueError:
        return
    if hasattr(theirs, "alphas_cumprod"):
        assert_same_model(ours, theirs)
    else:
        assert "shift" in theirs.config or "RF" in name
        assert ours.schedule.kind == "flow"
        assert ours.config.prediction_type == "flow_prediction"


@every_class
@pytest.mark.parametrize("missing", ["VQDiffusionScheduler", "AmusedScheduler", "CosineDPMSolverMultistepScheduler"])
def test_configs_of_classes_that_cannot_be_made_here(missing: str, cls: Any) -> None:
    config = {
        "VQDiffusionScheduler": {"num_vec_classes": 100, "num_train_timesteps": 100},
        "AmusedScheduler": {"mask_token_id": 5, "masking_schedule": "cosine"},
        "CosineDPMSolverMultistepScheduler": {
            "sigma_min": 0.3,
            "sigma_max": 500,
            "sigma_data": 1.0,
            "sigma_schedule": "exponential",
            "num_train_timesteps": 1000,
            "solver_order": 2,
            "prediction_type": "v_prediction",
            "solver_type": "midpoint",
        },
    }[missing]
    with pytest.raises(ValueError, match=missing):
        cls.from_config({"_class_name": missing, **config})


@every_class
@every_form
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("FlowMatchEulerDiscreteScheduler", {"invert_sigmas": True}),
        ("EulerDiscreteScheduler", {"timestep_type": "continuous", "sigma_max": 700.0}),
    ],
)
def test_options_that_no_sampler_here_has_are_refused(name: str, options: dict[str, Any], form: str, cls: Any) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        cls.from_config(config_of(name, form, **options))


@every_class
def test_spacings_of_flow_configs_are_kept(cls: Any) -> None:
    for name in ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas"):
        ours = cls.from_config(STOCK["FlowMatchEulerDiscreteScheduler"](**{name: True}).config)
        assert ours.config[name] is True
        ours.set_timesteps(5)
        assert ours.sigmas.isfinite().all()
        assert 0.9 < float(ours.sigmas[0]) <= 1.0


@every_class
def test_foreign_option_values_are_mapped(cls: Any) -> None:
    """Every value that diffusers' multistep family writes for options of ours."""
    for solver_type in ("midpoint", "heun", "logrho", "bh1", "bh2"):
        scheduler = cls.from_config({"solver_type": solver_type})
        scheduler.set_timesteps(4)
        assert scheduler.sigmas.isfinite().all()
    algorithms = ["dpmsolver", "dpmsolver++", "data_prediction", "noise_prediction", "deis"]
    if cls is not DEISScheduler:
        algorithms += ["sde-dpmsolver++"]
    for algorithm_type in algorithms:
        scheduler = cls.from_config({"algorithm_type": algorithm_type})
        scheduler.set_timesteps(4)
        assert scheduler.sigmas.isfinite().all()


@every_class
def test_compatible_classes_are_named(cls: Any) -> None:
    names = {found.__name__ for found in cls().compatibles}
    assert {"DPMSolverMultistepScheduler", "EulerDiscreteScheduler", "FlowMatchEulerDiscreteScheduler"} <= names
