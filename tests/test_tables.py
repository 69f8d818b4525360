"""The final table of a sweep in terminals of any width: a line per trial, and nothing hidden in silence."""

import io
import itertools

import pandas as pd
import pytest
from rich.console import Console
from rich.text import Text

from dfkd_ray import results
from dfkd_ray.cli import show, tables

COLUMNS = results.schema("trials").names
NETWORKS = ["fashion_mnist_resnet20", "fashion_mnist_resnet8"]
EXTRA = {
    "distillation.learning_rate": [0.1, 0.001],
    "distillation.num_images": [256, 1024],
    "synthesis.num_steps": [200, 2000],
}


def frame(num_extra: int = 0, **changes) -> pd.DataFrame:
    """The rows that the quickstart ends with; more fields that vary; changes to the first row."""
    field = ("teacher", "pruning.sparsity", "synthesis.bn_weight", "distillation.temperature")
    points = [
        dict(zip(field, p, strict=True)) for p in itertools.product(NETWORKS, [0.5, 0.75], [0.2, 2.0], [2.0, 6.0])
    ]
    rows = [{**point, "synthesis.method": "deepinversion"} for point in points]
    noise = {"pruning.sparsity": 0.75, "distillation.temperature": 4.0, "synthesis.method": "noise"}
    rows += [{**noise, "teacher": network} for network in NETWORKS]
    for index, row in enumerate(rows):
        for place, name in enumerate(list(EXTRA)[:num_extra]):
            row[name] = EXTRA[name][index >> place & 1]
        is_large = row["teacher"] == NETWORKS[0]
        row |= {"trial_id": f"t-{index}", "status": "finished", "teacher_accuracy": 0.9153 if is_large else 0.9012}
        row |= {
            "pruned_accuracy": 0.3 + index / 99,
            "bn_reestimated_accuracy": 0.5 + index / 97,
            "reconstructed_accuracy": 0.7 + index / 99,
            "wall_s": 17.0 + index,
        }
        row |= {"recovered_accuracy": 0.9 - index / 77, "agreement": 0.97 - index / 71, "stored_bytes": 275_123 + index}
        row |= {"reference_kl": 0.03 + index / 73}
    rows[0] |= changes
    return pd.DataFrame([{**dict.fromkeys(COLUMNS), **row} for row in rows])


def printed(rows: pd.DataFrame, width: int) -> tuple[list[str], list[str], str]:
    """The lines above the rule, those below, and the notes."""
    console = Console(file=io.StringIO(), width=width, force_terminal=True, color_system=None)
    table, notes = show.trials_table(rows, results.varied_fields(rows), width, "runs/quick start")
    console.print(table)
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    for note in notes:
        console.print(Text(note))
    everything = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert max(tables.widest((line,)) for line in everything) <= width
    rule = next(i for i, line in enumerate(lines) if line.strip() and not line.strip().strip("─"))
    return lines[:rule], [line for line in lines[rule + 1 :] if line.strip()], " ".join(notes)


@pytest.mark.parametrize("num_extra", [0, 1])
@pytest.mark.parametrize("width", [80, 100, 140])
def test_a_trial_takes_one_line_with_every_value_that_varies_and_what_came_of_it(width, num_extra):
    rows = frame(num_extra)
    _, lines, notes = printed(rows, width)
    assert len(lines) == 18
    for line, (_, row) in zip(lines, rows.iterrows(), strict=True):
        cells = line.split()
        short = str(row["teacher"]).removeprefix("fashion_mnist_")
        assert cells[0] in (row["teacher"], short) and (cells[0] != short or "network: fashion_mnist_…" in notes)
        values = [show.text_of(row[name]) for name in results.varied_fields(rows)]
        assert cells[1 : 1 + len(values)] == values
        assert f"{100 * row['recovered_accuracy']:.2f}" in cells and f"{100 * row['agreement']:.2f}" in cells
        assert f"{row['reference_kl']:.4f}" in cells
        assert f"{100 * row['teacher_accuracy']:.2f}" in (notes if width == 80 else line + notes)


def headings_of(rows: pd.DataFrame, width: int) -> list[str]:
    table, _ = show.trials_table(rows, results.varied_fields(rows), width)
    return [str(column.header).replace("-\n", "").replace("\n", "") for column in table.columns]


@pytest.mark.parametrize("width", [80, 100, 140])
def test_the_quickstarts_columns_are_all_there_but_for_size_and_time_at_80_columns(width):
    rows = frame()
    _, lines, notes = printed(rows, width)
    said = notes.replace(show.LEGEND, "")
    assert ("not shown: kB, s;" in said) == ("not shown" in said) == (width == 80) and "shortened" not in notes
    fields = ["network", "sparsity", "method", "bn_weight", "temperature"]
    measured = ["teacher"] * ("accuracy of the teacher" not in notes)
    measured += ["pruned", "BN", "recon.", "recovered", "KL", "agreement"] + ["kB", "s"] * (width > 80)
    headings = headings_of(rows, width)
    assert headings == fields + measured and len(lines[0].split()) == len(headings)


