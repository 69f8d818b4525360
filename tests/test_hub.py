"""Pushes to a stand-in of the Hugging Face Hub: what is uploaded, what is refused, and what no message has."""

import sys
from pathlib import Path

import pytest

import hub_server
from dfkd_ray import exporting
from dfkd_ray.exporting import hub, images
from helpers import assert_one_error
from hub_server import TOKEN, Hub

huggingface_hub = pytest.importorskip("huggingface_hub")
NAME = "owner/student"


@pytest.fixture(autouse=True)
def quick_images(monkeypatch):
    """Noise instead of synthesis."""
    import torch

    drawn = torch.randn(16, 1, 16, 16, generator=torch.Generator().manual_seed(0)).numpy()
    monkeypatch.setattr(images, "made", lambda *_: images.Images(drawn, None, "noise of a test"))


@pytest.fixture
def server(monkeypatch, tmp_path):
    """A running stand-in, and its token in the environment."""
    from huggingface_hub import constants

    with hub_server.serving() as found:
        monkeypatch.setattr(constants, "ENDPOINT", found.url)
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield found


@pytest.fixture
def push(run_cli, tiny_teacher, tmp_path):
    """Export with some words, in a folder of its own; returns what was said, and the exported folder."""
    numbers = iter(range(100))

    def run(*words: str):
        out = tmp_path / f"out{next(numbers)}" / "net"
        done = run_cli("export", str(tiny_teacher), "--format", "torch", "--out", str(out), "--push", NAME, *words)
        assert TOKEN not in done.out + done.err
        return done, out

    return run


def written(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def in_repository(server: Hub) -> dict[str, bytes]:
    files = dict(server.repositories[NAME])
    files.pop(".gitattributes", None)
    return files


def test_exactly_the_written_files_and_the_card_are_uploaded_to_a_new_private_repository(push, server):
    done, out = push()
    assert done.code == 0, done.err
    assert in_repository(server) == written(out) and set(written(out)) == {
        *("README.md", "model.py", "weights.safetensors")
    }
    assert server.private[NAME] is True
    assert done.out.splitlines()[-1] == f"uploaded: {server.url}/{NAME} (private)"


def test_a_repository_is_public_only_if_it_is_asked_for(push, server):
    assert push("--public")[0].code == 0 and server.private[NAME] is False
    server.tags[NAME] = ["dfkd-ray"]
    assert_one_error(push()[0], 2, NAME, "public", "--public")
    assert push("--public")[0].code == 0


def test_a_single_file_and_its_card_are_uploaded_large_files_too(server, tmp_path):
    """The card beside a file becomes the repository's README.md."""
    for name in ("net.onnx", "net.onnx.md"):
        (tmp_path / name).write_bytes(name.encode() * 100)
    server.large = (".onnx",)
    found = exporting.comparison.Comparison(1, 0.0, 1.0, 1.0, 0.0)
    path = tmp_path / "net.onnx"
    done = exporting.Exported(path, (path,), tmp_path / "net.onnx.md", "onnx", "float32", 1, 1, 1, "", found)
    hub.push(done, hub.check(NAME))
    assert in_repository(server) == {"net.onnx": b"net.onnx" * 100, "README.md": b"net.onnx.md" * 100}
    assert any(request.startswith("PUT") for request in server.requests)


def test_a_repository_of_ours_or_an_empty_one_is_written_to_again(push, server):
    server.failing["/api/models/owner/student/commit"] = 500
    done, out = push()
    assert_one_error(done, 3, NAME, "not uploaded", "500", "stay", "hf upload")
    assert set(written(out)) == {"README.md", "model.py", "weights.safetensors"}
    server.failing.clear()
    assert in_repository(server) == {} and push()[0].code == 0
    server.tags[NAME], server.repositories[NAME]["notes.txt"] = ["onnx", "dfkd-ray"], b"mine"
    done, out = push()
    assert done.code == 0 and in_repository(server) == written(out) | {"notes.txt": b"mine"}


def test_a_repository_of_others_is_not_written_to_unless_asked(push, server):
    server.repositories[NAME], server.private[NAME] = {"README.md": b"mine"}, True
    done, out = push()
    assert_one_error(done, 2, NAME, "not made by dfkd_ray", "--replace")
    assert server.repositories[NAME] == {"README.md": b"mine"} and not out.parent.exists(), "before any work"
    done, out = push("--replace")
    assert done.code == 0 and in_repository(server) == written(out)


@pytest.mark.parametrize(
    ("change", "code", "parts"),
    [
        (lambda server, patch: patch.delenv("HF_TOKEN"), 2, ["needs a token", "HF_TOKEN", "hf auth login"]),
        (lambda server, patch: patch.setenv("HF_TOKEN", "hf_other"), 3, ["not accepted (401)"]),
        (lambda server, patch: setattr(server, "role", "read"), 3, ["may only read"]),
        (lambda server, patch: server.failing.update({"/api/whoami": 429}), 3, ["429"]),
        (lambda server, patch: server.failing.update({"/api/models": 403}), 3, ["403"]),
        (lambda server, patch: server.failing.update({"/api/models": 404}), 3, []),
        (lambda server, patch: patch.setitem(sys.modules, "huggingface_hub", None), 2, ["dfkd_ray[hub]"]),
        (
            lambda server, patch: patch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9"),
            3,
            ["reach"],
        ),
        (lambda server, patch: patch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True), 3, []),
    ],
    ids=["no token", "wrong token", "reading", "too many", "forbidden", "404", "extra", "network", "offline"],
)
def test_what_cannot_be_pushed_is_one_line_before_any_work(change, code, parts, push, server, monkeypatch):
    change(server, monkeypatch)
    done, out = push()
    assert_one_error(done, code, *parts)
    assert not out.parent.exists() and server.repositories == {}


@pytest.mark.parametrize(
    ("path", "status", "says"),
    [
        ("/api/repos/create", 403, "no right to write"),
        ("/api/repos/create", 409, "made meanwhile"),
        ("/api/repos/create", 502, "502"),
        ("/api/models/owner/student/preupload", 403, "no right to write"),
    ],
)
def test_what_fails_while_pushing_is_one_line_and_the_files_stay(path, status, says, push, server):
    server.failing[path] = status
    done, out = push()
    assert_one_error(done, 3, NAME, says, str(out))
    assert set(written(out)) == {"README.md", "model.py", "weights.safetensors"}


@pytest.mark.parametrize(
    "name", ["student", "a/b/c", "../x", "a b/c", "owner/", "owner/a--b", "https://x/y", ".a/b", ""]
)
def test_a_wrong_name_of_a_repository_is_one_line(name, run_cli, tiny_teacher, tmp_path):
    done = run_cli("export", str(tiny_teacher), "--out", str(tmp_path / "a.onnx"), "--push", name)
    assert_one_error(done, 2, "--push", "OWNER/NAME")


@pytest.mark.parametrize("word", ["--public", "--replace"])
def test_options_of_a_push_go_with_it(word, run_cli, tiny_teacher, tmp_path):
    assert_one_error(run_cli("export", str(tiny_teacher), "--out", str(tmp_path / "a.onnx"), word), 2, word, "--push")
