import errno
import json
import math
import os
import threading
import time
from typing import Any

import duckdb
import pandas as pd
import polars
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dfkd_ray import bundles, results, storage, sweep, trial
from dfkd_ray.bench import results as bench_results
from dfkd_ray.config import TrialConfig, flat, validate
from dfkd_ray.results import METRICS, schemas, tables
from dfkd_ray.results.schemas import WRITTEN_AT
from folders import put_back
from helpers import tiny_trial
from table_rows import columns, deterministic


def row(trial_id: Any = "t-1", **changes):
    """A finished trial's row: its config, and a value of the right type in every metric."""
    values = {pa.string(): "text", pa.bool_(): True, pa.float64(): 0.5, pa.int64(): 3}
    metrics = {name: values[kind] for name, (kind, _, _) in METRICS.items()}
    return columns({"teacher": "t", "synthesis": {"seed": 7}}) | metrics | {"trial_id": trial_id} | changes


def full_disk(*args, **kwargs):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_trials_row_is_read_back_as_it_was_written(tmp_path):
    written = row()
    results.write(tmp_path, "trials", [written], "a")
    frame = results.read(tmp_path, "trials")
    assert len(frame) == 1 and list(frame.columns) == results.schema("trials").names
    read: dict[str, Any] = {name: None if pd.isna(value) else value for name, value in frame.iloc[0].to_dict().items()}
    assert abs(read.pop(WRITTEN_AT) - time.time()) < 900
    del written[WRITTEN_AT]
    assert {name: read[name] for name in written} == written
    assert [name for name, value in written.items() if value is None] == [
        "student.architecture",
        "distillation.num_passes",
        "quantisation.distil_above",
    ]


def test_missing_values_are_null_and_nothing_else_changes(tmp_path):
    written = {"trial_id": "t-1", "agreement": None, "status": "failed", "reason": "no memory", "num_images": 0}
    results.write(tmp_path, "trials", [written], "a")
    (table,) = pq.read_table(tmp_path / "trials" / "a.parquet").to_pylist()
    assert {name for name, value in table.items() if value is not None} == set(written) - {"agreement"} | {WRITTEN_AT}
    assert pd.isna(results.read(tmp_path, "trials").loc[0, "agreement"])


def test_plain_pandas_reads_the_table(tmp_path):
    results.write(tmp_path, "trials", [row("t-1")], "a")
    results.write(tmp_path, "trials", [row("t-2")], "b")
    frame = pd.read_parquet(tmp_path / "trials")
    assert sorted(frame["trial_id"]) == ["t-1", "t-2"] and frame["synthesis.seed"].tolist() == [7, 7]


def test_unknown_column_raises_key_error_and_writes_nothing(tmp_path):
    with pytest.raises(KeyError, match="pruning\\.sparsty"):
        results.write(tmp_path, "trials", [row(), row(**{"pruning.sparsty": 0.5})], "a")
    assert list(tmp_path.rglob("*.parquet")) == []


def test_a_value_of_another_type_is_refused_and_writes_nothing(tmp_path):
    with pytest.raises((pa.ArrowInvalid, pa.ArrowTypeError)):
        results.write(tmp_path, "trials", [row(agreement="high")], "a")
    assert list(tmp_path.rglob("*.parquet*")) == []


@pytest.mark.parametrize("method", ["deepinversion", "noise", "real"])
def test_every_config_field_has_a_column_of_its_type(method):
    schema = results.schema("trials")
    kinds = {bool: pa.bool_(), int: pa.int64(), float: pa.float64(), str: pa.string()}
    for name, value in columns({"teacher": "t", "synthesis": {"method": method}}).items():
        assert name in schema.names
        if value is not None:
            assert schema.field(name).type == kinds[type(value)], name


def test_column_names_are_unique_and_explained():
    schema = results.schema("trials")
    assert len(set(schema.names)) == len(schema.names)
    assert all(field.metadata[b"deterministic"] in (b"true", b"false") for field in schema)
    assert schema.metadata[b"dfkd_ray.schema"] == b"dfkd_ray.trials/8"


