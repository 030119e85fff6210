"""T-Stitch: which network is called when, inside unmodified pipelines, saved and loaded, and what is refused."""

from __future__ import annotations

import copy
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers import DiffusionPipeline
from diffusers.utils import logging
from hypothesis import given, settings
from hypothesis import strategies as st

from fewstep.samplers import SAMPLERS, DEISScheduler, StitchedDenoiser
from pipelines.networks import dit_transformer, flux_transformer, pixel_unet, text_unet
from pipelines.tiny import CASES, DENOISERS, SD_BETAS, flow_euler, missing, pndm, seeded

PIPELINES = ("sd", "sdxl", "sdxl-edm", "sd3", "flux", "flux-dynamic", "wan", "dit", "dit-learned", "ddpm", "sd-img2img")
FRACTIONS = (0.25, 0.4, 0.5, 0.7)


@pytest.fixture(autouse=True)
def _quiet(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    yield
    logging.set_verbosity(before)


def another(network: Any, seed: int = 5) -> Any:
    """A network of the same architecture with other weights."""
    other = copy.deepcopy(network)
    generator = torch.Generator().manual_seed(seed)
    for parameter in other.parameters():
        parameter.data.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
    return other


def denoiser_name(pipe: Any) -> str:
    return next(name for name in DENOISERS if hasattr(pipe, name))


def call_log(stitched: StitchedDenoiser) -> list[int]:
    """Fills with the index of every network that is called."""
    log: list[int] = []
    for k, model in enumerate(stitched.models):
        model.register_forward_pre_hook(lambda module, args, k=k: log.append(k))
    return log


def public(config: Any) -> dict[str, Any]:
    """Without private entries, and with lists for tuples."""
    options: dict[str, Any] = json.loads(json.dumps({k: v for k, v in config.items() if not k.startswith("_")}))
    return options


def copies(network: Any, count: int = 2) -> list[Any]:
    return [copy.deepcopy(network) for _ in range(count)]


# ------------------------------------------------------------------------------------------------ whose turn it is

# Calls of the small network for the fractions 0.25, 0.4, 0.5, 0.7 of T-Stitch's released code: the Stable Diffusion
# pipelines' (i + 1) / n <= r, and the proxy's t / 1000 > 1 - r.
COUNTS: dict[str, tuple[Callable[[], Any], int, tuple[int, ...], tuple[int, ...]]] = {
    "ddim-leading": (lambda: diffusers.DDIMScheduler(steps_offset=1), 50, (12, 20, 25, 35), (12, 20, 25, 35)),
    "ddim-trailing": (
        lambda: diffusers.DDIMScheduler(timestep_spacing="trailing"),
        50,
        (12, 20, 25, 35),
        (13, 20, 25, 35),
    ),
    "pndm": (lambda: pndm(), 50, (12, 20, 25, 35), (13, 21, 26, 36)),
    "dpm-karras": (
        lambda: diffusers.DPMSolverMultistepScheduler(**SD_BETAS, use_karras_sigmas=True),
        20,
        (5, 8, 10, 14),
        (6, 8, 9, 11),
    ),
    "flow": (lambda: flow_euler(shift=1.0), 20, (5, 8, 10, 14), (5, 8, 10, 14)),
    "flow-3": (lambda: flow_euler(shift=3.0), 20, (5, 8, 10, 14), (10, 13, 15, 17)),
    "flow-5": (lambda: flow_euler(shift=5.0), 20, (5, 8, 10, 14), (12, 15, 16, 18)),
    "lcm": (lambda: diffusers.LCMScheduler(**SD_BETAS), 4, (1, 1, 2, 2), (2, 2, 2, 3)),
}


@pytest.mark.parametrize("name", COUNTS)
def test_calls_of_the_small_network_are_those_of_the_released_code(name: str) -> None:
    build, steps, by_step, by_timestep = COUNTS[name]
    scheduler = build()
    scheduler.set_timesteps(steps)
    count = len(scheduler.timesteps)
    found_by_step, found_by_timestep = [], []
    for r in FRACTIONS:
        stitched = StitchedDenoiser(copies(dit_transformer()), [r, 1.0 - r])
        found_by_step.append(sum(stitched.model_of_step(i, count) == 0 for i in range(count)))
        turns = stitched.model_of_timestep(scheduler.timesteps)
        assert bool((turns.diff() >= 0).all())
        found_by_timestep.append(int((turns == 0).sum()))
    assert tuple(found_by_step) == by_step
    assert tuple(found_by_timestep) == by_timestep


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(0, 12), min_size=2, max_size=4).filter(any), st.integers(1, 60))
def test_parts_are_contiguous_and_end_at_the_floor_of_the_summed_fractions(shares: list[int], steps: int) -> None:
    """Whole-number shares, so that the floors are exact: floats such as 0.1 + 0.2 must not cost a step."""
    total = sum(shares)
    stitched = StitchedDenoiser(copies(dit_transformer(), len(shares)), [share / total for share in shares])
    turns = [stitched.model_of_step(i, steps) for i in range(steps)]
    assert turns == sorted(turns)
    last = max(k for k, share in enumerate(shares) if share)
    for k in range(len(shares)):
        ends = steps if k >= last else sum(shares[: k + 1]) * steps // total
        assert sum(turn <= k for turn in turns) == ends
    # Uniform times are the same parts, counted from the first label.
    uniform = torch.arange(steps, 0, -1, dtype=torch.float64) * 1000.0 / steps
    by_timestep = stitched.model_of_timestep(uniform).tolist()
    for k in range(last):
        assert sum(turn <= k for turn in by_timestep) == -(-sum(shares[: k + 1]) * steps // total)


@pytest.mark.parametrize("by", ["timestep", "step"])
@pytest.mark.parametrize("end", [0.0, 1.0])
def test_the_ends_of_the_range_belong_to_one_network(by: str, end: float) -> None:
    stitched = StitchedDenoiser(copies(dit_transformer()), [end, 1.0 - end], by=by)
    expected = 0 if end == 1.0 else 1
    assert stitched.model_of_timestep(torch.tensor([1000, 999, 500, 1, 0])).tolist() == [expected] * 5
    assert [stitched.model_of_step(i, 7) for i in range(7)] == [expected] * 7


def test_tokens_of_a_sample_go_with_the_noisiest() -> None:
    stitched = StitchedDenoiser(copies(dit_transformer()), [0.4, 0.6])
    labels = torch.tensor([[0.0, 900.0, 900.0], [0.0, 100.0, 500.0]])
    assert stitched.model_of_timestep(labels).tolist() == [0, 1]


def test_rising_labels_are_read_from_their_noisy_end() -> None:
    stitched = StitchedDenoiser(copies(dit_transformer()), [0.4, 0.6], timestep_range=(0.0, 1.0))
    assert stitched.model_of_timestep(torch.tensor([0.0, 0.39, 0.4, 1.0])).tolist() == [0, 0, 1, 1]


# ------------------------------------------------------------------------------------------------ inside pipelines


@pytest.mark.parametrize("case", PIPELINES)
def test_one_network_alone_is_bit_identical_and_the_same_network_twice_ignores_the_fraction(case: str) -> None:
    chosen = CASES[case]
    pipe = chosen.build()
    name = denoiser_name(pipe)
    large = getattr(pipe, name)
    small = another(large)
    if case == "sdxl-edm":
        # Labels of EDM are a quarter of the logarithm of sigma.
        options: dict[str, Any] = {"timestep_range": (math.log(80.0) / 4, math.log(0.002) / 4)}
    else:
        options = {}
    alone = {0.0: chosen.call(pipe)}
    setattr(pipe, name, small)
    alone[1.0] = chosen.call(pipe)
    assert not torch.equal(alone[0.0], alone[1.0])
    for fraction, expected in alone.items():
        setattr(pipe, name, StitchedDenoiser([small, large], [fraction, 1.0 - fraction], **options))
        assert torch.equal(chosen.call(pipe), expected)
    setattr(pipe, name, StitchedDenoiser([large, large], [0.5, 0.5], **options))
    assert torch.equal(chosen.call(pipe), alone[0.0])


@pytest.mark.parametrize("by", ["timestep", "step"])
@pytest.mark.parametrize("case", ["sd", "sd3", "flux", "wan", "dit"])
def test_every_step_is_one_network_and_the_parts_have_their_sizes(case: str, by: str) -> None:
    chosen, steps = CASES[case], 10
    pipe = chosen.build()
    pipe.scheduler = SAMPLERS["unipc"].build(pipe.scheduler.config)
    name = denoiser_name(pipe)
    large = copy.deepcopy(getattr(pipe, name))
    stitched = StitchedDenoiser([another(large), large], [0.4, 0.6], by=by).follow(pipe)
    setattr(pipe, name, stitched)
    log = call_log(stitched)
    first = chosen.call(pipe, steps=steps)
    calls = len(log) // steps  # Wan calls its network twice a step, one call a branch
    assert log == sorted(log)
    if by == "step":
        assert log.count(0) == 4 * calls
    else:
        progress = 1.0 - pipe.scheduler.timesteps.double() / 1000.0
        assert log.count(0) == int((progress < 0.4).sum()) * calls
    log.clear()
    assert torch.equal(chosen.call(pipe, steps=steps), first)
    assert log.count(0) > 0


@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_a_run_is_the_small_network_then_the_large_one(scale: float) -> None:
    """Against a loop by hand, with guidance inside the network in turn."""
    small, large = another(dit_transformer()), dit_transformer()
    scheduler = diffusers.DDIMScheduler(timestep_spacing="trailing", clip_sample=False)
    pipe = CASES["dit"].build(scheduler, transformer=StitchedDenoiser([small, large], [0.3, 0.7]))
    found = CASES["dit"].call(pipe, steps=10, guidance_scale=scale)
    scheduler.set_timesteps(10)
    x = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(7))
    for i, t in enumerate(scheduler.timesteps):
        network = small if i < 3 else large
        labels, x_in = (torch.tensor([1, 1000]), torch.cat([x, x])) if scale > 1 else (torch.tensor([1]), x)
        with torch.no_grad():
            output = network(x_in, timestep=t.expand(len(x_in)), class_labels=labels).sample
        if scale > 1:
            conditional, unconditional = output.chunk(2)
            output = unconditional + scale * (conditional - unconditional)
        x = scheduler.step(output, t, x).prev_sample
    torch.testing.assert_close(found, x, rtol=0, atol=1e-5)


