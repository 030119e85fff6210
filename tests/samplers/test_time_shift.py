"""Time-Shift: the shifts of the analysis, the identities of the method, and what reaches the network of a pipeline."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler, PNDMScheduler, UNet2DModel

from analytic import EDM, FLOW, MIXTURE, STABLE_DIFFUSION
from fewstep.samplers import SAMPLERS, DiscreteVPSchedule, EDMSchedule, FlowSchedule
from fewstep.samplers.schedule import schedule_from_config
from fewstep.samplers.time_shift import FPNDMScheduler, TimeShiftScheduler, best_coupling, candidate_times

LINEAR: dict[str, Any] = {"num_train_timesteps": 1000, "beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear"}
MODELS = {"vp": STABLE_DIFFUSION, "flow": FLOW, "edm": EDM}
SOLVERS = [*(name for name in SAMPLERS if not name.startswith("ts-")), "f-pndm"]
TIMES = [900, 800, 700, 550, 400, 300, 200, 100]


def linear_schedule() -> DiscreteVPSchedule:
    _, table = DiscreteVPSchedule.betas(1000, 1e-4, 0.02, "linear", None, False)
    return DiscreteVPSchedule(table)


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def with_variance(variances: list[float], elements: int = 64) -> torch.Tensor:
    """One sample a variance, exactly, with another mean each."""
    x = noise(len(variances), elements)
    x = (x - x.mean(1, keepdim=True)) / x.std(1, keepdim=True)
    means = torch.arange(len(variances), dtype=torch.float64)[:, None] - 1.0
    return x * torch.tensor(variances, dtype=torch.float64).sqrt()[:, None] + means


def lead_to(scheduler: TimeShiftScheduler, x: torch.Tensor, following: torch.Tensor) -> torch.Tensor:
    """The network's output with which a DDIM step of a clean-sample model gives a certain sample."""
    index = scheduler.step_index or 0
    call = scheduler.plan.calls[index]
    (row,) = call.rows
    terms = dict(row.terms)
    return (following - terms["sample"] * x) / terms["prediction"]


# ---------------------------------------------------------------------------------------------- published numbers


@pytest.mark.parametrize(
    ("window", "signal", "shifts"),
    [
        (1998, 0.25, [16, 18, 20, 25, 34, 44, 61, 94]),
        (8, 0.25, [4] * 8),
        (30, 0.25, [15] * 8),
        (80, 0.25, [16, 18, 20, 25, 34, 40, 40, 40]),
        (80, 0.5, [37, 40, 40, 40, 40, 40, 40, 40]),
    ],
)
def test_shifts_of_perfect_samples(window, signal, shifts):
    """The paper's criterion leaves out the variance of the signal and shifts perfect samples towards noise."""
    schedule = linear_schedule()
    for t, shift in zip(TIMES, shifts, strict=True):
        signal_share = float(schedule.alphas_cumprod[t])
        variance = torch.tensor([1.0 - signal_share + signal * signal_share], dtype=torch.float64)
        labels, targets = candidate_times(schedule, t, window)
        assert labels[best_coupling(variance, torch.from_numpy(targets))] == t + shift
        labels, targets = candidate_times(schedule, t, window, signal_variance=signal)
        assert labels[best_coupling(variance, torch.from_numpy(targets))] == t


def test_samples_of_the_forward_process_stay_where_they_are():
    """At the corrected criterion, up to the error of a variance of 3072 elements."""
    schedule, elements, v0 = linear_schedule(), 3072, 0.25
    x0, e = 0.5 * noise(64, elements, seed=1), noise(64, elements, seed=2)
    for t in (800, 500, 200):
        share = float(schedule.alphas_cumprod[t])
        variances = (share**0.5 * x0 + (1 - share) ** 0.5 * e).var(dim=1)
        labels, targets = candidate_times(schedule, t, 400, signal_variance=v0)
        shifts = labels[best_coupling(variances, torch.from_numpy(targets))] - t
        near = 1 - (1 - v0) * schedule.alphas_cumprod[t - 1 : t + 2].double().numpy()
        slope, variance = (near[2] - near[0]) / 2, near[1]
        allowed = np.sqrt(2 / elements) * variance / slope
        assert abs(shifts.mean()) < 0.5 + 4 * allowed / 8
        assert np.abs(shifts).max() < 0.5 + 5 * allowed


