"""How a table of many columns is brought into the width of a terminal, a line per row.

Before a row takes a second line, in this order: names that repeat are said once, below the table; headings are folded
at signs, then within words; gaps narrow; the columns of least interest are left out; long texts lose their middle.
What was left out or shortened is told, so that it can be said below the table. Columns hold text that was cleaned.
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
# (gap, form of the headings: 0 one line, 1 folded at signs, 2 within words too, 3 the same and as narrow as can be)
AS_THEY_ARE = ((3, 0),)
ROOMY = ((3, 0), (3, 1), (2, 0), (2, 1), (2, 2))
TIGHT = (*ROOMY, (1, 1), (1, 2), (1, 3))
# (columns of which ranks stay, width to which texts may be shortened)
SACRIFICES = ((4, None), (3, None), (2, None), (2, 8), (1, 8), (0, 7))
# Where words of headings may be broken; others are before a consonant with a vowel behind it.
WORDS = "agree-ment bright-ness con-trast cri-te-rion de-cay im-ages learn-ing meth-od mo-men-tum net-work prun-ed "
WORDS += "re-cov-ered se-lec-tion spar-sity stu-dent syn-thesis teach-er tem-per-ature"
BROKEN = {word.replace("-", ""): word.split("-") for word in WORDS.split()}
NUMBER = re.compile(r"-|[-+]?[0-9.]+(e[-+]?[0-9]+)?")
SYLLABLE = re.compile(r"(?<=[a-z])(?=[bcdfghjklmnpqrstvwxz][aeiouy])")


@dataclass(frozen=True)
class Column:
    """A column; its cells, and its heading too, may have several lines where several columns were made one."""

    heading: str
    cells: tuple[str, ...]
    is_text: bool = False  # set flush left, may be shortened
    is_field: bool = False  # of the config: what rows differ in
    rank: int = 0  # 0: never left out; of others the highest first

    @cached_property
    def body(self) -> int:
        """The width of its cells."""
        return widest(set(self.cells))

    @cached_property
    def forms(self) -> tuple[str, str, str, str]:
        """Its heading in all forms."""
        return heading_forms(self)


@dataclass(frozen=True)
class Fitted:
    """Columns as they are drawn, and what of them is not there."""

    columns: tuple[Column, ...]
    gap: int
    left_out: tuple[str, ...] = ()
    cut: tuple[str, ...] = ()


def fits(columns: Sequence[Column], width: int, styles: Sequence[tuple[int, int]]) -> Fitted | None:
    """The columns in the first style in which they are no wider than `width`; None where there is none."""
    forms, bodies = [column.forms for column in columns], [column.body for column in columns]
    for gap, form in styles:
        widths = [max(body, widest((own[form],))) for body, own in zip(bodies, forms, strict=True)]
        room = width - sum(widths) - around(gap, len(widths))
        if room < 0:
            continue
        chosen = [form] * len(columns)
        for better in reversed(range(form)):  # what is left goes to headings that it makes more readable
            for index, own in enumerate(forms):
                more = max(bodies[index], widest((own[better],))) - widths[index]
                if more <= room:
                    room, widths[index], chosen[index] = room - more, widths[index] + more, better
        drawn = (replace(c, heading=own[i]) for c, own, i in zip(columns, forms, chosen, strict=True))
        return Fitted(tuple(drawn), gap)
    return None


def squeezed(columns: Sequence[Column], width: int) -> Fitted:
    """The columns in a width into which they do not go as they are; as few lines per row as can be."""
    num_fields = sum(column.is_field for column in columns)
    for num_lines in range(1, num_fields + 1):
        all_of_them = stacked(columns, num_lines)
        for rank, shortest in SACRIFICES:
            kept = [column for column in all_of_them if column.rank <= rank]
            left_out = tuple(column.heading for column in columns if column.rank > rank)
            fitted = fits(kept, width, TIGHT) if shortest is None else shortened_to_fit(kept, width, shortest)
            if fitted:
                return replace(fitted, left_out=left_out)
    # Not even that: whoever draws it folds the cells.
    kept = [column for column in stacked(columns, max(1, num_fields)) if not column.rank]
    fitted = fits(kept, 10**9, TIGHT[-1:])
    assert fitted
    return replace(fitted, left_out=tuple(column.heading for column in columns if column.rank))


def shortened_to_fit(columns: Sequence[Column], width: int, shortest: int) -> Fitted | None:
    """The columns with texts shortened as little as it takes, and to no less than `shortest`."""
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
    """A line of at most so many places on the terminal, on which some characters take two."""
    if widest((text,)) <= most:
        return text
    lengths = range(1, most + 1)
    return shortened(text, bisect_right(lengths, most, key=lambda length: widest((shortened(text, length),))) or 1)


def stacked(columns: Sequence[Column], num_lines: int) -> list[Column]:
    """The fields `num_lines` to a column, one below the other; other columns as they are."""
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
    """A heading as it is, folded at signs, folded within words, and that as narrow as can be."""
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
    """The lines of a heading, filled piece by piece; a piece ends at a sign and may be wider than a line."""
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
    """Where a line may be broken within its words."""
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
    """The columns without what the texts of a field share, and lines that say it."""
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
    """What different texts begin and end with, in whole words; where it is short, nothing."""
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
    """The characters that all begin with."""
    first, last = min(texts), max(texts)
    num = next((i for i, pair in enumerate(zip(first, last, strict=False)) if pair[0] != pair[1]), len(first))
    return first[:num]


def widest(texts: Iterable[str]) -> int:
    """The places that the longest line of some texts takes on a terminal."""
    from rich.cells import cell_len

    return max((cell_len(line) for text in texts for line in text.split("\n")), default=0)


def around(gap: int, num_columns: int) -> int:
    """What a table is wider than its columns: gaps, and an edge where they are wide."""
    return gap * (num_columns - 1) + (2 if gap == 3 else 0)


def drawn(fitted: Fitted, title: str = "", width: int | None = None) -> Any:
    """The table, for rich; with `width` in no more than that, whatever it takes."""
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
