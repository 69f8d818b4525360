import errno
import os
import pickle
import subprocess
import sys
import time
import uuid
from pathlib import Path

import pytest
from fsspec.implementations.memory import MemoryFile, MemoryFileSystem

from dfkd_ray import storage
from folders import remove_everything


@pytest.fixture(params=["disk", "file_uri", "memory", "real_folders"])
def root(request, tmp_path):
    """A folder that is not there yet, on each kind of file system."""
    name = uuid.uuid4().hex
    where = {
        "disk": tmp_path / name,
        "file_uri": f"file://{tmp_path}/{name}",
        "memory": f"fsspec+memory://{name}/deep/root",
        "real_folders": f"mock:///{name}/deep/root",
    }[request.param]
    folder = storage.folder(where)
    yield folder
    remove_everything(folder)


def test_what_is_written_is_read_back(root):
    for data in (b"", b"\0\xff" * 70000, memoryview(b"view")):
        root.write("a.bin", data)
        assert root.read("a.bin") == bytes(data)
    assert isinstance(root.read("a.bin"), bytes)


def test_a_folder_that_is_not_there_is_empty(root):
    assert (root.read("a"), root.names(), root.sizes(), root.folders()) == (None, [], {}, [])
    root.remove("a")
    remove_everything(root)
    root.touch("a")


def test_names_are_plain_files_in_order_and_folders_are_apart(root):
    for name in ("b", ".hidden", "a"):
        root.write(name, b"12")
    (root / "inner" / "deeper").write("c", b"345")
    assert root.names() == ["a", "b"]
    assert {name: size for name, (size, _) in root.sizes().items()} == {".hidden": 2, "a": 2, "b": 2}
    assert [str(folder) for folder in root.folders()] == [str(root / "inner")]
    assert (root / "inner").folders()[0].read("c") == b"345"


def test_a_file_has_the_time_of_its_writing_where_times_are_kept(tmp_path):
    folder = storage.folder(tmp_path)
    folder.write("a", b"1")
    os.utime(tmp_path / "a", (1e9, 1e9))
    assert folder.sizes()["a"] == (1, 1e9)
    folder.touch("a")
    _, changed = folder.sizes()["a"]
    assert changed is not None and abs(changed - time.time()) < 900


def test_removing_takes_what_was_named_and_nothing_else(root):
    for folder in (root / "one", root / "two"):
        folder.write("a", b"1")
        folder.write("b", b"2")
    (root / "one").remove("a")
    assert (root / "one").names() == ["b"] and (root / "two").names() == ["a", "b"]
    remove_everything(root / "two")
    assert [folder.name for folder in root.folders()] == ["one"] and (root / "one").read("b") == b"2"


def test_a_folder_survives_pickling_and_stays_small(root):
    root.write("a", b"1")
    packed = pickle.dumps(root / "inner")
    other = pickle.loads(packed)
    assert other == root / "inner" and str(other) == str(root / "inner") and len(packed) < 500
    other.write("b", b"2")
    assert (root / "inner").read("b") == b"2"


def test_a_folder_is_found_again_by_its_text(root):
    (root / "inner").write("a", b"1")
    assert storage.folder(str(root / "inner")).name == "inner"
    if not str(root).startswith("mock"):  # each mock URI is a file system of its own
        assert storage.folder(str(root / "inner")).read("a") == b"1"
    assert storage.folder(root) is root


