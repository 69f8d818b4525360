"""The section on synthesis methods: how near the student comes to the teacher, for the passes that a method costs.

A *pass* is an image through a network and, in synthesis, back. Methods take steps of different cost, so they are
compared at equal passes, not at equal steps.
"""

from typing import TYPE_CHECKING

from dfkd_ray.report import figures, page
from dfkd_ray.report.material import Material
from dfkd_ray.report.page import NUM_ROWS, Section
from dfkd_ray.report.wording import MEASURES, Frame, cut, dicts, more, number, plus_minus, settings, sparsity

if TYPE_CHECKING:
    from matplotlib.figure import Figure

METHOD, PASSES = "synthesis.method", "num_teacher_passes"
MARKERS = "osD^vP*X<>hp"
NUM_FIGURES = 8
ROWS = (  # column, its standard deviation, scale, label of the axis
    ("at_recovered", "at_recovered_std", 100.0, "{measure}, %"),
    ("reference_kl", "reference_kl_std", 1.0, "KL on the reference set"),
)


def methods(material: Material) -> Section:
    """Accuracy and KL against passes through the teacher, a figure per network and sparsity, and a table."""
    name, title = "methods", "Synthesis methods and what they cost"
    if material.done.loc[~material.done["real_data"], METHOD].nunique() < 2:
        return Section(name, title, why_not="the data-free trials that finished have one synthesis method.")
    configs = material.configs[material.configs[METHOD].notna()]
    groups = [
        (f"{network}, sparsity {sparsity(level)}", rows)
        for (network, level), rows in configs.groupby(["network", "level"], sort=False)
        if rows[~rows["real_data"]][METHOD].nunique() > 1
    ]
    if not groups:
        return Section(name, title, why_not="no network has two data-free methods at one sparsity.")
    drawn, cells = [], []
    measured = [(label, rows) for label, rows in groups if rows[PASSES].notna().any()]
    for label, rows in measured[:NUM_FIGURES]:
        measure = MEASURES[str(rows["measure"].iloc[0])]
        caption = f"{label}: {measure} and KL to the teacher against images through the teacher, synthesis and "
        caption += "distillation together; a mark per configuration, mean ± std over seeds."
        drawn.append(material.draw(f"methods-{label}", against_passes(rows, label, measure), caption))
    others = [field for field in material.fields if field not in (METHOD, "pruning.sparsity")]
    for label, rows in groups:
        for row in dicts(rows.sort_values("reference_kl", kind="stable")):
            cells.append(
                [
                    label,
                    row[METHOD],
                    plus_minus(row["at_recovered"], row["at_recovered_std"]) + "\u00a0%",
                    plus_minus(row["reference_kl"], row["reference_kl_std"], 1.0, 3),
                    thousands(row[PASSES]),
                    thousands(row["num_student_passes"]),
                    row["num_seeds"],
                    settings(row, others) or "the only one",
                ]
            )
    headings = ["network", "method", "recovered", "KL", "teacher passes", "student passes", "seeds", "configuration"]
    numbers = set(headings) - {"network", "method", "configuration"}
    table = page.table(headings, cells[:NUM_ROWS], numbers=numbers, long=["configuration"], key="recovered")
    note = "Lowest KL first. Passes: thousands of images through the network, in synthesis and distillation; – where a "
    note += "row does not know. Reference images of one method may favour its own students, unless they are mixed "
    note += "with shapes."
    note += more(len(cells), NUM_ROWS, "row") + more(len(measured), NUM_FIGURES, "figure")
    return Section(name, title, f'<div class="figures">{"".join(drawn)}</div>' + table + page.paragraph(note, "note"))


def thousands(value: object) -> str:
    """Passes in thousands: `61 k`."""
    text = number(value, 0, 1e-3)
    return text if text == "–" else f"{text}\u00a0k"


def against_passes(rows: Frame, title: str, measure: str) -> "Figure":
    """Two panels over one axis of passes through the teacher: the measure on the test set, and the KL."""
    rows = rows[rows[PASSES].notna()]
    found = list(dict.fromkeys(rows[METHOD]))
    with figures.style():
        figure = figures.new_figure(5.4)
        axes = figure.subplots(2, 1, sharex=True)
        for index, method in enumerate(found):
            own = rows[rows[METHOD] == method]
            color = figures.PALETTE[index] if index < len(figures.PALETTE) else figures.OTHERS
            for one, (value, spread, scale, _) in zip(axes, ROWS, strict=True):
                one.errorbar(
                    own[PASSES].astype(float) / 1e3, scale * own[value], yerr=scale * own[spread].fillna(0.0),
                    linestyle="none", marker=MARKERS[index % len(MARKERS)], color=color, capsize=2.5, elinewidth=1.0,
                    label=cut(str(method), 20),
                )  # fmt: skip
        for one, (_, _, _, label) in zip(axes, ROWS, strict=True):
            one.set_ylabel(label.format(measure=measure))
        axes[0].set_title(cut(title, 42), pad=8)
        axes[1].set_xlabel("images through the teacher, thousands")
        axes[1].margins(x=0.1)
        axes[1].set_xlim(left=0.0)
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return figure
