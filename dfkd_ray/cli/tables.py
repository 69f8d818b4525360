"""Fits a table with many columns into a terminal's width, with one line per row.

Measures, in this order: common parts of names are printed once below the table; headings are wrapped at punctuation,
then within words; gaps become narrower; the least important columns are left out; long texts are shortened in the
middle. Only then does a row take a second line. The result tells what was left out or shortened, to print it below the
table. The columns' text must be safe for a terminal.
"""

import math
import re
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from dfkd_ray.text import shortened

HEADING_LINES = 3
# (gap, form of headings: 0 one line, 1 wrapped at punctuation, 2 also within words, 3 the same, as narrow as possible)
AS_THEY_ARE = ((3, 0),)
ROOMY = ((3, 0), (3, 1), (2, 0), (2, 1), (2, 2))
TIGHT = (*ROOMY, (1, 1), (1, 2), (1, 3))
# (highest rank of columns that stay, width to which texts may be shortened)
SACRIFICES = ((5, None), (4, None), (3, None), (2, None), (2, 8), (1, 8), (0, 7))
# Break points within words of headings; other words are broken before a consonant that a vowel follows.
WORDS = "agree-ment bright-ness con-trast cri-te-rion de-cay im-ages learn-ing meth-od mo-men-tum net-work prun-ed "
WORDS += "re-cov-ered se-lec-tion spar-sity stu-dent syn-thesis teach-er tem-per-ature"
BROKEN = {word.replace("-", ""): word.split("-") for word in WORDS.split()}
NUMBER = re.compile(r"-|[-+]?[0-9.]+(e[-+]?[0-9]+)?")
SYLLABLE = re.compile(r"(?<=[a-z])(?=[bcdfghjklmnpqrstvwxz][aeiouy])")


@dataclass(frozen=True)
class Column:
    """A column. Cells and heading may have several lines if several columns were merged into one."""

    heading: str
    cells: tuple[str, ...]
    is_text: bool = False  # left-aligned, may be shortened
    is_field: bool = False  # a config field in which rows differ
    rank: int = 0  # 0: never left out; otherwise the highest rank is left out first

    @cached_property
    def body(self) -> int:
        """The width of its cells."""
        return widest(set(self.cells))

    @cached_property
    def forms(self) -> tuple[str, str, str, str]:
        """The heading in all forms."""
        return heading_forms(self)


@dataclass(frozen=True)
class Fitted:
    """The columns to draw, and what was left out or shortened."""

    columns: tuple[Column, ...]
    gap: int
    left_out: tuple[str, ...] = ()
    cut: tuple[str, ...] = ()


def fits(columns: Sequence[Column], width: int, styles: Sequence[tuple[int, int]]) -> Fitted | None:
    """The columns in the first style that fits into `width`; None if there is none."""
    forms, bodies = [column.forms for column in columns], [column.body for column in columns]
    for gap, form in styles:
        widths = [max(body, widest((own[form],))) for body, own in zip(bodies, forms, strict=True)]
        room = width - sum(widths) - around(gap, len(widths))
        if room < 0:
            continue
        chosen = [form] * len(columns)
        for better in reversed(range(form)):  # use the remaining width for more readable headings
            for index, own in enumerate(forms):
                more = max(bodies[index], widest((own[better],))) - widths[index]
                if more <= room:
                    room, widths[index], chosen[index] = room - more, widths[index] + more, better
        drawn = (replace(c, heading=own[i]) for c, own, i in zip(columns, forms, chosen, strict=True))
        return Fitted(tuple(drawn), gap)
    return None


def squeezed(columns: Sequence[Column], width: int) -> Fitted:
    """The columns for a width that is too small for them, with as few lines per row as possible."""
    num_fields = sum(column.is_field for column in columns)
    for num_lines in range(1, num_fields + 1):
        all_of_them = stacked(columns, num_lines)
        for rank, shortest in SACRIFICES:
            kept = [column for column in all_of_them if column.rank <= rank]
            left_out = tuple(column.heading for column in columns if column.rank > rank)
            fitted = fits(kept, width, TIGHT) if shortest is None else shortened_to_fit(kept, width, shortest)
            if fitted:
                return replace(fitted, left_out=left_out)
    # It still does not fit: the cells are wrapped when drawn.
    kept = [column for column in stacked(columns, max(1, num_fields)) if not column.rank]
    fitted = fits(kept, 10**9, TIGHT[-1:])
    assert fitted
    return replace(fitted, left_out=tuple(column.heading for column in columns if column.rank))


