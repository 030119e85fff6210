"""Finds and loads the model of a run, and finds out how it is driven."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.resources import as_file, files
from pathlib import Path
from textwrap import shorten
from typing import Any, Literal

import torch
from diffusers import DDIMPipeline, DDPMPipeline, DiffusionPipeline, DiTPipeline
from diffusers.utils import is_transformers_available, logging

# Saved schedulers of ours load only once this package is imported.
from fewstep.samplers import RestorationPipeline, StitchedDenoiser

from .choices import unknown
from .inputs import image_channels

DIGITS = ("digits-small", "digits-large")
"""The bundled models whose images the bundled classifiers know."""

BUNDLED = (*DIGITS, "digits-restore")
"""Models of handwritten digits, 32 by 32 pixels, that come with the package: two class-conditional ones, and one that
undoes blur and noise."""

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}

Kind = Literal["text", "class", "unconditional", "restoration"]

_NEEDED_INPUTS = {"image", "images", "mask_image", "control_image", "init_image", "source_image", "video"}
_NO_CLASS = 1000  # DiTPipeline's label of the branch without class, behind all classes of the embedding


@dataclass(frozen=True)
class Model:
    """A loaded pipeline and what it takes.

    Attributes:
        name: as it is stored in a record: a bundled name, an absolute folder or a hub id.
        pipeline: in evaluation mode on its device.
        kind: whether it takes prompts, class labels, nothing or degraded images.
        parameters: of the pipeline's call, by name.
        scheduler_config: of the scheduler that the model came with; all samplers are built from it.
        classes: the valid class labels, in order; empty unless ``kind`` is ``"class"``.
        labels: class name -> class label.
        unconditional: the label that stands for no class, if the model was trained with one.
    """

    name: str
    pipeline: DiffusionPipeline
    kind: Kind
    parameters: Mapping[str, inspect.Parameter]
    scheduler_config: Mapping[str, Any]
    classes: tuple[int, ...]
    labels: Mapping[str, int]
    unconditional: int | None = None


def resolve_name(name: str) -> str:
    """What a model is called in a record: a bundled name, an absolute folder or a hub id.

    Raises:
        ValueError: there is no such folder, it holds no pipeline, or the name cannot be a hub id.
    """
    if name in BUNDLED:
        if not _bundled_folder(name).is_dir():
            raise ValueError(f"model {name!r} is not part of this installation; give a folder or a hub id")
        return name
    folder = Path(name).expanduser()
    if folder.is_dir():
        if not (folder / "model_index.json").is_file():
            raise ValueError(f"model {name!r} is a folder without model_index.json, so it is no diffusers pipeline")
        return str(folder.resolve())
    if folder.exists():
        raise ValueError(f"model {name!r} is a file; give the folder of a diffusers pipeline")
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", name):
        raise ValueError(f"model {name!r} is neither a folder, nor a hub id, nor bundled ({', '.join(BUNDLED)})")
    return name


def resolve_device(name: str) -> str:
    """The device behind ``auto``, or ``name`` itself where this machine has it.

    Raises:
        ValueError: the device is unknown or not available.
    """
    mps = torch.backends.mps.is_available()
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "mps" if mps else "cpu"
    kind, _, index = name.partition(":")
    if kind not in ("cpu", "cuda", "mps") or (index and not (kind == "cuda" and index.isdecimal())):
        raise unknown("device", name, ["auto", "cpu", "cuda", "mps"])
    count = {"cpu": 1, "cuda": torch.cuda.device_count(), "mps": int(mps)}[kind]
    if int(index or 0) >= count:
        raise ValueError(f"device {name!r} is not available here; use cpu or auto")
    return name


def load_model(name: str, dtype: str, device: str) -> Model:
    """Loads a pipeline from safetensors and JSON only.

    Args:
        name: result of :func:`resolve_name`.
        dtype: key of ``DTYPES``.
        device: result of :func:`resolve_device`.

    Raises:
        ValueError: the model cannot be read, or is of a kind that cannot be driven from here.
    """
    try:
        with _quiet():
            pipeline = _load(name, DTYPES[dtype])
            pipeline.to(device)
    except Exception as error:  # loaders of several libraries raise what they like; to the user it is one thing
        reason = shorten(str(error), 300, placeholder=" ...") or type(error).__name__
        raise ValueError(f"model {name!r} cannot be loaded: {reason}") from error
    pipeline.set_progress_bar_config(disable=True)
    for component in pipeline.components.values():
        if isinstance(component, StitchedDenoiser):
            component.follow(pipeline)
    return describe(name, pipeline)


def _load(name: str, dtype: torch.dtype) -> DiffusionPipeline:
    if name in BUNDLED:
        with as_file(_bundled_folder(name)) as folder:
            pipeline = _from_pretrained(folder, dtype)
    else:
        pipeline = _from_pretrained(name, dtype)
    if isinstance(pipeline, DDIMPipeline):
        # Its loop passes arguments of DDIMScheduler to any scheduler; this one is the same without them.
        pipeline = DDPMPipeline(unet=pipeline.unet, scheduler=pipeline.scheduler)
    if pipeline.dtype != dtype:  # else parts that diffusers keeps in float32 would be cast too
        pipeline.to(dtype=dtype)
    return pipeline


def _from_pretrained(place: str | Path, dtype: torch.dtype) -> DiffusionPipeline:
    # diffusers finds none but its own classes by the name in model_index.json. Of a hub's model it would warn here.
    ours = Path(place).is_dir() and DiffusionPipeline.load_config(place).get("_class_name") == "RestorationPipeline"
    cls = RestorationPipeline if ours else DiffusionPipeline
    return cls.from_pretrained(place, dtype=dtype, use_safetensors=True)


@contextmanager
def _quiet() -> Iterator[None]:
    """Hushes the loaders' warnings and progress: an error says it all, in one line."""
    libraries: list[Any] = [logging]
    if is_transformers_available():
        from transformers.utils import logging as transformers_logging

        libraries.append(transformers_logging)
    verbosities = [library.get_verbosity() for library in libraries]
    for library in libraries:
        library.set_verbosity(library.CRITICAL)
        library.disable_progress_bar()
    try:
        yield
    finally:
        for library, verbosity in zip(libraries, verbosities, strict=True):
            library.set_verbosity(verbosity)


