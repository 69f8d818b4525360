"""The `dfkd-ray` command: opens real data sets and hands them down, shows progress, prints.

torch and ray are imported inside the commands: `--help` stays fast. Errors are one line on stderr, and the exit code
says whose they are: 1 some trials failed, 2 wrong input, 3 the environment (disk, permission), 130 interrupted.
"""

import errno
import json
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
import yaml
from typer.exceptions import TyperException

from dfkd_ray import config as configs

if TYPE_CHECKING:
    from dfkd_ray.bundles import Teacher
    from dfkd_ray.data import LabelledImages
    from dfkd_ray.images import Batch, BatchSource

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Make trained networks small without their training data.\n\n"
    "Start with `dfkd-ray sweep sweeps/quickstart.yaml`, or one trial: "
    "`dfkd-ray recover fashion_mnist_resnet20 --sparsity 0.75 --out runs/first`.",
)
teacher_app = typer.Typer(no_args_is_help=True, help="Teacher bundles: train, import, init (untrained), info.")
bench_app = typer.Typer(no_args_is_help=True, help="Speed as ratios against a plain reference, measured in one run.")
app.add_typer(teacher_app, name="teacher")
app.add_typer(bench_app, name="bench")

DataRoot = Annotated[Path, typer.Option(help="folder with data sets", envvar="DFKD_RAY_DATA")]
Download = Annotated[bool, typer.Option(help="fetch a missing data set")]
Set = Annotated[list[str] | None, typer.Option("--set", help="FIELD=VALUE over the config, repeatable")]
Trust = Annotated[
    list[str] | None, typer.Option("--trust-code", help="a module whose code a bundle may import, repeatable")
]
TestData = Annotated[
    str,
    typer.Option(
        help="for reporting only: auto (bundled, where there is one), none, validation (held out of training), "
        "or a data set's name or folder"
    ),
]
Out = Annotated[Path, typer.Option(help="folder to write")]


def main() -> None:
    """Run the command line; every expected error becomes one line and an exit code."""
    try:
        code = app(standalone_mode=False)
        sys.exit(code if isinstance(code, int) else 0)
    except TyperException as error:
        fail(error.format_message() if hasattr(error, "format_message") else str(error), 2)  # type: ignore[attr-defined]
    except ValueError as error:
        fail(str(error), 2)
    except OSError as error:
        fail(environment_error(error), 3)
    except FloatingPointError as error:
        fail(str(error), 1)
    except (KeyboardInterrupt, typer.Abort):
        fail("interrupted; the same command goes on from what is on disk", 130)


def fail(message: str, code: int) -> None:
    """Print the lines of an error and leave."""
    for line in message.splitlines():
        print(f"error: {line}", file=sys.stderr)
    sys.exit(code)


def environment_error(error: OSError) -> str:
    """One line for a disk, permission or network error."""
    hint = {
        errno.ENOSPC: "free some space",
        errno.EACCES: "check the permissions",
        errno.EROFS: "choose another folder",
    }
    advice = hint.get(error.errno or 0)
    where = f"{error.filename}: " if error.filename else ""
    return f"{where}{error.strerror or error}" + (f"; {advice}, then run the same command again" if advice else "")


class Progress:
    """Shows (stage, done, total, numbers): a line that updates on a terminal, now and then a plain line elsewhere."""

    def __init__(self, every_s: float = 15.0):
        self.live = sys.stderr.isatty()
        self.every_s = 0.1 if self.live else every_s
        self.stage, self.start, self.shown = "", 0.0, 0.0

    def __call__(self, stage: str, done: int, total: int, numbers: Mapping[str, float | int]) -> None:
        """Show where a stage stands."""
        now = time.monotonic()
        if stage != self.stage:
            self.stage, self.start, self.shown = stage, now, 0.0
        if done < total and now - self.shown < self.every_s:
            return
        self.shown = now
        left = (now - self.start) / done * (total - done) if done else 0.0
        parts = [f"{stage} {done}/{total}"]
        parts += [f"{name} {value:.4g}" for name, value in numbers.items() if not name.startswith("class")]
        if left >= 1:
            parts.append(f"{left:.0f} s left")
        line = "  ".join(parts)
        if self.live:
            print(f"\r\033[K{line[:160]}", end="\n" if done == total and stage != "evaluating" else "", file=sys.stderr)
            sys.stderr.flush()
        elif stage != "evaluating":
            print(line, file=sys.stderr, flush=True)


