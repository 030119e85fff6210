"""What a step costs beside the network: our schedulers against diffusers' classes of the same configuration."""

from __future__ import annotations

import statistics
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import diffusers
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fewstep.samplers import DEISScheduler, DPMSolverPPScheduler, PlanScheduler, UniPCScheduler

from .output import STABLE_DIFFUSION, table
from .traffic import bytes_of_step, synchronise

STEPS = 20
SHAPES = ((1, 4, 64, 64), (16, 4, 64, 64), (256, 3, 32, 32))
CUDA_SHAPES = ((1, 4, 64, 64), (16, 4, 64, 64), (64, 4, 128, 128), (64, 16, 128, 128))
"""From bound by launches to bound by bandwidth."""

_FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 3.0}
_SINGLE = {**STABLE_DIFFUSION, "lower_order_final": True}


@dataclass(frozen=True)
class Pair:
    """A configuration that both libraries have.

    Attributes:
        theirs: name of diffusers' class.
        config: of diffusers' class.
        ours: scheduler that reads its config.
        options: ours beside that.
    """

    theirs: str
    config: Mapping[str, Any]
    ours: type[PlanScheduler]
    options: Mapping[str, Any] = field(default_factory=dict)

    def build(self) -> tuple[Any, Any]:
        """Our scheduler and diffusers'."""
        theirs = getattr(diffusers, self.theirs)(**self.config)
        return self.ours.from_config(theirs.config, **self.options), theirs

    @property
    def stochastic(self) -> bool:
        """Whether steps read noise."""
        return str(self.config.get("algorithm_type", "")).startswith("sde-")


def _dpm(theirs: str = "DPMSolverMultistepScheduler", /, **config: Any) -> Pair:
    options = {"method": "singlestep"} if "Singlestep" in theirs else {"diffusers_third_order": True}
    return Pair(theirs, {**STABLE_DIFFUSION, **config}, DPMSolverPPScheduler, options)


_SINGLESTEP = "DPMSolverSinglestepScheduler"
_DEIS, _UNIPC = "DEISMultistepScheduler", "UniPCMultistepScheduler"

PAIRS: Mapping[str, Pair] = {
    "dpm++1": _dpm(solver_order=1),
    "dpm++2": _dpm(),
    "dpm++2-heun": _dpm(solver_type="heun"),
    "dpm++3": _dpm(solver_order=3),
    "sde-dpm++2": _dpm(algorithm_type="sde-dpmsolver++"),
    "dpm2": _dpm(algorithm_type="dpmsolver", final_sigmas_type="sigma_min"),
    "dpm++2s": _dpm(_SINGLESTEP, lower_order_final=True),
    "dpm++3s": _dpm(_SINGLESTEP, solver_order=3, lower_order_final=True),
    "deis2": Pair(_DEIS, STABLE_DIFFUSION, DEISScheduler),
    "deis3": Pair(_DEIS, {**STABLE_DIFFUSION, "solver_order": 3}, DEISScheduler),
    "unipc2": Pair(_UNIPC, STABLE_DIFFUSION, UniPCScheduler),
    "unipc3": Pair(_UNIPC, {**STABLE_DIFFUSION, "solver_order": 3}, UniPCScheduler),
    "dpm++2-flow": Pair("DPMSolverMultistepScheduler", _FLOW, DPMSolverPPScheduler),
    "unipc2-flow": Pair(_UNIPC, _FLOW, UniPCScheduler),
}
"""What is compared, by name."""


class OperationCounter(TorchDispatchMode):
    """Counts the tensor operations that reach the dispatcher.

    Attributes:
        names: how often each operation ran.
    """

    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not torch.ops.aten.promote_types.default:  # which looks at no tensor
            self.names[str(func)] += 1
        return func(*args, **(kwargs or {}))


@dataclass(frozen=True)
class Inputs:
    """The tensors of a run without a network: a noisy sample, the output of every call, the noise of every step."""

    sample: torch.Tensor
    output: torch.Tensor
    noise: torch.Tensor | None

    @classmethod
    def of(
        cls, shape: Sequence[int], stochastic: bool, device: str = "cpu", dtype: torch.dtype = torch.float32
    ) -> Inputs:
        """Normal numbers; drawing noise is not what is measured."""
        generator = torch.Generator().manual_seed(0)
        kinds = (dtype, dtype, torch.float32)
        sample, output, noise = (torch.randn(*shape, generator=generator).to(device, kind) for kind in kinds)
        return cls(sample, output, noise if stochastic else None)


def run(scheduler: Any, labels: Sequence[torch.Tensor], inputs: Inputs) -> torch.Tensor:
    """All steps of a run whose times are set."""
    scheduler.set_begin_index(0)
    sample, output = inputs.sample, inputs.output
    if inputs.noise is None:
        for label in labels:
            sample = scheduler.step(output, label, sample, return_dict=False)[0]
    else:
        for label in labels:
            sample = scheduler.step(output, label, sample, variance_noise=inputs.noise, return_dict=False)[0]
    return sample


def count_operations(scheduler: Any, inputs: Inputs, steps: int = STEPS) -> Counter[str]:
    """The tensor operations of a whole run, ``set_timesteps`` left out."""
    scheduler.set_timesteps(steps)
    labels = list(scheduler.timesteps)
    with OperationCounter() as counter:
        run(scheduler, labels, inputs)
    return counter.names


