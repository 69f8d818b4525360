"""No command removes or replaces a file that it did not write; nothing that is read becomes a path unchecked."""

import json
import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from PIL import Image

import commands
from dfkd_ray import bundles, cache_entries, checkpoints, results, storage, targets, trial
from dfkd_ray.sweep import places
from folders import hashes
from helpers import TINY_WORDS

FOREIGN = {
    "thesis.tex": b"ten years",
    ".git/config": b"[core]",
    "data/a.csv": b"a,b\n1,2\n",
    "checkpoints/mine.pt": b"weights",
    "checkpoints/t-000000000000/mine.pt": b"weights",
    "student/weights.safetensors": b"somebody's",
    "student/notes.txt": b"mine",
    "row.json": b"{}",
    "images.png": b"a photo",
    "train/cat/000000-0000.png": b"a cat",
    "part-000000.parquet": b"a table",
    "teacher.json": b'{"name": "Mrs Smith"}',
    "weights.safetensors": b"somebody's",
    "records/top.safetensors": b"somebody's",
    "synthesis.json": b"{}",
    "sweep.yaml": b"base: {}\n",
    "trials/old.parquet": b"somebody's table",
    "students/t-000000000000/weights.safetensors": b"somebody's",
    "tensorboard/events.out.tfevents.1": b"somebody's",
    "report.html": b"<html>mine</html>",
    "report/figure.svg": b"<svg/>",
    "manifest.json": b"{}",
}


def plant(folder: Path) -> None:
    for name, data in FOREIGN.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)


@pytest.fixture
def materials(tiny_teacher: Path, tmp_path: Path) -> dict[str, str]:
    """What the commands take."""
    torch.save(bundles.load(str(tiny_teacher)).network.state_dict(), tmp_path / "w.pt")
    sweep = {"base": {"teacher": str(tiny_teacher)}, "grid": {"pruning.sparsity": [0.5]}}
    (tmp_path / "s.yaml").write_text(yaml.safe_dump(sweep))
    for split in ("train", "test"):
        for label in ("a", "b"):
            (tmp_path / "set" / split / label).mkdir(parents=True)
            Image.new("L", (16, 16), 200 if label == "a" else 20).save(tmp_path / "set" / split / label / "0.png")
    (tmp_path / "place").mkdir()
    results.write(tmp_path / "place", "trials", [{"trial_id": "t-000000000000", "status": "finished"}], "a")
    names = {name: str(tmp_path / name) for name in ("w.pt", "s.yaml", "set", "place")}
    return names | {"teacher": str(tiny_teacher)}


def command_lines(materials: dict[str, str], out: str) -> dict[str, list[str]]:
    """Every command that writes, writing to `out`."""
    teacher = materials["teacher"]
    network = ["--architecture", "resnet8", "--arguments", '{"width_multiplier": 0.5}', "--num-classes", "10"]
    shape = ["--image-shape", "1x16x16", "--mean", "0.5", "--std", "0.25"]
    return {
        "init": ["teacher", "init", "resnet8", "--image-shape", "1x16x16", "--out", out],
        "import": ["teacher", "import", materials["w.pt"], *network, *shape, "--out", out],
        "train": ["teacher", "train", "resnet8", "--dataset", materials["set"], "--epochs", "1", "--out", out],
        "recover": ["recover", teacher, *TINY_WORDS, "--test-data", "none", "--out", out],
        "recover_cache": ["recover", teacher, *TINY_WORDS, "--out", out + "-new", "--cache", out],
        "synthesize": ["synthesize", teacher, "--num-images", "8", "--out", out],
        "synthesize_cache": ["synthesize", teacher, "--num-images", "8", "--out", out + "-new", "--cache", out],
        "sweep": ["sweep", materials["s.yaml"], *TINY_WORDS, "--results", out],
        "sweep_cache": ["sweep", materials["s.yaml"], *TINY_WORDS, "--results", out + "-new", "--cache", out],
        "report": ["report", materials["place"], "--out", f"{out}/report.html"],
        "csv": ["results", materials["place"], "--out", f"{out}/data/a.csv"],
        "json": ["results", materials["place"], "--out", f"{out}/row.json"],
    }


NAMES = list(command_lines(dict.fromkeys(("w.pt", "s.yaml", "set", "place", "teacher"), ""), ""))
FOLDERS = [name for name in NAMES if name not in ("report", "csv", "json")]


@pytest.mark.parametrize("name", NAMES)
def test_a_folder_of_foreign_files_is_refused_and_left_as_it_is(name, materials, tmp_path, run_cli):
    out = tmp_path / "project"
    plant(out)
    before = hashes(tmp_path)
    done = run_cli(*command_lines(materials, str(out))[name])
    assert done.code == 2, (done.code, done.out, done.err)
    assert len(done.err.splitlines()) == 1 and len(done.err) <= 320, done.err
    assert hashes(tmp_path) == before