def test_deterministic_columns_exclude_seconds_hosts_and_versions():
    names = set(results.deterministic_columns())
    assert not {name for name in names if name.endswith("_s")}
    assert not names & {"host", "commit", "numerics", "torch_version", "ray_version", "package_version"}
    assert not names & {"num_cached_batches", "device"}


def test_deterministic_columns_include_the_config_and_what_it_decides():
    names = set(results.deterministic_columns())
    assert {"agreement", "recovered_accuracy", "images_sha256", "achieved_sparsity", "best_step"} <= names
    config = flat(validate(TrialConfig, {"teacher": "t"}).model_dump(mode="json"))
    assert set(config) - names == {"device"}


def test_the_schema_survives_the_file(tmp_path):
    results.write(tmp_path, "trials", [row()], "a")
    assert pq.read_schema(tmp_path / "trials" / "a.parquet").equals(results.schema("trials"), check_metadata=True)


def test_trials_are_read_lowest_kl_first_and_failed_last(tmp_path):
    rows = [
        row("t-1", agreement=0.9, reference_kl=0.2),
        row("t-2", agreement=None, reference_kl=None, status="failed"),
        row("t-3", agreement=0.95, reference_kl=0.3),
        row("t-4", agreement=0.8, reference_kl=0.1),
        row("t-5", agreement=0.9, reference_kl=0.2),
        row("t-6", agreement=0.91, reference_kl=0.2),
    ]
    for index, one in enumerate(rows):
        results.write(tmp_path, "trials", [one], f"part-{index}")
    assert results.read(tmp_path, "trials")["trial_id"].tolist() == ["t-4", "t-6", "t-1", "t-5", "t-3", "t-2"]


def test_trials_of_the_newest_version_are_read_first_then_mixed_references_and_failed_ones_of_any_last(tmp_path):
    made = [("t-1", 3, True, 0.3), ("t-2", 2, None, 0.01), ("t-3", None, None, 0.02), ("t-4", 3, True, 0.2)]
    made += [("t-5", 3, False, 0.1), ("t-6", 3, True, None), ("t-7", 2, None, None)]
    for name, version, mixed, kl in made:
        status = "failed" if kl is None else "finished"
        values = {"trial_version": version, "reference.mixed": mixed, "reference_kl": kl, "status": status}
        results.write(tmp_path, "trials", [row(name, **values, agreement=None if kl is None else 1 - kl)], name)
    expected = ["t-4", "t-1", "t-5", "t-2", "t-3", "t-6", "t-7"]
    assert results.read(tmp_path, "trials")["trial_id"].tolist() == expected
    assert results.read(tmp_path, "trials", ["trial_id"])["trial_id"].tolist() == expected
    results.compact(tmp_path)
    assert results.read(tmp_path, "trials")["trial_id"].tolist() == expected


def test_the_order_does_not_look_at_test_accuracy(tmp_path):
    rows = [row("t-1", reference_kl=0.2, recovered_accuracy=0.99), row("t-2", reference_kl=0.1, recovered_accuracy=0.1)]
    results.write(tmp_path, "trials", rows, "a")
    assert results.read(tmp_path, "trials")["trial_id"].tolist() == ["t-2", "t-1"]


def test_a_trial_written_twice_is_read_once(tmp_path):
    results.write(tmp_path, "trials", [row("t-1"), row("t-2")], "a")
    results.write(tmp_path, "trials", [row("t-1")], "b")
    assert sorted(results.read(tmp_path, "trials")["trial_id"]) == ["t-1", "t-2"]


def test_writing_a_part_again_replaces_it(tmp_path):
    results.write(tmp_path, "trials", [row("t-1", status="failed")], "t-1")
    results.write(tmp_path, "trials", [row("t-1", status="finished")], "t-1")
    assert results.read(tmp_path, "trials")["status"].tolist() == ["finished"]
    assert [path.name for path in (tmp_path / "trials").iterdir()] == ["t-1.parquet"]


