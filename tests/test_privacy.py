"""The privacy audit: a killed one ends with the numbers of an undisturbed one; whole runs; what it refuses."""

import json
import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import torch

from dfkd_ray import config, devices, storage, sweep, teachers, trial
from dfkd_ray.bench import privacy, rates, shadows
from dfkd_ray.bench.audit import Audit, AuditConfig, Source, real_config
from dfkd_ray.data import LabelledImages
from helpers import TINY_TRIAL, refusal, set_words, write_idx_set

TRAINING = {"architecture": "resnet8", "arguments": {"width_multiplier": 0.25}, "dataset": "made", "device": "cpu"}
TINY: dict[str, Any] = {
    "num_shadows": 6,
    "num_images": 60,
    "num_audited": 40,
    "num_canaries": 10,
    "num_queries": 3,
    "fprs": (0.1, 0.03),
    "arms": ("teacher", "nearest"),
    "training": TRAINING | {"num_epochs": 2, "batch_size": 16, "num_threads": 1},
    "trial": TINY_TRIAL | {"teacher": "shadow"},
    "records": {"record": "top", "batch_size": 8, "num_steps": 1, "num_threads": 1},
}


def settings(**fields: Any) -> AuditConfig:
    """The tiny audit, with dotted fields that differ."""
    return config.validate(AuditConfig, config.with_overrides(TINY, fields), "audit")


@pytest.fixture(scope="module")
def source() -> Source:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(90) % 3
    images = (torch.randint(0, 60, (90, 1, 16, 16), generator=generator) + labels.view(-1, 1, 1, 1) * 60).byte()
    made = LabelledImages("made", lambda rows: images[rows], labels, ("a", "b", "c"), (1, 16, 16))

    def train(settings, rows, labels, checkpoint):
        chosen = torch.from_numpy(rows)
        part = replace(made, read=lambda own: images[chosen[own]], labels=torch.from_numpy(labels))
        return teachers.train(settings, part, checkpoint=checkpoint)

    return Source(lambda rows: images[torch.from_numpy(rows)].numpy(), labels.numpy(), 3, train)


def table(folder: Path) -> pd.DataFrame:
    return pd.read_parquet(folder / privacy.TABLE)


@pytest.fixture(scope="module")
def undisturbed(source, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("audits") / "undisturbed"
    privacy.run(settings(), source, folder)
    return folder


class Killed(BaseException):
    """As by a signal: nothing catches it."""


def dying(function: Callable[..., Any], at: int) -> Callable[..., Any]:
    """The function, until its call number `at` dies instead."""
    calls = iter(range(at))

    def call(*args, **kwargs):
        if next(calls, None) is None:
            raise Killed
        return function(*args, **kwargs)

    return call


def test_an_audit_killed_in_training_and_in_scoring_ends_with_the_same_numbers(source, undisturbed, tmp_path, capsys):
    folder = tmp_path / "killed"
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):  # in the second epoch of the fourth teacher
        patch.setattr(teachers, "write_checkpoint", dying(teachers.write_checkpoint, 3 * 2 + 1))
        privacy.run(settings(), source, folder)
    assert len(list((folder / shadows.TEACHERS).iterdir())) == 3
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        patch.setattr(shadows, "distance_scores", dying(shadows.distance_scores, 2))
        privacy.run(settings(), source, folder)
    files = sorted(path.name for path in (folder / shadows.SCORES).iterdir())
    assert files == [f"nearest-00{i}.safetensors" for i in range(2)] + [f"teacher-00{i}.safetensors" for i in range(6)]
    (folder / shadows.SCORES / "teacher-004.safetensors").write_bytes(b"damaged")

    trained = []
    counting = replace(source, train=lambda *args: trained.append(args))
    privacy.run(settings(), counting, folder)
    assert not trained
    pd.testing.assert_frame_equal(table(folder), table(undisturbed))
    for name in (*files, "nearest-005.safetensors"):
        own, other = ((place / shadows.SCORES / name).read_bytes() for place in (folder, undisturbed))
        assert own == other, name
    assert not (folder / shadows.TRAININGS).exists() or not list((folder / shadows.TRAININGS).iterdir())


