"""Jobs → Ray Tune → the tables `trials`, `epochs` and `synthesis`, and all else that a sweep leaves.

Trials read their images from one fleet (`dfkd_ray.fleet`): each distinct synthesis is paid for once. Trials with a
finished row in the results place are not run again; others go on from their checkpoints, which are addressed by the
hash of their configs. Ray's own state of an experiment is thrown away: the rows are what is known.
"""

import json
import logging
import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any

from dfkd_ray import bundles, results, storage, tensorboard
from dfkd_ray import trial as one_trial
from dfkd_ray.batches import Batch, BatchSource
from dfkd_ray.bundles import Teacher
from dfkd_ray.config import RealConfig, TrialConfig
from dfkd_ray.distillation import Progress, State
from dfkd_ray.images import class_grid
from dfkd_ray.results import FINAL, finished_ids
from dfkd_ray.storage import Folder, Where
from dfkd_ray.sweep import places, tuning
from dfkd_ray.sweep.files import Job, Plan
from dfkd_ray.sweep.search import StopConfig

log = logging.getLogger(__name__)
OnRow = Callable[[Mapping[str, Any], int, int], None]
Stages = Mapping[str, tuple[str, int, int]]  # trial id → (stage, done, total) of the trials that run now
LOOK_S = 15.0
COMPACT_EVERY = 200  # trials: more parts than that are slow to read
RETRIES = 2  # of a trial whose process died
DIED = f"the trial's process died {RETRIES + 1} times (killed, or out of memory)"
TOLD_S = 1.0  # between two messages of a trial on one stage
TEACHER_ACCURACIES: dict[tuple[Any, ...], float] = {}  # of this process; trials follow each other in one
OPENED: dict[str, Teacher] = {}  # of this process, by hash


