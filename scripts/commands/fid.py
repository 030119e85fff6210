"""``fewstep fid``: how far a model's images are from real ones, over samplers, steps and guidance scales."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .words import parse_names

if TYPE_CHECKING:
    from accelerate import PartialState

    from fewstep.metrics import FeatureExtractor

    from ..fid.references import ReferenceSource
    from ..fid.settings import Evaluation
    from ..generation.model import Model

_FILE = click.Path(path_type=Path)
_OF_IMAGES = {
    *("reference", "reference_part", "reference_size", "reference_channels"),
    *("images", "features", "weights", "metrics", "batch_size", "device", "output"),
}


@click.command(context_settings={"show_default": True})
@click.option("--model", default="digits-small", help="digits-small, digits-large, a diffusers folder or a hub id.")
@click.option("--samplers", default="dpm++", metavar="A,B,...", help="Names or folders, as of generate --sampler.")
@click.option("--steps", default="10", metavar="N[,N...]", help="Steps of the samplers.")
@click.option("--guidance-scale", metavar="S[,S...]", help="Classifier-free guidance.  [default: the pipeline's]")
@click.option("--number", type=int, default=5000, help="Images a cell.")
@click.option("--option", "options", multiple=True, metavar="KEY=VALUE", help="Scheduler option, JSON; repeatable.")
@click.option("--preset", help="accurate: grid, order and ending chosen for the number of steps.")
@click.option("--prompts", "prompts_file", type=_FILE, help="File with one prompt a line, used in turn.")
@click.option("--negative-prompt", help="Text of the unconditional branch.")
@click.option("--classes", help="Numbers, ranges and names: 0,3-5,umbrella, used in turn.  [default: all]")
@click.option("--seed", type=int, default=0, help="Image i has the seed SEED+i.")
@click.option("--reference", help="Folder of images, image tar, .npz, or .safetensors.  [default: mnist-train]")
@click.option("--reference-part", metavar="NAME", help="Sub-folder of the reference, or array of an .npz.")
@click.option("--reference-size", type=int, help="Resizes and cuts the reference to squares of so many pixels.")
@click.option("--reference-channels", type=int, help="Makes the reference grey (1) or RGB (3).")
@click.option("--images", type=_FILE, help="Measures these instead of a model's: folder, image tar or .npz.")
@click.option("--features", default="digits", help="digits, inception, dinov2 or clip.")
@click.option("--weights", help="Of the features: a file of convert_inception; a folder or hub id of dinov2 or clip.")
@click.option(
    "--metrics",
    metavar="A,B,...",
    help="fid, is, kid, precision, recall, density, coverage, fid_infinity.  [default: fid, and is where it applies]",
)
@click.option(
    "--batch-size", type=int, default=50, help="Images a call, on a GPU or of --images; else the model decides."
)
@click.option("--height", type=int, help="Pixels.  [default: the model's]")
@click.option("--width", type=int, help="Pixels.  [default: the model's]")
@click.option("--dtype", default="float32", help="float32, float16 or bfloat16.")
@click.option("--device", default="auto", help="cpu, cuda, mps or auto.")
@click.option("--save-images", is_flag=True, help="Writes the images too.")
@click.option("--plot", "plot_file", type=_FILE, help="File for the picture: png, svg or pdf.")
@click.option("--profile", is_flag=True, help="Tells where the time goes.")
@click.option("--output", type=_FILE, default="fid", help="Folder of the figures; with --images none by default.")
@click.pass_context
def fid(ctx: click.Context, images: Path | None, output: Path, **given: Any) -> None:
    """Measure a model's images against real ones, for every sampler, number of steps and guidance scale.

    Writes fid.json and fid.csv into the output folder: Frechet distance (FID where the features are inception's) and
    other figures with 95 % confidence intervals. No image is written unless asked for. The command shares its work out
    when it is started by accelerate, on one machine or on several that share the output folder, and goes on where it
    stopped when it is given again; on the CPU neither changes a digit where processes have equally many threads
    (torchrun sets OMP_NUM_THREADS=1). A folder takes more samplers, steps and scales later.

    \b
    fewstep fid --samplers dpm++,deis,unipc --steps 5,10,20 --plot fid.png
    fewstep fid --reference real/ --images made/ --features inception --weights inception.safetensors
    accelerate launch --num_processes 8 -m fewstep.scripts fid --model digits-large --number 50000
    """  # noqa: D301  click wants the backspace itself
    typed = {name for name in ctx.params if ctx.get_parameter_source(name) is click.core.ParameterSource.COMMANDLINE}
    if given["batch_size"] < 1:
        raise ValueError(f"batch-size {given['batch_size']} is less than 1")
    source = _read_source(given)
    if images is not None:
        if typed - _OF_IMAGES:
            flags = [flag for p in ctx.command.params if p.name in typed - _OF_IMAGES for flag in p.opts]
            raise ValueError(f"images exist already: leave out {', '.join(flags)}")
        _compare(images, source, given, output if "output" in typed else None)
    else:
        _evaluate(source, given, output)


def _compare(images: Path, source: ReferenceSource, given: dict[str, Any], output: Path | None) -> None:
    from ..bench.output import table
    from ..fid.comparison import compare
    from ..fid.folder import check_no_evaluation
    from ..fid.report import CONFIDENCE, figure_text, heading
    from ..files import write_json
    from ..generation.model import resolve_device
    from ..generation.record import check_writable

    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise ValueError("images are measured by one process; start the command without a launcher")
    if output is not None:
        check_writable(output)
        check_no_evaluation(output)
    extractor = _load_extractor(given, resolve_device(given["device"]))
    metrics = _read_metrics(given["metrics"], extractor)
    row = compare(images, source, extractor, metrics, given["batch_size"])
    header = ["images", "number", *(f"{heading(name)} ({CONFIDENCE:.0%})" for name in metrics)]
    figures = [figure_text(name, row["figures"][name]) for name in metrics]
    click.echo(table(header, [[images.name, str(row["number"]), *figures]]))
    for remark in row["remarks"]:
        click.echo(remark, err=True)
    if output is not None:
        write_json(output / "fid.json", row)


def _evaluate(source: ReferenceSource, given: dict[str, Any], output: Path) -> None:
    from datetime import timedelta

    import torch
    from accelerate import PartialState

    from ..fid.folder import EvaluationFolder
    from ..fid.plot import plot_results
    from ..fid.report import results_table
    from ..fid.run import Evaluator
    from ..fid.settings import check_number
    from ..fid.stopwatch import Stopwatch
    from ..files import check_files
    from ..generation.model import resolve_device
    from ..plots import check_plot

    resolved = resolve_device(given["device"])
    plot_file: Path | None = given["plot_file"]
    check_files(plot_file)
    if plot_file is not None:
        check_plot(plot_file)
    # Whoever is done first waits for the others, however long a cell takes them.
    state = PartialState(cpu=resolved == "cpu", timeout=timedelta(days=7))
    device = _own_device(state, resolved)
    evaluation, model = _read_evaluation(given, device)
    extractor = _load_extractor(given, device)
    evaluation = replace(evaluation, metrics=_read_metrics(given["metrics"], extractor))
    check_number("number", evaluation.settings.number, evaluation.metrics, extractor.size)
    shared = {
        **evaluation.to_json(model),
        "reference": source.to_json(),
        "features": extractor.name,
        "extractor": extractor.fingerprint,
    }
    folder = EvaluationFolder(output, shared)
    evaluator = Evaluator(evaluation, model, extractor, source, folder, state)
    stopwatch = Stopwatch(torch.device(device)) if given["profile"] else None
    evaluator.run(stopwatch)
    if state.is_main_process:
        click.echo(results_table(folder.rows))
        for remark in dict.fromkeys(remark for row in folder.rows for remark in row["remarks"]):
            click.echo(remark, err=True)
        if stopwatch is not None:
            shares = ", ".join(f"{name} {share:.1%}" for name, share in stopwatch.shares().items())
            click.echo(f"time of the first process: {shares}")
        if plot_file is not None:
            plot_results(folder.rows, plot_file)
    state.destroy_process_group()


def _read_source(given: dict[str, Any]) -> ReferenceSource:
    from ..fid.references import ReferenceSource

    name = given["reference"]
    if name is None and given["features"] != "digits":
        raise ValueError(
            f"reference is missing: features {given['features']!r} have none of their own; give --reference"
        )
    parts = (given["reference_part"], given["reference_size"], given["reference_channels"])
    source = ReferenceSource("mnist-train" if name is None else name, *parts)
    source.check()
    return source


def _load_extractor(given: dict[str, Any], device: str) -> FeatureExtractor:
    from fewstep.metrics import EXTRACTORS, feature_extractor

    from ..generation.choices import unknown

    if given["features"] not in EXTRACTORS:
        raise unknown("features", given["features"], EXTRACTORS)
    return feature_extractor(given["features"], given["weights"], device)


def _read_metrics(text: str | None, extractor: FeatureExtractor) -> tuple[str, ...]:
    from fewstep.metrics import IMAGE_METRICS

    if text is None:
        return ("fid",) if extractor.classes is None else ("fid", "is")
    names = parse_names("metrics", text, IMAGE_METRICS)
    if "is" in names and extractor.classes is None:
        raise ValueError(f"metrics: features {extractor.name!r} have no classes for 'is'; use digits or inception")
    return tuple(dict.fromkeys(names))


def _own_device(state: PartialState, resolved: str) -> str:
    """The device of this process; several processes have one each."""
    if state.num_processes == 1:
        return resolved
    if ":" in resolved:
        raise ValueError(f"device {resolved!r} is one for all {state.num_processes} processes; use cuda or cpu")
    return str(state.device)


def _read_evaluation(given: dict[str, Any], device: str) -> tuple[Evaluation, Model]:
    """Settings from the command line, and their model; what needs no model is checked before it is loaded."""
    from ..fid.settings import Evaluation, chunk_size
    from ..generation.model import load_model, resolve_name
    from ..generation.options import parse_options
    from ..generation.record import Settings
    from ..generation.request import (
        check_against,
        check_settings,
        default_guidance,
        parse_classes,
        parse_steps,
        read_prompts,
    )
    from ..generation.schedulers import resolve_sampler

    scales = parse_scales(given["guidance_scale"])
    settings = Settings(
        model=resolve_name(given["model"]),
        samplers=tuple(resolve_sampler(name.strip()) for name in given["samplers"].split(",")),
        steps=parse_steps(given["steps"]),
        compare=True,
        options=parse_options(given["options"]),
        preset=given["preset"],
        number=given["number"],
        seed=given["seed"],
        prompts=() if given["prompts_file"] is None else read_prompts(given["prompts_file"]),
        negative_prompt=given["negative_prompt"],
        classes=(),
        guidance_scale=None,
        height=given["height"],
        width=given["width"],
        dtype=given["dtype"],
        device=device.partition(":")[0],
    )
    for scale in scales:
        check_settings(replace(settings, guidance_scale=scale))
    model = load_model(settings.model, settings.dtype, device)
    if model.kind == "restoration":
        raise ValueError(f"model {settings.model!r} restores images; measure it by fewstep bench restore")
    if getattr(model.pipeline, "safety_checker", None) is not None:
        model.pipeline.safety_checker = None  # it paints images black, which are then not the model's
    classes = () if given["classes"] is None else parse_classes(given["classes"], model)
    settings = replace(settings, classes=classes or model.classes)
    if scales == (None,):
        scales = (default_guidance(model),)
    for scale in scales:
        check_against(replace(settings, guidance_scale=scale), model)
    chunk = chunk_size(model, settings, given["batch_size"])
    return Evaluation(settings, scales, (), chunk, given["save_images"]), model


def parse_scales(text: str | None) -> tuple[float | None, ...]:
    """Guidance scales such as ``"1,1.5,4"``; ``(None,)`` for the pipeline's own.

    Raises:
        ValueError: no numbers, or one twice.
    """
    if text is None:
        return (None,)
    try:
        scales = tuple(float(part) for part in text.split(","))
    except ValueError:
        scales = ()
    if not scales or len(set(scales)) < len(scales):
        raise ValueError(f"guidance-scale {text!r}: give numbers, each once, such as 1,1.5,4")
    return scales
