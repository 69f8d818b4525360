"""Tables in Markdown documents that are rendered from files of rows, between two comments.

A comment names the files, relative to the document, and holds the table's specification (`specification.py`). What
stands between it and the end mark is replaced; everything else stays as it is, byte for byte:

    <!-- table of results/grid.parquet
    rows: teacher
    columns: pruning.sparsity
    metric: points_lost
    -->
    | … |
    <!-- end of table -->

The rows are those of trials (`results.row_files`), or the measurements of a bench (`results.measurements`). With `of:
choice` the table is about what the choice without data costs among the trials, by network (`aggregates.regret`).

Marks within fenced blocks of code are text. Every error names the document and the line.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from dfkd_ray import storage
from dfkd_ray.config import parsing, validate
from dfkd_ray.plain import named
from dfkd_ray.report import aggregates, captions, cells
from dfkd_ray.report.cells import Filled
from dfkd_ray.report.specification import CHOICE, TRIALS, Specification, Vocabulary
from dfkd_ray.report.wording import Frame
from dfkd_ray.results import measurements, row_files
from dfkd_ray.results.metrics import Metric

BEGIN = re.compile(r"<!-- table of (\S+\.parquet(?: and \S+\.parquet)*)")
END, CLOSE = "<!-- end of table -->", "-->"
LIKE_BEGIN = re.compile(r"\s*<!--\s*tables?\s+of\s.*\.parquet", re.I)
LIKE_END = re.compile(r"\s*<!--\s*end\s+of\s+(the\s+)?table", re.I)
FENCE = re.compile(r" {0,3}(`{3,}|~{3,})")
MOST_BYTES = 10_000_000  # of a document


@dataclass(frozen=True)
class Source:
    """The rows behind a table. `fixed`: the columns that are equal in rows that differ in seeds only; None: as trials.

    `caption`: the sentences beneath the table.
    """

    frame: Frame
    words: Vocabulary
    fixed: list[str] | None
    caption: Callable[[Filled, Specification, str | None], str]


Known = dict[tuple[str, ...], Source]  # the rows in files that were read
COSTS = (  # of the choice, by network
    Metric("num_trials", decimals=0),
    Metric("correlation"),
    Metric("within"),
    Metric("regret", times=100.0),
    Metric("largest", times=100.0),
)


@dataclass(frozen=True)
class Table:
    """A table of a document. `number`: the line, from 1, of its first mark; `first`, `last`: the lines between the
    marks, as a slice of the document's lines."""

    number: int
    files: list[str]
    text: str
    first: int
    last: int


@dataclass(frozen=True)
class Rendered:
    """A document with its tables rendered. `tables`: line of each, in the new text → whether it changed."""

    path: Path
    before: str
    after: str
    tables: dict[int, bool]


def render(path: Path) -> Rendered:
    """A document with all its tables rendered again, in memory.

    `ValueError` if it has none or a broken one, or if a file of rows is missing or damaged.
    """
    text = parsing.read_text(path, MOST_BYTES, "text")
    lines = lines_of(text)
    newline = "\r\n" if lines and lines[0].endswith("\r\n") else "\n"
    found = list(tables_of(lines, named(path)))
    if not found:
        raise ValueError(f"{named(path)}: no table of rows in it; expected <!-- table of FILE.parquet")
    changed: dict[int, bool] = {}
    out, end = [], 0
    known: Known = {}
    for table in found:
        new = [line + newline for line in rendered(table, path, known).split("\n")]
        moved = len(out) - end  # lines that the tables above have gained
        changed[table.number + moved] = new != lines[table.first : table.last]
        out += [*lines[end : table.first], *new]
        end = table.last
    return Rendered(path, text, "".join([*out, *lines[end:]]), changed)


def lines_of(text: str) -> list[str]:
    """The lines of a text with their ends; only a newline ends one, unlike in `str.splitlines`."""
    return re.findall(r"[^\n]*\n|[^\n]+", text)


def write(documents: list[Rendered]) -> None:
    """Write the documents that have changed, each atomically; a link stays a link."""
    for one in documents:
        if one.after != one.before:
            real = one.path.resolve()
            storage.write_local(real.parent, real.name, [one.after.encode()])