@pytest.mark.parametrize(
    ("factor", "options", "expected"),
    [
        (1.0, {"window": 0}, 0.1372),
        (1.0, {"window": 10}, 0.1325),
        (1.0, {"window": 40, "signal_variance": 0.25}, 0.1414),
        (1.02, {"window": 0}, 0.0952),
        (1.02, {"window": 10}, 0.1016),
        (1.02, {"window": 40}, 0.1137),
        (1.02, {"window": 40, "signal_variance": 0.25}, 0.1175),
        (0.98, {"window": 0}, 0.1922),
        (0.98, {"window": 10}, 0.1900),
    ],
)
def test_variance_of_gaussian_data_after_ten_steps(factor, options, expected):
    """Data N(0, 1/4) in 3072 dimensions, noise predictions exact but for a factor: +-0.001 by the seed, of both sides.

    The shift restores variance where noise is overestimated, and takes some away where it is not.
    """
    options = {**LINEAR, "cutoff": 200.0, "estimate": "sample", "shifted": "node", **options}
    scheduler = TimeShiftScheduler(**options)
    scheduler.set_timesteps(10)
    x = noise(64, 3072)
    table = scheduler.alphas_cumprod.double()
    for t in scheduler.timesteps:
        share = table[scheduler.model_timesteps(64)][:, None]
        x = scheduler.step(factor * (1 - share).sqrt() * x / (1 - 0.75 * share), t, x).prev_sample
    assert float(x.var(dim=1).mean()) == pytest.approx(expected, abs=0.0015)


def test_candidates_end_with_the_training_times():
    for schedule, ends in ((linear_schedule(), (0, 999)), (FlowSchedule(), (1, 999))):
        for t in (3.0, 996.0):
            labels, targets = candidate_times(schedule, t, 20)
            assert labels[0] == t
            assert (labels.min(), labels.max()) == (max(t - 10, ends[0]), min(t + 10, ends[1]))
            np.testing.assert_allclose(targets, schedule.alpha_sigma(schedule.level(labels))[1] ** 2)
    schedule = EDMSchedule(0.5)
    labels, targets = candidate_times(schedule, float(schedule.timestep(1.0)), 20, signal_variance=0.25)
    # A thousandth of the range of log(sigma) a candidate, and the variance of a variance exploding process.
    width = np.log(80 / 0.002) / 999
    np.testing.assert_allclose(np.sort(np.exp(4 * labels)), np.exp(width * np.arange(-10, 11)))
    np.testing.assert_allclose(targets, np.exp(8 * labels) + 0.25)


def test_of_equal_candidates_the_nearest_is_taken():
    assert best_coupling(torch.ones(2), torch.ones(9)).tolist() == [0, 0]


# ---------------------------------------------------------------------------------------------- the sampler beneath


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("name", SOLVERS)
def test_without_shifts_it_is_the_sampler_beneath(name, model):
    """Bit for bit: with no window, and with a cutoff above all times."""
    config = MODELS[model]
    base = FPNDMScheduler(**config) if name == "f-pndm" else SAMPLERS[name].build(config)
    x = noise(2, 3, 4, 4).float()

    def run(scheduler: Any) -> list[torch.Tensor]:
        scheduler.manual_seed(1).set_timesteps(5)
        sample, visited = x, [scheduler.timesteps.clone()]
        for t in scheduler.timesteps:
            sample = scheduler.step(torch.tanh(sample), t, sample, return_dict=False)[0]
            visited.append(sample)
        return [*visited, scheduler.timesteps]

    expected = run(base)
    for options in ({"window": 0}, {"window": 1}, {"cutoff": 1000.0}):
        shifted = TimeShiftScheduler.from_config(config, solver=name, **options)
        assert shifted.order == base.order
        for mine, theirs in zip(run(shifted), expected, strict=True):
            assert torch.equal(mine, theirs)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("name", SOLVERS)
