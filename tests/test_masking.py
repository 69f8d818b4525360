"""What is shown of URIs: no part of what opens them, whatever it is called and whatever is in it."""

import random
from pathlib import Path

import fsspec
import pytest
import yaml
from pyarrow import fs

from dfkd_ray import masking, plain, storage, trial
from dfkd_ray.storage import Folder

MARK = "hush"
ODD = [*"/@:%?&=+ -_.~#;,'\"()[]{}<>|\\^!*$", "%2F", "%40", "%3A", "  ", "…", "é", ""]
NAMES = ["secret_key", "access_key", "sas_token", "pw", "X-Amz-Signature", "q", "a.b", "account", "Signature", "k%20y"]
SENTENCES = [
    "{}",
    "error: {}",
    "cannot open '{}': no such file",
    "{} is not there; expected a folder",
    "teacher={} bad",
]


def secret(rng: random.Random, without: str = "") -> str:
    """Parts that are easy to find, with what must be escaped and was not between them."""
    odd = [one for one in ODD if not set(one) & set(without)]
    return rng.choice(["", "A", "9/"]) + "".join(MARK + rng.choice(odd) for _ in range(rng.randint(1, 4)))


def uri_of(rng: random.Random) -> str:
    """A URI with a password, with secret parameters, or with both."""
    scheme = rng.choice(["s3", "gs", "abfs", "hdfs", "fsspec+sftp", "https", "fsspec+simplecache::s3"])
    kind = rng.randrange(3)
    user = rng.choice(["", "me", "AKIA123", "me@corp.com", "a user"])
    login = f"{user}{rng.choice([':', '%3A'])}{secret(rng)}@" if kind != 1 else ""
    harmless = ["region=us-east-1", "scheme=http", "endpoint_override=localhost:9000", "anonymous=false"]
    pairs = [f"{rng.choice(NAMES)}={secret(rng, without='&')}" for _ in range(rng.randint(1, 3))]
    pairs += rng.sample(harmless, rng.randint(0, 2))
    rng.shuffle(pairs)
    return f"{scheme}://{login}bucket{rng.choice(['', '/a/b', '/x'])}" + ("?" + "&".join(pairs) if kind else "")


def test_no_part_of_a_secret_is_in_what_is_shown_of_a_uri():
    rng = random.Random(13)
    for _ in range(4000):
        uri = uri_of(rng)
        text = rng.choice(SENTENCES).format(uri)
        shown = masking.without_secrets(text)
        assert MARK not in shown, (text, shown)
        assert masking.without_secrets(shown) == shown, "what was masked before stays as it is"
        assert MARK not in str(masking.secretless({"a": [text, {text: (text,)}]}))
        assert MARK not in masking.hidden(f"denied: {uri}", uri)
        assert MARK not in str(Folder(uri)) + repr(Folder(uri) / "file")
        assert MARK not in masking.without_secrets(str(Path(uri))), "a path has one slash"


def test_two_uris_of_one_line_are_both_without_secrets():
    rng = random.Random(14)
    for _ in range(1000):
        text = f'dfkd-ray sweep f.yaml --cache={uri_of(rng)} --results {uri_of(rng)} "{uri_of(rng)}"'
        assert MARK not in masking.without_secrets(text), text
    assert (
        masking.without_secrets("--cache=s3://b/x --results=s3://k:v@r/y") == "--cache=s3://b/x --results=s3://***@r/y"
    )


def test_a_token_by_itself_and_one_that_ends_in_equals_signs_are_hidden():
    for query in (f"{MARK}", f"{MARK}==", f"{MARK}=", f"sv=1&{MARK}", f"{MARK} {MARK}=x", f"a;b={MARK}"):
        assert MARK not in masking.without_secrets(f"abfs://c@account.dfs.core.windows.net/x?{query}"), query


def test_what_holds_no_secret_is_shown_as_it_is():
    for text in (
        "s3://bucket/a/b?region=us-east-1&scheme=http&endpoint_override=127.0.0.1:5000: no such bucket",
        "abfs://container@account.dfs.core.windows.net/x",
        "http://127.0.0.1:8265 does not answer; see https://docs.ray.io/en/latest/",
        "fsspec+sftp://host:22/x: Permission denied",
        "s3://b/t@1/x, and is it there? yes: 3 files",
        "what? key=1",
        "/a:b@c?d=e",
    ):
        assert masking.without_secrets(text) == text


class Refusing(fsspec.AbstractFileSystem):
    """A file system whose errors say what it was opened with."""

    cachable = False

    def __init__(self, error: Exception):
        super().__init__()
        self.error = error

    def isfile(self, path: str) -> bool:
        raise self.error


@pytest.mark.parametrize("kind", [OSError, PermissionError, RuntimeError, KeyError])
def test_an_error_of_a_client_library_is_told_without_the_secrets_of_its_uri(monkeypatch, kind):
    uri = "s3://me:hu%2Fsh hush@bucket/x?secret_key=hush1"
    said = f"login of me with hu/sh hush or hu%2Fsh hush and hush1 refused by {uri}"
    monkeypatch.setattr(storage, "opened", lambda _uri: (fs.PyFileSystem(fs.FSSpecHandler(Refusing(kind(said)))), "x"))
    with pytest.raises(OSError) as caught:
        Folder(uri).read("a")
    for shown in (str(caught.value), storage.in_one_line(caught.value), trial.reason_of(caught.value)):
        assert "hush" not in shown and "hu/sh" not in shown and "refused" in shown


def test_a_uri_that_cannot_be_opened_is_refused_without_its_secrets():
    for uri in ("s3://k:hush hush@b/x", "s3://b/x?hush", "nothing://k:hush/hush@b", "s3://b?region=x&pw=hush hush"):
        with pytest.raises(ValueError) as caught:
            storage.folder(uri)
        assert MARK not in str(caught.value), caught.value


def test_a_reason_in_a_row_holds_no_secret():
    error = RuntimeError("cannot read s3://k:hush/hush@b/x")
    assert trial.reason_of(error) == "RuntimeError: cannot read s3://***@b/x"


def test_what_is_written_down_as_yaml_holds_no_secret_though_lines_are_wrapped():
    rng = random.Random(15)
    for _ in range(300):
        data = {"base": {"teacher": uri_of(rng)}, "grid": [{"teacher": [uri_of(rng)]}]}
        assert MARK not in yaml.safe_dump(masking.secretless(data))


def test_the_public_name_of_an_opened_place_has_no_secret():
    for uri in ("s3://k:hush@b/x?pw=hush", "s3://k:hush@b?hush", "s3://k:hu?hush@b/x", "s3://k:hush/hush@b/x"):
        assert MARK not in masking.public_name(uri)


def test_the_parameters_called_harmless_are_those_of_file_systems():
    uri = "s3://bucket/x?region=us-east-1&scheme=http&endpoint_override=localhost:9000&allow_bucket_creation=true"
    fs.FileSystem.from_uri(uri)
    assert masking.without_secrets(uri) == uri


@pytest.mark.parametrize(
    "uri", ["https://user:pa55word@host/x", "ftp://host/x.csv?signature=pa55word", "s3://a:pa55word@b"]
)
def test_a_uri_that_was_taken_for_a_path_shows_no_secret(uri):
    assert "pa55word" not in masking.without_secrets(f"error: {Path(uri)}: no such file")
    assert "pa55word" not in masking.without_secrets(plain.named(Path(uri + "/" + "y" * 500)))
    assert masking.without_secrets("error: /a/b:/c: no such file") == "error: /a/b:/c: no such file"
