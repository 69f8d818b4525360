"""`dfkd-ray teacher`: make and look at bundles."""

import json
import shutil
from pathlib import Path
from typing import Annotated

import typer

from dfkd_ray import config as configs
from dfkd_ray.cli.inputs import (
    allow_import_from_here,
    as_batches,
    load_teacher,
    parse_floats,
    parse_json,
    parse_shape,
)
from dfkd_ray.cli.options import DataRoot, Download, Out, Set, Trust
from dfkd_ray.cli.show import Progress

app = typer.Typer(no_args_is_help=True, help="Teacher bundles: train, import, init (untrained), info.")


@app.command("train")
def teacher_train(
    architecture: Annotated[str, typer.Argument(help="a network's name, or package.module:factory")],
    dataset: Annotated[str, typer.Option(help="data set name, or a folder with train/ and test/")],
    out: Out,
    arguments: Annotated[str, typer.Option(help="JSON for the architecture")] = "{}",
    epochs: Annotated[int, typer.Option(help="passes over the training images")] = 20,
    seed: Annotated[int, typer.Option()] = 0,
    validation: Annotated[int, typer.Option(help="training images to hold out")] = 0,
    data_root: DataRoot = Path("data"),
    download: Download = False,
    attribute: Annotated[str | None, typer.Option(help="celeba: the attribute to predict; default Smiling")] = None,
    all_images: Annotated[
        bool, typer.Option("--all-images", help="celeba: all, not equal numbers with and without the attribute")
    ] = False,
    set_: Set = None,
) -> None:
    """Train a teacher on real images; interrupted, the same command goes on from the last epoch."""
    fields = {
        "architecture": architecture,
        "arguments": parse_json(arguments, "--arguments"),
        "dataset": dataset,
        "num_epochs": epochs,
        "seed": seed,
        "num_validation": validation,
    }
    data = configs.with_overrides(fields, configs.parse_overrides(set_ or []))
    settings = configs.validate(configs.TeacherTrainingConfig, data)
    if dataset != "celeba" and (attribute is not None or all_images):
        raise ValueError(f"--attribute and --all-images are options of celeba; leave them out for {dataset}")
    from dfkd_ray import bundles, devices, evaluation, teachers
    from dfkd_ray import data as datasets

    shape = None
    root = data_root
    options = {"attribute": attribute or "Smiling", "equal_classes": not all_images} if dataset == "celeba" else {}
    if settings.image_size:
        probe = datasets.open_dataset(dataset, root, train=True, download=download, **options)
        shape = (probe.image_shape[0], settings.image_size, settings.image_size)
    train_set = datasets.open_dataset(dataset, root, train=True, image_shape=shape, download=download, **options)
    shape = train_set.image_shape
    test_set = datasets.open_dataset(dataset, root, train=False, image_shape=shape, **options)
    checkpoint = out.with_name(f".{out.name}-training")
    info, network = teachers.train(settings, train_set, checkpoint=checkpoint, progress=Progress())
    device = devices.resolve(settings.device)
    accuracy = evaluation.accuracy(network.to(device), as_batches(test_set), info.space, device, settings.precision)
    notes = {**info.notes, "data": options} if options else info.notes  # for who opens this data set for this teacher
    info = info.model_copy(update={"test_accuracy": accuracy, "class_names": train_set.class_names, "notes": notes})
    bundles.save(out, info, network.cpu().state_dict())
    shutil.rmtree(checkpoint, ignore_errors=True)
    print(f"{out}: test accuracy {accuracy:.4f} on {len(test_set)} images ({dataset}, seed {seed}, last epoch)")


