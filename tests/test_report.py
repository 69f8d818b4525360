"""The report: its numbers equal plain pandas, its page is whole, safe and small, and looks right in a browser."""

import io
import itertools
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from devtools import CHROMIUM, Browser
from dfkd_ray import report, results
from dfkd_ray.report import aggregates, figures, pictures, sections, wording
from dfkd_ray.report import methods as methods_section
from dfkd_ray.report.page import trial_columns
from dfkd_ray.storage import folder
from table_rows import batch_rows, full_row

SECRETLY_MARKUP = "</script><script>alert(1)</script><img src=x onerror=alert(1)> $\\frac & \"quoted\" 'name'"


def write(place, table, rows):
    """Rows into a results place."""
    if table == "trials":
        results.write(place, table, rows, "part")
    else:
        results.write_batches(place, rows)


def grid(
    sparsities=(0.5, 0.75, 0.9),
    networks=("resnet20", "resnet8"),
    bn_weights=(0.2, 2.0),
    temperatures=(2.0, 6.0),
    seeds=3,
):
    """A grid of trials with real ones beside them, and two that failed."""
    axes = itertools.product(networks, sparsities, bn_weights, temperatures, range(seeds))
    rows = [
        full_row(number, network=network, sparsity=sparsity, bn_weight=weight, temperature=temperature, seed=seed)
        for number, (network, sparsity, weight, temperature, seed) in enumerate(axes)
    ]
    for network, sparsity, seed in itertools.product(networks, sparsities, range(seeds)):
        rows.append(full_row(len(rows), network=network, sparsity=sparsity, seed=seed, method="real"))
    return rows


def picture(path, shape=(338, 406)):
    path.parent.mkdir(exist_ok=True)
    noise = np.random.default_rng(0).integers(0, 255, shape, dtype=np.uint8)
    Image.fromarray(noise).save(path)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A results place with everything in it."""
    place = tmp_path_factory.mktemp("sweeps") / "everything"
    rows = grid()
    nothing = dict.fromkeys(("agreement", "reference_kl", "recovered_accuracy", "synthesis_key"))
    failed = [
        full_row(
            len(rows) + n, status="failed", reason=f"FloatingPointError: NaN in batch {n}", bn_weight=9.0, **nothing
        )
        for n in range(2)
    ]
    write(place, "trials", rows + failed)
    write(place, "synthesis", batch_rows(rows))
    for row in rows[:4]:
        picture(place / "images" / f"{row['synthesis_key'][:12]}.png")
    (place / "sweep.yaml").write_text("about: {source: the paper, command: dfkd-ray sweep x.yaml, expected: 1 < 2}\n")
    return place


def frame(rows):
    """Trials as they are read: lowest KL first."""
    schema = results.schema("trials").names
    table = pd.DataFrame([{name: row.get(name) for name in schema} for row in rows])
    return aggregates.prepared(table.sort_values("reference_kl", na_position="last"))


class Page(HTMLParser):
    """What a page is made of: its start tags, ids, and texts by the element they stand in."""

    def __init__(self, html):
        super().__init__()
        self.tags, self.scripts, self.text, self.inside = [], [], [], ""
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.inside = tag
        if tag == "script":
            self.scripts.append("")

    def handle_data(self, data):
        if self.inside == "script":
            self.scripts[-1] += data
        elif self.inside != "style":
            self.text.append(data)

    def handle_endtag(self, tag):
        self.inside = ""

    @property
    def words(self):
        return " ".join(" ".join(self.text).split())

    def titles(self):
        return [attributes["id"] for tag, attributes in self.tags if tag == "section"]


def build(place):
    html, drawn = report.build(folder(place))
    return Page(html), html, drawn


@pytest.fixture(scope="module")
def built(place):
    return build(place)


@pytest.fixture
def no_png(monkeypatch):
    """Half of a report's time goes into PNG files; tests of its words do without."""
    monkeypatch.setattr(figures, "as_png", lambda _figure: b"")


# What it counts


def test_configurations_are_means_and_sample_deviations_over_seeds():
    rows = grid()
    configs = aggregates.configurations(frame(rows))
    assert len(configs) == len(rows) / 3 and (configs["num_seeds"] == 3).all()
    plain = pd.DataFrame(rows)
    for config in wording.dicts(configs):
        own: Any = plain[
            (plain["teacher_architecture"] == config["network"]) & (plain["pruning.sparsity"] == config["level"])
        ]
        own = own[own["real_data"] == config["real_data"]]
        if not config["real_data"]:
            own = own[own["synthesis.bn_weight"] == config["synthesis.bn_weight"]]
            own = own[own["distillation.temperature"] == config["distillation.temperature"]]
        values = own["recovered_accuracy"].to_numpy()
        assert len(values) == 3
        assert config["at_recovered"] == pytest.approx(np.mean(values))
        assert config["at_recovered_std"] == pytest.approx(np.std(values, ddof=1))
        assert config["lost"] == pytest.approx(0.94 - np.mean(values))
        assert config["trial_id"] == own.loc[own["reference_kl"].idxmin(), "trial_id"]


