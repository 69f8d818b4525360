"""int8 by static quantisation with ONNX Runtime: weights per output channel, activations per tensor.

q = clamp(round(x / s) + z). Weights: int8, symmetric, s = max|w| / 127 of an output channel. Activations: uint8, their
range from the smallest to the largest value over the calibration images. The file has pairs of QuantizeLinear and
DequantizeLinear (QDQ) around float32 operators, which a runtime fuses into its int8 kernels.
"""

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from dfkd_ray.exporting.metadata import INPUT
from dfkd_ray.untrusted import reason

BATCH = 32  # images of a calibration batch: the runtime keeps all activations of one


def quantised(model: bytes, calibration: np.ndarray) -> bytes:
    """An ONNX model with int8 weights and uint8 activations. `ValueError` with the reason if it cannot be quantised.

    `calibration`: normalised float32 images (n, *input_shape).
    """
    from onnxruntime import quantization
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(quantization.CalibrationDataReader):
        """Hands out the calibration images in batches."""

        def __init__(self) -> None:
            self.batches = batches(calibration)

        def get_next(self) -> Any:
            """The next batch; None after the last."""
            return next(self.batches, None)

    with tempfile.TemporaryDirectory(prefix="dfkd_ray-export-") as folder:
        plain, prepared, done = (Path(folder) / f"{name}.onnx" for name in ("plain", "prepared", "done"))
        plain.write_bytes(model)
        try:
            quant_pre_process(plain, prepared, skip_symbolic_shape=True)  # it knows few operators
            quantization.quantize_static(
                prepared,
                done,
                Reader(),
                quant_format=quantization.QuantFormat.QDQ,
                per_channel=True,
                activation_type=quantization.QuantType.QUInt8,
                weight_type=quantization.QuantType.QInt8,
                calibrate_method=quantization.CalibrationMethod.MinMax,
            )
        except OSError:
            raise
        except Exception as error:
            raise ValueError(f"the network cannot be quantised: ONNX Runtime says {reason(error, 200)}") from error
        return done.read_bytes()


def batches(images: np.ndarray) -> Iterator[dict[str, np.ndarray]]:
    """The calibration images as a model's inputs."""
    for start in range(0, len(images), BATCH):
        yield {INPUT: images[start : start + BATCH]}
