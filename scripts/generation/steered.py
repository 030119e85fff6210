"""Makes the images of a steered run: each from a population, tree or search of its own.

Image ``i`` has the seed ``SEED + i``, and everything random of its population follows from it. One population is one
unit of work, so images are the same bit for bit whatever else the run makes.
"""

from __future__ import annotations

from typing import Any

import torch
from PIL import Image

from fewstep.guidance import FeynmanKacScheduler
from fewstep.samplers import Denoiser, PlanScheduler
from fewstep.samplers.loop import tried
from fewstep.samplers.options import DEFAULTS

from .arguments import pipeline_inputs
from .choices import unknown
from .model import Model
from .record import Settings
from .rewards import WatchedReward, load_scores, whole_batch
from .schedulers import check_options
from .steering import POPULATION, Steering
from .steering_methods import RUNS, Work


class Steerer:
    """Makes steered images, one at a time.

    Args:
        settings: with steering.
        model: the model they name.
        scheduler: for the steps of all images.
        steps: of the scheduler.

    Raises:
        ValueError: the method, its options or rewards do not fit the model or the scheduler.
    """

    def __init__(self, settings: Settings, model: Model, scheduler: PlanScheduler, steps: int) -> None:
        assert settings.steering is not None
        self._settings, self._model, self._steering = settings, model, settings.steering
        self._scheduler, self._steps = scheduler, steps
        self._scores = load_scores(self._steering, model)
        _check_noise(self._steering, scheduler, steps)
        RUNS[self._steering.method](self._work(0))  # so that the method sees its options

    @torch.no_grad()
    def make(self, index: int) -> tuple[Image.Image, dict[str, Any]]:
        """An image, and the account of it: reward, network calls, history, effective sample sizes.

        Network calls are counted for each sample, by the denoiser; both branches of guidance are one.
        """
        work = self._work(index)
        found = RUNS[self._steering.method](work)()
        account: dict[str, Any] = {"network_calls": work.denoiser.evaluations}
        if work.reward is not None:
            account["reward"] = work.reward.value_of(found.sample)
            account["history"] = work.reward.history
        if found.effective_sample_sizes is not None:
            account["effective_sample_sizes"] = found.effective_sample_sizes
        images = work.denoiser.decode(whole_batch(work.denoiser, found.sample))
        if not isinstance(images, list) or not isinstance(images[0], Image.Image):
            name = type(self._model.pipeline).__name__
            raise ValueError(f"model {self._settings.model!r} ({name}) does not return images")
        return images[0], account

    def _work(self, index: int) -> Work:
        steering, model = self._steering, self._model
        several = 1 if steering.method in ("dts", "dts-star") else steering.particles
        inputs = pipeline_inputs(self._settings, model, [index])
        denoiser = Denoiser.from_pipeline(model.pipeline, num_images_per_prompt=several, **inputs)
        reward = None
        if self._scores:
            reward = WatchedReward(self._scores, model, denoiser, steering.rewards)
        scheduler = self._scheduler
        if steering.kind.noise != "own":
            scheduler.guide(None)
        else:
            scheduler = corrected_scheduler(self._settings, model, self._steps, seed=self._settings.seed_of(index))
        return Work(steering, model, scheduler, self._steps, denoiser, reward, self._settings.seed_of(index))


def corrected_scheduler(settings: Settings, model: Model, steps: int, *, seed: int | None = None) -> PlanScheduler:
    """The scheduler of Feynman-Kac correctors, tried at a number of steps.

    Raises:
        ValueError: an option is unknown or refused, or there is nothing to correct.
    """
    steering = settings.steering
    assert steering is not None
    options = steering.options
    guided = settings.guidance_scale is not None and settings.guidance_scale > 1.0
    if options["exponent"] == 1.0 and not guided and not steering.rewards:
        raise ValueError(
            "steer fkc has nothing to do: give --guidance-scale above 1, --steer-option exponent=... or --reward"
        )
    for name in settings.options:
        if name not in DEFAULTS:
            raise unknown("option of the sampler of fkc", name, DEFAULTS)
    check_options(FeynmanKacScheduler, settings.options, "of fkc")
    given = settings.options if settings.preset is None else {"preset": settings.preset, **settings.options}
    scheduler: PlanScheduler = FeynmanKacScheduler.from_config(
        model.scheduler_config,
        exponents=[float(options["exponent"])],
        particles=steering.particles,
        seeds=seed,
        **{name: options[name] for name in ("churn", "solver_order", *POPULATION)},
        **given,
    )
    if not scheduler.config.get("use_dynamic_shifting"):
        scheduler.set_timesteps(steps)
    return scheduler


def _check_noise(steering: Steering, scheduler: PlanScheduler, steps: int) -> None:
    """Refuses a sampler that draws no noise where copies must part, and one that does where noise must tell all."""
    if steering.kind.noise not in ("needed", "refused"):
        return
    noisy = tried(scheduler, steps).plan.is_stochastic
    if steering.kind.noise == "needed" and not noisy:
        raise ValueError(
            f"steer {steering.method} needs a sampler that draws noise, and this one draws none in {steps} steps; take "
            "sde-dpm++ or leave --sampler out, with 2 steps or more"
        )
    if steering.kind.noise == "refused" and noisy:
        raise ValueError(
            f"steer {steering.method} needs a sampler that draws no noise of its own; take dpm++ or leave --sampler out"
        )
