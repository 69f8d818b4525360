"""The rows of a sweep are safe from what shows them, and from attempts that fail after one that did not."""

import json
import time
from pathlib import Path

import pytest

from dfkd_ray import results, storage, sweep, trial
from dfkd_ray.results import finals
from dfkd_ray.sweep import ledger as ledgers
from dfkd_ray.sweep import runner, tuner, worker
from helpers import jobs_of, tiny_sweep

RAISED = [
    BrokenPipeError(32, "Broken pipe"),
    UnicodeEncodeError("ascii", "é", 0, 1, "no"),
    SystemExit(1),
    RecursionError(),
    type("Panic", (BaseException,), {})("in a library"),
]


def jobs_with(teacher: Path, *sparsities: float) -> list[sweep.Job]:
    """A trial for each sparsity, of 0.5 where none is given."""
    return jobs_of(tiny_sweep(teacher, {"pruning.sparsity": list(sparsities) or [0.5]}))


def ledger_of(jobs: list[sweep.Job], place: Path, on_row=None, **more) -> ledgers.Ledger:
    return ledgers.Ledger(jobs, storage.folder(place), on_row, sweep.Seconds(), **more)


def final(job: sweep.Job, status: str = "finished") -> dict:
    """A final row of a job."""
    provenance = trial.provenance(job.config, job.teacher)
    return provenance | {
        "status": status,
        "agreement": 0.5,
        "reference_kl": 0.25,
        "reason": "early" if status == "stopped" else None,
    }


@pytest.mark.parametrize("error", RAISED, ids=lambda error: type(error).__name__)
def test_what_shows_progress_can_raise_anything_and_changes_no_row(tiny_teacher, tmp_path, caplog, error):
    def raises(*_words):
        raise error

    first, second = jobs_with(tiny_teacher, 0.5, 0.6)
    ledger = ledger_of([first, second], tmp_path, raises, on_new=raises)
    results.write(tmp_path, "trials", [final(first)], first.id)
    told = tuner._callback(ledger)
    ended = type("Ended", (), {"config": {"job": 0}, "trial_id": "x", "last_result": {"row": json.dumps(final(first))}})
    told.on_trial_complete(0, [], ended)
    died = type("Died", (), {"config": {"job": 1}, "trial_id": "y", "num_failures": 3})
    told.on_trial_error(0, [], died)
    assert ledger.add(first) == 2
    rows = results.read(tmp_path, "trials").set_index("trial_id")["status"].to_dict()
    assert rows == {first.id: "finished", second.id: "failed"} and ledger.num_done == 2 and ledger.trouble is None
    assert 1 <= len(caplog.records) <= 2, "once for each that shows"


def test_a_look_that_raises_ends_neither_the_watching_nor_the_sweep(caplog):
    looks = []

    def look() -> None:
        looks.append(1)
        raise SystemExit(1)

    with runner.watched(look, 0.01):
        for _ in range(1000):
            if len(looks) >= 3:
                break
            time.sleep(0.01)
    assert len(looks) >= 4 and len(caplog.records) == 1


def test_an_interrupt_while_progress_is_shown_is_one():
    def show() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ledgers.harmless(show)()


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("status", ["finished", "stopped"])
def test_a_final_row_is_never_replaced_by_a_failed_one(tiny_teacher, tmp_path, status, merged):
    first, second = jobs_with(tiny_teacher, 0.5, 0.6)
    for job in (first, second):
        results.write(tmp_path, "trials", [final(job, status)], job.id)
    if merged:
        assert results.compact(tmp_path) and not (tmp_path / "trials" / f"{first.id}.parquet").exists()
    before = results.read(tmp_path, "trials")
    heard: list = []
    ledger = ledger_of([first, second], tmp_path, lambda row, *_: heard.append((row["trial_id"], row["status"])))
    ledger.died(first)
    ledger.ended(first, {"reason": "ValueError: late"})
    failed = trial.Outcome(worker.failed_row(second, "OSError: late"))
    worker.keep(second, failed, storage.folder(tmp_path), sweep.Seconds())
    assert results.read(tmp_path, "trials").equals(before)
    assert heard == [(first.id, status)] * 2 and results.finished_ids(tmp_path) == {first.id, second.id}


def test_a_trial_that_no_file_of_other_trials_holds_has_no_final_row_yet(tiny_teacher, tmp_path):
    done, other, new = jobs_with(tiny_teacher, 0.5, 0.6, 0.7)
    for job in (done, other):
        results.write(tmp_path, "trials", [final(job)], job.id)
    assert results.compact(tmp_path) == 2
    results.write(tmp_path, "trials", [], new.id)
    assert finals.final_row(tmp_path, new.id) is None
    ledger_of([new], tmp_path).died(new)
    rows = results.read(tmp_path, "trials").set_index("trial_id")["status"].to_dict()
    assert rows == {done.id: "finished", other.id: "finished", new.id: "failed"}


def test_a_failed_row_is_replaced_and_a_damaged_part_is_no_row(tiny_teacher, tmp_path):
    (job,) = jobs_with(tiny_teacher)
    ledger = ledger_of([job], tmp_path)
    ledger.died(job)
    assert results.read(tmp_path, "trials")["reason"].tolist() == [ledgers.DIED]
    (tmp_path / "trials" / f"{job.id}.parquet").write_bytes(b"PAR1 damaged")
    ledger.ended(job, {"reason": "ValueError: another"})
    assert results.read(tmp_path, "trials")["reason"].tolist() == ["ValueError: another"]


def test_an_attempt_after_one_that_left_its_row_hands_that_on_and_computes_nothing(tiny_teacher, tmp_path, monkeypatch):
    (job,) = jobs_with(tiny_teacher)
    results.write(tmp_path, "trials", [final(job)], job.id)
    monkeypatch.setattr(worker, "run_job", lambda *_words, **_options: pytest.fail("computed again"))
    shared = worker.Shared(str(tmp_path), None, (), None, None, {}, {}, {})
    told = worker.in_worker(job.id, job.config, job.teacher.hash, shared)
    row = json.loads(told["row"])
    assert (row["trial_id"], row["status"], told["reference_kl"], told["failed"]) == (job.id, "finished", 0.25, 0)
