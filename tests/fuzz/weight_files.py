"""Generator of weight files: whatever people save with torch, and what is made to harm."""

import io
import os
import pickle
import random
import zipfile
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from fuzz.bundle_files import imported, tensors_of
from fuzz.damage import MARKS, damaged, deep
from fuzz.fuzzing import Case, Desk


class Planted:
    """Makes a file where it is unpickled."""

    def __reduce__(self) -> tuple:
        return os.system, ("touch pwned",)


def torch_files() -> list[Callable[[random.Random, dict[str, torch.Tensor]], Any]]:
    """What people save with `torch.save`."""
    network = torch.nn.Linear(2, 2)
    adam = torch.optim.Adam(network.parameters())
    return [
        lambda rng, state: state,
        lambda rng, state: {"state_dict": state, "epoch": 3},
        lambda rng, state: {"model": state, "optimizer": adam.state_dict()},
        lambda rng, state: adam.state_dict(),
        lambda rng, state: network,
        lambda rng, state: Planted(),
        lambda rng, state: {**state, "x": Planted()},
        lambda rng, state: list(state.values()),
        lambda rng, state: torch.zeros(3),
        lambda rng, state: {},
        lambda rng, state: None,
        lambda rng, state: {"state_dict": {}},
        lambda rng, state: {"state_dict": 3},
        lambda rng, state: {"state_dict": {"a": 1}},
        lambda rng, state: {1: torch.zeros(1)},
        lambda rng, state: {**state, "": torch.zeros(1)},
        lambda rng, state: {f"module.{name}": value for name, value in state.items()},
        lambda rng, state: {f"module.{name}": value for name, value in state.items()} | state,
        lambda rng, state: tensors_of(rng, state),
        lambda rng, state: tensors_of(rng, state),
        lambda rng, state: {name: value.to_sparse() for name, value in state.items()},
        lambda rng, state: {
            name: torch.quantize_per_tensor(v.float(), 0.1, 0, torch.qint8) for name, v in state.items()
        },
        lambda rng, state: {name: value.to("meta") for name, value in state.items()},
        lambda rng, state: {name: value.to(torch.complex64) for name, value in state.items()},
        lambda rng, state: {name: value.expand(2, *value.shape) for name, value in state.items()},
        lambda rng, state: {name: torch.zeros(1).expand(10**6, 10**6) for name in state},
        lambda rng, state: {name: torch.nn.Parameter(value.float()) for name, value in state.items()},
        lambda rng, state: {**state, "[/b]\x1b[31m": torch.zeros(1)},
        lambda rng, state: {**state, rng.choice(MARKS): torch.zeros(1)},
        lambda rng, state: deep(200, dict),
        lambda rng, state: {name: value.numpy() for name, value in state.items()},
    ]


def zip_bomb() -> bytes:
    """A `.pt` of a few megabytes whose one tensor's bytes unpack to gigabytes; packed loosely, which is fast."""
    buffer, made = io.BytesIO(), io.BytesIO()
    torch.save({"x": torch.zeros(4)}, buffer)
    with zipfile.ZipFile(buffer) as old, zipfile.ZipFile(made, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as new:
        for info in old.infolist():
            if "/data/" in info.filename:
                with new.open(info.filename, "w", force_zip64=True) as file:
                    for _ in range(3 << 10 >> 4):
                        file.write(bytes(16 << 20))
            else:
                new.writestr(info.filename, old.read(info.filename))
    return made.getvalue()


BOMBS: dict[str, bytes] = {}


def bomb(name: str, make: Callable[[], bytes]) -> bytes:
    """What takes seconds to make, made once."""
    if name not in BOMBS:
        BOMBS[name] = make()
    return BOMBS[name]


def weight_files(rng: random.Random, desk: Desk) -> Case:
    """`.pt` files of every kind, for `teacher import`."""
    from safetensors.torch import load_file

    state = load_file(desk.templates / "teacher" / "weights.safetensors")
    name = rng.choice(
        ["weights.pt"] * 6 + ["weights.pth", "weights.bin", "weights.ckpt", "weights.PT", "weights.npz", "w"]
    )
    kind = rng.choice(
        ["saved"] * 12 + ["legacy", "legacy", "damaged", "damaged", "damaged", "pickle", "other", "bomb", "odd"]
    )
    buffer = io.BytesIO()
    if kind == "odd":
        name = rng.choice(
            ["foreign", "/dev/zero", "nothing.pt", "loop.pt", "pipe.pt", "", "folder.pt", "x" * 4000 + ".pt"]
        )
        os.symlink("loop.pt", desk.work / "loop.pt")
        os.mkfifo(desk.work / "pipe.pt")
        (desk.work / "folder.pt").mkdir()
        return imported(rng, name)
    if kind == "bomb" and rng.random() < 0.5:
        buffer.write(bomb("zip", zip_bomb))
    elif kind in ("other", "bomb"):
        others = [
            b"",
            rng.randbytes(500),
            b"PK\x03\x04" + rng.randbytes(60),
            b"\x80\x02",
            b"\x80\x05\x95" + b"\xff" * 8,
        ]
        others += [
            b"(" * 100_000,
            b"\x80\x04" + b"]" * 200_000 + b".",
            b"\x80\x04\x8e" + b"\xff" * 8,
            b"cos\nsystem\n(S'x'\ntR.",
        ]
        buffer.write(rng.choice(others))
    elif kind == "pickle":
        buffer.write(pickle.dumps(rng.choice([Planted(), {"a": 1}, state, deep(300), np.zeros(3)])))
    else:
        content = rng.choice(torch_files())(rng, state)
        try:
            torch.save(content, buffer, _use_new_zipfile_serialization=kind != "legacy")
        except (RuntimeError, NotImplementedError):
            torch.save(state, buffer)
    data = buffer.getvalue()
    desk.file(name, damaged(rng, data) if kind == "damaged" else data)
    return imported(rng, name)
