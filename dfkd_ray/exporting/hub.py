"""Uploads an exported network and its model card to a repository of the Hugging Face Hub.

A new repository is private unless it is to be public. One that exists is written to only if its card has this
package's tag, if it is empty, or if the caller asks for it; a public one only if the caller says public. Other files in
it, and its visibility, stay as they are.
The token is the one that huggingface_hub finds (HF_TOKEN, or `hf auth login`): it is no argument here, and no message
has it. Everything but the upload is checked before the export, which takes longer.
"""

import contextlib
import importlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import dfkd_ray
from dfkd_ray.exporting import Exported, is_installed, quiet
from dfkd_ray.exporting.card_metadata import TAG
from dfkd_ray.plain import given
from dfkd_ray.untrusted import reason

NAME = re.compile(r"[A-Za-z0-9_.-]{1,96}/[A-Za-z0-9_.-]{1,96}")
CARD = "README.md"  # the card's name in a repository
OWN_FILES = (".gitattributes",)  # that the Hub itself puts into a new repository
SAYS = "the Hugging Face Hub"


@dataclass(frozen=True)
class Repository:
    """A repository that may be written to. `is_private`: as it is, or as it will be made."""

    name: str
    is_new: bool
    is_private: bool


class Refused(Exception):
    """An error that is said in full already."""

    def __init__(self, error: Exception):
        super().__init__(str(error))
        self.error = error


def check(name: str, *, public: bool = False, replace: bool = False) -> Repository:
    """The repository, if it may be written to. `replace`: also if it was not made by this package.

    `ValueError` for a wrong name, without the extra or a token, or for a repository that is not to be written to;
    `OSError` if the Hub cannot be reached or refuses the token.
    """
    if not NAME.fullmatch(name) or any(part.strip(".-") != part or "--" in part for part in name.split("/")):
        raise ValueError(f"`push={given(name)}`: expected OWNER/NAME of letters, digits, -, _ and .")
    if not is_installed("huggingface_hub"):
        raise ValueError("a push needs huggingface_hub, not installed here: pip install 'dfkd_ray[hub]'")
    hub, errors = modules()
    with explained(f"{name} cannot be looked up"):
        if hub.get_token() is None:
            says = f"a push needs a token of {SAYS}, and none is here: set HF_TOKEN, or run `hf auth login`"
            raise Refused(ValueError(says))
        api = hub.HfApi()
        role = ((api.whoami().get("auth") or {}).get("accessToken") or {}).get("role")
        if role == "read":
            raise Refused(OSError(f"{name}: the token of {SAYS} may only read; take one that may write"))
        try:
            found = api.model_info(name)
        except errors.RepositoryNotFoundError:
            return Repository(name, True, not public)
    others = [file.rfilename for file in found.siblings or () if file.rfilename not in OWN_FILES]
    if others and TAG not in (found.tags or ()) and not replace:
        raise ValueError(
            f"{name}: it is there already and not made by dfkd_ray, and is not written to; choose another name, or "
            "add `replace`"
        )
    if not found.private and not public:
        raise ValueError(f"{name}: it is there already and public, and a push is private; add `public` to write to it")
    return Repository(name, False, bool(found.private))


def push(done: Exported, repository: Repository) -> str:
    """Upload the written files and the card; returns the repository's address. What is on this disk stays.

    `OSError` if the Hub cannot be reached or refuses it.
    """
    hub, _ = modules()
    failed = (
        f"{repository.name}: not uploaded; the files on this machine stay ({done.path}), upload them with `hf upload`"
    )
    with explained(failed), quiet(), silent():
        api = hub.HfApi()
        if repository.is_new:
            api.create_repo(repository.name, private=repository.is_private, exist_ok=False)
        parts = [hub.CommitOperationAdd(uploaded_name(file, done), str(file)) for file in (*done.files, done.card)]
        message = f"{done.path.name}, written by dfkd_ray {dfkd_ray.__version__}"
        api.create_commit(repository.name, parts, commit_message=message)
        return f"{api.endpoint}/{repository.name}"


def uploaded_name(file: Path, done: Exported) -> str:
    """The name of a file in the repository: a folder's files lie at its root."""
    return CARD if file == done.card else file.name


def modules() -> tuple[Any, Any]:
    """huggingface_hub and its errors, imported only here."""
    return importlib.import_module("huggingface_hub"), importlib.import_module("huggingface_hub.errors")


@contextlib.contextmanager
def silent() -> Iterator[None]:
    """Without progress bars of huggingface_hub."""
    bars = importlib.import_module("huggingface_hub.utils")
    before = bars.are_progress_bars_disabled()
    if not before:
        bars.disable_progress_bars()
    try:
        yield
    finally:
        if not before:
            bars.enable_progress_bars()


@contextlib.contextmanager
def explained(what: str) -> Iterator[None]:
    """Every exception of the Hub's library becomes an `OSError` in one line, without the token."""
    try:
        yield
    except Refused as refused:
        raise refused.error from None
    except Exception as error:  # noqa: BLE001 - of the Hub's library, which may raise anything
        raise OSError(f"{what}: {without_token(why(error))}") from None


def why(error: BaseException) -> str:
    """The reason in an exception of the Hub's library."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    known = {
        401: "the token is not accepted (401); log in with `hf auth login`, or set HF_TOKEN",
        403: "the token has no right to write there (403)",
        404: "no such owner or repository, or no right to see it (404)",
        409: "a repository of this name was made meanwhile (409)",
        429: "too many requests (429); try again later",
    }
    if status in known:
        return known[status]
    if status is not None:
        return f"{SAYS} answers with status {status}"
    if type(error).__name__ == "OfflineModeIsEnabled":
        return "HF_HUB_OFFLINE is set"
    if isinstance(error, ValueError):
        return f"refused by huggingface_hub: {reason(error, 160)}"
    return f"{SAYS} cannot be reached: {reason(error, 160)}"


def without_token(text: str) -> str:
    """A text without the token, should a library have put it there."""
    token = None
    with contextlib.suppress(Exception):
        token = modules()[0].get_token()
    return text.replace(token, "***") if token else text
