"""The sections of the report's HTML page: each function returns a section, or a sentence why it is missing."""

from collections.abc import Callable
from typing import Any

from dfkd_ray.ladder import BN_REESTIMATED, QUANTISED, RECONSTRUCTED, ended_early
from dfkd_ray.report import aggregates, figures, page
from dfkd_ray.report.image_sections import pictures, synthesis
from dfkd_ray.report.material import Material
from dfkd_ray.report.methods import methods
from dfkd_ray.report.page import NUM_ROWS, Section, escape
from dfkd_ray.report.wording import (
    CHOICE_NOTE,
    MEASURES,
    Frame,
    base_name,
    count,
    dicts,
    lead,
    listed,
    more,
    number,
    percent,
    plus_minus,
    settings,
    size,
    sparsity,
    state_of,
)
from dfkd_ray.results import selecting
from dfkd_ray.text import is_null

NUM_NETWORKS = 12  # networks with figures of their own
# Heading → rung, and what the note says of it.
BESIDE = {
    QUANTISED.heading: (QUANTISED, QUANTISED.how),
    "BN only": (BN_REESTIMATED, f"{BN_REESTIMATED.how} without training"),
    "reconstruction only": (RECONSTRUCTED, f"{RECONSTRUCTED.how} without training"),
}
VERSIONS = (
    *("trial_version", "synthesis_version", "package_version", "commit", "torch_version", "ray_version"),
    *("numerics", "host"),
)


def opening(material: Material) -> str:
    """The opening paragraphs: the main result as text."""
    state, answers = state_of(material.rows["status"]), material.answers
    if answers.empty:
        return page.paragraph(f"{state} There is no result to report yet.", "lead")
    lines = lead(answers, material.own_fields)
    items = "".join(f"<li><strong>{escape(label)}</strong> {escape(text)}</li>" for label, text in lines)
    mixed = selecting.mixed(material.rows)
    warning = page.paragraph(f"This page has {mixed}.", "note") if mixed else ""
    note = (
        "Of several configurations the best is the closest one to the teacher (KL divergence) on mixtures of held-out "
    )
    note += "synthetic images, mean over seeds. Test accuracy is reported, never used to choose."
    return f'<div class="lead">{page.paragraph(state)}<ul>{items}</ul></div>{warning}{page.paragraph(note, "note")}'


def answer(material: Material) -> Section:
    """Points lost on each rung, for the best configuration of each network and sparsity."""
    name, title = "answer", "The best at each sparsity"
    if material.answers.empty:
        return Section(name, title, why_not="no trial has finished.")
    fields = [name for name in material.own_fields if name != "pruning.sparsity"]
    real = bool(material.answers["real_data"].any())
    bound = "bound_lost" in material.answers and bool(material.answers["bound_lost"].notna().any())
    beside = {heading: f"lost_{rung.name}" for heading, (rung, _) in BESIDE.items()}
    beside = {heading: name for heading, name in beside.items() if material.answers[name].notna().any()}
    columns: dict[str, Callable[[dict[str, Any]], Any]] = {
        "network": lambda row: row["network"],
        "sparsity": lambda row: sparsity(row["level"]),
        "lost": lambda row: plus_minus(row["lost"], row["lost_std"]),
        "real images": lambda row: plus_minus(row["bound_lost"], row["bound_lost_std"]),
        **{
            heading: lambda row, name=name: plus_minus(row[name], row[f"{name}_std"])
            for heading, name in beside.items()
        },
        "pruned": lambda row: plus_minus(row["lost_pruned"], row["lost_pruned_std"]),
        "seeds": lambda row: row["num_seeds"],
        "teacher": lambda row: percent(row["at_teacher"]),
        "agreement": lambda row: percent(row["agreement"]),
        "stored": lambda row: size(row["stored_bytes"]),
        "dense": lambda row: size(row["dense_bytes"]),
        "images": lambda row: "real" if row["real_data"] else "synthetic",
        "best configuration": lambda row: settings(row, fields),
        "best student": lambda row: row["trial_id"],
    }
    absent = {
        name
        for name, there in {
            "real images": bound,
            "images": real,
            "best configuration": fields,
        }.items()
        if not there
    }
    shown = {name: cell for name, cell in columns.items() if name not in absent}
    rows = dicts(material.answers)[:NUM_ROWS]
    texts = {"network", "images", "best configuration", "best student"}
    cells = [[cell(row) for cell in shown.values()] for row in rows]
    html = page.table(list(shown), cells, numbers=set(shown) - texts, long=["best configuration"], key="lost")
    note = "Points below the teacher, mean ± std over seeds: lost, after recovery; "
    note += "real images, the same with real images (the upper bound); " if bound else ""
    note += "".join(f"{heading}, {BESIDE[heading][1]}; " for heading in beside)
    note += "pruned, with nothing done. "
    note += "Best student: its folder under students/."
    num_early = sum(map(ended_early, dicts(material.done)))
    note += f" {count(num_early, 'trial')} ended before training, near enough by enough_kl." if num_early else ""
    return Section(name, title, html + page.paragraph(note + more(len(material.answers), len(rows), "row"), "note"))


