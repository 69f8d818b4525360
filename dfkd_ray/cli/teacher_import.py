"""`dfkd-ray teacher import`: a bundle from somebody's own weights, or from a library's network."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dfkd_ray import config as configs
from dfkd_ray.cli.inputs import parse_floats, parse_json, parse_shape, say_doubts
from dfkd_ray.cli.options import Download
from dfkd_ray.cli.streams import say

if TYPE_CHECKING:
    from dfkd_ray.bundles import BundleInfo

DESCRIBING = ("num_classes", "input_shape", "mean", "std")  # what weights do not say, and a library knows
KNOWN = "needed, unless the library knows it"

SHAPE = "CHANNELSxHEIGHTxWIDTH, or CHANNELSxLENGTH (signals)"
OldShape = Annotated[str | None, typer.Option("--image-shape", hidden=True)]  # before there were signals


def teacher_import(
    weights: Annotated[
        str, typer.Argument(help=".safetensors, or PyTorch's (.pt, .pth, .ckpt, …); or a library's network (timm:NAME)")
    ],
    architecture: Annotated[
        str | None, typer.Option(help="a network's name, a library's (timm:NAME, …), or package.module:factory")
    ] = None,
    num_classes: Annotated[int | None, typer.Option(help=KNOWN)] = None,
    input_shape: Annotated[str | None, typer.Option(help=f"{SHAPE}; {KNOWN}")] = None,
    mean: Annotated[str | None, typer.Option(help=f"per channel, in pixel units, with commas; {KNOWN}")] = None,
    std: Annotated[str | None, typer.Option(help=f"per channel, in pixel units, with commas; {KNOWN}")] = None,
    arguments: Annotated[str | None, typer.Option(help="JSON for the architecture")] = None,
    pixel_range: Annotated[str | None, typer.Option(help="lowest and highest pixel; default 0,1")] = None,
    independent_labels: Annotated[
        bool, typer.Option("--independent-labels", help="an image may have any number of labels (a sigmoid head)")
    ] = False,
    dataset: Annotated[str | None, typer.Option(help="what it was trained on, if known")] = None,
    class_names: Annotated[str | None, typer.Option(help="with commas")] = None,
    weights_key: Annotated[
        str | None, typer.Option(help="the place in the file, if several sets of weights fit: a key, or a prefix")
    ] = None,
    out: Annotated[str | None, typer.Option(help="folder to write, or its URI (s3://, gs://, …); needed")] = None,
    download: Download = False,
    old_shape: OldShape = None,
) -> None:
    """Make a bundle from your own network. If you give package.module:factory, that factory is run.

    The weights are found in the file by the network's names and shapes, below any key ("state_dict", …) and behind any
    prefix ("module.", …). A library's network brings its weights and all else with it (--download fetches them).
    """
    shape = one_shape(input_shape, old_shape)
    options = {
        "architecture": architecture,
        "arguments": None if arguments is None else parse_json(arguments, "--arguments"),
        "num_classes": num_classes,
        "input_shape": None if shape is None else parse_shape(shape),
        "mean": None if mean is None else parse_floats(mean, "--mean"),
        "std": None if std is None else parse_floats(std, "--std"),
        "pixel_range": None if pixel_range is None else parse_floats(pixel_range, "--pixel-range"),
    }
    given = {name: value for name, value in options.items() if value is not None}
    also: dict[str, Any] = {"dataset": dataset} if dataset else {}
    also |= {"head": "sigmoid"} if independent_labels else {}
    also |= {"class_names": tuple(name.strip() for name in class_names.split(","))} if class_names else {}
    from dfkd_ray import batchnorm, bundles, storage, targets
    from dfkd_ray.bundles import pretrained
    from dfkd_ray.compression import pruning

    is_named = pretrained.is_named(weights)
    complete = given if is_named else completed(given, download)
    missing = [] if is_named else [name for name in ("architecture", *DESCRIBING) if name not in complete]
    missing += ["out"] if out is None else []
    if out is None or missing:
        of = f" of {architecture}" if architecture else ""
        tells = "; the weights alone do not tell" if missing != ["out"] else ""
        raise ValueError(f"{', '.join(map(option, missing))}{of}: missing{tells}")
    targets.check(out, bundles.BUNDLE)
    notes: list[str] = []
    if is_named:
        if given:
            raise ValueError(f"{', '.join(map(option, given))}: {weights} says it itself; leave it out")
        teacher = bundles.load(weights, download=download)
        info = configs.validate(bundles.BundleInfo, teacher.info.model_dump() | also, "teacher import")
        network = teacher.network
    else:
        info = configs.validate(bundles.BundleInfo, complete | also, "teacher import")
        network, found = bundles.from_file(info, Path(weights), weights_key)
        notes += found.notes
        for other in found.others:
            notes.append(
                f"the averaged weights at {other} fit too, and are not taken; --weights-key {other} takes them"
            )
    if batchnorm.layers(network):
        batchnorm.check_recording(network, info.image_shape)
    info = bundles.save(out, info, network.state_dict())
    size = f"{pruning.num_parameters(network):,} parameters"
    say(f"{storage.without_secrets(out)}: {info.architecture}, {size}")
    for line in filled_in(info, given):
        say(line)
    for note in notes:
        say(f"note: {note}")
    if not batchnorm.layers(network):
        say("note: it has no BatchNorm layer; DeepInversion will refuse it (it needs activation records)")
    say_doubts(bundles.Teacher(bundles.freeze(network), info, bundles.teacher_hash(info), storage.folder(out).name))


def option(name: str) -> str:
    """A parameter's name as an option."""
    return "--" + name.replace("_", "-")


def completed(given: dict[str, Any], download: bool) -> dict[str, Any]:
    """The fields of a description that were given, and those that the architecture's library knows."""
    from dfkd_ray.bundles import pretrained
    from dfkd_ray.models import libraries

    architecture, about = given.get("architecture", ""), {}
    found = libraries.split(architecture)
    if found is not None:
        known = pretrained.known(*found, download=download)
        about = {"num_classes": known.num_classes, "input_shape": known.image_shape}
        if given.get("input_shape", known.image_shape)[0] == len(known.mean):
            about |= {"mean": known.mean, "std": known.std}
        architecture, arguments = libraries.structure(architecture, given.get("arguments", {}))
        given = {**given, "architecture": architecture, "arguments": arguments}
    return {**about, **given}


def filled_in(info: "BundleInfo", given: dict[str, Any]) -> list[str]:
    """What a library has said about a network, where it was not given, as a line."""
    names = [name for name in DESCRIBING if name not in given]
    values = {"num_classes": info.num_classes, "input_shape": "x".join(map(str, info.input_shape))}
    values |= {"mean": ",".join(f"{v:g}" for v in info.mean), "std": ",".join(f"{v:g}" for v in info.std)}
    said = ", ".join(f"{name} {values[name]}" for name in names)
    return [f"as {info.architecture.partition(':')[0]} says: {said}"] if said else []


def one_shape(shape: str | None, old: str | None) -> str | None:
    """The shape under its name of today or its old name; `ValueError` for two of them."""
    if None not in (shape, old):
        raise ValueError("--image-shape is the old name of --input-shape; leave one out")
    return shape if old is None else old