def test_a_part_from_before_a_config_field_came_is_read_with_nulls(tmp_path):
    results.write(tmp_path, "trials", [row("t-1")], "a")
    table = pq.read_table(tmp_path / "trials" / "a.parquet")
    pq.write_table(table.drop_columns(["distillation.mixup"]), tmp_path / "trials" / "a.parquet")
    results.write(tmp_path, "trials", [row("t-2", agreement=0.1)], "b")
    frame = results.read(tmp_path, "trials")
    assert math.isnan(frame.loc[0, "distillation.mixup"]) and frame.loc[1, "distillation.mixup"] == 0.5


def test_a_half_written_part_of_a_killed_writer_is_not_read(tmp_path):
    results.write(tmp_path, "trials", [row("t-1")], "a")
    (tmp_path / "trials" / ".b.parquet.part").write_bytes(b"PAR1")
    assert results.read(tmp_path, "trials")["trial_id"].tolist() == ["t-1"]


@pytest.mark.parametrize("where", ["replace", "fsync", "write_table"])
def test_a_full_disk_leaves_the_old_rows_and_nothing_else(tmp_path, monkeypatch, where):
    results.write(tmp_path, "trials", [row(status="old")], "a")
    with monkeypatch.context() as patch:
        patch.setattr(pq if where == "write_table" else os, where, full_disk)
        with pytest.raises(OSError, match="No space left"):
            results.write(tmp_path, "trials", [row(status="new")], "a")
    assert [path.name for path in (tmp_path / "trials").iterdir()] == ["a.parquet"]
    assert results.read(tmp_path, "trials")["status"].tolist() == ["old"]


def test_a_folder_without_trials_is_refused_by_name(tmp_path):
    with pytest.raises(ValueError, match="no trials table there"):
        results.read(tmp_path, "trials")


def test_a_json_row_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "row.json"
    results.write_json(path, {"a": 1, "b": None})
    assert json.loads(path.read_text()) == {"a": 1, "b": None}
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full_disk)
        with pytest.raises(OSError, match="No space left"):
            results.write_json(path, {"a": 2})
    with pytest.raises(ValueError):
        results.write_json(path, {"a": float("nan")})
    assert json.loads(path.read_text()) == {"a": 1, "b": None}
    assert [file.name for file in tmp_path.iterdir()] == ["row.json"]


def test_a_damaged_part_is_named(tmp_path):
    (tmp_path / "trials").mkdir()
    (tmp_path / "trials" / "t-1.parquet").write_bytes(b"PAR1 not a table PAR1")
    with pytest.raises(ValueError, match=r"t-1\.parquet: damaged"):
        results.read(tmp_path, "trials")


def batch_row(index, key="ab" * 32, **changes):
    """A row of the synthesis table with a value of the right type in every column."""
    values = {pa.string(): "text", pa.float64(): 0.5, pa.int64(): 3}
    own = {name: values[kind] for name, (kind, _, _) in results.TABLES["synthesis"].items()}
    return own | {"synthesis_key": key, "batch_index": index} | changes


def test_the_synthesis_table_has_each_batch_once_however_many_trials_wrote_it(tmp_path):
    for num_batches in (2, 3, 2):
        rows = [batch_row(index) for index in range(num_batches)] + [batch_row(0, "cd" * 32)]
        results.write_batches(tmp_path, rows)
    frame = results.read(tmp_path, "synthesis")
    assert frame[["synthesis_key", "batch_index"]].values.tolist() == [
        *(["ab" * 32, index] for index in range(3)),
        ["cd" * 32, 0],
    ]
    assert len(list((tmp_path / "synthesis").iterdir())) == 3
    assert list(frame.columns) == results.schema("synthesis").names


def test_the_synthesis_table_says_which_columns_are_deterministic():
    names = set(results.deterministic_columns("synthesis"))
    assert {"images_sha256", "bn", "num_attempts"} <= names and not names & {"wall_s", "host", "numerics"}


def test_an_unknown_column_of_a_batch_is_refused(tmp_path):
    with pytest.raises(KeyError, match=r"version 6 of synthesis.*walls"):
        results.write_batches(tmp_path, [batch_row(0, walls=1.0)])
    with pytest.raises(ValueError, match="no synthesis table"):
        results.read(tmp_path, "synthesis")


