"""Tables in documents: rendered from rows files alone, refused where rows do not say one thing; rows files."""

import re
import statistics
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from dfkd_ray import results
from dfkd_ray.report import documents
from dfkd_ray.results import measurements, row_files, tables
from dfkd_ray.results.metrics import KNOWN, metric
from table_rows import full_row
from test_documents import DOCUMENTS, ROOT

SPARSITIES, SEEDS = (0.75, 0.9), (0, 1, 2)
TESTED = {"test_set": "fashion_mnist", "test_sha256": "a" * 64, "trial_version": 3, "synthesis_version": 2}
TESTED |= {"num_teacher_passes": 2_000_000, "ray_version": None}
NUMERICS = "x86_64 AVX512, torch 2.15.0"
LOST = {"rows": {"metric": {"bn_reestimated_points_lost": "BN only", "points_lost": "**recovered**"}}}
LOST |= {"columns": {"pruning.sparsity": list(SPARSITIES)}, "where": {"teacher": "runs/resnet20"}}


def rows_of(network="resnet20", first=0, **more):
    """Three seeds at two sparsities."""
    points = [(sparsity, seed) for sparsity in SPARSITIES for seed in SEEDS]
    return [
        full_row(first + index, network=network, sparsity=sparsity, seed=seed, **(TESTED | more))
        for index, (sparsity, seed) in enumerate(points)
    ]


def place_of(folder: Path, rows) -> str:
    """A results place with these rows."""
    results.write(folder, "trials", rows, "all")
    return str(folder)


