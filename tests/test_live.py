"""What a running sweep shows: snapshots from events, and their drawing."""

import io
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import cast

import pytest
from rich.cells import cell_len
from rich.console import Console

from dfkd_ray import config
from dfkd_ray.cli import drawing, live, names

NAMES = {"a": "net sparsity 0.5", "b": "net sparsity 0.7", "c": "net sparsity 0.9", "d": "net sparsity 0.95"}
STATUS = {
    "synthesizers": 2,
    "synthesizers_up": 2,
    "images_per_s": 12.34,
    "queue_depth": 3,
    "made": 7,
    "read": 1,
    "found": 1,
    "deaths": 0,
    "idle": {"synthesizer 0": 0.25, "synthesizer 1": None},
    "trouble": {},
}


def row(name: str, kl: float = 0.1, wall_s: float = 10.0, **more) -> dict:
    values = {"status": "finished", "reference_kl": kl, "wall_s": wall_s, "recovered_accuracy": None}
    return {"trial_id": name, "agreement": 0.9, **values, **more}


def failed(name: str) -> dict:
    return row(
        name, status="failed", reason="FloatingPointError: the loss is inf", kl=float("nan"), agreement=float("nan")
    )


def shown(snapshot: live.Snapshot, width: int = 100, height: int = 30, **options) -> str:
    console = Console(file=io.StringIO(), width=width, height=height, force_terminal=True, color_system=None)
    console.print(live.table(snapshot, "small.yaml", height, **options))
    return cast(io.StringIO, console.file).getvalue()


def test_every_trial_is_in_exactly_one_of_done_running_failed_and_to_do():
    view = live.View(NAMES, [], now=0.0)
    events = [
        lambda: view.stages({"a": ("starting", 0, 0), "b": ("starting", 0, 0)}, 1.0),
        lambda: view.row(row("a")),
        lambda: view.stages({"a": ("distilling", 9, 9), "b": ("distilling", 1, 9)}, 2.0),  # late: a has ended
        lambda: view.row(failed("b")),
        lambda: view.stages({"c": ("starting", 0, 0)}, 3.0),
        lambda: view.row(row("c")),
        lambda: view.row(row("d")),
    ]
    seen = []
    for event in events:
        event()
        now = view.snapshot(4.0)
        assert now.done + now.failed + len(now.running) + now.to_do == now.total == 4
        seen.append((now.done, len(now.running), now.failed, now.to_do))
    assert seen == [(0, 2, 0, 2), (1, 1, 0, 2), (1, 1, 0, 2), (1, 0, 1, 2), (1, 1, 1, 1), (2, 0, 1, 1), (3, 0, 1, 0)]


def test_rows_of_an_earlier_run_count_as_done_those_of_other_sweeps_and_failed_ones_do_not():
    view = live.View(NAMES, [row("a", 0.2), failed("b"), row("of another file", 0.01)], now=0.0)
    snapshot = view.snapshot(0.0)
    assert (snapshot.done, snapshot.failed, snapshot.to_do) == (1, 0, 3)
    assert snapshot.best == (0.2, NAMES["a"])


def test_time_left_is_unknown_until_a_trial_of_this_run_has_finished():
    view = live.View(NAMES, [row("a")], now=0.0)
    view.stages({"b": ("starting", 0, 0)}, 0.0)
    assert view.snapshot(5.0).left_s is None and live.duration(None) == "-"
    view.row(failed("b"))
    assert view.snapshot(5.0).left_s is None


def test_time_left_is_what_finished_trials_took_over_those_that_run_at_once():
    view = live.View({str(i): str(i) for i in range(8)}, [], now=0.0)
    view.stages({"0": ("starting", 0, 0), "1": ("starting", 0, 0)}, 0.0)
    view.row(row("0", wall_s=10.0))
    view.row(row("1", wall_s=20.0))
    view.stages({"2": ("starting", 0, 0), "3": ("starting", 0, 0)}, 20.0)
    # Six trials of 15 s are left, two at a time; the running two have 5 s and, being late, all of 15 s behind them.
    assert view.snapshot(25.0).left_s == (6 * 15 - 2 * 5) / 2
    assert view.snapshot(100.0).left_s == 4 * 15 / 2