def recovery(material: Material) -> Section:
    """Accuracy against sparsity, a figure per network."""
    name, title = "recovery", "Accuracy against sparsity"
    if material.best.empty:
        return Section(name, title, why_not="no trial has finished.")
    shown = []
    for network in material.networks[:NUM_NETWORKS]:
        chosen = material.best[material.best["network"] == network]
        measure = MEASURES[chosen["measure"].iloc[0]]
        seeds = "one trial a point" if chosen["num_seeds"].max() == 1 else "mean ± std over seeds"
        caption = f"{network}: {measure} of the best configuration at each sparsity, {seeds}."
        if measure != MEASURES["accuracy"]:
            caption += " No test data was given, so agreement stands in place of accuracy."
        drawing = figures.ladder(chosen, network)
        caption += " Above, the range close to the teacher." if len(drawing.axes) > 1 else ""
        shown.append(material.draw(f"accuracy-{network}", drawing, caption))
    note = more(len(material.networks), len(shown), "network").strip()
    if material.rows["level"].ne(material.rows["pruning.sparsity"].astype(float).round(6)).any():
        note += " Sparsities are rounded to the nearest 0.05."
    return Section(
        name, title, f'<div class="figures">{"".join(shown)}</div>' + (note and page.paragraph(note, "note"))
    )


def weights(material: Material) -> Section:
    """Heat maps of BN weight × temperature, if the sweep varies them."""
    name, title = "heatmap", "BN weight and temperature"
    axes = (aggregates.BN_WEIGHT, aggregates.TEMPERATURE)
    if not set(axes) & set(material.fields):
        return Section(name, title, why_not="the trials that finished vary neither the BN weight nor the temperature.")
    averaged = ["seeds"] if material.configs["num_seeds"].max() > 1 else []
    others = [field for field in material.fields if field not in (*axes, "pruning.sparsity", "synthesis.method")]
    averaged += [field for field in others if field not in axes]
    mean = f", mean over {listed(averaged)}" if averaged else ""
    shown = []
    for network in material.networks[:NUM_NETWORKS]:
        maps = aggregates.heat_maps(material.rows, network)
        if maps:
            measure = material.best.loc[material.best["network"] == network, "measure"].iloc[0]
            caption = f"{network}: {MEASURES[measure]} after recovery{mean}; each panel has its own colour scale."
            caption += more(len(maps), figures.NUM_PANELS, "sparsity")
            shown.append(material.draw(f"heatmap-{network}", figures.heat_map(maps, network, measure), caption))
    if not shown:
        return Section(name, title, why_not="BN weight and temperature have too many values for a grid (a search).")
    return Section(name, title, f'<div class="figures">{"".join(shown)}</div>')


def sizes(material: Material) -> Section:
    """Pareto front accuracy against stored bytes."""
    name, title = "pareto", "Accuracy against size"
    own = material.configs[~material.configs["real_data"]].dropna(subset=["stored_bytes", "at_recovered"])
    if own.empty:
        return Section(name, title, why_not="no data-free trial has finished.")
    parts = []
    for measure, rows in own.groupby("measure", sort=False):
        label = MEASURES[str(measure)]
        front = aggregates.front(rows)
        caption = f"{count(len(rows), 'data-free configuration')}, mean over seeds: {label} against stored weights."
        caption += " Circled: the front, which no other beats in both. Stars: the dense teachers."
        figure = figures.pareto(rows, front)
        num_below = int((100 * rows["at_recovered"] < figure.axes[0].get_ylim()[0]).sum())
        caption += f" {count(num_below, 'configuration')} lower than shown." if num_below else ""
        drawing = material.draw(f"pareto-{measure}", figure, caption)
        headings = ["front", "sparsity", label, "stored", "seeds", "configuration", "best student"]
        cells = [
            [
                row["network"],
                sparsity(row["level"]),
                f"{plus_minus(row['at_recovered'], row['at_recovered_std'])}\u00a0%",
                size(row["stored_bytes"]),
                row["num_seeds"],
                settings(row, material.own_fields) or "the only one",
                row["trial_id"],
            ]
            for row in dicts(front)[:NUM_ROWS]
        ]
        table = page.table(headings, cells, numbers=("sparsity", "seeds", label, "stored"), long=["configuration"])
        parts.append(f'<div class="figures">{drawing}</div>{table}')
    return Section(name, title, "".join(parts))


