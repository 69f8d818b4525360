"""Seeded inputs run through the real command line, each in a process and a place of its own, and what must hold of all.

An input is made from a seed, the name of its family and a number: the same three give the same input again. Its place
has a home, a working folder and a neighbour, all with files that no command wrote: none of them may change.
"""

import hashlib
import json
import os
import random
import re
import shutil
import stat
import subprocess
import sys
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import dfkd_ray
from fuzz.templates import TINY, build

SERVER = Path(__file__).with_name("fork_server.py")
LINE = 300  # characters of an error line, at most
LINES = 25  # lines of an error, at most
MEMORY_BYTES = 2 << 30  # held by one input, at most
REFUSED = frozenset({2, 3})
ANY = frozenset({0, 2, 3, 77})  # may be good: 77 is where Ray would start
TRIED = frozenset({0, 1, 2, 3, 77})  # 1: a trial ran and failed, or something damaged was found
PROGRESS = re.compile(r"(\w[\w ]* \d+/\d+\b|note: |trial t-|batch \d+ of )")
ESCAPED = re.compile(r"\\(x[0-9a-f]{2}|u[0-9a-f]{4}|U[0-9a-f]{8})")  # one character, on a terminal that lacks it
FOREIGN = ("letter.txt", "thesis/chapter.tex", "checkpoints/mine.pt", "student/grades.csv", "row.json", ".config/shell")


@dataclass
class Case:
    """A command line, and what it may do. Paths are relative to the case's place."""

    words: Sequence[str]
    codes: frozenset[int] = REFUSED
    cwd: str = "work"
    env: dict[str, str] = field(default_factory=dict)
    writes: Sequence[str] = ()  # below these, files may come, and those may change or go that a command of ours wrote
    secret: str = ""  # is printed nowhere, and written to no file
    encoding: str = "utf-8"
    raw_out: bool = False  # standard output is data: bytes of the user's own
    by: str = "dfkd_ray.cli:main"  # what runs the command line in the forked process
    about: Sequence[str] = ()  # what the input is made of, for a failure's message


class Desk:
    """The place of one case."""

    def __init__(self, root: Path, templates: Path, locked: bool):
        self.root, self.templates, self.locked = root, templates, locked
        self.home, self.work = root / "home", root / "work"
        self.changing: list[str] = []
        for folder in (self.home, self.work, root / "near", root / "tmp"):
            folder.mkdir(parents=True)
        for folder in (self.home, self.work / "foreign", root / "near"):
            plant(folder)
        (self.work / "notes.txt").write_text("not of this program")

    def take(self, name: str, to: str = "") -> Path:
        """A copy of a template in the working folder."""
        target = self.work / (to or name)
        if (self.templates / name).is_dir():
            shutil.copytree(self.templates / name, target, symlinks=True)
        else:
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(self.templates / name, target)
        return target

    def file(self, name: str, data: bytes | str) -> Path:
        """A file in the working folder."""
        path = self.work / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data if isinstance(data, bytes) else data.encode("utf-8", "surrogatepass"))
        return path


def content_of(name: str) -> str:
    """What lies in a file that somebody has there."""
    return f"{name}: years of work"


PLANTED = {hashlib.sha1(content_of(name).encode()).hexdigest() for name in FOREIGN}


def plant(folder: Path) -> None:
    """Files that somebody has there."""
    for name in FOREIGN:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content_of(name))


def snapshot(root: Path) -> dict[str, str]:
    """What lies below a folder: path → kind and content; links are not followed."""
    found: dict[str, str] = {}
    for entry in _walk(str(root)):
        name = os.path.relpath(entry.path, root)
        mode = entry.stat(follow_symlinks=False).st_mode
        if stat.S_ISREG(mode):
            with open(entry.path, "rb") as file:
                found[name] = hashlib.file_digest(file, "sha1").hexdigest()
        else:
            found[name] = os.readlink(entry.path) if stat.S_ISLNK(mode) else f"{stat.S_IFMT(mode):o}"
    return found


def _walk(folder: str) -> Iterator[os.DirEntry[str]]:
    with os.scandir(folder) as entries:
        for entry in entries:
            yield entry
            if entry.is_dir(follow_symlinks=False):
                yield from _walk(entry.path)


