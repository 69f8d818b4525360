"""Finds the weights of a network among the state dicts of a file, by the names and shapes of the network's own tensors.

Training scripts put weights below keys ({"state_dict": …}), and wrappers put prefixes before names (`module.`,
`_orig_mod.`, `model.`), in the file or in the network. No list of these is needed: a part of the file fits if its names
are the network's, once a prefix is taken off and one that all names of the network have is put on. If several parts fit
with different values, none is guessed, except that averages over training steps yield to plain weights.

What PyTorch's strict loading takes is taken: files without BatchNorm's counters (from before PyTorch 0.4.1), and with
one name only for tensors that have several (safetensors' `save_model`).
"""

import difflib
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from dfkd_ray import models
from dfkd_ray.bundles.weights import check_head, filled, kind_problem, load_state, read_state_dicts, shape_problems
from dfkd_ray.compression import shape_edits
from dfkd_ray.description import BundleInfo
from dfkd_ray.text import one_line

MAX_PREFIX = 16  # components of a name
MAX_FITS = 20  # sets of weights that are told apart
MAX_SHOWN = 3  # names in a message
MAX_COMPARED = 1000  # names among which the nearest are looked for
COUNTER = "num_batches_tracked"  # of BatchNorm; no output in eval mode depends on it
# Components that wrappers put anywhere into names: DataParallel, torch.compile, FSDP, activation checkpointing.
WRAPPERS = {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
# Words in keys and prefixes that mark averages of the weights over training steps.
AVERAGED = {"ema", "swa", "avg", "average", "averaged", "shadow"}
# DenseNet's names in files from before PyTorch 0.4. Source: torchvision/models/densenet.py, `_load_state_dict`.
OLD_DENSENET = re.compile(r"(denselayer\d+\.(?:norm|relu|conv))\.([12]\.)")


@dataclass(frozen=True)
class Match:
    """A network's state dict from a file, and what the user should know of where it was found.

    `others`: the places of averaged weights that fit too, with other values.
    """

    state: dict[str, Tensor]
    notes: tuple[str, ...]
    others: tuple[str, ...] = ()


@dataclass(frozen=True)
class Part:
    """A part of a file: of the state dict at `key`, the names that begin with `prefix`.

    `names`: the network's name → the file's, which has `own_prefix` in place of `prefix`. `num_extra`: how many names
    of the part are not the network's.
    """

    key: str
    prefix: str
    own_prefix: str
    names: dict[str, str]
    num_extra: int

    @property
    def place(self) -> str:
        """The keys and the prefix that lead to it, joined by dots."""
        return ".".join(filter(None, (self.key, self.prefix.removesuffix("."))))


def from_file(info: BundleInfo, path: Path, weights_key: str | None = None) -> tuple[nn.Module, Match]:
    """The network of a description with the weights of a file (see `match`), checked and adapted."""
    network, found = from_states(info, read_state_dicts(path), str(path), weights_key)
    if models.module_of(info.architecture):
        check_again(network, info, str(path))
    return network, found


def from_states(
    info: BundleInfo, states: Mapping[str, Mapping[str, Tensor]], where: str, weights_key: str | None = None
) -> tuple[nn.Module, Match]:
    """As `from_file`, of the state dicts of a file. Names may also be those of the network after it was adapted."""
    of = {"num_classes": info.num_classes, "image_shape": info.input_shape}
    network = shape_edits.replay(
        models.build(info.architecture, info.arguments, finished=False, **of), info.shape_edits
    )
    try:
        found = match(network, states, where, weights_key)
    except ValueError:
        models.finish(network, info.architecture, **of)
        if set(network.state_dict()) not in map(set, states.values()):
            raise
        found = match(network, states, where, weights_key)
        load_state(network, found.state, where)
    else:
        load_state(network, found.state, where)
        models.finish(network, info.architecture, **of)
    check_head(network, info.head)
    return network, found


def check_again(network: nn.Module, info: BundleInfo, where: str) -> None:
    """`ValueError` if the user's code makes another network of the same weights when it is called again."""
    again = filled(info, network.state_dict(), where)
    images = models.adapting.random_images(info.image_shape)
    with torch.no_grad(), models.adapting.quiet_generator():
        is_same = torch.equal(network(images).nan_to_num(), again(images).nan_to_num())
    if not is_same:
        raise ValueError(
            f"{models.checks.shown(info.architecture)}: called again, it gives another network, although the weights "
            "are the same (random values that are no persistent buffers, or counted calls?): no bundle holds them"
        )


def match(
    network: nn.Module, states: Mapping[str, Mapping[str, Tensor]], where: str, weights_key: str | None = None
) -> Match:
    """The network's state dict from the state dicts of a file (`weights.read_state_dicts`).

    `weights_key`: take what lies at this place or below it. `ValueError` if nothing fits (it shows the nearest names),
    or if several parts with different values do.
    """
    where, own = one_line(where, 120), network.state_dict()
    twins = names_of_same_memory(own)
    fewest = len({frozenset((name, *twins[name])) for name in own if not is_counter(name)})
    at = "" if weights_key is None else f" at {shown(weights_key)}"
    parts: list[Part] = []
    fits: list[tuple[Part, dict[str, Tensor]]] = []
    for respell in (str, respelled):  # `str`: names as they are
        found = [part for key, state in states.items() for part in parts_of(own, key, state, respell)]
        found = [part for part in found if weights_key is None or lies_at(part.place, weights_key)]
        whole = [part for part in found if len(part.names) >= fewest]
        for part in whole:
            if len(fits) > MAX_FITS or (part.num_extra and num_left_over(part, whole)):
                continue
            state = taken(own, part, states[part.key], twins)
            fit = len(state) == len(own) and not shape_problems(own, state)
            if fit and not any(same(state, other, own) for _, other in fits):
                fits.append((part, state))
        parts += found
    if not fits:
        problem = misfit(own, parts, states, twins)
        raise ValueError(f"{where}: does not fit the architecture or class count{at}: {one_line(problem, 200)}")
    plain = [fit for fit in fits if not is_averaged(fit[0], states[fit[0].key])]
    if len(fits) > 1 and len(plain) != 1:
        places = some([part.place for part, _ in fits])
        raise ValueError(
            f"{where}: several sets of weights with different values fit{at} ({places}); name the one to take, "
            f"as in `weights_key={one_line(fits[0][0].place, 60)}`"
        )
    part, state = plain[0] if plain else fits[0]
    for name, names in twins.items():
        for twin in names:
            if not same({name: state[name]}, {name: state[twin]}, own):
                raise ValueError(f"{where}: {shown(name)} and {shown(twin)} differ: they are one tensor of the network")
    others = tuple(other.place for other, _ in fits if other is not part)
    return Match(state, tuple(notes(own, part, states)), others)


def parts_of(
    own: Mapping[str, Tensor], key: str, state: Mapping[str, Tensor], respell: Callable[[str], str]
) -> list[Part]:
    """The parts of a state dict that have any name of the network's, after both are respelled."""
    targets = {respell(name): name for name in own}
    given = {respell(name): name for name in state}
    if len(targets) < len(own) or len(given) < len(state):  # respelled, two names would be one
        return []
    shared = [prefix for prefix in prefixes(min(targets, default="")) if all(map(begins(prefix), targets))]
    names: dict[tuple[str, str], dict[str, str]] = defaultdict(dict)
    sizes: Counter[str] = Counter()  # of parts, without BatchNorm's counters, which frozen BatchNorm lacks
    for spelled, name in given.items():
        for prefix in prefixes(spelled):
            sizes[prefix] += not is_counter(name)
            for own_prefix in shared:
                target = targets.get(own_prefix + spelled[len(prefix) :])
                # A prefix that both have is no difference between them.
                if target is not None and not (own_prefix and f".{prefix}".endswith(f".{own_prefix}")):
                    names[prefix, own_prefix][target] = name
    return [
        Part(key, prefix, own_prefix, found, sizes[prefix] - sum(not is_counter(name) for name in found))
        for (prefix, own_prefix), found in names.items()
    ]


def num_left_over(part: Part, whole: Sequence[Part]) -> int:
    """The names below a part's prefix that belong neither to it nor to another whole set of weights below it."""
    below = [
        one for one in whole if one.key == part.key and one.prefix != part.prefix and begins(part.prefix)(one.prefix)
    ]
    others = {name for one in below for name in one.names.values() if not is_counter(name)}
    return part.num_extra - len(others - set(part.names.values()))


def taken(
    own: Mapping[str, Tensor], part: Part, state: Mapping[str, Tensor], twins: Mapping[str, list[str]]
) -> dict[str, Tensor]:
    """The network's tensors that a part gives: under their own name, that of a twin, or a counter's default, 0."""
    found = {}
    for name, tensor in own.items():
        source = next((part.names[twin] for twin in (name, *twins[name]) if twin in part.names), None)
        if source is not None:
            found[name] = state[source]
        elif is_counter(name):
            found[name] = torch.zeros_like(tensor)
    return found


def names_of_same_memory(own: Mapping[str, Tensor]) -> dict[str, list[str]]:
    """For each tensor the names of the others that are the same memory (modules under two names, tied weights)."""
    places = {name: (t.data_ptr(), t.shape, t.stride()) if t.numel() else name for name, t in own.items()}
    names = defaultdict(list)
    for name, place in places.items():
        names[place].append(name)
    return {name: [twin for twin in names[place] if twin != name] for name, place in places.items()}


def same(state: Mapping[str, Tensor], other: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> bool:
    """Whether two state dicts of the network have the same values."""
    for name, tensor in state.items():
        twin = other[name]
        plain = tensor.dtype == twin.dtype and not (kind_problem(tensor, own[name]) or kind_problem(twin, own[name]))
        if tensor is not twin and not (plain and torch.equal(tensor, twin)):
            return False
    return True


def notes(own: Mapping[str, Tensor], part: Part, states: Mapping[str, Mapping[str, Tensor]]) -> Iterator[str]:
    """What the user should know: which part of the file was taken under which names, and what is not in it."""
    said = []
    if part.key:
        said.append(f"those at {shown(part.key)}")
    if part.prefix:
        said.append(f"without the prefix {shown(part.prefix)}")
    if part.own_prefix:
        said.append(f"with the network's prefix {shown(part.own_prefix)}")
    news = {name: old for name, old in part.names.items() if not old.endswith(name.removeprefix(part.own_prefix))}
    if news:
        name, old = next(iter(news.items()))
        said.append(f"{len(news)} under other names ({shown(old)} as {shown(name)})")
    num_tensors = sum(len(state) for state in states.values())
    left_out = num_tensors - len(set(part.names.values()))
    if said or left_out:
        said += [f"{left_out} left out"] if left_out else []
        yield f"of the file's {num_tensors} tensors, {len(part.names)} are taken: {', '.join(said)}"
    missing = [name for name in own if name not in part.names]
    num_counters = sum(map(is_counter, missing))
    if num_counters:
        yield f"{num_counters} {COUNTER} are not in the file: set to 0"
    if len(missing) > num_counters:
        yield f"{len(missing) - num_counters} tensors are in the file under another of their names"


def misfit(
    own: Mapping[str, Tensor],
    parts: Iterable[Part],
    states: Mapping[str, Mapping[str, Tensor]],
    twins: Mapping[str, list[str]],
) -> str:
    """Why no part fits: the differences of the part that has most names of the network's."""
    best = max(parts, key=lambda part: (len(part.names), -part.num_extra), default=None)
    if best is None:
        found = list(max(states.values(), key=len, default={}))
        at = "" if len(states) < 2 else f" at {some(states)}"
        wanted = some(nearest(found, list(own)))
        return f"its names ({some(found)}{at}) are none of the network's; expected names such as {wanted}"
    state = taken(own, best, states[best.key], twins)
    missing = [name for name in own if name not in state]
    within = [name for name in states[best.key] if begins(best.prefix)(name) or begins(best.prefix)(respelled(name))]
    extra = [name for name in within if name not in best.names.values() and not is_counter(name)]
    said = [f"{len(missing)} of {len(own)} names are missing ({some(missing)})"] if missing else []
    said += [f"{len(extra)} are not of it ({some(nearest(missing, extra))})"] if extra else []
    shapes = shape_problems(own, state)
    if not said:
        said = [shapes[0] + (f" (and {len(shapes) - 1} more)" if len(shapes) > 1 else "")]
    return ", ".join(said) + (f"; at {shown(best.place)}" if best.place else "")


def nearest(wanted: list[str], names: list[str]) -> list[str]:
    """The names that are most like the first wanted one; in their order if none is wanted."""
    short = [one_line(name, 60) for name in names[:MAX_COMPARED]]
    return difflib.get_close_matches(one_line(wanted[0], 60), short, MAX_SHOWN, 0.0) if wanted and short else short


def some(names: Iterable[str]) -> str:
    """The first few names, for a message."""
    found = list(names)
    return ", ".join(map(shown, found[:MAX_SHOWN])) + (", …" if len(found) > MAX_SHOWN else "")


def shown(name: str) -> str:
    """A name from a file, for a message."""
    return repr(one_line(name, 60)) if not name or name.endswith(".") else one_line(name, 60)


def is_averaged(part: Part, state: Mapping[str, Tensor]) -> bool:
    """Whether a part holds averages over training steps, by its place or by the counter of PyTorch's AveragedModel."""
    return "n_averaged" in state or not AVERAGED.isdisjoint(re.split(r"[^a-z]+", part.place.lower()))


def is_counter(name: str) -> bool:
    """Whether a name is that of BatchNorm's counter."""
    return name.rpartition(".")[2] == COUNTER


def lies_at(place: str, wanted: str) -> bool:
    """Whether a place is the one wanted, or below it."""
    return f"{place}.".startswith(f"{wanted.removesuffix('.')}.") if wanted else not place


def begins(prefix: str) -> Callable[[str], bool]:
    """Whether names begin with a prefix."""
    return lambda name: name.startswith(prefix)


def respelled(name: str) -> str:
    """A name without the components of wrappers, and as today's DenseNet has it."""
    return OLD_DENSENET.sub(r"\1\2", ".".join(part for part in name.split(".") if part not in WRAPPERS))


def prefixes(name: str) -> Iterator[str]:
    """The prefixes that end before one of a name's first components."""
    yield ""
    dot = -1
    for _ in range(MAX_PREFIX):
        dot = name.find(".", dot + 1)
        if dot < 0:
            return
        yield name[: dot + 1]
