"""The weights that a student starts from: a file or a bundle of the user's, such as a network pruned elsewhere.

What is read stays in this process by the hash of its content, up to `MOST_HELD` bytes: the trials of a sweep that start
from one file read it once, and its weights travel to workers, which need not reach the file. A config has the hash from
`pinned` on, and a file that has changed since is refused.
"""

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dfkd_ray import bundles, storage, untrusted
from dfkd_ray.bundles import IN_MEMORY, Teacher, matching, weights
from dfkd_ray.config import StudentConfig
from dfkd_ray.description import BundleInfo, ShapeEdit
from dfkd_ray.text import one_line

MOST_HELD = 4 << 30  # bytes of weights that stay in memory
SAME = ("num_classes", "input_shape", "head", "mean", "std", "pixel_range")  # of a bundle and the teacher
FIELD = "student.weights"


@dataclass(frozen=True)
class Start:
    """What a file holds: state dicts by the keys that lead to them. `info`: the description of a bundle, else None.

    `sha256`: of the file, or the hash of a bundle as a teacher.
    """

    sha256: str
    where: str
    states: Mapping[str, Mapping[str, Tensor]]
    info: BundleInfo | None = None

    @property
    def num_bytes(self) -> int:
        """Bytes of its tensors."""
        return sum(t.numel() * t.element_size() for state in self.states.values() for t in state.values())


HELD: dict[str, Start] = {}  # of this process, by hash; the last used comes last
SEEN: dict[tuple[str, int, int, int], str] = {}  # path, inode, size and time of change of a file → its hash


def pinned(student: StudentConfig, teacher: Teacher) -> StudentConfig:
    """The config with the hash of its file, the name without secrets, and the architecture of a bundle.

    The architecture is null if it is the teacher's own. `ValueError` if there is no such file or bundle, if it is
    damaged, if the config has another hash or architecture, or if the bundle's images are not the teacher's.
    """
    if student.weights is None:
        return student
    start = held(student)
    changes: dict[str, Any] = {"weights": storage.public_name(student.weights), "weights_sha256": start.sha256}
    if start.info is not None:
        check_same(start.info, teacher.info, start.where)
        own, named = structure_of(start.info), (student.architecture, student.arguments)
        is_teachers = own == structure_of(teacher.info) and start.info.shape_edits == teacher.info.shape_edits
        if named not in ((None, {}), own):
            raise ValueError(
                f"{FIELD}: {start.where} is a bundle of {one_line(own[0], 60)}, which names its own architecture and "
                "arguments; leave out student.architecture and student.arguments"
            )
        own = (None, {}) if is_teachers else own
        changes |= {"architecture": own[0], "arguments": own[1]}
    return student.model_copy(update=changes)


def structure_of(info: BundleInfo) -> tuple[str | None, dict[str, Any]]:
    """Architecture and arguments of a description."""
    return info.architecture, info.arguments


def check_same(own: BundleInfo, teacher: BundleInfo, where: str) -> None:
    """`ValueError` if a bundle takes other images than the teacher, or has other classes."""
    for name in SAME:
        if getattr(own, name) != getattr(teacher, name):
            given, wanted = (one_line(getattr(info, name), 60) for info in (own, teacher))
            raise ValueError(f"{FIELD}: {where} has {name} {given}, the teacher {wanted}; they must be the same")


def held(student: StudentConfig) -> Start:
    """What a config's file holds; read unless its content is in memory. `ValueError` if it has another hash."""
    assert student.weights is not None
    wanted = student.weights_sha256
    start = HELD.pop(wanted, None) if wanted else None
    start = read(student.weights) if start is None else start
    if wanted not in (None, start.sha256):
        raise ValueError(
            f"{FIELD}: {start.where} has SHA-256 {start.sha256[:12]}…, and student.weights_sha256 is "
            f"{one_line(wanted, 12)}…: the file has changed"
        )
    hold(start)
    return start


def hold(start: Start) -> None:
    """Keep weights in this process, and forget those that were not used for longest if they are too many."""
    HELD.pop(start.sha256, None)
    HELD[start.sha256] = start
    while len(HELD) > 1 and sum(each.num_bytes for each in HELD.values()) > MOST_HELD:
        del HELD[next(iter(HELD))]


