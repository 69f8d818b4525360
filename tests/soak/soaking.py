"""Disturbs a sweep's command line at random moments, and watches that what is final stays.

A session is one run of the command. It is killed, stopped for a while, starved of disk, or its reader goes away; when
it ends before every trial has a final row, the same command is run again, at times while processes of the
session before still run. Everything random comes from one seed.
"""

import io
import os
import random
import re
import signal
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

from commands import command_of
from dfkd_ray import results
from dfkd_ray.cli.live import descendants

HANG_S = 1200.0  # without a new row, an event or an end
PAUSE_S = 5.0  # between two events, in the mean
KINDS = {
    "kill trial": 4,
    "kill synthesizer": 3,
    "kill any worker": 2,
    "kill driver": 3,
    "kill raylet": 2,
    "kill everything": 2,
    "stop and continue": 4,
    "full results disk": 2,
    "full cache disk": 2,
    "full disks": 1,
    "closed pipe": 3,
}
NEEDS_DISK = ("full results disk", "full cache disk", "full disks")
ENDS = ("kill driver", "kill raylet", "kill everything")  # a session, sooner or later


@dataclass
class Figures:
    """What has happened so far."""

    seed: int
    events: Counter[str] = field(default_factory=Counter)
    exit_codes: Counter[int] = field(default_factory=Counter)
    num_sweeps: int = 0
    num_sessions: int = 0
    num_trials: int = 0
    num_looks: int = 0
    minutes: float = 0.0
    problems: list[str] = field(default_factory=list)

    @property
    def num_events(self) -> int:
        """All of them."""
        return sum(self.events.values())

    def plain(self) -> dict[str, object]:
        """For a file."""
        return {
            **vars(self),
            "events": dict(self.events.most_common()),
            "exit_codes": {str(code): number for code, number in sorted(self.exit_codes.items())},
            "num_events": self.num_events,
        }


class Watcher:
    """Reads the table of trials all the time: a final row that goes, or is replaced, is a problem."""

    def __init__(self, place: Path, problems: list[str]):
        self.place, self.problems, self.num_looks = place, problems, 0
        self.final: dict[str, tuple[str, float]] = {}
        self.changed = time.monotonic()
        self.over = threading.Event()
        self.thread = threading.Thread(target=self.watch, daemon=True)

    def watch(self) -> None:
        """Look until it is over."""
        while not self.over.wait(0.2):
            self.look()

    def look(self) -> None:
        """Compare the table with what was final before."""
        try:
            rows = results.read(self.place, "trials", ["trial_id", "status", "written_at_s"])
        except (OSError, ValueError) as error:
            if self.final:
                self.problems.append(f"the table cannot be read: {error}")
            return
        self.num_looks += 1
        there = {row["trial_id"]: (row["status"], row["written_at_s"]) for row in rows.to_dict("records")}
        for trial_id, before in self.final.items():
            if there.get(trial_id) != before:
                self.problems.append(f"the final row of {trial_id} was {before}, it is {there.get(trial_id)}")
        final = {trial_id: row for trial_id, row in there.items() if row[0] in results.FINAL}
        if len(final) > len(self.final):
            self.changed = time.monotonic()
        self.final |= final

    def __enter__(self) -> "Watcher":
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.over.set()
        self.thread.join()
        self.look()


class Disk:
    """A small file system of its own, that can be filled; an ordinary folder where none can be mounted."""

    def __init__(self, folder: Path, megabytes: int):
        folder.mkdir()
        self.folder, self.ballast = folder, folder / "ballast"
        words = ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "none", str(folder)]
        self.own = os.geteuid() == 0 and subprocess.run(words, capture_output=True, check=False).returncode == 0

    def fill(self) -> None:
        """Leave no byte free."""
        with suppress(OSError), self.ballast.open("wb") as file:  # opening too may find the disk full
            while True:
                file.write(bytes(1 << 16))
                file.flush()

    def free(self) -> None:
        """Take the ballast away."""
        self.ballast.unlink(missing_ok=True)

    def close(self) -> None:
        """Give the file system back."""
        if self.own:
            subprocess.run(["umount", "-l", str(self.folder)], check=True)


@contextmanager
def disks(root: Path, name: str) -> Iterator[tuple[Disk, Disk]]:
    """One for results, one for the cache."""
    place, cache = Disk(root / f"{name}-results", 64), Disk(root / f"{name}-cache", 32)
    try:
        yield place, cache
    finally:
        place.close()
        cache.close()


