"""`run`: runs or resumes a planned sweep. Connects to Ray, starts the fleet, runs unfinished trials, polls progress.

The tables are `trials`, `epochs` and `synthesis`. Trials read their images from one fleet (`dfkd_ray.fleet`), so each
distinct synthesis is computed once. A trial with a final row in the results place is not run again; the others resume
from their checkpoints, which are stored under their trial ids. Ray Tune's own experiment state is discarded.
"""

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any

import yaml
from pydantic import BaseModel

from dfkd_ray import bundles, cache, models, storage, targets, tensorboard
from dfkd_ray.batches import Batch, BatchSource
from dfkd_ray.bundles import Teacher, starts
from dfkd_ray.config import RealConfig
from dfkd_ray.fleet import node_check
from dfkd_ray.fleet.board import Board
from dfkd_ray.results import FINAL, finished_ids
from dfkd_ray.storage import Where, in_one_line
from dfkd_ray.sweep import asha, places
from dfkd_ray.sweep.earlier_runs import check_one_meaning, looks_in, rows_in
from dfkd_ray.sweep.jobs import Job, Plan
from dfkd_ray.sweep.ledger import Ledger, OnRow, compact, harmless
from dfkd_ray.sweep.machines import FIRST_MACHINE_S, Asked, first_machine, preflight
from dfkd_ray.sweep.sweep_config import SETTINGS
from dfkd_ray.sweep.tuner import drive
from dfkd_ray.sweep.worker import Seconds, Shared
from dfkd_ray.text import is_null

Stages = Mapping[str, tuple[str, int, int]]  # trial id → (stage, done, total), running trials only
LOOK_S = 15.0


@dataclass(frozen=True)
class Cluster:
    """Where a sweep runs, and how its machines are shared.

    `address` is that of a running Ray cluster (`HOST:PORT` or `auto`); None starts Ray on this machine. `synthesizers`
    None starts as many as the machines have room for, and more when machines join. A pair is (fewest, most): the
    autoscaler may add and remove machines between them. If the cluster has no machine yet, the sweep waits up to
    `first_machine_s` for the first. 0 starts no fleet: every trial makes its own images.
    """

    address: str | None = None
    synthesizers: Asked = None
    gpus_per_synthesizer: float | None = None
    gpus_per_trial: float | None = None
    batch_timeout_s: float = 3600.0
    first_machine_s: float = FIRST_MACHINE_S


@dataclass(frozen=True)
class Data:
    """Optional real data: a teacher's test batches, and the images of trials with `synthesis.method=real`.

    Without `real_of`, such trials are refused.
    """

    test_of: Callable[[Teacher], Sequence[Batch] | None] = lambda _teacher: None
    real_of: Callable[[Teacher, RealConfig], BatchSource] | None = None


@dataclass(frozen=True)
class Callbacks:
    """Callbacks of a running sweep.

    `on_up`: the fleet is up. `on_row`: a trial has ended. `on_new`: Optuna has chosen a new trial. Every `look_s`
    seconds, `on_status` gets the fleet's status and `on_stages` the stages of the running trials. `on_lost` is called
    in a thread of its own when Ray is gone (see `fleet.connected`). `stop` is polled several times a second. When it
    returns true, trials and fleet are shut down and `KeyboardInterrupt` is raised; the same call resumes the sweep.
    """

    on_row: OnRow | None = None
    on_status: Callable[[Mapping[str, Any]], None] | None = None
    on_stages: Callable[[Stages], None] | None = None
    on_up: Callable[[], None] = lambda: None
    on_new: Callable[[Job], None] = lambda _job: None
    on_lost: Callable[[str], None] | None = None
    stop: Callable[[], bool] = lambda: False
    look_s: float = LOOK_S


HERE, NO_DATA, SILENT = Cluster(), Data(), Callbacks()


