"""Files of measurements: what benches add with --rows, what is refused, and tables of documents made from them."""

import json
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dfkd_ray.report import documents
from dfkd_ray.results import measurements
from dfkd_ray.results.measurements import Interval, Row
from helpers import refusal
from test_document_tables import document, rows_file, rows_of, table_in

NUMERICS = "x86_64 AVX512, torch 2.15.0"


def made(rows, command="dfkd-ray bench recovery /home/me/teachers/resnet20 --out=/tmp/x"):
    return measurements.measured(rows, numerics=NUMERICS, version="0.1.0", command=command)


def recovery(network="resnet20", lost: Any = 1.0, seed=0, side="ours", sparsity=0.9, **more):
    labels = {"network": network, "sparsity": sparsity, "side": side}
    return Row(labels, {"points_lost": lost, "wall_s": 10.0} | more, seed)


def test_a_file_gives_back_what_was_measured_and_says_nothing_of_folders(tmp_path):
    rows = [recovery(lost=None), recovery(side="recipe", lost=Interval(2.5, 2.0, 3.5))]
    measurements.add(tmp_path / "rows.parquet", made(rows))
    found = measurements.read(tmp_path / "rows.parquet")
    assert found.labels == ("network", "sparsity", "side") and found.numbers == ("points_lost", "wall_s")
    first, second = found.frame.to_dict("records")
    assert pd.isna(first["points_lost"]) and first["sparsity"] == 0.9 and first["seed"] == 0
    assert (second["points_lost"], second["points_lost_low"], second["points_lost_high"]) == (2.5, 2.0, 3.5)
    assert first["command"] == "dfkd-ray bench recovery resnet20 --out=x" and first["numerics"] == NUMERICS
    assert b"/home/me" not in (tmp_path / "rows.parquet").read_bytes()


def test_rows_of_the_same_labels_and_seed_are_replaced_and_others_stay(tmp_path):
    path = tmp_path / "rows.parquet"
    measurements.add(path, made([recovery(lost=1.0), recovery(lost=2.0, seed=1), Row({**recovery().labels}, {"x": 1})]))
    measurements.add(path, made([recovery(lost=3.0), recovery("vgg", lost=4.0, passes=7)]))
    frame = measurements.read(path).frame
    assert sorted(zip(frame["network"], frame["seed"].fillna(-1), frame["points_lost"].fillna(-1), strict=True)) == [
        ("resnet20", -1, -1),
        ("resnet20", 0, 3.0),
        ("resnet20", 1, 2.0),
        ("vgg", 0, 4.0),
    ]
    assert measurements.read(path).numbers == ("points_lost", "wall_s", "x", "passes")


def test_measurements_that_do_not_belong_together_are_refused(tmp_path):
    path = tmp_path / "rows.parquet"
    refusal(lambda: made([]), "no measurement")
    refusal(lambda: made([recovery(), Row({"network": "vgg"}, {"points_lost": 1.0})]), "expected network, sparsity")
    for name in ("seed", "status", "x_low", "x"):
        refusal(lambda name=name: made([Row({name: "a"}, {"x": 1.0})]), f"{name}: ", "another column")
    measurements.add(path, made([recovery()]))
    before = path.read_bytes()
    refusal(lambda: measurements.add(path, made([Row({"side": "ours"}, {"x": 1.0})])), "measurements by network")
    assert path.read_bytes() == before


