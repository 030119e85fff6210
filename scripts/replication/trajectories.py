"""Claims on what else happens along a trajectory: Time-Shift, T-Stitch, and mean reversion."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from fewstep.metrics import Estimate
from fewstep.samplers import SAMPLERS

from ..bench.digits import generate
from ..bench.restore import MEASURES, Bench
from ..bench.restore import Settings as RestoreSettings
from ..bench.stitch import Curve
from ..bench.stitch import Settings as StitchSettings
from ..bench.variants import Variants
from ..generation.model import load_model
from .claims import Claim, Finding, Measurement, Scale, percent


def _time_shift(scale: Scale) -> Measurement:
    findings = []
    pairs = {
        "ddim": ("ts-ddim", "ts-ddim:shifted=node"),
        "ts-ddim:solver=f-pndm:window=0": ("ts-ddim:solver=f-pndm", "ts-ddim:solver=f-pndm:shifted=node"),
    }
    for model in ("digits-small",) if scale.quick else ("digits-small", "digits-large"):
        bench = Variants(model, 10, scale.images)
        for base, samplers in pairs.items():
            plain = bench.measure(base, 1.0)
            for name in samplers:
                figures = percent(plain.frechet, bench.measure(name, 1.0).frechet)
                findings.append(Finding(f"{model}, 10 steps, {name}: Frechet distance", *figures))
    return Measurement(findings)


def _stitch(scale: Scale) -> Measurement:
    settings = StitchSettings("digits-small", "digits-large", "dpm++", 20, scale.images, 1.0, 100, 0, "cpu")
    curve = Curve(settings)
    curve.warm_up()
    alone, *stitched = (curve.measure(fraction) for fraction in (0.0, 0.2, 0.4))
    return Measurement(
        [_no_loss(f"share {point.fraction:g}: Frechet distance", point.frechet - alone.frechet) for point in stitched]
    )


def _no_loss(setting: str, loss: Estimate) -> Finding:
    return Finding(setting, loss.value, *loss.interval(), 0.0, "no more than", "")


def _mean_reverting(scale: Scale) -> Measurement:
    count, calls, theirs = (40, (4,), 40) if scale.quick else (200, (10, 5), 100)
    settings = RestoreSettings("digits-restore", "", count, 0, "cpu")
    bench = Bench(settings, scale.data or _generated_digits(scale.folder / "digits.npz", count), 50)
    slow = bench.measure("euler", theirs)
    findings = []
    for steps in calls:
        point = bench.measure("mr-sde-2", steps)
        for name, measure in MEASURES.items():
            # A loss, whichever way the measure goes.
            base, other = slow.figures[name], point.figures[name]
            loss = other - base if measure.best < 0 else base - other
            setting = f"{steps} calls against {theirs} of the Euler reverse SDE: loss of {measure.title}"
            findings.append(_no_loss(setting, loss))
    return Measurement(findings)


def _generated_digits(path: Path, count: int) -> Path:
    """An archive of images that the large model made, for where there are no real ones."""
    if not path.exists():
        model = load_model("digits-large", "float32", "cpu")
        model.pipeline.scheduler = SAMPLERS["dpm++"].build(model.scheduler_config)
        images = generate(model.pipeline, range(count), steps=10, scale=2.0, seed=30_000)
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = images[:, 0].mul(255.0).round().byte().numpy()
        np.savez(path, x_test=pixels, y_test=np.arange(count) % 10)
    return path


CLAIMS = (
    Claim(
        "time-shift",
        "2305.15583",
        "Time-Shift",
        "At 10 calls shifted times lower the Frechet distance of DDIM and of F-PNDM.",
        "fewstep bench variants --samplers ddim,ts-ddim,ts-ddim:shifted=node --steps 10 --guidance-scale 1",
        _time_shift,
        "Latents have unit variance, by which samples of all times look alike; and digits-large is hardly biased.",
    ),
    Claim(
        "t-stitch",
        "2402.14167",
        "T-Stitch",
        "A small model makes the first 40 % of the steps at no loss.",
        "fewstep bench stitch",
        _stitch,
        "Here 30 % are free, and 40 % cost a little.",
    ),
    Claim(
        "mean-reverting",
        "2502.07856",
        "MR Sampler",
        "10 to 20 times fewer calls than the Euler reverse SDE at equal quality.",
        "fewstep bench restore --data mnist.npz",
        _mean_reverting,
    ),
)