@pytest.mark.parametrize("heading", ["pruned", "BN", "recon."])
@pytest.mark.parametrize("width", [80, 100, 140])
def test_a_rung_that_no_row_has_takes_no_column_and_leaves_room_for_the_others(width, heading):
    rows, name = frame(), show.MEASURED[heading][0]
    rows[name] = None
    headings, (_, lines, notes) = headings_of(rows, width), printed(rows, width)
    assert heading not in headings and {"kB", "s"} < set(headings) and "not shown" not in notes
    assert len(lines) == 18
    rows.loc[4, name] = 0.5  # as where rows of an earlier version stand beside a new one
    assert heading in headings_of(rows, width)
    _, lines, _ = printed(rows, width)
    assert len(lines) == 18 and [index for index, line in enumerate(lines) if " - " not in line] == [4]


def test_what_is_not_shown_or_shortened_is_said_with_how_to_see_it():
    for num_extra, width in itertools.product((0, 3), range(30, 150, 20)):
        heading, _, notes = printed(frame(num_extra), width)
        words = " ".join(heading).split()
        for name in ("BN", "kB", "s"):
            assert name in words or f"not shown: {notes.partition('not shown: ')[2].partition(';')[0]}".find(name) > 0
        if "not shown" in notes or "shortened" in notes:
            assert "dfkd-ray results 'runs/quick start'" in notes


@pytest.mark.parametrize("num_extra", [2, 3])
@pytest.mark.parametrize("width", [80, 100, 140])
def test_six_and_more_fields_that_vary_take_two_lines_at_most(width, num_extra):
    _, lines, _ = printed(frame(num_extra), width)
    assert len(lines) <= 2 * 18


HOSTILE = [
    "[red]x[/red]",
    "[/b]",
    "a\x1b[31mb\x1b]0;t\x07",
    "a\nb\r\tc\u202ed",
    "網" * 60,
    "x" * 3000,
    "_" * 90,
    ":smile:",
]


@pytest.mark.parametrize("name", HOSTILE, ids=range(len(HOSTILE)))
@pytest.mark.parametrize("width", [10, 40, 80, 140])
def test_hostile_names_stay_text_within_the_width(width, name):
    rows = frame(teacher=name, **{"synthesis.method": name, "student.arguments": name})
    _, lines, notes = printed(rows, width)
    text = "".join(lines)
    assert "\x1b" not in text and "\u202e" not in text
    if width >= 80:
        assert len(lines) <= 2 * 18
        if len(name) < 13 and (width > 80 or len(show.shown(name)) < 13):
            assert show.shown(name) in text
        else:
            assert show.shown(name) in text or "shortened: " in notes


@pytest.mark.parametrize("width", [60, 80, 140])
def test_failed_and_stopped_trials_are_told(width):
    rows = frame()
    metrics = ["recovered_accuracy", "agreement", "reference_kl"]
    metrics += ["teacher_accuracy", "stored_bytes", "wall_s", "pruned_accuracy"]
    rows.loc[3, metrics], rows.loc[3, "status"] = None, "failed"
    rows.loc[5, "recovered_accuracy"], rows.loc[5, "status"] = None, "stopped"
    _, lines, notes = printed(rows, width)
    assert len(lines) == 18 and "FAILED" in lines[3] and "stopped" in lines[5]
    assert sum("FAILED" in line or "stopped" in line for line in lines) == 2
    assert f"{rows.loc[5, 'reference_kl']:.4f}" in lines[5]
    said = notes.partition("not shown: ")[2].partition(";")[0]
    assert f"{100 * rows.loc[5, 'agreement']:.2f}" in lines[5] or (width == 60 and "agreement" in said)


def test_a_pipe_gets_the_whole_table_however_wide(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    show.print_trials(frame(3, teacher="n" * 200))
    out = capsys.readouterr().out
    assert "n" * 200 in out and "fashion_mnist_resnet8" in out and "learning_rate" in out and "not shown" not in out
    assert len(out.splitlines()) < 26


def test_what_names_share_is_said_once_in_whole_words():
    assert tables.shared(["mnist_resnet20", "mnist_resnet8"]) == ("mnist_", "")
    assert tables.shared(["mnist_resnet20_v2", "mnist_resnet8_v2"]) == ("mnist_", "_v2")
    assert tables.shared(["resnet20", "resnet8"]) == ("", "")
    assert tables.shared(["a_long_", "a_long_net"]) == ("", "")
    assert tables.shared(["one"]) == ("", "")


def test_headings_are_folded_at_signs_before_words_are_broken():
    column = tables.Column("learning_rate", ("0.1",))
    assert tables.heading_forms(column)[:2] == ("learning_rate", "learning_\nrate")
    assert tables.heading_forms(column)[3] == "learn-\ning_\nrate"
    assert tables.heading_forms(tables.Column("temperature", ("2",)))[2] == "temper-\nature"
