"""The HTML document of the report, self-contained. All data passes `escape`, or is JSON for page.js.

Its content security policy allows only one script (by hash), inline styles and data URIs. So the page sends no request,
and injected markup could not run code.
"""

import base64
import hashlib
import html
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any

import pandas as pd

from dfkd_ray.ladder import RUNGS
from dfkd_ray.report.wording import Frame, Series, count, listed, short_names
from dfkd_ray.text import shown

NUM_ROWS = 48  # of a table other than that of the trials
GENERATOR = '<meta name="generator" content="dfkd_ray report">'  # identifies our pages


@dataclass(frozen=True)
class Section:
    """A section of the page; if `body` is empty, `why_not` says why it is missing."""

    name: str
    title: str
    body: str = ""
    why_not: str = ""


def escape(text: str) -> str:
    """A text as HTML, without markup and without invisible or bidirectional control characters."""
    return html.escape(shown(text, keep="\n\t"))


def page(title: str, place: str, opening: str, sections: Sequence[Section]) -> str:
    """The whole document."""
    css, js = (resources.files("dfkd_ray.report").joinpath(f"page.{kind}").read_text("utf-8") for kind in ("css", "js"))
    digest = base64.b64encode(hashlib.sha256(js.encode()).digest()).decode()
    policy = f"default-src 'none'; script-src 'sha256-{digest}'; style-src 'unsafe-inline'; img-src data:"
    shown = [section for section in sections if section.body]
    links = "".join(f'<a href="#{section.name}">{escape(section.title)}</a> ' for section in shown)
    body = "".join(
        f'<section id="{section.name}"><h2>{escape(section.title)}</h2>{section.body}</section>\n' for section in shown
    )
    script = f"<script>{js}</script>" if any(section.name == "trials" for section in shown) else ""
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n{GENERATOR}\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<link rel="icon" href="data:,">\n<title>{escape(title)}</title>\n<style>{css}</style>\n</head>\n<body>\n'
        f'<header><h1>{escape(title)}</h1><p class="place">{escape(place)}</p>{opening}<nav>{links}</nav></header>\n'
        f"<main>{body}</main>\n{left_out(sections)}\n{script}\n</body>\n</html>\n"
    )


def left_out(sections: Sequence[Section]) -> str:
    """The list of missing sections with the reasons."""
    items = [f"<li>{escape(s.title)}: {escape(s.why_not)}</li>" for s in sections if not s.body]
    return f'<footer class="note"><h2>Not in this report</h2><ul>{"".join(items)}</ul></footer>' if items else ""


def paragraph(text: str, kind: str = "") -> str:
    """A paragraph of plain text."""
    mark = f' class="{kind}"' if kind else ""
    return f"<p{mark}>{escape(text)}</p>"


