"""Every column of every table may be null: in `results`, the report, TensorBoard and what a sweep shows."""

import itertools
import json
import math

import pandas as pd
import pytest
from rich.console import Console

from dfkd_ray import report, results, tensorboard
from dfkd_ray.cli import live, show
from dfkd_ray.cli.results import FORMATS, main_columns
from dfkd_ray.report import figures
from dfkd_ray.results import schemas
from dfkd_ray.results.selecting import with_whole_numbers
from dfkd_ray.storage import folder
from table_rows import batch_rows, full_row, trial_row

COLUMNS = {name: results.schema(name).names for name in results.TABLES}
NULLS = {"None": None, "NaN": math.nan, "NA": pd.NA}
# What a report has depends on these: the null of another column might not be noticed beside one of theirs.
DECIDING = {
    "trials": [
        *("trial_id", "status", "real_data", "teacher_hash", "synthesis_key"),
        *("agreement", "recovered_accuracy", "stored_bytes"),
    ],
    "synthesis": ["synthesis_key", "teacher_hash", "domain", "num_images", "wall_s"],
}


def groups(columns: list[str]) -> list[list[str]]:
    """Groups of columns that are null together: each column is in two, and meets each other column in one at most."""
    size = math.ceil(math.sqrt(len(columns)))
    rows = [columns[start : start + size] for start in range(0, len(columns), size)]
    return rows + [columns[start::size] for start in range(size)]


def without(rows: list[dict], columns: list[str]) -> list[dict]:
    """Rows in which some columns are null."""
    return [row | dict.fromkeys(columns) for row in rows]


def full_rows(table: str) -> list[dict]:
    """Two rows of a table, without a null in any column that a writer fills."""
    if table == "trials":
        plain = trial_row(0, 0.5, 0), trial_row(1, 0.75, 0)
        return [row | full_row(n, sparsity=(0.5, 0.75)[n]) | {"trial_id": f"t-{n}"} for n, row in enumerate(plain)]
    if table == "epochs":
        look = {"agreement": 0.5, "reference_kl": 0.1, "loss": 1.0, "kl": 1.0, "label": 0.5, "feature": 0.1}
        return [{"trial_id": "t-0", "step": step, **look, "learning_rate": 0.1, "sparsity": 0.5} for step in (0, 2)]
    own = {"teacher_hash": "ab" * 32, "domain": "train", "method": "deepinversion", "num_images": 8, "num_steps": 1}
    own |= {"images_sha256": "cd" * 32, "label": 0.1, "bn": 0.2, "record": 0.3, "tv": 0.1, "l2": 0.1, "host": "h"}
    own |= {"confidence": 0.9, "label_agreement": 1.0, "class_histogram": "[1]", "num_attempts": 1, "wall_s": 1.0}
    return [{"synthesis_key": "ef" * 32, "batch_index": index, "numerics": "n", **own} for index in (0, 1)]


def with_nulls(rows: list[dict], table: str) -> list[dict]:
    """Rows of a table, and for each column one more in which it is null."""
    key = schemas.KEYS[table][-1]
    number = itertools.count(100)
    more = [rows[0] | {key: f"t-{next(number)}" if table == "trials" else next(number)} for _ in COLUMNS[table]]
    return [*rows, *(row | {column: None} for row, column in zip(more, COLUMNS[table], strict=True))]


def check_formats(place, table: str) -> None:
    """Every format, of all columns and of the main ones, as the table is and with seeds folded."""
    read = results.read(place, table)
    frames = [with_whole_numbers(read, table)] + ([results.fold_seeds(read)] if table == "trials" else [])
    for frame, (format_, as_text) in itertools.product(frames, FORMATS.items()):
        names = list(frame.columns) if format_ in ("csv", "json") else main_columns(frame, table)
        text = as_text(frame, names)
        assert text and "<NA>" not in text and "nan" not in text.lower(), format_


