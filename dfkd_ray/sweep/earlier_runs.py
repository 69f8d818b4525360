"""Reads the tables of a sweep's earlier runs; refuses other test or real data."""

from collections.abc import Mapping, Sequence
from typing import Any

from dfkd_ray import evaluation, results
from dfkd_ray.batches import Batch, BatchSource
from dfkd_ray.storage import Folder
from dfkd_ray.sweep.jobs import Job
from dfkd_ray.sweep.tune_reports import METRIC
from dfkd_ray.text import is_null


def rows_in(place: Folder, columns: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """The rows of the `trials` table, all columns or some; empty if there is no table yet."""
    if not (place / "trials").names():
        return []
    return [{str(k): v for k, v in row.items()} for row in results.read(place, "trials", columns).to_dict("records")]


def looks_in(place: Folder, trial_ids: set[str]) -> list[tuple[str, int, float]]:
    """(trial, step, best metric so far) for each evaluation of these trials on the reference set."""
    if not trial_ids:
        return []
    looks = results.read(place, "epochs", ["trial_id", "step", METRIC])
    looks = looks.loc[looks["trial_id"].isin(list(trial_ids)) & looks["step"].notna() & looks[METRIC].notna()]
    best = looks.groupby("trial_id")[METRIC].cummin()
    return list(zip(looks["trial_id"], looks["step"].astype(int), best, strict=True))


def check_one_meaning(
    finished: Sequence[Job],
    todo: Sequence[Job],
    place: Folder,
    tests: Mapping[str, Sequence[Batch] | None],
    reals: Mapping[str, BatchSource],
) -> None:
    """`ValueError` if finished trials used other test or real images than the remaining trials would.

    A trial's id covers neither. Compared are the test set's number of images and hash (where the row has one), and the
    synthesis key of the real images.
    """
    before = {job.id: job for job in finished}
    if not before:
        return
    rows = results.read(place, "trials")
    rows = rows.loc[rows["trial_id"].isin(before) & rows["status"].isin(results.FINAL)]
    keys = {(job.teacher.hash, job.config.synthesis): reals[job.id](0).key for job in todo if job.id in reals}
    now = {name: evaluation.test_set(test) if test else {} for name, test in tests.items()}
    advice = f"give the same as before, or another `results` than {place}"
    for row in rows.to_dict("records"):
        job, num = before[row["trial_id"]], row["num_test_images"]
        num = None if is_null(num) else int(num)
        if job.teacher.hash in now:
            test = now[job.teacher.hash]
            if num != test.get("num_images"):
                raise ValueError(
                    f"`test_data`: finished trials of {job.config.teacher} were measured on {num or 'no'} test images, "
                    f"the others would be on {test.get('num_images', 'no')}; {advice}"
                )
            if num and not is_null(row["test_sha256"]) and row["test_sha256"] != test["sha256"]:
                raise ValueError(
                    f"`test_data`: finished trials of {job.config.teacher} were measured on {row['test_set']}, with "
                    f"other images or labels than those of {test['name']} now; {advice}"
                )
        if keys.get((job.teacher.hash, job.config.synthesis), row["synthesis_key"]) != row["synthesis_key"]:
            raise ValueError(f"`real_data`: trials that are finished used other real images; {advice}")
