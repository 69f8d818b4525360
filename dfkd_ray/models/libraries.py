"""Networks of installed libraries, by the library's own name: `timm:NAME`, `hf-hub:OWNER/NAME`, `torchvision:NAME`.

They are built with the library's own factory, without weights. A network of the Hugging Face Hub is one of timm's,
whose name and arguments are in the repository's `config.json`. Nothing is downloaded here, and no argument of a factory
that fetches or reads weights is passed on: a bundle from elsewhere names only the structure of a network.
"""

import difflib
import importlib
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn

from dfkd_ray import untrusted
from dfkd_ray.models.checks import require_images, shown
from dfkd_ray.text import one_line

TIMM, HUB, TORCHVISION = "timm", "hf-hub", "torchvision"
LIBRARIES = (TIMM, HUB, TORCHVISION)
REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+(@[\w./-]+)?")  # OWNER/NAME, or OWNER/NAME@REVISION
CONFIG = "config.json"
# Arguments of the libraries' factories that are not the network's structure.
NOT_STRUCTURE = re.compile(
    "num_classes|in_chans|(pretrained|weights).*|checkpoint_path|cache_dir|scriptable|exportable|no_jit|"
    "features_only|feature_cfg|out_indices|progress|device|dtype"
)
# Without auxiliary heads, which no student uses; and the initial weights that torchvision announces as its default.
TORCHVISION_DEFAULTS = {name: {"aux_logits": False, "init_weights": False} for name in ("googlenet", "inception_v3")}


def split(architecture: str) -> tuple[str, str] | None:
    """The library and the name in it; None for an architecture that is of no library."""
    library, colon, name = architecture.partition(":")
    return (library, name) if colon and library in LIBRARIES else None


def timm() -> ModuleType:
    """The library timm; `ValueError` if it is not installed."""
    try:
        return importlib.import_module("timm")
    except ImportError as error:
        raise ValueError(
            "networks by `timm:` and `hf-hub:` need the library timm, which cannot be imported "
            f"({one_line(error, 80)}): pip install 'dfkd_ray[timm]'"
        ) from None


def known(library: str, name: str, called: str) -> None:
    """`ValueError` with close matches for a name that timm or torchvision does not have; `called`: the whole name."""
    base, dot, tag = name.partition(".")
    names, tags = (timm_names if library == TIMM else torchvision_names)(base)
    what = f"unknown network {one_line(called, 80)!r}"
    if base not in names:
        close = [f"{library}:{found}" for found in difflib.get_close_matches(base, names, 5)]
        raise ValueError(
            f"{what}: {library} has no such network; "
            + (f"close ones: {', '.join(close)}" if close else f"{len(names):,} names are in its list_models()")
        )
    if dot and tag not in tags:
        found = ", ".join(f"{base}.{tag}" for tag in tags) or "none"
        raise ValueError(f"{what}: {library}'s {base} has no weights of that name; it has {one_line(found, 160)}")


def timm_names(base: str) -> tuple[list[str], list[str]]:
    """All names of timm's networks, and the names of one's weights."""
    library = timm()
    tagged = library.list_models(f"{base}.*", pretrained=True) if library.is_model(base) else []
    return library.list_models(), [name.partition(".")[2] for name in tagged]


def torchvision_names(base: str) -> tuple[list[str], list[str]]:
    """All names of torchvision's classification networks, and the names of one's weights."""
    from torchvision import models

    names = models.list_models(module=models)
    return names, [weights.name for weights in models.get_model_weights(base)] if base in names else []