def shortened_to_fit(columns: Sequence[Column], width: int, shortest: int) -> Fitted | None:
    """The columns with texts shortened as little as needed, but not below `shortest`; None if that is not enough."""
    longest = max((column.body for column in columns if column.is_text), default=0)
    lengths = range(shortest, min(longest, width) + 1)

    def is_too_wide(most: int) -> bool:
        # Only widths matter here, and there may be thousands of rows.
        outlines = [replace(c, cells=("x" * min(c.body, most),)) if c.is_text else c for c in columns]
        return fits([cut(column, most) for column in outlines], width, TIGHT[-1:]) is None

    num_fitting = bisect_left(lengths, True, key=is_too_wide)
    if not num_fitting:
        return None
    narrow = [cut(column, lengths[num_fitting - 1]) for column in columns]
    fitted = fits(narrow, width, TIGHT[-1:])
    pairs = zip(columns, narrow, strict=True)
    names = [before.heading.replace("\n", ", ") for before, after in pairs if before.cells != after.cells]
    return fitted and replace(fitted, cut=tuple(names))


def cut(column: Column, most: int) -> Column:
    """A column of texts with its long ones shortened."""
    if not column.is_text:
        return column

    def lines(text: str) -> str:
        return "\n".join(line_of(line, most) for line in text.split("\n"))

    heading = lines(column.heading) if "\n" in column.heading else column.heading  # others are folded
    narrow = {cell: lines(cell) for cell in set(column.cells)}
    return replace(column, heading=heading, cells=tuple(narrow[cell] for cell in column.cells))


def line_of(text: str, most: int) -> str:
    """A line of at most `most` terminal cells; some characters take two cells."""
    if widest((text,)) <= most:
        return text
    lengths = range(1, most + 1)
    return shortened(text, bisect_right(lengths, most, key=lambda length: widest((shortened(text, length),))) or 1)


def stacked(columns: Sequence[Column], num_lines: int) -> list[Column]:
    """The field columns stacked, `num_lines` per column; other columns unchanged."""
    if num_lines == 1:
        return list(columns)
    fields = [column for column in columns if column.is_field]
    groups = [fields[start : start + num_lines] for start in range(0, len(fields), num_lines)]
    made = [
        Column(
            "\n".join(column.heading for column in group),
            tuple("\n".join(cells) for cells in zip(*(column.cells for column in group), strict=True)),
            is_text=True,
            is_field=True,
        )
        for group in groups
    ]
    return made + [column for column in columns if not column.is_field]


def heading_forms(column: Column) -> tuple[str, str, str, str]:
    """A heading in four forms: one line, wrapped at punctuation, also within words, and that as narrow as possible."""
    heading = column.heading
    if "\n" in heading:
        return heading, heading, heading, heading
    body, whole = column.body, widest((heading,))
    forms = [heading]
    for within_words, num_lines in ((False, HEADING_LINES), (True, 2), (True, HEADING_LINES)):
        for width in range(max(body, 4), whole):
            lines = list(folded(heading, width, within_words))
            if len(lines) <= num_lines and widest(lines) <= width:
                break
        else:
            lines = [heading]
        narrower = widest(lines) < widest((forms[-1],))
        forms.append("\n".join(lines) if narrower else forms[-1])
    first, second, third, fourth = forms
    return first, second, third, fourth


def folded(heading: str, width: int, within_words: bool) -> Iterator[str]:
    """The lines of a wrapped heading; a piece ends at punctuation and may be wider than a line."""
    line = ""
    for piece in re.findall(r"[^_. ]*[_. ]|[^_. ]+", heading):
        if line and widest((line + piece.rstrip(),)) > width:
            yield line.rstrip()
            line = ""
        line += piece
        while within_words and widest((line.rstrip(),)) > width:
            places = [place for place in breaks(line) if place < width]
            if not places:
                break
            yield f"{line[: places[-1]]}-"
            line = line[places[-1] :]
    if line:
        yield line.rstrip()