def table(
    headings: Sequence[str],
    rows: Sequence[Sequence[Any]],
    *,
    numbers: Collection[str] = (),
    long: Collection[str] = (),
    key: str = "",
) -> str:
    """A table in a scrolling box; columns in `numbers` are right-aligned, columns in `long` wrap."""
    kinds = ["num" if name in numbers else "long" if name in long else "" for name in headings]
    kinds = [f"{kind} key".strip() if name == key else kind for kind, name in zip(kinds, headings, strict=True)]
    marks = [f' class="{kind}"' if kind else "" for kind in kinds]
    head = "".join(f'<th scope="col"{m}>{escape(name)}</th>' for m, name in zip(marks, headings, strict=True))
    lines = [
        "".join(f"<td{mark}>{escape(str(cell))}</td>" for mark, cell in zip(marks, row, strict=True)) for row in rows
    ]
    body = "".join(f"<tr>{line}</tr>" for line in lines)
    return box(f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>", headings[0])


def box(content: str, name: str) -> str:
    """A box that scrolls horizontally, also with the keyboard."""
    return f'<div class="scroll" tabindex="0" role="region" aria-label="table by {escape(name)}">{content}</div>'


def figure(content: str, caption: str) -> str:
    """A figure on a light card, with its caption."""
    return f'<figure><div class="card">{content}</div><figcaption>{escape(caption)}</figcaption></figure>'


@dataclass(frozen=True)
class Column:
    """A column of the trials' table: frame column, heading, meaning; shown as `value * scale` with `digits`."""

    name: str
    label: str
    meaning: str = ""
    scale: float = 1.0
    digits: int | None = None
    long: bool = False


def trial_columns(rows: Frame, fields: Sequence[str]) -> list[Column]:
    """The columns of the trials' table: the config columns in `fields`, and all other columns that are not empty."""
    names = short_names(fields)
    seeds = [name for name in ("synthesis.seed", "distillation.seed") if rows[name].nunique() > 1]
    if len(seeds) == 2 and rows[seeds[0]].equals(rows[seeds[1]]):
        seeds = [seeds[0]]
    measured = "of the test set, %" if set(rows["measure"]) == {"accuracy"} else "accuracy, or agreement, %"
    columns = [
        Column("network", "network"),
        *(Column(name, names[name], name) for name in fields),
        *(Column(name, "seed" if len(seeds) == 1 else name, name) for name in seeds),
        Column("status", "status"),
        Column("trial_version", "version", "of the trial's algorithms; KL and agreement compare within one alone"),
        Column("measure", "measure", f"what {listed([rung.heading for rung in RUNGS])} count"),
        *(Column(f"at_{rung.name}", rung.heading, f"{rung.how}, {measured}", 100.0, 2) for rung in RUNGS),
        Column("lost", "lost", "points lost against the teacher", 100.0, 2),
        Column("agreement", "agreement", "with the teacher on the synthetic reference set, %", 100.0, 2),
        Column("reference_kl", "KL", "teacher to student on the reference set, nats", 1.0, 4),
        Column(
            "achieved_sparsity", "removed", "zeros of Conv and Linear weights; channels: of all parameters, %", 100.0, 2
        ),
        Column("stored_bytes", "kB", "stored weights", 1e-3, 0),
        Column("wall_s", "s", "seconds of the trial: of its last attempt, and of distillation before it", 1.0, 0),
        Column("trial_id", "trial", "students/<trial> is its student"),
        Column("reason", "reason", "why it failed", long=True),
    ]
    same = {name for name in ("status", "measure", "trial_version") if rows[name].nunique(dropna=False) == 1}
    if rows["measure"].eq("agreement").all():
        same |= {"at_teacher", "agreement"}  # 100 %, and the recovered one
    return [column for column in columns if column.name not in same and rows[column.name].notna().any()]


def trials_table(rows: Frame, fields: Sequence[str]) -> str:
    """All trials as JSON, a list per column, with repeated texts as indices; page.js shows 50 at a time."""
    columns = trial_columns(rows, fields)
    data = {"rows": len(rows), "columns": [encoded(rows[column.name], column) for column in columns]}
    # `<` could end the script element.
    text = json.dumps(data, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    head = "".join(
        f'<th scope="col"{" class=num" if part["number"] else ""} title="{escape(column.meaning)}">'
        f'<button type="button">{escape(column.label)}</button></th>'
        for column, part in zip(columns, data["columns"], strict=True)
    )
    meanings = "; ".join(f"{column.label}: {column.meaning}" for column in columns if column.digits is not None)
    return (
        f"<noscript><p>The table needs JavaScript; its {count(len(rows), 'row')} are in <code>trials/*.parquet</code>."
        "</p></noscript>"
        '<div class="controls" id="trials-controls" hidden>'
        '<input id="filter" type="search" placeholder="filter by words" aria-label="filter by words">'
        '<span><button type="button" id="before" aria-label="previous rows">←</button> '
        '<button type="button" id="after" aria-label="next rows">→</button></span>'
        '<span id="status" role="status"></span></div>'
        + box(f'<table id="trials-table"><thead><tr>{head}</tr></thead><tbody></tbody></table>', "trial")
        + (paragraph(f"{meanings[:1].upper()}{meanings[1:]}.", "note") if meanings else "")
        + f'<script type="application/json" id="trials-data">{text}</script>'
    )


def encoded(values: Series, column: Column) -> dict[str, Any]:
    """One column for page.js: numbers rounded to what is shown; repeated texts as indices into `levels`."""
    is_number = pd.api.types.is_numeric_dtype(values) and not pd.api.types.is_bool_dtype(values)
    head = {"digits": column.digits, "number": is_number, "long": column.long}
    if is_number:
        scaled = values * column.scale if column.scale != 1 else values
        digits = 12 if column.digits is None else column.digits
        # Adding zero turns -0.0 into 0.0.
        cells = [None if pd.isna(x) else (int(x) if float(x).is_integer() else round(x, digits) + 0) for x in scaled]
        return head | {"values": cells}
    texts = [None if pd.isna(x) else shown(x) for x in values]
    levels: Mapping[str, int] = {text: n for n, text in enumerate(dict.fromkeys(t for t in texts if t is not None))}
    if 2 * len(levels) > len(texts):
        return head | {"values": texts}
    return head | {"levels": list(levels), "values": [None if text is None else levels[text] for text in texts]}