def measure(
    name: str,
    shape: Sequence[int],
    seconds: float,
    *,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    backend: str | None = None,
    bandwidth: float | None = None,
    compiles: bool = False,
) -> dict[str, Any]:
    """Times one pair on one shape, run by run in turn, so that a busy machine slows both.

    Args:
        name: key of ``PAIRS``.
        shape: of the sample.
        seconds: how long, at least; never fewer than three runs of each.
        device: of the sample.
        dtype: of the sample.
        backend: of our steps, as of ``set_backend``.
        bandwidth: of the device, bytes a second.
        compiles: also times diffusers' step under ``torch.compile``, which compiles it for each step of the run.

    Returns:
        medians: microseconds a step, milliseconds of ``set_timesteps`` (another number of steps, the same again), and
        operations a step (``None`` for compiled loops); first ours, then diffusers'. With a bandwidth also the
        microseconds in which a step's bytes could be copied.
    """
    pair = PAIRS[name]
    inputs = Inputs.of(shape, pair.stochastic, device, dtype)
    schedulers = pair.build()
    # What a network does: freeing one large tensor makes glibc keep memory, or page faults are what is measured.
    torch.empty(8_000_000)
    # Where one counts, loops are not compiled.
    counted = [None if backend == "compile" else schedulers[0].set_backend(backend), schedulers[1]]
    operations = [s and sum(count_operations(s, inputs).values()) / STEPS for s in counted]
    schedulers[0].set_backend(backend)
    steps: tuple[list[float], list[float]] = ([], [])
    # The first and the second time that the same number of steps is set.
    settings: tuple[list[list[float]], list[list[float]]] = ([[], []], [[], []])
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(steps[0]) < 3:
        for k, scheduler in enumerate(schedulers):
            scheduler.set_timesteps(STEPS + 1, device=device)
            for seconds_taken in settings[k]:
                clock = time.perf_counter()
                scheduler.set_timesteps(STEPS, device=device)
                seconds_taken.append(time.perf_counter() - clock)
            run(scheduler, list(scheduler.timesteps), inputs)  # which makes the coefficients ready
            scheduler.set_timesteps(STEPS, device=device)
            labels = list(scheduler.timesteps)
            synchronise(device)
            clock = time.perf_counter()
            run(scheduler, labels, inputs)
            synchronise(device)
            steps[k].append((time.perf_counter() - clock) / STEPS)
    ours, theirs = (1e6 * statistics.median(times) for times in steps)
    more: dict[str, Any] = {}
    if bandwidth is not None:
        more["limit_us"] = 1e6 * bytes_of_step(schedulers[0].plan, shape, dtype) / bandwidth
    if compiles:
        more["compiled_us"] = 1e6 * _compiled(schedulers[1], inputs, seconds, device)
    return {
        **more,
        "sampler": name,
        "shape": list(shape),
        "runs": len(steps[0]),
        "step_us": [ours, theirs],
        "ratio": theirs / ours,
        "set_timesteps_ms": [[1e3 * statistics.median(times) for times in both] for both in settings],
        "operations": operations,
    }


def _compiled(scheduler: Any, inputs: Inputs, seconds: float, device: str) -> float:
    """Seconds a step of a compiled scheduler of diffusers."""
    from torch._dynamo import config

    plain = scheduler.step
    # It is another function at every step: the number of the step is Python's.
    with config.patch(recompile_limit=4 * STEPS, accumulated_recompile_limit=100 * STEPS):
        scheduler.step = torch.compile(plain)
        try:
            times: list[float] = []
            for repeat in range(2):  # the first compiles
                end = time.perf_counter() + repeat * seconds
                times = []
                while time.perf_counter() < end or len(times) < 3:
                    scheduler.set_timesteps(STEPS, device=device)
                    labels = list(scheduler.timesteps)
                    synchronise(device)
                    clock = time.perf_counter()
                    run(scheduler, labels, inputs)
                    synchronise(device)
                    times.append((time.perf_counter() - clock) / STEPS)
        finally:
            scheduler.step = plain
    return statistics.median(times)


def step_table(results: Sequence[Mapping[str, Any]]) -> str:
    """The results as text, a line a sampler."""
    shapes = list(dict.fromkeys(tuple(r["shape"]) for r in results))
    header = ["us a step, ours / diffusers"]
    header += ["x".join(map(str, shape)) for shape in shapes] + ["operations", "set_timesteps, ms"]
    rows = []
    for name in dict.fromkeys(r["sampler"] for r in results):
        cells = {tuple(r["shape"]): r for r in results if r["sampler"] == name}
        row = [name]
        for shape in shapes:
            ours, theirs = cells[shape]["step_us"]
            cell = f"{ours:.1f} / {theirs:.1f} = 1 : {cells[shape]['ratio']:.1f}"
            if "compiled_us" in cells[shape]:
                cell += f", compiled {cells[shape]['compiled_us']:.1f}"
            if "limit_us" in cells[shape]:
                cell += f", {100 * cells[shape]['limit_us'] / ours:.0f} % of copy"
            row.append(cell)
        first = cells[shapes[0]]
        row.append(" / ".join("-" if n is None else f"{n:.1f}" for n in first["operations"]))
        (new, again), (theirs_new, _) = first["set_timesteps_ms"]
        row.append(f"{new:.2f}, again {again:.2f} / {theirs_new:.2f}")
        rows.append(row)
    return table(header, rows)