@pytest.mark.parametrize("name", FOLDERS)
@pytest.mark.parametrize("special", ["the working folder", "above it", "home", "root", "a mount point", "a file"])
def test_folders_that_are_no_place_of_their_own_are_refused_always(
    special, name, materials, tmp_path, run_cli, monkeypatch
):
    inner, home = tmp_path / "a" / "b", tmp_path / "h"
    for folder in (inner, home):
        folder.mkdir(parents=True)
    (tmp_path / "file").touch()
    monkeypatch.chdir(inner)
    monkeypatch.setenv("HOME", str(home))
    out = {"the working folder": ".", "above it": "..", "home": "~", "root": "/", "a mount point": "/proc"}
    before = hashes(tmp_path)
    done = run_cli(*command_lines(materials, out.get(special, str(tmp_path / "file")))[name])
    assert done.code == 2 and len(done.err.splitlines()) == 1, (done.code, done.err)
    assert hashes(tmp_path) == before


def test_a_bundle_is_replaced_by_its_files_and_keeps_what_else_lies_there(tmp_path, run_cli):
    words = ["teacher", "init", "resnet8", "--image-shape", "1x16x16", "--out", str(tmp_path / "net")]
    assert run_cli(*words).code == 0
    (tmp_path / "net" / "notes.txt").write_text("mine")
    first = (tmp_path / "net" / "weights.safetensors").read_bytes()
    assert run_cli(*words, "--seed", "1").code == 0
    assert (tmp_path / "net" / "notes.txt").read_text() == "mine"
    assert (tmp_path / "net" / "weights.safetensors").read_bytes() != first
    assert bundles.load(str(tmp_path / "net")).info.notes == {"init": {"seed": 1}}


def test_a_recovery_is_replaced_file_by_file_and_keeps_what_else_lies_there(tiny_teacher, tmp_path, run_cli):
    words = ["recover", str(tiny_teacher), *TINY_WORDS, "--test-data", "none", "--out", str(tmp_path / "r")]
    assert run_cli(*words).code == 0
    assert {path.name for path in (tmp_path / "r").iterdir()} == {"row.json", "images.png", "student"}
    mine = {"notes.txt": "a", "student/README.md": "b", "checkpoints/keep.pt": "c", "checkpoints/t-1/keep.pt": "d"}
    for name, text in mine.items():
        (tmp_path / "r" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "r" / name).write_text(text)
    assert run_cli(*words, "--sparsity", "0.9").code == 0
    assert json.loads((tmp_path / "r" / "row.json").read_text())["pruning.sparsity"] == 0.9
    assert {name: (tmp_path / "r" / name).read_text() for name in mine} == mine


def test_a_refused_recovery_leaves_no_folder_behind(tiny_teacher, tmp_path, run_cli):
    words = ["recover", str(tiny_teacher), *TINY_WORDS, "--out", str(tmp_path / "r")]
    assert run_cli(*words, "--set", "synthesis.precision=tf32").code == 2
    assert not (tmp_path / "r").exists()


def test_an_export_replaces_another_of_the_same_columns_and_nothing_else(materials, tmp_path, run_cli):
    for ending in ("csv", "md", "tex", "json"):
        out = tmp_path / f"table.{ending}"
        words = ["results", materials["place"], "--out", str(out)]
        assert run_cli(*words).code == 0 and run_cli(*words).code == 0
        done = run_cli(*words, "--columns", "trial_id,status")
        assert done.code == 2 and "not an export of these columns" in done.err, ending


def test_a_report_replaces_a_report(materials, run_cli):
    assert run_cli("report", materials["place"]).code == 0
    assert run_cli("report", materials["place"]).code == 0


def test_the_training_of_a_teacher_removes_nothing_beside_it(materials, tmp_path, run_cli):
    (tmp_path / ".net-training").mkdir()
    (tmp_path / ".net-training" / "mine").write_text("a")
    done = run_cli(*command_lines(materials, str(tmp_path / "net"))["train"])
    assert done.code == 2 and ".net-training" in done.err
    assert (tmp_path / ".net-training" / "mine").read_text() == "a"


def test_a_record_is_written_over_a_record_only(tiny_teacher, tmp_path, materials, run_cli):
    folder = tmp_path / "copy"
    bundles.save(folder, bundles.read_info(tiny_teacher), bundles.load(str(tiny_teacher)).network.state_dict())
    (folder / "records").mkdir()
    (folder / "records" / "top.safetensors").write_bytes(b"mine")
    done = run_cli("teacher", "record", str(folder), "--dataset", materials["set"], "--kinds", "top")
    assert done.code == 2 and "not a record" in done.err
    assert (folder / "records" / "top.safetensors").read_bytes() == b"mine"


