"""Teachers straight from a library, without a bundle: `timm:NAME`, `hf-hub:OWNER/NAME`, `torchvision:NAME`.

Options follow a question mark, with `&` between them: `weights=random` (untrained, of `seed`) or `weights=FILE` (a
state dict); `num_classes`; `input=CHANNELSxHEIGHTxWIDTH`. Without `weights`, those of the library are read from its own
cache on this machine. They are fetched only if the caller says so. All files are read by `read_state_dict`, never
unpickled. Mean, std, input size and classes are those that the library states for the weights.
"""

import importlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dfkd_ray import models, untrusted
from dfkd_ray.bundles.matching import from_file
from dfkd_ray.bundles.weights import filled, read_state_dict
from dfkd_ray.description import BundleInfo
from dfkd_ray.models import libraries
from dfkd_ray.models.libraries import HUB, TIMM, TORCHVISION
from dfkd_ray.text import one_line

OPTIONS = ("weights", "num_classes", "input", "seed")
RANDOM = "random"
HUB_FILES = ("model.safetensors", "pytorch_model.bin")  # the first that a repository has
PIXELS = (0.0, 1.0)  # of the images that both libraries normalise
URL_HASH = re.compile(r"-([a-f0-9]{8,})\.")  # torch.hub: the first digits of the file's SHA-256 stand in its name
# What torchvision sets when it loads its own weights.
AS_TRAINED = {name: {"transform_input": True} for name in ("googlenet", "inception_v3")}
AUXILIARY = ("aux1.", "aux2.", "AuxLogits.")
OLD_DENSENET = re.compile(r"(.*denselayer\d+\.(?:norm|relu|conv))\.([12]\..*)")


@dataclass(frozen=True)
class Request:
    """The parts of a name. `weights`: "random", a file, or None for the library's own."""

    library: str
    network: str
    weights: str | None = None
    num_classes: int | None = None
    input: tuple[int, int, int] | None = None
    seed: int = 0

    @property
    def name(self) -> str:
        """The name without its options."""
        return f"{self.library}:{self.network}"


@dataclass(frozen=True)
class Known:
    """What a library states about a network's weights. `place`: of the weights, a Hub repository or a URL, or both."""

    architecture: str
    arguments: dict[str, Any]
    num_classes: int
    image_shape: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    class_names: tuple[str, ...] = ()
    repository: str | None = None
    url: str | None = None


def is_named(name: Any) -> bool:
    """Whether a teacher's name is one of a library's network."""
    return isinstance(name, str) and libraries.split(name) is not None


def parse(text: str) -> Request:
    """The parts of a name. `ValueError` for anything but the options above."""
    name, mark, query = text.partition("?")
    library, network = libraries.split(name) or ("", "")
    shown = one_line(text, 120)
    values: dict[str, str] = {}
    for part in query.split("&") if mark else ():
        option, equals, value = part.partition("=")
        if option not in OPTIONS or not equals or not value:
            raise ValueError(
                f"{shown}: {one_line(repr(part), 60)} is no option; expected NAME=VALUE with a name of "
                f"{', '.join(OPTIONS)}, and & between two"
            )
        if option in values:
            raise ValueError(f"{shown}: {option} is given twice")
        values[option] = value
    weights, shape = values.get("weights"), values.get("input")
    if "seed" in values and weights != RANDOM:
        raise ValueError(f"{shown}: seed goes with weights={RANDOM}")
    sides = tuple(whole(shown, "input", side) for side in shape.split("x")) if shape else None
    if sides is not None and len(sides) != 3:
        raise ValueError(f"{shown}: input is {one_line(shape, 60)}, expected CHANNELSxHEIGHTxWIDTH, as in 3x32x32")
    numbers = {option: whole(shown, option, values[option]) for option in ("num_classes", "seed") if option in values}
    return Request(library, network, weights, input=sides, **numbers)


def whole(shown: str, option: str, text: str) -> int:
    """A whole number of a name's option."""
    if not (text.isascii() and text.isdigit() and len(text) < 10):
        expected = "CHANNELSxHEIGHTxWIDTH, as in 3x32x32" if option == "input" else "a whole number"
        raise ValueError(f"{shown}: {option} is {one_line(repr(text), 60)}, expected {expected}")
    return int(text)