def test_shifted_labels_change_nothing_but_labels(name, model):
    """A network that ignores its label gives the base's run; only first calls of steps above the cutoff move."""
    config = MODELS[model]
    base = FPNDMScheduler(**config) if name == "f-pndm" else SAMPLERS[name].build(config)
    shifted = TimeShiftScheduler.from_config(config, solver=name, window=60, cutoff=400.0)
    x = noise(2, 3, 4, 4) * base.init_noise_sigma
    samples = []
    for scheduler in (base, shifted):
        scheduler.manual_seed(1).set_timesteps(6)
        sample = x
        for t in scheduler.timesteps:
            sample = scheduler.step(0.5 * torch.tanh(sample), t, sample, return_dict=False)[0]
        samples.append(sample)
    assert torch.equal(*samples)
    unit = np.log(80 / 0.002) / 4 / 999 if model == "edm" else 1.0
    moved = (shifted.timesteps - base.timesteps).double() / unit
    assert moved[0] == 0
    assert moved.abs().max() <= 30 + 1e-3
    assert (moved != 0).any()
    positions = base.timesteps.double() if model != "edm" else (base.timesteps.double() - np.log(0.002) / 4) / unit
    assert (moved[positions <= 400] == 0).all()
    stages = [
        k for k, call in enumerate(base.plan) if call.level in [later.level for later in base.plan.calls[k + 1 :]]
    ]
    between = [k for k, call in enumerate(base.plan) if call.level not in base._grid.levels]
    assert (moved[stages + between] == 0).all()


# ---------------------------------------------------------------------------------------------- choices in a run


def test_the_batch_is_told_one_time_by_the_mean_of_its_variances():
    scheduler = TimeShiftScheduler(**LINEAR, prediction_type="sample", window=200, cutoff=0.0)
    scheduler.set_timesteps(timesteps=[900, 700, 500, 300])
    x, entries = noise(2, 64), iter(scheduler.timesteps)
    table = scheduler.alphas_cumprod.double()
    next(entries)
    for label in (730, 450, 399):
        # Far apart, so that neither sample's own choice is the batch's.
        target = float(1 - table[label])
        following = with_variance([0.9 * target, 1.1 * target])
        x = scheduler.step(lead_to(scheduler, x, following), scheduler.timesteps[0], x).prev_sample
        torch.testing.assert_close(x, following)
        assert int(next(entries)) == label
        assert scheduler.model_timesteps(4).tolist() == [label] * 4
    assert scheduler.timesteps.dtype == torch.int64
    scheduler.set_timesteps(timesteps=[900, 700, 500, 300])
    assert scheduler.timesteps.tolist() == [900, 700, 500, 300]


def test_each_sample_is_told_its_own_time():
    """Its shift depends on neither its mean nor its sign, nor on the other samples."""
    options = {**LINEAR, "prediction_type": "sample", "window": 200, "cutoff": 400.0, "estimate": "sample"}
    scheduler = TimeShiftScheduler(**options)
    scheduler.set_timesteps(timesteps=[900, 700, 500, 300])
    table = scheduler.alphas_cumprod.double()
    variances = [float(1 - table[label]) for label in (601, 660, 700, 790)]
    following = with_variance(variances)
    following = torch.cat([following, -following[:1], following[:1] + 7.0, with_variance([0.0, 50.0])])
    x = noise(8, 64)
    x = scheduler.step(lead_to(scheduler, x, following), 900, x).prev_sample
    expected = [601, 660, 700, 790, 601, 601, 600, 800]
    assert scheduler.model_timesteps(8).tolist() == expected
    assert scheduler.model_timesteps(16).tolist() == expected * 2
    assert scheduler.timesteps.tolist() == [900, 700, 500, 300]
    with pytest.raises(ValueError, match="batch 12 is no multiple of the 8"):
        scheduler.model_timesteps(12)
    scheduler.step(x, 700, x)
    with pytest.raises(ValueError, match="attach"):
        scheduler.step(x, 500, x)
    assert scheduler.model_timesteps(8).min() >= 400
    scheduler.step(x, 500, x)
    assert scheduler.model_timesteps(8).tolist() == [300] * 8


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("estimate", ["batch", "sample"])
def test_a_run_reads_nothing_from_the_device(estimate, model):
    """On the meta device whatever reads a value raises."""
    for shifted in ("label", "node") if model != "edm" else ("label",):
        scheduler = TimeShiftScheduler.from_config(MODELS[model], estimate=estimate, shifted=shifted, solver="unipc")
        scheduler.set_timesteps(6, device="meta")
        x = torch.empty(2, 4, 4, 4, device="meta", dtype=torch.bfloat16)
        for t in scheduler.timesteps:
            scheduler.scale_model_input(x, t)
            assert scheduler.model_timesteps(4).device.type == "meta"
            x = scheduler.step(x, t, x, return_dict=False)[0]
        assert x.dtype == torch.bfloat16


