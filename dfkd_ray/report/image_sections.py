"""The sections of the report's HTML page on synthetic images: their time, and pictures of them."""

import json
from typing import Any

from dfkd_ray.report import aggregates, figures, page
from dfkd_ray.report.material import Material
from dfkd_ray.report.page import NUM_ROWS, Section, escape
from dfkd_ray.report.wording import Frame, count, dicts, more, number, percent, seconds, settings
from dfkd_ray.text import is_null


def synthesis(material: Material) -> Section:
    """Time and images per distinct synthesis, and the time saved by sharing."""
    name, title = "synthesis", "Synthesis, and what sharing saved"
    if material.batches is None:
        return Section(name, title, why_not=material.no_batches)
    table = aggregates.sharing(material.rows, material.batches)
    if table.empty:
        return Section(name, title, why_not="no synthetic image was made for these trials.")
    labels = synthesis_labels(material, table)
    made, apart = float(table["made_s"].sum()), float(table["apart_s"].sum())
    saved = float(table["saved_s"].sum())
    num_images = int(table["num_images"].sum())
    text = f"{count(table['num_keys'].sum(), 'distinct synthesis')}, {count(num_images, 'image')}, made in "
    text += f"{seconds(made)} of work (summed over synthesizers). "
    if saved > 0:
        text += f"Each trial for itself would have spent {seconds(apart)}: sharing saved {seconds(saved)}"
        text += f", {number(saved / apart, 0, 100.0)} % of it."
    else:
        text += "Nothing was shared: each was used by one trial at most."
    caption = "Seconds of synthesis: made once, against the sum over the trials that used it."
    caption += more(len(table), figures.NUM_BARS, "synthesis")
    drawing = material.draw("synthesis", figures.synthesis_bars(table, labels), caption)
    cells = [
        [
            label,
            "–" if row["num_keys"] > 1 else row["synthesis_key"][:12],
            row["num_batches"],
            f"{row['num_images']:,}",
            seconds(row["made_s"]),
            number(row["num_images"] / row["made_s"] if row["made_s"] else None, 1),
            int(row["num_trials"]),
            seconds(row["saved_s"]),
        ]
        for row, label in zip(dicts(table)[:NUM_ROWS], labels, strict=False)
    ]
    headings = ["synthesis", "key", "batches", "images", "made in", "images/s", "trials", "saved"]
    html = page.table(headings, cells, numbers=set(headings) - {"synthesis", "key"}, long=["synthesis"])
    note = page.paragraph(more(len(table), len(cells), "synthesis").strip(), "note") if len(table) > len(cells) else ""
    return Section(name, title, f'{page.paragraph(text)}<div class="figures">{drawing}</div>{html}{note}')


def synthesis_labels(material: Material, table: Frame) -> list[str]:
    """A label for each synthesis, from the config of a trial that used it."""
    rows = material.rows
    varied = synthesis_fields(material)
    networks = rows.drop_duplicates("teacher_hash").set_index("teacher_hash")["network"].to_dict()
    users = rows.dropna(subset=["synthesis_key"]).drop_duplicates("synthesis_key").set_index("synthesis_key")
    labels = []
    for row in dicts(table):
        network = str(networks.get(row["teacher_hash"], "unknown")).partition(" → ")[0]
        if row["domain"] == "reference":
            labels.append(f"{network}, reference set")
            continue
        known = row["synthesis_key"] in users.index
        what = settings(users.loc[row["synthesis_key"]].to_dict(), varied) if known else row["synthesis_key"][:12]
        labels.append(", ".join(part for part in (network, what) if part))
    return labels


def synthesis_fields(material: Material) -> list[str]:
    """The config fields that differ between syntheses."""
    varied = [name for name in material.own_fields if name.startswith("synthesis.")]
    return varied + ["synthesis.seed"] * (material.rows["synthesis.seed"].nunique() > 1)


def pictures(material: Material) -> Section:
    """The synthetic images per class."""
    name, title = "images", "The images, by class"
    if not material.pictures:
        return Section(name, title, why_not="there is no picture of these trials under images/.")
    rows = material.rows.dropna(subset=["synthesis_key"])
    varied = synthesis_fields(material)
    shown = []
    for key, uri in material.pictures.items():
        users = rows[rows["synthesis_key"].str[:12] == key]
        first = users.iloc[0].to_dict()
        kind = "real images, not data-free" if first["real_data"] else str(first["synthesis.method"])
        what = settings(first, [name for name in varied if name != "synthesis.method"])
        caption = ", ".join(part for part in (first["network"], kind, what) if part) + f"; key {key}"
        if not is_null(first["image_confidence"]):
            caption += f"; teacher's mean confidence {percent(first['image_confidence'])}"
        caption += f"; used by {count(len(users), 'trial')}."
        image = f'<img src="{uri}" alt="{escape(caption)}">'
        content = (
            f'<div class="grid"><ol aria-hidden="true">{class_numbers(first["class_histogram"])}</ol>{image}</div>'
        )
        shown.append(page.figure(content, caption))
    note = "A row per class, in the order of the teacher's outputs; of more than 20 classes the first 20, or, with few "
    note += "images of each, one image each of classes spread over all."
    note += more(material.num_pictures, len(shown), "picture")
    return Section(name, title, page.paragraph(note, "note") + f'<div class="figures">{"".join(shown)}</div>')


def class_numbers(histogram: Any) -> str:
    """The numbers of the classes shown in the rows of a grid of images; empty if unknown, as with over 20 classes."""
    try:
        num_classes = len(json.loads(histogram))
    except (TypeError, ValueError):
        return ""
    return "".join(f"<li>{index}</li>" for index in range(num_classes)) if num_classes <= 20 else ""