class Seconds(dict[str, float]):
    """Seconds by what they were spent on."""

    @contextmanager
    def spent(self, what: str) -> Iterator[None]:
        """Count the block's wall time under `what`."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.add({what: time.perf_counter() - start})

    def add(self, more: Mapping[str, float]) -> None:
        """Add what was counted elsewhere."""
        for what, seconds in more.items():
            self[what] = self.get(what, 0.0) + seconds


# ---- in a trial's process ------------------------------------------------------------------------------------------


def run_job(
    job: Job,
    images: one_trial.Images,
    test: Sequence[Batch] | None,
    real: BatchSource | None,
    place: Where,
    trust_code: Sequence[str],
    *,
    progress: Progress | None = None,
    on_look: one_trial.OnLook | None = None,
    seconds: Seconds | None = None,
) -> dict[str, Any]:
    """Run one trial and write what it leaves: student, picture, events, rows (its own last: then all else is there).

    An error leaves a row with status `failed`, unless it is of the disk or the store: that is tried again after
    pauses, and `OSError` where it stays. `seconds` is added to.
    """
    place, seconds = storage.folder(place), Seconds() if seconds is None else seconds
    kd = job.config.distillation

    def write_epochs(looks: Sequence[Mapping[str, float | int | None]]) -> None:
        with seconds.spent("results"):
            results.write(place, "epochs", [{"trial_id": job.id, **look} for look in looks], job.id)
        with seconds.spent("TensorBoard"):
            tensorboard.write_epochs(place, job.id, looks)

    # The teacher is the same in every trial: one evaluation per process, not one per trial.
    known = (job.teacher.hash, kd.precision, kd.num_threads, job.config.device, None if test is None else len(test))

    def attempt() -> one_trial.Outcome:
        return one_trial.run(
            job.config,
            job.teacher,
            test=test,
            real=real,
            images=images,
            teacher_accuracy=TEACHER_ACCURACIES.get(known),
            checkpoint=place / "checkpoints",
            on_look=on_look,
            on_epochs=write_epochs,
            progress=progress,
            trust_code=trust_code,
        )

    try:
        # A checkpoint that could not be written stops the trial; the next attempt goes on from the one before.
        outcome = places.persistently(attempt, places.is_disk_error)
    except Exception as error:
        if places.is_disk_error(error):
            raise
        log.exception("trial %s", job.id)
        outcome = one_trial.Outcome(failed_row(job, one_trial.reason_of(error)))
    row = outcome.row
    row |= {"fleet_call_s": getattr(images, "call_s", None), "fleet_wait_s": getattr(images, "wait_s", None)}
    if row.get("teacher_accuracy") is not None:
        TEACHER_ACCURACIES[known] = row["teacher_accuracy"]
    places.persistently(lambda: keep(job, outcome, place, seconds))
    return row


def keep(job: Job, outcome: one_trial.Outcome, place: Folder, seconds: Seconds) -> None:
    """Write everything a trial leaves, each file whole; doing it twice changes nothing."""
    row = outcome.row
    with seconds.spent("results"):
        if outcome.epochs:
            looks = [{"trial_id": job.id, **look} for look in outcome.epochs]
            results.write(place, "epochs", looks, job.id)
        if outcome.student is not None:
            outcome.save_student(place / "students" / job.id)
            results.write_batches(place, outcome.synthesis)
            pictures, picture = place / "images", f"{row['synthesis_key'][:12]}.png"
            if picture not in pictures.names():
                info = job.teacher.info
                pictures.write(picture, class_grid(outcome.batches, info.num_classes, info.space))
    with seconds.spent("TensorBoard"):
        tensorboard.write_trial(place, row, outcome.epochs)
    with seconds.spent("results"):
        results.write(place, "trials", [row], job.id)
        if row["status"] in FINAL:  # a failed one is run again on resume, and goes on from there
            with suppress(OSError):
                (place / "checkpoints" / job.id).remove_all()


def failed_row(job: Job, reason: str) -> dict[str, Any]:
    """The row of a trial that has not come to an end."""
    return one_trial.provenance(job.config, job.teacher) | {"status": "failed", "reason": reason}


@dataclass(frozen=True)
class Shared:
    """What every trial of a sweep gets. Pickled, it is a handle: what is large is a reference, in a list of one."""

    place: str
    cache_root: str | None
    trust_code: tuple[str, ...]
    fleet: Any | None
    board: Any | None
    teachers: Mapping[str, list[Any]]  # by hash, as `bundles.to_arrays`
    tests: Mapping[str, list[Any]]  # by the teacher's hash
    reals: Mapping[str, list[Any]]  # by trial id


def in_worker(
    trial_id: str,
    config: TrialConfig,
    teacher_hash: str,
    shared: Shared,
    report: Callable[[Mapping[str, Any]], None] | None = None,
) -> dict[str, Any]:
    """Run a trial in this process, and say how it went: its `row` (written here), or the `reason` it could not begin
    (the driver writes that row), or what `stopped` it, which would stop every other.

    `report`, for trials that may be stopped early, is told of each look at the reference set.
    """
    import ray

    seconds, num_steps = Seconds(), config.distillation.num_steps
    try:
        if teacher_hash not in OPENED:
            OPENED[teacher_hash] = bundles.from_arrays(ray.get(shared.teachers[teacher_hash][0]))
        job = Job(config, OPENED[teacher_hash], trial_id)
        test: Any = ray.get(shared.tests[teacher_hash][0])
        real: Any = ray.get(shared.reals[trial_id][0]) if trial_id in shared.reals else None
        images = shared.fleet.stream() if shared.fleet else one_trial.made_here(shared.cache_root)
    except Exception as error:
        log.exception("trial %s", trial_id)
        return tuning.result(None, num_steps) | {"reason": one_trial.reason_of(error)}
    progress = Telling(shared.board, trial_id, seconds) if shared.board else None

    def on_look(row: Mapping[str, Any], state: State) -> None:
        if report is not None and tuning.counts(state, num_steps):
            report(tuning.look(row, state) | {"seconds": dict(seconds)})

    try:
        row = run_job(
            job,
            images,
            test,
            real,
            shared.place,
            shared.trust_code,
            progress=progress,
            on_look=on_look if report else None,
            seconds=seconds,
        )
    except OSError as error:
        log.exception("trial %s", trial_id)
        why = f"{error.filename or storage.folder(shared.place)}: {storage.in_one_line(error)}"
        return tuning.result(None, num_steps) | {"stopped": why}
    return tuning.result(row, num_steps) | {"row": json.dumps(row), "seconds": dict(seconds)}


class Board:
    """What the running trials are at; an actor beside them, read by the driver."""

    def __init__(self) -> None:
        self.stages: dict[str, tuple[str, int, int]] = {}

    def tell(self, trial_id: str, stage: str, done: int, total: int) -> None:
        """Where a trial stands."""
        self.stages[trial_id] = (stage, done, total)

    def read(self) -> dict[str, tuple[str, int, int]]:
        """Where all stand; some have ended."""
        return self.stages


class Telling:
    """A trial's progress, told to the board at every new stage and now and then between."""

    def __init__(self, board: Any, trial_id: str, seconds: Seconds):
        self.board, self.trial_id, self.seconds = board, trial_id, seconds
        self.stage, self.at = "", 0.0

    def __call__(self, stage: str, done: int, total: int, numbers: Mapping[str, float | int]) -> None:
        """As `distillation.Progress`; nothing is waited for."""
        now = time.monotonic()
        if stage == self.stage and now - self.at < TOLD_S:
            return
        self.stage, self.at = stage, now
        with self.seconds.spent("live view"):
            self.board.tell.remote(self.trial_id, stage, done, total)