def test_the_best_is_chosen_by_kl_and_never_by_agreement_or_test_accuracy():
    rows = [full_row(1, temperature=2.0, reference_kl=0.1, agreement=0.8, recovered_accuracy=0.5)]
    rows += [full_row(2, temperature=6.0, reference_kl=0.2, agreement=0.9, recovered_accuracy=0.9)]
    best = aggregates.best(aggregates.configurations(frame(rows)))
    assert best["trial_id"].tolist() == ["t-000000000001"]


def test_the_best_is_never_of_an_older_version_or_of_plain_reference_images_where_there_are_others(tmp_path, no_png):
    new = [full_row(n, temperature=2.0 * n, trial_version=3, reference_kl=0.1 * n) for n in (2, 3)]
    old = full_row(4, temperature=2.0, trial_version=2, reference_kl=0.001, agreement=0.99)
    plain = full_row(5, trial_version=3, reference_kl=0.002, agreement=0.98, **{"reference.mixed": False})
    for rows in ([*new, old], [*new, plain], [*new, old, plain]):
        best = aggregates.best(aggregates.configurations(frame(rows)))
        assert best["trial_id"].tolist() == ["t-000000000002"]
    write(tmp_path, "trials", [*new, old | {"reference.mixed": None}])
    page, html, _ = build(tmp_path)
    says = "KL and agreement on two kinds of reference images cannot be compared (mixed: 2 rows, plain: 1 row)"
    assert says in page.words and "2 versions of the trial's algorithms (3: 2 rows, 2: 1 row)" in page.words
    table = json.loads(next(script for script in page.scripts if '"columns"' in script))
    assert table["rows"] == 3 and ">version</button>" in html
    (versions,) = [part["values"] for part in table["columns"] if part.get("values") == [3, 3, 2]]
    assert versions == [3, 3, 2], "the newest first"
    write(tmp_path, "trials", new)
    page, html, _ = build(tmp_path)
    assert "cannot be compared" not in page.words and ">version</button>" not in html


def test_real_data_is_the_bound_and_never_the_answer():
    rows = [full_row(1), full_row(2, method="real", reference_kl=0.001, recovered_accuracy=0.939)]
    answers = aggregates.answers(aggregates.best(aggregates.configurations(frame(rows))))
    assert answers["trial_id"].tolist() == ["t-000000000001"]
    assert answers["bound_lost"].tolist() == pytest.approx([0.001])


def test_the_front_is_what_no_other_beats():
    generator = np.random.default_rng(0)
    points = generator.integers(1, 40, (80, 2)).tolist()
    rows = [
        full_row(n, temperature=1.0 + n, stored_bytes=size, recovered_accuracy=value / 40)
        for n, (size, value) in enumerate(points)
    ]
    configs = aggregates.configurations(frame(rows))
    points = set(zip(configs["stored_bytes"], configs["at_recovered"], strict=True))
    beaten = {p for p in points if any(q != p and q[0] <= p[0] and q[1] >= p[1] for q in points)}
    front = aggregates.front(configs)
    assert set(zip(front["stored_bytes"], front["at_recovered"], strict=True)) == points - beaten
    assert len(front) == len(points - beaten) > 2


def test_a_teachers_star_is_at_its_own_size_and_not_at_that_of_a_student_with_fewer_channels():
    macs = {"teacher_num_macs": 100, "dense_bytes": 500_000}
    rows = [full_row(n, temperature=float(n), num_macs=num, **macs) for n, num in ((1, 50), (2, 100))]
    for kept, num_stars in ((rows[:1], 0), (rows, 1)):
        configs = aggregates.configurations(frame(kept))
        (axes,) = figures.pareto(configs, aggregates.front(configs)).axes
        dots: list[Any] = list(axes.collections)
        stars = [each for each in dots if each.get_sizes().tolist() == [70]]
        assert len(stars) == num_stars


def test_the_front_in_speed_has_students_and_their_int8_files_and_zeros_are_as_fast_as_the_teacher():
    common = {"teacher_num_macs": 100, "latency_ratio": None, "int8_latency_ratio": None, "quantised_accuracy": None}
    rows = [
        full_row(1, temperature=1.0, **common | {"num_macs": 100, "recovered_accuracy": 0.92}),
        full_row(2, temperature=2.0, **common | {"num_macs": 50, "latency_ratio": 1.8, "recovered_accuracy": 0.91}),
        full_row(
            3,
            temperature=3.0,
            **common
            | {"num_macs": 60, "latency_ratio": 1.5, "recovered_accuracy": 0.90}
            | {"int8_latency_ratio": 3.0, "quantised_accuracy": 0.89, "int8_file_bytes": 1000},
        ),
        full_row(4, temperature=4.0, **common | {"num_macs": 50, "recovered_accuracy": 0.93}),  # not measured
    ]
    deployed = aggregates.deployed(aggregates.configurations(frame(rows)))
    told = deployed[["kind", "speed", "at_recovered"]].itertuples(index=False, name=None)
    assert sorted(told) == [("float32", 1.0, 0.92), ("float32", 1.5, 0.9), ("float32", 1.8, 0.91), ("int8", 3.0, 0.89)]
    front = aggregates.front(deployed, "speed", cheap_is_high=True)
    assert list(zip(front["kind"], front["speed"], strict=True)) == [("int8", 3.0), ("float32", 1.8), ("float32", 1.0)]
    assert front["stored_bytes"].iloc[0] == 1000
    assert figures.as_svg(figures.speeds(deployed, front)).count("<svg") == 1


