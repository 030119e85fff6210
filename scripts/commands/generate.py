"""``fewstep generate``: images from a model and a sampler."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..generation.steering import METHODS
from ..generation.steering_help import help_text

if TYPE_CHECKING:
    from ..generation.model import Model
    from ..generation.record import Settings

_BESIDE_RECORD = {"record", "output", "batch_size", "device", "plot"}
_OF_STEERING = ("rewards", "particles", "steer_options")


@click.command(context_settings={"show_default": True}, epilog=help_text())
@click.option("--model", default="digits-small", help="digits-small, -large, -restore, a diffusers folder or a hub id.")
@click.option("--stitch", metavar="MODEL:SHARE", help="T-Stitch: a smaller model makes the first share of the steps.")
@click.option(
    "--sampler",
    default="dpm++",
    help="dpm++, deis, unipc or a variant (an unknown name lists all), or a folder; with --steer as it needs.",
)
@click.option("--compare", metavar="A,B,...", help="Several samplers: one labelled picture, samplers by steps.")
@click.option("--steps", default="10", metavar="N[,N...]", help="Steps of the sampler; several with --compare.")
@click.option("--option", "options", multiple=True, metavar="KEY=VALUE", help="Scheduler option, JSON; repeatable.")
@click.option("--preset", help="accurate: grid, order and ending chosen for the number of steps.")
@click.option("--number", type=int, help="Images (a cell).  [default: one a prompt, class or input]")
@click.option("--prompt", "prompts", multiple=True, help="Text; repeatable.")
@click.option("--prompts", "prompts_file", type=click.Path(path_type=Path), help="File with one prompt a line.")
@click.option("--negative-prompt", help="Text of the unconditional branch.")
@click.option("--classes", help="Numbers, ranges and names: 0,3-5,umbrella; or none.  [default: all in turn]")
@click.option("--input", "images", type=click.Path(path_type=Path), help="Degraded image, or a folder of them.")
@click.option("--guidance-scale", type=float, help="Classifier-free guidance.  [default: the pipeline's]")
@click.option("--steer", metavar="METHOD", help=f"{', '.join(METHODS)}; see below.")
@click.option("--reward", "rewards", multiple=True, metavar="REWARD", help="What to steer to, see below; they add up.")
@click.option("--particles", type=int, help="Particles, candidates or whole runs an image.  [default: 8]")
@click.option("--steer-option", "steer_options", multiple=True, metavar="KEY=VALUE", help="Of the method; repeatable.")
@click.option("--plot", type=click.Path(path_type=Path), help="Picture of reward against network calls: png, svg, pdf.")
@click.option("--seed", type=int, default=0, help="Image i has the seed SEED+i.")
@click.option("--batch-size", type=int, default=8, help="Images a call on a GPU; a CPU makes them one by one.")
@click.option("--height", type=int, help="Pixels.  [default: the model's]")
@click.option("--width", type=int, help="Pixels.  [default: the model's]")
@click.option("--dtype", default="float32", help="float32, float16 or bfloat16.")
@click.option("--device", default="auto", help="cpu, cuda, mps or auto.")
@click.option("--output", type=click.Path(path_type=Path), default="generated", help="Folder of the images.")
@click.option("--record", type=click.Path(path_type=Path), help="Repeat the run of a record.json.")
@click.pass_context
def generate(
    ctx: click.Context, output: Path, record: Path | None, batch_size: int, plot: Path | None, **given: Any
) -> None:
    """Make images, and a record from which they can be made again.

    Writes 00000.png, 00001.png, ..., grid.png and record.json into the output folder. An interrupted run goes on where
    it stopped when the same command is given again. An image depends on its own seed, not on the batch size.

    With --steer an image is what a method makes of a population, tree or search towards --reward. The record, and a
    00000.json beside each image, say what reward it has and how many network calls it took (counted for each sample).

    \b
    fewstep generate
    fewstep generate --sampler unipc --steps 8 --classes 3,7 --number 20
    fewstep generate --compare dpm++,deis,unipc --steps 5,10,20
    fewstep generate --model digits-large --stitch digits-small:0.4
    fewstep generate --model FOLDER --prompt "a red house" --steps 12
    fewstep generate --model digits-restore --input blurred.png
    fewstep generate --steer svdd --reward class:8 --particles 8
    fewstep generate --record generated/record.json --output again
    """  # noqa: D301  click wants the backspace itself
    from ..generation.inputs import check_inputs
    from ..generation.model import resolve_device, resolve_name
    from ..generation.record import check_writable, read_settings
    from ..generation.request import check_against, check_settings
    from ..generation.reward_plot import check_reward_plot, plot_rewards
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
        if plot is not None:
            check_reward_plot(plot, settings.steering)
        check_inputs(settings.inputs)
        model = load_stitched(settings)
    else:
        if given["compare"] is not None and "sampler" in typed:
            raise ValueError("sampler and compare exclude each other: name all samplers in --compare")
        for name in _OF_STEERING:
            if given["steer"] is None and name in typed:
                (flag,) = (p.opts[0] for p in ctx.command.params if p.name == name)
                raise ValueError(f"{flag[2:]} is for steered runs: give --steer with one of {', '.join(METHODS)}")
        settings, model = _read_request(given, output, plot, sampler_named="sampler" in typed)
    check_against(settings, model)
    made, accounts = generate_images(settings, model, output, batch_size)
    total = settings.number * len(settings.cells)
    told = f"{total} images in {output}" + (f", {total - made} of them from before" if made < total else "")
    if accounts:
        if settings.steering is not None and settings.steering.rewards:
            told += f"; mean reward {sum(account['reward'] for account in accounts) / total:.4g}"
        told += f"; {sum(account['network_calls'] for account in accounts)} network calls"
    click.echo(told)
    if plot is not None:
        assert settings.steering is not None
        plot_rewards(settings.steering, accounts, plot)


def _read_request(
    given: dict[str, Any], output: Path, plot: Path | None, *, sampler_named: bool
) -> tuple[Settings, Model]:
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
        unconditional,
    )
    from ..generation.reward_plot import check_reward_plot
    from ..generation.schedulers import resolve_sampler
    from ..generation.steering import CORRECTED, read_steering
    from ..generation.stitched import load_stitched, resolved_stitch

    steering = None
    if given["steer"] is not None:
        steering = read_steering(given["steer"], given["rewards"], given["particles"], given["steer_options"])
    compare = given["compare"]
    names = [given["sampler"]] if compare is None else [name.strip() for name in compare.split(",")]
    if steering is not None and steering.kind.noise == "own" and (sampler_named or compare is not None):
        raise ValueError(f"sampler does not apply: steer {steering.method} brings its own; leave it out")
    if steering is not None and compare is None and not sampler_named:
        names = [steering.kind.sampler]
    if plot is not None:
        check_reward_plot(plot, steering)
    prompts = tuple(given["prompts"])
    if given["prompts_file"] is not None:
        prompts += read_prompts(given["prompts_file"])
    images: Path | None = given["images"]
    if images is not None and images.is_dir() and images.resolve() == output.resolve():
        raise ValueError(f"output {output} is the folder of the input, whose images would mix; name another folder")
    settings = Settings(
        model=resolve_name(given["model"]),
        samplers=tuple(name if name == CORRECTED else resolve_sampler(name) for name in names),
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
        steering=steering,
    )
    check_settings(settings)
    model = load_stitched(settings)
    if given["classes"] is not None:
        chosen = parse_classes(given["classes"], model)
    elif steering is not None and steering.chooses_class and model.unconditional is not None:
        chosen = (model.unconditional,)  # the reward says which class
    else:
        chosen = ()
    if given["number"] is None:
        conditions = () if unconditional(model, chosen) else prompts or chosen or settings.inputs
        settings = replace(settings, number=default_number(model, len(conditions)))
    settings = replace(settings, classes=chosen or model.classes)
    if given["guidance_scale"] is None:
        settings = replace(settings, guidance_scale=default_guidance(model, settings.classes))
    check_settings(settings)
    return settings, model
