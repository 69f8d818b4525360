"""`dfkd-ray bench`."""

import shlex
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args

import typer

from dfkd_ray import config as configs
from dfkd_ray.cli.inputs import load_teacher, open_test, subset
from dfkd_ray.cli.options import DataRoot, Download, Out, Set, TeacherName, TestData, Trust, settled
from dfkd_ray.cli.show import Progress

if TYPE_CHECKING:
    from dfkd_ray.bench.audit import Source
    from dfkd_ray.results.measurements import Row

Rows = Annotated[
    Path | None,
    typer.Option("--rows", help="Parquet file that gets the numbers too, beside those it has, for tables of documents"),
]

app = typer.Typer(no_args_is_help=True, help="Speed as ratios, measured in one run; a privacy audit.")


def check_rows(path: Path | None) -> None:
    """`ValueError` for a file to which no measurement can be added, before anything is measured."""
    from dfkd_ray.results import measurements

    if path is not None:
        measurements.check(path)


def keep(path: Path | None, rows: "Sequence[Row]", device: str = "cpu") -> None:
    """Add measurements to the file of `--rows`, with the command that made them but for this option."""
    if path is None:
        return
    from dfkd_ray import __version__, devices
    from dfkd_ray.results import measurements
    from dfkd_ray.storage import without_secrets

    words = [without_secrets(word) for word in sys.argv[1:]]
    at = next((index for index, word in enumerate(words) if word.partition("=")[0] == "--rows"), len(words))
    command = shlex.join(["dfkd-ray", *words[:at], *words[at + 1 + (words[at : at + 1] == ["--rows"]) :]])
    numerics = devices.numerics_class(devices.resolve(device))
    measurements.add(path, measurements.measured(rows, numerics=numerics, version=__version__, command=command))
    print(f"rows: {path}")


@app.command("inversion")
def bench_inversion(
    teacher: Annotated[
        str | None, typer.Argument(help="bundle; default: untrained ResNet-18, CIFAR stem, width 32")
    ] = None,
    batch_size: Annotated[int, typer.Option()] = 256,
    steps: Annotated[int, typer.Option(help="steps per timed run")] = 5,
    repeats: Annotated[int, typer.Option(help="alternating runs; the median counts")] = 5,
    threads: Annotated[int, typer.Option()] = 2,
    precision: Annotated[str, typer.Option(help="bfloat16 or float32")] = "bfloat16",
    device: Annotated[str, typer.Option()] = "auto",
    compile_: Annotated[bool, typer.Option("--compile", help="torch.compile our side")] = False,
    rows: Rows = None,
    trust_code: Trust = None,
) -> None:
    """Synthesis steps per second: ours, the bare network, and an eager float32 reference with forward hooks."""
    from dfkd_ray.bench import recipe

    check_rows(rows)
    loaded = load_teacher(teacher, trust_code) if teacher else recipe.default_teacher()
    settings = configs.validate(
        configs.DeepInversionConfig,
        {"batch_size": batch_size, "precision": precision, "num_threads": threads, "compile": compile_},
    )
    keep(rows, recipe.inversion(loaded, settings, steps=steps, repeats=repeats, device_name=device), device)


@app.command("recovery")
def bench_recovery(
    teacher: TeacherName,
    sparsity: Annotated[list[float] | None, typer.Option(help="repeatable")] = None,
    config: Annotated[Path | None, typer.Option(help="YAML file with our trial config")] = None,
    effort: Annotated[configs.Effort, typer.Option(help="of ours, where config and --set leave it open")] = "fast",
    seed: Annotated[int, typer.Option()] = 0,
    scale: Annotated[
        float, typer.Option(help="share of the recipe's images and steps, for a trial of the bench")
    ] = 1.0,
    test_data: TestData = "auto",
    data_root: DataRoot = Path("data"),
    rows: Rows = None,
    set_: Set = None,
    trust_code: Trust = None,
) -> None:
    """Points lost and wall time: ours against the public recipe of the 2025 pruning paper, on the same teacher."""
    from dfkd_ray.bench import recipe

    check_rows(rows)
    loaded = load_teacher(teacher, trust_code)
    test = open_test(loaded, test_data, data_root)
    if test is None:
        raise ValueError(f"bench recovery needs test data to measure points lost; give --test-data for {loaded.name}")
    options = {"TEACHER": {"teacher": teacher}, "--seed": {"synthesis.seed": seed, "distillation.seed": seed}}
    data = settled(configs.read_yaml(config) if config else {}, options, set_, config)
    settings = configs.validate(configs.TrialConfig, configs.with_effort(data, effort))
    wanted = sparsity or [0.75, 0.9]
    found = recipe.recovery(loaded, settings, test, wanted, scale=scale, seed=seed, progress=Progress())
    keep(rows, [replace(row, labels={**row.labels, "effort": effort}) for row in found], settings.device)


