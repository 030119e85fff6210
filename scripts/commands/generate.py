"""``fewstep generate``: images from a model and a sampler."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from ..generation.model import Model
    from ..generation.record import Settings

_BESIDE_RECORD = {"record", "output", "batch_size", "device"}


@click.command(context_settings={"show_default": True})
@click.option("--model", default="digits-small", help="digits-small, -large, -restore, a diffusers folder or a hub id.")
@click.option("--stitch", metavar="MODEL:SHARE", help="T-Stitch: a smaller model makes the first share of the steps.")
@click.option(
    "--sampler", default="dpm++", help="dpm++, deis, unipc or a variant (an unknown name lists all), or a folder."
)
@click.option("--compare", metavar="A,B,...", help="Several samplers: one labelled picture, samplers by steps.")
@click.option("--steps", default="10", metavar="N[,N...]", help="Steps of the sampler; several with --compare.")
@click.option("--option", "options", multiple=True, metavar="KEY=VALUE", help="Scheduler option, JSON; repeatable.")
@click.option("--preset", help="accurate: grid, order and ending chosen for the number of steps.")
@click.option("--number", type=int, help="Images (a cell).  [default: one a prompt, class or input]")
@click.option("--prompt", "prompts", multiple=True, help="Text; repeatable.")
@click.option("--prompts", "prompts_file", type=click.Path(path_type=Path), help="File with one prompt a line.")
@click.option("--negative-prompt", help="Text of the unconditional branch.")
@click.option("--classes", help="Numbers, ranges and names: 0,3-5,umbrella.  [default: all in turn]")
@click.option("--input", "images", type=click.Path(path_type=Path), help="Degraded image, or a folder of them.")
@click.option("--guidance-scale", type=float, help="Classifier-free guidance.  [default: the pipeline's]")
@click.option("--seed", type=int, default=0, help="Image i has the seed SEED+i.")
@click.option("--batch-size", type=int, default=8, help="Images a call on a GPU; a CPU makes them one by one.")
@click.option("--height", type=int, help="Pixels.  [default: the model's]")
@click.option("--width", type=int, help="Pixels.  [default: the model's]")
@click.option("--dtype", default="float32", help="float32, float16 or bfloat16.")
@click.option("--device", default="auto", help="cpu, cuda, mps or auto.")
@click.option("--output", type=click.Path(path_type=Path), default="generated", help="Folder of the images.")
@click.option("--record", type=click.Path(path_type=Path), help="Repeat the run of a record.json.")
@click.pass_context
def generate(ctx: click.Context, output: Path, record: Path | None, batch_size: int, **given: Any) -> None:
    """Make images, and a record from which they can be made again.

    Writes 00000.png, 00001.png, ..., grid.png and record.json into the output folder. An interrupted run goes on where
    it stopped when the same command is given again. An image depends on its own seed, not on the batch size.

    \b
    fewstep generate
    fewstep generate --sampler unipc --steps 8 --classes 3,7 --number 20
    fewstep generate --compare dpm++,deis,unipc --steps 5,10,20
    fewstep generate --model digits-large --stitch digits-small:0.4
    fewstep generate --model FOLDER --prompt "a red house" --steps 12
    fewstep generate --model digits-restore --input blurred.png
    fewstep generate --record generated/record.json --output again
    """  # noqa: D301  click wants the backspace itself
    from ..generation.inputs import check_inputs
    from ..generation.model import resolve_device, resolve_name
    from ..generation.record import check_writable, read_settings
    from ..generation.request import check_against, check_settings
    from ..generation.run import generate_images
    from ..generation.stitched import load_stitched

    if batch_size < 1:
        raise ValueError(f"batch-size {batch_size} is less than 1")
    check_writable(output)
    typed = {name for name in ctx.params if ctx.get_parameter_source(name) is click.core.ParameterSource.COMMANDLINE}
    if record is not None:
        if typed - _BESIDE_RECORD:
            flags = [flag for p in ctx.command.params if p.name in typed - _BESIDE_RECORD for flag in p.opts]
            raise ValueError(f"record fixes the run: leave out {', '.join(flags)}")
        settings = read_settings(record)
        device = given["device"] if "device" in typed else settings.device
        settings = replace(settings, model=resolve_name(settings.model), device=resolve_device(device))
        check_settings(settings)
        check_inputs(settings.inputs)
        model = load_stitched(settings)
    else:
        if given["compare"] is not None and "sampler" in typed:
            raise ValueError("sampler and compare exclude each other: name all samplers in --compare")
        settings, model = _read_request(given, output)
    check_against(settings, model)
    made = generate_images(settings, model, output, batch_size)
    total = settings.number * len(settings.cells)
    click.echo(f"{total} images in {output}" + (f", {total - made} of them from before" if made < total else ""))


def _read_request(given: dict[str, Any], output: Path) -> tuple[Settings, Model]:
    """Settings from the command line, and their model; what needs no model is checked before it is loaded."""
    from ..generation.inputs import read_inputs
    from ..generation.model import resolve_device, resolve_name
    from ..generation.options import parse_options
    from ..generation.record import Settings
    from ..generation.request import (
        check_settings,
        default_guidance,
        default_number,
        parse_classes,
        parse_steps,
        read_prompts,
    )
    from ..generation.schedulers import resolve_sampler
    from ..generation.stitched import load_stitched, resolved_stitch

    compare = given["compare"]
    names = [given["sampler"]] if compare is None else [name.strip() for name in compare.split(",")]
    prompts = tuple(given["prompts"])
    if given["prompts_file"] is not None:
        prompts += read_prompts(given["prompts_file"])
    images: Path | None = given["images"]
    if images is not None and images.is_dir() and images.resolve() == output.resolve():
        raise ValueError(f"output {output} is the folder of the input, whose images would mix; name another folder")
    settings = Settings(
        model=resolve_name(given["model"]),
        samplers=tuple(resolve_sampler(name) for name in names),
        steps=parse_steps(given["steps"]),
        compare=compare is not None,
        options=parse_options(given["options"]),
        preset=given["preset"],
        number=1 if given["number"] is None else given["number"],
        seed=given["seed"],
        prompts=prompts,
        negative_prompt=given["negative_prompt"],
        classes=(),
        guidance_scale=given["guidance_scale"],
        height=given["height"],
        width=given["width"],
        dtype=given["dtype"],
        device=resolve_device(given["device"]),
        inputs={} if images is None else read_inputs(images),
        stitch=None if given["stitch"] is None else resolved_stitch(given["stitch"]),
    )
    check_settings(settings)
    model = load_stitched(settings)
    chosen = () if given["classes"] is None else parse_classes(given["classes"], model)
    if given["number"] is None:
        settings = replace(settings, number=default_number(model, len(prompts or chosen or settings.inputs)))
    if given["guidance_scale"] is None:
        settings = replace(settings, guidance_scale=default_guidance(model))
    settings = replace(settings, classes=chosen or model.classes)
    check_settings(settings)
    return settings, model
