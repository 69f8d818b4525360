"""The int8 file that a trial has made of its student, copied to another place with a model card.

It is not made again: its speed and loss were measured on these bytes. The accuracies of its card are those of the
trial's row.
"""

from pathlib import Path

from dfkd_ray.bundles import Teacher
from dfkd_ray.exporting import (
    FORMATS,
    Exported,
    card,
    check,
    comparison,
    images,
    metadata,
    origins,
    placing,
    quiet,
    torch_files,
    warning_of,
)
from dfkd_ray.heads import HEADS
from dfkd_ray.ladder import QUANTISED, RECOVERED
from dfkd_ray.text import number_in

TEST_SET = {"name": "test_set", "num_images": "num_test_images", "sha256": "test_sha256"}  # columns


def copied(student: Teacher, int8: bytes, path: Path | str) -> Exported:
    """Write the int8 ONNX file of a student, and its card. The row of its trial is found beside it.

    It is run and compared with the student, to be stated: no difference is an error here, as the trial has measured
    what int8 costs. `ValueError` without a row, if the file names other weights, or if the place is taken;
    `FloatingPointError` if its logits are not finite numbers.
    """
    path, kind, files = check(path, "onnx", "int8"), FORMATS["onnx"], {".onnx": int8}
    row = origins.row_of(student)
    if row is None:
        raise ValueError(
            f"{student.name}: the row of its trial is not beside it; without it nothing is known of its int8 file"
        )
    made = images.made(student, False)
    with quiet(), placing.beside(path, kind, files) as written:
        own, named = student.info.weights_sha256, metadata.read(kind.read(written)).get("weights_sha256")
        if named != own:
            raise ValueError(f"{path}: the int8 file is of weights {str(named)[:12]}…, the student's are {own[:12]}…")
        expected = torch_files.runs(student.network)(made.compared.copy())
        compared = comparison.compared(kind.open(written), made.compared, expected, HEADS[student.info.head], None)
        done = Exported(
            path=path,
            files=(path,),
            card=placing.card_place(path, kind),
            format="onnx",
            precision="int8",
            size_bytes=len(int8),
            float32_bytes=int(row["float_file_bytes"]),
            dense_bytes=sum(4 * tensor.numel() for tensor in student.network.state_dict().values()),
            images=made.source,
            comparison=compared,
            accuracy=number_in(row, QUANTISED.accuracy),
            network_accuracy=number_in(row, RECOVERED.accuracy),
            test_set=None if row.get("test_set") is None else {name: row[of] for name, of in TEST_SET.items()},
            warning=warning_of(compared, True),
            is_of_trial=True,
        )
        placing.add(written, done.card, card.text(done, student, row).encode())
    return done