def structure(architecture: str, arguments: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """An architecture and its arguments without a reference to the Hub: `timm:NAME` in the place of `hf-hub:…`.

    A bundle stores this form, which needs no cache. `ValueError` if the repository's `config.json` is not cached here.
    """
    found = split(architecture)
    if found is None or found[0] != HUB:
        return architecture, dict(arguments)
    described = hub_config(found[1])
    return f"{TIMM}:{described['architecture']}", {**described["arguments"], **arguments}


def builder(
    architecture: str, arguments: Mapping[str, Any], num_classes: int, image_shape: Sequence[int]
) -> tuple[Callable[..., nn.Module], dict[str, Any]]:
    """The factory of a library's network and its keyword arguments. `ValueError` for what the library does not have."""
    architecture, given = structure(architecture, arguments)
    library, name = split(architecture) or ("", "")
    known(library, name, architecture)
    require_images(architecture, image_shape)
    wrong = sorted(argument for argument in given if NOT_STRUCTURE.fullmatch(argument))
    if wrong:
        raise ValueError(f"{shown(architecture)}: {one_line(wrong[0], 60)} is no argument of a network's structure")
    if library == TIMM:
        own = timm_arguments(name, image_shape)
        make = partial(timm().create_model, name, pretrained=False)
        return make, {"num_classes": num_classes, "in_chans": image_shape[0], **own, **given}
    from torchvision import models

    base = name.partition(".")[0]
    own = torchvision_arguments(base, architecture, image_shape)
    return partial(models.get_model, base, weights=None), {"num_classes": num_classes, **own, **given}


def timm_arguments(name: str, image_shape: Sequence[int]) -> dict[str, Any]:
    """The image size, for a network of timm's that is built for one size, if it is not the network's own."""
    config = timm_config(name)
    sides = tuple(image_shape[1:])
    return {"img_size": sides} if config.get("fixed_input_size") and sides != tuple(config["input_size"][1:]) else {}


def timm_config(name: str) -> dict[str, Any]:
    """What timm knows of a network (`pretrained_cfg`): input size, mean, std, classes, places of its weights."""
    config = timm().models.get_pretrained_cfg(name)
    return {"input_size": (3, 224, 224), **(config.to_dict() if config else {})}


def torchvision_arguments(base: str, architecture: str, image_shape: Sequence[int]) -> dict[str, Any]:
    """The image size, for torchvision's networks of one size; `ValueError` for other than 3 channels."""
    channels, height, width = image_shape
    if channels != 3:
        raise ValueError(
            f"{shown(architecture)}: torchvision's networks take 3 channels, not {channels}; timm's take any "
            f"({TIMM}:NAME)"
        )
    if base.startswith("vit_"):
        if height != width:
            raise ValueError(f"{shown(architecture)} takes square images, not {height}x{width}")
        return {"image_size": height}
    return {"input_size": (height, width)} if base.startswith("maxvit_") else TORCHVISION_DEFAULTS.get(base, {})


def cached(repository: str, file: str) -> Path | None:
    """A file of a Hub repository (OWNER/NAME or OWNER/NAME@REVISION) in this machine's cache; None if it is not there.

    The cache is huggingface_hub's own (`HF_HOME`); nothing is downloaded. `ValueError` for another form of name.
    """
    if not REPOSITORY.fullmatch(repository):
        raise ValueError(f"{HUB}:{one_line(repository, 80)}: expected {HUB}:OWNER/NAME")
    timm()  # it needs the Hub's library, and says so
    hub = importlib.import_module("huggingface_hub")
    owner_and_name, _, revision = repository.partition("@")
    try:
        found = hub.try_to_load_from_cache(owner_and_name, file, revision=revision or None)
    except (ValueError, OSError) as error:
        raise ValueError(f"{HUB}:{repository}: {untrusted.reason(error)}") from None
    return Path(found) if isinstance(found, str) else None


def hub_config(repository: str) -> dict[str, Any]:
    """`architecture`, `arguments` and `config` (timm's `pretrained_cfg`) of a Hub repository, from its cached file."""
    called, path = f"{HUB}:{repository}", cached(repository, CONFIG)
    if path is None:
        raise ValueError(
            f"{one_line(called, 80)}: its {CONFIG} is not in this machine's cache; a teacher of that name fetches it "
            f"with `download`, or fetch it with `hf download {one_line(repository.partition('@')[0], 80)}`"
        )
    found = untrusted.plain_file(path)
    untrusted.check_size(found.st_size if found else 0, untrusted.MAX_JSON_BYTES, called)
    data = untrusted.parse_json(path.read_bytes(), f"{called}: {CONFIG}")
    name = data.get("architecture") if isinstance(data, dict) else None
    if not isinstance(name, str):
        raise ValueError(
            f"{one_line(called, 80)}: its {CONFIG} names no network of timm's; load it with its own library in Python, "
            "and give it to dfkd_ray.recover"
        )
    config, arguments = data.get("pretrained_cfg", data), data.get("model_args") or {}
    if not isinstance(config, dict) or not isinstance(arguments, dict):
        raise ValueError(f"{one_line(called, 80)}: its {CONFIG} is none of timm's")
    labels = data.get("label_names") or config.get("label_names") or config.get("labels")
    own = {"num_classes": data.get("num_classes", config.get("num_classes")), "label_names": labels}
    channels, *sides = config.get("input_size") or (3, 224, 224)
    if isinstance(given := arguments.get("img_size"), int | list):
        sides = [given, given] if isinstance(given, int) else given
    own["input_size"] = [arguments.get("in_chans", channels), *sides]
    kept = {key: value for key, value in arguments.items() if key not in ("num_classes", "in_chans", "img_size")}
    return {"architecture": name, "arguments": kept, "config": {**config, **{k: v for k, v in own.items() if v}}}
