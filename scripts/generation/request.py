"""From the words of the command line to checked settings."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from pathlib import Path

from .choices import unknown
from .inputs import open_input
from .model import DTYPES, Model
from .record import Settings
from .schedulers import resolve_sampler
from .steering import CORRECTED, check_steering

MAX_SEED = 2**32 - 1
"""The generator of the CPU reads 32 bits of a seed."""

_DEFAULT_NUMBER = 10
_TAKES = {"class": "classes (--classes)", "restoration": "images (--input)"}


def parse_steps(text: str) -> tuple[int, ...]:
    """Numbers of steps such as ``"10"`` or ``"5,10,20"``.

    Raises:
        ValueError: something else.
    """
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise ValueError(f"steps {text!r} is not a whole number, or several with commas between") from None


def read_prompts(path: Path) -> tuple[str, ...]:
    """One prompt a line; empty lines are left out.

    Raises:
        ValueError: the file cannot be read as UTF-8 text, or holds no prompt.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"prompts {path} cannot be read: {error}") from error
    prompts = tuple(line.strip() for line in lines if line.strip())
    if not prompts:
        raise ValueError(f"prompts {path} holds no prompt; write one a line")
    return prompts


def parse_classes(text: str, model: Model) -> tuple[int, ...]:
    """Class labels from names, numbers and ranges, as in ``"0,3-5,umbrella"``; a name goes before a number.

    ``"none"`` is the label of images without class.

    Raises:
        ValueError: a part is none of them, or out of the model's range.
    """
    if model.kind != "class":
        raise ValueError(f"classes do not apply: model {model.name!r} is not class-conditional")
    if text.strip() == "none" and "none" not in model.labels:
        if model.unconditional is None:
            raise ValueError(f"classes 'none' does not apply: model {model.name!r} knows no images without class")
        return (model.unconditional,)
    chosen: list[int] = []
    for part in (part.strip() for part in text.split(",")):
        if part in model.labels:
            chosen.append(model.labels[part])
        elif re.fullmatch(r"\d+", part):
            chosen.append(int(part))
        elif match := re.fullmatch(r"(\d+)-(\d+)", part):
            first, last = int(match[1]), int(match[2])
            if last < first:
                raise ValueError(f"classes {part!r} runs backwards; write {last}-{first}")
            _check_classes((first, last), model)
            chosen.extend(range(first, last + 1))
        else:
            raise unknown("class", part, model.labels or map(str, model.classes))
    return tuple(chosen)


def default_number(model: Model, given: int) -> int:
    """Images where the user names no number.

    Args:
        model: the model.
        given: number of prompts, classes or images that the user named; 0 for none.
    """
    return given or min(_DEFAULT_NUMBER, len(model.classes) or _DEFAULT_NUMBER)


def default_guidance(model: Model, classes: Sequence[int] = ()) -> float | None:
    """The guidance scale of the pipeline itself; None where it has none, and 1 where there is no class to guide to."""
    parameter = model.parameters.get("guidance_scale")
    if parameter is None or not isinstance(parameter.default, (int, float)):
        return None
    return 1.0 if unconditional(model, classes) else float(parameter.default)


def unconditional(model: Model, classes: Sequence[int]) -> bool:
    """Whether these classes are none."""
    return bool(classes) and all(label == model.unconditional for label in classes)


