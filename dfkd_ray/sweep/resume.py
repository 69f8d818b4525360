"""Reads the tables of a sweep's earlier runs; refuses other test or real data. runner.py decides what runs again."""

from collections.abc import Mapping, Sequence
from typing import Any

from dfkd_ray import results
from dfkd_ray.batches import Batch, BatchSource
from dfkd_ray.storage import Folder
from dfkd_ray.sweep.jobs import Job


def rows_in(place: Folder, columns: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """The rows of the `trials` table, all columns or some; empty if there is no table yet."""
    if not (place / "trials").names():
        return []
    return [{str(k): v for k, v in row.items()} for row in results.read(place, "trials", columns).to_dict("records")]


def looks_in(place: Folder, trial_ids: set[str]) -> list[tuple[str, int, float]]:
    """(trial, step, best agreement so far) for each evaluation of these trials on the reference set."""
    if not trial_ids:
        return []
    looks = results.read(place, "epochs", ["trial_id", "step", "agreement"])
    looks = looks.loc[looks["trial_id"].isin(list(trial_ids)) & looks["step"].notna() & looks["agreement"].notna()]
    best = looks.groupby("trial_id")["agreement"].cummax()
    return list(zip(looks["trial_id"], looks["step"].astype(int), best, strict=True))


def check_one_meaning(
    finished: Sequence[Job],
    todo: Sequence[Job],
    place: Folder,
    tests: Mapping[str, Sequence[Batch] | None],
    reals: Mapping[str, BatchSource],
) -> None:
    """`ValueError` if finished trials used other test or real images than the remaining trials would.

    A trial's id covers neither. Compared are the number of test images and the synthesis key of the real images.
    """
    before = {job.id: job for job in finished}
    if not before:
        return
    rows = results.read(place, "trials")
    rows = rows.loc[rows["trial_id"].isin(before) & (rows["status"] == "finished")]
    keys = {(job.teacher.hash, job.config.synthesis): reals[job.id](0).key for job in todo if job.id in reals}
    advice = f"give the same as before, or another `results` than {place}"
    for row in rows.to_dict("records"):
        job, num = before[row["trial_id"]], row["num_test_images"]
        num = None if num != num or num is None else int(num)
        if job.teacher.hash in tests:
            test = tests[job.teacher.hash]
            now = None if test is None else sum(len(batch.labels) for batch in test)
            if num != now:
                raise ValueError(
                    f"`test_data`: finished trials of {job.config.teacher} were measured on {num or 'no'} test images, "
                    f"the others would be on {now or 'no'}; {advice}"
                )
        if keys.get((job.teacher.hash, job.config.synthesis), row["synthesis_key"]) != row["synthesis_key"]:
            raise ValueError(f"`real_data`: trials that are finished used other real images; {advice}")