# ---------------------------------------------------------------------------------------------- shifted nodes


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
def test_ddim_steps_from_the_shifted_time(prediction_type):
    """Against diffusers' own DDIM, told for every sample that it stands at the shifted time."""
    options = {**LINEAR, "window": 60, "cutoff": 250.0, "estimate": "sample", "shifted": "node"}
    scheduler = TimeShiftScheduler(**options, prediction_type=prediction_type, final_sigmas_type="sigma_min")
    times = [900, 700, 500, 300, 100]
    scheduler.set_timesteps(timesteps=times)
    theirs = DDIMScheduler(**LINEAR, prediction_type=prediction_type, clip_sample=False, set_alpha_to_one=False)
    x = noise(3, 2, 8, 8) * torch.tensor([1.0, 0.9, 1.1], dtype=torch.float64).view(-1, 1, 1, 1)
    chosen = []
    for k, after in enumerate([*times[1:], 0]):
        labels = scheduler.model_timesteps(3).tolist()
        chosen.append(labels)
        # Nearly the network of a Gaussian, so that no sample leaves the window for good.
        call = scheduler.plan.calls[k]
        e = x * call.sigma / (call.sigma**2 + 0.25 * call.alpha**2) + 0.1 * torch.sin(3 * x)
        clean = (x - call.sigma * e) / call.alpha
        outputs = {"epsilon": e, "sample": clean, "v_prediction": call.alpha * e - call.sigma * clean}
        output = outputs[prediction_type]
        expected = []
        for b, label in enumerate(labels):
            # diffusers' previous time is a fixed distance away.
            theirs.num_inference_steps = 1
            theirs.register_to_config(num_train_timesteps=label - after)
            expected.append(theirs.step(output[b : b + 1], label, x[b : b + 1]).prev_sample)
        x = scheduler.step(output, times[k], x).prev_sample
        torch.testing.assert_close(x, torch.cat(expected), rtol=1e-5, atol=1e-5)
    assert any(len(set(labels)) > 1 for labels in chosen)


def test_shifted_nodes_keep_clean_sample_and_noise():
    """Whatever the solver: the sample and the output that it sees tell the network's clean sample and noise."""
    for model in ("vp", "flow"):
        for prediction_type in ("epsilon", "sample", "v_prediction", "flow_prediction"):
            config = {**MODELS[model], "prediction_type": prediction_type}
            scheduler = TimeShiftScheduler.from_config(config, shifted="node", window=80, cutoff=200.0)
            scheduler.set_timesteps(6)
            x = noise(2, 3, 4)
            x = scheduler.step(x, scheduler.timesteps[0], x).prev_sample
            tau, call = float(scheduler.timesteps[1]), scheduler.plan.calls[1]
            assert tau != call.timestep
            alpha, sigma = (float(v) for v in scheduler.schedule.alpha_sigma(scheduler.schedule.level(tau)))
            clean, e = noise(2, 2, 3, 4, seed=3)
            x = alpha * clean + sigma * e
            size = alpha + sigma if model == "flow" else 1.0
            output = {
                "epsilon": e,
                "sample": clean,
                "v_prediction": alpha * e - sigma * clean,
                "flow_prediction": e - clean,
            }[prediction_type]
            assert size == pytest.approx(1.0)
            result = scheduler.step(output, tau, x)
            torch.testing.assert_close(result.pred_original_sample, clean, rtol=1e-5, atol=1e-4)
            following = scheduler.plan.calls[2]
            torch.testing.assert_close(
                result.prev_sample, following.alpha * clean + following.sigma * e, rtol=1e-5, atol=1e-4
            )


# ---------------------------------------------------------------------------------------------- F-PNDM


