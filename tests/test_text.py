"""Names, reasons and paths of others are shown as text, wherever they are shown."""

import io
import json
import unicodedata
from typing import cast

import pandas as pd
import pytest
from rich.console import Console

from dfkd_ray import bundles, cache_entries, report, results
from dfkd_ray.cli import live, names, show
from dfkd_ray.report import figures
from dfkd_ray.storage import folder
from dfkd_ray.text import last_parts
from table_rows import full_row, trial_row

HOSTILE = [
    "[/b]",
    "[red]x[/red]",
    "a\x1b[31mb",
    "a\x1b]0;title\x07b",
    "a\x9b2Jb",
    "a\u202eb\u2066c",
    "a\nb\r\tc",
    "a|b\\c",
]
NAMES = ["markup end", "markup", "colour", "title", "C1", "bidirectional", "line ends", "table signs"]


def acts(text: str) -> list[str]:
    """The characters of a text that act on a terminal or turn text round, but for line ends."""
    return [sign for sign in text if unicodedata.category(sign) in ("Cc", "Cf", "Cs", "Zl", "Zp") and sign != "\n"]


def as_seen(name: str) -> str:
    """A name as it must be shown."""
    return "".join(sign.encode("unicode_escape").decode() if acts(sign) or sign == "\n" else sign for sign in name)


def test_paths_are_called_by_as_much_of_their_end_as_tells_them_apart():
    paths = ["runs/a/net", "runs/b/net", "s3://key:secret@bucket/net", "other", "runs/b/net", "net/"]
    assert last_parts(paths) == {
        "runs/a/net": "a/net",
        "runs/b/net": "b/net",
        "s3://key:secret@bucket/net": "bucket/net",
        "other": "other",
        "net/": "net",
    }
    assert last_parts(["x/y", "/x/y", "/"]) == {"x/y": "x/y", "/x/y": "/x/y", "/": "/"}
    assert last_parts([]) == {}


def test_nothing_that_is_shown_acts_and_what_is_plain_stays():
    from dfkd_ray.text import shown

    for number in [*range(0x3000), *range(0xD800, 0xE000), 0xFEFF, 0x1F600, 0xE0041]:
        text = shown(f"a{chr(number)}b")
        assert not [sign for sign in acts(text) if sign not in "\u200c\u200d"] and "\n" not in text
        assert text == f"a{chr(number)}b" or text[1] == "\\"
    assert shown("réseau – 網 👩‍👩‍👧 a\\b [b]") == "réseau – 網 👩‍👩‍👧 a\\b [b]"
    assert shown("a\nb\tc\x1b", keep="\n") == "a\nb\\tc\\x1b"


@pytest.mark.parametrize("name", HOSTILE, ids=NAMES)
def test_the_final_table_the_ladder_and_the_failures_show_names_as_text(capsys, name):
    row = trial_row(0, 0.5, 0, teacher=name, achieved_sparsity=0.5, status="finished")
    row |= {"student.arguments": name, "synthesis_wall_s": 1.0, "distillation_wall_s": 1.0, "num_images": 8}
    bad = trial_row(1, 0.7, 1, teacher=name, status="failed", reason=name, trial_id=name)
    columns = results.schema("trials").names
    frame = pd.DataFrame([{**dict.fromkeys(columns), **one} for one in (row, bad)])
    show.print_trials(frame)
    show.print_failures(frame)
    show.print_ladder({**dict.fromkeys(columns), **row}, folder("/tmp/x").path / name)
    out = capsys.readouterr().out
    assert not acts(out) and f"1 failed: {as_seen(name)}" in out
    assert as_seen(name) in out.splitlines()[0] or as_seen(name) in out


@pytest.mark.parametrize("name", HOSTILE, ids=NAMES)
def test_the_live_view_and_the_plain_lines_show_names_as_text(capsys, name):
    values = {"teacher": name, "synthesis.method": "noise", "pruning.sparsity": 0.5, "student.arguments": name}
    called = names.name_of(values, ["student.arguments"])
    view = live.View({"a": called, "b": name}, [], 0.0)
    view.stages({"b": (name, 0, 1)}, 0.0)
    view.row({"trial_id": "a", "status": "finished", "agreement": 0.5, "wall_s": 1.0})
    status = {"synthesizers": 1, "synthesizers_up": 1, "images_per_s": 1.0, "queue_depth": 0, "made": 0, "read": 0}
    status |= {"found": 0, "deaths": 0, "idle": {}, "trouble": {name: name}}
    view.fleet(status)
    console = Console(file=io.StringIO(), width=300, height=40, color_system=None)
    console.print(live.table(view.snapshot(1.0), name, 40))
    text = cast(io.StringIO, console.file).getvalue()
    assert not acts(text) and text.count(as_seen(name)) >= 4, text
    screen = live.Screen(view, name, console, clock=lambda: 1.0)
    screen.row({"trial_id": "b", "status": "failed", "reason": name}, 1, 2)
    screen.fleet(status)
    out = capsys.readouterr().out
    assert not acts(out) and len(out.splitlines()) == 2 and f"FAILED: {as_seen(name)}" in out


