"""`dfkd-ray teacher`: train, import, initialise, record and inspect teacher bundles."""

import json
from pathlib import Path
from typing import Annotated

import typer

from dfkd_ray import config as configs
from dfkd_ray.cli import held_out, leaving
from dfkd_ray.cli.inputs import as_batches, load_teacher, parse_json, parse_shape, print_notes
from dfkd_ray.cli.options import Address, BundleOut, DataRoot, Download, Out, Set, TeacherName, Trust, settled
from dfkd_ray.cli.show import Progress
from dfkd_ray.cli.streams import say
from dfkd_ray.cli.teacher_import import SHAPE, OldShape, one_shape, teacher_import
from dfkd_ray.plain import named

# Suffix of the folder beside a teacher that holds its checkpoint during training.
TRAINING, TRAINING_SCHEMA = "training.json", "dfkd_ray.training/1"

app = typer.Typer(no_args_is_help=True, help="Teacher bundles: train, import, init (untrained), record, info.")


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
    """Train a teacher on real images; after an interruption, the same command resumes from the last epoch."""
    # An option with its default value counts as not given: the config has the same defaults.
    options = {
        "ARCHITECTURE": {"architecture": architecture},
        "--arguments": {"arguments": parse_json(arguments, "--arguments") or None},
        "--dataset": {"dataset": dataset},
        "--epochs": {"num_epochs": None if epochs == 20 else epochs},
        "--seed": {"seed": seed or None},
        "--validation": {"num_validation": validation or None},
    }
    settings = configs.validate(configs.TeacherTrainingConfig, settled({}, options, set_))
    if dataset != "celeba" and (attribute is not None or all_images):
        raise ValueError(f"--attribute and --all-images are options of celeba; leave them out for {dataset}")
    from dfkd_ray import bundles, devices, evaluation, storage, targets, teachers
    from dfkd_ray import data as datasets

    targets.check(out, bundles.BUNDLE)
    checkpoint = storage.folder(out.with_name(f".{out.name}-training"))
    training = targets.Product("a training", {TRAINING: targets.claims(TRAINING_SCHEMA)})
    targets.check(checkpoint, training)
    shape = None
    root = data_root
    options = {"attribute": attribute or "Smiling", "equal_classes": not all_images} if dataset == "celeba" else {}
    if settings.image_size:
        probe = datasets.open_dataset(dataset, root, train=True, download=download, **options)
        shape = (probe.image_shape[0], settings.image_size, settings.image_size)
    train_set = datasets.open_dataset(dataset, root, train=True, image_shape=shape, download=download, **options)
    shape = train_set.image_shape
    if len(train_set.class_names) < 2:
        raise ValueError(f"--dataset {named(dataset)}: one class, expected at least two")
    classes = train_set.class_names
    test_set = datasets.open_dataset(dataset, root, train=False, image_shape=shape, class_names=classes, **options)
    for opened in (train_set, test_set):
        print_notes(opened)
    _, rows = teachers.split(len(train_set), settings.num_validation, settings.seed)
    training_note = held_out.note_of(train_set, rows.tolist())
    with targets.retracting(checkpoint, TRAINING):
        targets.claim(checkpoint, TRAINING, TRAINING_SCHEMA)
        info, network = teachers.train(settings, train_set, checkpoint=checkpoint.path, progress=Progress())
    runtime = devices.Runtime(devices.resolve(settings.device), info.space, settings.precision)
    test = as_batches(test_set)
    accuracy = evaluation.accuracy(network.to(runtime.device), test, runtime)
    notes = info.notes | training_note | {"test_set": evaluation.test_set(test)}
    notes |= {"data": options} if options else {}  # for who opens this data set for this teacher
    info = info.model_copy(update={"test_accuracy": accuracy, "class_names": classes, "notes": notes})
    bundles.save(out, info, network.cpu().state_dict())
    checkpoint.clear((TRAINING, teachers.CHECKPOINT).__contains__)
    say(f"{out}: test accuracy {accuracy:.4f} on {len(test_set)} images ({dataset}, seed {seed}, last epoch)")


app.command("import")(teacher_import)