def test_sharing_saves_the_seconds_of_all_uses_but_one():
    rows = grid(networks=("resnet20",))
    table = aggregates.sharing(frame(rows), pd.DataFrame(batch_rows(rows)))
    train = table[table["domain"] == "train"]
    # Three sparsities and two temperatures want the same images, of two BN weights and three seeds.
    assert len(train) == 6 and (train["num_trials"] == 6).all() and (train["num_images"] == 1024).all()
    assert train["made_s"].tolist() == [40.0] * 6 and train["saved_s"].tolist() == [40.0 * 5] * 6
    (reference,) = table[table["domain"] == "reference"].to_dict("records")
    assert reference["num_trials"] == len(rows) and reference["saved_s"] == 10.0 * (len(rows) - 1)


def test_a_configuration_column_is_shown_where_trials_of_one_method_differ_in_it():
    rows = [full_row(1, temperature=2.0), full_row(2, temperature=6.0), full_row(3, method="noise", temperature=2.0)]
    assert aggregates.varying(frame(rows)) == ["synthesis.method", "distillation.temperature"]
    assert aggregates.varying(frame(rows[:1])) == []


def test_networks_of_one_name_are_told_apart():
    rows = [
        full_row(1, teacher="runs/a", teacher_hash="1" * 64),
        full_row(2, teacher="runs/b", teacher_hash="2" * 64),
        full_row(3, teacher="elsewhere/b", teacher_hash="3" * 64),
        full_row(4, network="resnet8", **{"student.architecture": "wrn_16_1"}),
        full_row(5, network="resnet8"),
    ]
    labels = aggregates.network_labels(pd.DataFrame(rows)).tolist()
    assert labels == [
        "resnet20 (a)",
        "resnet20 (b) [22222222]",
        "resnet20 (b) [33333333]",
        "resnet8 → wrn_16_1",
        "resnet8",
    ]


def test_students_of_several_test_sets_are_networks_of_their_own():
    tests = [
        ("a" * 64, "mine", 30),
        ("b" * 64, "mine", 30),
        ("c" * 64, "bundled", 10_000),
        ("c" * 64, "bundled", 10_000),
    ]
    rows = [
        full_row(n, seed=n, test_sha256=sha256, test_set=name, num_test_images=num, recovered_accuracy=0.5 + n / 10)
        for n, (sha256, name, num) in enumerate(tests)
    ]
    rows.append(full_row(9, network="resnet8", test_sha256="d" * 64, test_set="other", num_test_images=5))
    found = frame(rows)
    assert found["network"].tolist() == [
        "resnet20, on mine (30 images) [aaaaaaaa]",
        "resnet20, on mine (30 images) [bbbbbbbb]",
        "resnet20, on bundled (10000 images)",
        "resnet20, on bundled (10000 images)",
        "resnet8",
    ]
    configs = aggregates.configurations(found).set_index("network")["num_seeds"]
    assert sorted(configs) == [1, 1, 1, 2] and configs["resnet20, on bundled (10000 images)"] == 2


def test_many_sparsities_are_rounded_to_levels_a_figure_can_show():
    rows = [full_row(n, sparsity=0.5 + n / 100) for n in range(40)]
    levels = frame(rows)["level"]
    assert (
        levels.nunique() <= aggregates.NUM_LEVELS and (levels - frame(rows)["pruning.sparsity"]).abs().max() <= 0.0251
    )


def test_numbers_are_worded_without_negative_zero_or_false_spread():
    assert wording.number(-0.00001) == "0.00" and wording.number(-1.5) == "−1.50" and wording.number(None) == "–"
    assert (
        wording.plus_minus(0.0026, 0.0003) == "0.26\u00a0±\u00a00.03"
        and wording.plus_minus(0.0026, float("nan")) == "0.26"
    )
    assert (
        wording.size(999_600) == "1.0 MB" and wording.size(595_000) == "595 kB" and wording.seconds(7199) == "120 min"
    )
    assert wording.count(1, "synthesis") == "1 synthesis" and wording.count(2000, "synthesis") == "2,000 syntheses"


# What the figures show


