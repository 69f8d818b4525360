"""The rung after distillation: the student as an ONNX file with int8 weights and activations, as it is deployed.

The file is written, calibrated on the trial's synthetic images, and measured by running it in ONNX Runtime on the CPU.
Where int8 costs too much, a copy of the student is distilled through fake quantisation (`exporting.simulated`), and
written again; the file nearer to the teacher is kept. The student itself is not changed.
"""

import logging
import time
from copy import deepcopy
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import nn

from dfkd_ray import devices, distillation, exporting, ladder
from dfkd_ray.batches import mix_seed
from dfkd_ray.bundles import Teacher
from dfkd_ray.compression import pruning
from dfkd_ray.config import TrialConfig
from dfkd_ray.devices import Runtime
from dfkd_ray.distillation import Pool
from dfkd_ray.exporting import comparison, images, int8, metadata, onnx_files, torch_files
from dfkd_ray.exporting.onnx_files import Written
from dfkd_ray.heads import HEADS
from dfkd_ray.storage import without_secrets
from dfkd_ray.text import one_line
from dfkd_ray.trial.identity import reason_of
from dfkd_ray.trial.rungs import Rungs

log = logging.getLogger(__name__)
CPU = torch.device("cpu")
NUM_CHECKED = 32  # reference images on which the float32 file has to give the student's logits
BATCH = 100  # images of a run of the file
# What int8 may cost without a warning: accuracy on the test set, or agreement on the reference set.
MOST_LOST, MOST_DISAGREEMENT = 0.01, 0.05
CAN_BE_WRITTEN: set[tuple[str, str]] = set()  # (teacher's hash, student) of this process: trying takes seconds


def check(config: TrialConfig, teacher: Teacher, student: nn.Module) -> None:
    """`ValueError` if int8 is wanted and ONNX's packages are missing, or the student cannot be written as ONNX."""
    if not config.quantisation.int8:
        return
    exporting.check_installed("quantisation.int8")
    own = (teacher.hash, config.student.model_dump_json())
    if own not in CAN_BE_WRITTEN:
        with exporting.quiet():
            try:
                onnx_files.converted(deepcopy(student).cpu().eval(), teacher.info.input_shape)
            except ValueError as error:
                raise ValueError(f"quantisation.int8: {error}") from error
        CAN_BE_WRITTEN.add(own)


def quantise(student: Teacher, config: TrialConfig, teacher: nn.Module, pool: Pool, rungs: Rungs) -> Written | None:
    """Write and measure a student in int8, into the columns of the rungs' row. Returns the files.

    `student`: on the CPU, with the description of its bundle; `teacher`: the network that it was distilled from. If the
    student cannot be quantised, the columns are null, the row's warnings say why, and there is no file.
    """
    start, row = time.perf_counter(), rungs.row
    rungs.report("quantising", 0, 1, {})
    try:
        with rungs.reference.runtime.numerics(), exporting.quiet():
            files, columns, warned = measured(student, config, teacher, pool, rungs)
    except OSError:  # a full disk: the trial resumes
        raise
    except Exception as error:  # the student is there, and worth keeping
        log.exception("trial %s: int8", row.get("trial_id"))
        rungs.leave_out(ladder.QUANTISED)
        warn(row, f"no int8 file: {said(error)}")
        return None
    row |= columns
    row["quantisation_wall_s"] = time.perf_counter() - start
    for text in warned:
        warn(row, text)
    return files


def said(error: Exception) -> str:
    """An error for a row's warnings."""
    return one_line(without_secrets(reason_of(error)), 200)


def warn(row: dict[str, Any], text: str) -> None:
    """Add a warning to a row."""
    row["warnings"] = "; ".join(filter(None, (row.get("warnings"), text)))


def measured(
    student: Teacher, config: TrialConfig, teacher: nn.Module, pool: Pool, rungs: Rungs
) -> tuple[Written, dict[str, Any], list[str]]:
    """The files, the row's columns about the int8 one, and warnings."""
    settings, reference = config.quantisation, rungs.reference
    compared = images.normalised(student, reference.images)
    calibration = images.normalised(student, pool.images[: settings.num_images])

    def distance(model: bytes) -> tuple[float, float]:
        return reference.distance(torch.from_numpy(logits_of(model, compared)))

    files, steps, warned = written(student, calibration, compared), 0, []
    float_agreement, float_kl = distance(files.float32)
    agreement, kl = distance(files.int8)
    if settings.distil_above is not None and kl - float_kl > settings.distil_above:
        try:
            tuned = distilled(student, files, config, teacher, pool, rungs)
            again = written(tuned, calibration, compared)
            new_agreement, new_kl = distance(again.int8)
            if new_kl < kl:
                files, agreement, kl, steps = again, new_agreement, new_kl, settings.num_steps
        except Exception as error:  # the file from before it is there
            log.exception("trial %s: distillation through fake quantisation", rungs.row.get("trial_id"))
            warned.append(f"no distillation through fake quantisation: {said(error)}")
    rung = ladder.QUANTISED
    columns = {rung.accuracy: None, str(rung.agreement): agreement, "quantised_kl": kl, "int8_steps": steps}
    if rungs.test is not None:
        pairs = ((batch, images.normalised(student, batch.images)) for batch in rungs.test)
        columns[rung.accuracy] = comparison.accuracy(onnx_files.run_of(files.int8), pairs, HEADS[student.info.head])
    # With steps the file has other weights than those that it names.
    about = metadata.texts(student, format="onnx", precision="int8", opset=onnx_files.OPSET, int8_steps=steps)
    float32 = onnx_files.files(files.float32, {**about, "precision": "float32"})[".onnx"]
    files = Written(float32, onnx_files.files(files.int8, about)[".onnx"])
    columns |= {"int8_file_bytes": len(files.int8), "float_file_bytes": len(files.float32)}
    lost = lost_by_int8(rungs.row, columns, float_agreement)
    return files, columns, [*warned, *([lost] if lost else [])]