def tables_of(lines: list[str], name: str) -> Iterator[Table]:
    """The tables of a document's lines, in order. `ValueError` for marks that do not belong together."""
    begun: tuple[int, list[str], str, int] | None = None
    fence = ""
    index = 0
    while index < len(lines):
        line, number = lines[index].rstrip(), index + 1
        index += 1
        if begun is None and (mark := FENCE.match(line)):
            run = mark[1]
            if not fence:
                fence = run
            elif run.startswith(fence) and line.strip() == run:
                fence = ""
            continue
        if fence:
            continue
        if LIKE_BEGIN.match(line):
            match = BEGIN.fullmatch(line)
            if match is None:
                raise ValueError(f"{name}, line {number}: expected <!-- table of FILE.parquet alone on its line")
            if begun is not None:
                raise ValueError(f"{name}, line {number}: the table of line {begun[0]} has not ended; {expected()}")
            close = next((at for at in range(index, len(lines)) if CLOSE in lines[at]), None)
            if close is None or lines[close].strip() != CLOSE:
                raise ValueError(f"{name}, line {number}: its comment is not closed; expected {CLOSE} on a line alone")
            begun = (number, match[1].split(" and "), "".join(lines[index:close]), close + 1)
            index = close + 1
        elif LIKE_END.match(line):
            if line != END:
                raise ValueError(f"{name}, line {number}: {expected()} alone on its line")
            if begun is None:
                raise ValueError(f"{name}, line {number}: the end of a table that has not begun")
            start, files, text, first = begun
            yield Table(start, files, text, first, number - 1)
            begun = None
    if begun is not None:
        raise ValueError(f"{name}, line {begun[0]}: the table has no end; {expected()}")


def expected() -> str:
    """What ends a table."""
    return f"expected {END}"


def rendered(table: Table, document: Path, known: Known) -> str:
    """A table and its caption. `known` keeps what was read for other tables."""
    where = f"{named(document)}, line {table.number}"
    # Empty lines before the text, so that an error has the line of the document.
    data = parsing.parse_yaml("\n" * table.number + table.text.replace("\r\n", "\n"), named(document))
    if not isinstance(data, dict):
        raise ValueError(f"{where}: expected the fields rows and columns, as in rows: teacher")
    try:
        source = read(table, document.parent, known)
        if data.get("of") == CHOICE:
            source = of_choice(source)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    spec = validate(Specification, data, where, context=source.words)
    try:
        done = cells.filled(source.frame, spec, source.fixed)
        text = source.caption(done, spec, command_of(spec, document.parent))
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    # After the empty line the table has ended; the caption is one line, so that no word of it can begin a list.
    return "\n".join([*cells.as_markdown(done, spec).split("\n"), "", f"*{text}*"])


def read(table: Table, folder: Path, known: Known) -> Source:
    """The rows of a table's files; those of the same files are read once. `ValueError` for files of two kinds."""
    key = tuple(table.files)
    if key not in known:
        paths = [folder / name for name in table.files]
        own = [measurements.is_own(path) for path in paths]
        if all(own):
            known[key] = of_measurements(paths)
        elif any(own):
            raise ValueError(f"{named(' and '.join(key))}: rows of trials and measurements do not go into one table")
        else:
            known[key] = Source(row_files.read(paths).to_pandas(), TRIALS, None, captions.caption)
    return known[key]


def of_choice(trials: Source) -> Source:
    """What the choice without data costs among trials, by network. `ValueError` for rows that cannot say it."""
    if trials.words is not TRIALS:
        raise ValueError(f"of: {CHOICE} needs rows of trials, and these are measurements")
    rows = aggregates.comparable(aggregates.finished(aggregates.prepared(trials.frame)))
    costs = aggregates.regret(rows)
    costs = costs[costs["num_trials"] > 1]
    if costs.empty:
        raise ValueError(f"of: {CHOICE} needs two finished, data-free trials of a network with test accuracy")
    words = Vocabulary(["network"], {metric.name: metric for metric in COSTS}, "the choice")

    def caption(done: Filled, spec: Specification, command: str | None) -> str:
        return captions.of_choice(rows[rows["network"].isin(done.used["network"])], spec, command)

    return Source(costs.assign(status="finished"), words, ["network"], caption)


def of_measurements(paths: list[Path]) -> Source:
    """The measurements of one or more files. `ValueError` if one is in two of them."""
    found = [measurements.read(path) for path in paths]
    numbers = list(dict.fromkeys(name for one in found for name in one.numbers))
    labels = list(dict.fromkeys(name for one in found for name in one.labels))
    frame = pd.concat([one.frame for one in found], ignore_index=True).assign(status="finished")
    if frame.duplicated([*labels, measurements.SEED]).any():
        raise ValueError(f"{named(' and '.join(map(str, paths)))}: a measurement is there twice, and would count twice")
    words = Vocabulary([*labels, measurements.SEED], {name: Metric(name) for name in numbers}, "these measurements")
    return Source(frame, words, labels, captions.of_measurements)


def command_of(spec: Specification, folder: Path) -> str | None:
    """The command that made the rows: the specification's, or that of its sweep file."""
    if spec.sweep is None:
        return spec.command
    data = parsing.read_yaml(folder / spec.sweep)
    about = data.get("about")
    command = about.get("command") if isinstance(about, dict) else None
    if not isinstance(command, str):
        raise ValueError(f"{named(spec.sweep)}: it has no about.command")
    return command
