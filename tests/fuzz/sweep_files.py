"""Generators of sweep files and configs."""

import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from fuzz.damage import HUGE, MARKS, PLACES, anything, changed, damaged, deep
from fuzz.fuzzing import ANY, REFUSED, TRIED, Case, Desk
from fuzz.templates import EDGES, SETTINGS, TINY, base, sweep_file

SWEEPS = Path(__file__).parents[2] / "sweeps"
BOMB = "\n".join(
    ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    + [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 9)]
)


def dumped(data: Any) -> str:
    """YAML of nested data; numbers that YAML has no word for as they would be typed."""
    return yaml.safe_dump(data, sort_keys=False, allow_unicode=True, width=1_000_000)


def wrong_value(rng: random.Random, desk: Desk) -> bytes:
    """A good sweep with something in it that is not."""
    shipped = [yaml.safe_load(path.read_text()) for path in sorted(SWEEPS.glob("*.yaml"))]
    data = rng.choice([sweep_file(), sweep_file(), sweep_file(), *shipped])
    return dumped(changed(rng, data, rng.choice([1, 1, 2]))).encode("utf-8", "surrogatepass")


def wrong_field(rng: random.Random, desk: Desk) -> bytes:
    """A value for a field of a trial, in any of the sections that take some."""
    data, value = sweep_file(), anything(rng)
    name = rng.choice([*SETTINGS, "synthesis", "pruning", "pruning.sparsity", "synthesis.seed", "teacher", "student"])
    section = rng.choice(["base", "grid", "tiny", "exclude", "space"])
    if section == "base":
        *parents, leaf = name.split(".")
        node = data["base"]
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = value
    elif section == "grid":
        data["grid"][name] = rng.choice([[value], value, [value, value], [0.5, value]])
    elif section == "tiny":
        data["tiny"][name] = value
    elif section == "exclude":
        data["exclude"] = rng.choice([[{name: value}], {name: value}, value, [value]])
    else:
        del data["grid"]
        domain = rng.choice([{"uniform": [value, 1]}, {"choice": value}, [value], value, {"magic": [1]}])
        data["search"] = {"space": {name: domain}, "algorithm": "random", "num_trials": rng.choice([2, value])}
    return dumped(data).encode("utf-8", "surrogatepass")


def edges(rng: random.Random, desk: Desk) -> bytes:
    """A sweep over values at the edges of what a config takes."""
    data = sweep_file()
    for name in rng.sample(sorted(EDGES), rng.choice([1, 2])):
        values = [yaml.safe_load(value) for value in rng.sample(EDGES[name], rng.choice([1, len(EDGES[name])]))]
        data["grid"][name] = values
    if rng.random() < 0.3:
        space = {"pruning.sparsity": rng.choice([{"uniform": [0.1, 0.9]}, {"quniform": [0, 0.9, 0.3]}, [0.5, 0.7]])}
        data["search"] = {"space": space, "algorithm": rng.choice(["random", "optuna"]), "num_trials": 3}
        del data["grid"]
    if rng.random() < 0.3:
        data["stop"] = {"asha": {"grace_looks": rng.choice([1, 10**6]), "reduction_factor": rng.choice([1.0001, 3])}}
    return dumped(data).encode()


def too_many(rng: random.Random, desk: Desk) -> bytes:
    """A sweep of more trials than anybody can run."""
    data, many = sweep_file(), rng.choice([1_000_000, 10**9, 2**63, HUGE])
    what = rng.choice(["seeds", "grid", "search", "grids", "long"])
    if what == "seeds":
        data["seeds"] = many
    elif what == "search":
        del data["grid"]
        data["search"] = {"space": {"pruning.sparsity": {"uniform": [0.1, 0.9]}}, "num_trials": many}
    elif what == "grids":
        data["grid"] = [{"pruning.sparsity": [0.5], "synthesis.seed": list(range(100))}] * 20_000
    elif what == "long":
        data["grid"] = {"pruning.sparsity": [-1.0 - i for i in range(3000)], "synthesis.seed": list(range(40))}
    else:
        names = ["seed", "num_steps", "bn_weight", "tv_weight", "l2_weight", "learning_rate"]
        data["grid"] = {f"synthesis.{name}": list(range(1, rng.choice([12, 60]))) for name in names}
    return dumped(data).encode()