def breaks(line: str) -> list[int]:
    """The positions at which a line may be broken within words."""
    places = []
    for match in re.finditer(r"[a-z]+", line):
        word = match[0]
        parts = next((BROKEN[whole] for whole in BROKEN if whole.endswith(word)), None)
        if parts is None:
            own = [found.start() for found in SYLLABLE.finditer(word)]
        else:
            own = [len(word) - len("".join(parts[i:])) for i in range(1, len(parts))]
        places += [match.start() + place for place in own if 1 < place < len(word) - 1]
    return places


def said_once(columns: Sequence[Column]) -> tuple[list[Column], list[str]]:
    """The columns without the common parts of their texts, and lines that give these parts."""
    kept, notes = [], []
    for column in columns:
        values = sorted({cell for cell in column.cells if cell != "-"})
        if not column.is_field or len(column.cells) < 2 or not values:
            kept.append(column)
        elif len(set(column.cells)) == 1:
            notes.append(f"{column.heading}: {values[0]} in all")
        else:
            start, end = shared(values) if column.is_text else ("", "")
            if start or end:
                notes.append(f"{column.heading}: {start}…{end}")
            cells = (c if c == "-" else c[len(start) : len(c) - len(end)] for c in column.cells)
            kept.append(replace(column, cells=tuple(cells)))
    return kept, notes


def shared(texts: Sequence[str]) -> tuple[str, str]:
    """The common beginning and end of different texts, in whole words; empty if short."""
    if len(texts) < 2:
        return "", ""
    start = re.sub(r"[^_.\-/ ]*$", "", beginning(texts))
    rests = [text[len(start) :][::-1] for text in texts]
    end = re.sub(r"[^_.\-/ ]*$", "", beginning(rests))[::-1]
    if any(len(rest) == len(end) for rest in rests):
        end = ""
    if any(text == start for text in texts):
        start = ""
    return (start if len(start) > 2 else ""), (end if len(end) > 2 else "")


def is_text(cells: Iterable[str]) -> bool:
    """Whether some cells hold more than numbers."""
    return not all(NUMBER.fullmatch(cell) for cell in cells)


def beginning(texts: Sequence[str]) -> str:
    """The common prefix of texts."""
    first, last = min(texts), max(texts)
    num = next((i for i, pair in enumerate(zip(first, last, strict=False)) if pair[0] != pair[1]), len(first))
    return first[:num]


def widest(texts: Iterable[str]) -> int:
    """The width in terminal cells of the longest line of texts."""
    from rich.cells import cell_len

    return max((cell_len(line) for text in texts for line in text.split("\n")), default=0)


def around(gap: int, num_columns: int) -> int:
    """The width of a table beyond its columns: gaps, and an edge if the gaps are wide."""
    return gap * (num_columns - 1) + (2 if gap == 3 else 0)


def drawn(fitted: Fitted, title: str = "", width: int | None = None) -> Any:
    """The table for rich, at most `width` wide if that is given."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    right = math.ceil((fitted.gap - 1) / 2)
    left = fitted.gap - 1 - right
    table = Table(
        title=Text(title, "italic") if title else None,
        box=box.SIMPLE_HEAD,
        padding=(0, right, 0, left),
        pad_edge=False,
        show_edge=fitted.gap == 3,
    )
    needed = sum(max(c.body, widest((c.heading,))) for c in fitted.columns) + around(fitted.gap, len(fitted.columns))
    must_fold = width is not None and needed > width
    for column in fitted.columns:
        justify = "left" if column.is_text else "right"
        overflow = "fold" if must_fold else "ellipsis"
        table.add_column(
            Text(column.heading), justify=justify, no_wrap=not must_fold, overflow=overflow, vertical="top"
        )
    for cells in zip(*(column.cells for column in fitted.columns), strict=True):
        table.add_row(*(Text(cell) for cell in cells))
    return table