def check_settings(settings: Settings) -> None:
    """What can be checked without the model.

    Raises:
        ValueError: a setting is out of its range.
    """
    if settings.steering is not None:
        check_steering(settings.steering)
        _check_steered(settings)
    if settings.steering is None or settings.steering.kind.noise != "own":
        for sampler in settings.samplers:
            resolve_sampler(sampler)
    if not settings.samplers or len({cell.name for cell in settings.cells}) < len(settings.samplers):
        raise ValueError("compare needs each sampler once, and folders of samplers with names of their own")
    for steps in settings.steps:
        if steps < 1:
            raise ValueError(f"steps {steps} is less than 1")
    if not settings.steps or len(set(settings.steps)) < len(settings.steps):
        raise ValueError("steps needs each number once")
    if len(settings.cells) > 1 and not settings.compare:
        raise ValueError(f"steps {','.join(map(str, settings.steps))}: several numbers of steps need --compare")
    if settings.number < 1:
        raise ValueError(f"number {settings.number} is less than 1")
    if not 0 <= settings.seed <= MAX_SEED - settings.number + 1:
        raise ValueError(f"seed {settings.seed}: seeds of all images must lie in 0 to {MAX_SEED}")
    if settings.guidance_scale is not None and not 0.0 <= settings.guidance_scale < math.inf:
        raise ValueError(f"guidance-scale {settings.guidance_scale:g} must be finite and at least 0; 1 is no guidance")
    for name in ("prompts", "negative_prompt", "model"):
        _check_text(name, getattr(settings, name))
    _check_text("input", tuple(settings.inputs))
    for name, size in (("height", settings.height), ("width", settings.width)):
        if size is not None and size < 1:
            raise ValueError(f"{name} {size} is less than 1")
    if settings.dtype not in DTYPES:
        raise unknown("dtype", settings.dtype, DTYPES)


def check_against(settings: Settings, model: Model) -> None:
    """What depends on the model.

    Raises:
        ValueError: the model does not take a setting, or needs one that is missing.
    """
    title = f"model {settings.model!r}"
    if settings.steering is not None and model.kind == "restoration":
        raise ValueError(f"steer does not apply: {title} steps residuals in the place of images")
    if settings.inputs and model.kind != "restoration":
        raise ValueError(f"input does not apply: {title} takes no images; use digits-restore or leave it out")
    if model.kind == "restoration":
        if not settings.inputs:
            raise ValueError(f"{title} restores images: give --input with a file or a folder")
        _check_sizes(settings, model)
    if settings.prompts and model.kind != "text":
        what = _TAKES.get(model.kind, "neither prompts nor classes")
        raise ValueError(f"prompt does not apply: {title} takes {what}")
    if model.kind == "text" and not settings.prompts:
        raise ValueError(f"{title} needs a prompt: give --prompt or --prompts")
    if settings.classes and model.kind != "class":
        raise ValueError(f"classes do not apply: {title} is not class-conditional")
    if model.kind == "class":
        _check_classes(settings.classes or (-1,), model)
    for name in ("negative_prompt", "guidance_scale", "height", "width"):
        if getattr(settings, name) is not None and name not in model.parameters:
            raise ValueError(f"{name.replace('_', '-')} does not apply: {title} takes none")


def _check_steered(settings: Settings) -> None:
    for name, given in (("compare", settings.compare), ("input", settings.inputs), ("stitch", settings.stitch)):
        if given:
            raise ValueError(f"steer and {name} exclude each other: leave out one of the two")
    assert settings.steering is not None
    own = settings.steering.kind.noise == "own"
    if own != (CORRECTED in settings.samplers):
        raise ValueError(f"sampler {', '.join(settings.samplers)} is not for steer {settings.steering.method}")


def _check_sizes(settings: Settings, model: Model) -> None:
    for name in settings.inputs:
        width, height = open_input(name, 1).size
        try:
            model.pipeline.padding(height, width)
        except ValueError as error:
            raise ValueError(f"input {name}: {error}") from error


def _check_text(name: str, value: str | Sequence[str] | None) -> None:
    try:
        "".join(value or "").encode()
    except UnicodeEncodeError:
        raise ValueError(f"{name.replace('_', '-')} {value!r} is not UTF-8 text") from None


def _check_classes(classes: Sequence[int], model: Model) -> None:
    for label in classes:
        if label not in model.classes and label != model.unconditional:
            span = f"{model.classes[0]} to {model.classes[-1]}"
            raise ValueError(f"class {label} is out of range: model {model.name!r} has {span}")