def lines_of(axes):
    """Label of each line with error bars → (y values, half lengths of the bars)."""
    found = {}
    for container in axes.containers:
        line, _, bars = container.lines
        halves = [(segment[1][1] - segment[0][1]) / 2 for segment in bars[0].get_segments()]
        found[container.get_label()] = (list(line.get_ydata()), halves)
    return found


def test_methods_are_compared_at_the_passes_that_each_row_counts(no_png):
    methods = {"deepinversion": 61_000, "adi": 153_000, "noise": 38_400, "real": 38_400, "dfq": None}
    rows = [
        full_row(10 * n + seed, method=method, seed=seed, sparsity=0.9, reference_kl=0.1 * n + 0.02 * seed,
                 num_teacher_passes=passes, num_student_passes=38_400)
        for n, (method, passes) in enumerate(methods.items(), 1) for seed in range(2)
    ]  # fmt: skip
    material = sections.Material(frame(rows), None, "", {}, {}, 0)
    assert "several synthesis methods (adi, deepinversion, dfq): KL" in sections.opening(material)
    parsed = Page(sections.methods(material).body)
    table = parsed.text[parsed.text.index("recovered") :]
    assert [word for word in table if word in methods] == list(methods), "lowest KL first, whatever is known"
    assert "61 k" in parsed.words and "153 k" in parsed.words and parsed.words.count("– 38 k") == 1
    assert table[table.index("adi") + 2] == "0.210\u00a0±\u00a00.014"
    marks: Any = methods_section.against_passes(material.configs, "t", "test accuracy").axes[1].containers
    assert [float(mark.lines[0].get_xdata()[0]) for mark in marks] == [61.0, 153.0, 38.4, 38.4], "dfq has no place"
    one = sections.Material(
        frame([row for row in rows if row["synthesis.method"] in ("adi", "real")]), None, "", {}, {}, 0
    )
    assert "have one synthesis method" in sections.methods(one).why_not, "real images are no method"
    assert "several synthesis methods" not in sections.opening(one), "nor is noise"


def test_the_ladder_shows_means_with_deviations_of_every_rung_and_the_bound():
    rows = frame(grid(networks=("resnet20",)))
    best = aggregates.best(aggregates.configurations(rows))
    figure = figures.ladder(best, "resnet20")
    own, real = best[~best["real_data"]], best[best["real_data"]]
    for axes in figure.axes:
        lines = lines_of(axes)
        assert set(lines) == {"pruned", "BN re-estimated", "reconstructed", "recovered", "real images (bound)"}
        for label, part, name in [
            ("pruned", own, "at_pruned"),
            ("BN re-estimated", own, "at_bn_reestimated"),
            ("reconstructed", own, "at_reconstructed"),
            ("recovered", own, "at_recovered"),
            ("real images (bound)", real, "at_recovered"),
        ]:
            assert lines[label][0] == pytest.approx((100 * part[name]).tolist())
            assert lines[label][1] == pytest.approx((100 * part[f"{name}_std"]).tolist(), abs=1e-9)
        (teacher,) = [line for line in axes.lines if line.get_label() == "teacher"]
        assert np.asarray(teacher.get_ydata())[0] == pytest.approx(94.0)


def test_every_line_of_the_ladder_has_a_colour_a_marker_and_a_dash_of_its_own():
    for kind in ("color", "marker"):
        assert len({look[kind] for look in figures.LOOKS.values()}) == len(figures.LOOKS) > 4, kind
    assert len({look["linestyle"] for name, look in figures.LOOKS.items() if name != "bound"}) == len(figures.LOOKS) - 1


def test_a_rung_that_no_trial_has_takes_no_line_and_no_column():
    rows = grid(networks=("resnet20",))
    rows = frame([row | {"reconstructed_accuracy": None, "reconstructed_agreement": None} for row in rows])
    figure = figures.ladder(aggregates.best(aggregates.configurations(rows)), "resnet20")
    assert all("reconstructed" not in lines_of(axes) and "recovered" in lines_of(axes) for axes in figure.axes)
    names = [column.name for column in trial_columns(rows, [])]
    assert "at_reconstructed" not in names and "at_bn_reestimated" in names


@pytest.mark.parametrize(
    ("heading", "rung", "how"),
    [
        ("BN only", "bn_reestimated", "after "),
        ("reconstruction only", "reconstructed", "after "),
        ("int8", "quantised", "as an int8 file"),
    ],
)
def test_the_answer_says_what_is_lost_on_a_rung_where_a_trial_has_it(heading, rung, how):
    quantised = {"quantised_accuracy": 0.8123, "quantised_agreement": 0.9} if rung == "quantised" else {}
    rows = [full_row(number, sparsity=level, **quantised) for number, level in enumerate((0.5, 0.9))]
    older = [row | {f"{rung}_accuracy": None, f"{rung}_agreement": None} for row in rows]

    def answer(*rows) -> tuple[list[str], str]:
        parsed = Page(sections.answer(sections.Material(frame(rows), None, "", {}, {}, 0)).body)
        return parsed.text, parsed.words

    texts, words = answer(rows[0], older[1])
    lost = f"{100 * (0.94 - rows[0][f'{rung}_accuracy']):.2f}"
    assert texts.count(heading) == 1 and lost in texts and "–" in texts, "a new trial beside an older one"
    assert f"{heading}, {how}" in words
    texts, words = answer(*older)
    assert heading not in words and lost not in texts and "–" not in texts