def rows_file(path: Path, rows) -> Path:
    """A rows file with these rows."""
    place = path.parent / f"place-{path.stem}"
    place_of(place, rows)
    path.write_bytes(row_files.packed(tables.read_arrow(place, "trials")))
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Rows of two networks, and of one of them on real images."""
    folder = tmp_path_factory.mktemp("documents")
    rows_file(folder / "grid.parquet", [*rows_of(), *rows_of("resnet8", 10)])
    rows_file(folder / "bound.parquet", rows_of(first=20, method="real", num_images=512))
    (folder / "sweep.yaml").write_text("about: {command: dfkd-ray sweep sweep.yaml}\n")
    return folder


def document(folder: Path, spec, files="grid.parquet", text="stale") -> Path:
    """A document with one table, between other lines; the mark is on its line 3."""
    written = spec if isinstance(spec, str) else yaml.safe_dump(spec, sort_keys=False)
    path = folder / "page.md"
    path.write_text(f"# Page\n\n<!-- table of {files}\n{written}-->\n{text}\n<!-- end of table -->\nafter\n")
    return path


def table_in(folder: Path, spec, files="grid.parquet") -> tuple[list[list[str]], str]:
    """The cells of a rendered table, without its line of dashes, and its caption."""
    lines = documents.render(document(folder, spec, files)).after.splitlines()
    start = lines.index("-->") + 1
    end = lines.index("<!-- end of table -->")
    cells = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines[start : end - 2]]
    assert lines[end - 2] == "" and len({len(row) for row in cells}) == 1
    return [cells[0], *cells[2:]], lines[end - 1]


def lost(row, rung="recovered"):
    return 100 * (row["teacher_accuracy"] - row[f"{rung}_accuracy"])


def mean_std(values):
    return f"{statistics.mean(values):.2f} ± {statistics.stdev(values):.2f}"


# ---- what is rendered ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_the_tables_of_our_documents_are_what_their_rows_say(page):
    if list(documents.tables_of(documents.lines_of(page.read_text(encoding="utf-8")), page.name)):
        done = documents.render(page)
        assert done.after == done.before, f"render it: dfkd-ray results --render {page.relative_to(ROOT)}"


def test_our_rows_files_are_small_and_say_nothing_of_machines():
    files = sorted((ROOT / "sweeps" / "results").glob("*"))
    assert sum(path.stat().st_size for path in files) <= 3_000_000
    for path in files:
        assert path.suffix == ".parquet"
        if measurements.is_own(path):
            found = measurements.read(path)
            commands = row_files.without_folders(pa.chunked_array([found.frame["command"].tolist()])).to_pylist()
            assert (
                commands == found.frame["command"].tolist() and bytes(measurements.packed(found)) == path.read_bytes()
            )
        else:
            assert bytes(row_files.packed(row_files.read([path]))) == path.read_bytes()


def test_rungs_down_and_sparsities_across_are_means_over_seeds(folder):
    cells, caption = table_in(folder, LOST | {"heading": "ResNet-20", "sweep": "sweep.yaml", "note": "A note."})
    own = {s: [row for row in rows_of() if row["pruning.sparsity"] == s] for s in SPARSITIES}
    assert cells == [
        ["ResNet-20", "0.75", "0.9"],
        ["BN only", *(mean_std([lost(row, "bn_reestimated") for row in own[s]]) for s in SPARSITIES)],
        ["**recovered**", *(f"**{mean_std([lost(row) for row in own[s]])}**" for s in SPARSITIES)],
    ]
    assert re.fullmatch(
        r"\*Percentage points of test accuracy lost against the teacher \(94.00 %\) on 10,000 images of "
        rf"`fashion_mnist`. Mean ± std of 3 seeds. A note. `dfkd-ray sweep sweep.yaml`; `{NUMERICS}`; trial version 3; "
        r"\d{4}-\d\d-\d\d.\*",
        caption,
    )


def test_axes_cross_and_labels_and_the_number_behind_them_are_of_the_rows(folder):
    metrics = {"metric": {"reconstructed_points_lost": "reconstructed", "points_lost": "**recovered**"}}
    spec = {"rows": "teacher", "columns": [{"pruning.sparsity": [0.75, 0.9]}, metrics], "behind": "teacher_accuracy"}
    cells, caption = table_in(folder, spec)
    assert cells[0][1:] == ["0.75: reconstructed", "**0.75: recovered**", "0.9: reconstructed", "**0.9: recovered**"]
    assert [row[0] for row in cells[1:]] == ["resnet20 (94.00)", "resnet8 (94.00)"]
    assert "the teacher (" not in caption, "two teachers"


def test_methods_down_have_accuracies_and_passes_in_their_units(folder):
    spec = {
        "rows": "synthesis.method",
        "columns": [
            {"teacher": {"runs/resnet20": "a | b", "runs/resnet8": "ResNet-8"}},
            {"metric": {"recovered_accuracy": "%", "num_teacher_passes": "millions"}},
        ],
        "where": {"sparsity": 0.75},
        "formats": {"num_teacher_passes": {"times": 1e-6, "decimals": 1}},
    }
    cells, caption = table_in(folder, spec)
    assert cells[0][1:] == [r"a \| b: %", r"a \| b: millions", "ResNet-8: %", "ResNet-8: millions"]
    accuracy = mean_std([100 * row["recovered_accuracy"] for row in rows_of()[:3]])
    assert cells[1][:3] == ["deepinversion", accuracy, "2.0"]
    assert caption.startswith("*Accuracy in percent on 10,000 images of `fashion_mnist`. Mean")


def test_a_second_file_is_another_row_and_real_images_are_said(folder):
    spec = {
        "rows": {"entries": {"synthetic": {"real_data": False}, "real": {"real_data": True}}},
        "columns": {"sparsity": [0.75, 0.9]},
        "metric": "points_lost",
        "where": {"teacher": "runs/resnet20"},
    }
    cells, caption = table_in(folder, spec, "grid.parquet and bound.parquet")
    real = [lost(row) for row in rows_of(first=20)[:3]]
    assert [row[0] for row in cells[1:]] == ["synthetic", "real"] and cells[2][1] == mean_std(real)
    assert "6 of 12 trials on real images: an upper bound, not data-free." in caption


def test_an_entry_has_its_own_conditions_and_metric(folder):
    synthetic, real = {"real_data": False}, {"real_data": True}
    entries = {
        "BN only": {**synthetic, "metric": "bn_reestimated_points_lost"},
        "**recovered**": {**synthetic, "metric": "points_lost"},
        "real images": {**real, "metric": "points_lost"},
    }
    spec = {"rows": {"entries": entries}, "columns": {"sparsity": [0.9]}, "where": {"teacher": "runs/resnet20"}}
    cells, _ = table_in(folder, spec, "grid.parquet and bound.parquet")
    own, bound = rows_of()[3:], rows_of(first=20)[3:]
    assert cells[1:] == [
        ["BN only", mean_std([lost(row, "bn_reestimated") for row in own])],
        ["**recovered**", f"**{mean_std([lost(row) for row in own])}**"],
        ["real images", mean_std([lost(row) for row in bound])],
    ]


def test_what_has_not_finished_is_in_no_mean_and_is_said(folder):
    rows = rows_of()
    nothing = dict.fromkeys(("recovered_accuracy", "reference_kl", "agreement"))
    rows[2] |= {"status": "failed", "recovered_accuracy": 0.1}
    rows[3:] = [row | nothing | {"status": "failed"} for row in rows[3:]]
    rows[5] |= {"status": "stopped"}
    rows_file(folder / "broken.parquet", rows)
    cells, caption = table_in(folder, LOST, "broken.parquet")
    assert cells[2][1:] == [f"**{mean_std([lost(row) for row in rows[:2]])}**", "–"]
    assert "Mean ± std of 2 seeds. In no mean: 3 failed and 1 stopped early. –: not measured." in caption


def test_fewer_seeds_than_usual_are_said_in_the_cell(folder):
    rows = rows_of()
    rows[4]["recovered_accuracy"] = None  # finished, and not measured
    rows_file(folder / "fewer.parquet", rows)
    cells, caption = table_in(folder, LOST, "fewer.parquet")
    assert cells[2][2] == f"**{mean_std([lost(rows[3]), lost(rows[5])])}** (2)"
    assert not any(cell.endswith(")") for cell in (*cells[1], cells[2][1]))
    assert "Mean ± std of 3 seeds, or of the number in brackets." in caption
    rows_file(folder / "one.parquet", [rows[0]])
    assert table_in(folder, LOST, "one.parquet")[0][1][1:] == [f"{lost(rows[0], 'bn_reestimated'):.2f}", "–"]
    assert "One seed, no spread." in table_in(folder, LOST, "one.parquet")[1]


def test_several_machines_or_versions_are_said(folder):
    rows = rows_of()
    rows[0] |= {"numerics": "NVIDIA `H100` <b>, torch 2.11", "torch_version": "2.11"}
    rows_file(folder / "mixed.parquet", rows)
    caption = table_in(folder, LOST, "mixed.parquet")[1]
    assert "2 numerics classes (" in caption and f"; `{NUMERICS}`" not in caption and "2 versions of torch" in caption
    assert re.search(r"``[^`]*`H100` <b>.*``", caption), "a machine's name is code, never markup"


def test_distances_on_two_kinds_of_reference_images_are_said_to_be_no_comparison(folder):
    rows_file(folder / "kinds.parquet", [*rows_of(), *rows_of("resnet8", 10, trial_version=2)])
    spec = {"rows": "teacher", "columns": "sparsity"}
    says = "two kinds of reference images"
    assert says in table_in(folder, spec | {"metric": "reference_kl"}, "kinds.parquet")[1]
    assert says not in table_in(folder, spec | {"metric": "points_lost"}, "kinds.parquet")[1]
    assert says not in table_in(folder, spec | {"metric": "agreement"})[1]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"distillation.temperature": 8.0}, "differ in distillation.temperature"),
        ({"trial_version": 2}, "differ in trial_version"),
        ({"teacher_hash": "f" * 64}, "differ in teacher_hash"),
        ({"test_sha256": "b" * 64}, "different test images"),
    ],
)
def test_a_cell_never_averages_what_differs_in_more_than_seeds(folder, change, says):
    rows = rows_of()
    rows[0] |= change
    rows_file(folder / "other.parquet", rows)
    with pytest.raises(ValueError, match=r"page.md, line 3: cell 'BN only', '0.75': .*" + re.escape(says)):
        documents.render(document(folder, LOST, "other.parquet"))


CHOICE = {"of": "choice", "rows": "network", "columns": {"metric": ["num_trials", "correlation", "regret", "largest"]}}


def test_a_table_of_the_choice_says_what_choosing_by_the_distance_costs(folder):
    # At 0.75 the lowest KL is of the best trial, at 0.9 of one that loses 0.3 points more than the best.
    kl, accuracy = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6], [0.92, 0.91, 0.90, 0.85, 0.853, 0.84]
    rows = rows_of()
    for row, distance, share in zip(rows, kl, accuracy, strict=True):
        row |= {"reference_kl": distance, "recovered_accuracy": share}
    real = rows_of(first=30, method="real", num_images=512)
    rows_file(folder / "choice.parquet", [*rows, *real])
    cells, caption = table_in(folder, CHOICE | {"sweep": "sweep.yaml", "note": "Mine."}, "choice.parquet")
    # ranks of the points lost: 1 2 3 5 4 6
    assert cells == [["", "num_trials", "correlation", "regret", "largest"], [cells[1][0], "6", "0.94", "0.15", "0.30"]]
    assert "Regret: points" in caption and "Mine. `dfkd-ray sweep sweep.yaml`" in caption
    assert NUMERICS in caption and "trial version 3" in caption and "real" not in caption


def test_a_choice_that_rows_cannot_show_is_refused(folder):
    rows_file(folder / "choice.parquet", rows_of(method="real", num_images=512))
    with pytest.raises(ValueError, match=r"page.md, line 3: of: choice needs two finished, data-free trials"):
        documents.render(document(folder, CHOICE, "choice.parquet"))
    made = measurements.measured([measurements.Row({"a": 1}, {"b": 2})], numerics="n", version="1", command="c")
    measurements.add(folder / "bench.parquet", made)
    with pytest.raises(ValueError, match=r"page.md, line 3: of: choice needs rows of trials"):
        documents.render(document(folder, CHOICE, "bench.parquet"))


# ---- what is refused -------------------------------------------------------------------------------------------------

WRONG = {
    "unknown column": LOST | {"columns": "pruning.sparcity"},
    "unknown metric": LOST | {"rows": {"metric": ["points_lots"]}},
    "unknown field": LOST | {"colour": "red"},
    "about nothing that is": LOST | {"of": "seeds"},
    "no rows": {"columns": "teacher", "metric": "points_lost"},
    "no metric": {"rows": "teacher", "columns": "sparsity"},
    "two metrics": LOST | {"metric": "points_lost"},
    "a level of two": LOST | {"columns": {"pruning.sparsity": [0.9], "teacher": ["a"]}},
    "a level without values": LOST | {"columns": {"pruning.sparsity": []}},
    "an axis of nothing": LOST | {"columns": []},
    "a number for an axis": LOST | {"columns": 3},
    "a value that is a list": LOST | {"columns": {"pruning.sparsity": [[0.9]]}},
    "equal labels": LOST | {"columns": {"pruning.sparsity": {"0.75": "a", "0.9": "a"}}},
    "no label": LOST | {"columns": {"pruning.sparsity": {"0.75": ""}}},
    "entries without conditions": LOST | {"columns": {"entries": ["a"]}},
    "a metric in one entry of two": {
        "rows": {"entries": {"a": {"real_data": True}, "b": {"metric": "points_lost"}}},
        "columns": "sparsity",
    },
    "an unknown metric in an entry": {"rows": {"entries": {"b": {"metric": "points_lots"}}}, "columns": "sparsity"},
    "a column on both axes": LOST | {"columns": "teacher"},
    "text for a number": LOST | {"where": {"pruning.sparsity": "high"}},
    "rows that are not there": LOST | {"where": {"teacher": "nobody"}},
    "a column that ends many": LOST | {"where": {"seed": 0}},
    "a format of nothing": LOST | {"formats": {"wall_s": {"decimals": 1}}},
    "decimals below 0": LOST | {"formats": {"points_lost": {"decimals": -1}}},
    "sweep and command": LOST | {"sweep": "sweep.yaml", "command": "a"},
    "no such sweep": LOST | {"sweep": "nothing.yaml"},
    "no YAML": "rows: [a\n",
    "no mapping": "- a\n",
    "nothing": "",
    "a key twice": "rows: teacher\nrows: teacher\n",
}


@pytest.mark.parametrize("kind", WRONG)
def test_a_wrong_specification_is_one_line_with_document_and_line_and_nothing_is_written(folder, run_cli, kind):
    path = document(folder, WRONG[kind])
    good = folder / "good.md"
    good.write_text(f"<!-- table of grid.parquet\n{yaml.safe_dump(LOST)}-->\nstale\n<!-- end of table -->\n")
    before = path.read_bytes(), good.read_bytes()
    done = run_cli("results", "--render", str(good), str(path))
    assert done.code == 2 and not done.out and len(done.err.splitlines()) == 1, done.err
    assert re.search(r"page\.md(, line 3\b|: not valid YAML: line [4-7]\b)", done.err), done.err
    assert (path.read_bytes(), good.read_bytes()) == before


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("x\n<!-- table of a.parquet\nrows: teacher\n-->\n", 2),
        ("x\n<!-- end of table -->\n", 2),
        ("<!-- table of a.parquet\nrows: teacher\n", 1),
        ("<!-- table of a.parquet -->\n<!-- end of table -->\n", 1),
        ("<!-- table of a.parquet\n-->\n<!-- table of b.parquet\n-->\n<!-- end of table -->\n", 3),
        ("<!-- Table of a.parquet\n-->\n<!-- end of table -->\n", 1),
        ("<!-- table of a.parquet\n-->\n\n<!-- End of table-->\n", 4),
        ("<!-- table of a.parquet\nx: y -->\n<!-- end of table -->\n", 1),
    ],
)
def test_marks_that_do_not_belong_together_are_refused_with_their_line(tmp_path, text, line):
    path = tmp_path / "page.md"
    path.write_text(text)
    with pytest.raises(ValueError, match=rf"^[^\n]*page.md, line {line}: [^\n]*$"):
        documents.render(path)


def test_a_rows_file_that_is_missing_damaged_or_named_twice_is_one_line(folder, run_cli):
    (folder / "torn.parquet").write_bytes((folder / "grid.parquet").read_bytes()[:-100])
    (folder / "text.parquet").write_text("no table")
    for files, says in (
        ("nothing.parquet", "no such file"),
        ("torn.parquet", "damaged"),
        ("text.parquet", "damaged"),
        ("grid.parquet and grid.parquet", "would count twice"),
    ):
        path = document(folder, LOST, files)
        before = path.read_bytes()
        done = run_cli("results", "--render", str(path))
        assert done.code == 2 and says in done.err and "page.md, line 3: " in done.err, done.err
        assert len(done.err.splitlines()) == 1 and path.read_bytes() == before


def test_documents_without_tables_and_options_that_do_nothing_are_refused(tmp_path, run_cli):
    (tmp_path / "empty.md").write_text(
        "Say `<!-- table of a.parquet`:\n```\n<!-- table of a.parquet\n-->\n<!-- end of table -->\n```\n"
    )
    for words, says in (
        (["--render", str(tmp_path / "empty.md")], "no table of rows in it"),
        (["--render", str(tmp_path / "nothing.md")], "no such file"),
        (["--render"], "say which documents"),
        (["--render", "a.md", "--check"], "--render takes no --check"),
        (["--render", "a.md", "--limit", "0"], "--render takes no --limit"),
        (["a", "b"], "expected one PLACE, got 2"),
        ([], "expected one PLACE, got 0"),
        (["a", "--format", "parquet"], "say with --out"),
        (["a", "--out", "a.parquet", "--sort", "teacher"], "takes no --sort"),
    ):
        done = run_cli("results", *words)
        assert done.code == 2 and says in done.err and len(done.err.splitlines()) == 1, done.err


# ---- documents -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_only_what_is_between_the_marks_changes_and_once_alone(folder, run_cli, newline):
    fenced = "```md\n<!-- table of grid.parquet\n-->\n<!-- end of table -->\n```\n"
    path = document(folder, LOST)
    text = (fenced + "\x0bodd\u2028ends\n" + path.read_text() + "no end of line").replace("\n", newline)
    path.write_bytes(text.encode())
    first = run_cli("results", "--render", str(path))
    assert first.code == 0 and first.out == f"{path}, line 9: changed\n1 of 1 tables changed\n"
    after = path.read_bytes().decode()
    assert (head := text.partition("stale")[0]) and after.startswith(head)
    assert after.endswith(text.partition("stale" + newline)[2]) and len(after) > len(text)
    assert after.count("\n") == after.count(newline)
    again = run_cli("results", "--render", str(path))
    assert again.out == f"{path}, line 9: as it was\n1 of 1 tables changed\n".replace("1 of", "0 of")
    assert path.read_bytes().decode() == after


def test_a_link_to_a_document_stays_a_link(folder, tmp_path):
    path = document(folder, LOST)
    link = folder / "link.md"
    link.symlink_to(path)
    documents.write([documents.render(link)])
    assert link.is_symlink() and "stale" not in path.read_text()


# ---- rows files ------------------------------------------------------------------------------------------------------


def test_a_rows_file_is_read_back_as_it_was_but_for_machines_and_equal_rows_are_equal_bytes(tmp_path, run_cli):
    rows = rows_of(host="secret-host", teacher="/home/someone/nets/resnet20")
    rows[0] |= {"warnings": "see '/srv/a/b.txt' and ~/x/y.txt, 1/2 of it", "reason": "at s3://bucket/a/b"}
    rows[1] |= {"distillation.seed": 2**60 + 1}
    place = place_of(tmp_path / "place", rows)
    words = ["results", place, "--where", "sparsity=0.75", "--out", str(tmp_path / "a.parquet")]
    done = run_cli(*words)
    assert done.code == 0 and done.out.startswith(f"written: {tmp_path / 'a.parquet'} (3 rows, "), done.err
    first = (tmp_path / "a.parquet").read_bytes()
    assert run_cli(*words).code == 0 and (tmp_path / "a.parquet").read_bytes() == first
    assert not any(word in first for word in (b"secret-host", b"someone", b"/srv"))
    before = {row["trial_id"]: row for row in tables.read_arrow(place, "trials").to_pylist()}
    after = row_files.read([tmp_path / "a.parquet"]).to_pylist()
    assert len(after) == 3
    changed = {"host": None, "teacher": "resnet20"}
    for row in after:
        if row["trial_id"] == rows[0]["trial_id"]:
            changed["warnings"] = "see 'b.txt' and y.txt, 1/2 of it"
        assert row == before[row["trial_id"]] | changed
        changed.pop("warnings", None)
    assert "ray_version" not in pq.read_schema(tmp_path / "a.parquet").names
    assert run_cli("results", str(tmp_path / "a.parquet"), "--format", "json").out.count("trial_id") == 3


def test_a_rows_file_replaces_nothing_else_and_holds_something(tmp_path, run_cli):
    place = place_of(tmp_path / "place", rows_of())
    other = tmp_path / "other.parquet"
    other.write_bytes(b"PAR1 somebody's")
    done = run_cli("results", place, "--out", str(other))
    assert done.code == 2 and "it is there already and not a rows file" in done.err
    done = run_cli("results", place, "--where", "status=failed", "--out", str(tmp_path / "none.parquet"))
    assert done.code == 2 and "nothing is written" in done.err and not (tmp_path / "none.parquet").exists()
    assert other.read_bytes() == b"PAR1 somebody's"


def test_points_lost_are_the_teachers_accuracy_minus_the_rungs_in_points():
    frame = pd.DataFrame([{name: row.get(name) for name in results.schema("trials").names} for row in rows_of()])
    for name in (name for name in KNOWN if name.endswith("points_lost")):
        rung = metric(name).rung
        assert rung is not None and metric(name).is_tested
        expected = [
            100 * (0.94 - (row[rung.accuracy] if row.get(rung.accuracy) else float("nan"))) for row in rows_of()
        ]
        assert metric(name).of(frame).tolist() == pytest.approx(expected, nan_ok=True)