def speed(material: Material) -> Section:
    """Pareto front accuracy against measured speed, of students and their int8 files."""
    name, title = "speed", "Accuracy against speed"
    deployed = aggregates.deployed(material.configs)
    if deployed.empty or (deployed["speed"] == 1).all():
        why = "no student's latency was measured: zeros save no multiplications, and channels were not removed."
        return Section(name, title, why_not=why)
    parts = []
    for measure, rows in deployed.groupby("measure", sort=False):
        label = MEASURES[str(measure)]
        front = aggregates.front(rows, "speed", cheap_is_high=True)
        caption = f"{label} against speed, mean over seeds: dots are students, squares their int8 files. Circled: the "
        caption += "front, which no other beats in both. Stars: the teachers."
        drawing = material.draw(f"speed-{measure}", figures.speeds(rows, front), caption)
        headings = ["front", "kind", "times as fast", label, "MACs left", "file", "seeds", "configuration", "student"]
        cells = [
            [
                row["network"],
                row["kind"],
                plus_minus(row["speed"], row["speed_std"], 1.0),
                f"{plus_minus(row['at_recovered'], row['at_recovered_std'])}\u00a0%",
                percent(row["macs_left"]),
                size(row["stored_bytes"]),
                row["num_seeds"],
                settings(row, material.own_fields) or "the only one",
                row["trial_id"],
            ]
            for row in dicts(front)[:NUM_ROWS]
        ]
        numbers = ("times as fast", label, "MACs left", "file", "seeds")
        table = page.table(headings, cells, numbers=numbers, long=["configuration"])
        parts.append(f'<div class="figures">{drawing}</div>{table}')
    note = "Medians of alternating runs of teacher and student in the trial's process, as its section latency says, on "
    note += "that machine; other trials ran beside it."
    return Section(name, title, "".join(parts) + page.paragraph(note, "note"))


def choice(material: Material) -> Section:
    """What the choice without data costs, where test accuracy is known."""
    name, title = "choice", "The choice without data"
    table = aggregates.regret(material.done)
    table = table[table["num_trials"] > 1]
    if table.empty:
        return Section(name, title, why_not="no network has two finished trials with test accuracy.")
    cells = [
        [
            row["network"],
            row["num_trials"],
            number(row["correlation"]),
            number(row["within"]),
            number(row["regret"], 2, 100.0),
            number(row["largest"], 2, 100.0),
        ]
        for row in dicts(table)[:NUM_ROWS]
    ]
    headings = ["network", "trials", "rank correlation", "at one sparsity", "regret", "largest regret"]
    html = page.table(headings, cells, numbers=headings[1:])
    return Section(name, title, html + page.paragraph(CHOICE_NOTE + more(len(table), len(cells), "network"), "note"))


def failed(material: Material) -> Section:
    """Failures with their reasons."""
    note = "The same command runs failed trials again; those that finished are kept."
    table = aggregates.failures(material.rows)
    return by_text(Section("failures", "Failures", why_not="no trial failed."), table, "reason", "reason", note)


def warned(material: Material) -> Section:
    """What looks wrong in finished trials."""
    note = "These trials finished; their images or students look wrong."
    table = aggregates.warnings(material.rows)
    return by_text(
        Section("warnings", "Warnings", why_not="no trial has a warning."), table, "warnings", "warning", note
    )


def by_text(empty: Section, table: Frame, column: str, heading: str, note: str) -> Section:
    """A section with a table of trials grouped by a text (`aggregates.by_text`); `empty` if there are none."""
    if table.empty:
        return empty
    cells = [[row[column], row["num_trials"], row["networks"], row["trial_ids"]] for row in dicts(table)[:NUM_ROWS]]
    headings = [heading, "trials", "networks", "first of them"]
    html = page.table(headings, cells, numbers=["trials"], long=[heading, "networks"])
    shown = page.paragraph(note + more(len(table), len(cells), heading), "note")
    return Section(empty.name, empty.title, html + shown)


def trials(material: Material) -> Section:
    """The table of all trials."""
    text = "Closest to the teacher first. A click on a heading sorts; of the configuration, only what varies is shown."
    fields = aggregates.varying(material.rows)
    return Section("trials", "All trials", page.paragraph(text, "note") + page.trials_table(material.rows, fields))


def origin(material: Material) -> Section:
    """Provenance: the sweep file, versions, hosts, teachers."""
    cells = [
        [f"sweep: {key}", material.about[key]] for key in ("source", "command", "expected") if key in material.about
    ]
    for name, values in aggregates.provenance(material.rows, VERSIONS).items():
        total = len(material.rows)
        parts = [value if n == total else f"{value} ({count(n, 'trial')})" for value, n in list(values.items())[:8]]
        cells.append([name, "; ".join(parts) + more(len(values), len(parts), "value") if parts else "not recorded"])
    body = page.table(["what", "value"], cells, long=["value"])
    known = dicts(aggregates.teachers(material.rows))
    rows = [
        [
            base_name(row["teacher"]),
            "–" if is_null(row["teacher_architecture"]) else row["teacher_architecture"],
            percent(row["teacher_accuracy"]),
            "–" if is_null(row["test_set"]) else row["test_set"],
            "–" if is_null(row["num_test_images"]) else f"{int(row['num_test_images']):,}",
            int(row["num_trials"]),
            row["teacher_hash"],
        ]
        for row in known[:NUM_ROWS]
    ]
    headings = ["teacher", "architecture", "test accuracy", "test set", "test images", "trials", "hash"]
    body += page.table(headings, rows, numbers=("test accuracy", "test images", "trials"), long=["hash"])
    return Section("provenance", "Provenance", body)


SECTIONS: tuple[Callable[[Material], Section], ...] = (
    answer,
    choice,
    recovery,
    weights,
    methods,
    sizes,
    speed,
    synthesis,
    pictures,
    failed,
    warned,
    trials,
    origin,
)