# ---- in the driver -------------------------------------------------------------------------------------------------


def run(
    jobs: Plan | Sequence[Job],
    place: Where,
    cache_root: str | None,
    *,
    address: str | None = None,
    synthesizers: int | None = None,
    gpus_per_synthesizer: float | None = None,
    gpus_per_trial: float | None = None,
    batch_timeout_s: float = 3600.0,
    test_of: Callable[[Teacher], Sequence[Batch] | None] = lambda _teacher: None,
    real_of: Callable[[Teacher, RealConfig], BatchSource] | None = None,
    on_row: OnRow | None = None,
    on_status: Callable[[Mapping[str, Any]], None] | None = None,
    on_stages: Callable[[Stages], None] | None = None,
    on_up: Callable[[], None] = lambda: None,
    look_s: float = LOOK_S,
    on_new: Callable[[Job], None] = lambda _job: None,
    stop: Callable[[], bool] = lambda: False,
    seconds: Seconds | None = None,
    trust_code: Sequence[str] = (),
) -> int:
    """Run the trials that have no final row yet; returns how many failed.

    Takes a plan (of `prepare`), or just jobs. An Optuna search goes on from the rows that lie in its space; a trial
    that was stopped early has a row that says so, and is not run again. `place`, a folder or URI, takes all results.
    `cache_root` is one too; None keeps batches in memory only. `address` is of a running Ray cluster (`HOST:PORT` or
    `auto`); None starts Ray on this machine. `synthesizers` None takes as many as the machines have room for and grows
    with them; 0 shares nothing: every trial makes its own images. `test_of` gives a teacher's test batches or None,
    `real_of` the real images for trials with `synthesis.method=real`; without it such trials are refused. `on_up` is
    called when the fleet is up, `on_row` when a trial has ended, `on_new` when Optuna has come up with one, `on_status`
    every `look_s` seconds with how the fleet is, and `on_stages` with where the running trials are. `stop` is asked
    several times a second: where it says yes, the trials are stopped, the fleet is shut down, and `KeyboardInterrupt`
    raised; the same call goes on later. `seconds` is filled with what writing results and telling of them took.

    `ValueError` where nothing fits; `OSError` where a place cannot be written or a cluster not be reached;
    `places.Stopped` where that happens on the way: all finished rows are safe.
    """
    plan = jobs if isinstance(jobs, Plan) else Plan(list(jobs))
    if real_of is None and any(isinstance(job.config.synthesis, RealConfig) for job in plan.jobs):
        raise ValueError(
            "synthesis.method=real needs real images, which are used only when asked for: --real-data NAME"
        )
    seconds = Seconds() if seconds is None else seconds
    place = storage.folder(place)
    rows = rows_in(place, None if plan.search else ["trial_id", "status"])
    done = {row["trial_id"] for row in rows if row["status"] in FINAL}
    todo = [job for job in plan.jobs if job.id not in done]
    num_left = plan.search.begin(rows) if plan.search else len(todo)
    if not num_left:
        return 0
    # Where Optuna chooses the trials, what has to be known of all of them is asked at the ends of the space.
    known = plan.known_jobs if plan.search else todo
    before = [job for job in plan.jobs_in(rows) if job.id in done]
    asha = tuning.scheduler(plan.stop, [job.config for job in plan.known_jobs]) if plan.stop else None
    if asha:
        tuning.prime(asha, looks_in(place, {job.id for job in before}))
    places.probe(place, "results folder")
    if cache_root is not None:
        places.probe(storage.folder(cache_root), "cache")
    teachers = {job.teacher.hash: job.teacher for job in known}
    tests = {name: test_of(teacher) for name, teacher in teachers.items()}
    reals = real_sources(todo, real_of)
    check_one_meaning(before, todo, place, tests, reals)
    from dfkd_ray import fleet

    ledger = Ledger(todo, place, on_row, seconds, num_left, on_new)
    with places.reserved(place), ExitStack() as stack:
        places.tidy(place, done)
        with seconds.spent("TensorBoard"):
            tensorboard.write_sweep(place, [job.config for job in plan.known_jobs])
        stack.enter_context(fleet.connected(address))
        places.try_on_every_node(place, None if cache_root is None else storage.folder(cache_root))
        settings, placement = preflight(known, cache_root, synthesizers, gpus_per_synthesizer, gpus_per_trial)
        settings = replace(settings, batch_timeout_s=batch_timeout_s)
        running = board = None
        if synthesizers != 0:
            running = stack.enter_context(fleet.started(settings, list(teachers.values())))
        if on_stages:
            board = stack.enter_context(started_board())
        on_up()
        shared = Shared(
            place.uri,
            cache_root,
            tuple(trust_code),
            running,
            board,
            running.teachers if running else {name: put(bundles.to_arrays(t)) for name, t in teachers.items()},
            {name: put(test) for name, test in tests.items()},
            {trial_id: put(source) for trial_id, source in reals.items()},
        )
        with watched(look_of(ledger, running, board, on_status, on_stages), look_s):
            _tune(plan, asha, shared, placement, ledger, stop)
        if plan.search:  # now its trials are known
            with seconds.spent("TensorBoard"):
                tensorboard.write_sweep(place, [job.config for job in [*before, *todo]])
    if ledger.trouble:
        raise places.Stopped(f"{ledger.trouble}; all finished rows are safe")
    if ledger.num_done < num_left and stop():
        raise KeyboardInterrupt
    with seconds.spent("results"):
        compact(place)
    finished = finished_ids(place)
    return sum(job.id not in finished for job in todo)


