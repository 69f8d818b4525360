"""The report's figures, each drawn from a table of `aggregates` with matplotlib, without display or global state.

All figures have the width of a phone, with legible text. SVG keeps text as text, so that it is shown in the page's
font. Equal tables give equal bytes.
"""

import io
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from dfkd_ray.ladder import STUDENTS
from dfkd_ray.report.wording import MEASURES, RUNG_NAMES, Frame, count, cut, dicts, seconds, size, sparsity
from dfkd_ray.text import is_null

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH = 4.0  # inches; a phone of 360 pixels shows it 13 % larger
INK, SOFT, GRID = "#1c2430", "#5b6673", "#dfe3e8"
# Colours also differ in lightness, and each has its own marker: for print and colour-blind readers.
LOOKS: dict[str, dict[str, Any]] = {
    **{rung.name: dict(rung.look) for rung in STUDENTS},
    "bound": {"color": "#2e8b57", "marker": "D", "linestyle": "--", "markerfacecolor": "white"},
}
PALETTE = ("#0b5cad", "#d9822b", "#2e8b57", "#a23b72", "#6b4fbb", "#b8a100", "#11a0b0", "#8c5a3c")
OTHERS = "#8b95a1"
STYLE: Any = {
    "font.family": "DejaVu Sans",
    "font.size": 10.0,
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.labelcolor": INK,
    "axes.edgecolor": SOFT,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.7,
    "xtick.color": SOFT,
    "ytick.color": SOFT,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "text.color": INK,
    "text.parse_math": False,  # a teacher may be called $\alpha$
    "lines.linewidth": 1.4,
    "lines.markersize": 4.5,
    "legend.frameon": False,
    "legend.fontsize": 9.5,
    "svg.fonttype": "none",
    "svg.hashsalt": "dfkd_ray",
}
NUM_VECTOR_POINTS = 400  # more points are rasterised: an SVG with thousands of dots is slow and large
KINDS = {"float32": "o", "int8": "s"}  # markers
NUM_PANELS = 4  # heat maps of one network
NUM_BARS = 10


