"""Shadow teachers of a privacy audit, their students, and the scores of audited images under them, in files."""

import logging
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn

from dfkd_ray import bundles, checkpoints, devices, evaluation, features, sweep, trial, untrusted
from dfkd_ray.batches import Batch, mix_seed
from dfkd_ray.bench import membership
from dfkd_ray.bench.audit import STUDENTS, Audit, name_of, real_images_wanted
from dfkd_ray.bundles import Teacher
from dfkd_ray.config import RealConfig, TrialConfig, synthesis_key
from dfkd_ray.devices import Runtime
from dfkd_ray.image_sources import gather
from dfkd_ray.records import finishing, fitting
from dfkd_ray.storage import Folder

log = logging.getLogger(__name__)
TEACHERS, TRAININGS, SWEEP, CACHE, SCORES = "teachers", "training", "sweep", "cache", "scores"  # folders
SHIFT = 2  # pixels of shifted queries, the largest shift in training


def teacher_of(audit: Audit, index: int, out: Folder) -> Teacher:
    """A shadow teacher: its bundle, or trained now, with its activation records where an arm needs them."""
    place, config = out / TEACHERS / name_of(index), audit.config
    if not bundles.is_bundle(place):
        settings = config.training.model_copy(update={"seed": config.training.seed + index})
        members = audit.members(index)
        training = out / TRAININGS / name_of(index)
        training.path.mkdir(parents=True, exist_ok=True)
        info, network = audit.source.train(settings, audit.rows[members], audit.labels[members], training.path)
        # Without the data set's name: a part of it was not trained on, and some labels were changed.
        notes = {"shadow": {"index": index, "audit": audit.hash}}
        info = info.model_copy(update={"dataset": None, "notes": info.notes | notes})
        bundles.save(place, info, network.state_dict())
        training.clear(lambda name: name == checkpoints.FILE)
    teacher = bundles.load(place)
    if teacher.info.notes.get("shadow") != {"index": index, "audit": audit.hash}:
        raise ValueError(f"{place}: it is the teacher of another audit; give another folder")
    if "records" in config.arms and config.records.record not in teacher.record_kinds():
        save_record(audit, index, teacher)
    return teacher


def save_record(audit: Audit, index: int, teacher: Teacher) -> None:
    """Record a teacher's activations on its half, into its bundle."""
    members, kind = audit.members(index), audit.config.records.record

    def read(chosen: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(audit.source.read(audit.rows[chosen.numpy()])))

    labels = torch.from_numpy(audit.labels)
    plan = fitting.plan(teacher, audit.labels, members, [kind])
    (shard,) = fitting.shards(read, labels, members, 1)
    totals = fitting.fit(plan, teacher.network, shard, audit.config.training.num_threads)
    (record,) = finishing.finish(plan, totals, teacher)
    assert teacher.folder is not None
    bundles.save_record(teacher.folder, record)


def jobs_of(audit: Audit, teachers: Sequence[Teacher]) -> dict[tuple[str, int], sweep.Job]:
    """(arm, shadow) → trial, of all students."""
    wanted = [(arm, index) for arm in STUDENTS if arm in audit.config.arms for index in range(len(teachers))]
    found = {}
    for arm, index in wanted:
        (job,) = sweep.plan([audit.trial_of(arm, index)], lambda _name, index=index: teachers[index])
        found[arm, index] = job
    return found


def real_source(audit: Audit, teacher: Teacher, settings: RealConfig) -> Callable[[int], Batch]:
    """Real images of a teacher's own half, in a seeded order; it holds no more of them than a trial takes."""
    index = teacher.info.notes["shadow"]["index"]
    order = np.random.default_rng(mix_seed(settings.seed, 0x4EA1, index)).permutation(audit.members(index))
    chosen = order[: real_images_wanted(audit.config)]
    key = synthesis_key(teacher.hash, settings, f"real:{audit.hash}")
    return partial(real_batch, audit.source.read(audit.rows[chosen]), audit.labels[chosen], key, settings.batch_size)


def real_batch(images: np.ndarray, labels: np.ndarray, key: str, size: int, index: int) -> Batch:
    """Batch `index` of these images."""
    own = slice(index * size, (index + 1) * size)
    return Batch(index, images[own], labels[own], key)