def test_the_answer_says_how_many_trials_ended_before_training():
    near = {"enough_kl": 0.05, "reference_kl": 0.01, "best_step": 0}
    rows = [
        full_row(0),
        full_row(1, **near),
        full_row(2, **near, status="failed"),
        full_row(3, **near | {"best_step": 9}),
    ]

    def words(*rows) -> str:
        return Page(sections.answer(sections.Material(frame(rows), None, "", {}, {}, 0)).body).words

    assert "1 trial ended before training, near enough by enough_kl" in words(*rows)
    assert "ended before training" not in words(rows[0], rows[3])


def test_the_close_view_holds_the_recovered_rung_and_its_bars_whole():
    best = aggregates.best(aggregates.configurations(frame(grid(networks=("resnet20",)))))
    close, whole = figures.ladder(best, "resnet20").axes
    (low, high), (values, bars) = close.get_ylim(), lines_of(close)["recovered"]
    assert all(low < value - bar and value + bar < high for value, bar in zip(values, bars, strict=True))
    assert high - low < (whole.get_ylim()[1] - whole.get_ylim()[0]) / 2


def test_heat_map_cells_are_means_of_the_trials_in_them():
    rows = frame(grid(networks=("resnet20",)))
    maps = aggregates.heat_maps(rows, "resnet20")
    figure = figures.heat_map(maps, "resnet20", "accuracy")
    assert list(maps) == [0.5, 0.75, 0.9]
    for axes, (level, cells) in zip(figure.axes, maps.items(), strict=True):
        for text in axes.texts:
            across, down = (int(place) for place in text.get_position())
            own = rows[(rows["level"] == level) & ~rows["real_data"]]
            own = own[own["synthesis.bn_weight"] == cells.index[down]]
            own = own[own["distillation.temperature"] == cells.columns[across]]
            assert text.get_text() == f"{100 * own['recovered_accuracy'].mean():.2f}" and len(own) == 3
        assert len(axes.texts) == 4


def test_a_search_over_many_values_draws_no_heat_map():
    rows = frame([full_row(n, bn_weight=0.1 + n / 50, temperature=1 + n / 10) for n in range(30)])
    assert aggregates.heat_maps(rows, "resnet20") == {}


# The page

SECTIONS = [
    "answer",
    "choice",
    "recovery",
    "heatmap",
    "pareto",
    "synthesis",
    "images",
    "failures",
    "trials",
    "provenance",
]


def test_a_report_has_every_section_and_opens_with_the_answer(built):
    page, _, drawn = built
    assert page.titles() == SECTIONS
    names = {
        "accuracy-resnet20",
        "accuracy-resnet8",
        "heatmap-resnet20",
        "heatmap-resnet8",
        "pareto-accuracy",
        "synthesis",
    }
    assert set(drawn) == {f"{name}.{kind}" for name in names for kind in ("svg", "png")}
    for row in wording.dicts(aggregates.answers(aggregates.best(aggregates.configurations(frame(grid()))))):
        lost = wording.plus_minus(row["lost"], row["lost_std"])
        at = "points of test accuracy at sparsity" if row["level"] == 0.5 else "at"
        assert f"{lost} {at} {row['level']:g}".replace("\u00a0", " ") in page.words
    assert "92 trials: 90 finished and 2 failed." in page.words and "mean ± std of 3 seeds" in page.words
    assert "FloatingPointError: NaN in batch 1" in page.words and "1 < 2" in page.words and "a" * 64 in page.words


def test_a_page_asks_for_nothing_from_outside_and_its_names_are_unique(built):
    page, html, _ = built
    for tag, attributes in page.tags:
        for name in ("src", "href", "xlink:href", "action", "srcset"):
            assert (attributes.get(name) or "#").startswith(("#", "data:")), (tag, attributes)
        assert tag not in ("iframe", "object", "embed", "base", "form")
    assert not re.search(r"@import|url\((?!#)", html)
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    targets = {attributes["href"][1:] for tag, attributes in page.tags if tag == "a"}
    targets |= {a["xlink:href"][1:] for tag, a in page.tags if tag == "use"} | set(re.findall(r"url\(#([^)]*)\)", html))
    assert targets <= set(ids)
    (policy,) = [a["content"] for tag, a in page.tags if a.get("http-equiv") == "Content-Security-Policy"]
    assert policy.startswith("default-src 'none'") and "unsafe-inline" not in policy.partition("style-src")[0]


