"""Time-Shift (arXiv 2305.15583): the network gets the time that fits the sample, not the one that the grid says.

A run's samples are not distributed as in training (exposure bias). At the next time ``u`` of the grid the network is
called with

    t_s = argmin over tau in [u - w/2, u + w/2] of | var(x) - sigma_tau^2 |

instead, as long as ``u`` is above a cutoff; ``var`` is the variance over the elements of one sample. The forward
process has ``var(x) = sigma^2 + alpha^2 v0`` with the variance ``v0`` of clean samples. The paper leaves ``v0`` out, so
that ``t_s`` lies on the noisy side even of perfect samples (by ``-log(1 - v0) / beta`` timesteps, or half the window);
``signal_variance`` puts it in.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from .options import ScheduleConfig, own_options, scheduler_options
from .plan import Call, Plan
from .pndm import FPNDMScheduler
from .prediction import conversions
from .registry import SAMPLERS, Sampler, register
from .rows import GuidedOutput, accumulation_dtype
from .schedule import Array, NoiseSchedule
from .scheduler import Floats, PlanScheduler, PlanSchedulerOutput

if TYPE_CHECKING:
    from torch.utils.hooks import RemovableHandle
    from typing_extensions import Unpack

    from .builder import PlanBuilder


def best_coupling(variances: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Which candidate time fits each variance (arXiv 2305.15583, equation 6).

    Args:
        variances: ``(batch,)``.
        targets: ``(candidates,)``, the variance that each time stands for; of equal ones the first is taken.

    Returns:
        ``(batch,)`` indices. Nothing is read from the device.
    """
    return (variances.unsqueeze(1) - targets).abs().argmin(1)