@pytest.mark.parametrize("strength", [0.3, 0.8])
def test_a_run_from_an_image_begins_inside_the_trajectory(strength: float) -> None:
    """Of 10 steps the first 4 are the small network's; a run of strength 0.8 makes the last 8, one of 0.3 none."""
    pipe = CASES["sd-img2img"].build()
    pipe.scheduler = SAMPLERS["dpm++"].build(pipe.scheduler.config)
    large = copy.deepcopy(pipe.unet)
    pipe.unet = StitchedDenoiser([another(large), large], [0.4, 0.6], by="step").follow(pipe)
    log = call_log(pipe.unet)
    CASES["sd-img2img"].call(pipe, steps=10, strength=strength)
    assert log == ([0, 0, 1, 1, 1, 1, 1, 1] if strength == 0.8 else [1, 1, 1])


@pytest.mark.parametrize("stages", ["heun", "deis"])
def test_by_step_all_stages_of_a_step_go_to_one_network(stages: str) -> None:
    pipe = CASES["sd"].build()
    if stages == "heun":
        pipe.scheduler = diffusers.HeunDiscreteScheduler(**SD_BETAS)
    else:
        pipe.scheduler = DEISScheduler(**SD_BETAS, solver_type="rhork", solver_order=2)
    large = copy.deepcopy(pipe.unet)
    pipe.unet = StitchedDenoiser([another(large), large], [0.5, 0.5], by="step").follow(pipe)
    log = call_log(pipe.unet)
    CASES["sd"].call(pipe, steps=6)
    assert pipe.scheduler.order == 2
    assert log[:6] == [0] * 6
    assert set(log[6:]) == {1}


