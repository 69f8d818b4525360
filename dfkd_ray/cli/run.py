"""`dfkd-ray recover` and `dfkd-ray sweep`."""

import json
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dfkd_ray import config as configs
from dfkd_ray.cli import before, leaving, live, names
from dfkd_ray.cli.dry_run import dry_run as print_dry_run
from dfkd_ray.cli.inputs import images_wanted, load_teacher, open_real, open_test
from dfkd_ray.cli.options import (
    Address,
    BatchTimeout,
    Cache,
    DataRoot,
    Download,
    Effort,
    GpusPerSynthesizer,
    Out,
    Set,
    SweepSynthesizers,
    TeacherName,
    TestData,
    Trust,
    range_of,
    settled,
)
from dfkd_ray.cli.show import Progress, print_failures, print_ladder, print_trials, print_warnings
from dfkd_ray.cli.streams import say

if TYPE_CHECKING:
    from dfkd_ray.batches import BatchSource
    from dfkd_ray.bundles import Teacher

SCHEMA = "dfkd_ray.recovery/1"
ROW, UNFINISHED = "row.json", ".recovery.json"  # the second claims the folder until the first exists
FAILED = "failed.json"  # the row of a failed trial, beside a finished one


def is_row(data: bytes) -> bool:
    """Whether these bytes are the `row.json` of a recovery."""
    try:
        row = json.loads(data)
    except (ValueError, RecursionError):
        return False
    return isinstance(row, dict) and {"trial_id", "teacher_hash", "status"} <= set(row)


def recover(
    teacher: TeacherName,
    out: Out,
    sparsity: Annotated[float | None, typer.Option(help="share of weights to remove")] = None,
    method: Annotated[str | None, typer.Option(help=f"{', '.join(configs.METHODS)}; real needs --real-data")] = None,
    seed: Annotated[int | None, typer.Option(help="of synthesis and distillation")] = None,
    effort: Effort = None,
    config: Annotated[Path | None, typer.Option(help="YAML file with a trial config")] = None,
    set_: Set = None,
    test_data: TestData = "auto",
    real_data: Annotated[str | None, typer.Option(help="with --method real: the training set, by name")] = None,
    data_root: DataRoot = Path("data"),
    download: Download = False,
    device: Annotated[str | None, typer.Option(help="auto, cpu or cuda")] = None,
    cache: Cache = None,
    trust_code: Trust = None,
) -> None:
    """Prune a network and recover its accuracy without data: one trial, without Ray.

    Writes OUT/student (a bundle; with quantisation.int8=true also its int8.onnx), OUT/row.json, OUT/images.png. Prints
    the accuracy of the stages teacher, pruned, BatchNorm re-estimated, reconstructed layer by layer, recovered,
    quantised. After an interruption, the same command resumes from its checkpoint. A trial that fails where another
    has finished leaves all of that as it is, and its own row in OUT/failed.json.
    """
    data = configs.read_yaml(config) if config else {}
    options = {
        "TEACHER": {"teacher": teacher},
        "--sparsity": {"pruning.sparsity": sparsity},
        "--method": {"synthesis.method": method},
        "--seed": {"synthesis.seed": seed, "distillation.seed": seed},
        "--device": {"device": device},
    }
    data = settled(data, options, set_, config)
    settings = configs.validate(configs.TrialConfig, configs.with_effort(data, effort or "standard"))
    if (settings.synthesis.method == "real") != (real_data is not None):
        raise ValueError("--method real and --real-data NAME go together: real images are used only when asked for")

    from dfkd_ray import bundles, results, targets, trial
    from dfkd_ray import cache as caches
    from dfkd_ray.images import class_grid

    place = targets.check(out, targets.Product("a recovery", {ROW: is_row, UNFINISHED: targets.claims(SCHEMA)}))
    targets.check(place / "student", bundles.BUNDLE)
    targets.check_file(place, FAILED, is_row, "the row of a failed trial")
    root = caches.check_target(cache or caches.default_folder()).uri
    loaded = load_teacher(teacher, trust_code, download=download)
    test = open_test(loaded, test_data, data_root, download)
    real = None
    if real_data is not None:
        assert isinstance(settings.synthesis, configs.RealConfig)
        real = open_real(loaded, real_data, data_root, settings.synthesis, download, images_wanted([settings]))
    trial.check(settings, loaded, tuple(trust_code or ()))
    pinned = trial.pinned(settings, loaded)
    before.say_batch_sizes(settings, pinned)
    before.say_memory([(pinned, loaded)])
    num_test_images = sum(len(batch.labels) for batch in test or ())
    before.say_hours(pinned, before.Alone(loaded, root, num_test_images, tuple(trust_code or ())))
    inputs = trial.Inputs(test, real, trial.Local(root), trust_code=tuple(trust_code or ()))
    observer = trial.Observer(progress=Progress())
    with targets.retracting(place, UNFINISHED):
        targets.claim(place, UNFINISHED, SCHEMA)
        outcome = trial.run(pinned, loaded, inputs, checkpoint=place / trial.CHECKPOINTS, observer=observer)
    row = results.kept(outcome.row)
    if row["status"] == "finished":
        outcome.save_student(place / "student")
        picture = class_grid(outcome.batches, loaded.info.num_classes, loaded.info.space)
        place.write("images.png", picture)
    before_it = json.loads((place.read(ROW) or b"null").decode())
    # The row of the student that is there stays with it.
    stays = before_it is not None and before_it["status"] == "finished"
    results.write_json(place.path / (FAILED if stays and row["status"] == "failed" else ROW), row)
    trial.remove_checkpoints(place)  # not needed any more: the row is on disk
    place.remove(UNFINISHED)
    if row["status"] == "failed":
        note = f"; its row is {FAILED}; {ROW}, student and images stay those of another trial" if stays else ""
        say(f"error: trial {row['trial_id']} failed: {row['reason']}{note}", error=True)
        raise typer.Exit(1)
    place.remove(FAILED)
    print_ladder(row, out)


