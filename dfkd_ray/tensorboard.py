"""TensorBoard event files in a results place: `tensorboard --logdir PLACE`.

Under `tensorboard/` each trial is a run with one file. A file beside the runs defines the hparams view: it lists the
fields that vary. The records are in TensorBoard's format, but its SummaryWriter is not used: it starts a new file each
time, so a resumed trial would have its points twice, and it appends, which object stores cannot. This module reads the
existing file and adds only new events. A running TensorBoard keeps reading the same file. On a disk, whole records are
appended after the last whole one; in an object store, the file is rewritten with the same beginning. A new or replaced
file would be missed by one of TensorBoard's two readers.
"""

# Protobuf makes its classes at import, where a type checker does not see them.
# pyright: reportAttributeAccessIssue=false

import io
import json
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from numbers import Real
from pathlib import Path
from typing import Any

from google.protobuf.message import DecodeError
from PIL import Image
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata
from tensorboard.plugins.hparams import api_pb2, metadata, plugin_data_pb2
from tensorboard.plugins.hparams import summary_v2 as hparams
from tensorboard.plugins.text.summary_v2 import text_pb
from tensorboard.summary.writer.record_writer import RecordWriter

from dfkd_ray import ladder
from dfkd_ray.config import TrialConfig, columns_of
from dfkd_ray.results.schemas import METRICS, config_columns
from dfkd_ray.storage import Folder, folder
from dfkd_ray.text import is_null

NAME = "events.out.tfevents"  # TensorBoard reads files with `tfevents` in their names, in the order of the names
TRIAL, SWEEP, FIELDS = f"{NAME}.trial", f"{NAME}.sweep", "fields.json"
SECTIONS = {"loss": "losses", "kl": "losses", "label": "losses", "feature": "losses"}
SECTIONS |= {"agreement": "reference", "reference_kl": "reference"}  # all other columns are in the section `training`
LOOKS = ("losses/", "reference/", "training/")
RUNGS = tuple(rung.name for rung in ladder.RUNGS)
LADDER = f"Set smoothing to 0. Steps: {', '.join(f'{step} {rung.label}' for step, rung in enumerate(ladder.RUNGS))}"
RESULTS = (*(f"{rung}_accuracy" for rung in RUNGS), "agreement", "reference_kl", "achieved_sparsity", "stored_bytes")
LARGEST_PX = 1024


def write_epochs(place: str | Path | Folder, trial_id: str, epochs: Sequence[Mapping[str, Any]]) -> None:
    """Write the measurements of a distillation so far: `epochs` are all its evaluations, each with its `step`.

    Evaluations up to the last step in the file are left out, so a resumed trial adds no point twice. An evaluation
    without a step is left out.
    """
    run = folder(place) / "tensorboard" / trial_id
    there, size = events_in(run)
    new = look_events(epochs, there)
    if new:
        extend(run, size, new)


def write_trial(place: str | Path | Folder, row: Mapping[str, Any], epochs: Sequence[Mapping[str, Any]]) -> None:
    """Write an ended trial: evaluations, ladder, results, config fields, and the picture of its images if it exists.

    `row` is its row of `trials`, also of a failed trial, with any kind of null. Without a trial id nothing is written.
    The picture is read from `images/` in the same place.
    """
    row = {name: None if is_null(value) else value for name, value in row.items()}
    trial_id = row.get("trial_id")
    if trial_id is None:
        return
    place = folder(place)
    fields = {name: row[name] for name in config_columns(TrialConfig) if row.get(name) is not None}
    start = time.time() - (row.get("wall_s") or 0.0)
    failed = row.get("status") in (None, "failed")
    end = plugin_data_pb2.SessionEndInfo(
        status=api_pb2.STATUS_FAILURE if failed else api_pb2.STATUS_SUCCESS, end_time_secs=time.time()
    )
    events = [
        event(0, *hparams.hparams_pb(fields, trial_id=trial_id, start_time_secs=start).value),
        *(event(index, *ladder_values(row, rung)) for index, rung in enumerate(RUNGS)),
        event(
            int(row.get("best_step") or 0),
            *(scalar(f"trial/{name}", row.get(name), METRICS[name][2]) for name in RESULTS),
        ),
    ]
    if row.get("reason"):
        events.append(event(0, *text_pb("reason", str(row.get("reason"))).value))
    picture = row.get("synthesis_key") and (place / "images").read(f"{row['synthesis_key'][:12]}.png")
    if picture:
        tag = "real_images" if row.get("real_data") else "synthetic_images"
        events.append(event(0, image(tag, picture, "some of the images distilled on, by class")))
    ended = plugin_data_pb2.HParamsPluginData(session_end_info=end)
    events.append(event(0, hparams_value(metadata.SESSION_END_INFO_TAG, ended)))
    run = place / "tensorboard" / trial_id
    there, size = events_in(run)
    new = look_events(epochs, there)
    if any(is_end(one) for one in there):  # of an earlier attempt: only one end may remain
        run.write(TRIAL, encoded([*(one for one in there if is_look(one)), *new, *events]))
    else:
        extend(run, size, [*new, *events])