def test_samples_at_different_times_each_get_their_own_network() -> None:
    small, large = another(dit_transformer()), dit_transformer()
    stitched = StitchedDenoiser([small, large], [0.4, 0.6])
    x, classes = seeded(4, 4, 8, 8), torch.tensor([1, 2, 3, 4])
    labels = torch.tensor([900, 100, 601, 599])
    mixed = stitched(x, timestep=labels, class_labels=classes).sample
    alone = [(small, large)[k](x, timestep=labels, class_labels=classes).sample for k in (0, 1)]
    assert torch.equal(mixed, torch.stack([alone[0][0], alone[1][1], alone[0][2], alone[1][3]]))
    pair = stitched(x, timestep=labels, class_labels=classes, return_dict=False)
    assert isinstance(pair, tuple)
    assert torch.equal(pair[0], mixed)
    with pytest.raises(ValueError, match="2 timesteps of different models"):
        stitched(x, timestep=labels[:2], class_labels=classes)


def test_positional_arguments_and_python_numbers_reach_the_network() -> None:
    small, large = another(text_unet()), text_unet()
    stitched = StitchedDenoiser([small, large], [0.4, 0.6])
    x, text = seeded(2, 4, 8, 8), seeded(2, 7, 8, seed=1)
    for timestep, network in ((700, small), (100.0, large)):
        assert torch.equal(stitched(x, timestep, text)[0], network(x, timestep, text)[0])
        assert torch.equal(stitched(x, timestep, text, return_dict=False)[0], network(x, timestep, text)[0])