def candidate_times(
    schedule: NoiseSchedule, timestep: float, window: int, signal_variance: float | None = None
) -> tuple[Array, Array]:
    """The times around one of the grid, nearest first, and the variance of a sample at each.

    Args:
        schedule: of the model.
        timestep: label of the grid.
        window: number of training timesteps between the outermost candidates. For EDM models, whose training has no
            timesteps, they divide the range of ``log(sigma)`` into ``num_train_timesteps - 1`` parts.
        signal_variance: of clean samples, for the corrected criterion; ``None`` for the paper's.

    Returns:
        labels and variances, each ``(2 * (window // 2) + 1,)``. At the ends of the training times they repeat.
    """
    first, last, unit = _label_range(schedule)
    offsets = [0, *(sign * k for k in range(1, window // 2 + 1) for sign in (-1, 1))]
    labels = timestep + unit * np.array(offsets, np.float64)
    labels[1:] = np.clip(labels[1:], min(first, timestep), max(last, timestep))
    alpha, sigma = schedule.alpha_sigma(schedule.level(labels))
    return labels, sigma**2 + alpha**2 * (0.0 if signal_variance is None else signal_variance)


def _label_range(schedule: NoiseSchedule) -> tuple[float, float, float]:
    """Cleanest and noisiest label of training with neither alpha nor sigma 0, and the distance of timesteps."""
    last = schedule.num_train_timesteps - 1.0
    if schedule.kind != "edm":
        return (1.0 if schedule.kind == "flow" else 0.0), last, 1.0
    lower, upper = (float(label) for label in schedule.timestep([schedule.min_level, schedule.max_level]))
    return lower, upper, (upper - lower) / last


@dataclass(frozen=True)
class _Tables:
    """The candidates of every shifted call, ``(calls, candidates)``, and the moves to the grid, with 4 columns."""

    labels: torch.Tensor
    targets: torch.Tensor
    moves: torch.Tensor


class TimeShiftScheduler(PlanScheduler):
    """Time-Shift around any sampler (arXiv 2305.15583).

    In a pipeline nothing else is needed with ``estimate="batch"``: the shifted time is written into the next entry of
    ``timesteps``, on its device, and loops over that tensor read it there (those over a copy, such as ``tolist()``,
    read the grid's times). With ``estimate="sample"`` the network needs a vector of times: call ``attach(pipe.unet)``
    once, or give it ``model_timesteps(batch)`` in a loop of your own.

    A window of 0, or a cutoff above all times, is the sampler beneath, bit for bit. The released settings are a window
    of 5 above 550 (F-PNDM, 100 steps, CIFAR-10), 30 above 300 (DPM-Solver, 5 steps) and 80 above 300 (DDIM, 5 steps).
    The method needs data whose variance is far from 1: at 1, that of scaled latents, samples of all times look alike,
    and the paper's criterion only adds half the window. Compare with the sampler beneath.

    Where a sampler calls the network inside a step, only the step's first call is shifted. Samples of one element have
    no variance and are never shifted.

    Args:
        solver: the name of a registered sampler: ``ddim``, ``sde-dpm++1`` (DDPM), ``f-pndm`` or any other.
        solver_options: other values of the solver's own options.
        window: ``w``, in training timesteps.
        cutoff: shifts end at this training timestep.
        signal_variance: variance over the elements of a clean sample, for the corrected criterion; ``None`` is the
            paper's criterion.
        estimate: ``batch``, one shift by the mean of the samples' variances, or ``sample``, one shift a sample.
        shifted: ``label``, what the network is told; ``node``, also the time that the solver starts from: the
            sample goes to the grid's time along its own prediction, then the solver takes its step. For DDIM that is
            its step from the shifted time; a stochastic step adds the noise of its own length. Not for EDM models.
        schedule: options of ``ScheduleConfig``; ``final_sigmas_type`` is the solver's by default.

    Raises:
        ValueError: unknown or contradicting options.
    """

    @scheduler_options(final_sigmas_type=None)
    def __init__(
        self,
        *,
        solver: str = "ddim",
        solver_options: Mapping[str, Any] | None = None,
        window: int = 30,
        cutoff: float = 300.0,
        signal_variance: float | None = None,
        estimate: str = "batch",
        shifted: str = "label",
        **schedule: Unpack[ScheduleConfig],
    ) -> None:
        if not (window >= 0 and float(window).is_integer()):
            raise ValueError(f"window {window} must be a whole number, at least 0; 0 shifts nothing")
        if not cutoff >= 0.0:
            raise ValueError(f"cutoff {cutoff} must be at least 0, which shifts down to the last step")
        if estimate not in ("batch", "sample"):
            raise ValueError(f"estimate {estimate!r} is unknown; use batch or sample")
        if shifted not in ("label", "node"):
            raise ValueError(f"shifted {shifted!r} is unknown; use label or node")
        if signal_variance is not None and not 0.0 <= signal_variance < math.inf:
            raise ValueError(
                f"signal_variance {signal_variance} must be a number of at least 0, or None for the paper's criterion"
            )
        self._base = self._solver(solver, solver_options)
        if self.config.final_sigmas_type is None:
            self.register_to_config(final_sigmas_type=self._base.config.final_sigmas_type)
        self._setup()
        self.order = self._base.order
        if signal_variance is not None and self.schedule.kind == "vp" and abs(1.0 - signal_variance) < 0.1:
            raise ValueError(
                f"signal_variance {signal_variance} is that of pure noise: samples of all times have the same variance "
                "and none fits best; use a sampler without Time-Shift for this model"
            )
        if shifted == "node" and self.schedule.kind == "edm":
            raise ValueError("shifted 'node' is not defined for EDM models, which scale samples by time; use 'label'")
        # Row of the tables by number of the call; what was chosen for a call; the last call whose times were given out.
        self._rows: dict[int, int] = {}
        self._tables: dict[tuple[torch.device, torch.dtype], _Tables] = {}
        self._picked: dict[int, torch.Tensor] = {}
        self._delivered: int | None = None

    def _solver(self, name: str, options: Mapping[str, Any] | None) -> PlanScheduler:
        """The solver's own scheduler on the same model: it checks the options and completes them."""
        usable = {k: entry for k, entry in SAMPLERS.items() if not issubclass(entry.scheduler, TimeShiftScheduler)}
        usable["f-pndm"] = _F_PNDM
        if name not in usable:
            raise ValueError(f"solver {name!r} is no sampler to shift; use one of {', '.join(usable)}")
        return usable[name].within(self.config, options)

    def _options(self, steps: int | None) -> dict[str, Any]:
        self._chosen = self._base._options(steps)
        return self._chosen

    def _write(self, plan: PlanBuilder, options: Mapping[str, Any]) -> Plan:
        return self._base._write(plan, {**options, **own_options(self._base.config)})

    # ---------------------------------------------------------------- candidates

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        sigmas: Floats | None = None,
        mu: float | None = None,
        timesteps: Floats | None = None,
    ) -> None:
        before = self._plan
        super().set_timesteps(num_inference_steps, device, sigmas, mu, timesteps)
        assert self._plan is not None
        if self._plan is not before:
            self._gather(self._plan)
        self._picked, self._delivered = {}, None
        if self._rows:
            # An inference tensor could not be written to by a later run outside of inference mode.
            with torch.inference_mode(False):
                self.timesteps = self.timesteps.clone()
            self._on(self.timesteps.device, torch.float32)

    def _gather(self, plan: Plan) -> None:
        """The candidates of a plan's calls, on the CPU in float64."""
        assert self._grid is not None
        first, _, unit = _label_range(self.schedule)
        origin = first if self.schedule.kind == "edm" else 0.0
        window, variance = int(self.config.window), self.config.signal_variance
        shifted = [
            k
            for k in _first_calls(plan, self._grid.levels)
            if k > 0 and window >= 2 and (plan.calls[k].timestep - origin) / unit > self.config.cutoff
        ]
        self._rows = {k: row for row, k in enumerate(shifted)}
        calls = [plan.calls[k] for k in shifted]
        candidates = [candidate_times(self.schedule, call.timestep, window, variance) for call in calls]
        moves = []
        if self.config.shifted == "node":
            moves = [self._moves(call, labels) for call, (labels, _) in zip(calls, candidates, strict=True)]
        self._columns = [np.array(column) for column in ([c[0] for c in candidates], [c[1] for c in candidates], moves)]
        self._tables = {}

    def _moves(self, call: Call, labels: Array) -> list[tuple[float, float, float, float]]:
        """``(a, b, c, d)``: sample ``x`` and output ``u`` at a label are ``a x + b u`` and ``c x + d u`` on the grid.

        Both pairs are of the same clean sample and the same noise.
        """
        moves = [(1.0, 0.0, 0.0, 1.0)]
        for label in labels[1:]:
            level = float(self.schedule.level(label))
            alpha, sigma = (float(value) for value in self.schedule.alpha_sigma(level))
            data, noise = conversions(self.schedule, self.config.prediction_type, level, alpha, sigma)
            assert data is not None
            assert noise is not None
            a, b = (call.alpha * p + call.sigma * q for p, q in zip(data, noise, strict=True))
            p, q = call.clean
            moves.append((a, b, (data[0] - p * a) / q, (data[1] - p * b) / q))
        return moves

    def _on(self, device: torch.device, dtype: torch.dtype) -> _Tables:
        if (device, dtype) not in self._tables:
            dtypes = (self.timesteps.dtype, dtype, dtype)
            with torch.inference_mode(False):
                columns = [torch.from_numpy(v).to(d).to(device) for v, d in zip(self._columns, dtypes, strict=True)]
                self._tables[device, dtype] = _Tables(*columns)
        return self._tables[device, dtype]

    # ---------------------------------------------------------------- a step

    def step(
        self,
        model_output: torch.Tensor | GuidedOutput,
        timestep: float | torch.Tensor,
        sample: torch.Tensor,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        variance_noise: torch.Tensor | None = None,
        return_dict: bool = True,
    ) -> PlanSchedulerOutput | tuple[torch.Tensor]:
        if not self._rows:
            return super().step(model_output, timestep, sample, generator, variance_noise, return_dict)
        if isinstance(model_output, GuidedOutput):
            model_output = model_output.combined()
        if self._step_index is None:
            self._step_index = self._first_index(timestep)
        index, dtype = self._step_index, sample.dtype
        if index in self._picked:
            if self.config.estimate == "sample" and self._delivered != index:
                raise ValueError(
                    f"estimate 'sample' chose a time for each sample of step {index}, but the network was not given "
                    "them; call attach(network) before the run, pass model_timesteps(batch), or use estimate='batch'"
                )
            if self.config.shifted == "node":
                if model_output.shape != sample.shape:
                    model_output = self._mean_of(model_output, sample)
                sample, model_output = self._to_grid(index, sample, model_output)
        result = super().step(model_output, timestep, sample, generator, variance_noise, return_dict)
        following = result[0].to(dtype)
        self._pick(following)
        if isinstance(result, tuple):
            return (following,)
        return PlanSchedulerOutput(prev_sample=following, pred_original_sample=result.pred_original_sample.to(dtype))

    def _to_grid(self, index: int, sample: torch.Tensor, output: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        dtype = accumulation_dtype(sample.dtype)
        moves = self._on(sample.device, dtype).moves[self._rows[index]].index_select(0, self._picked[index])
        a, b, c, d = (column.view(-1, *[1] * (sample.ndim - 1)) for column in moves.unbind(1))
        x, u = sample.to(dtype), output.to(dtype)
        return a * x + b * u, c * x + d * u

    @torch.no_grad()
    def _pick(self, following: torch.Tensor) -> None:
        """Chooses the times of the next call, all on the device."""
        index = self._step_index
        if index not in self._rows or following[0].numel() < 2:
            return
        wide = following.to(accumulation_dtype(following.dtype))
        variances = wide.flatten(1).var(dim=1)
        if self.config.estimate == "batch":
            variances = variances.mean(dim=0, keepdim=True)
        row, tables = self._rows[index], self._on(wide.device, wide.dtype)
        self._picked[index] = best_coupling(variances, tables.targets[row])
        if self.config.estimate == "batch":
            self.timesteps[index].copy_(tables.labels[row].index_select(0, self._picked[index])[0])

    # ---------------------------------------------------------------- one time a sample

    def model_timesteps(self, batch: int) -> torch.Tensor:
        """The times for the next network call, ``(batch,)``; a batch doubled for guidance gets them twice.

        Raises:
            ValueError: no timesteps were set, the run is over, or the batch is no multiple of the samples'.
        """
        index = self._step_index if self._step_index is not None else self._begin_index or 0
        if self._plan is None or index >= len(self._plan):
            raise ValueError("model_timesteps needs a call to come; call set_timesteps first")
        self._delivered = index
        picked = self._picked.get(index)
        if picked is None:
            return self.timesteps[index].expand(batch)
        if batch % len(picked):
            raise ValueError(f"batch {batch} is no multiple of the {len(picked)} samples of the last step")
        labels = self._on(picked.device, torch.float32).labels[self._rows[index]]
        return labels.index_select(0, picked).repeat(batch // len(picked))

    def attach(self, network: torch.nn.Module, *, scale: float = 1.0) -> RemovableHandle:
        """Gives a network that runs in somebody else's loop the times of ``model_timesteps``.

        Args:
            network: called with the batch first and with an argument ``timestep``: ``pipe.unet``, ``pipe.transformer``.
            scale: what the pipeline multiplies timesteps by; 0.001 for Flux.

        Returns:
            whose ``remove()`` undoes it.

        Raises:
            ValueError: the network takes no ``timestep``.
        """
        names = list(inspect.signature(network.forward).parameters)
        if "timestep" not in names:
            raise ValueError(f"network {type(network).__name__} takes {', '.join(names)}, but no timestep; use a loop")
        place = names.index("timestep")

        def hand_over(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            batch = len(args[0] if args else kwargs[names[0]])
            given = args[place] if place < len(args) else kwargs["timestep"]
            times = self.model_timesteps(batch)
            if scale != 1.0:
                times = times * scale
            if isinstance(given, torch.Tensor):
                times = times.to(given.dtype)
            if place < len(args):
                return (*args[:place], times, *args[place + 1 :]), kwargs
            return args, {**kwargs, "timestep": times}

        return network.register_forward_pre_hook(hand_over, with_kwargs=True)


def _first_calls(plan: Plan, levels: Sequence[float] | Array) -> list[int]:
    """Of every grid node the call that begins its step: stages of the step before may stand there earlier."""
    last: dict[float, int] = {call.level: k for k, call in enumerate(plan)}
    return sorted(last[float(level)] for level in levels if float(level) in last)


# Not among SAMPLERS: pipelines that begin in the middle of a run count on one number of network calls a step.
_F_PNDM = Sampler("f-pndm", FPNDMScheduler, {}, order=2, paper="arXiv 2202.09778")

register("ts-ddim", TimeShiftScheduler, order=1, paper="arXiv 2305.15583", solver="ddim")
register("ts-ddpm", TimeShiftScheduler, order=1, paper="arXiv 2305.15583", solver="sde-dpm++1")