def rows_in(place: Folder, columns: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """The rows of the `trials` table, or some of their columns; none where there is no table yet."""
    if not (place / "trials").names():
        return []
    return [{str(k): v for k, v in row.items()} for row in results.read(place, "trials", columns).to_dict("records")]


def looks_in(place: Folder, trial_ids: set[str]) -> list[tuple[str, int, float]]:
    """(trial, step, best agreement so far) of these trials' looks at the reference set."""
    if not trial_ids:
        return []
    looks = results.read(place, "epochs", ["trial_id", "step", "agreement"])
    looks = looks[looks["trial_id"].isin(list(trial_ids))]
    best = looks.groupby("trial_id")["agreement"].cummax()
    return list(zip(looks["trial_id"], looks["step"].astype(int), best, strict=True))


def real_sources(
    todo: Sequence[Job], real_of: Callable[[Teacher, RealConfig], BatchSource] | None
) -> dict[str, BatchSource]:
    """The real images of the trials that want some, by trial id; equal wishes share one source."""
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


def check_one_meaning(
    finished: Sequence[Job],
    todo: Sequence[Job],
    place: Folder,
    tests: Mapping[str, Sequence[Batch] | None],
    reals: Mapping[str, BatchSource],
) -> None:
    """`ValueError` where the rows of finished trials were measured on other data than those of the rest would be.

    What a trial's id does not hold: the test images it is reported on, and which real images were handed in.
    """
    before = {job.id: job for job in finished}
    if not before:
        return
    rows = results.read(place, "trials")
    rows = rows.loc[rows["trial_id"].isin(before) & (rows["status"] == "finished")]
    keys = {(job.teacher.hash, job.config.synthesis): reals[job.id](0).key for job in todo if job.id in reals}
    advice = f"give the same as before, or another --results than {place}"
    for row in rows.to_dict("records"):
        job, num = before[row["trial_id"]], row["num_test_images"]
        num = None if num != num or num is None else int(num)
        if job.teacher.hash in tests:
            test = tests[job.teacher.hash]
            now = None if test is None else sum(len(batch.labels) for batch in test)
            if num != now:
                raise ValueError(
                    f"--test-data: finished trials of {job.config.teacher} were measured on {num or 'no'} test images, "
                    f"the others would be on {now or 'no'}; {advice}"
                )
        if keys.get((job.teacher.hash, job.config.synthesis), row["synthesis_key"]) != row["synthesis_key"]:
            raise ValueError(f"--real-data: trials that are finished used other real images; {advice}")


def preflight(
    todo: Sequence[Job],
    cache_root: str | None,
    synthesizers: int | None,
    gpus_per_synthesizer: float | None,
    gpus_per_trial: float | None,
) -> tuple[Any, Any]:
    """Settings of the fleet and the placement of fleet and trials together; `ValueError` where nothing fits."""
    from dfkd_ray import fleet

    machines = fleet.nodes()
    use_gpu = any(node.gpus for node in machines) and any(job.config.device != "cpu" for job in todo)
    threads = max(getattr(job.config.synthesis, "num_threads", 1) for job in todo)
    placement = fleet.plan(
        machines,
        synthesizers=synthesizers or None,
        synthesizer_threads=threads,
        trial_threads=max(job.config.distillation.num_threads for job in todo),
        use_gpu=use_gpu,
        gpus_per_synthesizer=gpus_per_synthesizer,
        gpus_per_trial=gpus_per_trial,
    )
    settings = fleet.Settings(
        num_synthesizers=placement.num_synthesizers,
        cpus=placement.synthesizer_cpus,
        gpus=placement.synthesizer_gpus,
        cache_root=cache_root,
        device="auto" if use_gpu else "cpu",
        grow=synthesizers is None,
        threads=threads,
        trial_gpus=placement.trial_gpus,
        budget_bytes=fleet.budget_bytes(),
    )
    return settings, placement


def put(value: Any) -> list[Any]:
    """A value in the object store; the list keeps Ray from replacing the reference by the value."""
    import ray

    return [ray.put(value)]


@contextmanager
def started_board() -> Iterator[Any]:
    """The board as an actor on this machine."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
    actor: Any = ray.remote(Board)
    board = actor.options(num_cpus=0, max_restarts=-1, scheduling_strategy=here).remote()
    try:
        yield board
    finally:
        ray.kill(board)


class Ledger:
    """What has become of each trial, as the driver hears of it. A search adds to `todo` until there are `total`."""

    def __init__(
        self,
        todo: list[Job],
        place: Folder,
        on_row: OnRow | None,
        seconds: Seconds,
        total: int | None = None,
        on_new: Callable[[Job], None] = lambda _job: None,
    ):
        self.todo, self.place, self.on_row, self.seconds = todo, place, on_row, seconds
        self.total, self.on_new = len(todo) if total is None else total, on_new
        self.running: dict[str, str] = {}
        self.num_done = 0
        self.trouble: str | None = None  # what no trial can get past: the sweep stops

    def add(self, job: Job) -> int:
        """A search has come up with it; returns its index."""
        self.todo.append(job)
        self.on_new(job)
        return len(self.todo) - 1

    def started(self, job: Job) -> None:
        """Its process is there, or is being started."""
        self.running[job.id] = "starting"

    def again(self, job: Job) -> None:
        """Its process has died; another goes on from its checkpoint."""
        self.running[job.id] = "starting again"

    def died(self, job: Job) -> None:
        """Its process has died once too often, and so wrote no row."""
        self.ended(job, {"reason": DIED})

    def ended(self, job: Job, told: Mapping[str, Any]) -> None:
        """What `in_worker` said; nothing of it where the trial was stopped."""
        self.running.pop(job.id, None)
        self.seconds.add(told.get("seconds", {}))
        if "stopped" in told:
            self.trouble = self.trouble or str(told["stopped"])
        elif "reason" in told:
            self.keep(job, one_trial.Outcome(failed_row(job, told["reason"])))
        elif "row" in told:
            self.tell(json.loads(told["row"]))

    def cut(self, job: Job, told: Mapping[str, Any], stop: StopConfig) -> None:
        """It was stopped early, at the look `told`."""
        self.running.pop(job.id, None)
        self.seconds.add(told.get("seconds", {}))
        row = tuning.stopped_row(job, told, stop)
        self.keep(job, one_trial.Outcome(row, epochs=tuple(json.loads(told["looks"]))))

    def keep(self, job: Job, outcome: one_trial.Outcome) -> None:
        """Write what no trial's process has written."""
        try:
            places.persistently(lambda: keep(job, outcome, self.place, self.seconds))
        except OSError as error:
            self.trouble = self.trouble or f"{self.place}: {storage.in_one_line(error)}"
            return
        self.tell(outcome.row)

    def tell(self, row: Mapping[str, Any]) -> None:
        """Hand a row on."""
        self.num_done += 1
        if self.num_done % COMPACT_EVERY == 0:
            with self.seconds.spent("results"):
                compact(self.place)
        if self.on_row:
            with self.seconds.spent("live view"):
                self.on_row(row, self.num_done, self.total)


def look_of(
    ledger: Ledger,
    running: Any | None,
    board: Any | None,
    on_status: Callable[[Mapping[str, Any]], None] | None,
    on_stages: Callable[[Stages], None] | None,
) -> Callable[[], None]:
    """A look at fleet and trials, handed on to who wants to know."""
    import ray
    from ray.exceptions import GetTimeoutError, RayError

    def look() -> None:
        status = running.status() if running and on_status else None
        if status is not None and on_status:
            with ledger.seconds.spent("live view"):
                on_status(status)
        if board and on_stages:
            told: dict[str, tuple[str, int, int]] = {}
            with suppress(RayError, GetTimeoutError):  # while it is being started, or started again
                told = ray.get(board.read.remote(), timeout=10.0)
            with ledger.seconds.spent("live view"):
                now = dict(ledger.running)
                on_stages({trial_id: told.get(trial_id, (stage, 0, 0)) for trial_id, stage in now.items()})

    return look


@contextmanager
def watched(look: Callable[[], None], every_s: float) -> Iterator[None]:
    """While open, `look` is called every few seconds, and once at a good end."""
    over = threading.Event()

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


def _tune(
    plan: Plan, asha: Any | None, shared: Shared, placement: Any, ledger: Ledger, stop: Callable[[], bool]
) -> None:
    """The trials through Ray Tune; what they hold of fleet and board are handles. `asha` stops some early."""
    from ray import tune

    points = [(job.id, job.config, job.teacher.hash) for job in ledger.todo]
    may_stop = asha is not None

    def trial(point: Mapping[str, Any]) -> None:
        if "config" in point:  # of a search
            config = TrialConfig.model_validate_json(point["config"])
            trial_id, teacher_hash = point["id"], point["teacher_hash"]
        else:
            trial_id, config, teacher_hash = points[point["job"]]
        tune.report(in_worker(trial_id, config, teacher_hash, shared, tune.report if may_stop else None))

    resources = {"cpu": placement.trial_cpus, "gpu": placement.trial_gpus}
    # Whoever runs the sweep decides what Ctrl-C means; what trials die of is in their rows, not on the screen.
    for name, value in {"TUNE_DISABLE_SIGINT_HANDLER": "1", "TUNE_PRINT_ALL_TRIAL_ERRORS": "0"}.items():
        os.environ.setdefault(name, value)
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)
    if plan.search:
        space, asking = {}, {"search_alg": tuning.searcher(plan.search, ledger.add), "num_samples": ledger.total}
    else:
        space, asking = {"job": tune.grid_search(list(range(len(points))))}, {}
    with tempfile.TemporaryDirectory(prefix="dfkd_ray-tune-") as scratch:
        tuner = tune.Tuner(
            tune.with_resources(trial, resources),
            param_space=space,
            tune_config=tune.TuneConfig(
                scheduler=asha,
                max_concurrent_trials=plan.max_concurrent,
                reuse_actors=True,
                trial_dirname_creator=lambda t: f"trial_{t.trial_id}",
                **asking,
            ),
            run_config=tune.RunConfig(
                name="tune",
                storage_path=scratch,
                verbose=0,
                callbacks=[_telling(ledger, asha, plan.stop)],
                stop=_stopper(lambda: stop() or ledger.trouble is not None),
                failure_config=tune.FailureConfig(max_failures=RETRIES),
            ),
        )
        tuner.fit()


