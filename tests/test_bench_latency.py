"""The bench of latency: what is compared with what, and its refusals. Nothing here depends on how fast anything is."""

import itertools
from collections.abc import Iterator
from pathlib import Path

import pytest

from dfkd_ray import bundles, exporting
from dfkd_ray import latency as timing
from dfkd_ray.bench import latency
from dfkd_ray.bench.latency import Measured, Setting
from dfkd_ray.compression import channels
from dfkd_ray.config import PruningConfig
from dfkd_ray.description import WITH_EDITS
from helpers import make_teacher, refusal

FEW = (Setting("PyTorch", 1, 1), Setting("PyTorch", 1, 4))


@pytest.fixture(scope="module")
def pair(tiny_teacher, tmp_path_factory) -> tuple[Path, Path]:
    """A teacher, and the same network with fewer channels."""
    teacher = bundles.load(tiny_teacher)
    config = PruningConfig(structure="channels", sparsity=0.4, importance="magnitude")
    choice = channels.choose(teacher.network, channels.prepare(teacher.network, teacher.info.image_shape), config)
    small = channels.sliced(teacher.network, choice.edits)
    folder = tmp_path_factory.mktemp("small") / "a-student-in-a-folder-with-a-long-name"
    changes = {"schema_version": WITH_EDITS, "shape_edits": choice.edits}
    bundles.save(folder, teacher.info.model_copy(update=changes), small.state_dict())
    return tiny_teacher, folder


def few_settings(with_onnx: bool) -> Iterator[Setting]:
    yield from FEW
    if with_onnx:
        yield Setting("ONNX Runtime", 1, 2)


def test_every_network_is_measured_in_every_setting_against_the_first(pair, run_cli, monkeypatch):
    pytest.importorskip("onnxruntime")
    monkeypatch.setattr(latency, "settings", few_settings)
    monkeypatch.setattr(timing, "LEAST_S", 0.0)
    done = run_cli("bench", "latency", *map(str, pair), "--int8", "--repeats", "3")
    assert done.code == 0, done.err
    lines = done.out.splitlines()
    assert all(len(line) <= 80 for line in lines), max(lines, key=len)
    assert sum(line.rstrip().endswith(")") and " ms" in line for line in lines) == 2 * len(FEW) + 4
    assert sum(" 1.00 x  (1.00 to 1.00)" in line for line in lines) == len(FEW) + 1, done.out  # the teacher itself
    parameters = [int(line.split()[-3].replace(",", "")) for line in lines[1:3]]
    macs = [int(line.split()[-2].replace(",", "")) for line in lines[1:3]]
    assert parameters[0] > parameters[1] > 0 and macs[0] > macs[1] > 0


def test_ratios_are_of_medians_in_alternating_runs(monkeypatch):
    clock = itertools.count()
    seconds = {"teacher": 4.0, "student": 1.0}
    now, order = [0.0], []

    def side(name: str):
        def call() -> None:
            order.append(name)
            now[0] += seconds[name] * (1 + next(clock) % 2)

        return call

    monkeypatch.setattr(timing.time, "perf_counter", lambda: now[0])
    found = timing.compared({name: side(name) for name in seconds}, repeats=4)
    teacher, student = found["teacher"], found["student"]
    each = timing.LEAST_BATCHES
    assert order[-4 * each :] == 2 * ([*["teacher"] * each, *["student"] * each])
    assert teacher.ratio == 1.0 and teacher.low == teacher.high == 1.0
    assert student.ratio == pytest.approx(teacher.seconds / student.seconds) == 4.0, "the fastest batch of a run counts"
    assert student.low <= student.high


def test_a_student_that_is_not_faster_is_named():
    ratios = {"t": (1.0, 1.0), "slow": (1.01, 0.5), "fast": (2.0, 1.0), "faster": (1.2, 3.0)}
    rows = [
        Measured(name, FEW[0], timing.Latency(1.0, ratio, ratio, ratio)) for name in ratios for ratio in ratios[name]
    ]
    assert latency.not_faster(rows, "t") == [
        "not faster than the first in 2 of 2 settings: slow",
        "not faster than the first in 1 of 2 settings: fast",
    ]


def test_long_names_keep_their_ends_and_equal_ones_a_number():
    names = latency.distinct(["runs/first/" + 40 * "x" + "/student", "net", "net"])
    assert names[0].startswith("…") and names[0].endswith("/student") and len(names[0]) < latency.NAME
    assert names[1:] == ["net", "net (2)"]


def test_networks_of_other_images_are_refused(tiny_teacher, tmp_path):
    other = make_teacher(tmp_path / "other", image_shape=(1, 20, 20))
    networks = [bundles.load(tiny_teacher), other]
    refusal(lambda: latency.run(networks), "1x20x20", "1x16x16")


def test_without_onnx_runtime_it_is_left_out_and_int8_is_refused(tiny_teacher, run_cli, monkeypatch):
    monkeypatch.setattr(exporting, "is_installed", lambda name: name != "onnxruntime")
    monkeypatch.setattr(latency, "settings", few_settings)
    monkeypatch.setattr(timing, "LEAST_S", 0.0)
    done = run_cli("bench", "latency", str(tiny_teacher), "--repeats", "3")
    assert done.code == 0 and "ONNX Runtime is left out: onnxruntime not installed" in done.out, done.err
    done = run_cli("bench", "latency", str(tiny_teacher), "--int8")
    assert done.code == 2 and "--int8" in done.err and "dfkd_ray[onnx]" in done.err and len(done.err.splitlines()) == 1