def describe(name: str, pipeline: DiffusionPipeline) -> Model:
    """Reads off a pipeline's call how it is driven.

    Raises:
        ValueError: it needs other inputs, or has no scheduler.
    """
    parameters = inspect.signature(type(pipeline).__call__).parameters
    title = f"model {name!r} ({type(pipeline).__name__})"
    if isinstance(pipeline, RestorationPipeline):
        channels = pipeline.unet.config.out_channels
        if not image_channels(channels):
            raise ValueError(f"{title} restores {channels} channels; generate reads images of 1 (grey) or 3 (RGB)")
        return Model(name, pipeline, "restoration", parameters, pipeline.scheduler.config, (), {})
    needed = sorted(_NEEDED_INPUTS & set(parameters))
    if needed:
        raise ValueError(
            f"{title} takes {', '.join(needed)}; generate drives text, class and unconditional models, and "
            "RestorationPipeline"
        )
    if "num_frames" in parameters:
        raise ValueError(f"{title} makes videos; generate makes images")
    if getattr(pipeline, "scheduler", None) is None:
        raise ValueError(f"{title} has no scheduler, so no sampler can be put into it")
    missing = [p for p in ("num_inference_steps", "generator") if p not in parameters]
    if missing:
        raise ValueError(f"{title} takes no {', '.join(missing)}, which generate needs")
    kind: Kind
    if "prompt" in parameters:
        kind = "text"
    elif "class_labels" in parameters:
        kind = "class"
    elif "batch_size" in parameters:
        kind = "unconditional"
    else:
        raise ValueError(f"{title} takes neither prompt, nor class_labels, nor batch_size")
    labels = dict(getattr(pipeline, "labels", None) or {}) if kind == "class" else {}
    if kind != "class":
        classes: tuple[int, ...] = ()
    elif labels:
        classes = tuple(sorted(set(labels.values())))
    else:
        network = getattr(pipeline, "transformer", None) or pipeline.unet
        count = getattr(network.config, "num_embeds_ada_norm", None) or network.config.num_class_embeds
        classes = tuple(range(count))
    unconditional = None
    if isinstance(pipeline, DiTPipeline) and pipeline.transformer.config.num_embeds_ada_norm == _NO_CLASS:
        unconditional = _NO_CLASS
    return Model(name, pipeline, kind, parameters, pipeline.scheduler.config, classes, labels, unconditional)


def _bundled_folder(name: str) -> Any:
    return files("fewstep.scripts") / "models" / name