def run(
    jobs: Plan | Sequence[Job],
    place: Where,
    cache_root: str | None,
    *,
    cluster: Cluster = HERE,
    data: Data = NO_DATA,
    callbacks: Callbacks = SILENT,
    seconds: Seconds | None = None,
    trust_code: Sequence[str] = (),
) -> int:
    """Run the trials that have no final row yet; returns how many failed.

    `jobs` is a plan (from `prepare`) or a list of jobs. An Optuna search resumes from the rows that lie in its space. A
    trial that was stopped early has a final row and is not run again. `place` is the folder or URI of all results.
    `cache_root` is the folder or URI of the cache; None keeps batches in memory only. `seconds` receives the time spent
    on writing results and on callbacks.

    `ValueError` if fleet and trials do not fit on the machines. `OSError` if a place cannot be written or the cluster
    cannot be reached; `places.Stopped` if that happens during the sweep: all finished rows are safe.
    """
    plan = jobs if isinstance(jobs, Plan) else Plan(list(jobs))
    if data.real_of is None and any(isinstance(job.config.synthesis, RealConfig) for job in plan.jobs):
        raise ValueError(
            "synthesis.method=real needs real images, which are used only when asked for: hand them in as `real_data`"
        )
    seconds = Seconds() if seconds is None else seconds
    place = places.check_target(place)
    if cache_root is not None:
        with places.explained(storage.folder(cache_root), "cache"):
            cache.check_target(cache_root)
    rows = rows_in(place, None if plan.search else ["trial_id", "status"])
    done = {row["trial_id"] for row in rows if row["status"] in FINAL and not is_null(row["trial_id"])}
    todo = [job for job in plan.jobs if job.id not in done]
    num_left = plan.search.begin(rows) if plan.search else len(todo)
    if not num_left:
        return 0
    # Optuna's trials are not known yet: jobs at the ends of the space stand for them.
    known = plan.known_jobs if plan.search else todo
    before = [job for job in plan.jobs_in(rows) if job.id in done]
    stopper = asha.scheduler(plan.stop, [job.config for job in plan.known_jobs]) if plan.stop else None
    if stopper:
        asha.prime(stopper, looks_in(place, {job.id for job in before}))
    places.probe(place, "results folder")
    if cache_root is not None:
        places.probe(storage.folder(cache_root), "cache")
    teachers = {job.teacher.hash: job.teacher for job in known}
    tests = {name: data.test_of(teacher) for name, teacher in teachers.items()}
    reals = real_sources(todo, data.real_of)
    check_one_meaning(before, todo, place, tests, reals)
    from ray.exceptions import RayError

    from dfkd_ray import fleet

    ledger = Ledger(todo, place, callbacks.on_row, seconds, num_left, callbacks.on_new)
    targets.claim(place, places.CLAIM, places.SCHEMA)
    with places.reserved(place), ExitStack() as stack:
        if plan.settings is not None:
            place.write(SETTINGS, as_yaml(plan.settings))
        places.tidy(place, done)
        with seconds.spent("TensorBoard"):
            tensorboard.write_sweep(place, [job.config for job in plan.known_jobs])
        stack.enter_context(fleet.connected(cluster.address, on_lost=callbacks.on_lost))
        shares = (cluster.gpus_per_synthesizer, cluster.gpus_per_trial)
        running = board = None
        with first_machine(known, cluster.synthesizers, *shares, cluster.first_machine_s):
            settings, placement = preflight(known, cache_root, cluster.synthesizers, *shares)
            node_check.try_on_every_node(place, None if cache_root is None else storage.folder(cache_root))
            settings = replace(settings, batch_timeout_s=cluster.batch_timeout_s)
            if cluster.synthesizers != 0:
                running = stack.enter_context(fleet.started(settings, list(teachers.values())))
        if callbacks.on_stages:
            board = stack.enter_context(started_board())
        callbacks.on_up()
        shared = Shared(
            place.uri,
            cache_root,
            tuple(trust_code),
            running,
            board,
            running.teachers if running else {name: put(bundles.to_arrays(t)) for name, t in teachers.items()},
            {name: put(test) for name, test in tests.items()},
            {trial_id: put(source) for trial_id, source in reals.items()},
            models.code_folder(),
            {name: put(starts.to_arrays(start)) for name, start in starts_of(known).items()},
        )
        with watched(look_of(ledger, running, board, callbacks), callbacks.look_s):
            try:
                drive(plan, stopper, shared, placement, ledger, callbacks.stop)
            except RayError as error:
                raise places.Stopped(f"Ray has failed: {in_one_line(error)}; all finished rows are safe") from error
        if plan.search:  # only now are its trials known
            with seconds.spent("TensorBoard"):
                tensorboard.write_sweep(place, [job.config for job in [*before, *todo]])
    if ledger.trouble:
        raise places.Stopped(f"{ledger.trouble}; all finished rows are safe")
    if ledger.num_done < num_left and callbacks.stop():
        raise KeyboardInterrupt
    with seconds.spent("results"):
        compact(place)
    finished = finished_ids(place)
    return sum(job.id not in finished for job in todo)