def test_the_table_on_the_page_is_the_table(place, built):
    page, _, _ = built
    data = json.loads(page.scripts[0])
    rows = results.read(place, "trials")
    head = [attributes for tag, attributes in page.tags if tag == "th" and "title" in attributes]
    assert data["rows"] == len(rows) == 92 and len(head) == len(data["columns"])
    columns = dict(zip([c.name for c in columns_of(place)], data["columns"], strict=True))
    shown = [None if pd.isna(x) else pytest.approx(100 * x, abs=0.0051) for x in rows["recovered_accuracy"]]
    assert columns["at_recovered"]["values"] == shown and None in shown
    status = columns["status"]
    assert [status["levels"][n] for n in status["values"]] == rows["status"].tolist()
    assert columns["trial_id"]["values"] == rows["trial_id"].tolist()
    assert {"pruning.sparsity", "synthesis.bn_weight", "distillation.temperature"} <= set(columns)
    assert not {"distillation.learning_rate", "synthesis.num_steps", "device"} & set(columns)


def columns_of(place):
    rows = aggregates.prepared(results.read(place, "trials"))
    return trial_columns(rows, aggregates.varying(rows))


def test_text_from_data_is_never_markup(tmp_path, no_png):
    rows = [
        full_row(n, seed=n, teacher_architecture=SECRETLY_MARKUP, teacher=SECRETLY_MARKUP, host=SECRETLY_MARKUP)
        for n in range(2)
    ]
    rows += [
        full_row(
            5,
            status="failed",
            reason=SECRETLY_MARKUP,
            reference_kl=None,
            agreement=None,
            recovered_accuracy=None,
            seed=5,
        )
    ]
    place = tmp_path / "<b>&amp;"
    write(place, "trials", rows)
    write(place, "synthesis", batch_rows(rows))
    picture(place / "images" / f"{rows[0]['synthesis_key'][:12]}.png")
    (place / "sweep.yaml").write_text(json.dumps({"about": {"source": SECRETLY_MARKUP, "expected": ["<i>"]}}))
    page, html, drawn = build(place)
    assert len(page.scripts) == 2 and not [tag for tag, _ in page.tags if tag in ("b", "i")]
    assert all(a["src"].startswith("data:") and "onerror" not in a for tag, a in page.tags if tag == "img")
    assert not any(name.startswith("on") for _, attributes in page.tags for name in attributes)
    data = json.loads(page.scripts[0])
    texts = [column["levels"] for column in data["columns"] if "levels" in column] + [
        c["values"] for c in data["columns"]
    ]
    assert any(SECRETLY_MARKUP in values for values in texts) and SECRETLY_MARKUP in page.words
    assert all(re.fullmatch(r"[a-z0-9-]+\.(svg|png)", name) for name in drawn)
    assert "<script" not in b"".join(data for name, data in drawn.items() if name.endswith("svg")).decode()
    assert html.count("</script>") == 2


@pytest.mark.parametrize(
    ("missing", "gone", "words"),
    [
        ("synthesis", {"synthesis"}, "no synthesis table"),
        ("images", {"images"}, "no picture of these trials"),
        ("failures", {"failures"}, "no trial failed"),
        ("weights", {"heatmap"}, "vary neither the BN weight nor the temperature"),
        ("accuracy", {"choice"}, "no test data was given"),
        ("sweep.yaml", set(), "KL divergence"),
    ],
)
def test_what_is_missing_is_left_out_with_a_reason(tmp_path, missing, gone, words, no_png):
    one: dict[str, Any] = {"bn_weights": (0.2,), "temperatures": (4.0,)} if missing == "weights" else {}
    rows: list[dict[str, Any]] = grid(networks=("resnet20",), seeds=2, **one)
    if missing == "accuracy":
        rows = [row | {name: None for name in row if name.endswith("_accuracy")} for row in rows]
    if missing != "failures":
        rows.append(
            full_row(
                999, status="failed", reason="OSError: full", reference_kl=None, agreement=None, recovered_accuracy=None
            )
        )
    write(tmp_path, "trials", rows)
    if missing != "synthesis":
        write(tmp_path, "synthesis", batch_rows(rows))
    if missing != "images":
        picture(tmp_path / "images" / f"{rows[0]['synthesis_key'][:12]}.png")
    page, _, _ = build(tmp_path)
    assert set(page.titles()) == set(SECTIONS) - gone and words in page.words
    if missing == "accuracy":
        assert "test accuracy, %" not in page.words and "agreement with the teacher" in page.words


def test_one_trial_has_a_report_without_spread(tmp_path, no_png):
    write(tmp_path, "trials", [full_row(1)])
    page, _, _ = build(tmp_path)
    assert "One trial, finished." in page.words and "one seed, no spread" in page.words
    assert (
        not re.search(r"\bnan\b", page.words, re.IGNORECASE)
        and "±" not in page.words.partition("Accuracy against sparsity")[2][:200]
    )