def load(text: str, *, download: bool = False) -> tuple[nn.Module, BundleInfo]:
    """A library's network with its weights, and its description without their hash.

    `ValueError` for a wrong name or option, for weights that are not on this machine unless `download`, or that do not
    fit. `OSError` if they cannot be fetched.
    """
    request = parse(text)
    about = known(request.library, request.network, download=download)
    info = described(request, about)
    of = {"num_classes": info.num_classes, "image_shape": info.image_shape}
    if request.weights == RANDOM:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(request.seed)
            return models.build(info.architecture, info.arguments, **of), info
    if request.weights is not None:
        return from_file(info, Path(request.weights))[0], info
    if request.library == TORCHVISION:
        path = from_url(request, about, download)
        state = plain_names(read_state_dict(path), about.architecture)
    else:
        path = from_hub(request, about, download) or from_url(request, about, download)
        state = converted(request, about, info, read_state_dict(path))
    return filled(info, state, str(path)), info


def known(library: str, network: str, *, download: bool = False) -> Known:
    """What a library states about one of its networks. `ValueError` for an unknown name."""
    if library == TORCHVISION:
        return of_torchvision(network)
    config: Mapping[str, Any]
    arguments: dict[str, Any] = {}
    if library == HUB:
        if libraries.cached(network, libraries.CONFIG) is None and download:
            fetch_from_hub(network, libraries.CONFIG)
        found = libraries.hub_config(network)
        name, arguments, config = found["architecture"], found["arguments"], found["config"]
        repository, url = network, None
    else:
        libraries.known(TIMM, network, f"{TIMM}:{network}")
        name, config = network, libraries.timm_config(network)
        repository, url = config.get("hf_hub_id"), config.get("url")
    try:
        labels = tuple(map(str, config.get("label_names") or ()))
        return Known(
            f"{TIMM}:{name}",
            arguments,
            int(config["num_classes"]),
            tuple(map(int, config["input_size"])),  # type: ignore[arg-type]
            tuple(map(float, config["mean"])),
            tuple(map(float, config["std"])),
            labels if len(labels) == config["num_classes"] else (),
            repository,
            url if isinstance(url, str) else None,
        )
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{library}:{network}: its config is none of timm's ({untrusted.reason(error)})") from None


def of_torchvision(network: str) -> Known:
    """What torchvision states about NAME, or NAME.WEIGHTS; without WEIGHTS, those that it recommends."""
    from torchvision import models as torchvision

    libraries.known(TORCHVISION, network, f"{TORCHVISION}:{network}")
    base, _, tag = network.partition(".")
    enum: Any = torchvision.get_model_weights(base)
    chosen = enum[tag] if tag else enum.DEFAULT
    preset = chosen.transforms()
    names = tuple(chosen.meta["categories"])
    return Known(
        f"{TORCHVISION}:{base}",
        {},
        len(names),
        (3, preset.crop_size[0], preset.crop_size[-1]),
        tuple(preset.mean),
        tuple(preset.std),
        names,
        url=chosen.url,
    )


def described(request: Request, about: Known) -> BundleInfo:
    """The description of a teacher, without the hash of its weights.

    `ValueError` for classes or channels other than those of the library's weights, where these are used.
    """
    shape = request.input or about.image_shape
    num_classes = about.num_classes if request.num_classes is None else request.num_classes
    mean, std, own = about.mean, about.std, request.weights is None
    if own and num_classes != about.num_classes:
        raise ValueError(
            f"{request.name}: its weights have {about.num_classes} classes, not num_classes={num_classes}: another "
            f"number of classes goes with weights={RANDOM} or weights=FILE"
        )
    if shape[0] != len(mean):
        if request.weights != RANDOM:
            raise ValueError(
                f"{request.name}: mean and std are known for {len(mean)} channels, not for input={shape[0]}x…; import "
                f"the file with `dfkd-ray teacher import`, and give mean and std there"
            )
        mean, std = ((sum(values) / len(values),) * shape[0] for values in (mean, std))
    trained_as = AS_TRAINED.get(about.architecture.partition(":")[2], {}) if own else {}
    data = {
        "architecture": about.architecture,
        "arguments": {**about.arguments, **trained_as},
        "num_classes": num_classes,
        "image_shape": shape,
        "mean": mean,
        "std": std,
        "pixel_range": PIXELS,
        "class_names": about.class_names if own else (),
        "trained": request.weights != RANDOM,
    }
    return untrusted.validated(BundleInfo, data, request.name)