def test_local_paths_and_file_uris_are_absolute_and_local(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/someone")
    for where in ("a b", Path("a b"), "./x/../a b", f"file://{tmp_path}/a%20b/".replace(" ", "%20")):
        folder = storage.folder(where)
        assert folder.is_local and folder.path == tmp_path / "a b" and str(folder) == str(tmp_path / "a b")
    assert storage.folder("~/a").path == Path("/home/someone/a")
    assert not storage.folder("fsspec+memory://a").is_local


@pytest.mark.parametrize(
    "uri",
    [
        "bad://x",
        "://",
        "fsspec+nope://a",
        "fsspec+memory://",
        "s3://",
        "s3://bucket/x?nope=1",
        "file://host/x",
        "gs://b/x?q=1",
        "",
    ],
)
def test_an_unusable_uri_is_refused_in_one_line_with_what_was_given(uri):
    with pytest.raises(ValueError, match="expected a folder") as caught:
        storage.folder(uri)
    assert storage.without_secrets(uri) in str(caught.value) and "\n" not in str(caught.value)


def test_names_go_between_a_uri_and_its_query():
    # The region is given, so that nobody is asked for it.
    folder = storage.folder("s3://bucket/a/?region=us-east-1&scheme=http") / "b" / "c"
    assert str(folder) == "s3://bucket/a/b/c?region=us-east-1&scheme=http" and folder.name == "c"
    assert storage.folder(folder.uri).name == "c"


def test_no_secret_of_a_uri_is_shown():
    folder = storage.folder("s3://key:hush@bucket/a?region=us-east-1") / "b"
    assert str(folder) == "s3://***@bucket/a/b?region=us-east-1"
    assert "hush" not in repr(folder) and "hush" in folder.uri
    with pytest.raises(ValueError) as caught:
        storage.folder("s3://key:hush@bucket/a?secret_key=hush&nope=1")
    assert "hush" not in str(caught.value)


def test_a_failed_write_on_a_disk_leaves_what_was_there(tmp_path, monkeypatch):
    folder = storage.folder(tmp_path)
    folder.write("a", b"old")

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    for name in ("a", "b"):
        with pytest.raises(OSError, match="No space left"):
            folder.write(name, b"new")
    assert list(folder.sizes()) == ["a"] and folder.read("a") == b"old"


@pytest.mark.parametrize("method", ["write", "close"])
def test_a_failed_upload_leaves_nothing(monkeypatch, method):
    folder = storage.folder(f"fsspec+memory://{uuid.uuid4().hex}")
    real = MemoryFile.write

    def breaks(file, *data):
        if data:
            real(file, data[0][:2])
        raise OSError(errno.ECONNRESET, "Connection reset by peer")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="Connection reset"):
        patch.setattr(MemoryFile, method, breaks)
        folder.write("a", b"content")
    assert folder.sizes() == {}
    folder.write("a", b"content")
    assert folder.read("a") == b"content"


def test_a_temporary_file_is_hidden_and_known_as_one(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: seen.extend(storage.folder(tmp_path).sizes()))
    storage.folder(tmp_path).write("a", b"1")
    assert len(seen) == 1 and storage.is_part(seen[0]) and str(os.getpid()) in seen[0]
    assert not storage.is_part("a") and not storage.is_part(".000001.lock")


def test_a_link_to_a_folder_elsewhere_is_not_among_the_folders(tmp_path):
    (tmp_path / "root").mkdir()
    (tmp_path / "precious").mkdir()
    (tmp_path / "root" / "link").symlink_to(tmp_path / "precious")
    assert storage.folder(tmp_path / "root").folders() == []


def test_what_a_disk_refuses_is_an_environment_error(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    folder = storage.folder(tmp_path / "file")
    for act in (lambda: folder.write("a", b"1"), folder.names, lambda: folder.read("a")):
        with pytest.raises(OSError):
            act()


def test_errors_of_a_client_library_below_fsspec_are_environment_errors_too(monkeypatch):
    class HttpError(Exception):
        """As gcsfs has one: no OSError."""

    def refuse(*_args, **_options):
        raise HttpError("403: user:secret@host may not\nread this bucket")

    folder = storage.folder(f"fsspec+memory://{uuid.uuid4().hex}")
    folder.write("a", b"1")
    for name in ("open", "find", "ls", "info"):
        monkeypatch.setattr(MemoryFileSystem, name, refuse)
    for act in (lambda: folder.read("a"), lambda: folder.write("b", b"1"), folder.names):
        with pytest.raises(OSError, match="HttpError: 403") as caught:
            act()
        assert "\n" not in str(caught.value) and isinstance(caught.value.__cause__, HttpError)


def test_storage_and_cache_need_no_torch():
    code = (
        "import sys, dfkd_ray.storage, dfkd_ray.cache; assert 'torch' not in sys.modules and 'ray' not in sys.modules"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=900).returncode == 0