def events_in(run: Folder) -> tuple[list[Event], int]:
    """The events of a run's file, and the size of its whole records; the last one may be incomplete after a kill."""
    data = run.read(TRIAL) or b""
    events, position = [], 0
    while len(data) >= position + 12:
        end = position + 16 + int.from_bytes(data[position : position + 8], "little")  # size, two checksums, the event
        if end > len(data):
            break
        try:
            events.append(Event.FromString(data[position + 12 : end - 4]))
        except DecodeError:
            break
        position = end
    return events, position


def look_events(epochs: Sequence[Mapping[str, Any]], there: Sequence[Event]) -> list[Event]:
    """The evaluations that are later than those in `there`."""
    last = max((one.step for one in there if is_look(one)), default=-1)
    new = [look for look in epochs if not is_null(look.get("step")) and look["step"] > last]
    return [event(int(look["step"]), *look_values(look)) for look in new]


def is_look(one: Event) -> bool:
    """Whether an event is an evaluation of the student."""
    return any(value.tag.startswith(LOOKS) for value in one.summary.value)


def is_end(one: Event) -> bool:
    """Whether an event marks the end of the trial."""
    return any(value.tag == metadata.SESSION_END_INFO_TAG for value in one.summary.value)


def extend(run: Folder, size: int, events: Sequence[Event]) -> None:
    """Append events after the first `size` bytes of a run's file; after an error the file is unchanged."""
    data = encoded(events, begin=not size)
    if not size or not run.is_local:
        run.write(TRIAL, (run.read(TRIAL) or b"")[:size], data)
        return
    # A symbolic link there would point to a foreign file.
    descriptor = os.open(run.path / TRIAL, os.O_RDWR | getattr(os, "O_NOFOLLOW", 0))
    with open(descriptor, "r+b", buffering=0) as file:
        try:
            file.truncate(size)
            file.seek(size)
            left = memoryview(data)
            while left:
                left = left[file.write(left) or 0 :]
            os.fsync(file.fileno())
        except OSError:
            file.truncate(size)
            raise


def write_sweep(place: str | Path | Folder, configs: Iterable[TrialConfig]) -> None:
    """Define the hparams view: the fields that differ between trials, with KL, agreement and accuracy.

    It covers the trials of all sweeps in this place. TensorBoard accepts only one definition, so the values of all
    fields so far are stored beside it.
    """
    root = folder(place) / "tensorboard"
    values = merged(fields_in(root), seen(configs))
    root.write(FIELDS, json.dumps(values, indent=1).encode())
    columns = [hparams.HParam(name, hparams.Discrete(shown)) for name, shown in varying(values).items()]
    metrics = [
        hparams.Metric(f"trial/{name}", display_name=name, description=METRICS[name][2])
        for name in ("reference_kl", "agreement", "recovered_accuracy")
    ]
    summary = hparams.hparams_config_pb(columns, metrics)
    root.write(SWEEP, encoded([event(0, *summary.value)]))


def seen(configs: Iterable[TrialConfig]) -> dict[str, list[Any]]:
    """Dotted field → its values in these trials."""
    found: dict[str, dict[Any, None]] = {}
    for config in configs:
        for name, value in columns_of(config).items():
            found.setdefault(name, {})[value] = None
    return {name: list(values) for name, values in found.items()}