class Server:
    """A process that has imported everything, and forks for each case."""

    def __init__(self, folder: Path):
        self.folder = folder
        (folder / "home").mkdir(parents=True)
        root = Path(dfkd_ray.__file__).parents[1]
        # What is imported reads its environment once: there is nothing in it that a case's does not have.
        env: dict[str, str] = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
        env |= {
            "OMP_WAIT_POLICY": "passive",
            "PYTHONPATH": str(root),
            "HOME": str(folder / "home"),
            "TMPDIR": str(folder),
        }
        env["COLUMNS"] = "160"
        env |= {name: os.environ[name] for name in ("PATH", "FUZZ_IDLE_S") if name in os.environ}
        words = [sys.executable, str(SERVER), str(folder)]
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(words, stdin=pipe, stdout=pipe, cwd=root, env=env, text=True)
        about = self._answer()
        self.locked, self.held_bytes = about["locked"], about["held_bytes"]

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, f"the server has ended: {self.process.wait()}"
        return json.loads(line)

    def run(self, case: Case, place: Path) -> dict[str, Any]:
        """Run a command line; says how it ended."""
        home = str(place / "home")
        env = {"PATH": os.environ["PATH"], "HOME": home, "TMPDIR": str(place / "tmp"), "COLUMNS": "160"}
        env |= {"XDG_CACHE_HOME": f"{home}/.cache", "XDG_STATE_HOME": f"{home}/.local/state"}
        env |= {"RAY_USAGE_STATS_ENABLED": "0", "OMP_NUM_THREADS": "1", "AWS_EC2_METADATA_DISABLED": "true"}
        env |= {"AWS_MAX_ATTEMPTS": "1", "AWS_REGION": "us-east-1"} | case.env
        told = {"words": list(case.words), "cwd": str(place / case.cwd), "env": env, "encoding": case.encoding}
        told |= {"by": case.by, "out": str(place / "out"), "err": str(place / "err")}
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(told) + "\n")
        self.process.stdin.flush()
        return self._answer()

    def close(self) -> None:
        """End it."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


Make = Callable[[random.Random, Desk], Case]


@dataclass
class Bench:
    """Server, templates, and which inputs are wanted."""

    server: Server
    templates: Path
    folder: Path
    seed: int
    only: int | None

    def check(self, make: Make, num: int) -> None:
        """Run the inputs of a family; the assertion names those that ended as they should not, and how to run one."""
        family = make.__name__
        failures, slowest, codes = [], (0.0, -1), Counter[int]()
        for index in [self.only] if self.only is not None else range(num):
            problems, done = self.one(make, index)
            slowest = max(slowest, (done["cpu_s"], index))
            codes[done["code"]] += 1
            if problems:
                failures.append(f"[{index}] " + "\n      ".join(problems))
        ended = ", ".join(f"{number} with {code}" for code, number in codes.most_common())
        told = f"{family}: {num} inputs ended: {ended}; the slowest ({slowest[1]}) took {slowest[0]:.1f} s of CPU"
        sys.stdout.write(told + "\n")
        again = f"pytest tests/fuzz -k {family} --fuzz-seed {self.seed} --fuzz-only N"
        assert not failures, f"{len(failures)} of {num} inputs; one alone: {again}\n" + "\n".join(failures)

    def one(self, make: Make, index: int) -> tuple[list[str], dict[str, Any]]:
        """Make an input, run it, and say what is wrong with how it ended; what failed stays on the disk."""
        family = make.__name__
        rng = random.Random(f"{self.seed}:{family}:{index}")
        desk = Desk(self.folder / f"{family}-{index}", self.templates, self.server.locked)
        case = make(rng, desk)
        before = snapshot(desk.root)
        done = self.server.run(case, desk.root)
        out, err = ((desk.root / name).read_bytes() for name in ("out", "err"))
        problems = [*of_ending(case, done, self.server.held_bytes), *of_text(case, done["code"], out, err)]
        problems += of_files(case, before, snapshot(desk.root), desk.root)
        if not problems:
            shutil.rmtree(desk.root)
            return [], done
        command = " ".join(short(word) for word in case.words).replace(" ".join(map(repr, TINY)), "TINY")
        said = short((err or out).decode("utf-8", "replace"), 700)
        told = {"words": list(case.words), "cwd": case.cwd, "env": case.env, "encoding": case.encoding}
        (desk.root / "case.json").write_text(json.dumps({"seed": self.seed, "index": index, **told}, indent=1))
        problems += [f"made of: {'; '.join(case.about)}"] if case.about else []
        return [*problems, f"{command}  (in {desk.root / case.cwd})", f"exit {done['code']}: {said}"], done


def short(text: str, most: int = 160) -> str:
    """Text for a message, its middle left out."""
    shown = text if len(text) <= most else f"{text[: most // 2]}…{text[-most // 2 :]}"
    return repr(shown)


def of_ending(case: Case, done: dict[str, Any], held_bytes: int) -> Iterator[str]:
    """What is wrong with exit code, seconds and memory."""
    if done["hangs"]:
        yield f"HANGS: {done['cpu_s']:.0f} s of CPU, {done['wall_s']:.0f} s, signal {-done['code']}"
    elif done["code"] not in case.codes:
        yield f"EXIT {done['code']}, expected one of {sorted(case.codes)}"
    if done["peak_bytes"] - held_bytes > MEMORY_BYTES:
        yield f"MEMORY: {(done['peak_bytes'] - held_bytes) / 1e9:.1f} GB"


def of_text(case: Case, code: int, out: bytes, err: bytes) -> Iterator[str]:
    """What is wrong with what was printed."""
    texts = {"stdout": out.decode("utf-8", "replace"), "stderr": err.decode("utf-8", "replace")}
    for name, text in texts.items():
        if "Traceback (most" in text or '\n  File "' in text:
            yield f"TRACEBACK on {name}"
        if case.secret and case.secret in text:
            yield f"SECRET on {name}"
        is_text = not (case.raw_out and name == "stdout")
        marks = sorted({f"U+{ord(c):04X}" for c in text if is_text and is_control(c)})
        if marks:
            yield f"CONTROL {', '.join(marks[:4])} on {name}"
    if "unexpected error" in texts["stderr"].lower():
        yield "UNEXPECTED: only the last resort knew it"
    lines = [ESCAPED.sub("?", line) for line in texts["stderr"].split("\n") if line.strip()]
    errors = [line for line in lines if line.startswith("error: ")]
    ours = ("error: ", "warning: ", "note: ")
    others = [line for line in lines if not line.startswith(ours) and not PROGRESS.match(line)]
    if code in (2, 3) and not errors and "Usage: " not in texts["stdout"]:
        yield "SILENT: no line that begins with 'error: '"
    if code in (0, 77) and errors:
        yield f"ERROR though it went well: {short(errors[0])}"
    if len(errors) > LINES:
        yield f"LINES: {len(errors)}"
    longest = max((len(line) for line in lines), default=0)
    if longest > LINE:
        yield f"LONG: a line of {longest} characters"
    if others and code >= 0:
        yield f"OTHER LINE on stderr: {short(others[0])}"


def is_control(char: str) -> bool:
    """Whether a terminal would act on it instead of showing it."""
    return char not in "\n" and (unicodedata.category(char) == "Cc" or char in "\u200e\u200f\u061c" or is_bidi(char))


def is_bidi(char: str) -> bool:
    """Whether it turns the direction of the text around it."""
    return "\u202a" <= char <= "\u202e" or "\u2066" <= char <= "\u2069"


OURS = (
    "home/.cache/dfkd_ray",
    "home/.local/state/dfkd_ray",
    "home/.cache/matplotlib",
    "home/.config/matplotlib",
    "tmp",
)


def of_files(case: Case, before: dict[str, str], after: dict[str, str], root: Path) -> Iterator[str]:
    """What has changed that should not."""
    folders = [*OURS, *case.writes, "out", "err"]
    parents = {"home/.cache", "home/.local", "home/.local/state", "home/.config"}
    parents |= {str(parent) for name in case.writes for parent in Path(name).parents}

    def may(name: str) -> bool:
        return name in parents or any(name == folder or name.startswith(f"{folder}/") for folder in folders)

    gone = sorted(name for name in before if name not in after)
    changed = sorted(name for name in before if name in after and before[name] != after[name])
    come = sorted(name for name in after if name not in before and not may(name))
    foreign = [name for name in (*gone, *changed) if not may(name) or before[name] in PLANTED]
    if foreign:
        yield f"FILES gone or changed: {', '.join(map(short, foreign[:3]))} ({len(foreign)})"
    if come:
        yield f"FILES come: {', '.join(map(short, come[:3]))} ({len(come)})"
    if case.secret:
        new = [name for name in after if before.get(name) != after[name] and name not in ("out", "err")]
        for name in new:
            path = root / name
            if path.is_file() and not path.is_symlink() and case.secret.encode() in path.read_bytes():
                yield f"SECRET in {name}"


@contextmanager
def opened(folder: Path, seed: int, only: int | None) -> Iterator[Bench]:
    """Server and templates, for as long as a file of tests runs."""
    server = Server(folder)
    try:
        build(folder / "templates", server)
        yield Bench(server, folder / "templates", folder / "cases", seed, only)
    finally:
        server.close()