def _telling(ledger: Ledger, asha: Any | None = None, stop: StopConfig | None = None) -> Any:
    """A Tune callback that keeps the ledger; `asha` knows whom it has stopped."""
    from ray import tune

    class Tells(tune.Callback):
        """Trials by what becomes of them."""

        def __init__(self, ledger: Ledger):
            self.ledger = ledger

        def __getstate__(self) -> dict[str, Any]:
            return {}  # Tune pickles its callbacks, for a way to resume that is not used

        def job(self, trial: Any) -> Job:
            """Which job a Tune trial runs."""
            return self.ledger.todo[trial.config["job"]]

        def on_trial_start(self, iteration: int, trials: list, trial: Any, **info: Any) -> None:
            """It has a process."""
            self.ledger.started(self.job(trial))

        def on_trial_recover(self, iteration: int, trials: list, trial: Any, **info: Any) -> None:
            """It will have another process."""
            self.ledger.again(self.job(trial))

        def on_trial_complete(self, iteration: int, trials: list, trial: Any, **info: Any) -> None:
            """It has reported, or was stopped."""
            told = trial.last_result or {}
            if asha and stop and trial.trial_id in asha.cut:
                self.ledger.cut(self.job(trial), told, stop)
            else:
                self.ledger.ended(self.job(trial), told)

        def on_trial_error(self, iteration: int, trials: list, trial: Any, **info: Any) -> None:
            """It has failed as often as it may."""
            self.ledger.died(self.job(trial))

    return Tells(ledger)


def _stopper(stop: Callable[[], bool]) -> Any:
    """A Tune stopper for the whole sweep."""
    from ray import tune

    class Stops(tune.Stopper):
        """Asks at every step."""

        def __init__(self, stop: Callable[[], bool]):
            self.stop = stop

        def __getstate__(self) -> dict[str, Any]:
            return {}

        def __call__(self, trial_id: str, result: Mapping[str, Any]) -> bool:
            """No trial alone."""
            return False

        def stop_all(self) -> bool:
            """Whether it is time."""
            return self.stop()

    return Stops(stop)


def compact(place: Folder) -> None:
    """Make few files of the parts; where that fails the rows are as safe as before, and the next sweep tries again."""
    try:
        results.compact(place)
    except (OSError, ValueError) as error:
        log.warning("%s: its tables stay in many small files: %s", place, error)
