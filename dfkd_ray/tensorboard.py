"""TensorBoard event files in a results place: `tensorboard --logdir PLACE`.

Under `tensorboard/` each trial is a run, and a file beside the runs says which fields vary: the hparams view. The
records and messages are TensorBoard's own, its SummaryWriter is not used: that appends to a file under a new name at
each start, so a killed trial leaves half a record and a resumed one its points twice, and object stores cannot append.
Here a file is written whole, and its name says what is in it: to write it again changes nothing.
"""

# Protobuf makes its classes at import, where a type checker does not see them.
# pyright: reportAttributeAccessIssue=false

import io
import re
import time
from collections.abc import Iterable, Mapping, Sequence
from numbers import Real
from pathlib import Path
from typing import Any

from PIL import Image
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata
from tensorboard.plugins.hparams import api_pb2, metadata, plugin_data_pb2
from tensorboard.plugins.hparams import summary_v2 as hparams
from tensorboard.plugins.text.summary_v2 import text_pb
from tensorboard.summary.writer.record_writer import RecordWriter

from dfkd_ray.config import TrialConfig, columns_of
from dfkd_ray.results.schemas import METRICS, config_columns
from dfkd_ray.storage import Folder, folder

NAME = "events.out.tfevents"  # TensorBoard reads files with `tfevents` in their names, in the order of the names
LOOKS = re.compile(re.escape(NAME) + r"\.(\d+)-(\d+)")
SECTIONS = {"loss": "losses", "kl": "losses", "label": "losses", "feature": "losses"}
SECTIONS |= {"agreement": "reference", "reference_kl": "reference"}  # any other column is in the section `training`
RUNGS = ("teacher", "pruned", "bn_reestimated", "recovered")
LADDER = "Set smoothing to 0. Steps: 0 teacher, 1 pruned, 2 BatchNorm re-estimated without training, 3 recovered"
RESULTS = (*(f"{rung}_accuracy" for rung in RUNGS), "agreement", "reference_kl", "achieved_sparsity", "stored_bytes")
LARGEST_PX = 1024


def write_epochs(place: str | Path | Folder, trial_id: str, epochs: Sequence[Mapping[str, Any]]) -> None:
    """Write what a distillation has measured so far: `epochs` are all its looks, each with its `step`.

    Looks up to the last step that is there already are left out: a resumed trial may hand in what an earlier process
    wrote, and adds no point twice.
    """
    run = folder(place) / "tensorboard" / trial_id
    known = [int(match[2]) for name in run.names() if (match := LOOKS.fullmatch(name))]
    last = max(known, default=-1)
    new = [look for look in epochs if look["step"] > last]
    if new:
        events = [event(look["step"], *look_values(look)) for look in new]
        run.write(f"{NAME}.{new[0]['step']:010d}-{new[-1]['step']:010d}", encoded(events))


def write_trial(place: str | Path | Folder, row: Mapping[str, Any], epochs: Sequence[Mapping[str, Any]]) -> None:
    """Write a trial that has ended: its looks, ladder, results, fields and the picture of its images, if there is one.

    `row` is its row of `trials`, of a failed one too; the picture is the one under `images/` of the same place.
    """
    write_epochs(place, row["trial_id"], epochs)
    place = folder(place)
    fields = {name: row[name] for name in config_columns(TrialConfig) if row.get(name) is not None}
    start = time.time() - (row.get("wall_s") or 0.0)
    failed = row["status"] == "failed"
    end = plugin_data_pb2.SessionEndInfo(
        status=api_pb2.STATUS_FAILURE if failed else api_pb2.STATUS_SUCCESS, end_time_secs=time.time()
    )
    events = [
        event(0, *hparams.hparams_pb(fields, trial_id=row["trial_id"], start_time_secs=start).value),
        *(event(index, *ladder_values(row, rung)) for index, rung in enumerate(RUNGS)),
        event(
            row.get("best_step") or 0, *(scalar(f"trial/{name}", row.get(name), METRICS[name][2]) for name in RESULTS)
        ),
    ]
    if row.get("reason"):
        events.append(event(0, *text_pb("reason", str(row.get("reason"))).value))
    picture = row.get("synthesis_key") and (place / "images").read(f"{row['synthesis_key'][:12]}.png")
    if picture:
        tag = "real_images" if row.get("real_data") else "synthetic_images"
        events.append(event(0, image(tag, picture, "some of the images distilled on, a row per class")))
    ended = plugin_data_pb2.HParamsPluginData(session_end_info=end)
    events.append(event(0, hparams_value(metadata.SESSION_END_INFO_TAG, ended)))
    (place / "tensorboard" / row["trial_id"]).write(f"{NAME}.trial", encoded(events))