def test_a_file_of_another_kind_is_one_line_and_stays(tmp_path):
    path = tmp_path / "x.parquet"
    refusal(lambda: measurements.read(path), "no such file")
    measurements.check(path)
    path.write_text("no table")
    refusal(lambda: measurements.check(path), "no readable Parquet")
    assert not measurements.is_own(path)
    rows_file(tmp_path / "trials.parquet", rows_of())
    refusal(lambda: measurements.check(tmp_path / "trials.parquet"), "no file of measurements")
    for labels, numbers, columns, says in (
        (["side"], ["x"], {"x": [1.0]}, "lacks the column side"),
        ([], ["x"], {"x": [1.0]}, "any label"),
        (["side"], ["x"], {"side": ["a"], "x": ["text"]}, "no numbers"),
    ):
        said = {measurements.KEY: json.dumps({"schema": measurements.SCHEMA, "labels": labels, "numbers": numbers})}
        own = {name: [None] for name in measurements.OWN}
        pq.write_table(pa.table(columns | own).replace_schema_metadata(said), path)
        before = path.read_bytes()
        refusal(lambda: measurements.add(path, made([recovery()])), says)
        assert path.read_bytes() == before


@pytest.fixture
def folder(tmp_path):
    rows = [recovery(lost=lost, seed=seed) for seed, lost in enumerate((1.0, 2.0, 3.0))]
    rows += [recovery(side="recipe", lost=Interval(9.0, 8.0, 11.0)), recovery(side="other", lost=None)]
    measurements.add(tmp_path / "bench.parquet", made(rows))
    return tmp_path


SPEC = {"rows": {"side": ["ours", "recipe", "other"]}, "columns": {"sparsity": [0.9]}, "metric": "points_lost"}


def test_a_table_of_measurements_has_means_over_seeds_and_intervals(folder):
    cells, caption = table_in(folder, SPEC, "bench.parquet")
    assert cells == [["", "0.9"], ["ours", "2.00 ± 1.00"], ["recipe", "9.00 (8.00 to 11.00) (1)"], ["other", "–"]]
    assert "Mean ± std of 3 seeds, or of the number in brackets." in caption and "–: not measured." in caption
    assert "`dfkd-ray bench recovery resnet20 --out=x`" in caption and f"`{NUMERICS}`" in caption


def test_a_table_of_measurements_refuses_what_its_file_does_not_have(folder):
    for spec, says in (
        (SPEC | {"metric": "points_los"}, "did you mean points_lost?"),
        (SPEC | {"where": {"pruning.sparsity": 0.9}}, "no such column"),
        (SPEC | {"rows": {"network": ["resnet20"]}}, "differ in side, not in seeds alone"),
        (SPEC | {"rows": {"entries": {"a": {"side": "ours"}, " a": {"side": "recipe"}}}}, "the same label"),
    ):
        refusal(lambda spec=spec: documents.render(document(folder, spec, "bench.parquet")), says)
    refusal(lambda: documents.render(document(folder, SPEC, "bench.parquet and bench.parquet")), "would count twice")
    rows_file(folder / "grid.parquet", rows_of())
    both = document(folder, SPEC, "bench.parquet and grid.parquet")
    refusal(lambda: documents.render(both), "rows of trials and measurements")


def test_a_bench_adds_its_numbers_to_a_file_and_refuses_another_before_it_measures(run_cli, tiny_teacher, tmp_path):
    words = ["bench", "inversion", str(tiny_teacher), "--batch-size", "8", "--steps", "1", "--repeats", "2"]
    words += ["--threads", "1", "--rows"]
    done = run_cli(*words, str(tmp_path / "rows.parquet"))
    assert done.code == 0, done.err
    frame = measurements.read(tmp_path / "rows.parquet").frame.set_index("side")
    assert set(frame.index) == {"reference", "bare", "ours"}
    ratio = frame.loc["ours", "images_steps_per_s"] / frame.loc["bare", "images_steps_per_s"]
    assert frame.loc["ours", "to_bare"] == pytest.approx(ratio)
    command = frame.loc["ours", "command"]
    assert command.startswith("dfkd-ray bench inversion") and command.endswith("--threads 1"), command
    (tmp_path / "mine.parquet").write_text("mine")
    done = run_cli(*words, str(tmp_path / "mine.parquet"))
    assert done.code == 2 and "no readable Parquet" in done.err and "images·steps" not in done.out
    assert (tmp_path / "mine.parquet").read_text() == "mine"