@contextmanager
def style() -> Iterator[None]:
    """matplotlib's settings for these figures, without warnings about missing glyphs (the page's font has them)."""
    import matplotlib

    with matplotlib.rc_context(STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*[Gg]lyph.*")
        yield


def new_figure(height: float) -> "Figure":
    """An empty figure, `height` inches high."""
    from matplotlib.figure import Figure

    return Figure(figsize=(WIDTH, height), layout="constrained")


def position(level: Any) -> Any:
    """A sparsity's position on the axis: -log2 of the fraction of weights kept, which separates 0.9, 0.95, 0.98."""
    return -np.log2(1.0 - np.asarray(level, dtype=float))


def ladder(chosen: Frame, title: str) -> "Figure":
    """Accuracy against sparsity of one network: the rungs of its best configurations, mean ± std over seeds.

    `chosen`: the rows of `aggregates.best` for that network. If the rungs near the teacher would overlap, an enlarged
    view is added above.
    """
    own, real = chosen[~chosen["real_data"]], chosen[chosen["real_data"]]
    lines = [(rung, own, f"at_{rung}", f"at_{rung}_std") for rung in RUNG_NAMES]
    lines.append(("bound", real, "at_recovered", "at_recovered_std"))
    lines = [line for line in lines if line[1][line[2]].notna().any()]
    teacher = 100 * float(chosen["at_teacher"].mean())
    near = limits([line for line in lines if line[0] in ("recovered", "bound")], teacher)
    whole = limits(lines, teacher)
    close_view = near[1] - near[0] < 0.5 * (whole[1] - whole[0])

    with style():
        figure = new_figure(5.2 if close_view else 3.7)
        axes = figure.subplots(2 if close_view else 1, 1, squeeze=False, sharex=True)[:, 0]
        for one, (low, high) in zip(axes, [near, whole] if close_view else [whole], strict=True):
            if not is_null(teacher):
                one.axhline(teacher, color=INK, linewidth=1.0, linestyle=(0, (6, 3)), label="teacher")
            for shift, (name, rows, value, spread) in enumerate(lines):
                draw_rung(one, name, rows, value, spread, 0.03 * (shift - len(lines) / 2))
            one.set_ylim(low, high)
        measure = MEASURES[str(chosen["measure"].iloc[0])]
        axes[0].set_title(cut(title, 36), pad=8)
        figure.supylabel(f"{measure}, %", fontsize=10, y=0.6)
        figure.get_layout_engine().set(hspace=0.06)  # type: ignore[union-attr]
        axes[-1].set_xlabel("sparsity (log scale of the weights kept)")
        sparsity_ticks(axes[-1], sorted(chosen["level"].unique()))
        handles, labels = axes[-1].get_legend_handles_labels()
        first = 0 if is_null(teacher) else 1
        figure.legend(
            handles[first:] + handles[:first], labels[first:] + labels[:first], loc="outside lower center", ncols=2
        )
    return figure


def limits(lines: list[tuple[str, Frame, str, str]], teacher: float) -> tuple[float, float]:
    """The range, in percent, that shows these lines with their error bars and the teacher."""
    values = [] if is_null(teacher) else [teacher]
    for _, rows, value, spread in lines:
        std = rows[spread].fillna(0.0)
        values += [*(100 * (rows[value] - std).dropna()), *(100 * (rows[value] + std).dropna())]
    low, high = min(values, default=0.0), max(values, default=100.0)
    margin = max(0.08 * (high - low), 0.1)
    return low - margin, high + margin


def draw_rung(axes: "Axes", name: str, rows: Frame, value: str, spread: str, shift: float) -> None:
    """One line with error bars, shifted sideways a little so that lines do not overlap."""
    rows = rows[rows[value].notna()].sort_values("level")
    label = "real images (bound)" if name == "bound" else RUNG_NAMES[name]
    std = 100 * rows[spread].fillna(0.0)
    place = position(rows["level"]) + shift
    axes.errorbar(place, 100 * rows[value], yerr=std, capsize=2.5, elinewidth=1.0, label=label, **LOOKS[name])


def sparsity_ticks(axes: "Axes", levels: list[float]) -> None:
    """Ticks at the sparsities, from the highest down, without overlapping labels."""
    places = position(levels)
    span = max(float(places[-1] - places[0]), 0.5)
    shown: list[int] = []
    for index in reversed(range(len(levels))):
        if not shown or places[shown[-1]] - places[index] > 0.09 * span:
            shown.append(index)
    axes.set_xticks(places[shown], [sparsity(levels[index]) for index in shown])
    axes.set_xlim(places[0] - 0.12 * span, places[-1] + 0.12 * span)


def heat_map(maps: Mapping[float, Frame], title: str, measure: str) -> "Figure":
    """BN weight × temperature, with a panel and its own colour scale for each of the four highest sparsities."""
    panels = sorted(maps.items())[-NUM_PANELS:]
    from matplotlib.colors import LinearSegmentedColormap

    colors = LinearSegmentedColormap.from_list("paper to blue", ["#f4f7fb", "#6fa5d8"])  # ink is legible on all of it
    heights = [0.36 * len(cells) + 0.8 for _, cells in panels]
    with style():
        figure = new_figure(sum(heights) + 0.45)
        axes = figure.subplots(len(panels), 1, squeeze=False, height_ratios=heights)[:, 0]
        for one, (level, cells) in zip(axes, panels, strict=True):
            values = 100 * cells.to_numpy()
            low, high = float(np.nanmin(values)), float(np.nanmax(values))
            # A scale narrower than half a point would show noise as a difference.
            middle, half = (low + high) / 2, max((high - low) / 2, 0.25)
            one.imshow(values, cmap=colors, aspect="auto", vmin=middle - half, vmax=middle + half)
            for (down, across), value in np.ndenumerate(values):
                if not np.isnan(value):
                    fontsize = 9.0 if values.shape[1] <= 6 else 6.0
                    one.text(across, down, f"{value:.2f}", ha="center", va="center", fontsize=fontsize)
            one.set_xticks(range(values.shape[1]), [f"{value:g}" for value in cells.columns])
            one.set_yticks(range(values.shape[0]), [f"{value:g}" for value in cells.index])
            one.grid(visible=False)
            one.set_ylabel("BN weight")
            one.set_title(f"sparsity {sparsity(level)}", fontsize=10, fontweight="normal")
        axes[-1].set_xlabel("temperature")
        figure.suptitle(
            cut(f"{title}: {MEASURES[measure]}, %", 42), fontsize=10.5, fontweight="bold", x=0.02, ha="left"
        )
    return figure


def pareto(configs: Frame, best: Frame) -> "Figure":
    """Accuracy against stored bytes: a dot per configuration, the front as steps, the dense teachers as stars."""

    def star(rows: Frame) -> tuple[float, float] | None:
        # A student of another architecture, or with fewer channels, has another dense size than its teacher.
        teacher = rows[rows["at_teacher"].notna() & rows["dense_bytes"].notna() & ~(rows["macs_left"] < 1)]
        if not len(teacher) or "→" in rows["network"].iloc[0]:
            return None
        return teacher.iloc[0]["dense_bytes"], teacher.iloc[0]["at_teacher"]

    with style():
        figure, axes, handles, labels = trade_off(configs, best, "stored_bytes", star)
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(lambda value, _place: size(value).replace(".0 ", " "))
        few_ticks(axes, configs)
        axes.set_xlabel("stored size of the student (log scale)")
        figure.legend(handles, labels, loc="outside lower center", ncols=2 if len(labels) > 2 else 3)
    return figure


def speeds(rows: Frame, best: Frame) -> "Figure":
    """Accuracy against speed: a dot per student, a square per int8 file, the front as steps, the teachers as stars.

    `rows`: `aggregates.deployed`; `best`: its front, the fastest first.
    """
    with style():
        figure, axes, handles, labels = trade_off(rows, best, "speed", lambda own: (1.0, own["at_teacher"].iloc[0]))
        axes.margins(x=0.08)
        axes.set_xlabel("times as fast as the teacher")
        figure.legend(handles, labels, loc="outside lower center")
    return figure


def trade_off(
    rows: Frame, best: Frame, cost: str, star: Callable[[Frame], tuple[float, float] | None]
) -> tuple["Figure", "Axes", list[Any], list[str]]:
    """A figure of accuracy against a cost, with what its legend has: handles and labels.

    Each network has a colour, each `kind` of rows (if they have kinds) a marker. `best`: the front. `star`: from a
    network's rows to the place of its teacher.
    """
    figure = new_figure(3.9)
    axes = figure.subplots()
    handles, labels = [], []
    for index, network in enumerate(dict.fromkeys(rows["network"])):
        own = rows[rows["network"] == network]
        color = PALETTE[index] if index < len(PALETTE) else OTHERS
        kinds = own["kind"] if "kind" in own else pd.Series("float32", index=own.index)
        dots = [
            axes.scatter(
                part[cost], 100 * part["at_recovered"], s=16, marker=KINDS[str(kind)], color=color, alpha=0.75,
                linewidths=0, rasterized=len(rows) > NUM_VECTOR_POINTS,
            )
            for kind, part in own.groupby(kinds)
        ]  # fmt: skip
        if (place := star(own)) is not None:
            axes.scatter(place[0], 100 * place[1], s=70, marker="*", color=color, zorder=3)
        if index <= len(PALETTE):
            handles.append(dots[0])
            labels.append(f" {cut(network, 40)}" if index < len(PALETTE) else " other networks")
    line = axes.step(best[cost], 100 * best["at_recovered"], where="post", color=INK, linewidth=1.0)[0]
    axes.scatter(best[cost], 100 * best["at_recovered"], s=34, facecolors="none", edgecolors=INK, zorder=3)
    axes.set_ylim(*front_limits(rows, best))
    axes.set_ylabel(f"{MEASURES[str(rows['measure'].iloc[0])]}, %")
    return figure, axes, [line, *handles], ["front", *labels]


def front_limits(configs: Frame, best: Frame) -> tuple[float, float]:
    """The range, in percent, of all configurations, limited below to four times the range of front and teachers."""
    near = 100 * pd.concat([best["at_recovered"], configs["at_teacher"].dropna()])
    span = max(near.max() - near.min(), 0.5)
    low = max(100 * configs["at_recovered"].min(), near.min() - 4 * span)
    margin = 0.06 * (near.max() - low) + 0.05
    return low - margin, near.max() + margin


def few_ticks(axes: "Axes", configs: Frame) -> None:
    """Ticks at 1, 2, 5 of each decade, or at 1 and 3, or only at 1: as many as fit."""
    from matplotlib.ticker import LogLocator, NullFormatter, NullLocator

    sizes = pd.concat([configs["stored_bytes"], configs["dense_bytes"]]).dropna()
    decades = np.log10(sizes.max() / sizes.min())
    steps = (1, 2, 5) if decades < 0.8 else (1, 3) if decades < 2.5 else (1,)
    axes.xaxis.set_major_locator(LogLocator(base=10, subs=steps, numticks=12))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.margins(x=0.08)


def synthesis_bars(table: Frame, labels: list[str]) -> "Figure":
    """Seconds of each distinct synthesis: made once, and without sharing."""
    rows = dicts(table)[:NUM_BARS]
    with style():
        figure = new_figure(0.5 * len(rows) + 1.1)
        axes = figure.subplots()
        place = np.arange(len(rows))
        apart = [max(row["apart_s"], row["made_s"]) for row in rows]
        axes.barh(place, apart, height=0.34, color="#c9d8ea", label="each trial for itself")
        axes.barh(place, [row["made_s"] for row in rows], height=0.34, color="#0b5cad", label="made once")
        for index, (row, label) in enumerate(zip(rows, labels, strict=False)):
            what = f"{cut(label, 32)}: {seconds(row['made_s'])}, {count(row['num_trials'], 'trial')}"
            axes.text(0, index - 0.24, what, fontsize=9, va="bottom", ha="left")
        axes.set_yticks([])
        axes.set_ylim(len(rows) - 0.6, -0.75)
        axes.grid(visible=False, axis="y")
        axes.spines["left"].set_visible(False)
        axes.locator_params(axis="x", nbins=5)
        axes.set_xlabel("seconds of synthesis")
        figure.legend(loc="outside lower center", ncols=2)
    return figure


def as_svg(figure: "Figure") -> str:
    """The figure as an SVG document, without date and tool."""
    with style():
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
        figure.set_layout_engine("none")  # the layout is computed; the PNG reuses it
    return buffer.getvalue()


def as_png(figure: "Figure") -> bytes:
    """The figure as PNG, 200 pixels per inch."""
    with style():
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=200, metadata={"Software": None})
    return buffer.getvalue()


def inline(svg: str, prefix: str) -> str:
    """An SVG document as an inline element of the page, with unique ids and without a fixed size."""
    element = re.sub(r"<!--.*?-->", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    head, rest = element.split(">", 1)
    head = re.sub(r'\s(width|height)="[^"]*"', "", head)
    rest = re.sub(r'(\sid="|href="#|url\(#)', rf"\g<1>{prefix}-", rest)
    return f'{head} aria-hidden="true">{rest}'.strip()
