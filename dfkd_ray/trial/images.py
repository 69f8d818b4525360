"""A trial's images: the sequence of synthesis rounds.

A stationary method has one round without a state: batch i is a function of (teacher, config, i). A method that uses the
student has several rounds. Batch i of round r is a function of (teacher, config, state of round r, i). The state of the
next round is computed from the sum of the batches' contributions, in the order of i. So one or many processes can make
a round, and a killed trial resumes from its last finished round.
"""

import hashlib
import logging
import re
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dfkd_ray import checkpoints, devices, evaluation, synthesis, untrusted
from dfkd_ray.batches import RoundState
from dfkd_ray.bundles import Teacher
from dfkd_ray.config import METHODS, TrialConfig, stable_hash
from dfkd_ray.devices import Runtime
from dfkd_ray.distillation import Pool, Progress
from dfkd_ray.heads import Head
from dfkd_ray.image_sources import Gathered, Images, Round, gather
from dfkd_ray.storage import Folder
from dfkd_ray.synthesis import shapes

log = logging.getLogger(__name__)
ROUND_FILE = re.compile(r"round-\d{6}\.safetensors")
STATE_FILE = "rounds.safetensors"
SHAPES_SEED = 0x313  # of the reference set


class RoundsLostError(Exception):
    """A distillation cannot resume: the images or state of its round are lost. The trial must start again."""