@app.command("latency")
def bench_latency(
    teacher: TeacherName,
    students: Annotated[list[str] | None, typer.Argument(help="bundles, measured against the teacher")] = None,
    int8: Annotated[bool, typer.Option("--int8", help="also each network in int8, on ONNX Runtime")] = False,
    repeats: Annotated[int, typer.Option(min=3, help="alternating runs; the median counts")] = 15,
    rows: Rows = None,
    trust_code: Trust = None,
) -> None:
    """Seconds per batch of a teacher and students: ONNX Runtime and PyTorch, one and all threads, batch 1 and 32."""
    from dfkd_ray.bench import latency

    check_rows(rows)
    networks = [load_teacher(name, trust_code) for name in (teacher, *(students or ()))]
    found = latency.run(networks, repeats=repeats, with_int8=int8)
    keep(rows, [one.row() for one in found if one.setting.num_threads is not None])
    on_gpu = [one.row() for one in found if one.setting.num_threads is None]
    if on_gpu:
        keep(rows, on_gpu, "cuda")


@app.command("fleet")
def bench_fleet(
    teacher: Annotated[str, typer.Argument(help="bundle folder or bundled teacher")] = "fashion_mnist_resnet8",
    part: Annotated[
        list[str] | None, typer.Option(help="control, streaming, memory, trial or grid, repeatable; default: all")
    ] = None,
    scale: Annotated[float, typer.Option(help="of the default numbers of steps, for trial and grid")] = 0.2,
    pairs: Annotated[int, typer.Option(help="alternating pairs of trials; the median counts")] = 5,
    trust_code: Trust = None,
) -> None:
    """The shared synthesis fleet: its cost against local synthesis, the savings of sharing, and its limits."""
    from dfkd_ray.bench import fleet as bench_fleet

    bench_fleet.run(part or [], load_teacher(teacher, trust_code), teacher, scale, pairs)


@app.command("scaling")
def bench_scaling(
    size: Annotated[
        list[int] | None, typer.Option(min=1, help="synthesizers, repeatable; default: 8, 64, 256 and 1000")
    ] = None,
    simulated_s: Annotated[float, typer.Option(min=0.01, help="seconds that a simulated batch takes")] = 4.0,
    seconds: Annotated[float, typer.Option(min=0.1, help="measured, for each of two loads per size")] = 8.0,
    batch_s: Annotated[float, typer.Option(min=0.01, help="model: seconds that a real batch takes")] = 30.0,
    readers: Annotated[int, typer.Option(min=1, help="model: trials that read each batch")] = 12,
    network_gbit: Annotated[float, typer.Option(min=0.01, help="model: Gbit/s of a node, each way")] = 10.0,
    store_gb: Annotated[float, typer.Option(min=0.01, help="model: GB of the smallest node's object store")] = 60.0,
) -> None:
    """The largest fleet for one coordinator: measured with simulated synthesizers, and a model of real ones."""
    from dfkd_ray.bench import scaling as bench_scaling

    assumed = bench_scaling.Assumed(batch_s, readers, network_gbit * 1e9 / 8, store_gb * 1e9)
    bench_scaling.run(size or [8, 64, 256, 1000], assumed, simulated_s, seconds)


@app.command("results")
def bench_results(
    rows: Annotated[int, typer.Option(min=1)] = 10_000,
    writers: Annotated[int, typer.Option(min=1, help="that many part files, before compaction")] = 400,
) -> None:
    """Tables and report with many rows: read, filter and group before and after compaction, against plain pandas."""
    from dfkd_ray.bench import results as bench_results

    bench_results.run(rows, min(rows, writers))