def test_the_table_has_every_attack_on_every_arm_and_its_settings(undisturbed):
    found = table(undisturbed)
    pooled = found[found["model"].isna()]
    keys = set(zip(pooled["arm"], pooled["examples"], pooled["attack"], strict=True))
    attacks = ("online", "online_own_variance", "offline", "threshold")
    wanted = {(arm, kind, a) for arm in ("teacher", "nearest") for kind in ("images", "canaries") for a in attacks}
    assert keys == wanted | {("control", kind, "online") for kind in ("images", "canaries")}
    assert set(found["model"].dropna()) == set(range(6))
    by_kind = {kind: rows for kind, rows in pooled.groupby("examples")}
    images, canaries = by_kind["images"], by_kind["canaries"]
    at_3, at_10 = pd.isna(canaries["tpr_at_0.03"]), pd.isna(canaries["tpr_at_0.1"])
    assert set(images["num_members"]) == set(images["num_non_members"]) == {120}
    assert all(low <= rate for low, rate in zip(images["tpr_at_0.1_low"], images["tpr_at_0.1"], strict=True))
    # 30 non-members: enough for 10 %, not for 3 %.
    assert np.all(at_3) and not np.any(at_10)
    about = json.loads(pq.read_schema(undisturbed / privacy.TABLE).metadata[b"dfkd_ray.privacy"])
    assert json.loads(about["settings"])["num_shadows"] == 6
    assert (undisturbed / privacy.FIGURE).read_bytes().startswith(b"\x89PNG")


