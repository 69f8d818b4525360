"""Compares the rows of a sweep's trials with the ranges that its file expects.

Only rows of the file's own trials count: a row with other settings (`tiny`, another effort, a changed field) says
nothing about the ranges. Of several versions of the algorithms only the newest counts.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import pandas as pd

from dfkd_ray import bundles, storage
from dfkd_ray.bundles import Teacher
from dfkd_ray.config import DeepInversionConfig, TrialConfig, columns_of, follows, parsing
from dfkd_ray.config.fields import AUTO
from dfkd_ray.plain import given
from dfkd_ray.results import selecting
from dfkd_ray.results.metrics import metric
from dfkd_ray.sweep.combinations import expand
from dfkd_ray.sweep.expectations import NUM_NAMED, Columns, Expectation, matched
from dfkd_ray.sweep.sweep_config import SETTINGS, SweepConfig, parse
from dfkd_ray.synthesis import deepinversion
from dfkd_ray.text import is_null
from dfkd_ray.trial import identity

IGNORED = ("device",)  # what was asked for; `numerics` in the row says what was used


@dataclass(frozen=True)
class Finding:
    """What the rows say of one expectation. `num`: trials with the metric, of `num_trials` that the sweep has.

    `state`: `ok`, `off`, or `no rows` where no trial of it has finished with the metric.
    """

    expectation: Expectation
    state: Literal["ok", "off", "no rows"]
    mean: float | None
    std: float | None
    num: int
    num_trials: int
    num_failed: int


@dataclass(frozen=True)
class Checked:
    """The findings of a sweep; `num_trials` of it, `num_finished` of them in the rows, and rows that did not count.

    `not_opened`: teachers, without secrets, whose rows count whatever they have where a field is `auto`: what it stands
    for is not known without them.
    """

    findings: list[Finding]
    num_trials: int
    num_finished: int
    num_others: int
    num_older: int
    not_opened: tuple[str, ...] = ()

    @property
    def is_met(self) -> bool:
        """Whether all expectations are."""
        return all(one.state == "ok" for one in self.findings)


def settings_in(place: storage.Where) -> SweepConfig:
    """The sweep file that ran in a results place last. `ValueError` if there is none."""
    folder = storage.folder(place)
    if not 0 < (folder.size(SETTINGS) or 0) <= parsing.MOST_BYTES:
        raise ValueError(f"{folder}: it has no {SETTINGS} that says which sweep ran there; give the file with `sweep`")
    text = (folder.read(SETTINGS) or b"").decode(errors="replace")
    data = parsing.parse_yaml(text, str(folder / SETTINGS))
    return parse(data if isinstance(data, dict) else {}, str(folder / SETTINGS))


def without_ranges(settings: SweepConfig, why: str) -> SweepConfig:
    """A sweep file whose ranges, which hold for other settings, are replaced by a sentence."""
    if settings.about is None or not isinstance(settings.about.expected, list):
        return settings
    return settings.model_copy(update={"about": settings.about.model_copy(update={"expected": why})})


def ranges_of(settings: SweepConfig) -> list[Expectation]:
    """The ranges of a sweep file. `ValueError` if it has none."""
    expected = settings.about.expected if settings.about else None
    if not isinstance(expected, list):
        raise ValueError("about.expected: expected a list of ranges to check, and it is a sentence, or not there")
    return expected


def check(
    settings: SweepConfig, trials: pd.DataFrame, open_teacher: Callable[[str], Teacher] = bundles.load
) -> Checked:
    """Compare the rows of a sweep's own trials with its ranges.

    `open_teacher` is asked for the teachers whose statistics give a trial its BatchNorm weight. `ValueError` if the
    file has no ranges, if one of them is of no trial or of trials that differ in more than seeds, or if no row is of
    one of the file's own trials.
    """
    ranges = ranges_of(settings)
    teacher_of = cache(lambda name: opened(name, open_teacher))
    expanded = expand(settings, {})
    configs = [columns_of(numbered(config, teacher_of)) for config in expanded]
    as_written = [columns_of(config) for config in expanded]  # a range says `auto` where the file does
    wanted = [matched(one, as_written, f"about.expected.{index}") for index, one in enumerate(ranges)]
    place_of = recogniser(configs)
    found = pd.Series([place_of(row) for row in trials.to_dict("records")], trials.index, dtype=object)
    own = trials.loc[found.notna()]
    if own.empty:
        tiny = expand(settings, {}, tiny=True) if settings.tiny else []
        raise ValueError(why_none([columns_of(numbered(config, teacher_of)) for config in tiny], trials, configs))
    version = own[list(selecting.ALGORITHMS)].fillna(0).apply(tuple, axis=1)
    is_newest = version == version.max()
    current = own.loc[is_newest].assign(place=found)
    findings = [finding(one, current, places) for one, places in zip(ranges, wanted, strict=True)]
    num_finished = current.loc[current["status"] == "finished", "place"].nunique()
    asked = dict.fromkeys(config.teacher for config in expanded if asks_teacher(config))
    unknown = tuple(storage.public_name(name) for name in asked if teacher_of(name) is None)
    return Checked(findings, len(configs), num_finished, len(trials) - len(own), int((~is_newest).sum()), unknown)


def asks_teacher(config: TrialConfig) -> bool:
    """Whether a field goes by its teacher: a BatchNorm weight, or how a student with fewer channels learns."""
    kd = config.distillation
    weights = [getattr(own, "bn_weight", None) for own in (config.synthesis, config.reference.synthesis)]
    return AUTO in weights or (identity.may_be_paired(config) and AUTO in (kd.bn_mode, kd.learning_rate))


def opened(name: str, open_teacher: Callable[[str], Teacher]) -> Teacher | None:
    """A teacher; None if it cannot be opened here."""
    try:
        return open_teacher(name)
    except (OSError, ValueError):
        return None


def numbered(config: TrialConfig, teacher_of: Callable[[str], Teacher | None]) -> TrialConfig:
    """A trial's config with what `auto` stands for, as its row has it; what only its teacher knows stays without it."""
    teacher = teacher_of(config.teacher) if asks_teacher(config) else None
    if teacher is not None or not identity.may_be_paired(config):
        config = config.model_copy(update={"distillation": identity.settled(config, teacher)})
    if teacher is None:
        return config
    own, held_out = (
        deepinversion.pin(teacher, each) if isinstance(each, DeepInversionConfig) else each
        for each in (config.synthesis, config.reference.synthesis)
    )
    reference = config.reference.model_copy(update={"synthesis": held_out})
    return config.model_copy(update={"synthesis": own, "reference": reference})


