"""Parses the user's YAML, JSON and `FIELD=VALUE` texts into plain data, with bounds on size and depth.

`ValueError` has one line with place and problem. YAML is version 1.1 with these differences: `1e-3` is a number; `1:30`
and dates are text; `010`, duplicate keys, keys that are not text, and tags are refused.
"""

import errno
import json
import os
import re
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import yaml

from dfkd_ray.plain import MOST_DEPTH, SHOWN, alike, cut, fault, given, named, text_fault
from dfkd_ray.text import shortened
from dfkd_ray.text import shown as printable

MOST_BYTES = 1_000_000  # of a file or a value
MOST_VALUES = 1_000_000  # of a file, with aliases expanded
MOST_DIGITS = 1000

# Written in C where PyYAML has it, fifty times as fast; their events are the same.
LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
NULL = re.compile(r"~|null|Null|NULL|")
TRUE = re.compile(r"yes|Yes|YES|true|True|TRUE|on|On|ON")
FALSE = re.compile(r"no|No|NO|false|False|FALSE|off|Off|OFF")
WHOLE = re.compile(r"[-+]?(0|[1-9][0-9_]*|0x[0-9a-fA-F_]+|0b[01_]+)")
OCTAL = re.compile(r"[-+]?0[0-9_]+")
REAL = re.compile(r"[-+]?(\.[0-9][0-9_]*|[0-9][0-9_]*(\.[0-9_]*)?)([eE][-+]?[0-9]+)?")
NOT_FINITE = re.compile(r"([-+]?)\.(inf|Inf|INF|nan|NaN|NAN)")
PLAIN_TAGS = (None, "!", "tag:yaml.org,2002:str", "tag:yaml.org,2002:map", "tag:yaml.org,2002:seq")
MERGE = "<<"


