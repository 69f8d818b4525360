"""Where an exported network comes from: the row of its trial, found beside its bundle, and the notes in the bundle.

`dfkd-ray recover` writes row.json beside the student's folder, a sweep writes a table beside its folder of students.
Both may be files from elsewhere: only columns of today's schema with values of their types are taken, and only a row
of the trial that the bundle names.
"""

from collections.abc import Mapping
from typing import Any

from dfkd_ray import config, storage, untrusted
from dfkd_ray.bundles import Teacher, content, pretrained
from dfkd_ray.masking import split_query, without_secrets
from dfkd_ray.models.libraries import HUB
from dfkd_ray.plain import given
from dfkd_ray.results import finals, rows
from dfkd_ray.storage import Folder

ROW, STUDENTS = "row.json", "students"


def row_of(teacher: Teacher) -> dict[str, Any] | None:
    """The row of the trial that made a bundle; None if the bundle names none, or if it is not beside it."""
    trial_id = teacher.info.notes.get("trial_id")
    if teacher.folder is None or not isinstance(trial_id, str) or not config.TRIAL_ID.fullmatch(trial_id):
        return None
    try:
        above = parent(teacher.folder)
        data = content(above, ROW, untrusted.MAX_JSON_BYTES)
        row = None if data is None else untrusted.parse_json(data, str(above / ROW))
        if row is None and above.name == STUDENTS:
            row = finals.final_row(parent(above), trial_id)
    except (OSError, ValueError):  # not readable, or none of ours: the card says that it has no row
        return None
    if not isinstance(row, dict) or row.get("trial_id") != trial_id:
        return None
    return dict(rows.fitting("trials", row)[0])


def parent(folder: Folder) -> Folder:
    """The folder that a folder is in."""
    if folder.is_local:
        return storage.folder(folder.path.parent)
    head, mark, query = split_query(folder.uri)
    return storage.folder(head.rpartition("/")[0] + mark + query)


def facts(teacher: Teacher, row: Mapping[str, Any] | None) -> dict[str, Any]:
    """Columns of `trials` that are known of a network: of its row or, without one, of its bundle's notes.

    `ValueError` if the row is of another trial than the bundle.
    """
    notes = teacher.info.notes
    own = notes.get("trial_id")
    if row is not None:
        if own is not None and row.get("trial_id") != own:
            raise ValueError(
                f"the row is of trial {given(row.get('trial_id'))}, and the network's bundle is of {given(own)}; "
                "expected the row of the trial that made it"
            )
        return {name: value for name, value in rows.fitting("trials", row)[0].items() if value is not None}
    fields = notes.get("config")
    found = config.flat(fields) if isinstance(fields, Mapping) else {}
    found |= {"trial_id": own, "teacher_hash": notes.get("student_of")}
    return {name: value for name, value in rows.fitting("trials", found)[0].items() if value is not None}


def public_name(name: str) -> str:
    """A teacher's or a data set's name for readers elsewhere: without options of a library's name, which may be paths,
    and without the folders of a path but the last.
    """
    if pretrained.is_named(name):
        return name.partition("?")[0]
    parts = [part for part in split_query(without_secrets(name))[0].split("/") if part]
    return "/".join(parts[-2:]) if "/" in name and parts else name


def hub_repository(name: str) -> str | None:
    """The repository of the Hugging Face Hub that a teacher's own weights are from, by its name; None if of none."""
    if not pretrained.is_named(name):
        return None
    try:
        request = pretrained.parse(name)
    except ValueError:
        return None
    return request.network.partition("@")[0] if request.library == HUB and request.weights is None else None