@app.command("import")
def teacher_import(
    weights: Annotated[Path, typer.Argument(help=".safetensors, or .pt / .pth with a state dict")],
    architecture: Annotated[str, typer.Option(help="a network's name, or package.module:factory")],
    num_classes: Annotated[int, typer.Option()],
    image_shape: Annotated[str, typer.Option(help="CHANNELSxHEIGHTxWIDTH")],
    mean: Annotated[str, typer.Option(help="per channel, in pixel units, with commas")],
    std: Annotated[str, typer.Option(help="per channel, in pixel units, with commas")],
    out: Out,
    arguments: Annotated[str, typer.Option(help="JSON for the architecture")] = "{}",
    pixel_range: Annotated[str, typer.Option(help="lowest and highest pixel")] = "0,1",
    dataset: Annotated[str | None, typer.Option(help="what it was trained on, if known")] = None,
    class_names: Annotated[str | None, typer.Option(help="with commas")] = None,
) -> None:
    """Make a bundle from a network of your own. Naming package.module:factory here runs that factory."""
    given = {
        "architecture": architecture,
        "arguments": parse_json(arguments, "--arguments"),
        "num_classes": num_classes,
        "image_shape": parse_shape(image_shape),
        "mean": parse_floats(mean, "--mean"),
        "std": parse_floats(std, "--std"),
        "pixel_range": parse_floats(pixel_range, "--pixel-range"),
        "dataset": dataset,
        "class_names": tuple(class_names.split(",")) if class_names else (),
    }
    from dfkd_ray import batchnorm, bundles, models

    info = configs.validate(bundles.BundleInfo, given, "teacher import")
    state = bundles.read_state_dict(weights)
    allow_import_from_here()
    network = models.build(architecture, info.arguments, num_classes=num_classes, image_shape=info.image_shape)
    bundles.load_state(network, state, str(weights))
    bundles.save(out, info, network.state_dict())
    print(f"{out}: {architecture}, {sum(p.numel() for p in network.parameters()):,} parameters")
    if not batchnorm.layers(network):
        print("note: it has no BatchNorm layer; DeepInversion will refuse it (it needs activation records)")


@app.command("init")
def teacher_init(
    architecture: Annotated[str, typer.Argument(help="a network's name")],
    out: Out,
    num_classes: Annotated[int, typer.Option()] = 10,
    image_shape: Annotated[str, typer.Option(help="CHANNELSxHEIGHTxWIDTH")] = "1x32x32",
    arguments: Annotated[str, typer.Option(help="JSON for the architecture")] = "{}",
    seed: Annotated[int, typer.Option()] = 0,
) -> None:
    """Make an untrained bundle, marked so: for tests and dry runs."""
    shape = parse_shape(image_shape)
    given = {
        "architecture": architecture,
        "arguments": parse_json(arguments, "--arguments"),
        "num_classes": num_classes,
        "image_shape": shape,
        "mean": (0.5,) * shape[0],
        "std": (0.25,) * shape[0],
        "trained": False,
        "notes": {"init": {"seed": seed}},
    }
    import torch

    from dfkd_ray import bundles, models

    info = configs.validate(bundles.BundleInfo, given, "teacher init")
    allow_import_from_here()
    torch.manual_seed(seed)
    network = models.build(architecture, info.arguments, num_classes=num_classes, image_shape=shape)
    bundles.save(out, info, network.state_dict())
    print(f"{out}: {architecture}, untrained, seed {seed}")


@app.command("info")
def teacher_info(
    bundle: Annotated[str, typer.Argument(help="bundle folder or bundled teacher")], trust_code: Trust = None
) -> None:
    """Load a bundle, check it, and print what it is."""
    from dfkd_ray import batchnorm, pruning

    teacher = load_teacher(bundle, trust_code)
    info, network = teacher.info, teacher.network
    lines = {
        "architecture": f"{info.architecture} {json.dumps(info.arguments) if info.arguments else ''}".strip(),
        "trained": "yes" if info.trained else "NO: random weights",
        "trained on": info.dataset or "unknown",
        "test accuracy": "unknown" if info.test_accuracy is None else f"{info.test_accuracy:.4f}",
        "classes": str(info.num_classes),
        "images": "x".join(map(str, info.image_shape)),
        "mean / std": f"{info.mean} / {info.std}, pixels {info.pixel_range}",
        "parameters": f"{sum(p.numel() for p in network.parameters()):,}",
        "sparsity": f"{pruning.achieved_sparsity(network):.4f}",
        "BatchNorm layers": str(len(batchnorm.layers(network)) or "none: DeepInversion will refuse it"),
        "hash": teacher.hash,
    }
    for name, value in lines.items():
        print(f"{name:17}{value}")