def written(student: Teacher, calibration: np.ndarray, compared: np.ndarray) -> Written:
    """A student's files. `ValueError` with the reason if it cannot be written.

    `FloatingPointError` if the float32 file does not give the student's logits on the first of the compared images.
    """
    model = onnx_files.converted(student.network, student.info.input_shape)
    checked = compared[:NUM_CHECKED]
    expected = torch_files.runs(student.network)(checked.copy())
    comparison.compared(onnx_files.run_of(model), checked, expected, HEADS[student.info.head], "float32")
    return Written(model, int8.quantised(model, calibration))


def logits_of(model: bytes, given: np.ndarray) -> np.ndarray:
    """Float32 logits of normalised images. `FloatingPointError` if one is not a finite number."""
    logits = comparison.in_batches(onnx_files.run_of(model), given, (BATCH,))
    if not np.isfinite(logits).all():
        raise FloatingPointError("the file gives logits that are not finite numbers")
    return logits


def lost_by_int8(row: dict[str, Any], columns: dict[str, Any], float_agreement: float) -> str | None:
    """The warning of a file that is much worse than the student; None if it is not."""
    before, after = row.get(ladder.RECOVERED.accuracy), columns.get(ladder.QUANTISED.accuracy)
    if before is not None and after is not None:
        what, lost, most = "of test accuracy", before - after, MOST_LOST
    else:
        what, most = "of agreement with the teacher", MOST_DISAGREEMENT
        lost = float_agreement - columns[str(ladder.QUANTISED.agreement)]
    if lost <= most:
        return None
    return (
        f"int8 costs {100 * lost:.1f} points {what} (aim: at most {100 * most:g}): raise quantisation.num_images, or "
        "set quantisation.distil_above"
    )


def distilled(
    student: Teacher, files: Written, config: TrialConfig, teacher: nn.Module, pool: Pool, rungs: Rungs
) -> Teacher:
    """A copy of a student, distilled through the fake quantisation of its int8 file; on the CPU, in float32.

    BatchNorm statistics and the zeros of pruned weights stay. `ValueError` if the file cannot be simulated.
    """
    from dfkd_ray.exporting import simulated

    settings, head = config.quantisation, rungs.reference.head
    kd = config.distillation.model_copy(
        update={"num_steps": settings.num_steps, "learning_rate": settings.learning_rate}
    )
    runtime = Runtime(CPU, rungs.reference.runtime.space, num_threads=kd.num_threads)
    copy = replace(student, network=deepcopy(student.network).requires_grad_(True))
    network, beside = copy.network, deepcopy(teacher).cpu()
    run = simulated.simulation(network, student.info.input_shape, files.float32, files.int8, pool_images(student, pool))
    masks = {name: weight.detach() != 0 for name, weight in pruning.prunable(network).items()}
    optimiser = devices.SGD(
        distillation.decay_groups(network, kd.weight_decay), lr=kd.learning_rate, momentum=kd.momentum
    )
    for step in range(kd.num_steps):
        rows = distillation.rows_of(kd, len(pool.labels), step)
        generator = torch.Generator().manual_seed(mix_seed(kd.seed, 5, step))
        batch = distillation.augmented(pool, rows, kd, runtime, generator)[0]
        with torch.no_grad():
            wanted = beside(batch).float()
        loss = head.kl(run(batch), wanted, kd.temperature)
        if not torch.isfinite(loss):
            raise ValueError(f"its loss is not finite at step {step}")
        distillation.update(network, optimiser, loss, masks, kd, step)
        rungs.report("distilling int8", step + 1, kd.num_steps, {"kl": float(loss.detach())})
    network.requires_grad_(False).eval()
    return copy


def pool_images(student: Teacher, pool: Pool) -> np.ndarray:
    """A few normalised images."""
    return images.normalised(student, pool.images[:4])