@app.command("init")
def teacher_init(
    architecture: Annotated[str, typer.Argument(help="a network's name, or a library's (timm:NAME, …)")],
    out: BundleOut,
    num_classes: Annotated[int, typer.Option()] = 10,
    input_shape: Annotated[str | None, typer.Option(help=f"{SHAPE}; default 1x32x32")] = None,
    arguments: Annotated[str, typer.Option(help="JSON for the architecture")] = "{}",
    seed: Annotated[int, typer.Option()] = 0,
    old_shape: OldShape = None,
) -> None:
    """Make an untrained bundle, marked as untrained, for tests and dry runs."""
    shape = parse_shape(one_shape(input_shape, old_shape) or "1x32x32")
    given = {
        "architecture": architecture,
        "arguments": parse_json(arguments, "--arguments"),
        "num_classes": num_classes,
        "input_shape": shape,
        "mean": (0.5,) * shape[0],
        "std": (0.25,) * shape[0],
        "trained": False,
        "notes": {"init": {"seed": seed}},
    }
    import torch

    from dfkd_ray import bundles, models, storage, targets

    targets.check(out, bundles.BUNDLE)
    given["architecture"], given["arguments"] = models.libraries.structure(architecture, given["arguments"])
    info = configs.validate(bundles.BundleInfo, given, "teacher init")
    torch.manual_seed(seed)
    network = models.build(info.architecture, info.arguments, num_classes=num_classes, image_shape=shape)
    bundles.save(out, info, network.state_dict())
    say(f"{storage.without_secrets(out)}: {architecture}, untrained, seed {seed}")


@app.command("record")
def teacher_record(
    bundle: Annotated[str, typer.Argument(help="bundle folder, or its URI; its records/ is written")],
    dataset: Annotated[str, typer.Option(help="the training data: a data set's name, or a folder with train/<class>/")],
    kinds: Annotated[
        list[str] | None,
        typer.Option(help="top, all, spectral, spectral_pairs; repeatable, or with commas; default: all four"),
    ] = None,
    storage: Annotated[str, typer.Option(help="gaussian, or exemplars (spectral kinds)")] = "gaussian",
    allow_exemplars: Annotated[
        bool,
        typer.Option(
            "--allow-exemplars", help="yes, compressed activations of single training examples may be released"
        ),
    ] = False,
    share: Annotated[float, typer.Option(help="spectral: coefficients kept, per unit of signal, in (0, 1]")] = 0.1,
    rank: Annotated[int, typer.Option(min=1, help="most columns of a low-rank factor or of a pair's basis")] = 256,
    max_size: Annotated[
        float | None,
        typer.Option(help="MB of one record (gaussian), default 32: larger ones get fewer columns"),
    ] = None,
    temperature: Annotated[float, typer.Option(help="logits are divided by it")] = 8.0,
    num_exemplars: Annotated[int, typer.Option(min=1, help="exemplars per class")] = 100,
    limit: Annotated[int | None, typer.Option(min=1, help="record so many of the training images, at random")] = None,
    workers: Annotated[int, typer.Option(min=0, help="Ray workers, a shard each; 0: this process, without Ray")] = 0,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads of this process, or of each worker")] = 2,
    address: Address = None,
    seed: Annotated[int, typer.Option(help="of sketches, bases and the choice of exemplars")] = 0,
    data_root: DataRoot = Path("data"),
    download: Download = False,
    trust_code: Trust = None,
) -> None:
    """Record a teacher's activations in one pass over its training data, for later use without the data.

    Networks without BatchNorm need such a record to be recovered or distilled without data. Images held out of the
    teacher's training are left out here too.
    """
    from dfkd_ray.records import consistency, format

    chosen = list(dict.fromkeys(kind.strip() for given in kinds or format.KINDS for kind in given.split(",")))
    wrong = [kind for kind in chosen if kind not in format.KINDS]
    if wrong:
        raise ValueError(f"--kinds {wrong[0]}: expected {', '.join(format.KINDS)}")
    if storage not in format.STORAGES:
        raise ValueError(f"--storage {storage!r}: expected {' or '.join(format.STORAGES)}")
    if not 0 < share <= 1:
        raise ValueError(f"--share {share}: expected a number above 0 and at most 1")
    low, high = consistency.TEMPERATURES
    if not low <= temperature <= high:
        raise ValueError(f"--temperature {temperature:g}: expected {low:g} to {high:g}")
    if max_size is not None and not 0 < max_size < float("inf"):
        raise ValueError(f"--max-size {max_size}: expected a number of MB above 0")
    if storage == "exemplars" and max_size is not None:
        raise ValueError("--max-size bounds Gaussian records; the size of exemplars follows --num-exemplars and --rank")
    if storage == "exemplars" and not allow_exemplars:
        raise ValueError(
            "--storage exemplars releases compressed activations of single training examples, from which they can be "
            "partly reconstructed; add --allow-exemplars if that is allowed, or leave --storage out"
        )
    from dfkd_ray import bundles
    from dfkd_ray.cli.inputs import training_split
    from dfkd_ray.records import finishing, fitting, sizes

    bundles.check_record_target(bundle, chosen)
    teacher = load_teacher(bundle, trust_code)
    data, rows, _ = training_split(teacher, dataset, data_root, download)
    rows = rows[:limit].numpy()
    max_bytes = sizes.MAX_BYTES if max_size is None else round(1e6 * max_size)
    options = fitting.Options(storage, rank, share, temperature, num_exemplars, seed, max_bytes)
    plan = fitting.plan(teacher, data.labels.numpy(), rows, chosen, options)
    for kind in chosen:
        most = fitting.largest_bytes(plan, kind)
        bound = min(most, max_bytes) if storage == "gaussian" else most
        uncut = f" (--max-size; uncut up to {most / 1e6:.2f} MB)" if bound < most else ""
        say(f"{kind}: at most {bound / 1e6:.2f} MB{uncut}")
    shards = fitting.shards(data.read, data.labels, rows, max(1, workers))
    progress = Progress()
    done = 0

    def on_images(num: int) -> None:
        nonlocal done
        done += num
        progress("recording", done, len(rows), {})

    if workers:
        from dfkd_ray.fleet import record_tasks

        totals = record_tasks.fit(
            plan, teacher, shards, threads, address=address, progress=on_images, on_lost=leaving.at_once
        )
    else:
        totals = fitting.fit(plan, teacher.network, shards[0], num_threads=threads, progress=on_images)
    notes = {"dataset": data.name, "limit": limit, "workers": workers}
    records = finishing.finish(plan, totals, teacher, notes)
    del totals  # for large layers it takes more memory than the records, which are copied on writing
    dense = fitting.dense_bytes(plan.taps, teacher.info.num_classes)
    for record in records:
        size = bundles.save_record(bundle, record)
        say(f"{record.info.kind}: {size / 1e6:.2f} MB; dense covariances of all layers: {dense / size:.1f} times that")
        shares = record.info.notes.get("explained_variance", {})
        if shares:
            say(f"  kept of the variance: {', '.join(f'{name} {share:.1%}' for name, share in shares.items())}")
        shrunk = [part.name for part in record.info.parts if any(part.shrinkage)]
        if shrunk:
            say(f"  singular covariances, shrunk (by how much: in its header): {', '.join(shrunk)}")
    say(f"what they hold of the training data: {records[0].info.leaks}")