def test_best_is_by_the_lowest_kl_alone():
    rows = [row("a", 0.1, agreement=0.8, recovered_accuracy=0.1), row("b", 0.2, agreement=0.9, recovered_accuracy=0.99)]
    for order in (rows, rows[::-1]):
        view = live.View(NAMES, [], now=0.0)
        for one in order:
            view.row(one)
        assert view.snapshot(1.0).best == (0.1, NAMES["a"])


def test_running_seconds_go_on_over_stages():
    view = live.View(NAMES, [], now=0.0)
    view.stages({"a": ("starting", 0, 0)}, 2.0)
    view.stages({"a": ("distilling", 30, 60)}, 5.0)
    assert view.snapshot(9.0).running == ((NAMES["a"], "distilling 30/60", 7.0),)


def test_names_tell_all_trials_apart_by_what_differs():
    base = {"teacher": "somewhere/tiny", "pruning": {"sparsity": 0.5}}
    points: list[dict] = [
        {"distillation": {"temperature": t}, "synthesis": {"bn_weight": w}} for t in (2, 4) for w in (1, 2)
    ]
    points.append({"synthesis": {"method": "noise"}, "distillation": {"temperature": 2}})
    trials = {str(i): config.validate(config.TrialConfig, {**base, **point}) for i, point in enumerate(points)}
    called = {trial_id: names.name_from(parts) for trial_id, parts in names.parts_of(trials).items()}
    assert len(set(called.values())) == 5
    assert called["0"].startswith("tiny deepinversion sparsity 0.5") and "bn_weight 1 " in called["0"]
    assert "bn_weight" not in called["4"] and "seed" not in called["0"]


@pytest.mark.parametrize("second", [None, 3.0])
def test_the_reference_sets_batchnorm_weight_is_named_only_where_trials_of_one_teacher_differ_in_it(second):
    points: list[dict] = [{"teacher": t, "reference": {"synthesis": {"bn_weight": w}}} for t, w in (("a", 1), ("b", 2))]
    points += [points[0] | {"reference": {"synthesis": {"bn_weight": second}}}] if second else []
    trials = {str(i): config.validate(config.TrialConfig, point) for i, point in enumerate(points)}
    called = [names.name_from(parts) for parts in names.parts_of(trials).values()]
    assert len(set(called)) == len(called) and all(("bn_weight" in one) is bool(second) for one in called)


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0 s"), (59.6, "1 min 00 s"), (3725.0, "1 h 02 min"), (-3.0, "0 s")]
)
def test_durations_read_well(seconds, text):
    assert live.duration(seconds) == text


def test_the_table_holds_counts_time_left_best_fleet_and_running_trials():
    view = live.View(NAMES, [], now=0.0)
    view.stages({"a": ("starting", 0, 0), "b": ("synthesising", 3, 8)}, 0.0)
    view.row(row("a", 0.0875, wall_s=30.0))
    view.fleet(STATUS)
    text = shown(view.snapshot(31.0))
    for part in (
        "small.yaml",
        "reference KL 0.0875, net sparsity 0.5",
        "synthesising 3/8",
        "12.3 images/s",
        "31 s",
        "2/2 synth",
    ):
        assert part in text, (part, text)
    assert "-" in shown(live.View(NAMES, [], 0.0).snapshot(0.0))