def test_f_pndm_is_that_of_diffusers():
    """Their ten steps of a hundred timesteps; the last one does not move."""
    theirs = PNDMScheduler(**LINEAR, skip_prk_steps=False)
    theirs.set_timesteps(10)
    ours = FPNDMScheduler(**LINEAR)
    ours.set_timesteps(timesteps=[900, 800, 700, 600, 500, 400, 300, 200, 100])
    assert ours.timesteps.tolist() == theirs.timesteps.tolist()[:-1]
    assert len(ours.timesteps) == 9 + 9
    x = y = noise(2, 3, 4, 4)
    for t in ours.timesteps:
        x = ours.step(0.8 * torch.sin(2 * x) + 0.001 * t * x, t, x).prev_sample
        y = theirs.step(0.8 * torch.sin(2 * y) + 0.001 * t * y, t, y).prev_sample
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("steps", [1, 2, 3, 5, 12])
def test_f_pndm_is_exact_on_straight_lines(steps, model):
    """To the rounding of a network of clean samples, which a noise prediction divides by sigma."""
    scheduler = FPNDMScheduler.from_config(MODELS[model])
    scheduler.set_timesteps(steps)
    clean, e = noise(2, 2, 6)
    plan = scheduler.plan
    for call, t in zip(plan, scheduler.timesteps, strict=True):
        p, q = call.clean
        x = call.alpha * clean + call.sigma * e
        result = scheduler.step((clean - p * x) / q, t, x)
        k = scheduler.step_index
        alpha, sigma = (
            (plan.final_alpha, plan.final_sigma) if k == len(plan) else (plan.calls[k].alpha, plan.calls[k].sigma)
        )
        torch.testing.assert_close(result.prev_sample, alpha * clean + sigma * e, rtol=1e-9, atol=2e-9)


def test_f_pndm_is_of_second_order():
    def result(steps: int) -> torch.Tensor:
        levels = np.linspace(0.7, 0.2, steps + 1)
        scheduler = FPNDMScheduler(use_flow_sigmas=True, prediction_type="sample", final_sigmas_type="zero")
        scheduler.set_timesteps(sigmas=[*levels, 0.0])
        x = noise(8, 1)
        for call, t in zip(scheduler.plan.calls[:-1], scheduler.timesteps, strict=False):
            x = scheduler.step(MIXTURE.clean(x, call.alpha, call.sigma), t, x).prev_sample
        return x

    fine = result(3200)
    errors = [float((result(steps) - fine).abs().max()) for steps in (50, 100, 200)]
    orders = np.log2(np.array(errors[:-1]) / errors[1:])
    assert orders == pytest.approx(2.0, abs=0.3)


# ---------------------------------------------------------------------------------------------- pipelines


class Listening(UNet2DModel):
    """A small network that remembers its labels."""

    def forward(self, sample: torch.Tensor, timestep: Any, *args: Any, **kwargs: Any) -> Any:
        self.labels = [*getattr(self, "labels", []), timestep.flatten().tolist()]
        return super().forward(sample, timestep, *args, **kwargs)


def pipeline() -> DDIMPipeline:
    torch.manual_seed(0)
    unet = Listening(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        layers_per_block=1,
        block_out_channels=(8, 8),
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
    )
    return DDIMPipeline(unet.eval(), DDIMScheduler(**LINEAR))


class Loop:
    """An unmodified loop as in diffusers' pipelines, guidance by a doubled batch included."""

    def __init__(self, scheduler: TimeShiftScheduler, unet: torch.nn.Module) -> None:
        self.scheduler, self.unet = scheduler, unet

    @torch.no_grad()
    def __call__(self, x: torch.Tensor, steps: int) -> torch.Tensor:
        self.scheduler.set_timesteps(steps)
        for t in self.scheduler.timesteps:
            doubled = torch.cat([x, x])
            uncond, cond = self.unet(self.scheduler.scale_model_input(doubled, t), t).sample.chunk(2)
            x = self.scheduler.step(uncond + 2.0 * (cond - uncond), t, x).prev_sample
        return x


@pytest.mark.parametrize("inference", [False, True])
def test_the_network_of_an_unmodified_loop_hears_the_shifted_times(inference):
    pipe = pipeline()
    scheduler = TimeShiftScheduler.from_config(pipe.scheduler.config, window=40, cutoff=300.0)
    with torch.inference_mode(inference):
        Loop(scheduler, pipe.unet)(noise(2, 1, 8, 8).float(), 8)
    heard = [label for (label,) in pipe.unet.labels]
    assert heard == scheduler.timesteps.tolist()
    grid = [int(call.timestep) for call in scheduler.plan]
    assert heard[0] == grid[0]
    assert all(abs(a - b) == 20 for a, b in zip(heard[1:], grid[1:], strict=True) if b > 300)
    assert heard[-2:] == grid[-2:]


