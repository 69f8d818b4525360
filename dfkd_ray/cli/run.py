"""`dfkd-ray recover` and `dfkd-ray sweep`."""

import shutil
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
import yaml

from dfkd_ray import config as configs
from dfkd_ray.cli.inputs import load_teacher, open_real, open_test
from dfkd_ray.cli.options import (
    BatchTimeout,
    Cache,
    DataRoot,
    Download,
    GpusPerSynthesizer,
    Out,
    Set,
    Synthesizers,
    TestData,
    Trust,
    number_of,
)
from dfkd_ray.cli.plan import dry_run as print_dry_run
from dfkd_ray.cli.show import Progress, print_fleet, print_ladder, print_trials

if TYPE_CHECKING:
    from dfkd_ray.batches import BatchSource
    from dfkd_ray.bundles import Teacher


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
    cache: Cache = None,
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
        images=trial.made_here(cache or caches.default_folder()),
        checkpoint=out / "checkpoints",
        progress=Progress(),
        trust_code=tuple(trust_code or ()),
    )
    if outcome.student is not None:
        outcome.save_student(out / "student")
        save_class_grid(out / "images.png", outcome.batches, loaded.info.num_classes, loaded.info.space)
    results.write_json(out / "row.json", outcome.row)
    shutil.rmtree(out / "checkpoints", ignore_errors=True)  # the row is on disk: of no more use
    if outcome.row["status"] == "failed":
        print(f"error: trial {outcome.row['trial_id']} failed: {outcome.row['reason']}", file=sys.stderr)
        raise typer.Exit(1)
    print_ladder(outcome.row, out)


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
    cache: Cache = None,
    synthesizers: Synthesizers = "auto",
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
) -> None:
    """Run a grid or a search of trials with Ray Tune on this machine; finished trials are not run again.

    Every distinct synthesis is made once, by a fleet that all trials share (--synthesizers 0: each trial its own).
    """
    if gpus is not None and not dry_run:
        raise ValueError("--gpus goes with --dry-run; a sweep uses the GPUs that there are")
    data = configs.read_yaml(file)
    overrides = configs.parse_overrides(set_ or [])
    from dfkd_ray import cache as caches
    from dfkd_ray import results as tables
    from dfkd_ray import storage
    from dfkd_ray import sweep as sweeps

    settings = sweeps.parse(data, str(file))
    plan = sweeps.prepare(
        settings,
        lambda name: load_teacher(name, trust_code),
        overrides,
        tiny=tiny,
        trust_code=tuple(trust_code or ()),
    )
    uses_real = any(job.config.synthesis.method == "real" for job in plan.jobs)
    if uses_real != (real_data is not None):
        raise ValueError(f"{file}: trials with synthesis.method=real and --real-data NAME go together")
    folder = (results or Path("runs") / (file.stem + ("-tiny" if tiny else ""))).absolute()
    done = sweeps.finished_ids(folder) & plan.ids(sweeps.rows_in(folder))
    if dry_run:
        tests = {job.teacher.hash: job.teacher for job in plan.known_jobs}
        batches = {name: open_test(teacher, test_data, data_root, download) for name, teacher in tests.items()}
        sizes = {name: sum(len(batch.labels) for batch in own or ()) for name, own in batches.items()}
        root = storage.folder(cache or caches.default_folder()).uri
        print_dry_run(file, plan, done, root, sizes, gpus, tuple(trust_code or ()))
        return
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "sweep.yaml").write_text(yaml.safe_dump(settings.model_dump(mode="json"), sort_keys=False))
    print(f"{file}: {plan.num_trials} trials, {len(done)} already finished; results in {folder}", flush=True)
    start = time.monotonic()

    def real_of(teacher: "Teacher", synthesis: configs.RealConfig) -> "BatchSource":
        assert real_data is not None
        return open_real(teacher, real_data, data_root, synthesis, download)

    def on_row(row: Mapping[str, Any], done: int, total: int) -> None:
        if row["status"] == "failed":
            what = f"FAILED: {row['reason']}"
        else:
            accuracy = row["recovered_accuracy"]
            stopped = ", stopped early" if row["status"] == "stopped" else ""
            shown = "" if accuracy is None or accuracy != accuracy else f", test accuracy {100 * accuracy:.2f} %"
            what = f"agreement {100 * row['agreement']:.2f} %{shown}{stopped}"
        name = f"{Path(row['teacher']).name} {row['synthesis.method']} sparsity {row['pruning.sparsity']}"
        print(f"[{done}/{total}, {time.monotonic() - start:.0f} s] {name}: {what}", flush=True)

    num_failed = sweeps.run(
        plan,
        folder,
        storage.folder(cache or caches.default_folder()).uri,
        synthesizers=None if synthesizers == "auto" else number_of(synthesizers),
        gpus_per_synthesizer=gpus_per_synthesizer,
        gpus_per_trial=gpus_per_trial,
        batch_timeout_s=batch_timeout,
        test_of=lambda teacher: open_test(teacher, test_data, data_root, download),
        real_of=real_of if real_data else None,
        on_row=on_row,
        on_status=print_fleet,
        trust_code=tuple(trust_code or ()),
    )
    rows = tables.read_trials(folder)
    rows = rows[rows["trial_id"].isin(list(plan.ids(sweeps.rows_in(folder))))]
    print_trials(rows)
    print(f"{len(rows)} trials, {num_failed} failed, {time.monotonic() - start:.0f} s; table: {folder / 'trials'}")
    if num_failed:
        raise typer.Exit(1)