def started_at(pid: int) -> str:
    """When a process was started: with its number this tells it from all others; empty where it has ended."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if fields[0] == "Z" else fields[19]


class Session:
    """One run of the command, and all processes that it has ever started."""

    def __init__(self, words: list[str], log: Path):
        env = {**os.environ, "XDG_STATE_HOME": str(log.parent / "state")}
        self.log, self.seen = log, dict[int, str]()
        self.offset = log.stat().st_size if log.exists() else 0
        with log.open("ab") as err:
            self.process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=err, env=env, start_new_session=True)
        assert self.process.stdout is not None
        self.out, self.closing = cast(io.BufferedReader, self.process.stdout), threading.Event()
        self.reader = threading.Thread(target=self.read, daemon=True)
        self.reader.start()

    def read(self) -> None:
        """Keep what is printed, until it ends or the reader has had enough."""
        with self.log.open("ab") as file:
            while not self.closing.is_set() and (data := self.out.read1(1 << 16)):
                file.write(data)
                file.flush()
        self.out.close()

    def look(self) -> list[int]:
        """Its processes that are alive now; the driver first."""
        for pid in (self.process.pid, *descendants(self.process.pid)):
            self.seen.setdefault(pid, started_at(pid))
        return [pid for pid, begun in self.seen.items() if begun and started_at(pid) == begun]

    def named(self, *words: bytes) -> list[int]:
        """Those of its processes whose command line has one of the words."""
        return [pid for pid in self.look() if any(word in command_of(pid) for word in words)]

    def signal(self, pid: int, number: signal.Signals) -> None:
        """A signal to one of its processes, if that is still the same one."""
        if self.seen.get(pid) and started_at(pid) == self.seen[pid]:
            with suppress(ProcessLookupError):
                os.kill(pid, number)

    def tidy(self) -> None:
        """Leave nothing of it running."""
        while left := self.look():
            for pid in left:
                self.signal(pid, signal.SIGKILL)
            self.process.poll()
            time.sleep(0.05)
        self.closing.set()

    def said(self) -> str:
        """All that it has printed so far."""
        with self.log.open("rb") as file:
            file.seek(self.offset)
            return file.read().decode(errors="replace")


class Soak:
    """A sweep, disturbed until `enough` says so, and then left to end."""

    def __init__(self, words: list[str], place: Path, log: Path, disks: tuple[Disk, Disk], figures: Figures, seed: str):
        self.words, self.place, self.log, self.disks, self.figures = words, place, log, disks, figures
        self.random = random.Random(seed)

    def run(self, num_trials: int, enough: Callable[[], bool]) -> None:
        """Sessions, one after the other, until every trial has a final row. `AssertionError` for one that hangs."""
        figures = self.figures
        with Watcher(self.place, figures.problems) as watcher:
            sessions: list[Session] = []
            try:
                while len(watcher.final) < num_trials:
                    sessions.append(Session(self.words, self.log))
                    figures.num_sessions += 1
                    self.disturb(sessions[-1], watcher, enough)
                    self.judge(sessions[-1])
                    if self.random.random() < 0.5:
                        sessions[-1].tidy()
                    watcher.look()
            finally:
                for session in sessions:
                    session.tidy()
        figures.num_looks += watcher.num_looks
        figures.num_trials += len(watcher.final)

    def judge(self, session: Session) -> None:
        """Whether a session has ended as it may, and printed what it may."""
        code, said, problems = session.process.wait(), session.said(), self.figures.problems
        self.figures.exit_codes[code] += 1
        if code not in (0, 1, 3, -signal.SIGKILL):
            problems.append(f"exit code {code}: {said[-600:]}")
        for words in ("Traceback (most recent call last)", "unexpected error"):
            if words in said:
                problems.append(f"it printed: {said[said.rfind(words) :][:900]}")
        for path in re.findall(r"traceback: (/\S+)", said):
            problems.append(Path(path).read_text()[-3000:])

    def disturb(self, session: Session, watcher: Watcher, enough: Callable[[], bool]) -> None:
        """Events, until the session ends."""
        last = time.monotonic()
        pause = self.random.expovariate(1 / PAUSE_S)
        while session.process.poll() is None:
            now = time.monotonic()
            session.look()
            assert now - max(last, watcher.changed) < HANG_S, f"it hangs: {session.said()[-2000:]}"
            if now - last > pause and not enough():
                kind = self.random.choices(list(KINDS), list(KINDS.values()))[0]
                if self.happens(kind, session):
                    self.figures.events[kind] += 1
                    last, pause = time.monotonic(), self.random.expovariate(1 / PAUSE_S)
            time.sleep(0.1)

    def happens(self, kind: str, session: Session) -> bool:
        """Let something happen; false where it cannot now. What ends a session mostly waits until trials run."""
        if kind in NEEDS_DISK:
            return self.starve(kind)
        trials = session.named(b"ray::ImplicitFunc")
        workers = session.named(b"ray::")
        synthesizers = session.named(b"ray::Synthesizer")
        everything = session.look()
        if kind in ENDS and not trials and self.random.random() < 0.9:
            return False
        if kind == "closed pipe":
            if session.closing.is_set():
                return False
            session.closing.set()  # after what is printed next
            return True
        if kind == "stop and continue":
            groups = [trials, synthesizers, workers, everything, [session.process.pid]]
            group = self.random.choice([group for group in groups if group])
            victims = group if self.random.random() < 0.2 else [self.random.choice(group)]
            for pid in victims:
                session.signal(pid, signal.SIGSTOP)
            time.sleep(self.random.choice([0.2, 1.0, 3.0, 8.0]))
            for pid in victims:
                session.signal(pid, signal.SIGCONT)
            return True
        victims = {
            "kill trial": trials,
            "kill synthesizer": synthesizers,
            "kill any worker": workers,
            "kill driver": [session.process.pid],
            "kill raylet": session.named(b"raylet/raylet", b"gcs_server"),
            "kill everything": everything,
        }[kind]
        if not victims:
            return False
        for pid in everything if kind == "kill everything" else [self.random.choice(victims)]:
            session.signal(pid, signal.SIGKILL)
        return True

    def starve(self, kind: str) -> bool:
        """Fill a disk, or both, for a while."""
        chosen = {"full results disk": self.disks[:1], "full cache disk": self.disks[1:]}.get(kind, self.disks)
        if not all(disk.own for disk in chosen):
            return False
        for disk in chosen:
            disk.fill()
        time.sleep(self.random.choice([0.5, 2.0, 6.0]))
        for disk in chosen:
            disk.free()
        return True


def files_below(folder: Path) -> dict[str, bytes]:
    """Content by relative path."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
