"""`dfkd-ray export`: a network as a file for other programs, or as a bundle."""

from pathlib import Path
from typing import Annotated, Any

import typer

from dfkd_ray.cli.inputs import load_teacher, open_test
from dfkd_ray.cli.options import Cache, DataRoot, Download, TeacherName, TestData, Trust
from dfkd_ray.cli.show import Progress
from dfkd_ray.cli.streams import say


def export(
    student: TeacherName,
    out: Annotated[Path, typer.Option(help="file to write: .onnx, .pt2, .xml; for format torch or bundle a folder")],
    format_: Annotated[
        str,
        typer.Option(
            "--format",
            help="onnx; torch-export (for torch.export.load); openvino (.xml and .bin); torch (a folder: readable "
            "source code and safetensors, for PyTorch alone); bundle (a folder for this package)",
        ),
    ] = "onnx",
    int8: Annotated[
        bool, typer.Option("--int8", help="with onnx, openvino: int8 weights and activations, on synthetic images")
    ] = False,
    float16: Annotated[
        bool, typer.Option("--float16", help="with bundle: weights rounded to float16, for a smaller file")
    ] = False,
    test_data: TestData = "none",
    data_root: DataRoot = Path("data"),
    download: Download = False,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda; where synthetic images are made")] = "auto",
    cache: Cache = None,
    trust_code: Trust = None,
    push: Annotated[
        str | None,
        typer.Option(
            metavar="OWNER/NAME",
            help="upload files and card to this repository of the Hugging Face Hub, with the token of HF_TOKEN or "
            "`hf auth login`; a new repository is private",
        ),
    ] = None,
    public: Annotated[bool, typer.Option("--public", help="with --push: make a new repository public")] = False,
    replace: Annotated[
        bool, typer.Option("--replace", help="with --push: also into a repository that this command did not make")
    ] = False,
) -> None:
    """Write a network for other programs, or as a bundle, with a model card, and compare what is written with it.

    The file takes normalised images, (pixel - mean) / std, float32, in batches of any size, and gives logits. Mean,
    std, classes and more are in its metadata. It is kept only if it answers as the network on synthetic images.
    """
    if push is None and (public or replace):
        raise ValueError(f"{'--public' if public else '--replace'} goes with --push OWNER/NAME")
    from dfkd_ray import cache as caches
    from dfkd_ray import exporting
    from dfkd_ray.exporting import hub

    if push is not None and format_ == "bundle":
        raise ValueError("--push does not go with --format bundle: its notes may have paths of this machine")
    if int8 and float16:
        raise ValueError("--int8 and --float16: expected one of them")
    precision = "int8" if int8 else "float16" if float16 else "float32"
    path = exporting.check(out, format_, precision, device)
    repository = None if push is None else hub.check(push, public=public, replace=replace)
    root = caches.check_target(cache or caches.default_folder()).uri
    loaded = load_teacher(student, trust_code, download=download)
    test = open_test(loaded, test_data, data_root, download)
    making = exporting.Making(device, root, Progress())
    done = exporting.export(loaded, path, format=format_, precision=precision, test=test, making=making)
    for line in lines(done):
        say(line)
    if done.warning:
        say(f"warning: {done.warning}", error=True)
    if repository is not None:
        address = hub.push(done, repository)
        say(f"uploaded: {address} ({'private' if repository.is_private else 'public'})")
        if public and repository.is_private:
            say("note: the repository was there, and stays private: change that on the Hub", error=True)


def lines(done: Any) -> list[str]:
    """The result, in lines of at most 80 columns but for the path."""
    found, kind = done.comparison, f"{done.format}, {done.precision}"
    told = [
        f"written: {done.path}",
        f"its model card: {done.card}",
        f"{kind}: {done.size_bytes:,} bytes, {done.size_bytes / done.dense_bytes:.2f} of the dense float32 weights",
    ]
    if done.precision != "float32":
        told.append(f"{done.size_bytes / done.float32_bytes:.2f} of the float32 file ({done.float32_bytes:,} bytes)")
    told += [
        f"compared on {found.num_images} mixed images,",
        f"  {done.images}:",
        f"  agreement {100 * found.agreement:.2f} %, KL {found.kl:.2g} nats",
        f"  logits differ by up to {found.largest_difference:.2g} (their standard deviation: {found.spread:.2g})",
    ]
    if done.accuracy is not None:
        told.append(f"accuracy {100 * done.accuracy:.2f} %, of the network {100 * done.network_accuracy:.2f} %")
    return told