def read(name: str) -> Start:
    """Read a file or a bundle. `ValueError` (one line, with the field's name) if it cannot be."""
    shown = one_line(storage.without_secrets(name), 120)
    try:
        if "://" in name or Path(name).is_dir() or (bundles.BUNDLED / name).is_dir():
            folder = bundles.locate(name)
            info = bundles.read_info(folder)
            known = HELD.get(bundles.teacher_hash(info))
            states = {"": bundles.read_weights(folder, info)} if known is None or known.info != info else known.states
            return Start(bundles.teacher_hash(info), shown, states, info)
        found = untrusted.plain_file(Path(name), shown)
        if found is None:
            raise ValueError(
                f"{shown}: no such file or bundle; expected a .safetensors or .pt file, or a bundle's folder"
            )
        key = (str(Path(name).absolute()), found.st_ino, found.st_size, found.st_mtime_ns)
        known = HELD.get(SEEN.get(key, ""))
        if known is not None:
            return Start(known.sha256, shown, known.states)
        SEEN[key] = bundles.sha256(Path(name))
        return Start(SEEN[key], shown, weights.read_state_dicts(Path(name)))
    except ValueError as error:
        raise ValueError(f"{FIELD}: {error}") from None


def network_of(student: StudentConfig, teacher: Teacher) -> tuple[nn.Module, tuple[str, ...]]:
    """The network of a config with the weights of its file, on the CPU; and what the user should know of them.

    The caller has checked that its code is trusted. `ValueError` if the weights do not fit it or are not finite.
    """
    start = held(student)
    info, others = description_of(student, teacher, start), ()
    try:
        if start.info is not None:
            network = weights.filled(info, start.states[""], start.where)
        elif info.architecture == IN_MEMORY:
            network = deepcopy(teacher.network)
            found = matching.match(network, start.states, start.where, student.weights_key)
            weights.load_state(network, found.state, start.where)
            others = found.others
        else:
            network, found = matching.from_states(info, start.states, start.where, student.weights_key)
            others = found.others
        weights.check_values(network, start.where)
    except ValueError as error:
        hint = str(error).replace("`weights_key=", "`student.weights_key=")
        raise ValueError(f"{FIELD}: {hint}") from None
    others = ", ".join(one_line(place, 60) for place in others)
    said = (f"{FIELD} also holds averages of its weights ({others}); the plain ones are taken",) if others else ()
    return network, said


def description_of(student: StudentConfig, teacher: Teacher, start: Start) -> BundleInfo:
    """The teacher's description with the student's architecture, as far as its network depends on it."""
    if start.info is not None:
        return start.info
    if student.architecture is None:
        return teacher.info
    changes = {"architecture": student.architecture, "arguments": student.arguments, "shape_edits": ()}
    return teacher.info.model_copy(update=changes)


def edits_of(student: StudentConfig, teacher: Teacher) -> tuple[ShapeEdit, ...]:
    """The channels that a student's architecture keeps before the trial removes any."""
    if student.weights is not None:
        return description_of(student, teacher, held(student)).shape_edits
    return teacher.info.shape_edits if student.architecture is None else ()


def to_arrays(start: Start) -> dict[str, Any]:
    """Weights as plain data and numpy arrays, to send them to other processes. Tensors that no network takes are left
    out: sparse and quantised ones, and those without values.
    """
    states = {}
    for key, state in start.states.items():
        plain = {
            name: tensor
            for name, tensor in state.items()
            if tensor.layout == torch.strided and not (tensor.is_quantized or tensor.is_meta)
        }
        states[key] = np.frombuffer(bundles.safetensors_bytes(plain), np.uint8)
    info = None if start.info is None else start.info.model_dump(mode="json")
    return {"sha256": start.sha256, "where": start.where, "states": states, "info": info}


def from_arrays(data: Mapping[str, Any]) -> Start:
    """The inverse of `to_arrays`."""
    states = {key: untrusted.read_safetensors(raw.tobytes(), data["where"]) for key, raw in data["states"].items()}
    info = None if data["info"] is None else untrusted.validated(BundleInfo, data["info"], data["where"])
    return Start(data["sha256"], data["where"], states, info)