@pytest.mark.parametrize("table", COLUMNS)
def test_rows_with_a_null_in_any_column_are_printed_and_exported_in_every_format(tmp_path, table):
    results.write(tmp_path, table, with_nulls(full_rows(table), table), "part")
    check_formats(tmp_path, table)


@pytest.mark.parametrize(("table", "columns"), [(name, some) for name, own in COLUMNS.items() for some in groups(own)])
def test_a_column_that_is_null_in_all_rows_is_printed_and_exported_in_every_format(tmp_path, table, columns):
    results.write(tmp_path, table, without(full_rows(table), columns), "part")
    check_formats(tmp_path, table)


@pytest.fixture
def no_figures(monkeypatch):
    """Figures are laid out, but not written as files: that takes most of the time."""
    monkeypatch.setattr(figures, "as_png", lambda figure: b"")
    monkeypatch.setattr(figures, "as_svg", lambda figure: "<svg></svg>")


def check_report(place, rows: dict[str, list[dict]]) -> None:
    """A report is made of these tables."""
    for name, own in rows.items():
        results.write(place, name, own, "part")
    page, _ = report.build(folder(place))
    assert "<h1>" in page and "&lt;NA&gt;" not in page


def tables_of() -> dict[str, list[dict]]:
    """Two trials and their syntheses."""
    rows = [full_row(0), full_row(1, sparsity=0.5)]
    return {"trials": rows, "synthesis": batch_rows(rows)}


def test_a_report_is_made_of_rows_with_a_null_in_any_column(tmp_path, no_figures):
    check_report(tmp_path, {name: with_nulls(rows, name) for name, rows in tables_of().items()})


def report_groups() -> list[tuple[str, list[str]]]:
    """The measured columns of each table that a report reads: what decides alone, the others in groups."""
    found = []
    for table, deciding in DECIDING.items():
        others = [name for name in COLUMNS[table] if name in results.TABLES[table] and name not in deciding]
        found += [(table, some) for some in (*([name] for name in deciding), *groups(others))]
    return found


@pytest.mark.parametrize(("table", "columns"), report_groups())
def test_a_report_is_made_of_tables_in_which_a_column_is_null(tmp_path, no_figures, table, columns):
    rows = tables_of()
    check_report(tmp_path, rows | {table: without(rows[table], columns)})


@pytest.mark.parametrize("null", NULLS)
def test_a_null_of_any_kind_in_any_column_is_shown_and_written_for_tensorboard(tmp_path, capsys, null):
    full = full_rows("trials")[0] | {"reason": "why"}
    looks = full_rows("epochs")
    for number, columns in enumerate(groups(COLUMNS["trials"])):
        row = full | dict.fromkeys(columns, NULLS[null])
        tensorboard.write_trial(tmp_path / str(number), row, looks)
        view = live.View({"t-0": "net"}, [row], 0.0)
        screen = live.Screen(view, "s.yaml", Console(file=None), clock=lambda: 1.0)
        screen.row(row, 1, 1)
        screen.row(row | {"status": "stopped"}, 1, 1)
        live.table(view.snapshot(2.0), "s", 30)
        show.print_ladder(row, tmp_path)
        frame = pd.DataFrame([full, row])
        show.print_trials(frame)
        show.print_failures(pd.DataFrame([full, row | {"status": "failed"}]))
    for column in COLUMNS["epochs"]:
        tensorboard.write_epochs(tmp_path / f"epochs-{column}", "t-0", [looks[0], looks[1] | {column: NULLS[null]}])
    out = capsys.readouterr().out
    assert "nan" not in out and "<NA>" not in out and "None" not in out


def test_the_quickstarts_table_of_syntheses_is_printed(run_cli, tmp_path):
    row = full_rows("synthesis")[0]
    results.write(tmp_path, "synthesis", [row | {"num_steps": None, "bn": None}, row | {"batch_index": 1}], "part")
    done = run_cli("results", str(tmp_path), "--table", "synthesis")
    assert done.code == 0, done.err
    assert (
        json.loads(run_cli("results", str(tmp_path), "--table", "synthesis", "--format", "json").out)[0]["bn"] is None
    )