def wrong_document(rng: random.Random, desk: Desk) -> bytes:
    """What no YAML reader expects."""
    good = dumped(sweep_file())
    depth = rng.choice([50, 1000, 20_000])
    documents: list[str | bytes] = [
        "",
        "null",
        "[]",
        "3",
        "true",
        "~",
        "---\n---\n",
        "{",
        "a: b: c",
        "\t- x",
        "%TAG ! !\n---\na: 1",
        "? [a]\n: b",
        good + good,
        good + "grid: {}\n",
        good.replace("grid:", "base: {}\ngrid:"),
        good + "1: 2\n",
        good + "null: 2\n",
        good + f"seeds: {'9' * rng.choice([20, 5000])}\n",
        good + "seeds: 1:30\n",
        good + "seeds: 0o17\n",
        good.replace("teacher: teacher", "teacher: &t [*t]"),
        "a: &a [*a]",
        "a: &a {b: *a}",
        "base: &b {base: *b}",
        good + "exclude: &e [*e]\n",
        "a: " + "[" * depth + "]" * depth,
        "a: " + "{a: " * depth,
        "- " * depth + "x",
        good + "tiny2: " + "[" * depth + "]" * depth + "\n",
        BOMB,
        good + BOMB,
        good + BOMB.replace("a8:", "exclude:"),
        good + "x: !!python/object/apply:os.system ['touch pwned']\n",
        good + "x: !!binary aGVsbG8=\n",
        good + "x: !!python/name:os.system\n",
        good + "x: !unknown 3\n",
        good + "<<: [1, 2]\n",
        good + "<<: *nowhere\n",
        good.encode("utf-16"),
        good.encode("utf-32"),
        b"\xef\xbb\xbf" + good.encode(),
        good.encode() + b"\xff\xfe\x00",
        b"\x00" * 100,
        rng.randbytes(300),
        (b"# " + b"x" * 998 + b"\n") * 20_000,
        good + "#" + "x" * 3_000_000,
        good.replace("about:", "about: 3\nabout:"),
        good + "about: {source: ]\n",
        good + "seeds: 2001-02-30\n",
        good + "seeds: 2001-01-01 25:99:99\n",
        good + "seeds: .nan\n",
        good + "seeds: .inf\n",
        good + "seeds: ''\n",
        "x" * 2_000_000,
        "'" + "x" * 100_000,
        good.replace("grid:", "grid: {}\nignored:"),
        dumped(deep(90, dict)),
    ]
    chosen = rng.choice(documents)
    return chosen.encode() if isinstance(chosen, str) else chosen


def damaged_document(rng: random.Random, desk: Desk) -> bytes:
    """A good sweep whose bytes have changed."""
    return damaged(rng, dumped(sweep_file()).encode())


def odd_file(rng: random.Random, desk: Desk) -> str:
    """A name on the command line with no sweep behind it."""
    os.mkfifo(desk.work / "pipe")
    os.symlink("loop", desk.work / "loop")
    os.symlink("nowhere", desk.work / "dangling")
    (desk.work / "folder.yaml").mkdir()
    names = [
        "folder.yaml",
        "/dev/zero",
        "/dev/urandom",
        "/dev/null",
        "loop",
        "dangling",
        "nothing.yaml",
        "/proc/self/mem",
    ]
    return rng.choice([*names, "pipe", "foreign", "x" * 5000, "/dev/stdin", *PLACES, *MARKS])


def sweep_files(rng: random.Random, desk: Desk) -> Case:
    """A sweep file of any kind, with options that look into it or not."""
    kinds: list[Callable[[random.Random, Desk], bytes]] = [wrong_value] * 5 + [wrong_field] * 5 + [wrong_document] * 4
    kind = rng.choice([*kinds, damaged_document, too_many, too_many, *[edges] * 4])
    desk.take("teacher")
    words = ["sweep", "sweep.yaml", "--results", "target", "--cache", "target-cache", "--test-data", "none"]
    words += rng.choice([[], [], ["--dry-run"], ["--dry-run", "--timings", "target/timings.json"]])
    words += rng.choice([[], [], ["--tiny"], ["--set", "synthesis.num_steps=2"], ["--set", "distillation.seed=1"]])
    words += rng.choice([[], [], ["--synthesizers", "0"], ["--teachers", "foreign"]])
    if rng.random() < 0.08:
        words[1] = odd_file(rng, desk)
        return Case(words, REFUSED, writes=["work/target"])
    desk.file("sweep.yaml", kind(rng, desk))
    codes = REFUSED if kind is too_many else ANY
    return Case(words, codes, writes=["work/target", "work/target-cache"], encoding=rng.choice(["utf-8", "ascii"]))


def config_files(rng: random.Random, desk: Desk) -> Case:
    """`--config` of a trial or of a synthesis."""
    desk.take("teacher")
    words = ["recover", "teacher", "--out", "target", "--cache", "target-cache", *TINY, "--config", "config.yaml"]
    data: Any = base("teacher")
    if rng.random() < 0.4:
        words = ["synthesize", "teacher", "--out", "target", "--cache", "target-cache", "--num-images", "4"]
        words += ["--config", "config.yaml"]
        data = data["synthesis"]
    if rng.random() < 0.1:
        words[-1] = odd_file(rng, desk)
        return Case(words, TRIED, writes=["work/target", "work/target-cache"])
    kind = rng.choice(["changed"] * 3 + ["damaged", "document"])
    if kind == "changed":
        content = dumped(changed(rng, data, rng.choice([1, 2]))).encode("utf-8", "surrogatepass")
    else:
        content = damaged(rng, dumped(data).encode()) if kind == "damaged" else wrong_document(rng, desk)
    desk.file("config.yaml", content)
    return Case(words, TRIED, writes=["work/target", "work/target-cache"])