def sweep(
    file: Annotated[Path, typer.Argument(help="YAML sweep file")],
    results: Annotated[
        str | None, typer.Option(help="folder or URI (s3://, gs://, …) for tables, students, pictures")
    ] = None,
    set_: Set = None,
    effort: Effort = None,
    teachers: Annotated[
        str | None, typer.Option(help="folder or URI in which the file's teachers are looked for first, by name")
    ] = None,
    tiny: Annotated[bool, typer.Option("--tiny", help="the file's small size, for a look in seconds")] = False,
    test_data: TestData = "auto",
    real_data: Annotated[
        str | None, typer.Option(help="for trials with method real: the training set, by name")
    ] = None,
    data_root: DataRoot = Path("data"),
    download: Download = False,
    cache: Cache = None,
    address: Address = None,
    synthesizers: SweepSynthesizers = "auto",
    gpus_per_synthesizer: GpusPerSynthesizer = None,
    gpus_per_trial: Annotated[float | None, typer.Option(help="a fraction, or whole GPUs; default 0.5")] = None,
    batch_timeout: BatchTimeout = 3600.0,
    trust_code: Trust = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="say what the sweep would run and cost; nothing is started")
    ] = False,
    gpus: Annotated[
        int | None, typer.Option(min=0, help="with --dry-run: GPUs to plan for; default: those here")
    ] = None,
    timings: Annotated[
        Path | None,
        typer.Option(
            help="with --dry-run: a JSON file of what work costs on some machine; used where it exists, else written"
        ),
    ] = None,
) -> None:
    """Run a grid or a search of trials with Ray Tune, here or on a cluster; finished trials are not run again.

    Every distinct synthesis is made once, by a fleet that all trials share (--synthesizers 0: no sharing).
    Ctrl-C stops the sweep cleanly; the same command resumes it.
    """
    if gpus is not None and not dry_run:
        raise ValueError("--gpus goes with --dry-run; a sweep uses the GPUs that there are")
    if timings is not None and not dry_run:
        raise ValueError("--timings goes with --dry-run; a sweep takes as long as it takes")
    asked = range_of(synthesizers)
    data = configs.read_yaml(file)
    overrides = configs.parse_overrides(set_ or [])
    from dfkd_ray import cache as caches
    from dfkd_ray import results as tables
    from dfkd_ray import storage
    from dfkd_ray import sweep as sweeps
    from dfkd_ray.sweep import timings as timing_files

    stored = None if timings is None else timing_files.read(timings)
    # The GPUs of a cluster's machines are not known before it is joined, and differ from the driver's.
    elsewhere = not dry_run and (address or os.environ.get("RAY_ADDRESS") or "local") != "local"
    on_gpu = elsewhere or (stored is not None and stored.kind == "GPU")
    is_files_own = effort in (None, data.get("effort", "standard"))
    settings = sweeps.parse(data if is_files_own else data | {"effort": effort}, str(file))
    if not is_files_own:
        settings = sweeps.without_ranges(settings, f"the file's ranges are not for effort {effort}")
    plan = sweeps.prepare(
        settings,
        lambda name: load_teacher(name, trust_code, teachers, download),
        overrides,
        tiny=tiny,
        trust_code=tuple(trust_code or ()),
        on_gpu=on_gpu,
    )
    uses_real = any(job.config.synthesis.method == "real" for job in plan.jobs)
    if uses_real != (real_data is not None):
        raise ValueError(f"{file}: trials with synthesis.method=real and --real-data NAME go together")
    place = storage.folder(results or Path("runs") / (file.stem + ("-tiny" if tiny else "")))
    root = storage.folder(cache or caches.default_folder()).uri
    if not dry_run:
        sweeps.check_target(place)
        with sweeps.explained(storage.folder(root), "cache"):
            caches.check_target(root)
    with sweeps.explained(place, "results folder"):
        rows = sweeps.rows_in(place)

    def real_of(teacher: "Teacher", synthesis: configs.RealConfig) -> "BatchSource":
        assert real_data is not None
        same = (teacher.hash, synthesis)
        users = [job.config for job in plan.jobs if (job.teacher.hash, job.config.synthesis) == same]
        return open_real(teacher, real_data, data_root, synthesis, download, images_wanted(users))

    if not on_gpu:
        before.say_memory((job.config, job.teacher) for job in plan.known_jobs)
    known = plan.jobs_in(rows)
    own = {job.id for job in known}
    finished = [row for row in rows if row["trial_id"] in own and row["status"] in tables.FINAL]
    if dry_run:
        done = {row["trial_id"] for row in finished}
        if real_data:
            sweeps.real_sources([job for job in plan.known_jobs if job.id not in done], real_of)
        tests = {job.teacher.hash: job.teacher for job in plan.known_jobs}
        batches = {name: open_test(teacher, test_data, data_root, download) for name, teacher in tests.items()}
        sizes = {name: sum(len(batch.labels) for batch in test or ()) for name, test in batches.items()}
        print_dry_run(file, plan, done, root, sizes, gpus, tuple(trust_code or ()), timings, stored)
        return
    say(f"{file}: {plan.num_trials} trials, {len(finished)} already finished; results in {place}")
    start = time.monotonic()
    parts = names.parts_of({job.id: job.config for job in known})
    called = {name: names.name_from(each) for name, each in parts.items()}
    # A search adds trials one by one, so the common part of their names is not known.
    view = live.View(called, finished, start, plan.num_trials, None if settings.search else parts)
    screen, seconds = live.Screen(view, str(file)), sweeps.Seconds()
    searched = tuple(settings.search.space) if settings.search else ()

    with live.interruptible(screen) as interrupts:
        try:
            with screen.shown():
                num_failed = sweeps.run(
                    plan,
                    place,
                    root,
                    cluster=sweeps.Cluster(address, asked, gpus_per_synthesizer, gpus_per_trial, batch_timeout),
                    data=sweeps.Data(
                        lambda teacher: open_test(teacher, test_data, data_root, download),
                        real_of if real_data else None,
                    ),
                    callbacks=sweeps.Callbacks(
                        on_row=screen.row,
                        on_status=screen.fleet,
                        on_stages=screen.stages if screen.is_live else None,
                        on_up=interrupts.up,
                        on_new=lambda job: view.add(job.id, job.config, searched),
                        on_lost=leaving.at_once,
                        stop=lambda: interrupts.asked,
                        look_s=live.DRAW_S if screen.is_live else sweeps.LOOK_S,
                    ),
                    seconds=seconds,
                    trust_code=tuple(trust_code or ()),
                )
        except (KeyboardInterrupt, sweeps.Stopped) as error:
            live.print_interrupted(len(view.done), plan.num_trials, place)
            if isinstance(error, sweeps.Stopped):
                raise
            raise SystemExit(130) from None
    table: Any = tables.read(place, "trials")
    table = table[table["trial_id"].isin(view.names)]
    print_trials(table, place)
    if mixed := tables.mixed(table):
        say(mixed)
    print_warnings(table)
    print_failures(table)
    wall_s = time.monotonic() - start
    say(f"{len(table)} trials, {num_failed} failed, {wall_s:.0f} s; table: {place / 'trials'}")
    seconds.add({"live view": screen.seconds})
    spent = ", ".join(f"{what} {value:.2f} s" for what, value in sorted(seconds.items()))
    if len(finished) < len(table):
        say(f"of that inside {spent}: {100 * sum(seconds.values()) / wall_s:.1f} %")
    if num_failed:
        raise typer.Exit(1)
