"""What the sections of the report are made from, and the figures that they draw."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from dfkd_ray.report import aggregates, figures, page
from dfkd_ray.report.wording import Frame

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass
class Material:
    """The data of the report, and the figures drawn so far: file name → content."""

    rows: Frame
    batches: Frame | None
    no_batches: str
    about: Mapping[str, Any]
    pictures: Mapping[str, str]  # first 12 digits of a synthesis key → data URI
    num_pictures: int
    drawn: dict[str, bytes] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.done = aggregates.finished(self.rows)
        self.fields = aggregates.varying(self.done)
        # Without real-image trials: against those, the method would only tell that the others are synthetic.
        self.own_fields = aggregates.varying(self.done[~self.done["real_data"]]) or self.fields
        self.configs = aggregates.configurations(self.rows)
        self.best = aggregates.best(self.configs)
        self.answers = aggregates.answers(self.best)
        self.networks = list(dict.fromkeys(self.best["network"]))

    def draw(self, name: str, figure: "Figure", caption: str) -> str:
        """Add a figure as SVG and PNG files; returns it as HTML."""
        stem = "".join(letter if letter.isascii() and letter.isalnum() else "-" for letter in name.lower())[:60]
        while f"{stem}.svg" in self.drawn:
            stem += "-b"
        svg = figures.as_svg(figure)
        self.drawn |= {f"{stem}.svg": svg.encode(), f"{stem}.png": figures.as_png(figure)}
        return page.figure(figures.inline(svg, f"f{len(self.drawn) // 2}"), caption)