@app.command("info")
def teacher_info(
    bundle: TeacherName,
    trust_code: Trust = None,
    download: Download = False,
) -> None:
    """Load and check a teacher, and print its properties."""
    from dfkd_ray import batchnorm
    from dfkd_ray.compression import pruning

    teacher = load_teacher(bundle, trust_code, download=download)
    info, network = teacher.info, teacher.network
    accuracy = "unknown" if info.test_accuracy is None else f"{info.test_accuracy:.4f}"
    num_sliced = sum(edit.dimension == "out" for edit in info.shape_edits)
    sliced = f", without some channels of {num_sliced} layers" if num_sliced else ""
    test = info.notes.get("test_set")
    if test is not None:
        accuracy += f" on {test['name']} ({test['num_images']:,} images, sha256 {test['sha256'][:12]})"
    lines = {
        "architecture": f"{info.architecture} {json.dumps(info.arguments) if info.arguments else ''}".strip() + sliced,
        "trained": "yes" if info.trained else "NO: random weights",
        "trained on": info.dataset or "unknown",
        "test accuracy": accuracy,
        "classes": f"{info.num_classes}{'' if info.head == 'softmax' else ' independent labels'}",
        "images" if len(info.input_shape) == 3 else "signals": "x".join(map(str, info.input_shape)),
        "mean / std": f"{info.mean} / {info.std}, pixels {info.pixel_range}",
        "parameters": f"{pruning.num_parameters(network):,}",
        "sparsity": f"{pruning.achieved_sparsity(network):.4f}",
        "BatchNorm layers": str(len(batchnorm.layers(network)) or "none: DeepInversion will refuse it"),
        "records": ", ".join(teacher.record_kinds()) or "none",
        "hash": teacher.hash,
    }
    for name, value in lines.items():
        say(f"{name:17}{value}")
