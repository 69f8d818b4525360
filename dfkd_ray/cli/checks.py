"""`dfkd-ray results` with --check and --render, and the rows files that documents are rendered from."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import typer

from dfkd_ray.cli.streams import say
from dfkd_ray.text import one_line

ROWS = ".parquet"


def refuse(what: str, given: Mapping[str, object], but: Sequence[str] = ()) -> None:
    """`ValueError` for options that do nothing beside another one."""
    wrong = [f"--{name}" for name, value in given.items() if value is not None and value != [] and name not in but]
    if wrong:
        raise ValueError(f"--{what} takes no {wrong[0]}")


def frame_of(place: str, table: str = "trials") -> Any:
    """The rows of a results place, or of a rows file, as a DataFrame."""
    from dfkd_ray import results

    return in_file(place, table).to_pandas() if is_file(place) else results.read(place, table)


def in_file(place: str, table: str = "trials") -> Any:
    """The rows of a rows file, as an Arrow table."""
    from dfkd_ray.results import row_files

    if table != "trials":
        raise ValueError(f"{place}: a rows file holds trials alone, no {table}")
    return row_files.read([Path(place).expanduser()])


def is_file(place: str) -> bool:
    """Whether a place is a rows file."""
    return place.lower().endswith(ROWS) and "://" not in place


def write_rows(place: str, where: Sequence[str], out: Path | None) -> None:
    """Write the chosen trials of a place as a rows file; it replaces a rows file only."""
    from dfkd_ray import results, storage, targets
    from dfkd_ray.results import row_files, tables

    if out is None:
        raise ValueError("--format parquet: say with --out which file to write")
    target = out.expanduser().absolute()
    parent = storage.folder(target.parent)
    targets.check_file(parent, target.name, lambda _data: row_files.is_own(parent, target.name), "a rows file")
    rows = in_file(place) if is_file(place) else tables.read_arrow(place, "trials")  # whole numbers stay exact
    chosen = results.select(rows.to_pandas(), where)
    if chosen.empty:
        raise ValueError(f"{place}: no trial meets these conditions; nothing is written")
    data = row_files.packed(rows.take(chosen.index.to_numpy()))
    parent.write(target.name, data)
    say(f"written: {out} ({len(chosen)} rows, {len(data):,} bytes)")
    if mixed := results.mixed(chosen):
        say(mixed)


def render(documents: Sequence[str]) -> None:
    """Render the tables of documents again, and say which have changed; nothing is written unless all can be."""
    from dfkd_ray.report import documents as pages

    if not documents:
        raise ValueError("--render: say which documents, as in dfkd-ray results --render README.md")
    rendered = [pages.render(Path(name).expanduser()) for name in dict.fromkeys(documents)]
    pages.write(rendered)
    states = [(one.path, line, changed) for one in rendered for line, changed in one.tables.items()]
    for path, line, changed in states:
        say(f"{path}, line {line}: {'changed' if changed else 'as it was'}")
    say(f"{sum(changed for _, _, changed in states)} of {len(states)} tables changed")


def check(place: str, file: Path | None) -> None:
    """Print a line for each range that a sweep file expects; exit code 1 unless all are met."""
    from dfkd_ray import config, sweep

    if file is None and is_file(place):
        raise ValueError(f"{place}: a rows file does not say which sweep it is of; give the file with --sweep")
    settings = sweep.settings_in(place) if file is None else sweep.parse(config.read_yaml(file), str(file))
    done = sweep.check(settings, frame_of(place))
    if done.num_finished < done.num_trials:
        say(f"{done.num_finished} of the sweep's {done.num_trials} trials have finished")
    for num, what in ((done.num_others, "trials that are none of the sweep"), (done.num_older, "older versions")):
        if num:
            say(f"left out: {num} rows of {what}")
    for name in done.not_opened:
        whatever = "its rows count whatever they have where a field is auto"
        say(f"teacher {name} cannot be opened here: {whatever}", error=True)
    for one in done.findings:
        say(line_of(one))
    num_off = sum(one.state != "ok" for one in done.findings)
    say(f"{len(done.findings) - num_off} of {len(done.findings)} ranges met")
    if not done.is_met:
        raise typer.Exit(1)


def line_of(one: Any) -> str:
    """A finding in one line: state, metric, trials, value, range."""
    from dfkd_ray.report import wording

    expected = one.expectation.model_dump()
    where = wording.where_text(expected["where"]) or "all trials"
    best = "the lowest reference_kl of " if expected["of"] == "best" else ""
    failed = f", {one.num_failed} failed or stopped" if one.num_failed else ""
    counted = f"{best}{one.num} of {one.num_trials} trials{failed}"
    value = "nothing measured"
    if one.mean is not None:
        digits = 2 if one.expectation.metric.endswith("points_lost") else 4
        value = wording.plus_minus(one.mean, one.std, 1.0, digits).replace("\u00a0", " ")
    text = f" ({one_line(expected['text'])})" if expected["text"] else ""
    bounds = wording.bounds_text(expected)
    return f"{one.state:7}  {where}: {expected['metric']} {value} ({counted}), expected {bounds}{text}"