def test_a_sweep_that_failed_whole_says_so_and_why(tmp_path):
    empty: dict[str, Any] = {
        name: None for name in full_row(0) if name.endswith(("_accuracy", "agreement", "_kl", "_s", "_bytes"))
    }
    rows = [full_row(n, **empty, status="failed", reason="RuntimeError: no", synthesis_key=None) for n in range(3)]
    write(tmp_path, "trials", rows)
    page, _, drawn = build(tmp_path)
    assert "3 trials: 3 failed. There is no result to report yet." in page.words and not drawn
    assert page.titles() == ["failures", "trials", "provenance"] and "RuntimeError: no" in page.words


def test_a_network_with_real_rows_only_is_called_a_bound(tmp_path, no_png):
    write(tmp_path, "trials", [full_row(n, method="real", seed=n) for n in range(3)])
    page, _, _ = build(tmp_path)
    assert (
        "recovered with real images, an upper bound and not data-free," in page.words and "pareto" not in page.titles()
    )


def test_ten_thousand_trials_make_a_page_below_five_megabytes_with_all_rows(tmp_path, no_png):
    axes = itertools.product(("resnet20", "resnet8"), (0.5, 0.75, 0.9, 0.95), range(10), range(125))
    rows = [
        full_row(n, network=network, sparsity=sparsity, bn_weight=weight, temperature=1 + point / 8, seed=point % 3)
        for n, (network, sparsity, weight, point) in enumerate(axes)
    ]
    assert len(rows) == 10_000
    # `results.write` looks at each of a million cells: here, with types checked, that takes longer than the report.
    (tmp_path / "trials").mkdir()
    pq.write_table(pa.Table.from_pylist(rows, results.schema("trials")), tmp_path / "trials" / "part.parquet")
    write(tmp_path, "synthesis", batch_rows(rows))
    for key in {row["synthesis_key"][:12] for row in rows}:
        picture(tmp_path / "images" / f"{key}.png")
    written = report.write(tmp_path)
    assert written.size_bytes == (tmp_path / "report.html").stat().st_size < 5e6
    page = Page((tmp_path / "report.html").read_text())
    assert all(len(column["values"]) == 10_000 for column in json.loads(page.scripts[0])["columns"])


def test_pictures_are_few_and_large_ones_are_made_smaller(tmp_path):
    picture(tmp_path / "images" / "large.png", (2000, 1800))
    for n in range(20):
        picture(tmp_path / "images" / f"{n:02}.png", (100, 100))
    (tmp_path / "images" / "bad.png").write_bytes(b"no picture")
    names = ["large.png", "bad.png", "gone.png", *(f"{n:02}.png" for n in range(20))]
    uris = pictures.data_uris(folder(tmp_path / "images"), names)
    assert list(uris) == ["large.png", *(f"{n:02}.png" for n in range(pictures.NUM_PICTURES - 1))]
    assert uris["large.png"].startswith("data:image/jpeg") and uris["00.png"].startswith("data:image/png")
    assert sum(map(len, uris.values())) <= pictures.TOTAL_BYTES * 4 / 3 + 1000


# The command


def test_the_command_writes_page_and_figures_the_same_each_time_and_says_where(place, built, tmp_path, run_cli):
    done = run_cli("report", str(place), "--out", str(tmp_path / "there" / "answer.html"))
    assert done.code == 0 and "answer.html" in done.out and "6, each as SVG and PNG" in done.out, done.err
    _, html, drawn = built
    assert html.startswith("<!DOCTYPE html>") and len(drawn) == 12
    assert (tmp_path / "there" / "answer.html").read_text() == html
    assert {path.name: path.read_bytes() for path in (tmp_path / "there" / "answer").iterdir()} == drawn
    with Image.open(io.BytesIO((tmp_path / "there" / "answer" / "accuracy-resnet20.png").read_bytes())) as image:
        assert image.width == round(200 * figures.WIDTH)


def test_without_out_the_report_lies_in_the_place(tmp_path, run_cli):
    write(tmp_path, "trials", [full_row(1)])
    assert run_cli("report", str(tmp_path)).code == 0
    assert (tmp_path / "report.html").exists() and (tmp_path / "report" / "accuracy-resnet20.svg").exists()


@pytest.mark.parametrize(
    "words", [["{place}/nothing"], ["{place}", "--out", "page.txt"], ["{place}", "--out", ".html"]]
)
def test_wrong_input_is_one_line_and_exit_code_2(place, words, run_cli):
    done = run_cli("report", *(word.format(place=place) for word in words))
    assert done.code == 2 and len(done.err.splitlines()) == 1 and done.err.startswith("error:")