def read_text(path: Path, most: int = MOST_BYTES, kind: str = "YAML") -> str:
    """Read a text file. `ValueError` if it is missing, not a regular file, larger than `most` bytes, or not UTF-8.

    `kind` is what such a file is called in that case.
    """
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            found = "a folder" if path.is_dir() else "no regular file"
            raise ValueError(f"{named(path)}: {found}; expected a file")
        # The size is not checked beforehand: system files report none and may be endless.
        with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb") as file:
            data = file.read(most + 1)
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG, errno.ELOOP):
            raise ValueError(f"{named(path)}: no such file") from None
        raise
    except ValueError as error:
        if "null" in str(error) or isinstance(error, UnicodeError):  # characters that no path can contain
            raise ValueError(f"{named(path)}: no such file") from None
        raise
    if len(data) > most:
        raise ValueError(f"{named(path)}: larger than {most:,} bytes, more than is read of such a file")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ValueError(f"{named(path)}: not valid {kind}: line {line}: not UTF-8 text") from None


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML mapping. `ValueError`, with the line, if the file is missing, broken or not a mapping."""
    data = parse_yaml(read_text(path), named(path))
    if not isinstance(data, dict):
        raise ValueError(f"{named(path)}: expected a mapping of fields, got {type(data).__name__}")
    return data


def parse_yaml(text: str, where: str) -> Any:
    """Parse YAML. `ValueError`, prefixed by `where`, for invalid, too large or ambiguous text."""
    if len(text) > MOST_BYTES:
        raise ValueError(f"{where}: {len(text):,} characters, more than the {MOST_BYTES:,} that are read")
    try:
        return document(text)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        problem = "; ".join(part for part in (error.context, error.problem) if part)
        line = f"line {mark.line + 1}: " if mark else ""
        raise ValueError(f"{where}: not valid YAML: {line}{cut(printable(problem), 160)}") from None
    except (yaml.YAMLError, UnicodeError, RecursionError) as error:
        problem = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"{where}: not valid YAML: {cut(printable(problem), 160)}") from None


def document(text: str) -> Any:
    """The data of the only document of a text; None if there is none."""
    events = iter(yaml.parse(text, Loader=LOADER))
    data, num = None, 0
    for event in events:
        if isinstance(event, yaml.DocumentStartEvent):
            num += 1
            if num > 1:
                raise broken(event, "a second document; expected one")
            data, _ = node(events, next(events), {}, 0)
    return data


def broken(event: Any, problem: str) -> yaml.MarkedYAMLError:
    """An error with the position of an event."""
    return yaml.MarkedYAMLError(problem=problem, problem_mark=event.start_mark)


def node(events: Iterator[Any], event: Any, anchors: dict[str, tuple[Any, int] | None], depth: int) -> tuple[Any, int]:
    """The value that begins with `event`, and the number of values in it, with aliases expanded.

    `anchors` has the values of anchors, None while a value is being read. Long texts count as several values.
    """
    if isinstance(event, yaml.AliasEvent):
        if event.anchor not in anchors:
            raise broken(event, f"nothing is called &{shortened(event.anchor, SHOWN)} before this line")
        found = anchors[event.anchor]
        if found is None:
            raise broken(event, f"*{shortened(event.anchor, SHOWN)} stands within itself")
        return found
    if event.tag not in PLAIN_TAGS:
        raise broken(event, f"the tag {shortened(event.tag, SHOWN)} is not taken; leave it out")
    if event.anchor is not None:
        anchors[event.anchor] = None
    if isinstance(event, yaml.ScalarEvent):
        found = (scalar(event), 1 + len(event.value) // 64)
    elif depth == MOST_DEPTH:
        raise broken(event, f"nested deeper than {MOST_DEPTH} levels")
    elif isinstance(event, yaml.SequenceStartEvent):
        found = sequence(events, anchors, depth + 1)
    else:
        found = mapping(events, anchors, depth + 1)
    if found[1] > MOST_VALUES:
        raise broken(event, f"more than {MOST_VALUES:,} values, those of aliases counted each time")
    if event.anchor is not None:
        anchors[event.anchor] = found
    return found


def sequence(events: Iterator[Any], anchors: dict[str, tuple[Any, int] | None], depth: int) -> tuple[list[Any], int]:
    """Read a list after its start event."""
    values, num = [], 1
    for event in events:
        if isinstance(event, yaml.SequenceEndEvent):
            break
        value, inner = node(events, event, anchors, depth)
        values.append(value)
        num += inner
    return values, num


def mapping(
    events: Iterator[Any], anchors: dict[str, tuple[Any, int] | None], depth: int
) -> tuple[dict[str, Any], int]:
    """Read a mapping after its start event. Keys are text and distinct; `<<` merges other mappings below it."""
    own: dict[str, Any] = {}
    lines: dict[str, int] = {}
    below: dict[str, Any] = {}
    num = 1
    for event in events:
        if isinstance(event, yaml.MappingEndEvent):
            break
        name, inner = node(events, event, anchors, depth)
        line = event.start_mark.line + 1
        if not isinstance(name, str):
            what = given(getattr(event, "value", name))
            raise broken(event, f"{what} is no name of a field here; write it in quotes if it is meant")
        if name in lines:
            raise broken(event, f"{given(name)} is given twice, first on line {lines[name]}")
        lines[name] = line
        value_event = next(events)
        value, more = node(events, value_event, anchors, depth)
        num += inner + more
        if name == MERGE and getattr(event, "style", None) in (None, ""):
            parts = value if isinstance(value, list) else [value]
            if not all(isinstance(part, dict) for part in parts):
                raise broken(value_event, "<< takes a mapping, or a list of some")
            for part in parts:
                below = {**part, **below}
        else:
            own[name] = value
    return {**below, **own}, num


def scalar(event: Any) -> Any:
    """The value of a scalar: null, boolean or number if it has that form and is not quoted, else text."""
    text = event.value
    if event.tag is not None or not event.implicit[0]:  # quoted
        return text
    if NULL.fullmatch(text):
        return None
    if TRUE.fullmatch(text) or FALSE.fullmatch(text):
        return bool(TRUE.fullmatch(text))
    if found := NOT_FINITE.fullmatch(text):
        return float(found[1] + found[2])
    if OCTAL.fullmatch(text) and text.strip("+-0_"):
        raise broken(event, f"{given(text)} begins with 0, which some read as octal; leave the 0 out, or quote it")
    try:
        if WHOLE.fullmatch(text):
            return whole(text.replace("_", ""), 0)
        return float(text.replace("_", "")) if REAL.fullmatch(text) else text
    except ValueError as error:
        raise broken(event, str(error)) from None


def whole(text: str, base: int = 10) -> int:
    """An integer. `ValueError` for more digits than can be read fast."""
    if len(text) > MOST_DIGITS:
        raise ValueError(f"a number of {len(text):,} digits; at most {MOST_DIGITS:,} are read")
    return int(text, base)


def parse_json(text: str, where: str) -> Any:
    """Parse JSON. `ValueError`, prefixed by `where`, for invalid, too large or ambiguous text."""
    if len(text) > MOST_BYTES:
        raise ValueError(f"{where}: {len(text):,} characters, more than the {MOST_BYTES:,} that are read")
    data = wrong = None
    try:
        data = json.loads(text, object_pairs_hook=distinct, parse_constant=float, parse_int=whole)
        wrong = fault(data, MOST_VALUES)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: not valid JSON: line {error.lineno}, column {error.colno}: {error.msg}") from None
    except RecursionError:
        wrong = f"nested deeper than {MOST_DEPTH} levels"
    except ValueError as error:
        wrong = str(error)
    if wrong:
        raise ValueError(f"{where}: {wrong}")
    return data


def distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object. `ValueError` for a duplicate key."""
    data: dict[str, Any] = {}
    for name, value in pairs:
        if name in data:
            raise ValueError(f"{given(name)} is given twice")
        data[name] = value
    return data


def parse_overrides(assignments: Iterable[str]) -> dict[str, Any]:
    """`["a.b=1", "c=x"]` as `{"a.b": 1, "c": "x"}`; values are YAML. `ValueError` for an invalid assignment.

    Ambiguous assignments are refused: a field with two values, or a field together with one of its parts.
    """
    overrides: dict[str, Any] = {}
    for assignment in assignments:
        where = f"`set` {given(assignment)}"
        name, equals, text = assignment.partition("=")
        name = name.strip()
        if not equals or not name:
            raise ValueError(f"{where}: expected FIELD=VALUE, as in distillation.temperature=4")
        if wrong := name_fault(name):
            raise ValueError(f"{where}: {wrong}")
        value = parse_yaml(text, where)
        if value is None and text.strip() not in ("null", "Null", "NULL", "~"):
            raise ValueError(f"{where}: no value; write {named(name)}=null for none, or quote what begins with #")
        if name in overrides and not alike(overrides[name], value):
            both = f"to {given(overrides[name], 60)} and to {given(value, 60)}"
            raise ValueError(f"`set` {named(name)}: set twice, {both}; leave one out")
        overrides[name] = value
    for name in overrides:
        for other in overrides:
            if other.startswith(name + "."):
                raise ValueError(f"`set` {named(other)}: lies within {named(name)}, which is set too; set one of them")
    return overrides


def name_fault(name: str) -> str | None:
    """Why a text is not a dotted field name; None if it may be one."""
    parts = name.split(".")
    if len(name) > 1000 or len(parts) > MOST_DEPTH:
        return "the name of the field is too long"
    if not all(part and part == part.strip() for part in parts):
        return "a part of the field's name is empty; expected names with dots between, as in distillation.temperature"
    return text_fault(name)
