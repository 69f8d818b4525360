import errno
import json
import math
import os

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dfkd_ray import results
from dfkd_ray.config import TrialConfig, flat, validate
from dfkd_ray.results import METRICS


def row(trial_id="t-1", **changes):
    """A finished trial's row: its config, and a value of the right type in every metric."""
    values = {pa.string(): "text", pa.bool_(): True, pa.float64(): 0.5, pa.int64(): 3}
    config = validate(TrialConfig, {"teacher": "t", "synthesis": {"seed": 7}})
    metrics = {name: values[kind] for name, (kind, _, _) in METRICS.items()}
    return flat(config.model_dump(mode="json")) | metrics | {"trial_id": trial_id} | changes


def full_disk(*args, **kwargs):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_trials_row_is_read_back_as_it_was_written(tmp_path):
    written = row()
    results.write(tmp_path, "trials", [written], "a")
    frame = results.read(tmp_path, "trials")
    assert len(frame) == 1 and list(frame.columns) == results.schema("trials").names
    read = {name: None if pd.isna(value) else value for name, value in frame.iloc[0].to_dict().items()}
    assert {name: read[name] for name in written} == written
    assert [name for name, value in written.items() if value is None] == ["student.architecture"]


def test_missing_values_are_null_and_nothing_else_changes(tmp_path):
    written = {"trial_id": "t-1", "agreement": None, "status": "failed", "reason": "no memory", "num_images": 0}
    results.write(tmp_path, "trials", [written], "a")
    (table,) = pq.read_table(results.write(tmp_path, "trials", [written], "a")).to_pylist()
    assert {name for name, value in table.items() if value is not None} == set(written) - {"agreement"}
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
    config = validate(TrialConfig, {"teacher": "t", "synthesis": {"method": method}})
    kinds = {bool: pa.bool_(), int: pa.int64(), float: pa.float64(), str: pa.string()}
    for name, value in flat(config.model_dump(mode="json")).items():
        assert name in schema.names
        if value is not None:
            assert schema.field(name).type == kinds[type(value)], name


def test_column_names_are_unique_and_explained():
    schema = results.schema("trials")
    assert len(set(schema.names)) == len(schema.names)
    assert all(field.metadata[b"deterministic"] in (b"true", b"false") for field in schema)
    assert schema.metadata[b"dfkd_ray.schema"] == b"dfkd_ray.trials/1"


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
    path = results.write(tmp_path, "trials", [row()], "a")
    assert pq.read_schema(path).equals(results.schema("trials"), check_metadata=True)


def test_trials_are_read_best_agreement_first_and_failed_last(tmp_path):
    rows = [
        row("t-1", agreement=0.8, reference_kl=0.2),
        row("t-2", agreement=None, reference_kl=None, status="failed"),
        row("t-3", agreement=0.9, reference_kl=0.3),
        row("t-4", agreement=0.9, reference_kl=0.1),
        row("t-5", agreement=0.8, reference_kl=0.2),
    ]
    for index, one in enumerate(rows):
        results.write(tmp_path, "trials", [one], f"part-{index}")
    assert results.read(tmp_path, "trials")["trial_id"].tolist() == ["t-4", "t-3", "t-1", "t-5", "t-2"]


def test_the_order_does_not_look_at_test_accuracy(tmp_path):
    rows = [row("t-1", agreement=0.8, recovered_accuracy=0.99), row("t-2", agreement=0.9, recovered_accuracy=0.1)]
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


def test_a_table_of_an_older_version_without_a_column_is_read_with_nulls(tmp_path):
    table = pq.read_table(results.write(tmp_path, "trials", [row("t-1")], "a"))
    pq.write_table(table.drop_columns(["image_bn"]), tmp_path / "trials" / "a.parquet")
    results.write(tmp_path, "trials", [row("t-2", agreement=0.1)], "b")
    frame = results.read(tmp_path, "trials")
    assert math.isnan(frame.loc[0, "image_bn"]) and frame.loc[1, "image_bn"] == 0.5


def test_a_half_written_part_of_a_killed_writer_is_not_read(tmp_path):
    results.write(tmp_path, "trials", [row("t-1")], "a")
    (tmp_path / "trials" / ".b.parquet.part").write_bytes(b"PAR1")
    assert results.read(tmp_path, "trials")["trial_id"].tolist() == ["t-1"]


@pytest.mark.parametrize("where", ["replace", "fsync", "write_table"])
def test_a_full_disk_leaves_the_old_rows_and_nothing_else(tmp_path, monkeypatch, where):
    results.write(tmp_path, "trials", [row(status="old")], "a")
    with monkeypatch.context() as patch:
        patch.setattr(results.pq if where == "write_table" else os, where, full_disk)
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
    with pytest.raises(KeyError, match=r"dfkd_ray\.synthesis/1.*walls"):
        results.write_batches(tmp_path, [batch_row(0, walls=1.0)])
    with pytest.raises(ValueError, match="no synthesis table"):
        results.read(tmp_path, "synthesis")