@app.command("records")
def bench_records(
    teacher: Annotated[
        str | None, typer.Argument(help="bundle folder or bundled teacher; default: untrained, see --architecture")
    ] = None,
    architecture: Annotated[str, typer.Option(help="of an untrained teacher")] = "lenet5",
    image_shape: Annotated[str, typer.Option(help="of an untrained teacher, CHANNELSxHEIGHTxWIDTH")] = "1x32x32",
    num_classes: Annotated[int, typer.Option(help="of an untrained teacher")] = 10,
    kinds: Annotated[str, typer.Option(help="with commas")] = ",".join(get_args(configs.RecordKind)),
    images: Annotated[int, typer.Option(min=1, help="images to record")] = 5000,
    batch_size: Annotated[int, typer.Option(min=2)] = 256,
    steps: Annotated[int, typer.Option(min=1, help="steps per timed run")] = 10,
    repeats: Annotated[int, typer.Option(help="alternating runs; the median counts; 0: only record")] = 5,
    threads: Annotated[int, typer.Option(min=1)] = 2,
    rows: Rows = None,
    trust_code: Trust = None,
) -> None:
    """Activation records: seconds, bytes and memory of recording; speed of reconstruction against DeepInversion."""
    from dfkd_ray.bench import records as bench_records
    from dfkd_ray.cli.inputs import parse_shape

    check_rows(rows)
    chosen = kinds.split(",")
    if teacher:
        loaded = load_teacher(teacher, trust_code)
    else:
        loaded = bench_records.untrained(architecture, parse_shape(image_shape), num_classes)
    bench_records.fit(loaded, chosen, images, threads)
    if repeats:
        keep(rows, bench_records.reconstruction(loaded, chosen, batch_size, steps, repeats, threads))


@app.command("privacy")
def bench_privacy(
    out: Out,
    size: Annotated[
        Literal["quick", "standard", "memorising"],
        typer.Option(help="quick: 16 teachers, no records; standard: 32, all arms; memorising: the audit's self-test"),
    ] = "quick",
    shadows: Annotated[
        int | None, typer.Option(min=6, help="shadow teachers, an even number; default: the size's")
    ] = None,
    arms: Annotated[
        str | None, typer.Option(help="of teacher,real,recovered,records,nearest, with commas; default: the size's")
    ] = None,
    canaries: Annotated[int | None, typer.Option(min=0, help="images with wrong labels; default 200")] = None,
    dataset: Annotated[str | None, typer.Option(help="data set name, or a folder; default fashion_mnist")] = None,
    seed: Annotated[int | None, typer.Option(help="of halves and canaries; default 0")] = None,
    data_root: DataRoot = Path("data"),
    download: Download = False,
    rows: Rows = None,
    set_: Set = None,
) -> None:
    """Membership inference with shadow teachers: do students or synthetic images tell what a teacher was trained on?

    After an interruption, the same command goes on with what is missing. Fields for --set: dfkd_ray/bench/audit.py.
    """
    from dfkd_ray.bench import audit, privacy

    options = {
        "--shadows": {"num_shadows": shadows},
        "--arms": {"arms": None if arms is None else arms.split(",")},
        "--canaries": {"num_canaries": canaries},
        "--dataset": {"training.dataset": dataset},
        "--seed": {"seed": seed},
    }
    settings = configs.validate(audit.AuditConfig, settled(audit.SIZES[size], options, set_), "audit")
    check_rows(rows)
    found, num_failed = privacy.run(settings, open_source(settings.training, data_root, download), out)
    keep(rows, [one.measured() for one in found if one.model is None])
    wrong = privacy.self_test(found) if size == "memorising" else []
    for line in wrong:
        print(f"the audit's self-test failed: {line}")
    if num_failed or wrong:
        raise typer.Exit(1)


def open_source(settings: configs.TeacherTrainingConfig, root: Path, download: bool) -> "Source":
    """The data set of an audit, and the training of teachers on parts of it."""
    import torch

    from dfkd_ray import data, teachers
    from dfkd_ray.bench.audit import Source

    found = data.open_dataset(settings.dataset, root, train=True, download=download)
    if settings.image_size is not None:
        shape = (found.image_shape[0], settings.image_size, settings.image_size)
        found = data.open_dataset(settings.dataset, root, train=True, image_shape=shape, download=download)

    def train(config: configs.TeacherTrainingConfig, rows: Any, labels: Any, checkpoint: Path) -> Any:
        part = replace(subset(found, torch.from_numpy(rows)), labels=torch.from_numpy(labels))
        return teachers.train(config, part, checkpoint=checkpoint, progress=Progress())

    return Source(
        lambda rows: found.read(torch.from_numpy(rows)).numpy(), found.labels.numpy(), len(found.class_names), train
    )