# ---- names that are read ---------------------------------------------------------------------------------------------


HOSTILE = ["/home/you", "..", ".", "", "../students", "t-000000000000/../..", "t-00000000000", "T-000000000000", "a\0b"]


@pytest.mark.parametrize("name", HOSTILE)
def test_a_trial_id_of_another_form_removes_nothing(name, tmp_path):
    victim = tmp_path / "home" / "you"
    victim.mkdir(parents=True)
    (victim / checkpoints.FILE).write_text("mine")
    place = storage.folder(tmp_path / "place")
    (place / "checkpoints" / "t-111111111111").write(checkpoints.FILE, b"")
    before = hashes(tmp_path)
    trial.remove_checkpoints(place, [name, str(victim), os.path.relpath(victim, place.path / "checkpoints")])
    assert hashes(tmp_path) == before


def test_a_sweep_writes_down_what_ran_in_its_place_and_a_row_from_outside_removes_no_folder(materials, tmp_path):
    victim = tmp_path / "home"
    victim.mkdir()
    (victim / "thesis.tex").write_text("ten years")
    rows = [{"trial_id": str(victim), "status": "finished"}]
    place = tmp_path / "swept"
    schema = results.schema("trials")
    table = pa.Table.from_pylist([{n: row.get(n) for n in schema.names} for row in rows], schema=schema)
    (place / "trials").mkdir(parents=True)
    pq.write_table(table, place / "trials" / "t-222222222222.parquet")
    words = ["sweep", materials["s.yaml"], *TINY_WORDS, "--results", str(place), "--test-data", "none"]
    ended = commands.done([*commands.SCRIPT, *words, "--synthesizers", "0"], tmp_path)
    assert ended.returncode == 0, ended.stderr
    assert (victim / "thesis.tex").read_text() == "ten years"
    assert yaml.safe_load((place / "sweep.yaml").read_text())["grid"] == {"pruning.sparsity": [0.5]}


def test_nothing_is_removed_through_a_link(tmp_path):
    elsewhere = tmp_path / "elsewhere"
    (elsewhere / "t-111111111111").mkdir(parents=True)
    (elsewhere / "t-111111111111" / checkpoints.FILE).write_text("mine")
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    (tmp_path / "one" / "checkpoints").symlink_to(elsewhere)
    (tmp_path / "two" / "checkpoints").mkdir()
    (tmp_path / "two" / "checkpoints" / "t-111111111111").symlink_to(elsewhere / "t-111111111111")
    before = hashes(elsewhere)
    for name in ("one", "two"):
        trial.remove_checkpoints(storage.folder(tmp_path / name), ["t-111111111111"])
        trial.remove_checkpoints(storage.folder(tmp_path / name))
    assert hashes(elsewhere) == before


def test_pruning_a_cache_keeps_what_is_not_of_it(tmp_path):
    key = tmp_path / "c" / f"{'a' * 32}-{'b' * 8}"
    key.mkdir(parents=True)
    for name in ("manifest.json", "batch-000000.safetensors", ".000000.lock", "notes.txt"):
        (key / name).write_text("x")
    (key / "inner").mkdir()
    (key / "inner" / "batch-000000.safetensors").write_text("mine")
    cache_entries.prune(tmp_path / "c", older_than_days=0)
    assert sorted(str(path.relative_to(key)) for path in key.rglob("*") if path.is_file()) == [
        "inner/batch-000000.safetensors",
        "notes.txt",
    ]


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "/etc", "a\0b"])
def test_a_folder_has_no_inner_folder_of_a_name_that_leads_elsewhere(name, tmp_path):
    with pytest.raises(ValueError, match="no name of a file or folder"):
        _ = storage.folder(tmp_path) / name


@pytest.mark.parametrize("text", ['{"schema": "dfkd_ray.result/1"}', "{}", "[]", "x", '{"schema": 1}', "[" * 100_000])
def test_a_claim_of_another_schema_is_not_ours(text):
    is_own = targets.claims("dfkd_ray.results/1")
    assert is_own(b'{"schema": "dfkd_ray.results/7"}') and not is_own(text.encode())


def test_a_second_sweep_that_is_refused_changes_nothing_of_the_first(tiny_teacher, materials, tmp_path, run_cli):
    place = storage.folder(tmp_path / "r")
    targets.claim(place, places.CLAIM, places.SCHEMA)
    place.write("sweep.yaml", b"# of the first\n")
    before = hashes(place.path)
    with places.reserved(place):
        done = run_cli("sweep", materials["s.yaml"], *TINY_WORDS, "--results", str(place), "--test-data", "none")
    assert done.code == 3 and "another sweep is running" in done.err and len(done.err.splitlines()) == 1, done.err
    after = hashes(place.path)
    after.pop(".lock", None)
    assert after == before