# ------------------------------------------------------------------------------------- unequal networks made equal


def test_a_learned_variance_is_cut_where_another_network_has_none() -> None:
    learned, plain = dit_transformer(learned_sigma=True), dit_transformer()
    x, t, classes = seeded(2, 4, 8, 8), torch.tensor([900, 900]), torch.tensor([1, 2])
    stitched = StitchedDenoiser([learned, plain], [0.5, 0.5])
    assert stitched.config.out_channels == 4
    assert torch.equal(
        stitched(x, timestep=t, class_labels=classes).sample,
        learned(x, timestep=t, class_labels=classes).sample[:, :4],
    )
    pipe = CASES["dit"].build(transformer=stitched)
    assert bool(CASES["dit"].call(pipe).isfinite().all())


@pytest.mark.parametrize("timestep", [999, 640, 20])
@pytest.mark.parametrize("own", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("common", ["epsilon", "sample", "v_prediction"])
def test_prediction_types_say_the_same_to_diffusers(own: str, common: str, timestep: int) -> None:
    """The clean sample that DDIM reads from the converted output is the one that it reads from the network's own."""
    stock = diffusers.DDIMScheduler(**SD_BETAS, clip_sample=False, prediction_type=own)
    stitched = StitchedDenoiser(
        [dit_transformer(), dit_transformer()],
        [1.0, 0.0],
        prediction_types=[own, common],
        noise_schedule=stock.config,
    )
    x, t, classes = seeded(2, 4, 8, 8), torch.tensor([timestep] * 2), torch.tensor([1, 2])
    raw = dit_transformer()(x, timestep=t, class_labels=classes).sample
    converted = stitched(x, timestep=t, class_labels=classes).sample
    read = diffusers.DDIMScheduler(**SD_BETAS, clip_sample=False, prediction_type=common)
    cleans = []
    for scheduler, output in ((stock, raw), (read, converted)):
        scheduler.set_timesteps(1000)
        cleans.append(scheduler.step(output, timestep, x).pred_original_sample)
    torch.testing.assert_close(cleans[1], cleans[0], rtol=1e-3, atol=2e-4)
    if own == common:
        assert torch.equal(raw, converted)


def test_flow_and_data_predictions_convert_on_a_flow_schedule() -> None:
    stitched = StitchedDenoiser(
        [dit_transformer(), dit_transformer()],
        [1.0, 0.0],
        prediction_types=["flow_prediction", "sample"],
        noise_schedule=flow_euler().config,
    )
    x, t, classes = seeded(2, 4, 8, 8), torch.tensor([900.0, 250.0]), torch.tensor([1, 2])
    raw = dit_transformer()(x, timestep=t, class_labels=classes).sample
    expected = x - (t / 1000.0).view(-1, 1, 1, 1) * raw
    torch.testing.assert_close(stitched(x, timestep=t, class_labels=classes).sample, expected)


# ---------------------------------------------------------------------------------------------- saving and loading

# What another program does: nothing of fewstep but one import.
PROGRAM = """
import sys

from diffusers import DiffusionPipeline
from safetensors.torch import save_file

import fewstep.samplers

sys.path.insert(0, sys.argv[2])
from pipelines.tiny import CASES

pipe = DiffusionPipeline.from_pretrained(sys.argv[1])
pipe.set_progress_bar_config(disable=True)
save_file({"latents": CASES["dit"].call(pipe).contiguous()}, sys.argv[1] + "/result.safetensors")
"""


@pytest.mark.parametrize("case", ["sd", "sd3", "flux", "dit"])
def test_a_saved_pipeline_comes_back_with_all_networks(tmp_path: Path, case: str) -> None:
    chosen = CASES[case]
    pipe = chosen.build()
    name = denoiser_name(pipe)
    large = getattr(pipe, name)
    setattr(pipe, name, StitchedDenoiser([another(large), large], [0.25, 0.75]))
    expected = chosen.call(pipe)
    pipe.save_pretrained(tmp_path)
    folder = tmp_path / name
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model_0", "model_1"]
    assert {path.suffix for path in tmp_path.rglob("*") if path.is_file()} == {".json", ".safetensors"}
    json.loads((folder / "config.json").read_text(), parse_constant=pytest.fail)
    again = DiffusionPipeline.from_pretrained(tmp_path, **missing(case))
    again.set_progress_bar_config(disable=True)
    found = getattr(again, name)
    assert type(found) is StitchedDenoiser
    assert public(found.config) == public(getattr(pipe, name).config)
    assert (chosen.call(again) - expected).abs().max() < 1e-5 * expected.abs().max()


def test_another_process_loads_a_saved_pipeline(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    large = dit_transformer()
    pipe = CASES["dit"].build(transformer=StitchedDenoiser([another(large), large], [0.5, 0.5]))
    expected = CASES["dit"].call(pipe)
    pipe.save_pretrained(tmp_path)
    tests = Path(__file__).resolve().parents[1]
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tmp_path), str(tests)],
        cwd=tmp_path,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr[-2000:]
    found = load_file(tmp_path / "result.safetensors")["latents"]
    assert (found - expected).abs().max() < 1e-5 * expected.abs().max()