def batches_wanted(config: TrialConfig, reestimates: bool) -> tuple[int, int]:
    """Numbers of batches: those distilled on, and those made (more if BatchNorm is re-estimated on more images)."""
    size = config.synthesis.batch_size
    distilled = -(-config.distillation.num_images // size)
    return distilled, max(distilled, -(-config.bn_num_images // size)) if reestimates else distilled


def synthesis_passes(config: TrialConfig) -> int:
    """Images through the teacher while the trial's images are made, at most, if BatchNorm is re-estimated."""
    settings, row = config.synthesis, METHODS[config.synthesis.method]
    num_rounds = 1 if row.is_stationary else settings.num_rounds
    in_round = -(-batches_wanted(config, reestimates=True)[1] // num_rounds) * settings.batch_size
    return sum(row.passes(settings, number) * in_round for number in range(num_rounds))


def is_own_file(name: str) -> bool:
    """Whether a checkpoint file belongs to the rounds."""
    return name == STATE_FILE or ROUND_FILE.fullmatch(name) is not None


def gather_reference(
    config: TrialConfig, teacher: Teacher, device: torch.device, source: Images, report: Progress
) -> Gathered:
    """The held-out reference images: made with the reference config, with seeds that no training image uses."""
    settings = config.reference.synthesis
    wanted = Round(teacher, settings, device, "reference")
    return gather(source, wanted, -(-config.reference.num_images // settings.batch_size), "reference set", report)


def reference_of(
    config: TrialConfig, network: nn.Module, images: np.ndarray, runtime: Runtime, head: Head
) -> evaluation.Reference:
    """The reference set: the teacher's logits on the held-out images, or on mixtures of them.

    `images`: the stored images that it is made of; the first `reference.num_images` are used.
    """
    compared = images[: config.reference.num_images]
    if config.reference.mixed:
        others = None
        if config.reference.mixed_with == "shapes":
            others = shapes.stored(compared.shape, runtime.space, SHAPES_SEED)
        compared = evaluation.mixtures(compared, runtime.space, others)
    return evaluation.reference(network, compared, runtime, head)


class Rounds:
    """The images that a trial distils on, made round by round.

    Rounds have equal size and begin at equally spaced steps. A step uses the images of its round and of all earlier
    ones. With `lag` 0, round r + 1 uses the student at the end of round r. With `lag` 1, it uses the student at the
    beginning of round r, so its images can be made while the student trains. `folder`: where a trial with several
    rounds stores their images and the last state; None stores nothing. `reestimates`: whether BatchNorm is re-estimated
    on the images of round 0.
    """

    def __init__(
        self,
        config: TrialConfig,
        first: Round,
        source: Images,
        folder: Folder | None,
        report: Progress,
        owner: str,
        reestimates: bool = True,
    ):
        self.first, self.source, self.report, self.owner = first, source, report, owner
        settings, row = config.synthesis, METHODS[config.synthesis.method]
        self.config, self.folder = settings, folder
        self.looks = row.looks_at_student(settings)
        self.num_rounds = 1 if row.is_stationary else settings.num_rounds
        self.lag = 0 if row.is_stationary else settings.lag
        distilled, wanted = batches_wanted(config, reestimates)
        self.num_batches = -(-wanted // self.num_rounds)
        self.num_distilled = -(-distilled // self.num_rounds) * settings.batch_size  # images of a round
        self.starts = [
            round(config.distillation.num_steps * number / self.num_rounds) for number in range(self.num_rounds)
        ]
        self.gathered: list[Gathered] = []
        self.saved: set[int] = set()
        self.joined: tuple[int, Pool] | None = None  # (number of rounds, their images concatenated)
        self.state: RoundState | None = None  # of the last round gathered
        self.next: RoundState | None = None
        self.begins_with, first_state = synthesis.first_round(first.teacher, settings)
        if not row.is_stationary:
            self.next = first_state or RoundState(0)
            self.load()

    def first_pool(self) -> Pool:
        """All images of round 0, which uses no student: for re-estimation, perhaps more than are distilled on."""
        if not self.gathered:
            self.enter()
        return self.gathered[0].pool

    def pool_at(self, step: int, student: nn.Module) -> Pool:
        """The images for a distillation step; `student` is the student before that step."""
        number = max(i for i, start in enumerate(self.starts) if start <= step)
        while len(self.gathered) <= number:
            if self.gathered and self.next is None:
                self.advance(step, len(self.gathered), student)
            self.enter()
        last = len(self.gathered) - 1
        if self.lag and number == last and self.next is None and number + 1 < self.num_rounds:
            self.advance(step, number, student)
            assert self.next is not None
            self.source.prepare(self.round_of(self.next), self.num_batches)
        return self.pool(number + 1)

    def pool(self, num_rounds: int | None = None) -> Pool:
        """The images distilled on of the first `num_rounds` rounds (None: of all gathered so far)."""
        size = self.num_distilled
        pools = [Pool(one.pool.images[:size], one.pool.labels[:size]) for one in self.gathered[:num_rounds]]
        if len(pools) == 1:
            return pools[0]
        if self.joined is None or self.joined[0] != len(pools):
            images, labels = (np.concatenate([getattr(one, name) for one in pools]) for name in ("images", "labels"))
            self.joined = (len(pools), Pool(images, labels))
        return self.joined[1]

    def round_of(self, state: RoundState | None) -> Round:
        """The round that a state belongs to."""
        if state is not None and self.is_plain(state):
            return replace(self.first, config=self.begins_with)
        seen = state is not None and state.student is not None
        return replace(self.first, state=state, owner=self.owner if seen else "")

    def is_plain(self, state: RoundState) -> bool:
        """Whether a state is that of round 0, and its images those of a stationary method."""
        return state.number == 0 and self.begins_with is not self.config

    def enter(self) -> None:
        """Gather the next round."""
        self.state, self.next = self.next, None
        stage = "synthesising" if self.num_rounds == 1 else f"round {len(self.gathered) + 1}/{self.num_rounds}"
        gathered = gather(self.source, self.round_of(self.state), self.num_batches, stage, self.report)
        if self.state is not None and self.is_plain(self.state):
            gathered.total = {"images": gathered.pool.images, "labels": gathered.pool.labels}
        if self.gathered:
            self.gathered[-1].total = {}  # the state of this round has it: a generator with its moments, megabytes
        self.gathered.append(gathered)
        self.save()

    def advance(self, step: int, at_round: int, student: nn.Module) -> None:
        """Compute the state of the next round, with the student as it is at the beginning of round `at_round`.

        `RoundsLostError` if the distillation has resumed after that step.
        """
        if step != self.starts[at_round]:
            raise RoundsLostError(f"step {step}: the state of round {len(self.gathered)} is not there")
        module, last = synthesis.module_of(self.config), self.gathered[-1]
        assert module is not None and self.state is not None
        looked_at = devices.place(deepcopy(student), self.first.device).eval() if self.looks else None
        arrays = module.advance(self.first.teacher, self.config, self.state, last.total, looked_at)
        snapshot = None
        if looked_at is not None:
            snapshot = {name: tensor.cpu().numpy() for name, tensor in looked_at.state_dict().items()}
        self.next = RoundState(self.state.number + 1, arrays, snapshot)
        self.save()

    def save(self) -> None:
        """Write the images of the last round, unless they are written, and then the states."""
        if self.folder is None or self.num_rounds == 1 or self.state is None:
            return
        last = self.gathered[-1]
        if last.number not in self.saved:
            plain = {"key": last.key, "rows": last.rows, "num_found": last.num_found, "sha256": pool_sha256(last.pool)}
            arrays = {"images": last.pool.images, "labels": last.pool.labels}
            checkpoints.write_file(self.folder, round_file(last.number), as_tensors(arrays), plain)
            self.saved.add(last.number)
        arrays = {f"contribution.{name}": array for name, array in last.total.items()}
        plain: dict[str, Any] = {"number": self.state.number}
        for what, state in (("state", self.state), ("next", self.next)):
            if state is not None:
                arrays |= {f"{what}.{name}": array for name, array in state.arrays.items()}
                arrays |= {f"{what}_student.{name}": array for name, array in (state.student or {}).items()}
                plain[what] = {"hash": state.hash, "has_student": state.student is not None}
        checkpoints.write_file(self.folder, STATE_FILE, as_tensors(arrays), plain)

    def load(self) -> None:
        """Resume from the files of an earlier attempt if they are complete and undamaged."""
        if self.folder is None or self.num_rounds == 1:
            return
        try:
            found = self.read_file(STATE_FILE)
            if found is None:
                return
            plain, arrays = found
            number = checkpoints.counter(plain, "number", self.num_rounds - 1)
            state, after = read_state(arrays, plain, "state", number), read_state(arrays, plain, "next", number + 1)
            gathered = [self.read_round(n) for n in range(number + 1)]
            gathered[-1].total = below(arrays, "contribution.")
        except (ValueError, KeyError, TypeError) as error:
            log.warning("%s: the stored rounds are not used and are made again: %s", self.folder, error)
            return
        self.gathered, self.state, self.next, self.saved = gathered, state, after, set(range(number + 1))

    def read_file(self, name: str) -> tuple[dict[str, Any], dict[str, np.ndarray]] | None:
        """Plain data and arrays of a file; None if it does not exist."""
        assert self.folder is not None
        found = checkpoints.read_file(self.folder, name, untrusted.free_bytes() // 2)
        return None if found is None else (found[0], {key: tensor.numpy() for key, tensor in found[1].items()})

    def read_round(self, number: int) -> Gathered:
        """Read a stored round; `ValueError` if it is missing or damaged."""
        found = self.read_file(round_file(number))
        if found is None:
            raise ValueError(f"{round_file(number)} is missing")
        plain, arrays = found
        pool = Pool(arrays["images"], arrays["labels"])
        if pool_sha256(pool) != plain["sha256"]:
            raise ValueError(f"{round_file(number)} is damaged")
        gathered = Gathered(self.num_batches, self.config, self.first.domain, number, plain["key"], pool)
        gathered.rows, gathered.num_found = plain["rows"], plain["num_found"]
        return gathered

    @property
    def key(self) -> str:
        """The key of the images: the round's key, or a hash of the keys of all rounds in order."""
        keys = [one.key for one in self.gathered]
        return keys[0] if len(keys) == 1 else stable_hash(keys)

    @property
    def rows(self) -> list[dict[str, Any]]:
        """Rows of the table `synthesis`, in the order of the images."""
        key = self.key  # a hash of all keys
        return [row | {"synthesis_key": key} for one in self.gathered for row in one.rows]

    @property
    def num_found(self) -> int:
        """The number of batches that were found: in the cache, or made for another trial."""
        return sum(one.num_found for one in self.gathered)


def round_file(number: int) -> str:
    """The file name of a round's images."""
    return f"round-{number:06d}.safetensors"


def pool_sha256(pool: Pool) -> str:
    """SHA-256 of images and labels."""
    sha = hashlib.sha256(np.ascontiguousarray(pool.images).data.cast("B"))
    sha.update(np.ascontiguousarray(pool.labels).data.cast("B"))
    return sha.hexdigest()


def below(arrays: Mapping[str, np.ndarray], prefix: str) -> dict[str, np.ndarray]:
    """The arrays whose names begin with a prefix, without it."""
    return {name.removeprefix(prefix): array for name, array in arrays.items() if name.startswith(prefix)}


def read_state(arrays: Mapping[str, np.ndarray], plain: Mapping[str, Any], what: str, number: int) -> RoundState | None:
    """A stored state; None if there is none. `ValueError` if its hash does not match."""
    if what not in plain:
        return None
    student = below(arrays, f"{what}_student.") if plain[what]["has_student"] else None
    state = RoundState(number, below(arrays, f"{what}."), student)
    if state.hash != plain[what]["hash"]:
        raise ValueError(f"{STATE_FILE} is damaged")
    return state


def as_tensors(arrays: Mapping[str, np.ndarray]) -> dict[str, Tensor]:
    """Arrays as tensors; read-only arrays are copied."""
    return {name: torch.from_numpy(array if array.flags.writeable else array.copy()) for name, array in arrays.items()}