def queries(images: np.ndarray, num: int) -> list[np.ndarray]:
    """The images (n, channels, height, width) and augmented copies: flipped, shifted over black in four directions."""
    found = [images, images[:, :, :, ::-1]]
    padded = np.pad(images, ((0, 0), (0, 0), (SHIFT, SHIFT), (SHIFT, SHIFT)))
    height, width = images.shape[2:]
    for down, right in ((0, SHIFT), (2 * SHIFT, SHIFT), (SHIFT, 0), (SHIFT, 2 * SHIFT)):
        found.append(padded[:, :, down : down + height, right : right + width])
    return [np.ascontiguousarray(query) for query in found[:num]]


def logits_scores(network: nn.Module, audit: Audit, runtime: Runtime) -> np.ndarray:
    """phi of the attacked images (examples, queries): their log odds."""
    labels, found = audit.labels[: audit.num_attacked], []
    network = trial.on_device(network, runtime.device)
    with runtime.numerics():
        for query in queries(audit.images, audit.config.num_queries):
            logits = evaluation.logits(network, query, runtime).cpu().numpy()
            found.append(membership.log_odds(logits, labels))
    return np.stack(found, axis=1)


def distance_scores(teacher: Teacher, synthetic: np.ndarray, audit: Audit, runtime: Runtime) -> np.ndarray:
    """phi of the attacked images (examples, queries): -log of the distance to the nearest synthetic image.

    Distances are Euclidean, between the inputs of the teacher's last Linear layer.
    """
    network = trial.on_device(teacher.network, runtime.device)

    def features_of(images: np.ndarray) -> torch.Tensor:
        with features.last_linear_inputs(network) as seen:
            evaluation.logits(network, images, runtime)
        return torch.cat(seen).double()

    with runtime.numerics():
        made = features_of(synthetic)
        nearest = [
            torch.cat([torch.cdist(part, made).amin(dim=1) for part in features_of(query).split(500)])
            for query in queries(audit.images, audit.config.num_queries)
        ]
    return -np.log(torch.stack(nearest, dim=1).cpu().numpy().clip(min=1e-12))


def synthetic_images(teacher: Teacher, config: TrialConfig, out: Folder) -> tuple[np.ndarray, str]:
    """The images that the trial was given, from its cache or made again, and their key."""
    device = devices.resolve(config.device)
    wanted = trial.Round(teacher, config.synthesis, device, student=config.student.structure)
    num_batches = trial.batches_wanted(config, reestimates=True)[1]
    images = trial.Local((out / CACHE).uri)
    found = gather(images, wanted, num_batches, "synthesising", lambda _stage, _done, _total, _shown: None)
    return found.pool.images, found.key


def scores_of(audit: Audit, arm: str, index: int, teacher: Teacher, job: sweep.Job | None, out: Folder) -> np.ndarray:
    """phi of an arm and shadow, float64 (attacked images, queries): from its file, or computed and written there."""
    space, num_threads = teacher.info.space, audit.config.training.num_threads
    runtime = Runtime(devices.resolve(audit.config.trial.device), space, "float32", num_threads)
    network, of = teacher.network, teacher.hash
    if job is not None:
        student = bundles.load(out / SWEEP / "students" / job.id)
        network, of = student.network, student.hash
    name, plain = f"{arm}-{index:03d}.safetensors", {"audit": audit.hash, "network": of}
    found = read_scores(out / SCORES, name, plain, (audit.num_attacked, audit.config.num_queries))
    if found is not None:
        return found
    if arm == "nearest":
        config = trial.pinned(audit.trial_of("recovered", index), teacher)
        made, _ = synthetic_images(teacher, config, out)
        phi = distance_scores(teacher, made, audit, runtime)
    else:
        phi = logits_scores(network, audit, runtime)
    checkpoints.write_file(out / SCORES, name, {"phi": torch.from_numpy(phi)}, plain)
    return phi


def read_scores(folder: Folder, name: str, plain: dict[str, Any], shape: tuple[int, int]) -> np.ndarray | None:
    """The scores in a file; None if it is not there. Damaged ones, or those of other networks, are logged and None."""
    try:
        found = checkpoints.read_file(folder, name, untrusted.free_bytes() // 2)
        if found is None:
            return None
        phi = found[1]["phi"]
        if found[0] != plain or tuple(phi.shape) != shape or phi.dtype != torch.float64 or not phi.isfinite().all():
            raise ValueError("they are of another network or audit")
    except (ValueError, KeyError) as error:
        log.warning("%s: the scores are not used and are made again: %s", folder / name, error)
        return None
    return phi.numpy()
