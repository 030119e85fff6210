"""T-Stitch: small networks denoise the early part of a trajectory, larger ones the rest (arXiv 2402.14167).

The method decides which network is called and nothing else, so it is a network and not a scheduler: every sampler,
and diffusers' own schedulers, serve it as they are.
"""

from __future__ import annotations

import contextlib
import inspect
import json
import math
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import FrozenDict

from .prediction import conversions
from .schedule import NoiseSchedule
from .stitch_models import (
    BLOCKS,
    RESIDUALS,
    address,
    all_equal,
    check_models,
    check_scheduler,
    checked_fractions,
    checked_predictions,
    checked_range,
    class_of,
    common_channels,
    data_pair,
    default_range,
    label_name,
    schedule_options,
)

if TYPE_CHECKING:
    from typing_extensions import Self

RULES = ("timestep", "step")
"""What a fraction is a share of: the range of time labels, or the steps of a run."""

# Parts that pipelines read off the network to find out what to hand over.
_READ_BY_PIPELINES = ("add_embedding", "encoder_hid_proj")
_OPTIONS = ("fractions", "by", "timestep_range", "prediction_types", "noise_schedule", "offload_idle")
_LABEL_SLACK = 0.01


class StitchedDenoiser(ModelMixin, ConfigMixin):
    """Several denoisers as one, which stands where ``unet`` or ``transformer`` stood in a pipeline (arXiv 2402.14167).

    ``pipe.transformer = StitchedDenoiser([small, pipe.transformer], [0.4, 0.6])`` is the whole installation. The
    networks take turns along the trajectory, each in one contiguous part; classifier-free guidance happens inside the
    one in turn. To the pipeline it looks like the last of them. All must know the same latents, noise schedule and
    conditioning; the paper recommends models trained on the same data, small before large, and finds no loss up to
    about 40 % small steps.

    Multistep samplers keep the small network's last predictions in their history over the switch, as in the paper.
    Samples of one batch may carry different time labels (a label a sample, or a token): each goes to the network of
    its own time, at the price of a call of every network involved.

    Args:
        models: two or more networks of diffusers, the one for the noisiest part first.
        fractions: of the trajectory that each serves, one a model, at least 0, summing to 1.
        by: ``"timestep"`` measures the fractions along the time labels that the network is given, and needs nothing but
            them. ``"step"`` measures them in steps of the run, ``floor(fraction * steps)`` of them as in the paper:
            the same on uniform grids, fewer early steps than by timestep on shifted flow grids. It reads the position
            off the scheduler of the pipeline given to ``follow``, never the label, so that a GPU need not wait.
        timestep_range: labels of pure noise and of clean data, as the pipeline hands them to the network; default
            by the class of the network, ``(1000, 0)`` for most; a model of another number T of training timesteps
            needs ``(T, 0)``.
        prediction_types: of every model, where they differ; outputs are turned into the last one's. Needs
            ``noise_schedule``.
        noise_schedule: config of the models' scheduler, such as ``pipe.scheduler.config``.
        offload_idle: keep the networks that are not in turn on the CPU. Each is moved once a run.

    Raises:
        ValueError: fractions or options that mean nothing, or models that cannot stand in for each other.
    """

    models: Any  # a ModuleList, whose items mypy takes for tensors

    def __init__(
        self,
        models: Sequence[ModelMixin],
        fractions: Sequence[float],
        *,
        by: str = "timestep",
        timestep_range: Sequence[float] | None = None,
        prediction_types: Sequence[str] | None = None,
        noise_schedule: Mapping[str, Any] | None = None,
        offload_idle: bool = False,
    ) -> None:
        super().__init__()
        networks = list(models)
        check_models(networks)
        shares = checked_fractions(fractions, len(networks))
        if by not in RULES:
            raise ValueError(f"by={by!r} is no rule; use one of {', '.join(RULES)}")
        if timestep_range is None:
            timestep_range = default_range(networks)
        first, last = checked_range(timestep_range)
        self.models = torch.nn.ModuleList(networks)
        self.register_to_config(
            fractions=shares,
            by=by,
            timestep_range=[first, last],
            prediction_types=None if prediction_types is None else list(prediction_types),
            noise_schedule=None if noise_schedule is None else schedule_options(noise_schedule),
            offload_idle=offload_idle,
            components=[address(model) for model in networks],
        )
        # The last model that serves anything serves to the end, whatever the sum rounds to.
        self._final = max(k for k, share in enumerate(shares) if share > 0.0)
        self._edges = [math.fsum(shares[: k + 1]) for k in range(self._final)]
        self._channels = common_channels(networks)
        self._schedule: NoiseSchedule | None = None
        if prediction_types is not None:
            self._schedule = checked_predictions(self._internal_dict, len(networks))
        self._parameters_of = [list(inspect.signature(model.forward).parameters.values()) for model in networks]
        self._labels_of = [label_name(*pair) for pair in zip(networks, self._parameters_of, strict=True)]
        self._same_blocks = all(all_equal([model.config.get(key) for model in networks]) for key in BLOCKS)
        self._followed: weakref.ref[Any] | None = None
        self._resident = next(k for k, share in enumerate(shares) if share > 0.0)
        if offload_idle:
            for model in networks:
                if model is not networks[self._resident]:
                    model.to("cpu")

    # ---------------------------------------------------------------- which network

    def follow(self, pipeline: Any) -> Self:
        """Names the pipeline whose steps ``by="step"`` counts; once after construction and after loading.

        Args:
            pipeline: whose network this is. In a call its scheduler must keep a ``step_index``, as ours and most of
                diffusers' do; it may be replaced at any time.

        Returns:
            itself.
        """
        # A strong reference would make a cycle with the pipeline that holds this network.
        self._followed = weakref.ref(pipeline)
        return self

    def model_of_step(self, step: int, steps: int) -> int:
        """Index of the model that serves step ``step`` (from 0) of a run of ``steps``, by step."""
        return sum(math.floor(edge * steps + 1e-9) <= step for edge in self._edges)

    def model_of_timestep(self, timestep: torch.Tensor | float) -> torch.Tensor:
        """Index of the model that serves a time label, by timestep.

        Args:
            timestep: a label, ``(batch,)``, or ``(batch, tokens)``: a sample stands where its noisiest token stands.

        Returns:
            int64 ``()`` or ``(batch,)``, on the CPU.

        Raises:
            ValueError: a label outside ``timestep_range``.
        """
        progress = self._progress(timestep)
        if progress.ndim > 1:
            progress = progress.flatten(1).amin(1)
        # Labels are float32 at best; a network's part ends where the next one's begins.
        passed = [progress >= edge - 1e-6 for edge in self._edges]
        return torch.stack(passed).sum(0) if passed else torch.zeros(progress.shape, dtype=torch.int64)

    def _progress(self, timestep: torch.Tensor | float) -> torch.Tensor:
        """How far along the trajectory the labels stand, in 0 to 1; float64 on the CPU."""
        first, last = self._internal_dict["timestep_range"]
        labels = torch.as_tensor(timestep).detach().to("cpu", torch.float64)
        progress = (first - labels) / (first - last)
        if not bool(((progress >= -_LABEL_SLACK) & (progress <= 1.0 + _LABEL_SLACK)).all()):
            raise ValueError(
                f"timestep {labels.flatten().tolist()[:4]} lies outside timestep_range={first:g}, {last:g}; give the "
                "labels of pure noise and of clean data that this pipeline hands to its network"
            )
        return progress.clamp(0.0, 1.0)

    def _step(self) -> int:
        pipeline = None if self._followed is None else self._followed()
        if pipeline is None:
            raise ValueError(
                'by="step" counts the steps of a pipeline: call follow(pipeline) after construction and after loading, '
                'or use by="timestep"'
            )
        scheduler: Any = getattr(pipeline, "scheduler", None)
        check_scheduler(scheduler)
        index = scheduler.step_index
        if index is None:
            index = scheduler.begin_index or 0
        # All stages of a step of several calls go to one network.
        steps = math.ceil(len(scheduler.timesteps) / scheduler.order)
        return self.model_of_step(index // scheduler.order, steps)

    # ---------------------------------------------------------------- a call

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Calls the network whose turn it is, with the arguments of the last model's ``forward``.

        Returns:
            what that network returns, its sample with the channels and the prediction type of the last model.

        Raises:
            ValueError: no time label, one outside the range, or an argument that the network in turn does not take.
        """
        names = [parameter.name for parameter in self._parameters_of[-1]]
        given = dict(zip(names, args, strict=False)) | kwargs
        timestep = given.pop(self._labels_of[-1], None)
        if timestep is None:
            raise ValueError(f"{self._labels_of[-1]}=None: the time label decides which model is called; pass it")
        sample = given.pop(names[0])
        for name in RESIDUALS:
            if given.get(name) is not None and not self._same_blocks:
                raise ValueError(
                    f"{name} fits one architecture and the models have several; use models of equal blocks, or no "
                    "ControlNet or adapter"
                )
        if self._internal_dict["by"] == "step":
            return self._call(self._step(), sample, timestep, given)
        turns = self.model_of_timestep(timestep)
        chosen = turns.unique().tolist()
        if len(chosen) == 1:
            return self._call(chosen[0], sample, timestep, given)
        if not isinstance(sample, torch.Tensor) or len(sample) != len(turns):
            raise ValueError(
                f"{len(turns)} timesteps of different models need a tensor of as many samples; pass one label a sample"
            )
        outputs = [self._call(k, sample, timestep, given) for k in chosen]
        mixed = outputs[0][0]
        for k, output in zip(chosen[1:], outputs[1:], strict=True):
            turn = (turns == k).to(mixed.device).view(-1, *[1] * (mixed.ndim - 1))
            mixed = torch.where(turn, output[0], mixed)
        return _with_sample(outputs[-1], mixed)

    def _call(self, k: int, sample: Any, timestep: Any, given: Mapping[str, Any]) -> Any:
        parameters = self._parameters_of[k]
        names = {parameter.name for parameter in parameters}
        if any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters):
            names |= set(given)
        for name in set(given) - names:
            if given[name] is not None:
                raise ValueError(
                    f"models[{k}] ({type(self.models[k]).__name__}) takes no {name}, which the pipeline hands over; "
                    "use models of the same conditioning"
                )
        if self._internal_dict["offload_idle"]:
            self._onload(k, (sample[0] if isinstance(sample, list) else sample).device)
        label = {self._labels_of[k]: timestep}
        output = self.models[k](sample, **label, **{name: given[name] for name in given if name in names})
        found = output[0]
        if self._channels is not None and found.shape[1] != self._channels:
            # What follows the mean is a learned variance, which the other models have not.
            found = found[:, : self._channels]
        if self._schedule is not None:
            found = self._converted(k, sample, timestep, found)
        return output if found is output[0] else _with_sample(output, found)

    def _converted(self, k: int, sample: torch.Tensor, timestep: Any, output: torch.Tensor) -> torch.Tensor:
        """The output of model ``k`` as the last model's prediction type."""
        own, common = (self._internal_dict["prediction_types"][j] for j in (k, -1))
        if own == common:
            return output
        assert self._schedule is not None
        labels = (1.0 - self._progress(timestep).flatten()) * self._schedule.num_train_timesteps
        pairs = []
        for level in self._schedule.level(labels.numpy()):
            alpha, sigma = (float(value) for value in self._schedule.alpha_sigma(level))
            (p, q), (p_common, q_common) = (
                data_pair(conversions(self._schedule, kind, float(level), alpha, sigma)[0], kind, alpha)
                for kind in (own, common)
            )
            pairs.append(((p - p_common) / q_common, q / q_common))
        shape = (-1,) + (1,) * (output.ndim - 1)
        of_sample, of_output = torch.tensor(pairs, dtype=torch.float32).to(output.device).unbind(1)
        # An inpainting network sees the mask and the masked image behind the sample.
        state = sample[:, : output.shape[1]]
        return (of_sample.view(shape) * state + of_output.view(shape) * output).to(output.dtype)

    @contextlib.contextmanager
    def cache_context(self, name: str, **where: Any) -> Iterator[None]:
        """Enters the cache context (``"cond"``, ``"uncond"``) of every network that caches."""
        with contextlib.ExitStack() as stack:
            for model in self.models:
                if hasattr(model, "cache_context"):
                    stack.enter_context(model.cache_context(name, **where))
            yield

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Compiles every network by itself: which one is called depends on values, which a graph cannot follow."""
        for model in self.models:
            model.compile(*args, **kwargs)

    # ---------------------------------------------------------------- what the pipeline sees

    @property
    def config(self) -> Any:
        """The last model's config, which pipelines read, and the options of this class."""
        shown = {key: value for key, value in self.models[-1].config.items() if not key.startswith("_")}
        if self._channels is not None:
            shown["out_channels"] = self._channels
        return FrozenDict({**shown, **self._internal_dict})

    @property
    def device(self) -> torch.device:
        """Where the network in turn is: idle ones may be on the CPU."""
        device: torch.device = self.models[self._resident].device
        return device

    def __getattr__(self, name: str) -> Any:
        if name in _READ_BY_PIPELINES:
            return getattr(self.models[-1], name)
        return super().__getattr__(name)

    # ---------------------------------------------------------------- where the networks are

    def _onload(self, k: int, device: torch.device) -> None:
        before, self._resident = self.models[self._resident], k
        if self.models[k] is not before:
            before.to("cpu")  # first, so that both are never there at once
        if self.models[k].device != device:
            self.models[k].to(device)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Self:
        """Behind ``to``, ``cuda`` and ``half``: idle networks take the dtype and stay where they are."""
        if not self._internal_dict["offload_idle"]:
            return super()._apply(fn, recurse)

        def stay(tensor: torch.Tensor) -> torch.Tensor:
            return tensor.to("cpu", fn(tensor.new_empty(0)).dtype)

        for model in self.models:
            # By identity: one network may stand for several parts.
            model._apply(fn if model is self.models[self._resident] else stay, recurse)
        return self

    # ---------------------------------------------------------------- saving and loading

    def save_pretrained(
        self,
        save_directory: str | Path,
        is_main_process: bool = True,
        save_function: Callable[..., Any] | None = None,
        safe_serialization: bool = True,
        variant: str | None = None,
        max_shard_size: int | str = "10GB",
    ) -> None:
        """Writes ``config.json``, and a sub-folder ``model_0``, ``model_1``, ... for every network.

        Args:
            save_directory: a folder; made where it is missing.
            is_main_process: of a distributed run.
            save_function: as in diffusers.
            safe_serialization: must be true: nothing here is pickled.
            variant: part of the names of the weights' files; loading knows it.
            max_shard_size: of a file of weights.

        Raises:
            ValueError: ``safe_serialization=False``.
        """
        if not safe_serialization:
            raise ValueError("safe_serialization=False would pickle the weights; leave it out for safetensors")
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        if is_main_process:
            content = {**json.loads(self.to_json_string()), "variant": variant}
            (folder / self.config_name).write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")
        for k, model in enumerate(self.models):
            model.save_pretrained(
                folder / f"model_{k}",
                is_main_process=is_main_process,
                save_function=save_function,
                variant=variant,
                max_shard_size=max_shard_size,
            )

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | Path, subfolder: str | None = None, **kwargs: Any
    ) -> Self:
        """Loads what ``save_pretrained`` wrote.

        Args:
            pretrained_model_name_or_path: the folder.
            subfolder: in it, as of a saved pipeline.
            kwargs: of the networks' ``from_pretrained``, such as ``torch_dtype``.

        Raises:
            ValueError: no such folder, a damaged one, pickled weights asked for, or a network of a module that was not
                imported.
        """
        if kwargs.get("use_safetensors") is False:
            raise ValueError("use_safetensors=False would unpickle the weights; leave it out for safetensors")
        folder = Path(pretrained_model_name_or_path, subfolder or "")
        try:
            content = json.loads((folder / cls.config_name).read_text())
            options = {name: content[name] for name in _OPTIONS}
            addresses = [(str(library), str(name)) for library, name in content["components"]]
        except (OSError, KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"{folder} holds no saved StitchedDenoiser ({type(error).__name__}: {error}); give a local folder that "
                "save_pretrained wrote"
            ) from error
        # A pipeline that looks for the variant's files in this folder itself finds none, and asks for none.
        kwargs.update(use_safetensors=True, variant=kwargs.get("variant") or content.get("variant"))
        models = [
            class_of(library, name).from_pretrained(folder / f"model_{k}", **kwargs)
            for k, (library, name) in enumerate(addresses)
        ]
        return cls(models, **options)


def _with_sample(output: Any, sample: torch.Tensor) -> Any:
    """A network's output with another sample."""
    if isinstance(output, tuple):
        return (sample, *output[1:])
    output.sample = sample
    return output


# Where a saved pipeline looks for the class: the import of the package is enough to load it.
StitchedDenoiser.__module__ = "fewstep.samplers"
