"""Private folders: those in use are left alone, those of dead processes go, nothing else does."""

import os
import subprocess
import sys

import pytest

from dfkd_ray import scratch

HOLDS = """
import sys, time
from dfkd_ray import scratch
with scratch.folder("ray", sys.argv[1]) as path:
    (path / "inside").mkdir()
    (path / "inside" / "file").write_text("x")
    print(path, flush=True)
    time.sleep(1000)
"""


@pytest.fixture
def held(tmp_path):
    """A folder that another process holds, and that process."""
    process = subprocess.Popen([sys.executable, "-c", HOLDS, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    yield process.stdout.readline().strip(), process
    process.kill()
    process.wait()


def test_a_folder_is_removed_when_its_process_is_dead_and_not_before(held, tmp_path):
    path, process = held
    assert scratch.remove_dead([tmp_path]) == [] and os.path.isdir(path)
    process.kill()
    process.wait()
    assert [str(found) for found in scratch.remove_dead([tmp_path, tmp_path / "missing"])] == [path]
    assert os.listdir(tmp_path) == []


def test_a_folder_is_private_and_gone_after_its_use_with_all_that_is_in_it(tmp_path):
    (tmp_path / "others").mkdir()
    (tmp_path / "others" / "file").write_text("x")
    base = tmp_path / "base"
    base.mkdir()
    with scratch.folder("tune", base) as path:
        assert path.stat().st_mode & 0o777 == 0o700 and scratch.NAME.fullmatch(path.name)
        (path / "deep" / "er").mkdir(parents=True)
        (path / "link").symlink_to(tmp_path / "others")
        assert scratch.remove_dead([base]) == []
    assert os.listdir(base) == [] and (tmp_path / "others" / "file").exists()


def test_nothing_but_folders_of_ours_is_removed(tmp_path):
    target = tmp_path / "target"
    target.mkdir()
    base = tmp_path / "base"
    base.mkdir()
    (base / "dfkd_ray-tune-12345678").symlink_to(target)  # a link
    (base / "dfkd_ray-ray-12345678").write_text("a file")
    for name in ("dfkd_ray-tune-", "dfkd_ray-tests-12345678", "dfkd_ray-tune-123456789", "xdfkd_ray-tune-12345678"):
        (base / name).mkdir()
        (base / name / scratch.LOCK).write_text("")
    (base / "dfkd_ray-tune-abcdefgh").mkdir()  # with something in it, and no lock
    (base / "dfkd_ray-tune-abcdefgh" / "file").write_text("x")
    (target / scratch.LOCK).write_text("")
    before = sorted(str(path) for path in base.rglob("*"))
    assert scratch.remove_dead([base]) == []
    assert sorted(str(path) for path in base.rglob("*")) == before and (target / scratch.LOCK).exists()


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root can give a folder away")
def test_a_folder_of_another_user_is_left_alone(tmp_path):
    path = tmp_path / "dfkd_ray-tune-12345678"
    path.mkdir()
    (path / scratch.LOCK).write_text("")
    os.chown(path, 12345, 12345)
    assert scratch.remove_dead([tmp_path]) == [] and path.is_dir()


def test_a_folder_that_cannot_be_made_is_an_environment_error(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(OSError), scratch.folder("tune", tmp_path / "file"):
        pass