def test_a_folder_of_another_audit_or_of_anything_else_is_refused(source, undisturbed, tmp_path):
    for fields, name in (({"seed": 1}, "seed=0"), ({"training.num_epochs": 3}, "training.num_epochs=2")):
        refusal(lambda fields=fields: privacy.run(settings(**fields), source, undisturbed), name)
    other = replace(source, read=lambda rows: source.read(rows) // 2)
    refusal(lambda: privacy.run(settings(), other, undisturbed), "other images")
    for place, name in ((tmp_path / "theirs", "mine"), (tmp_path / "damaged", privacy.CLAIM)):
        place.mkdir()
        (place / name).write_text(json.dumps({"schema": privacy.SCHEMA, "settings": "[1]"}))
    refusal(lambda: privacy.run(settings(), source, tmp_path / "theirs"), "not a privacy audit")
    refusal(lambda: privacy.run(settings(), source, tmp_path / "damaged"), "damaged")


@pytest.mark.parametrize(
    ("fields", "parts"),
    [
        ({"num_shadows": 7}, ("num_shadows=7", "even")),
        ({"num_audited": 55}, ("num_audited", "65", "num_images=60")),
        ({"fprs": (0.01,)}, ("fprs=0.01", "num_audited=40", "120 non-members")),
        ({"fprs": (0.0,)}, ("fprs=0",)),
        ({"training.num_validation": 5}, ("num_validation=5", "members")),
        ({"trial.synthesis": {"method": "real"}}, ("trial.synthesis.method=real",)),
        ({"trial.synthesis": {"method": "adi", "num_rounds": 2}}, ("nearest", "adi")),
        ({"arms": ("teacher", "students")}, ("arms",)),
    ],
)
def test_an_audit_that_would_mislead_is_refused_before_it_starts(fields, parts):
    refusal(lambda: settings(**fields), *parts)


def test_what_does_not_fit_the_data_is_refused_before_training(source, tmp_path):
    def train(*_args: Any) -> Any:
        raise AssertionError("nothing is trained")

    untouched = replace(source, train=train)

    def run(**fields: Any) -> None:
        privacy.run(settings(**fields), untouched, tmp_path / "never")

    refusal(lambda: run(num_images=91), "num_images=91", "90")
    refusal(lambda: privacy.run(settings(), replace(untouched, num_classes=1), tmp_path / "never"), "one class")
    refusal(lambda: run(**{"arms": ("real",), "trial.distillation.num_images": 300}), "real", "304")
    for arm in ("recovered", "nearest"):
        without = {"training.architecture": "lenet5", "training.arguments": {}, "arms": ("teacher", arm)}
        refusal(lambda fields=without: run(**fields), "BatchNorm")
    refusal(lambda: run(**{"training.architecture": "my.nets:make"}), "my.nets:make", "code")
    assert not (tmp_path / "never").exists()


def test_halves_labels_and_canaries_are_what_teachers_are_trained_on(source, tmp_path):
    calls = []

    def train(settings, rows, labels, checkpoint):
        calls.append((settings, rows, labels))
        raise Killed

    audit = Audit(settings(), replace(source, train=train))
    own = source.labels[audit.rows]
    assert (audit.labels[:10] != own[:10]).all() and (audit.labels[10:] == own[10:]).all()
    assert len(set(audit.rows.tolist())) == 60 and (audit.keep.sum(axis=0) == 3).all()
    for index in (0, 5):
        with pytest.raises(Killed):
            shadows.teacher_of(audit, index, storage.folder(tmp_path))
        trained, rows, labels = calls[-1]
        assert trained.seed == index and set(rows) == set(audit.rows[audit.keep[index]])
        assert (labels == audit.labels[audit.keep[index]]).all()


def test_queries_are_the_image_flipped_and_shifted_over_black():
    images = np.arange(2 * 1 * 6 * 5, dtype=np.uint8).reshape(2, 1, 6, 5) + 1
    found = shadows.queries(images, 6)
    assert [query.shape for query in found] == [images.shape] * 6 and len(shadows.queries(images, 1)) == 1
    assert (found[0] == images).all() and (found[1] == images[..., ::-1]).all()
    assert (found[2][:, :, 2:] == images[:, :, :-2]).all() and not found[2][:, :, :2].any()
    assert (found[3][:, :, :-2] == images[:, :, 2:]).all() and (found[4][..., 2:] == images[..., :-2]).all()
    assert (found[5][..., :-2] == images[..., 2:]).all() and len({query.tobytes() for query in found}) == 6


def test_an_image_among_the_synthetic_ones_is_nearest(source, undisturbed):
    audit = Audit(settings(), source)
    teacher = shadows.teacher_of(audit, 0, storage.folder(undisturbed))
    runtime = devices.Runtime(torch.device("cpu"), teacher.info.space)
    phi = shadows.distance_scores(teacher, audit.images[[7, 20]], audit, runtime)
    assert set(phi[:, 0].argsort()[-2:]) == {7, 20} and np.isfinite(phi).all()


def test_the_self_test_tells_a_blind_audit_and_one_that_sees_what_is_not_there():
    area = rates.Rate(0.5, 0.4, 0.6)

    def found(seen: float, control: float) -> list[privacy.Attack]:
        return [
            privacy.Attack(arm, "images", "online", None, 9, 9, area, {0.01: rates.Rate(v, 0.0, 1.0)})
            for arm, v in (("teacher", seen), ("control", control))
        ]

    assert privacy.self_test(found(0.2, 0.02)) == []
    assert "memorising" in privacy.self_test(found(0.19, 0.02))[0]
    assert "control" in privacy.self_test(found(0.2, 0.03))[0]


def test_rates_are_printed_as_they_are_and_fit_their_columns(source):
    shown = privacy.cell(rates.Rate(0.1025, 0.0999, 0.10))
    assert shown == "10.2 (9.99-10.0)" and privacy.cell(None) == "–"
    widest = rates.Rate(1.0, 0.9994, 1.0)
    assert privacy.cell(widest) == "100.0 (99.9-100.0)"
    one = privacy.Attack("recovered", "images", "online_own_variance", None, 9, 9, widest, {0.1: widest, 0.03: widest})
    printed = list(privacy.lines(Audit(settings(), source), [one], ["recovered"]))
    assert all(len(line) <= 80 for line in printed)
    row = next(line for line in printed if line.startswith("recovered"))
    assert row.split() == ["recovered", "online,", "own", "var.", *2 * ["100.0", "(99.9-100.0)"], "1.000±0.000"]
    assert (
        "left out: recovered, of which a trial failed" in printed and "not audited: real, recovered, records" in printed
    )


def test_an_arm_of_which_a_trial_failed_is_left_out_and_said(source, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(shadows.sweep, "run", lambda *_args, **_more: 6)
    monkeypatch.setattr(shadows.sweep, "rows_in", lambda *_args: [])
    found, num_failed = privacy.run(settings(arms=("teacher", "recovered")), source, tmp_path / "audit")
    assert num_failed == 6 and {one.arm for one in found} == {"teacher", "control"}
    assert "left out: recovered" in capsys.readouterr().out


def test_students_are_trials_on_their_own_images_and_are_scored(source, undisturbed):
    """Records, real and synthetic images of one shadow; `nearest` reads the images that the student was given."""
    audit = Audit(settings(arms=("real", "recovered", "records", "nearest")), source)
    place = storage.folder(undisturbed)
    teacher = shadows.teacher_of(audit, 0, place)
    assert teacher.record("top").info.num_examples == tuple(np.bincount(audit.labels[audit.keep[0]]))
    jobs = shadows.jobs_of(audit, [teacher])
    images = trial.Local(place / shadows.CACHE)
    found = {}
    for (arm, index), job in jobs.items():
        real = shadows.real_source(audit, teacher, job.config.synthesis) if arm == "real" else None
        row = sweep.run_job(job, trial.Inputs(real=real, images=images), place / shadows.SWEEP)
        assert row["status"] == "finished", row["reason"]
        found[arm] = shadows.scores_of(audit, arm, index, teacher, job, place)
        if arm == "recovered":
            assert row["synthesis_key"] == shadows.synthetic_images(teacher, job.config, place)[1]
    found["nearest"] = shadows.scores_of(audit, "nearest", 0, teacher, None, place)
    found["teacher"] = shadows.scores_of(audit, "teacher", 0, teacher, None, place)
    assert {phi.shape for phi in found.values()} == {(50, 3)} and len({phi.tobytes() for phi in found.values()}) == 5


def test_real_images_are_of_the_teachers_own_half_each_once(source, undisturbed):
    audit = Audit(settings(arms=("real",)), source)
    teacher = shadows.teacher_of(audit, 4, storage.folder(undisturbed))
    made = pickle.loads(pickle.dumps(shadows.real_source(audit, teacher, real_config(audit.config))))
    batch = made(0)
    own = {image.tobytes(): label for image, label in half_of(audit, 4)}
    assert len({image.tobytes() for image in batch.images}) == 8 and batch.images.dtype == np.uint8
    assert [own[image.tobytes()] for image in batch.images] == batch.labels.tolist()


def half_of(audit: Audit, index: int) -> list[tuple[np.ndarray, int]]:
    members = audit.members(index)
    return list(zip(audit.source.read(audit.rows[members]), audit.labels[members].tolist(), strict=True))


def test_the_command_runs_an_audit_and_again_only_prints_it(run_cli, tmp_path):
    write_idx_set(tmp_path / "data", 120)
    fields = {f"trial.{name}": value for name, value in config.flat(TINY_TRIAL).items()}
    fields |= {"training.arguments": '{"width_multiplier": 0.25}', "training.num_epochs": 1, "training.batch_size": 16}
    fields |= {"training.device": "cpu", "num_images": 120, "num_audited": 50, "num_queries": 1, "fprs": "[0.1]"}
    words = ["bench", "privacy", "--out", str(tmp_path / "audit"), "--size", "standard", "--shadows", "6"]
    words += ["--arms", "teacher,real", "--canaries", "12", "--dataset", "mnist"]
    words += ["--data-root", str(tmp_path / "data"), *set_words(fields)]
    done = run_cli(*words)
    assert done.code == 0, done.err
    lines = done.out.splitlines()
    assert all(len(line) <= 80 for line in lines if not line.endswith(privacy.FIGURE)), max(lines, key=len)
    assert sum(line.startswith("real ") for line in lines) == 8 and "6 students, 0 failed" in done.out
    assert "not audited: recovered, records, nearest" in lines
    again = run_cli(*words)
    tables = [[line for line in one.out.splitlines() if "±" in line] for one in (done, again)]
    assert again.code == 0 and tables[0] == tables[1] and len(tables[0]) == 18