def running_view(num_trials: int = 16) -> live.View:
    """A sweep over networks and five fields, of which all trials run."""
    trials = {}
    for i in range(num_trials):
        point = {"teacher": f"fashion_mnist_resnet{(20, 8)[i & 1]}", "pruning": {"sparsity": (0.75, 0.5)[i >> 1 & 1]}}
        point |= {"synthesis": {"bn_weight": (2.0, 0.2)[i >> 2 & 1], "seed": i}}
        point |= {"distillation": {"temperature": 2.0 + i}}
        trials[f"t-{i}"] = config.validate(config.TrialConfig, point)
    parts = names.parts_of(trials)
    view = live.View({name: names.name_from(each) for name, each in parts.items()}, [], 0.0, parts=parts)
    view.stages({name: ("synthesising", i, 128) for i, name in enumerate(trials)}, 0.0)
    return view


@pytest.mark.parametrize(("width", "height"), [(80, 24), (80, 40), (100, 40), (140, 60)])
def test_running_trials_have_a_column_for_each_field_that_varies(width, height):
    lines = shown(running_view().snapshot(100.0), width, height).splitlines()
    assert len(lines) < height and max(map(len, lines)) <= width
    assert sum("fashion_mnist_…" in line for line in lines) == 1, "what names share is said once"
    rows = [line.split() for line in lines if line.startswith("resnet")]
    assert len(rows) == min(16, height - drawing.FRAME_LINES - 1)
    for i, row in enumerate(rows):
        network, sparsity = ("resnet20", "resnet8")[i & 1], ("0.75", "0.5")[i >> 1 & 1]
        weight = ("2", "0.2")[i >> 2 & 1]
        assert row == [network, sparsity, str(i), weight, str(2 + i), "synthesising", f"{i}/128", "100"]
    assert ("more" in "".join(lines)) == (len(rows) < 16)


@pytest.mark.parametrize("name", ["[red]x[/red]", "a\x1b[31mb", "x" * 500, "網" * 90])
@pytest.mark.parametrize("width", [20, 60, 80])
def test_hostile_parts_of_names_stay_text_within_the_width(width, name):
    parts = {str(i): {"network": f"{name}{i}", "method": name, "sparsity": "0.5", "student.x": name} for i in range(3)}
    view = live.View({key: names.name_from(each) for key, each in parts.items()}, [], 0.0, parts=parts)
    view.stages({key: (name, 1, 2) for key in parts}, 0.0)
    text = shown(view.snapshot(1.0), width, 24)
    assert max(cell_len(line) for line in text.splitlines()) <= width and "\x1b" not in text
    assert len(text.splitlines()) < 24


@pytest.mark.parametrize(("width", "height"), [(40, 14), (60, 20), (200, 50)])
def test_the_table_fits_the_terminal_however_many_trials_run(width, height):
    called = {str(i): f"a network with a very long name and many fields that differ {i}" for i in range(300)}
    view = live.View(called, [], now=0.0)
    view.stages({name: ("distilling", 12, 345) for name in called}, 0.0)
    view.fleet(STATUS)
    lines = shown(view.snapshot(1.0), width, height).splitlines()
    assert len(lines) < height and max(map(len, lines)) <= width
    assert "more" in "".join(lines)


def test_on_a_terminal_the_table_is_drawn_in_place_and_leaves_only_failures(monkeypatch):
    monkeypatch.setattr(live, "DRAW_S", 0.02)
    monkeypatch.setenv("TERM", "xterm")
    console = Console(file=io.StringIO(), width=100, height=30, force_terminal=True)
    screen = live.Screen(live.View(NAMES, [], 0.0), "small.yaml", console, clock=lambda: 50.0)
    assert screen.is_live
    with screen.shown():
        screen.stages({"a": ("distilling", 12, 60)})
        for _ in range(20_000):
            if "12/60" in cast(io.StringIO, console.file).getvalue():
                break
            live.time.sleep(0.02)
        screen.row(row("a"), 1, 4)
        screen.row(failed("b"), 2, 4)
    text = cast(io.StringIO, console.file).getvalue()
    assert "12/60" in text and "\x1b[2K" in text, "lines are erased before they are drawn again"
    assert "FAILED: FloatingPointError" in text and "[1/4" not in text
    assert text.rindex("\x1b[?25h") > text.rindex("\x1b[?25l"), "the cursor is back"
    assert screen.seconds > 0


