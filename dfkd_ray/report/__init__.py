"""Writes the report of a results place: one self-contained HTML page, and its figures as PNG and SVG.

It reads only the Parquet tables. `aggregates` computes the report's tables, `figures` draws them, `sections` writes
text around them, `page` makes the HTML. Equal rows give equal bytes.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from dfkd_ray import results, storage, targets
from dfkd_ray.config import parsing
from dfkd_ray.report import aggregates, page, pictures, sections
from dfkd_ray.report.wording import Frame, expected_text
from dfkd_ray.storage import Folder

NAME = "report.html"


@dataclass(frozen=True)
class Written:
    """A written report: its place, its size, and the names of its figures in the folder beside it."""

    folder: Folder
    name: str
    size_bytes: int
    figures: tuple[str, ...]

    @property
    def figure_folder(self) -> Folder:
        """The folder of the figures: `report/` beside `report.html`."""
        return self.folder / stem_of(self.name)


def write(place: str | Path | Folder, out: str | Path | None = None) -> Written:
    """Write the report of a results place (folder or URI) to `out` (a .html file or URI; default PLACE/report.html).

    `ValueError` if there is no trials table, or if `out` is not an HTML file; `OSError` from the disk.
    """
    source = storage.folder(place)
    folder, name = target(source, out)
    figures = folder / stem_of(name)
    targets.check_file(folder, name, is_page, "a report")
    if name not in folder.names():  # without our page, the figures' folder is not ours either
        targets.check(figures, targets.Product("a report's figures", {}))
    html, drawn = build(source)
    data = html.encode("utf-8", errors="replace")
    folder.write(name, data)  # first: it marks the figures' folder as ours
    for figure, drawing in drawn.items():
        figures.write(figure, drawing)
    return Written(folder, name, len(data), tuple(drawn))


def target(source: Folder, out: str | Path | None) -> tuple[Folder, str]:
    """The folder and file name of the report for `out`."""
    if out is None:
        return source, NAME
    head, mark, query = storage.split_query(str(out))
    parent, _, name = head.rpartition("/")
    if not name.lower().endswith((".html", ".htm")) or not stem_of(name).strip("."):
        raise ValueError(f"`out` {storage.without_secrets(str(out))}: expected a file name that ends in .html")
    return storage.folder((parent or ("/" if head.startswith("/") else ".")) + mark + query), name


def is_page(data: bytes) -> bool:
    """Whether these bytes are a page written by this module."""
    return page.GENERATOR.encode() in data[:1000]


def stem_of(name: str) -> str:
    """A file name without its ending."""
    return name.rpartition(".")[0]


def build(source: Folder) -> tuple[str, dict[str, bytes]]:
    """The page of a results place, and its figures: file name → content. `ValueError` without a trials table."""
    trials = results.read(source, "trials")
    if trials.empty:
        raise ValueError(f"{source}: its trials table has no rows yet")
    rows = aggregates.prepared(trials)
    batches, no_batches = None, ""
    try:
        batches = results.read(source, "synthesis")
    except ValueError as error:
        no_batches = f"{error}."
    names = picture_names(rows, source / "images")
    uris = pictures.data_uris(source / "images", names)
    material = sections.Material(
        rows,
        batches,
        no_batches,
        about_of(source),
        {name.removesuffix(".png"): uri for name, uri in uris.items()},
        len(names),
    )
    opening = sections.opening(material)
    parts = [section(material) for section in sections.SECTIONS]
    return page.page(f"Report: {source.name}", str(source), opening, parts), material.drawn


def picture_names(rows: Frame, folder: Folder) -> list[str]:
    """The picture files of these trials: first the best of each network and method, then the rest, best first."""
    used = rows.dropna(subset=["synthesis_key"])
    first = used.drop_duplicates(["network", "synthesis.method"])
    keys = pd.concat([first, used]).sort_values("real_data", kind="stable")["synthesis_key"].str[:12]
    there = set(folder.names())
    return [f"{key}.png" for key in dict.fromkeys(keys) if f"{key}.png" in there]


def about_of(source: Folder) -> Mapping[str, Any]:
    """The `about` section of the sweep file, if that is stored beside the tables."""
    if not 0 < (source.size("sweep.yaml") or 0) <= parsing.MOST_BYTES:
        return {}
    data = source.read("sweep.yaml") or b""
    try:
        content = parsing.parse_yaml(data.decode(errors="replace"), "sweep.yaml")
    except ValueError:
        return {}
    about = content.get("about") if isinstance(content, dict) else None
    if not isinstance(about, dict):
        return {}
    return {str(key): expected_text(value) if key == "expected" else str(value) for key, value in about.items()}
