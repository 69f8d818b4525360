"""`dfkd-ray synthesize`: makes images with the synthesis fleet and exports them as files."""

import math
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dfkd_ray import config as configs
from dfkd_ray.cli import before, leaving
from dfkd_ray.cli.inputs import load_teacher
from dfkd_ray.cli.options import (
    BatchTimeout,
    Cache,
    Download,
    Out,
    Set,
    Synthesizers,
    TeacherName,
    Trust,
    number_of,
    settled,
)
from dfkd_ray.cli.show import Progress, print_fleet
from dfkd_ray.cli.streams import say
from dfkd_ray.plain import given

if TYPE_CHECKING:
    from dfkd_ray.batches import Batch
    from dfkd_ray.bundles import Teacher
    from dfkd_ray.fleet import Settings
    from dfkd_ray.image_sets import Export

METHODS = tuple(name for name, row in configs.METHODS.items() if row.is_data_free)
ALONE = tuple(name for name in METHODS if configs.METHODS[name].is_stationary)  # without a student
DEVICES = ("auto", "cpu", "cuda")


def synthesize(
    teacher: TeacherName,
    out: Out,
    num_images: Annotated[
        int, typer.Option(min=1, max=10**9, help="how many, exactly: the last batch is cut")
    ] = 10_000,
    format_: Annotated[
        str, typer.Option("--format", help="folder (8-bit PNG files by class) or parquet (pixels as stored)")
    ] = "folder",
    config: Annotated[Path | None, typer.Option(help="YAML file with a synthesis config")] = None,
    set_: Set = None,
    method: Annotated[str | None, typer.Option(help=", ".join(ALONE))] = None,
    seed: Annotated[int | None, typer.Option(help="of the images")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda")] = "auto",
    synthesizers: Synthesizers = "auto",
    gpus_per_synthesizer: Annotated[
        float | None, typer.Option(help="a fraction, or whole GPUs; default: all GPUs, shared out")
    ] = None,
    cache: Cache = None,
    batch_timeout: BatchTimeout = 3600.0,
    trust_code: Trust = None,
    download: Download = False,
) -> None:
    """Make images from a teacher with the synthesis fleet, and write them for other programs to read.

    Writes OUT/train/CLASS/BATCH-ROW.png or OUT/part-BATCH.parquet, and last OUT/synthesis.json. Every batch is first
    written to the cache: after an interruption, the same command resumes from there.
    """
    settings = settings_of(config, method, seed, set_)
    if device not in DEVICES:
        raise ValueError(f"--device {device!r}: expected {', '.join(DEVICES)}")
    if gpus_per_synthesizer is not None and device == "cpu":
        raise ValueError(f"--gpus-per-synthesizer {gpus_per_synthesizer:g}: no GPU is used with --device cpu")
    num_synthesizers = None if synthesizers == "auto" else number_of(synthesizers)

    from dfkd_ray import cache as caches
    from dfkd_ray import image_sets, storage, synthesis, targets

    targets.check(out, image_sets.IMAGE_SET)
    cache_root = caches.check_target(cache or caches.default_folder()).uri
    loaded = load_teacher(teacher, trust_code, download=download)
    check(loaded, settings, device)
    asked, settings = settings, synthesis.pinned(loaded, settings, device)
    before.say_batch_size("synthesis", asked, settings)
    before.say_excess("batch_size", settings, loaded, device)
    todo = export_of(loaded, settings, out, format_, num_images)
    counts = {"made": 0, "found": 0}
    progress, start = Progress(), time.monotonic()

    if loaded.info.head == "sigmoid":
        say("note: its labels are independent, so no image has one class: they are written without labels", error=True)

    def on_batch(batch: "Batch", found: bool) -> None:
        image_sets.write(todo, batch)
        counts["found" if found else "made"] += 1
        terms = {name: value for name, value in batch.terms.items() if isinstance(value, float)}
        progress("synthesising", sum(counts.values()), len(missing), {**terms, "cached": counts["found"]})

    with targets.retracting(storage.folder(todo.folder), image_sets.UNFINISHED):
        missing = image_sets.prepare(todo)
        if missing:
            fleet_options = (device, num_synthesizers, gpus_per_synthesizer, cache_root, batch_timeout)
            through_fleet(loaded, settings, missing, on_batch, *fleet_options)
    num_kept = todo.num_batches - len(missing)
    seconds = time.monotonic() - start
    num_made, num_found = counts["made"], counts["found"]
    record = image_sets.finish(todo, seconds=seconds, num_made=num_made, num_found=num_found, num_kept=num_kept)
    say(
        f"{num_images} images in {seconds:.0f} s: {num_made} batches made, {num_found} found in the cache, "
        f"{num_kept} there already; written: {record}"
    )


def settings_of(file: Path | None, method: str | None, seed: int | None, assignments: list[str] | None) -> Any:
    """The synthesis config of a command line; fields may have their trial config names, as `synthesis.num_steps`."""
    data = configs.read_yaml(file) if file else {}
    assignments = [assignment.strip().removeprefix("synthesis.") for assignment in assignments or []]
    data = settled(data, {"--method": {"method": method}, "--seed": {"seed": seed}}, assignments)
    chosen = data.get("method", "deepinversion")
    if chosen not in METHODS:
        raise ValueError(f"method {given(chosen)}: expected one of {', '.join(ALONE)}")
    if chosen not in ALONE:
        raise ValueError(
            f"method {chosen} makes its images in rounds, while a student trains on them; run "
            f"`dfkd-ray recover`, or give one of {', '.join(ALONE)}"
        )
    return configs.parse_synthesis(data)


def check(teacher: "Teacher", settings: Any, device: str) -> None:
    """Check the settings before Ray starts: `ValueError` with the reason."""
    from dfkd_ray import devices, synthesis

    precision, fast = getattr(settings, "precision", "float32"), getattr(settings, "fast", False)
    devices.check_precision(precision, devices.resolve(device), fast)
    synthesis.check(teacher, settings)


def export_of(teacher: "Teacher", settings: Any, out: Path, format_: str, num_images: int) -> "Export":
    """The description of the export."""
    from dfkd_ray.image_sets import Export

    info = teacher.info
    return Export(
        folder=out.expanduser(),
        format=format_,
        num_images=num_images,
        key=configs.synthesis_key(teacher.hash, settings),
        config=settings.model_dump(mode="json"),
        teacher=teacher.name,
        teacher_hash=teacher.hash,
        num_classes=info.num_classes,
        class_names=info.class_names,
        image_shape=info.image_shape,
        mean=info.mean,
        std=info.std,
        pixel_range=info.pixel_range,
        head=info.head,
    )


def through_fleet(
    teacher: "Teacher",
    settings: Any,
    indices: list[int],
    on_batch: "Callable[[Batch, bool], None]",
    device: str,
    num_synthesizers: int | None,
    gpus_per_synthesizer: float | None,
    cache_root: str,
    batch_timeout_s: float,
) -> None:
    """Make batches with a new fleet: calls `on_batch(batch, found)` for each, then prints the fleet's status."""
    from dfkd_ray import devices, fleet
    from dfkd_ray.trial import Round

    with fleet.connected(on_lost=leaving.at_once):
        chosen = fleet_settings(settings, device, num_synthesizers, gpus_per_synthesizer, cache_root)
        with fleet.started(replace(chosen, batch_timeout_s=batch_timeout_s), [teacher]) as running:
            stream = running.stream(in_flight=max(4, 2 * chosen.num_synthesizers))
            for batch, found in stream.read(Round(teacher, settings, devices.resolve(chosen.device)), indices):
                on_batch(batch, found)
            status = running.status()
            if status is not None:
                print_fleet(status)


def fleet_settings(
    settings: Any, device: str, num_synthesizers: int | None, gpus_per_synthesizer: float | None, cache_root: str
) -> "Settings":
    """The settings of a fleet that uses the machines alone. `ValueError` if it does not fit."""
    from dfkd_ray import fleet

    machines = fleet.nodes()
    num_gpus = int(sum(node.gpus for node in machines)) if device != "cpu" else 0
    if device == "cuda" and not num_gpus:
        raise ValueError("--device cuda: Ray sees no GPU; use --device cpu or auto")
    if gpus_per_synthesizer is not None and not num_gpus:
        raise ValueError(f"--gpus-per-synthesizer {gpus_per_synthesizer:g}: Ray sees no GPU; leave it out")
    if gpus_per_synthesizer is None and num_gpus:
        sharing = math.ceil((num_synthesizers or 1) / num_gpus)  # a share never spans two GPUs
        gpus_per_synthesizer = math.floor(10_000 / sharing) / 10_000  # Ray's resolution
    threads = getattr(settings, "num_threads", 1)
    placement = fleet.plan(
        machines,
        synthesizers=num_synthesizers,
        synthesizer_threads=threads,
        trial_threads=1,
        use_gpu=num_gpus > 0,
        gpus_per_synthesizer=gpus_per_synthesizer,
        gpus_per_trial=0.0,
    )
    return fleet.Settings(
        num_synthesizers=placement.num_synthesizers,
        cpus=placement.synthesizer_cpus,
        gpus=placement.synthesizer_gpus,
        cache_root=cache_root,
        device=device if num_gpus else "cpu",
        most="auto" if num_synthesizers is None else None,
        threads=threads,
        budget_bytes=fleet.budget_bytes(),
    )