def parse_json(text: str, option: str) -> dict[str, Any]:
    """A JSON object from the command line."""
    try:
        data = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{option} {text!r}: not valid JSON ({error})") from None
    if not isinstance(data, dict):
        raise ValueError(f'{option} {text!r}: expected a JSON object, as in \'{{"stem": "cifar"}}\'')
    return data


def parse_shape(text: str) -> tuple[int, int, int]:
    """`3x32x32` as (3, 32, 32)."""
    parts = text.lower().split("x")
    if len(parts) != 3 or not all(part.isdigit() and int(part) > 0 for part in parts):
        raise ValueError(f"--image-shape {text!r}: expected CHANNELSxHEIGHTxWIDTH, as in 3x32x32")
    return int(parts[0]), int(parts[1]), int(parts[2])


def parse_floats(text: str, option: str) -> tuple[float, ...]:
    """`0.5,0.5,0.5` as numbers."""
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise ValueError(f"{option} {text!r}: expected numbers with commas, as in 0.4914,0.4822,0.4465") from None


def as_batches(data: "LabelledImages") -> "list[Batch]":
    """A data set as batches for evaluation."""
    import torch

    from dfkd_ray.evaluation import EVALUATION_BATCH
    from dfkd_ray.images import Batch

    batches = []
    for index, start in enumerate(range(0, len(data), EVALUATION_BATCH)):
        rows = torch.arange(start, min(start + EVALUATION_BATCH, len(data)))
        batches.append(Batch(index, data.read(rows).numpy(), data.labels[rows].numpy(), data.name))
    return batches


def training_split(teacher: "Teacher", name: str, root: Path, download: bool) -> "tuple[LabelledImages, Any, Any]":
    """A training set with the rows the teacher was trained on and the rows held out of it."""
    from dfkd_ray import data, teachers

    notes = teacher.info.notes.get("training", {})
    found = data.open_dataset(name, root, train=True, image_shape=teacher.info.image_shape, download=download)
    own = name == teacher.info.dataset
    num_validation, seed = (notes.get("num_validation", 0), notes.get("seed", 0)) if own else (0, 0)
    return found, *teachers.split(len(found), num_validation, seed)


def subset(data: "LabelledImages", rows: Any) -> "LabelledImages":
    """Some rows of a data set."""
    from dataclasses import replace

    return replace(data, read=lambda indices: data.read(rows[indices]), labels=data.labels[rows])


def open_test(teacher: "Teacher", name: str, root: Path, download: bool = False) -> "list[Batch] | None":
    """The test batches for reporting, or None."""
    from dfkd_ray import data

    if name == "none" or (name == "auto" and teacher.info.dataset is None):
        return None
    if name == "auto":
        found = data.bundled_test_set(str(teacher.info.dataset), teacher.info.image_shape)
        return None if found is None else as_batches(found)
    if name == "validation":
        if teacher.info.dataset is None:
            raise ValueError(f"--test-data validation: {teacher.name} does not say what it was trained on")
        found, _, held_out = training_split(teacher, teacher.info.dataset, root, download)
        if len(held_out) == 0:
            raise ValueError(f"--test-data validation: {teacher.name} was trained without holding images out")
        return as_batches(subset(found, held_out))
    found = data.open_dataset(name, root, train=False, image_shape=teacher.info.image_shape, download=download)
    if len(found.class_names) != teacher.info.num_classes:
        raise ValueError(
            f"--test-data {name}: {len(found.class_names)} classes, the teacher has {teacher.info.num_classes}"
        )
    return as_batches(found)


def open_real(teacher: "Teacher", name: str, root: Path, settings: configs.RealConfig, download: bool) -> "BatchSource":
    """Real training images as a source: a seeded order, each image once. The upper bound."""
    import torch

    from dfkd_ray.config import synthesis_key
    from dfkd_ray.images import Batch, PixelSpace, decode, encode, mix_seed

    found, rows, _ = training_split(teacher, name, root, download)
    order = rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(mix_seed(settings.seed, 0x4EA1)))]
    key = synthesis_key(teacher.hash, settings, f"real:{name}")
    plain = PixelSpace((0.0,) * teacher.info.image_shape[0], (1.0,) * teacher.info.image_shape[0])

    def batch(index: int) -> Batch:
        chosen = order[index * settings.batch_size : (index + 1) * settings.batch_size]
        if len(chosen) == 0:
            raise ValueError(f"--real-data {name}: {len(rows)} images are fewer than distillation.num_images asks for")
        images = found.read(chosen).numpy()
        if settings.storage != "uint8":
            images = encode(decode(images, plain), plain, settings.storage)
        return Batch(index, images, found.labels[chosen].numpy(), key)

    return batch