def recogniser(configs: Sequence[Columns]) -> Callable[[Columns], int | None]:
    """The place of the config that a row's trial has; None for a row of none of them.

    A row may have any value where its own config says `auto`; a config that says the value itself goes before.
    """
    places: dict[tuple[str, ...], dict[tuple[Any, ...], int]] = {}  # by the fields that are compared
    for place, config in enumerate(configs):
        names = compared(config)
        places.setdefault(names, {})[key(config, names)] = place
    kinds = sorted(places, key=len, reverse=True)

    def place_of(row: Columns) -> int | None:
        found = (places[names].get(key(row, names)) for names in kinds)
        return next((place for place in found if place is not None), None)

    return place_of


def compared(config: Columns) -> tuple[str, ...]:
    """The columns by which a config's rows are recognised: all fields but those that are known only where it runs."""
    names = [name for name in selecting.config_fields() if name not in IGNORED and not follows(name)]
    return tuple(name for name in names if config.get(name) != AUTO)


def key(row: Columns, names: Sequence[str]) -> tuple[Any, ...]:
    """The values of these columns, equal for a config and the row of its trial."""
    return tuple(plain_value(name, row.get(name)) for name in names)


def plain_value(name: str, value: Any) -> Any:
    """A value as a config and a row have it: null as None, numbers as floats, names without secrets."""
    if is_null(value):
        return None
    if isinstance(value, str):
        return storage.public_name(value) if name in ("teacher", "student.weights") else value
    return bool(value) if type(value).__name__.startswith("bool") else float(value)


def why_none(tiny: Sequence[Columns], trials: pd.DataFrame, configs: Sequence[Columns]) -> str:
    """Why no row is of a trial of the sweep: a run of its tiny size, or the fields in which the nearest row differs."""
    what = f"none of the {len(trials)} rows is of a trial of the sweep"
    if trials.empty:
        return "there are no rows yet"
    rows = trials.to_dict("records")
    is_tiny = recogniser(tiny)
    if any(is_tiny(row) is not None for row in rows):
        return f"{what}: they are of its tiny size, which the ranges say nothing about"
    differing = [
        [name for name in compared(config) if key(rows[0], [name]) != key(config, [name])] for config in configs
    ]
    nearest = min(differing, key=len)
    more = ", …" if len(nearest) > NUM_NAMED else ""
    return f"{what}: the first differs in {', '.join(nearest[:NUM_NAMED])}{more}"


def finding(one: Expectation, rows: pd.DataFrame, places: Sequence[int]) -> Finding:
    """What rows with the `place` of their config say of an expectation."""
    own = rows.loc[rows["place"].isin(places)]
    done = own.loc[own["status"] == "finished"]
    num_failed = len(own) - len(done)
    of = metric(one.metric)
    values = of.of(done if one.of == "mean" else done.dropna(subset=["reference_kl"])).dropna()
    done = done.loc[values.index]
    for column in ("teacher_hash", *(["test_sha256"] if of.is_tested else [])):
        if done[column].nunique(dropna=False) > 1:
            raise ValueError(f"{given(one.where)}: its rows differ in {column}, and cannot be compared")
    if one.of == "best":
        values = values.loc[done.sort_values("reference_kl", kind="stable").index[:1]]
    if values.empty:
        return Finding(one, "no rows", None, None, 0, len(places), num_failed)
    mean, std = float(values.mean()), float(values.std()) if len(values) > 1 else None
    state = "ok" if one.holds(mean) else "off"
    return Finding(one, state, mean, std, len(done), len(places), num_failed)