def look(step, trial_id="t-1", **changes):
    """A row of the epochs table."""
    return {"trial_id": trial_id, "step": step, "agreement": 0.5, "kl": 0.1, **changes}


def names_in(folder):
    return sorted(path.name for path in folder.iterdir())


def merged_in(folder):
    return [name for name in names_in(folder) if name.startswith("merged-")]


def test_looks_are_read_by_trial_and_step_each_once(tmp_path):
    results.write(tmp_path, "epochs", [look(0), look(2)], "t-1")
    results.write(tmp_path, "epochs", [look(0, "t-0")], "t-0")
    results.write(tmp_path, "epochs", [look(0), look(2), look(4)], "t-1")
    frame = results.read(tmp_path, "epochs")
    assert frame[["trial_id", "step"]].values.tolist() == [["t-0", 0], ["t-1", 0], ["t-1", 2], ["t-1", 4]]
    assert set(frame["feature"].isna()) == {True} and list(frame.columns) == results.schema("epochs").names


def test_some_columns_are_read_in_the_order_asked_for_and_others_refused(tmp_path):
    results.write(tmp_path, "trials", [row("t-1", agreement=0.1), row("t-2", agreement=0.2)], "a")
    frame = results.read(tmp_path, "trials", ["pruning.sparsity", "trial_id"])
    assert frame.values.tolist() == [[0.75, "t-2"], [0.75, "t-1"]]
    with pytest.raises(ValueError, match="'agrement': no column of the table trials; did you mean agreement"):
        results.read(tmp_path, "trials", ["agrement"])
    with pytest.raises(ValueError, match="table 'trails': expected one of trials, epochs, synthesis"):
        results.read(tmp_path, "trails")


def test_of_two_rows_of_a_trial_the_one_written_last_counts_whatever_the_parts_are_called(tmp_path, monkeypatch):
    for second, (part, status) in enumerate([("z", "failed"), ("a", "finished")]):
        monkeypatch.setattr(time, "time", lambda second=second: 1e9 + second)
        results.write(tmp_path, "trials", [row("t-1", status=status)], part)
    assert results.read(tmp_path, "trials")["status"].tolist() == ["finished"]
    assert results.finished_ids(tmp_path) == {"t-1"}


# Compaction


def fill(place, num_trials=6):
    """A place with finished trials, a failed one and one that runs."""
    for index in range(num_trials):
        name = f"t-{index}"
        results.write(place, "epochs", [look(0, name), look(2, name)], name)
        results.write_batches(place, [batch_row(0), batch_row(index + 1)])
        results.write(place, "trials", [row(name, agreement=index / 10, status="finished")], name)
    results.write(place, "epochs", [look(0, "t-failed")], "t-failed")
    results.write(place, "trials", [row("t-failed", status="failed", agreement=None)], "t-failed")
    results.write(place, "epochs", [look(0, "t-running")], "t-running")


def everything(place):
    return {table: results.read(place, table) for table in results.TABLES}


def assert_same(found, expected):
    for table, frame in expected.items():
        pd.testing.assert_frame_equal(found[table], frame)


def test_compaction_changes_no_row_and_leaves_one_file_and_the_parts_that_may_be_written_again(tmp_path):
    fill(tmp_path)
    before = everything(tmp_path)
    assert results.compact(tmp_path) == 6 + 6, "all batches lie in one part"
    assert_same(everything(tmp_path), before)
    assert names_in(tmp_path / "trials") == [*merged_in(tmp_path / "trials"), "t-failed.parquet"]
    assert names_in(tmp_path / "epochs") == [*merged_in(tmp_path / "epochs"), "t-failed.parquet", "t-running.parquet"]
    results.write(tmp_path, "trials", [row("t-failed", status="finished")], "t-failed")
    results.write(tmp_path, "trials", [row("t-new", status="finished")], "t-new")
    results.compact(tmp_path)
    assert names_in(tmp_path / "trials") == merged_in(tmp_path / "trials") and len(merged_in(tmp_path / "trials")) == 1
    assert len(results.finished_ids(tmp_path)) == 8