@teacher_app.command("train")
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
    attribute: Annotated[str, typer.Option(help="celeba: the attribute to predict")] = "Smiling",
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
    import shutil

    from dfkd_ray import bundles, devices, evaluation, teachers
    from dfkd_ray import data as datasets

    shape = None
    root = data_root
    if settings.image_size:
        probe = datasets.open_dataset(dataset, root, train=True, download=download, attribute=attribute)
        shape = (probe.image_shape[0], settings.image_size, settings.image_size)
    train_set = datasets.open_dataset(
        dataset, root, train=True, image_shape=shape, download=download, attribute=attribute
    )
    shape = train_set.image_shape
    test_set = datasets.open_dataset(dataset, root, train=False, image_shape=shape, attribute=attribute)
    checkpoint = out.with_name(f".{out.name}-training")
    info, network = teachers.train(settings, train_set, checkpoint=checkpoint, progress=Progress())
    device = devices.resolve(settings.device)
    accuracy = evaluation.accuracy(network.to(device), as_batches(test_set), info.space, device, settings.precision)
    info = info.model_copy(update={"test_accuracy": accuracy, "class_names": train_set.class_names})
    bundles.save(out, info, network.cpu().state_dict())
    shutil.rmtree(checkpoint, ignore_errors=True)
    print(f"{out}: test accuracy {accuracy:.4f} on {len(test_set)} images ({dataset}, seed {seed}, last epoch)")


@teacher_app.command("import")
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


@teacher_app.command("init")
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


@teacher_app.command("info")
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


def allow_import_from_here() -> None:
    """Let import paths reach modules in the working folder, as `python -m` does."""
    if "" not in sys.path:
        sys.path.insert(0, "")


def load_teacher(name: str, trust_code: Sequence[str] | None) -> "Teacher":
    """A bundle by folder or name."""
    from dfkd_ray import bundles

    allow_import_from_here()
    return bundles.load(name, tuple(trust_code or ()))


@app.command()
def recover(
    teacher: Annotated[str, typer.Argument(help="bundle folder or bundled teacher")],
    out: Out,
    sparsity: Annotated[float | None, typer.Option(help="share of weights to remove")] = None,
    method: Annotated[str | None, typer.Option(help="deepinversion, noise, or real (with --real-data)")] = None,
    seed: Annotated[int | None, typer.Option(help="of synthesis and distillation")] = None,
    config: Annotated[Path | None, typer.Option(help="YAML file with a trial config")] = None,
    set_: Set = None,
    test_data: TestData = "auto",
    real_data: Annotated[str | None, typer.Option(help="with --method real: the training set, by name")] = None,
    data_root: DataRoot = Path("data"),
    download: Download = False,
    device: Annotated[str | None, typer.Option(help="auto, cpu or cuda")] = None,
    cache: Annotated[Path | None, typer.Option(help="where synthesised batches are kept")] = None,
    trust_code: Trust = None,
) -> None:
    """Prune a network and win its accuracy back without data: one trial, no Ray.

    Writes OUT/student (a bundle), OUT/row.json, OUT/images.png; prints the ladder teacher, pruned,
    BatchNorm re-estimated, recovered. Interrupted, the same command goes on from its checkpoint.
    """
    data = configs.read_yaml(config) if config else {}
    few = {"teacher": teacher, "pruning.sparsity": sparsity, "synthesis.method": method, "device": device}
    few |= {"synthesis.seed": seed, "distillation.seed": seed}
    few = {name: value for name, value in few.items() if value is not None}
    overrides = configs.parse_overrides(set_ or [])
    settings = configs.validate(configs.TrialConfig, configs.with_overrides(data, few | overrides))
    if (settings.synthesis.method == "real") != (real_data is not None):
        raise ValueError("--method real and --real-data NAME go together: real images are used only when asked for")

    from dfkd_ray import cache as caches
    from dfkd_ray import results, trial
    from dfkd_ray.images import save_class_grid

    loaded = load_teacher(teacher, trust_code)
    test = open_test(loaded, test_data, data_root, download)
    real = None
    if real_data is not None:
        assert isinstance(settings.synthesis, configs.RealConfig)
        real = open_real(loaded, real_data, data_root, settings.synthesis, download)
    out.mkdir(parents=True, exist_ok=True)
    outcome = trial.run(
        settings,
        loaded,
        test=test,
        real=real,
        cache_folder=cache or caches.default_folder(),
        checkpoint=out / "checkpoints",
        progress=Progress(),
        trust_code=tuple(trust_code or ()),
    )
    if outcome.student is not None:
        outcome.save_student(out / "student")
        save_class_grid(out / "images.png", outcome.batches, loaded.info.num_classes, loaded.info.space)
    results.write_json(out / "row.json", outcome.row)
    if outcome.row["status"] == "failed":
        print(f"error: trial {outcome.row['trial_id']} failed: {outcome.row['reason']}", file=sys.stderr)
        raise typer.Exit(1)
    print_ladder(outcome.row, out)