@pytest.mark.parametrize("name", HOSTILE, ids=NAMES)
def test_results_and_the_listings_show_names_as_text(run_cli, tmp_path, tiny_teacher, name):
    row = trial_row(0, 0.5, 0, teacher=name, status="failed", reason=name, trial_id="t-0")
    results.write(tmp_path, "trials", [row], "part")
    words = ["results", str(tmp_path), "--columns", "teacher,reason"]
    for format_ in ("table", "markdown", "latex"):
        out = run_cli(*words, "--format", format_).out
        assert not acts(out) and len(out.splitlines()) == {"table": 4, "markdown": 3, "latex": 7}[format_], out
    assert as_seen(name) in run_cli(*words).out
    assert json.loads(run_cli(*words, "--format", "json").out)[0]["reason"] == name
    written = tmp_path / "teacher"
    teacher = bundles.load(tiny_teacher)
    info = teacher.info.model_copy(update={"dataset": name})
    bundles.save(written, info, teacher.network.state_dict())
    out = run_cli("teacher", "info", str(written)).out
    assert not acts(out) and as_seen(name) in out
    done = run_cli("results", f"/nowhere/{name.replace('/', '')}")
    assert done.code == 2 and not acts(done.err) and len(done.err.splitlines()) == 1


@pytest.mark.parametrize("name", HOSTILE, ids=NAMES)
def test_the_cache_listing_shows_teachers_as_text(capsys, name):
    from dfkd_ray.cli import cache as command

    manifest = {"teacher": name, "config": {"method": name}, "domain": "train", "numerics": "n"}
    entry = cache_entries.Entry(folder("/tmp/x"), "ab" * 32, manifest, 1, 10, None)
    command.print_table([entry])
    out = capsys.readouterr().out
    assert not acts(out) and as_seen(name) in out


def test_a_report_shows_names_as_text(tmp_path, monkeypatch):
    monkeypatch.setattr(figures, "as_png", lambda figure: b"")
    place = tmp_path / "".join(HOSTILE).replace("/", "")
    rows = [full_row(number, teacher_architecture=name) for number, name in enumerate(HOSTILE)]
    rows += [full_row(number, status="failed", reason=name) for number, name in enumerate(HOSTILE, len(HOSTILE))]
    results.write(place, "trials", rows, "part")
    page, _ = report.build(folder(place))
    assert not [sign for sign in acts(page) if sign not in "\t"]


# ---- exports -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("start", ["=", "+", "-", "@", "\t", "\r"])
def test_csv_quotes_texts_that_a_spreadsheet_would_compute_and_no_number(run_cli, tmp_path, start):
    reason = f"{start}HYPERLINK(1)"
    row = trial_row(0, 0.5, 0, status="failed", reason=reason, reference_kl=-0.5, best_step=-3, wall_s=None)
    results.write(tmp_path, "trials", [row, trial_row(1, 0.7, 1)], "part")
    words = ["results", str(tmp_path), "--format", "csv"]
    run_cli(*words, "--out", str(tmp_path / "a.csv"))
    for text in (run_cli(*words).out, (tmp_path / "a.csv").read_bytes().decode()):
        frame = pd.read_csv(io.StringIO(text, newline=""), dtype=str).set_index("trial_id")
        assert frame.loc["t-0", "reason"] == "'" + reason
        assert (frame.loc["t-0", "reference_kl"], frame.loc["t-0", "best_step"]) == ("-0.5", "-3")
        assert pd.isna(frame.loc["t-0", "wall_s"]) and pd.isna(frame.loc["t-1", "reason"])


def test_no_cell_breaks_the_table_of_an_export(run_cli, tmp_path):
    reason = "[x] a|b \\ <b> *\nc"
    results.write(tmp_path, "trials", [trial_row(0, 0.5, 0, status="failed", reason=reason)], "part")
    words = ["results", str(tmp_path), "--columns", "reason,trial_id"]
    line = run_cli(*words, "--format", "markdown").out.splitlines()[2]
    assert line == "| [x] a\\|b \\\\ \\<b> *\\\\nc | t-0 |"
    line = run_cli(*words, "--format", "latex").out.splitlines()[4]
    assert line == r"{[}x] a|b \textbackslash{} <b> {*}\textbackslash{}nc & t-0 \\"