def from_hub(request: Request, about: Known, download: bool) -> Path | None:
    """The weights file of a Hub repository; None if it is not cached and not to be fetched."""
    if about.repository is None:
        return None
    for file in HUB_FILES:
        found = libraries.cached(about.repository, file)
        if found is not None:
            return found
    if not download:
        if about.url is None:
            raise not_here(request, f"huggingface_hub's cache ({about.repository})")
        return None
    return fetch_from_hub(about.repository, *HUB_FILES)


def fetch_from_hub(repository: str, *files: str) -> Path:
    """The first of these files that a Hub repository has, fetched into the cache. `OSError` if that fails."""
    hub, errors = (importlib.import_module(name) for name in ("huggingface_hub", "huggingface_hub.errors"))
    name, _, revision = repository.partition("@")
    for file in files:
        try:
            return Path(hub.hf_hub_download(name, file, revision=revision or None))
        except errors.EntryNotFoundError:
            continue
        except Exception as error:  # noqa: BLE001 - of the network's library, which may raise anything
            raise OSError(f"{HUB}:{repository}: {file} cannot be fetched: {untrusted.reason(error)}") from None
    raise OSError(f"{HUB}:{repository}: it has no file {' or '.join(files)}")


def from_url(request: Request, about: Known, download: bool) -> Path:
    """The weights file of a URL in torch.hub's folder. `ValueError` if it is not there and not to be fetched."""
    if about.url is None:
        raise ValueError(f"{request.name}: the library has no weights for it; add ?weights=FILE or ?weights={RANDOM}")
    path = Path(torch.hub.get_dir()) / "checkpoints" / about.url.rpartition("/")[2]
    start = URL_HASH.search(path.name)
    if untrusted.plain_file(path) is None:
        if not download:
            hub = f"huggingface_hub's cache ({about.repository}) or " if about.repository else ""
            raise not_here(request, f"{hub}{path}")
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(about.url, str(path), start[1] if start else None, progress=False)
        except Exception as error:  # noqa: BLE001 - of the network's library, which may raise anything
            raise OSError(f"{request.name}: {about.url} cannot be fetched: {untrusted.reason(error)}") from None
    if start:
        with path.open("rb") as file:
            digest = sha256(file.read()).hexdigest()
        if not digest.startswith(start[1]):
            raise ValueError(f"{path}: its SHA-256 begins with {digest[:8]}, not as its name says; fetch it again")
    return path


def not_here(request: Request, where: str) -> ValueError:
    """The error for weights that are not on this machine."""
    return ValueError(
        f"{request.name}: its weights are not on this machine ({one_line(where, 160)}); fetch them with "
        f"`download`, or add ?weights=FILE or ?weights={RANDOM}"
    )


def converted(request: Request, about: Known, info: BundleInfo, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """timm's weights under the names of its networks: timm itself converts the files of other origin.

    `ValueError` if tensors of the network are missing: timm does not notice that in all of its networks.
    """
    of = {"num_classes": info.num_classes, "image_shape": info.image_shape}
    make, arguments = models.libraries.builder(about.architecture, about.arguments, **of)
    given = {"state_dict": state, "source": "", "num_classes": about.num_classes, "input_size": about.image_shape}
    with models.checks.guarded(f"{request.name} cannot be built"):
        names = make(**arguments).state_dict().keys()
    missing = [name for name in names if name not in state and not name.endswith("num_batches_tracked")]
    if missing and set(state) <= set(names):
        raise ValueError(f"{request.name}: its weights are not whole: {one_line(missing[0], 80)} is missing")
    try:
        network = make(**{**arguments, "pretrained": True, "pretrained_cfg_overlay": given})
    except Exception as error:  # noqa: BLE001 - timm's conversions expect their own files
        line = one_line(" ".join(str(error).split()) or type(error).__name__, 200)
        raise ValueError(f"{request.name}: its weights do not fit: {line}") from None
    return network.state_dict()


def plain_names(state: Mapping[str, Tensor], architecture: str) -> dict[str, Tensor]:
    """torchvision's weights under today's names and without auxiliary heads.

    Its files of 2017 have other names in DenseNets, and no counts of batches: PyTorch had none.
    """
    densenet = architecture.startswith(f"{TORCHVISION}:densenet")
    own = {}
    for name, tensor in state.items():
        if not name.startswith(AUXILIARY):
            old = OLD_DENSENET.fullmatch(name) if densenet else None
            own["".join(old.groups()) if old else name] = tensor
    for name in [name for name in own if name.endswith(".running_mean")]:
        own.setdefault(name.removesuffix("running_mean") + "num_batches_tracked", torch.tensor(0))
    return own
