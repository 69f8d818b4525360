"""The caption of a document's table: what is shown, over how many seeds, on which machines, by which versions.

All of it comes from the rows, but for the command and the author's note.
"""

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

from dfkd_ray.ladder import STUDENTS
from dfkd_ray.report.cells import Filled
from dfkd_ray.report.specification import Specification
from dfkd_ray.report.wording import CHOICE_NOTE, Frame, count, listed, percent
from dfkd_ray.results import selecting
from dfkd_ray.results.metrics import SHARES, metric
from dfkd_ray.text import code, is_null

MOST_SIGNS = 1000  # of a command
NUM_COMMANDS = 2  # named in the caption of measurements
ON_REFERENCE = {str(rung.agreement) for rung in STUDENTS} | {"reference_kl", "quantised_kl"}


def caption(done: Filled, spec: Specification, command: str | None) -> str:
    """The sentences of a caption, in one line."""
    used = done.used
    finished = used.loc[used["status"] == "finished"]
    sentences = [*units(finished, spec), seeds(done), *left_out(done), *real(finished)]
    sentences += note(spec)
    made = [] if command is None else [code(command, MOST_SIGNS)]
    made += [*one_value(finished, "numerics"), *versions(finished), *dates(finished)]
    sentences.append(f"{'; '.join(made)}." if made else "")
    sentences += mixed(finished)
    if any(name in ON_REFERENCE for name in spec.metrics) and len(selecting.reference_sets(finished)) > 1:
        sentences.append("KL and agreement are on two kinds of reference images, and cannot be compared.")
    return " ".join(sentence for sentence in sentences if sentence)


def of_measurements(done: Filled, spec: Specification, command: str | None) -> str:
    """The sentences of the caption of a table of measurements, in one line."""
    used = done.used
    sentences = [seeds(done)] if used["seed"].notna().any() else []
    if any(cell.num == 0 for row in done.cells for cell in row):
        sentences = [*sentences, "–: not measured."]
    sentences += note(spec)
    commands = list(used["command"].dropna().unique()) if command is None else [command]
    made = [code(one, MOST_SIGNS) for one in commands[:NUM_COMMANDS]]
    made += [f"and {count(len(commands) - NUM_COMMANDS, 'command')} more"] if len(commands) > NUM_COMMANDS else []
    machines = [code(one) for one in used["numerics"].dropna().unique()]
    sentences.append(f"{'; '.join([*made, *machines, *dates(used)])}.")
    return " ".join(sentence for sentence in sentences if sentence)


def of_choice(used: Frame, spec: Specification, command: str | None) -> str:
    """The sentences of the caption of a table of what the choice without data costs, in one line."""
    made = [] if command is None else [code(command, MOST_SIGNS)]
    made += [*one_value(used, "numerics"), *versions(used), *dates(used)]
    return " ".join([CHOICE_NOTE, *note(spec), f"{'; '.join(made)}.", *mixed(used)])


def note(spec: Specification) -> list[str]:
    """The author's words, in one line."""
    return [] if spec.note is None else [" ".join(spec.note.split())]


def mixed(finished: Frame) -> list[str]:
    """What differs between trials that a table shows together: versions, machines."""
    found = selecting.mixtures(finished)
    return [f"Mixed: {code('; '.join(found), MOST_SIGNS)}."] if found else []


def units(finished: Frame, spec: Specification) -> list[str]:
    """What the numbers are; the teacher's accuracy and the test set where all trials have the same."""
    shown = [metric(name) for name in spec.metrics]
    on = test_set(finished) if any(each.is_tested for each in shown) else ""
    sentences = []
    if any(one.rung for one in shown):
        values = finished["teacher_accuracy"].dropna().unique()
        is_one = len(values) == 1 and finished["teacher_hash"].nunique() == 1
        teacher = f" ({percent(values[0])})".replace("\u00a0", " ") if is_one else ""
        sentences.append(f"Percentage points of test accuracy lost against the teacher{teacher}{on}.")
    shares = [one for one in shown if one.name in SHARES]
    if shares:
        kinds = {"accuracy" if one.is_tested else "agreement with the teacher" for one in shares}
        what = f"{listed(sorted(kinds))} in percent".capitalize()
        sentences.append(f"{what}{'' if sentences else on}.")
    return sentences


def test_set(finished: Frame) -> str:
    """The test set, where the rows name one; its number where they name several."""
    tested = finished.dropna(subset=["test_sha256"])
    if len(tested) < len(finished):
        return ""
    if tested["test_sha256"].nunique() > 1:
        return f", on {tested['test_sha256'].nunique()} test sets"
    names = tested["test_set"].dropna().unique()
    nums = tested["num_test_images"].dropna().unique()
    images = [f"{int(nums[0]):,} images"] if len(nums) == 1 else []
    return f" on {' of '.join([*images, code(names[0])])}" if len(names) == 1 else ""


def seeds(done: Filled) -> str:
    """Over how many seeds the means are."""
    usual = done.usual_num
    if not usual:
        return "No trial has finished."
    others = any(cell.num not in (0, usual) for row in done.cells for cell in row)
    if usual == 1 and not others:
        return "One seed, no spread."
    return f"Mean ± std of {count(usual, 'seed')}{', or of the number in brackets' if others else ''}."


def left_out(done: Filled) -> list[str]:
    """The trials that are in no mean, by status, and what an empty cell means."""
    statuses = done.used["status"].fillna("unknown").value_counts()
    names = {"stopped": "stopped early", "unknown": "of unknown status"}
    others = [f"{int(num):,} {names.get(str(what), what)}" for what, num in statuses.items() if what != "finished"]
    sentences = [f"In no mean: {listed(others)}."] if others else []
    if any(cell.num == 0 for row in done.cells for cell in row):
        sentences.append("–: not measured.")
    return sentences


def real(finished: Frame) -> list[str]:
    """Whether trials were distilled on real images."""
    num = int(finished["real_data"].astype("boolean").fillna(False).sum())
    if not num:
        return []
    which = "All trials" if num == len(finished) else f"{num:,} of {count(len(finished), 'trial')}"
    return [f"{which} on real images: an upper bound, not data-free."]


def one_value(finished: Frame, column: str) -> list[str]:
    """The value of a column that is the same in all rows, as code; several are in `mixtures`."""
    values: Sequence[Any] = finished[column].unique()
    return [code(values[0])] if len(values) == 1 and isinstance(values[0], str) else []


def versions(finished: Frame) -> list[str]:
    """The version of the trial's algorithms, where all trials have the same; several are in `mixtures`."""
    found = finished["trial_version"].unique()
    return [f"trial version {int(found[0])}"] if len(found) == 1 and not is_null(found[0]) else []


def dates(finished: Frame) -> list[str]:
    """The days (UTC) on which the rows were written: `2026-11-27`, or the first and the last."""
    times = finished["written_at_s"].dropna()
    if times.empty:
        return []
    first, last = (datetime.fromtimestamp(float(time), UTC).date().isoformat() for time in (times.min(), times.max()))
    return [first if first == last else f"{first} to {last}"]