def test_parts_of_several_rows_are_compacted_with_the_failed_ones_in_them(tmp_path):
    for writer in range(3):
        rows = [row(f"t-{writer}-{i}", status="failed" if i else "finished") for i in range(3)]
        results.write(tmp_path, "trials", rows, f"writer-{writer}")
    results.compact(tmp_path)
    assert len(names_in(tmp_path / "trials")) == 1 and len(results.read(tmp_path, "trials")) == 9


@pytest.mark.parametrize("after", [0, 1, 2, 4, 7])
def test_a_crash_anywhere_in_a_compaction_leaves_every_row_once(tmp_path, monkeypatch, after):
    fill(tmp_path, 3)
    before = everything(tmp_path)
    steps = iter(range(after))

    def breaking(real):
        def act(*arguments):
            if next(steps, None) is None:
                raise KeyboardInterrupt
            return real(*arguments)

        return act

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(tables, "NUM_THREADS", 1)
        patch.setattr(storage.Folder, "write", breaking(storage.Folder.write))
        patch.setattr(storage.Folder, "remove", breaking(storage.Folder.remove))
        results.compact(tmp_path)
    assert_same(everything(tmp_path), before)
    results.compact(tmp_path)
    assert_same(everything(tmp_path), before)
    assert len(merged_in(tmp_path / "trials")) == 1


@pytest.mark.parametrize("seen", ["the old parts", "nothing"])
def test_a_listing_that_a_compaction_overtakes_is_made_again(tmp_path, monkeypatch, seen):
    fill(tmp_path)
    before = results.read(tmp_path, "trials")
    listings = []
    real = tables.part_names

    def overtaken(folder):
        names = real(folder)
        if not listings and folder.name == "trials":
            listings.append(names)
            results.compact(tmp_path)
            names = names if seen == "the old parts" else []
        return names

    monkeypatch.setattr(tables, "part_names", overtaken)
    pd.testing.assert_frame_equal(results.read(tmp_path, "trials"), before)
    assert len(listings) == 1


def test_who_reads_while_others_write_and_compact_sees_every_row_that_was_there_and_none_half(tmp_path):
    written, over, seen = [], threading.Event(), []
    results.write(tmp_path, "trials", [row("t-0", status="finished")], "t-0")

    def writer(own):
        for index in range(12):
            name = f"t-{own}-{index}"
            for status in ("failed", "finished"):
                results.write(tmp_path, "trials", [row(name, status=status, host=status)], name)
            written.append(name)

    def compactor():
        while not over.is_set():
            results.compact(tmp_path)

    writers = [threading.Thread(target=writer, args=(own,)) for own in range(3)]
    background = threading.Thread(target=compactor)
    for thread in [*writers, background]:
        thread.start()
    try:
        while any(thread.is_alive() for thread in writers):
            there = list(written)
            frame = results.read(tmp_path, "trials", ["trial_id", "status", "host"]).set_index("trial_id")
            assert set(there) <= set(frame.index) and frame.index.is_unique
            assert (frame.loc[there, "status"] == "finished").all()
            rows = frame.reset_index().to_dict("records")
            assert all(row["host"] == row["status"] for row in rows if row["trial_id"] != "t-0")
            seen.append(len(frame))
    finally:
        over.set()
        for thread in [*writers, background]:
            thread.join(timeout=900)
    assert len(seen) > 2 and len(results.read(tmp_path, "trials")) == 37


def test_what_killed_writers_left_is_swept_up_when_it_is_old(tmp_path):
    fill(tmp_path, 2)
    for name, age in ((".t-9.parquet.1-ab.part", 7200), (".t-8.parquet.1-ab.part", 0)):
        (tmp_path / "trials" / name).write_bytes(b"PAR1")
        put_back(tmp_path / "trials" / name, age)
    results.compact(tmp_path)
    assert [name for name in names_in(tmp_path / "trials") if name.startswith(".")] == [".t-8.parquet.1-ab.part"]