def fields_in(root: Folder) -> dict[str, list[Any]]:
    """The field values stored by earlier sweeps; empty if the file is damaged."""
    try:
        found = json.loads(root.read(FIELDS) or b"{}")
    except (ValueError, RecursionError):
        return {}
    if not isinstance(found, dict):
        return {}
    known = config_columns(TrialConfig)
    return {name: some for name, some in found.items() if name in known and isinstance(some, list) and kinds(some)}


def kinds(values: Iterable[Any]) -> set[str]:
    """The types of a field's values (the hparams view accepts one type); empty if a value has an unsupported type."""
    found = set()
    for value in values:
        if isinstance(value, int) and not isinstance(value, bool) and abs(value) >= 2**63:
            return set()
        if not isinstance(value, str | bool | int | float | None):
            return set()
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        found.add("number" if is_number else type(value).__name__)
    return found


def merged(before: Mapping[str, list[Any]], now: Mapping[str, list[Any]]) -> dict[str, list[Any]]:
    """Field → the values of both; if their types differ, the current values."""
    both = {name: list(dict.fromkeys([*before.get(name, []), *now.get(name, [])])) for name in {**before, **now}}
    fits = {name: len(kinds(values) - {"NoneType"}) == 1 or set(values) == {None} for name, values in both.items()}
    return {name: values if fits[name] else now.get(name, []) for name, values in both.items()}


def varying(values: Mapping[str, list[Any]]) -> dict[str, list[Any]]:
    """The fields with more than one value among the trials that have them; numbers as floats, nulls left out."""
    found = {name: [one for one in some if one is not None] for name, some in values.items() if len(some) > 1}
    return {
        name: [float(v) if isinstance(v, int | float) and not isinstance(v, bool) else v for v in some]
        for name, some in found.items()
    }


def look_values(look: Mapping[str, Any]) -> list[Summary.Value | None]:
    """The scalars of one evaluation of the student."""
    return [
        scalar(f"{SECTIONS.get(name, 'training')}/{name}", float(value))
        for name, value in look.items()
        if name != "step" and isinstance(value, Real) and not isinstance(value, bool)
    ]


def ladder_values(row: Mapping[str, Any], rung: str) -> list[Summary.Value | None]:
    """Accuracy and agreement on one rung; the teacher has no agreement."""
    agreement = "agreement" if rung == "recovered" else f"{rung}_agreement"
    return [
        scalar("ladder/accuracy", row.get(f"{rung}_accuracy"), LADDER),
        scalar("ladder/agreement", row.get(agreement), LADDER),
    ]


def scalar(tag: str, number: float | int | None, description: str = "") -> Summary.Value | None:
    """A scalar summary, or None without a number."""
    if is_null(number):
        return None
    metadata = SummaryMetadata(summary_description=description) if description else None
    return Summary.Value(tag=tag, simple_value=number, metadata=metadata)


def image(tag: str, png: bytes, description: str) -> Summary.Value:
    """An image summary from a PNG file, scaled down if a side exceeds `LARGEST_PX` pixels."""
    with Image.open(io.BytesIO(png)) as picture:
        if max(picture.size) > LARGEST_PX:
            picture.thumbnail((LARGEST_PX, LARGEST_PX))
            smaller = io.BytesIO()
            picture.save(smaller, format="PNG")
            png = smaller.getvalue()
        width, height = picture.size
        channels = len(picture.getbands())
    shown = Summary.Image(height=height, width=width, colorspace=channels, encoded_image_string=png)
    return Summary.Value(tag=tag, image=shown, metadata=SummaryMetadata(summary_description=description))


def hparams_value(tag: str, data: Any) -> Summary.Value:
    """A summary value for the hparams view."""
    return Summary.Value(tag=tag, metadata=metadata.create_summary_metadata(data), tensor=metadata.NULL_TENSOR)


def event(step: int, *values: Summary.Value | None) -> Event:
    """An event with all values of one step."""
    return Event(wall_time=time.time(), step=step, summary=Summary(value=[v for v in values if v is not None]))


def encoded(events: Iterable[Event], begin: bool = True) -> bytes:
    """The bytes of an event file; with `begin` false, without its first record, for appending."""
    file = io.BytesIO()
    writer = RecordWriter(file)
    for one in (*([Event(wall_time=time.time(), file_version="brain.Event:2")] if begin else []), *events):
        writer.write(one.SerializeToString())
    return file.getvalue()