def test_an_attached_network_hears_one_time_a_sample():
    pipe = pipeline()
    options = {"window": 100, "cutoff": 300.0, "estimate": "sample", "prediction_type": "sample"}
    scheduler = TimeShiftScheduler.from_config(pipe.scheduler.config, **options)
    x = noise(3, 1, 8, 8).float() * torch.tensor([0.5, 0.85, 1.1]).view(-1, 1, 1, 1)
    handle = scheduler.attach(pipe.unet)
    together = Loop(scheduler, pipe.unet)(x, 8)
    rows = pipe.unet.labels
    assert all(len(row) == 6 and row[:3] == row[3:] for row in rows)
    assert any(len(set(row)) > 1 for row in rows)
    for k in range(3):
        pipe.unet.labels = []
        alone = Loop(scheduler, pipe.unet)(x[k : k + 1], 8)
        assert [row[0] for row in pipe.unet.labels] == [row[k] for row in rows]
        torch.testing.assert_close(alone[0], together[k], rtol=1e-4, atol=1e-4)
    handle.remove()
    with pytest.raises(ValueError, match="attach"):
        Loop(scheduler, pipe.unet)(x, 8)


def test_the_scale_of_a_pipeline_that_divides_its_timesteps():
    class Scaled(torch.nn.Module):
        def forward(self, hidden_states: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
            assert timestep.dtype == torch.float64
            return timestep

    network = Scaled()
    scheduler = TimeShiftScheduler(**FLOW, estimate="sample")
    scheduler.set_timesteps(5)
    x = noise(2, 3, 3)
    scheduler.attach(network, scale=1e-3)
    for t in scheduler.timesteps:
        given = network(hidden_states=x, timestep=(t / 1000).double().expand(2))
        torch.testing.assert_close(given, scheduler.model_timesteps(2).double() / 1000, rtol=1e-6, atol=0)
        x = scheduler.step(0.3 * x, t, x).prev_sample


def test_saved_and_loaded_it_is_the_same(tmp_path):
    scheduler = TimeShiftScheduler(
        **LINEAR, solver="dpm++", solver_options={"solver_order": 3}, window=20, cutoff=10.0, signal_variance=0.3
    )
    scheduler.save_pretrained(tmp_path)
    loaded = TimeShiftScheduler.from_pretrained(tmp_path)
    for one in (scheduler, loaded):
        one.set_timesteps(7)
    assert loaded.plan.calls == scheduler.plan.calls
    mine, theirs = ({k: v for k, v in one.config.items() if k[0] != "_"} for one in (loaded, scheduler))
    assert mine == theirs


# ---------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": -1}, "window -1"),
        ({"window": 2.5}, "window 2.5"),
        ({"window": float("nan")}, "window nan"),
        ({"cutoff": -1.0}, "cutoff -1.0"),
        ({"cutoff": float("nan")}, "cutoff nan"),
        ({"estimate": "mean"}, "estimate 'mean'"),
        ({"shifted": "landing"}, "shifted 'landing'"),
        ({"signal_variance": -0.1}, "signal_variance -0.1"),
        ({"signal_variance": 0.95}, "all times have the same variance"),
        ({"solver": "ts-ddim"}, "solver 'ts-ddim'"),
        ({"solver_options": {"order": 3}}, "solver_options 'order'"),
        ({"shifted": "node", **EDM}, "EDM"),
        ({"preset": "accurate"}, "preset"),
    ],
)
def test_impossible_options(options, message):
    with pytest.raises(ValueError, match=message):
        TimeShiftScheduler(**options)


def test_a_network_without_timestep_is_refused():
    with pytest.raises(ValueError, match="no timestep"):
        TimeShiftScheduler().attach(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="set_timesteps"):
        TimeShiftScheduler().model_timesteps(1)


def test_schedule_of_the_registered_names():
    for name, solver in (("ts-ddim", "ddim"), ("ts-ddpm", "sde-dpm++1")):
        scheduler = SAMPLERS[name].build(STABLE_DIFFUSION)
        assert scheduler.config.solver == solver
        assert scheduler.schedule.max_level == schedule_from_config(scheduler.config).max_level