def test_a_place_behind_a_uri_has_its_report_written_there(tmp_path, no_png):
    rows = grid(networks=("resnet20",), seeds=1)
    write(tmp_path, "trials", rows)
    write(tmp_path, "synthesis", batch_rows(rows))
    picture(tmp_path / "images" / f"{rows[0]['synthesis_key'][:12]}.png")
    local = report.write(tmp_path)
    page = (tmp_path / "report.html").read_bytes()
    fsspec.filesystem("memory").put(str(tmp_path), "/bucket", recursive=True)
    for name in ("report.html", "report"):
        fsspec.filesystem("memory").rm(f"/bucket/{name}", recursive=True)
    there = report.write("fsspec+memory://bucket")
    assert there.figures == local.figures and str(there.figure_folder) == "fsspec+memory://bucket/report"
    found = fsspec.filesystem("memory").cat("/bucket/report.html")
    assert found.replace(b"fsspec+memory://bucket", b"X").replace(b"bucket", b"N") == page.replace(
        str(tmp_path).encode(), b"X"
    ).replace(tmp_path.name.encode(), b"N")


# In a browser

# Texts of a figure that lie outside it or on each other; on one line three pixels must lie between.
OVERLAPS = """[...document.querySelectorAll('.card svg')].flatMap(svg => {
  const frame = svg.getBoundingClientRect();
  const texts = [...svg.querySelectorAll('text')].map(t => [t.textContent, t.getBoundingClientRect()]);
  const found = texts.filter(([, r]) => r.left < frame.left - 1 || r.right > frame.right + 1 ||
    r.top < frame.top - 1 || r.bottom > frame.bottom + 1).map(([t]) => [t, 'outside']);
  texts.forEach(([a, p], i) => texts.slice(i + 1).forEach(([b, q]) => {
    const across = Math.min(p.right, q.right) - Math.max(p.left, q.left);
    const down = Math.min(p.bottom, q.bottom) - Math.max(p.top, q.top);
    if (across > -3 && down > 3) found.push([a, b]);
  }));
  return found;
})"""
WIDEST = """Math.max(...[...document.querySelectorAll('body *')].filter(e => !e.closest('.scroll table'))
  .map(e => e.getBoundingClientRect().right))"""
SMALLEST = """Math.min(...[...document.querySelectorAll('.card svg text')].map(t =>
  parseFloat(getComputedStyle(t).fontSize) * t.ownerSVGElement.getBoundingClientRect().width
  / t.ownerSVGElement.viewBox.baseVal.width))"""
RECOVERED = """(index => [...document.querySelectorAll('#trials-table tbody tr')].map(r => r.cells[index].textContent))(
  [...document.querySelectorAll('#trials-table th')].findIndex(t => t.textContent === 'recovered'))"""


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium binary found; apt-get install chromium runs this test")
def test_a_browser_shows_the_page_on_phone_desktop_dark_and_paper_and_sorts_on_click(place, built, tmp_path):
    path = tmp_path / "report.html"
    path.write_text(built[1])
    with Browser(tmp_path / "profile") as browser:
        for width, height, how in [
            (360, 740, {}),
            (1280, 900, {}),
            (1280, 900, {"dark": True}),
            (794, 1123, {"media": "print"}),
        ]:
            browser.open(path, width, height, **how)
            assert browser.complaints() == []
            assert browser.value(OVERLAPS) == [], (width, how)
            assert browser.value(SMALLEST) >= 10 and browser.value("document.documentElement.scrollWidth") <= width
            if not how.get("media"):
                assert browser.value(WIDEST) <= width
            if not how:
                with Image.open(io.BytesIO(browser.screenshot(tmp_path / f"report-{width}.png"))) as image:
                    assert image.height > 2000 and len(image.convert("RGB").getcolors(1 << 24) or []) > 100
        browser.open(path, 1280, 900)
        number = browser.value(RECOVERED.partition("(\n  ")[2].removesuffix(")")) + 1
        assert len(browser.value(RECOVERED)) == 50
        seen = []
        for _ in range(2):
            browser.click(f"#trials-table th:nth-child({number}) button")
            seen.append([float(text) for text in browser.value(RECOVERED) if text != "–"])
        assert seen[0] == sorted(seen[0], reverse=True) and seen[1] == sorted(seen[1])
        accuracies = results.read(place, "trials")["recovered_accuracy"]
        assert seen[0][0] == pytest.approx(100 * accuracies.max()) and seen[1][0] == pytest.approx(
            100 * accuracies.min()
        )
        browser.click("#after")
        assert "51 to 92 of 92" in browser.value("document.getElementById('status').textContent")
        assert browser.complaints() == []


def test_a_report_from_a_shell_loads_neither_ray_nor_torch(tmp_path):
    import subprocess
    import sys

    write(tmp_path, "trials", [full_row(1)])
    program = "import sys; from dfkd_ray import report; report.write(sys.argv[1]); "
    program += "print('ray' in sys.modules, 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True, timeout=900)
    assert done.stdout.split() == ["False", "False"] and done.stderr == "", done.stderr
    assert Path(tmp_path / "report.html").exists()