def test_elsewhere_there_are_plain_lines(capsys):
    console = Console(file=io.StringIO())
    screen = live.Screen(live.View(NAMES, [], 0.0), "small.yaml", console, clock=lambda: 50.0)
    with screen.shown():
        screen.stages({"a": ("distilling", 12, 60)})
        screen.row(row("a", 0.5, recovered_accuracy=0.25), 1, 4)
        screen.row(failed("b"), 2, 4)
        screen.fleet(STATUS)
    lines = capsys.readouterr().out.splitlines()
    assert (
        lines[0]
        == "[1/4, 50 s, 30 s left] net sparsity 0.5: reference KL 0.5, agreement 90.00 %, test accuracy 25.00 %"
    )
    assert lines[1].endswith("net sparsity 0.7: FAILED: FloatingPointError: the loss is inf")
    assert lines[2].startswith("fleet: 2/2 synthesizers up") and len(lines) == 3
    assert cast(io.StringIO, console.file).getvalue() == ""


def test_the_command_to_go_on_with_is_the_one_that_was_given():
    words = ["/x/bin/dfkd-ray", "sweep", "my sweep.yaml", "--set", "a=[1, 2]"]
    assert live.command_line(words, ["python", *words]) == "/x/bin/dfkd-ray sweep 'my sweep.yaml' --set 'a=[1, 2]'"
    module = ["/x/dfkd_ray/__main__.py", "sweep", "s.yaml"]
    assert (
        live.command_line(module, ["python3", "-m", "dfkd_ray", "sweep", "s.yaml"])
        == "python3 -m dfkd_ray sweep s.yaml"
    )


INTERRUPTED = """
import os, signal, sys, time
from dfkd_ray.cli import live
screen = live.Screen(live.View({}, [], 0.0), "s")
with live.interruptible(screen) as interrupts:
    if sys.argv[1] != "before":
        interrupts.up()
    try:
        for number in sys.argv[2:]:
            os.kill(os.getpid(), getattr(signal, number))
            time.sleep(0.01)
        print("asked", interrupts.asked, flush=True)
    except KeyboardInterrupt:
        print("interrupted", flush=True)
assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
"""


@pytest.mark.parametrize(
    ("words", "code", "out"),
    [
        (("before", "SIGINT"), 0, "interrupted\n"),
        (("before", "SIGTERM"), 0, "interrupted\n"),
        (("running", "SIGINT"), 0, "asked True\n"),
        (("running", "SIGTERM"), 0, "asked True\n"),
        (("running", "SIGINT", "SIGINT"), 130, ""),
        (("running", "SIGTERM", "SIGINT"), 130, ""),
        (("before", "SIGHUP"), 0, "interrupted\n"),
        (("running", "SIGHUP"), 0, "asked True\n"),
        (("running", "SIGHUP", "SIGINT"), 130, ""),
        (("running", "SIGINT", "SIGHUP"), 130, ""),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, tuple) else None,
)
def test_the_first_signal_asks_the_second_ends(words, code, out):
    command = [sys.executable, "-c", INTERRUPTED, *words]
    environment = {**os.environ, "PYTHONPATH": str(Path(live.__file__).parent.parent.parent)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=900, check=False)
    assert (done.returncode, done.stdout) == (code, out), done.stderr
    assert "stopping" in done.stderr
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.parametrize(("numbers", "code", "out"), [(1, 0, "asked True\n"), (2, 130, "")])
def test_signals_do_the_same_when_nobody_hears_standard_error(numbers, code, out):
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-c", INTERRUPTED, "running", *["SIGINT"] * numbers]
    environment = {**os.environ, "PYTHONPATH": str(Path(live.__file__).parent.parent.parent)}
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=writer, text=True, env=environment, timeout=900)
    os.close(writer)
    assert (done.returncode, done.stdout) == (code, out)