def as_yaml(settings: BaseModel) -> bytes:
    """A sweep's settings as the YAML of a sweep file, secrets removed."""
    return yaml.safe_dump(storage.secretless(settings.model_dump(mode="json")), sort_keys=False).encode()


def real_sources(
    todo: Sequence[Job], real_of: Callable[[Teacher, RealConfig], BatchSource] | None
) -> dict[str, BatchSource]:
    """Trial id → real images, for trials with `synthesis.method=real`; equal teacher and config share one source."""
    sources: dict[tuple[str, str], BatchSource] = {}
    wanted = {}
    for job in todo:
        settings = job.config.synthesis
        if isinstance(settings, RealConfig) and real_of is not None:
            key = (job.teacher.hash, settings.model_dump_json())
            if key not in sources:
                sources[key] = real_of(job.teacher, settings)
            wanted[job.id] = sources[key]
    return wanted


def starts_of(jobs: Iterable[Job]) -> dict[str, starts.Start]:
    """The files that students start from, by hash."""
    students = {job.config.student.weights_sha256: job.config.student for job in jobs}
    return {name: starts.held(student) for name, student in students.items() if name is not None}


def put(value: Any) -> list[Any]:
    """Put a value into the object store; inside a list, Ray does not replace the reference by the value."""
    import ray

    return [ray.put(value)]


@contextmanager
def started_board() -> Iterator[Any]:
    """The progress board, as an actor on this machine."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
    actor: Any = ray.remote(Board)
    board = actor.options(num_cpus=0, max_restarts=-1, scheduling_strategy=here).remote()
    try:
        yield board
    finally:
        ray.kill(board)


def look_of(
    ledger: Ledger,
    running: Any | None,
    board: Any | None,
    callbacks: Callbacks,
) -> Callable[[], None]:
    """A function that reads the state of fleet and trials and calls `on_status` and `on_stages`."""
    import ray
    from ray.exceptions import GetTimeoutError, RayError

    show_status, show_stages = (harmless(show) if show else None for show in (callbacks.on_status, callbacks.on_stages))

    def look() -> None:
        status = running.status() if running and show_status else None
        if status is not None and show_status:
            with ledger.seconds.spent("live view"):
                show_status(status)
        if board and show_stages:
            found: dict[str, tuple[str, int, int]] = {}
            with suppress(RayError, GetTimeoutError):  # while the board starts or restarts
                found = ray.get(board.read.remote(), timeout=10.0)
            with ledger.seconds.spent("live view"):
                now = dict(ledger.running)
                show_stages({trial_id: found.get(trial_id, (stage, 0, 0)) for trial_id, stage in now.items()})

    return look


@contextmanager
def watched(look: Callable[[], None], every_s: float) -> Iterator[None]:
    """While open, call `look` every `every_s` seconds, and once more on success; its first exception is logged."""
    over = threading.Event()
    look = harmless(look)

    def watch() -> None:
        while not over.wait(every_s):
            look()

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
        look()
    finally:
        over.set()
        thread.join(timeout=LOOK_S)