def write_sweep(place: str | Path | Folder, configs: Iterable[TrialConfig]) -> None:
    """Say which fields the hparams view shows: those that differ between the trials, beside agreement and accuracy."""
    columns = [hparams.HParam(name, hparams.Discrete(values)) for name, values in varying(configs).items()]
    metrics = [
        hparams.Metric(f"trial/{name}", display_name=name, description=METRICS[name][2])
        for name in ("agreement", "recovered_accuracy")
    ]
    summary = hparams.hparams_config_pb(columns, metrics)
    (folder(place) / "tensorboard").write(f"{NAME}.sweep", encoded([event(0, *summary.value)]))


def varying(configs: Iterable[TrialConfig]) -> dict[str, list[Any]]:
    """Dotted field → its values, where trials that have the field differ in it; numbers as floats, null left out."""
    seen: dict[str, dict[Any, None]] = {}
    for config in configs:
        for name, value in columns_of(config).items():
            seen.setdefault(name, {})[value] = None
    found = {name: [value for value in values if value is not None] for name, values in seen.items() if len(values) > 1}
    return {
        name: [float(v) if isinstance(v, int | float) and not isinstance(v, bool) else v for v in values]
        for name, values in found.items()
    }


def look_values(look: Mapping[str, Any]) -> list[Summary.Value | None]:
    """The scalars of one look at the student."""
    return [
        scalar(f"{SECTIONS.get(name, 'training')}/{name}", float(value))
        for name, value in look.items()
        if name != "step" and isinstance(value, Real) and not isinstance(value, bool)
    ]


def ladder_values(row: Mapping[str, Any], rung: str) -> list[Summary.Value | None]:
    """Accuracy and agreement on one rung; the teacher's agreement with itself is no measurement."""
    agreement = "agreement" if rung == "recovered" else f"{rung}_agreement"
    return [
        scalar("ladder/accuracy", row.get(f"{rung}_accuracy"), LADDER),
        scalar("ladder/agreement", row.get(agreement), LADDER),
    ]


def scalar(tag: str, number: float | int | None, description: str = "") -> Summary.Value | None:
    """One number, or None where there is none."""
    if number is None or number != number:
        return None
    told = SummaryMetadata(summary_description=description) if description else None
    return Summary.Value(tag=tag, simple_value=number, metadata=told)


def image(tag: str, png: bytes, description: str) -> Summary.Value:
    """A picture from a PNG file, made smaller where it has more than `LARGEST_PX` pixels a side."""
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
    """One message to the hparams view."""
    return Summary.Value(tag=tag, metadata=metadata.create_summary_metadata(data), tensor=metadata.NULL_TENSOR)


def event(step: int, *values: Summary.Value | None) -> Event:
    """What is known of one step."""
    return Event(wall_time=time.time(), step=step, summary=Summary(value=[v for v in values if v is not None]))


def encoded(events: Iterable[Event]) -> bytes:
    """An event file."""
    file = io.BytesIO()
    writer = RecordWriter(file)
    for one in (Event(wall_time=time.time(), file_version="brain.Event:2"), *events):
        writer.write(one.SerializeToString())
    return file.getvalue()