def test_the_bench_of_the_tables_reads_every_row_before_and_after_compaction(monkeypatch, capsys):
    monkeypatch.setattr("dfkd_ray.report.figures.as_png", lambda _figure: b"")
    figures = bench_results.run(300, 7)
    assert all(figure > 0 for figure in figures.values()) and figures["report_mb"] < 5
    assert "300 rows of `trials` by 7 writers" in capsys.readouterr().out


# Versions


def v1_part(path, **columns):
    """A part as version 1 of trials had them, made by hand: fewer columns, no time of writing."""
    columns = {"trial_id": ["t-old"], "status": ["finished"], "agreement": [0.25], "pruning.sparsity": [0.5]} | columns
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.table(columns).replace_schema_metadata({"dfkd_ray.schema": "dfkd_ray.trials/1"})
    pq.write_table(table, path)


def test_a_part_of_version_1_is_read_into_todays_schema(tmp_path):
    v1_part(tmp_path / "trials" / "t-old.parquet")
    results.write(tmp_path, "trials", [row("t-new", agreement=0.5)], "t-new")
    frame = results.read(tmp_path, "trials").set_index("trial_id")
    assert list(frame.columns) == results.schema("trials").names[1:] and list(frame.index) == ["t-new", "t-old"]
    assert frame.loc["t-old", "agreement"] == 0.25 and frame.loc["t-old", "pruning.sparsity"] == 0.5
    assert math.isnan(frame.loc["t-old", WRITTEN_AT]) and math.isnan(frame.loc["t-old", "wall_s"])


def test_columns_that_got_another_name_keep_their_values_through_every_version(tmp_path, monkeypatch):
    steps = [{"match": "agree"}, {"agree": "agreement", "sparseness": "pruning.sparsity"}]
    monkeypatch.setitem(schemas.RENAMED, "trials", steps)
    v1_part(tmp_path / "trials" / "t-old.parquet", match=[0.25], sparseness=[0.5])
    table = pq.read_table(tmp_path / "trials" / "t-old.parquet")
    pq.write_table(table.drop_columns(["agreement", "pruning.sparsity"]), tmp_path / "trials" / "t-old.parquet")
    results.write(tmp_path, "trials", [row("t-new")], "t-new")
    frame = results.read(tmp_path, "trials", ["trial_id", "agreement", "pruning.sparsity"])
    assert frame.values.tolist() == [["t-new", 0.5, 0.75], ["t-old", 0.25, 0.5]]
    results.write(tmp_path, "trials", [row("t-old-2", status="finished")], "t-old-2")
    results.compact(tmp_path)
    merged = pq.read_schema(tmp_path / "trials" / merged_in(tmp_path / "trials")[0])
    assert merged.equals(results.schema("trials"), check_metadata=True)
    assert merged.metadata[b"dfkd_ray.schema"] == b"dfkd_ray.trials/3"


def test_the_newest_rows_decide_over_those_of_a_version_without_times(tmp_path):
    results.write(tmp_path, "trials", [row("t-old", agreement=0.75)], "a")
    v1_part(tmp_path / "trials" / "z.parquet")
    assert results.read(tmp_path, "trials")["agreement"].tolist() == [0.75]


@pytest.mark.parametrize(
    "metadata, columns, words",
    [
        ("dfkd_ray.trials/9", {}, r"newer dfkd_ray \(.*version 9"),
        ("dfkd_ray.trials/1", {"spin": [1]}, "does not know its columns spin"),
        ("dfkd_ray.synthesis/1", {}, "no part of a trials table"),
        ("", {}, "no part of a trials table"),
    ],
)
def test_what_this_version_cannot_read_is_refused_in_one_line_that_names_it(tmp_path, metadata, columns, words):
    v1_part(tmp_path / "trials" / "t-x.parquet", **columns)
    table = pq.read_table(tmp_path / "trials" / "t-x.parquet").replace_schema_metadata({"dfkd_ray.schema": metadata})
    pq.write_table(table, tmp_path / "trials" / "t-x.parquet")
    for act in (lambda: results.read(tmp_path, "trials"), lambda: results.compact(tmp_path)):
        with pytest.raises(ValueError, match=rf"t-x\.parquet: .*{words}") as caught:
            act()
        assert "\n" not in str(caught.value)