def print_ladder(row: Mapping[str, Any], out: Path) -> None:
    """The rungs of one trial."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{row['teacher']}, sparsity {row['achieved_sparsity']:.4f}, {row['synthesis.method']} images")
    for heading in ("rung", "test accuracy %", "points lost", "agreement % (reference set)"):
        table.add_column(heading, justify="left" if heading == "rung" else "right")
    teacher = row.get("teacher_accuracy")
    agreements = {
        "teacher": 1.0,
        "pruned": row["pruned_agreement"],
        "bn_reestimated": row["bn_reestimated_agreement"],
        "recovered": row["agreement"],
    }
    for name, agreement in agreements.items():
        accuracy = row.get(f"{name}_accuracy")
        shown = "-" if accuracy is None else f"{100 * accuracy:.2f}"
        lost = "-" if accuracy is None or teacher is None else f"{100 * (teacher - accuracy):.2f}"
        table.add_row(name.replace("bn_reestimated", "BN re-estimated"), shown, lost, f"{100 * agreement:.2f}")
    console = Console()
    console.print(table)
    if row["real_data"]:
        console.print("real images were used: this is an upper bound, not data-free")
    console.print(
        f"{row['num_images']} images in {row['synthesis_wall_s']:.0f} s, distilled in "
        f"{row['distillation_wall_s']:.0f} s; {row['stored_bytes']:,} bytes stored, {row['dense_bytes']:,} dense"
    )
    console.print(f"written: {out / 'student'}, {out / 'row.json'}, {out / 'images.png'}", soft_wrap=True)


@app.command()
def sweep(
    file: Annotated[Path, typer.Argument(help="YAML sweep file")],
    results: Annotated[Path | None, typer.Option(help="folder for tables, students, pictures")] = None,
    set_: Set = None,
    tiny: Annotated[bool, typer.Option("--tiny", help="the file's small size, for a look in seconds")] = False,
    test_data: TestData = "auto",
    real_data: Annotated[
        str | None, typer.Option(help="for trials with method real: the training set, by name")
    ] = None,
    data_root: DataRoot = Path("data"),
    download: Download = False,
    cache: Annotated[Path | None, typer.Option(help="where synthesised batches are kept")] = None,
    trust_code: Trust = None,
) -> None:
    """Run a grid of trials with Ray Tune on this machine; finished trials are not run again."""
    data = configs.read_yaml(file)
    overrides = configs.parse_overrides(set_ or [])
    from dfkd_ray import cache as caches
    from dfkd_ray import results as tables
    from dfkd_ray import sweep as sweeps

    settings = configs.validate(sweeps.SweepConfig, data, str(file))
    jobs = sweeps.plan(sweeps.expand(settings, overrides, tiny=tiny), lambda name: load_teacher(name, trust_code))
    uses_real = any(job.config.synthesis.method == "real" for job in jobs)
    if uses_real != (real_data is not None):
        raise ValueError(f"{file}: trials with synthesis.method=real and --real-data NAME go together")
    folder = (results or Path("runs") / (file.stem + ("-tiny" if tiny else ""))).absolute()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "sweep.yaml").write_text(yaml.safe_dump(settings.model_dump(mode="json"), sort_keys=False))
    num_done = len(sweeps.finished_ids(folder) & {job.id for job in jobs})
    print(f"{file}: {len(jobs)} trials, {num_done} already finished; results in {folder}", flush=True)
    start = time.monotonic()

    def real_of(teacher: "Teacher", synthesis: configs.RealConfig) -> "BatchSource":
        assert real_data is not None
        return open_real(teacher, real_data, data_root, synthesis, download)

    def on_row(row: Mapping[str, Any], done: int, total: int) -> None:
        if row["status"] == "failed":
            what = f"FAILED: {row['reason']}"
        else:
            accuracy = row["recovered_accuracy"]
            shown = "" if accuracy is None or accuracy != accuracy else f", test accuracy {100 * accuracy:.2f} %"
            what = f"agreement {100 * row['agreement']:.2f} %{shown}"
        name = f"{Path(row['teacher']).name} {row['synthesis.method']} sparsity {row['pruning.sparsity']}"
        print(f"[{done}/{total}, {time.monotonic() - start:.0f} s] {name}: {what}", flush=True)

    num_failed = sweeps.run(
        jobs,
        folder,
        (cache or caches.default_folder()).absolute(),
        test_of=lambda teacher: open_test(teacher, test_data, data_root, download),
        real_of=real_of if real_data else None,
        on_row=on_row,
        trust_code=tuple(trust_code or ()),
    )
    rows = tables.read_trials(folder)
    print_trials(rows[rows["trial_id"].isin([job.id for job in jobs])])
    print(f"{len(jobs)} trials, {num_failed} failed, {time.monotonic() - start:.0f} s; table: {folder / 'trials'}")
    if num_failed:
        raise typer.Exit(1)


def print_trials(rows: Any) -> None:
    """The final table, best agreement first; only fields that differ between trials are shown besides the results."""
    from rich.console import Console
    from rich.table import Table

    def number(value: Any, scale: float = 1.0, digits: int = 2) -> str:
        return "-" if value is None or value != value else f"{scale * value:.{digits}f}"

    fields = [c for c in rows.columns if "." in c and not c.startswith("reference.") and rows[c].nunique(False) > 1]
    fields = [
        c
        for c in fields
        if c in ("synthesis.method",) or rows[rows["synthesis.method"] == "deepinversion"][c].nunique(False) > 1
    ]
    table = Table(title="best agreement with the teacher first (reference set); accuracies in % of the test set")
    names = [
        "teacher",
        *(c.replace("distillation.", "").replace("synthesis.", "").replace("pruning.", "") for c in fields),
    ]
    results = ["teacher", "pruned", "BN", "recovered", "agreement", "stored kB", "s"]
    for heading in names + results:
        table.add_column(heading, justify="right")
    for _, row in rows.iterrows():
        cells = [Path(str(row["teacher"])).name.removeprefix("fashion_mnist_")]
        cells += [
            "-" if row[c] is None or row[c] != row[c] else f"{row[c]:g}" if isinstance(row[c], float) else str(row[c])
            for c in fields
        ]
        if row["status"] == "failed":
            table.add_row(*cells, f"FAILED: {row['reason']}")
            continue
        rungs = ("teacher_accuracy", "pruned_accuracy", "bn_reestimated_accuracy", "recovered_accuracy", "agreement")
        cells += [number(row[c], 100) for c in rungs]
        table.add_row(*cells, number(row["stored_bytes"], 1e-3, 0), number(row["wall_s"], 1, 0))
    console = Console()
    console.width = max(console.width, 120)
    console.print(table)


@bench_app.command("inversion")
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
    trust_code: Trust = None,
) -> None:
    """Synthesis steps per second: ours, the bare network, and an eager float32 reference with forward hooks."""
    from dfkd_ray import bench

    loaded = load_teacher(teacher, trust_code) if teacher else bench.default_teacher()
    settings = configs.validate(
        configs.DeepInversionConfig,
        {"batch_size": batch_size, "precision": precision, "num_threads": threads, "compile": compile_},
    )
    bench.inversion(loaded, settings, steps=steps, repeats=repeats, device_name=device)


@bench_app.command("recovery")
def bench_recovery(
    teacher: Annotated[str, typer.Argument(help="bundle folder or bundled teacher")],
    sparsity: Annotated[list[float] | None, typer.Option(help="repeatable")] = None,
    config: Annotated[Path | None, typer.Option(help="YAML file with our trial config; default: the fast one")] = None,
    seed: Annotated[int, typer.Option()] = 0,
    scale: Annotated[
        float, typer.Option(help="share of the recipe's images and steps, for a trial of the bench")
    ] = 1.0,
    test_data: TestData = "auto",
    data_root: DataRoot = Path("data"),
    set_: Set = None,
    trust_code: Trust = None,
) -> None:
    """Points lost and wall time: ours against the public recipe of the 2025 pruning paper, on the same teacher."""
    from dfkd_ray import bench

    loaded = load_teacher(teacher, trust_code)
    test = open_test(loaded, test_data, data_root)
    if test is None:
        raise ValueError(f"bench recovery needs test data to measure points lost; give --test-data for {loaded.name}")
    data = configs.read_yaml(config) if config else bench.FAST
    overrides = configs.parse_overrides(set_ or []) | {"teacher": teacher}
    overrides |= {"synthesis.seed": seed, "distillation.seed": seed}
    settings = configs.validate(configs.TrialConfig, configs.with_overrides(data, overrides))
    bench.recovery(loaded, settings, test, sparsity or [0.75, 0.9], scale=scale, seed=seed, progress=Progress())
