"""Recorded runs against the loop, with a recorder that repeats tensor operations on any device as a CUDA graph does."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from fewstep.samplers import SAMPLERS, Denoiser, Guidance, PlanScheduler, SearchedScheduler, clear_graphs, sample
from fewstep.samplers.loop_graph import _RECORDINGS, CAPACITY, sample_recorded
from fewstep.samplers.usf.known import known_schedule
from pipelines.tiny import CASES, STEPS, batched, seeded

BRANCHED = ("sd", "sdxl", "sdxl-edm", "sd3", "sd3-dynamic", "flux", "flux-dynamic", "dit", "dit-learned", "ddpm")
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")


class Recorder(TorchDispatchMode):
    """Notes every tensor operation, and repeats them: Python's numbers stay as they were, tensors are read again.

    Attributes:
        bodies: how many were recorded.
    """

    def __init__(self) -> None:
        super().__init__()
        self.bodies = 0
        self._calls: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self._calls.append((func, args, kwargs or {}, result))
        return result

    def __call__(self, body: Callable[[], None]) -> Callable[[], None]:
        self.bodies += 1
        self._calls = []
        with self:
            body()
        calls = self._calls

        def repeat() -> None:
            made: dict[int, torch.Tensor] = {}
            for func, args, kwargs, before in calls:
                args, kwargs = tree_map_only(torch.Tensor, lambda v: made.get(id(v), v), (args, kwargs))
                now = func(*args, **kwargs)
                for old, new in zip(flat(before), flat(now), strict=True):
                    made[id(old)] = new

        return repeat


def flat(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    return [v for part in value for v in flat(part)] if isinstance(value, (list, tuple)) else []


@pytest.fixture(autouse=True)
def _nothing_recorded() -> Iterator[None]:
    clear_graphs()
    yield
    clear_graphs()


def ours(case: str, name: str, **options: Any) -> PlanScheduler:
    return SAMPLERS[name].build(CASES[case].scheduler().config, **options)


def own(pipe: Any) -> Any:
    """The pipeline with networks that no other test has."""
    for name, part in pipe.components.items():
        if isinstance(part, torch.nn.Module):
            setattr(pipe, name, copy.deepcopy(part))
    return pipe


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def both(denoiser: Denoiser, scheduler: Callable[[], PlanScheduler], record: Recorder, seed: int) -> torch.Tensor:
    """A recorded run, which must be that of the loop."""
    expected = sample(denoiser, scheduler(), STEPS, generator=generator(seed))
    found = sample_recorded(denoiser, scheduler(), STEPS, generator=generator(seed), record=record)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    return found


@pytest.mark.parametrize("case", BRANCHED)
def test_runs_of_every_family_with_other_seeds_prompts_and_plans(case: str) -> None:
    record, pipe, inputs = Recorder(), CASES[case].build(), CASES[case].inputs()
    first = both(Denoiser.from_pipeline(pipe, **inputs), lambda: ours(case, "unipc"), record, 1)
    assert not torch.equal(both(Denoiser.from_pipeline(pipe, **inputs), lambda: ours(case, "unipc"), record, 2), first)
    changed = {
        name: value.flip(-1)
        if isinstance(value, torch.Tensor)
        else [v + 1 for v in value]
        if name == "class_labels"
        else value
        for name, value in inputs.items()
    }
    if "guidance_scale" in changed:
        changed["guidance_scale"] += 2.0
    denoiser = Denoiser.from_pipeline(pipe, **changed)
    if case != "ddpm":
        assert not torch.allclose(both(denoiser, lambda: ours(case, "unipc"), record, 1), first)
    if CASES[case].kind != "edm":
        both(denoiser, lambda: ours(case, "unipc", timestep_spacing="linspace", preset=None), record, 1)
    assert record.bodies == len(_RECORDINGS) == 1


@pytest.mark.parametrize("seeding", ["generator", "streams", "in_kernel"])
def test_noise_of_stochastic_samplers(seeding: str) -> None:
    record = Recorder()
    denoiser = Denoiser.from_pipeline(CASES["sd"].build(), **CASES["sd"].inputs())

    def seeded_scheduler(seed: int) -> PlanScheduler:
        scheduler = ours("sd", "sde-dpm++")
        return scheduler if seeding == "generator" else scheduler.manual_seed(seed, in_kernel=seeding == "in_kernel")

    results = []
    for seed in (3, 4):
        latents = seeded(*CASES["sd"].shape, seed=0)
        runs = []
        for run in (sample, lambda *a, **k: sample_recorded(*a, **k, record=record)):
            given = generator(seed) if seeding == "generator" else None
            runs.append(run(denoiser, seeded_scheduler(seed), STEPS, generator=given, latents=latents))
        torch.testing.assert_close(*runs, rtol=1e-4, atol=1e-4)
        results.append(runs[1])
    assert (results[0] - results[1]).abs().max() > 0.01
    assert record.bodies == 1


def test_global_random_state_is_used_as_by_the_loop() -> None:
    denoiser = Denoiser.from_pipeline(CASES["sd"].build(), **CASES["sd"].inputs())
    results = []
    for run in (sample, lambda *a: sample_recorded(*a, record=Recorder())):
        torch.manual_seed(5)
        results.append((run(denoiser, ours("sd", "sde-dpm++"), STEPS), torch.rand(())))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("options", [{"thresholding": True}, {"thresholding": True, "sample_max_value": 1.5}], ids=str)
def test_thresholding(options: dict[str, Any]) -> None:
    record = Recorder()
    denoiser = Denoiser.from_pipeline(CASES["ddpm"].build(), **CASES["ddpm"].inputs())
    for seed in (1, 2):
        both(denoiser, lambda: ours("ddpm", "unipc", **options), record, seed)
    assert record.bodies == 1


@pytest.mark.parametrize("afs", ["none", "zero_x0"])
def test_searched_schedules(afs: str) -> None:
    record, pipe = Recorder(), CASES["sd"].build()
    base = ours("sd", "unipc")
    base.set_timesteps(STEPS + (afs != "none"))
    schedule = dataclasses.replace(known_schedule("dpm++", base._grid), afs=afs)
    denoiser = Denoiser.from_pipeline(pipe, **CASES["sd"].inputs())
    for seed in (1, 2):
        both(denoiser, lambda: SearchedScheduler.from_config(base.config, decisions=schedule), record, seed)
    assert record.bodies == 1


def test_weights_that_lie_elsewhere_are_recorded_anew() -> None:
    record, pipe = Recorder(), own(CASES["sd"].build())
    for changed in (False, True):
        if changed:
            pipe.unet.conv_in.weight = torch.nn.Parameter(1.5 * pipe.unet.conv_in.weight.detach())
        both(Denoiser.from_pipeline(pipe, **CASES["sd"].inputs()), lambda: ours("sd", "unipc"), record, 1)
    assert record.bodies == 2


def test_recordings_outlive_inference_mode() -> None:
    record, pipe = Recorder(), CASES["sd"].build()
    with torch.inference_mode():
        inside = both(Denoiser.from_pipeline(pipe, **CASES["sd"].inputs()), lambda: ours("sd", "unipc"), record, 1)
    outside = both(Denoiser.from_pipeline(pipe, **CASES["sd"].inputs()), lambda: ours("sd", "unipc"), record, 1)
    torch.testing.assert_close(inside, outside)
    assert record.bodies == 1


def test_what_does_not_stay_cannot_be_recorded() -> None:
    pipe = own(CASES["sd"].build())
    denoiser = Denoiser.from_pipeline(pipe, **CASES["sd"].inputs())
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(ValueError, match=r"cannot run under torch\.autocast"):
        sample_recorded(denoiser, ours("sd", "unipc"), STEPS, record=Recorder())
    pipe.unet.mid_block._hf_hook = object()  # as accelerate's offloading leaves
    with pytest.raises(ValueError, match="needs a network that stays where it is"):
        sample_recorded(denoiser, ours("sd", "unipc"), STEPS, record=Recorder())


def test_guidance_rescale() -> None:
    record, pipe = Recorder(), CASES["sd"].build()
    for scale in (3.0, 6.0):
        inputs = {**CASES["sd"].inputs(), "guidance_scale": scale, "guidance_rescale": 0.7}
        both(Denoiser.from_pipeline(pipe, **inputs), lambda: ours("sd", "dpm++"), record, 1)
    assert record.bodies == 1


def test_half_precision() -> None:
    record, pipe = Recorder(), own(CASES["sd"].build()).to(torch.bfloat16)
    inputs = {k: v.bfloat16() if isinstance(v, torch.Tensor) else v for k, v in CASES["sd"].inputs().items()}
    denoiser = Denoiser.from_pipeline(pipe, **inputs)
    for seed in (1, 2):
        expected, found = (
            run(denoiser, ours("sd", "dpm++"), STEPS, generator=generator(seed))
            for run in (sample, lambda *a, **k: sample_recorded(*a, **k, record=record))
        )
        assert found.dtype == torch.bfloat16
        assert (found - expected).abs().max() <= 0.05 * expected.abs().max()


def test_what_needs_a_recording_of_its_own() -> None:
    record, pipe, inputs = Recorder(), CASES["sd"].build(), CASES["sd"].inputs()
    denoiser = Denoiser.from_pipeline(pipe, **inputs)
    both(denoiser, lambda: ours("sd", "unipc"), record, 1)
    both(denoiser, lambda: ours("sd", "dpm++"), record, 1)  # reads and writes other tensors
    both(Denoiser.from_pipeline(pipe, num_images_per_prompt=2, **inputs), lambda: ours("sd", "unipc"), record, 1)
    both(Denoiser.from_pipeline(own(CASES["sd"].build()), **inputs), lambda: ours("sd", "unipc"), record, 1)
    assert record.bodies == len(_RECORDINGS) == CAPACITY
    sample_recorded(denoiser, ours("sd", "unipc"), STEPS + 1, generator=generator(1), record=record)
    assert record.bodies == CAPACITY + 1
    assert len(_RECORDINGS) == CAPACITY
    both(denoiser, lambda: ours("sd", "dpm++"), record, 2)
    assert record.bodies == CAPACITY + 1
    both(denoiser, lambda: ours("sd", "unipc"), record, 2)  # the oldest was forgotten
    assert record.bodies == CAPACITY + 2


def test_compiled_network() -> None:
    pipe, inputs = CASES["sd"].build(), batched(CASES["sd"].inputs(), 2)
    expected = sample(Denoiser.from_pipeline(pipe, **inputs), ours("sd", "unipc"), STEPS, generator=generator(1))
    pipe.unet = torch.compile(pipe.unet, backend="eager")
    denoiser = Denoiser.from_pipeline(pipe, **inputs)
    sample(denoiser, ours("sd", "unipc"), 1, generator=generator(1))  # compiles
    record: Any = lambda body: body  # noqa: E731
    found = sample_recorded(denoiser, ours("sd", "unipc"), STEPS, generator=generator(1), record=record)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_refusals() -> None:
    denoiser = Denoiser.from_pipeline(CASES["sd"].build(), **CASES["sd"].inputs())
    if not torch.cuda.is_available():
        with pytest.raises(
            ValueError, match="graph=True needs a pipeline on a CUDA device, not on cpu; leave graph out"
        ):
            sample(denoiser, ours("sd", "unipc"), STEPS, graph=True)
    with pytest.raises(ValueError, match="scheduler of ours that does what its plan says"):
        sample(denoiser, CASES["sd"].scheduler(), STEPS, graph=True)
    with pytest.raises(ValueError, match="TimeShiftScheduler does not"):
        sample(denoiser, ours("sd", "ts-ddim"), STEPS, graph=True)
    with pytest.raises(ValueError, match=r"guide\(None\)"):
        sample(denoiser, ours("sd", "unipc").guide(Guidance()), STEPS, graph=True)
    driven = Denoiser.from_pipeline(CASES["wan"].build(), **CASES["wan"].inputs())
    with pytest.raises(ValueError, match="a DrivenDenoiser drives it as it is"):
        sample(driven, ours("wan", "unipc"), STEPS, graph=True)


@needs_cuda
@pytest.mark.parametrize("name", ["unipc", "sde-dpm++"])
@pytest.mark.parametrize("case", ["sd", "sd3", "dit"])
def test_cuda_graph(case: str, name: str) -> None:
    pipe, inputs = own(CASES[case].build()).to("cuda"), CASES[case].inputs()
    inputs = {k: v.cuda() if isinstance(v, torch.Tensor) else v for k, v in inputs.items()}
    denoiser = Denoiser.from_pipeline(pipe, **inputs)
    for seed in (1, 2):
        expected = sample(denoiser, ours(case, name).manual_seed(seed), STEPS, generator=generator(seed))
        found = sample(denoiser, ours(case, name).manual_seed(seed), STEPS, generator=generator(seed), graph=True)
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
    assert len(_RECORDINGS) == 1
