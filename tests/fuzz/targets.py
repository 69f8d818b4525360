"""Generator of places that a command is told to write to."""

import os
import random

from fuzz.fuzzing import REFUSED, TRIED, Case, Desk
from fuzz.sweep_files import dumped
from fuzz.templates import TINY, sweep_file


def odd_target(rng: random.Random, desk: Desk) -> tuple[str, frozenset[int], str]:
    """A name for a place to write, the exit codes that are right, and what of it may be written (nothing: "")."""
    os.symlink("loop", desk.work / "loop")
    os.symlink("../near", desk.work / "link")
    os.symlink("nowhere", desk.work / "dangling")
    os.mkfifo(desk.work / "pipe")
    never = [
        ".",
        "..",
        "../home",
        "~",
        f"../{desk.work.name}",
        f"./../{desk.work.name}/.",
        "../..",
        "",
        "notes.txt",
        "notes.txt/x",
        "pipe",
        "loop",
    ]
    never += [str(desk.work), str(desk.home), "/dev/null", "/dev/full", "/proc/self/fd/1", "/dev/null/x", "a" * 300]
    if desk.locked:
        never += ["/", "/etc", "/proc", "/dev", "/home", "//", "/..", str(desk.root.parents[1])]
    if rng.random() < 0.6:
        return rng.choice(never), REFUSED, ""
    named = [
        "réseau",
        "テスト",
        "a b",
        "[red]x",
        "a\x1b[31mb",
        "a\u202eb",
        "x\ny",
        "deep/er/still",
        "tail/",
        "=1",
        "🙂",
    ]
    name = rng.choice([*named, "foreign", "foreign", "link", "dangling", "foreign/thesis", "caf\udce9"])
    stem = name.split("/", maxsplit=1)[0]
    return name, TRIED, {"link": "near", "dangling": "work/nowhere"}.get(stem, f"work/{stem}")


def targets(rng: random.Random, desk: Desk) -> Case:
    """Every command that writes, over what is no place of its own."""
    for name in ("teacher", "images", "large", "digits", "plain", "place"):
        desk.take(name)
    desk.file("sweep.yaml", dumped(sweep_file()))
    ours = ["weights.safetensors", "teacher.json", "images.png", "report.html", "trials/x.parquet", "synthesis.json"]
    for name in rng.sample(ours, rng.choice([0, 0, 1, 3])):
        desk.file(f"foreign/{name}", "not what its name says")
    target, codes, writes = odd_target(rng, desk)
    narrow = ["resnet8", "--arguments", '{"width_multiplier": 0.25}', "--num-classes", "3", "--image-shape", "1x16x16"]
    normal = ["--mean", "0.5", "--std", "0.25"]
    words = rng.choice(
        [
            ["teacher", "init", *narrow, "--out", target],
            ["teacher", "import", "teacher/weights.safetensors", "--architecture", *narrow, *normal, "--out", target],
            ["teacher", "train", *narrow[:3], "--dataset", "images", "--epochs", "1", "--out", target],
            ["recover", "teacher", "--cache", "target-cache", *TINY, "--out", target],
            ["recover", "teacher", "--out", "target-cache/o", *TINY, "--cache", target],
            ["synthesize", "teacher", "--num-images", "4", "--cache", "target-cache", "--out", target],
            ["synthesize", "teacher", "--num-images", "4", "--out", "target-cache/o", "--cache", target],
            ["sweep", "sweep.yaml", "--test-data", "none", "--cache", "target-cache", "--results", target],
            ["sweep", "sweep.yaml", "--test-data", "none", "--results", "target-cache/r", "--cache", target],
            ["report", "place", "--out", target],
            ["report", target],
            ["results", "place", "--format", "csv", "--out", target],
            ["results", target],
            ["cache", rng.choice(["ls", "verify"]), "--cache", target],
            ["cache", "prune", "--older-than", "0", "--cache", target],
            ["teacher", "record", "plain", "--dataset", "large", "--out", target],
        ]
    )
    if words[0] in ("cache", "results", "sweep") or "--cache" in words[-2:] or words[:2] == ["report", target]:
        codes = TRIED  # nothing to read there, or a place beside what is there
    return Case(words, codes, writes=[*([writes] if writes else []), "work/target-cache"])