def test_all_options_survive_saving(tmp_path: Path) -> None:
    options: dict[str, Any] = {
        "by": "step",
        "timestep_range": [999.0, 0.0],
        "prediction_types": ["epsilon", "v_prediction"],
        "noise_schedule": diffusers.DDIMScheduler(**SD_BETAS).config,
        "offload_idle": True,
    }
    stitched = StitchedDenoiser([another(dit_transformer()), dit_transformer()], [0.4, 0.6], **options)
    stitched.save_pretrained(tmp_path, variant="fp16", max_shard_size="20KB")
    assert list((tmp_path / "model_0").glob("*fp16*.safetensors"))
    again = StitchedDenoiser.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    assert again.dtype is torch.bfloat16
    for key in (*options, "fractions"):
        assert again.config[key] == stitched.config[key]
    assert again.config.noise_schedule["beta_schedule"] == "scaled_linear"


def test_a_scheduler_put_in_later_is_the_one_that_is_followed() -> None:
    pipe = CASES["dit"].build()
    pipe.transformer = StitchedDenoiser(copies(dit_transformer()), [0.5, 0.5], by="step").follow(pipe)
    log = call_log(pipe.transformer)
    for sampler, steps in (("dpm++", 4), ("unipc", 6)):
        pipe.scheduler = SAMPLERS[sampler].build(pipe.scheduler.config)
        log.clear()
        CASES["dit"].call(pipe, steps=steps)
        assert log == [0] * (steps // 2) + [1] * (steps // 2)


def test_pipelines_see_the_last_network() -> None:
    small, large = text_unet(extra_large=True), text_unet(extra_large=True)
    stitched = StitchedDenoiser([small, large], [0.5, 0.5])
    assert public(stitched.config) == {**public(stitched.config), **public(large.config)}
    assert stitched.config.sample_size == 8
    assert stitched.add_embedding is large.add_embedding
    assert (stitched.dtype, stitched.device) == (large.dtype, large.device)
    with pytest.raises(AttributeError):
        stitched.enable_freeu(1.0, 1.0, 1.0, 1.0)


# --------------------------------------------------------------------------------------------------------- devices


def test_idle_networks_stay_on_the_cpu() -> None:
    """The meta device stands for a GPU: moving there, casting, and where the pipeline is told the network is."""
    stitched = StitchedDenoiser(copies(dit_transformer()), [0.5, 0.5], offload_idle=True)
    stitched.to("meta")
    assert [model.device.type for model in stitched.models] == ["meta", "cpu"]
    assert stitched.device.type == "meta"
    stitched.to(torch.bfloat16)
    assert {parameter.dtype for parameter in stitched.parameters()} == {torch.bfloat16}
    assert [model.device.type for model in stitched.models] == ["meta", "cpu"]
    first = StitchedDenoiser(copies(dit_transformer(), 3), [0.0, 0.5, 0.5], offload_idle=True).to("meta")
    assert [model.device.type for model in first.models] == ["cpu", "meta", "cpu"]
    twice = StitchedDenoiser([copies(dit_transformer())[0]] * 2, [0.5, 0.5], offload_idle=True).to("meta")
    assert [model.device.type for model in twice.models] == ["meta", "meta"]
    assert StitchedDenoiser(copies(dit_transformer()), [0.5, 0.5]).to("meta").models[1].device.type == "meta"


def test_every_network_is_moved_once_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    small, large = another(dit_transformer()), copy.deepcopy(dit_transformer())
    moves: list[tuple[str, str]] = []
    for name, model in (("small", small), ("large", large)):
        monkeypatch.setattr(model, "to", lambda device, name=name: moves.append((name, str(device))))
    stitched = StitchedDenoiser([small, large], [0.4, 0.6], offload_idle=True)
    assert moves == [("large", "cpu")]
    moves.clear()
    pipe = CASES["dit"].build(transformer=stitched)
    found = CASES["dit"].call(pipe, steps=10)
    # On the CPU nothing has to come from elsewhere, but who has had its turn leaves.
    assert moves == [("small", "cpu")]
    CASES["dit"].call(pipe, steps=10)
    assert moves == [("small", "cpu"), ("large", "cpu"), ("small", "cpu")]
    pipe.transformer = StitchedDenoiser([small, large], [0.4, 0.6])
    assert torch.equal(CASES["dit"].call(pipe, steps=10), found)


def test_a_network_comes_to_where_the_sample_is_and_by_step_no_value_is_read_off_the_device() -> None:
    """A value on the meta device cannot be read."""
    pipe = CASES["dit"].build(SAMPLERS["dpm++"].build({}))
    pipe.scheduler.set_timesteps(4)
    pipe.transformer = StitchedDenoiser(copies(dit_transformer()), [0.5, 0.5], by="step", offload_idle=True)
    x, labels, classes = (tensor.to("meta") for tensor in (seeded(2, 4, 8, 8), torch.ones(2), torch.ones(2).long()))
    output = pipe.transformer.follow(pipe)(x, timestep=labels, class_labels=classes).sample
    assert output.device.type == "meta"
    assert [model.device.type for model in pipe.transformer.models] == ["meta", "cpu"]


def test_networks_are_compiled_one_by_one() -> None:
    stitched = StitchedDenoiser(copies(dit_transformer()), [0.5, 0.5])
    x, t, classes = seeded(2, 4, 8, 8), torch.tensor([900, 100]), torch.tensor([1, 2])
    expected = stitched(x, timestep=t, class_labels=classes).sample
    stitched.compile(backend="eager")
    torch.testing.assert_close(stitched(x, timestep=t, class_labels=classes).sample, expected)
    assert stitched._compiled_call_impl is None
    assert all(model._compiled_call_impl is not None for model in stitched.models)


def test_caches_of_every_network_get_their_context(monkeypatch: pytest.MonkeyPatch) -> None:
    stitched = StitchedDenoiser(copies(flux_transformer()), [0.5, 0.5])
    set_for = []
    monkeypatch.setattr(
        "diffusers.hooks.hooks._set_cache_context", lambda model, context: set_for.append((model, context))
    )
    with stitched.cache_context("cond"):
        assert [(model, context.name) for model, context in set_for] == [(model, "cond") for model in stitched.models]
    assert [context for _, context in set_for[2:]] == [None, None]
    with StitchedDenoiser(copies(pixel_unet()), [0.5, 0.5]).cache_context("cond"):
        assert len(set_for) == 4


# ---------------------------------------------------------------------------------------------------- what is refused


def dit(**options: Any) -> Any:
    return diffusers.DiTTransformer2DModel(**{**public(dit_transformer().config), **options})


def unet(**options: Any) -> Any:
    return diffusers.UNet2DConditionModel(**{**public(text_unet().config), **options})


VP = {"beta_schedule": "linear"}
REFUSALS: list[tuple[Callable[[], Any], str]] = [
    (lambda: StitchedDenoiser([dit()], [1.0]), "models has 1 entries; give two or more"),
    (lambda: StitchedDenoiser([dit(), torch.nn.Linear(2, 2)], [0.5, 0.5]), r"models\[1\] is a Linear; give networks"),  # type: ignore[list-item]
    (lambda: StitchedDenoiser([dit(), dit()], [1.0]), "fractions has 1 entries and models 2; give one a model"),
    (lambda: StitchedDenoiser([dit(), dit()], [0.4, 0.4]), r"fractions=\[0.4, 0.4\] must be at least 0 and sum to 1"),
    (lambda: StitchedDenoiser([dit(), dit()], [-0.5, 1.5]), r"fractions=\[-0.5, 1.5\] must be at least 0"),
    (lambda: StitchedDenoiser([dit(), dit()], [math.nan, 1.0]), "fractions="),
    (lambda: StitchedDenoiser([dit(), dit()], [0.5, 0.5], by="steps"), "by='steps' is no rule; use one of timestep"),
    (lambda: StitchedDenoiser([dit(), dit()], [0.5, 0.5], timestep_range=(1, 1)), "timestep_range="),
    (lambda: StitchedDenoiser([dit(), dit(num_embeds_ada_norm=10)], [0.5, 0.5]), "num_embeds_ada_norm .1000, 10."),
    (lambda: StitchedDenoiser([dit(), dit(in_channels=8)], [0.5, 0.5]), r"models differ in in_channels \(4, 8\)"),
    (lambda: StitchedDenoiser([dit(), dit(out_channels=12)], [0.5, 0.5]), r"differ in out_channels \(4, 12\), by more"),
    (lambda: StitchedDenoiser([dit(), dit(sample_size=16)], [0.5, 0.5]), r"models differ in sample_size \(8, 16\)"),
    (lambda: StitchedDenoiser([unet(), unet(cross_attention_dim=16)], [0.5, 0.5]), "cross_attention_dim .8, 16."),
    (lambda: StitchedDenoiser([unet(), unet(time_cond_proj_dim=4)], [0.5, 0.5]), "time_cond_proj_dim .None, 4."),
    (
        lambda: StitchedDenoiser([text_unet(), text_unet(extra_large=True)], [0.5, 0.5]),
        "models differ in projection_class_embeddings_input_dim",
    ),
    (lambda: StitchedDenoiser([text_unet(9), text_unet()], [0.5, 0.5]), r"models differ in in_channels \(9, 4\)"),
    (
        lambda: StitchedDenoiser([flux_transformer(True), flux_transformer(False)], [0.5, 0.5]),
        "models differ in guidance_embeds",
    ),
    (
        lambda: StitchedDenoiser([dit(), dit().half()], [0.5, 0.5]),
        "models differ in dtype .torch.float32, torch.float16",
    ),
    (lambda: StitchedDenoiser([dit(), flux_transformer()], [0.5, 0.5]), "given different time labels"),
    (
        lambda: StitchedDenoiser([dit(), dit()], [0.5, 0.5], prediction_types=["epsilon", "v_prediction"]),
        "prediction_types needs noise_schedule: give pipe.scheduler.config",
    ),
    (
        lambda: StitchedDenoiser([dit(), dit()], [0.5, 0.5], prediction_types=["epsilon"], noise_schedule=VP),
        "give one of epsilon, sample, v_prediction, flow_prediction for each",
    ),
    (
        lambda: StitchedDenoiser(
            [dit(), dit()], [0.5, 0.5], prediction_types=["v_prediction"] * 2, noise_schedule={"sigma_data": 0.5}
        ),
        "noise_schedule is EDM",
    ),
    (
        lambda: StitchedDenoiser([diffusers.AutoencoderKL(), diffusers.AutoencoderKL()], [0.5, 0.5]),
        "AutoencoderKL takes no timestep",
    ),
]


@pytest.mark.parametrize("number", range(len(REFUSALS)))
def test_refused_at_construction(number: int) -> None:
    build, said = REFUSALS[number]
    with pytest.raises(ValueError, match=said):
        build()


def test_refused_at_a_call() -> None:
    x, classes = seeded(2, 4, 8, 8), torch.tensor([1, 2])
    stitched = StitchedDenoiser([dit(), dit()], [0.5, 0.5])
    with pytest.raises(ValueError, match="timestep=None: the time label decides"):
        stitched(x, class_labels=classes)
    for label in (1500.0, -20.0, math.nan):
        with pytest.raises(ValueError, match="lies outside timestep_range=1000, 0"):
            stitched(x, timestep=torch.tensor([label] * 2), class_labels=classes)
    with pytest.raises(ValueError, match=r"call follow\(pipeline\) after construction and after loading"):
        StitchedDenoiser([dit(), dit()], [0.5, 0.5], by="step")(x, timestep=9, class_labels=classes)
    pipe = CASES["dit"].build()
    pipe.transformer = StitchedDenoiser([dit(), dit()], [0.5, 0.5], by="step").follow(pipe)
    with pytest.raises(ValueError, match="DDIMScheduler keeps no step_index"):
        CASES["dit"].call(pipe)


def test_conditioning_that_only_one_network_takes_is_refused_not_dropped() -> None:
    plain = diffusers.UNet2DModel(
        block_out_channels=(4, 8), layers_per_block=1, norm_num_groups=2, sample_size=8, in_channels=4, out_channels=4,
        down_block_types=("DownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    stitched = StitchedDenoiser([plain, text_unet()], [0.5, 0.5])
    x, text = seeded(2, 4, 8, 8), seeded(2, 7, 8)
    with pytest.raises(ValueError, match=r"models\[0\] \(UNet2DModel\) takes no encoder_hidden_states"):
        stitched(x, 900, encoder_hidden_states=text)
    expected = text_unet()(x, 100, text).sample
    assert torch.equal(stitched(x, 100, encoder_hidden_states=text, timestep_cond=None).sample, expected)
    assert torch.equal(stitched(x, 900, encoder_hidden_states=None).sample, plain(x, 900).sample)


def test_residuals_of_a_controlnet_go_to_equal_architectures_only() -> None:
    x, text = seeded(2, 4, 8, 8), seeded(2, 7, 8)
    with torch.no_grad():
        controlnet = diffusers.ControlNetModel.from_unet(text_unet(), conditioning_embedding_out_channels=(16,))
        down, middle = controlnet(x, 900, text, seeded(2, 3, 8, 8), return_dict=False)
    given = {"down_block_additional_residuals": down, "mid_block_additional_residual": middle}
    equal = StitchedDenoiser([another(text_unet()), text_unet()], [0.5, 0.5])
    assert torch.equal(equal(x, 100, text, **given).sample, text_unet()(x, 100, text, **given).sample)
    wider = StitchedDenoiser([unet(block_out_channels=(8, 8)), text_unet()], [0.5, 0.5])
    with pytest.raises(ValueError, match="down_block_additional_residuals fits one architecture"):
        wider(x, 900, text, **given)
    assert wider(x, 900, text).sample.shape == x.shape


def test_refused_in_files(tmp_path: Path) -> None:
    stitched = StitchedDenoiser([dit(), dit()], [0.5, 0.5])
    with pytest.raises(ValueError, match="safe_serialization=False would pickle"):
        stitched.save_pretrained(tmp_path / "pickled", safe_serialization=False)
    assert not (tmp_path / "pickled").exists()
    stitched.save_pretrained(tmp_path / "saved")
    with pytest.raises(ValueError, match="use_safetensors=False would unpickle"):
        StitchedDenoiser.from_pretrained(tmp_path / "saved", use_safetensors=False)
    with pytest.raises(ValueError, match=r"holds no saved StitchedDenoiser .*give a local folder"):
        StitchedDenoiser.from_pretrained(tmp_path / "nowhere")
    file = tmp_path / "saved" / "config.json"
    content = json.loads(file.read_text())
    for damage in ({"components": [["os", "path"], ["os", "path"]]}, {"components": [["not_there", "Model"]] * 2}):
        file.write_text(json.dumps({**content, **damage}))
        with pytest.raises(ValueError, match="is no network that is loaded"):
            StitchedDenoiser.from_pretrained(tmp_path / "saved")
    for text in ("{", "[]", "{}", json.dumps({**content, "components": 3})):
        file.write_text(text)
        with pytest.raises(ValueError, match="holds no saved StitchedDenoiser"):
            StitchedDenoiser.from_pretrained(tmp_path / "saved")