def test_a_part_cut_short_anywhere_is_named_and_nothing_is_compacted_away(tmp_path):
    fill(tmp_path, 2)
    path = tmp_path / "trials" / "t-1.parquet"
    whole = path.read_bytes()
    for length in (0, 3, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"t-1\.parquet: damaged"):
            results.read(tmp_path, "trials")
        with pytest.raises(ValueError, match=r"t-1\.parquet: damaged"):
            results.compact(tmp_path)
    path.write_bytes(whole)
    assert len(results.read(tmp_path, "trials")) == 3


# Other readers, other places


def test_duckdb_and_polars_read_the_tables_with_a_glob(tmp_path):
    fill(tmp_path)
    for compacted in (False, True):
        if compacted:
            results.compact(tmp_path)
        query = f"select count(*), max(agreement), min(\"pruning.sparsity\") from '{tmp_path}/trials/*.parquet'"
        found: Any = duckdb.sql(query)
        assert found.fetchall() == [(7, 0.5, 0.75)]
        frame = polars.read_parquet(f"{tmp_path}/epochs/*.parquet")
        assert frame.shape == (14, len(results.schema("epochs"))) and frame["kl"].sum() == pytest.approx(1.4)


def test_tables_in_a_bucket_are_written_read_and_compacted(bucket):
    place = bucket("tables")
    with pytest.raises(ValueError, match="no trials table there") as caught:
        results.read(place, "trials")
    assert "test:test" not in str(caught.value)
    fill(place)
    before = everything(place)
    assert len(before["trials"]) == 7 and results.finished_ids(place) == {f"t-{index}" for index in range(6)}
    assert results.compact(place) > 0
    assert_same(everything(place), before)
    assert [len((storage.folder(place) / table).names()) for table in results.TABLES] == [2, 3, 1]
    (storage.folder(place) / "trials").write("t-7.parquet", b"PAR1")
    with pytest.raises(ValueError, match=r"t-7\.parquet.*: damaged"):
        results.read(place, "trials")


def test_a_trial_leaves_all_it_leaves_in_a_bucket_as_on_a_disk(bucket, tiny_teacher, tmp_path, monkeypatch):
    looks = {"distillation.num_steps": 4, "distillation.eval_every": 1, "distillation.checkpoint_every": 2}
    data = tiny_trial(tiny_teacher, **looks)
    teacher = bundles.load(str(tiny_teacher))
    (job,) = sweep.plan([validate(TrialConfig, data)], lambda _name: teacher)
    checkpoints = []
    real = storage.Folder.write

    def write(folder, name, *parts):
        real(folder, name, *parts)
        if name == "state.safetensors":
            checkpoints.append(str(folder))

    monkeypatch.setattr(storage.Folder, "write", write)
    for place in (bucket("run"), str(tmp_path)):
        row = sweep.run_job(job, trial.Inputs(images=trial.Local()), place)
        assert row["status"] == "finished", row
        root = storage.folder(place)
        assert results.read(place, "epochs")["step"].tolist() == [0, 1, 2, 3, 4]
        assert len(results.read(place, "synthesis")) == 2 and len((root / "images").names()) == 1
        assert (root / "students" / job.id).names() == ["teacher.json", "weights.safetensors"]
        assert (root / "checkpoints").folders() == []
    assert [name.partition("://")[0] == "s3" for name in checkpoints] == [True, True, False, False]
    here, there = results.read(tmp_path, "trials"), results.read(bucket("run"), "trials")
    pd.testing.assert_frame_equal(deterministic(here), deterministic(there))
    student = storage.folder(bucket("run")) / "students" / job.id
    for name in student.names():
        (tmp_path / "student").mkdir(exist_ok=True)
        (tmp_path / "student" / name).write_bytes(student.read(name) or b"")
    assert bundles.load(str(tmp_path / "student")).info.num_classes == 10
