"""`dfkd-ray shrink`: a network that is so many times as fast and loses at most so many points, found in one sweep."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
import yaml

from dfkd_ray import config as configs
from dfkd_ray.cli import run
from dfkd_ray.cli.inputs import load_teacher
from dfkd_ray.cli.options import Cache, DataRoot, Download, Effort, Out, Set, TeacherName, TestData, Trust
from dfkd_ray.cli.streams import say

if TYPE_CHECKING:
    from dfkd_ray.sweep.shrinking import Candidate

SCHEMA = "dfkd_ray.shrinking/1"
CLAIM, FILE, SWEEP, STUDENT = ".shrinking.json", "shrink.yaml", "sweep", "student.onnx"


def shrink(
    teacher: TeacherName,
    out: Out,
    faster: Annotated[float, typer.Option(help="times as fast as the teacher, at least")] = 2.0,
    lose_at_most: Annotated[float, typer.Option(help="percentage points of accuracy")] = 0.5,
    int8: Annotated[bool, typer.Option(help="try int8 too")] = True,
    effort: Effort = None,
    set_: Set = None,
    test_data: TestData = "none",
    data_root: DataRoot = Path("data"),
    download: Download = False,
    cache: Cache = None,
    trust_code: Trust = None,
) -> None:
    """Find a student that is FASTER times as fast and loses at most LOSE_AT_MOST points, and export it as ONNX.

    A small sweep on this machine tries shares of channels, each in float32 and int8, on ONNX Runtime with one thread.
    Writes OUT/sweep (tables, students), OUT/shrink.yaml (its sweep file) and OUT/student.onnx with its model card.
    After an interruption, the same command resumes. Exit code 1 if nothing fits: then the nearest are named and nothing
    is exported. The loss is estimated, or measured on --test-data, which then chooses: measure the chosen one again on
    other data.
    """
    from dfkd_ray import exporting, results, targets, trial
    from dfkd_ray.exporting import of_trial
    from dfkd_ray.sweep import shrinking

    fields = configs.parse_overrides(set_ or [])
    shrinking.check(faster, lose_at_most)
    data = shrinking.sweep_of(teacher, faster, int8=int8, fields=fields)
    exporting.check_installed("shrink")
    place = targets.check(out, targets.Product("a result of shrink", {CLAIM: targets.claims(SCHEMA)}))
    loaded = load_teacher(teacher, trust_code, download=download)
    earlier = place.read(CLAIM)
    if earlier is not None and json.loads(earlier).get("teacher_hash") != loaded.hash:
        raise ValueError(f"{out}: it holds the students of another teacher; choose a new folder")
    with targets.retracting(place, CLAIM):
        targets.claim(place, CLAIM, SCHEMA, teacher_hash=loaded.hash)
        place.write(FILE, yaml.safe_dump(data, sort_keys=False).encode())
    failed = False
    try:
        run.sweep(
            Path(out) / FILE,
            results=str(Path(out) / SWEEP),
            effort=effort,
            test_data=test_data,
            data_root=data_root,
            download=download,
            cache=cache,
            trust_code=trust_code,
        )
    except typer.Exit:  # some trials failed; the others are looked at
        failed = True
    rows = results.read(place / SWEEP, "trials").to_dict("records")
    found = shrinking.candidates(rows)
    measured = shrinking.is_measured(rows)
    for line in lines(found, measured):
        say(line)
    for name in (STUDENT, f"{STUDENT}.md"):  # of an earlier choice
        place.remove(name)
    best = shrinking.choose(found, faster, lose_at_most)
    if best is None:
        say(f"nothing is {faster:g} times as fast and loses at most {lose_at_most:g} points; nearest:")
        for each in shrinking.nearest(found, faster, lose_at_most):
            say(f"  {each.name}: {each.speed:.2f} times as fast, {each.lost:.2f} points lost ({each.trial_id})")
        say("allow more loss, ask for less speed, or give it more time: --effort thorough")
        raise typer.Exit(1)
    student = place / SWEEP / "students" / best.trial_id
    target = Path(out) / STUDENT
    network = load_teacher(str(student), trust_code)
    if best.is_int8:
        written = student.read(trial.INT8_FILE)
        assert written is not None
        of_trial.copied(network, written, target)
    else:
        exporting.export(network, target)
    kind = "on the data that chose it" if measured else "estimated"
    say(f"chosen: {best.name}: {best.speed:.2f} times as fast, {best.lost:.2f} points lost ({kind})")
    say(f"written: {target}; as a bundle: {student}")
    if failed:
        raise typer.Exit(1)


def lines(found: Sequence["Candidate"], measured: bool) -> list[str]:
    """The candidates as a table."""
    how = "measured on test data"
    if not measured:
        how = "estimated without data, within a factor of about two"
    told = ["times as fast as the teacher, on ONNX Runtime, one thread, batch 1;", f"points of accuracy lost, {how}:"]
    for each in found:
        size = "" if each.num_bytes is None else f"{each.num_bytes / 1e3:9,.0f} kB"
        doubt = "?" if each.is_doubtful else " "
        told.append(f"  {each.name:<36} {each.speed:6.2f} x{doubt}{each.lost:7.2f} points  {size}")
    if any(each.is_doubtful for each in found):
        told.append(
            "?: the machine was busy, so this speed is doubtful: measure it again with `dfkd-ray bench latency`"
        )
    return told
