"""Generators of tables, caches and leftovers of earlier runs."""

import io
import json
import os
import random
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
import yaml

from fuzz.bundle_files import OUT, WRITES, changed_header
from fuzz.damage import MARKS, NUMBERS, changed, damaged
from fuzz.fuzzing import ANY, TRIED, Case, Desk
from fuzz.templates import TINY, sweep_file
from fuzz.weight_files import Planted

TRIAL_IDS = [
    "/home/you",
    "../near",
    "../../near",
    "t-000000000000/../../foreign",
    "",
    ".",
    "..",
    "~",
    "t-",
    "t-" + "g" * 12,
]
TRIAL_IDS += [
    "t-00000000000",
    "T-000000000000",
    "t-000000000000\n",
    "t-000000000000/",
    "x" * 5000,
    *MARKS,
    "foreign",
    None,
]


def changed_table(rng: random.Random, rows: pa.Table, where: Path) -> pa.Table:
    """A table of ours with other values, types, columns or words about itself."""
    kind = rng.choice(
        ["id"] * 3 + ["value"] * 4 + ["null"] * 3 + ["type", "drop", "more", "rename", "meta", "empty", "double"]
    )
    name = rng.choice(rows.column_names)
    index = rows.schema.get_field_index(name)
    described = rows.schema.field(name)
    if kind == "id" and "trial_id" in rows.column_names:
        wrong = rng.choice([*TRIAL_IDS, str(where)])
        at = rows.schema.get_field_index("trial_id")
        return rows.set_column(at, rows.schema.field(at), pa.array([wrong] * len(rows), pa.string()))
    if kind == "null":
        for one in {name, *rng.sample(rows.column_names, rng.choice([0, 3, 20]) % len(rows.column_names))}:
            at = rows.schema.get_field_index(one)
            rows = rows.set_column(at, rows.schema.field(at), pa.nulls(len(rows), rows.schema.field(at).type))
        return rows
    if kind == "value":
        pools = {"string": [*MARKS, "x" * 50_000, "", "{}", "[1, 2", "s3://u:p@h/x"], "bool": [True, False]}
        pools |= {
            "int64": [-1, 0, 2**63 - 1, -(2**63)],
            "double": [float("nan"), float("inf"), -1.0, 1e308, 5e-324, 2.0],
        }
        values = [rng.choice(pools.get(str(described.type), [None])) for _ in range(len(rows))]
        return rows.set_column(index, described, pa.array(values, described.type))
    if kind == "type":
        others: list[Any] = [
            pa.array([[1]] * len(rows)),
            pa.array([b"\xff"] * len(rows)),
            pa.array([str(2**70)] * len(rows)),
        ]
        others += [pa.array([2**63] * len(rows), pa.uint64()), pa.array(["x"] * len(rows)).dictionary_encode()]
        chosen = rng.choice(others)
        return rows.set_column(index, pa.field(name, chosen.type), chosen)
    if kind == "drop":
        return rows.drop_columns([name])
    if kind == "more":
        return rows.append_column(
            rng.choice(["extra", "[/b]", "\x1b[31m", "", "x" * 2000]), pa.nulls(len(rows), pa.string())
        )
    if kind == "rename":
        return rows.rename_columns(
            [rng.choice([each, "y", "trial_id"]) if each == name else each for each in rows.column_names]
        )
    if kind == "meta":
        words = [
            b"dfkd_ray.trials/99",
            b"dfkd_ray.trials/0",
            b"dfkd_ray.trials/-1",
            b"other/1",
            b"\xff",
            b"dfkd_ray.trials/",
        ]
        words += [b"dfkd_ray.trials/" + b"9" * 5000, b"dfkd_ray.trials/1", "dfkd_ray.trials/²".encode(), b""]
        return rows.replace_schema_metadata(rng.choice([None, {b"dfkd_ray.schema": rng.choice(words)}]))
    return rows.slice(0, 0) if kind == "empty" else pa.concat_tables([rows, rows])


def tables(rng: random.Random, desk: Desk) -> Case:
    """A results place with parts that are damaged, foreign, or say what is not so."""
    desk.take("teacher")
    place = desk.take("place")
    table = rng.choice(["trials"] * 4 + ["epochs", "synthesis"])
    path = rng.choice(sorted((place / table).glob("*.parquet")))
    rows = pq.read_table(path)
    kind = rng.choice(
        ["rows"] * 12 + ["bytes"] * 4 + ["foreign", "csv", "folder", "loop", "pipe", "all", "none", "name"]
    )
    if kind == "rows":
        pq.write_table(changed_table(rng, rows, desk.root / "near"), path)
    elif kind == "bytes":
        path.write_bytes(damaged(rng, path.read_bytes()))
    elif kind == "foreign":
        pq.write_table(
            pa.table({"a": [1, 2], "trial_id": ["x", str(desk.root / "near")]}), place / table / "mine.parquet"
        )
    elif kind == "csv":
        (place / table / "mine.parquet").write_text("a,b\n1,2\n")
    elif kind == "folder":
        (place / table / "folder.parquet").mkdir()
    elif kind == "loop":
        (place / table / "loop.parquet").symlink_to("loop.parquet")
    elif kind == "pipe":
        os.mkfifo(place / table / "pipe.parquet")
    elif kind == "name":
        path.rename(path.with_name(f"{rng.choice(['[red]x', 'résumé', 'a b', '.x', 'merged-x'])}.parquet"))
    elif kind == "none":
        for each in (place / table).glob("*.parquet"):
            each.unlink()
    else:
        for each in sorted((place / table).glob("*.parquet")):
            pq.write_table(changed_table(rng, pq.read_table(each), desk.root / "near"), each)
    desk.file("sweep.yaml", yaml.safe_dump(sweep_file()))
    form = rng.choice(["table", "csv", "markdown", "latex", "json"])
    words = rng.choice(
        [
            ["results", "place", "--table", table, "--format", form],
            ["results", "place", "--table", table, "--format", form],
            ["results", "place", "--sort", "-agreement", "--where", "status=finished"],
            ["results", "place", "--mean-std", "--format", form],
            ["results", "place", "--table", table, "--out", f"target/rows.{rng.choice(['csv', 'md', 'tex', 'json'])}"],
            ["report", "place"],
            ["report", "place"],
            ["sweep", "sweep.yaml", "--results", "place", "--cache", "target-cache", "--test-data", "none"],
            [
                "sweep",
                "sweep.yaml",
                "--results",
                "place",
                "--cache",
                "target-cache",
                "--test-data",
                "none",
                "--dry-run",
            ],
        ]
    )
    writes = [*WRITES]
    if words[0] == "report":
        writes += ["work/place/report.html", "work/place/report"]
    if words[0] == "sweep":
        writes += ["work/place"]
    data = form in ("csv", "json") or words[0] == "report"
    return Case(words, ANY, writes=writes, encoding=rng.choice(["utf-8", "utf-8", "ascii"]), raw_out=data)


def caches(rng: random.Random, desk: Desk) -> Case:
    """A cache with damage, links and what is not of it."""
    desk.take("teacher")
    cache = desk.take("cache")
    folders = sorted(path for path in cache.iterdir() if path.is_dir())
    folder, other = rng.sample(folders, 2)
    shard, manifest = folder / "batch-000000.safetensors", folder / "manifest.json"
    kind = rng.choice(
        ["manifest"] * 4 + ["shard"] * 3 + ["header"] * 2 + ["swap", "link", "loop", "pipe", "folder", "foreign"]
    )
    if kind == "manifest":
        data = json.loads(manifest.read_text())
        documents = [
            json.dumps(changed(rng, data, 2)),
            json.dumps(data | {"teacher": rng.choice(MARKS)}),
            "[" * 100_000,
            "",
            "[]",
        ]
        documents += [json.dumps(data | {"key": rng.choice(["", "../..", "x" * 64, "g" * 64])}), "9" * 5000]
        manifest.write_text(rng.choice(documents), "utf-8", "surrogatepass")
    elif kind in ("shard", "header"):
        data = shard.read_bytes()
        shard.write_bytes(damaged(rng, data) if kind == "shard" else changed_header(rng, data))
    elif kind == "swap":
        shard.write_bytes((other / shard.name).read_bytes())
        shard.with_name(f"batch-{rng.choice(['000001', '999999', '9' * 30])}.safetensors").write_bytes(
            shard.read_bytes()
        )
    elif kind == "link":
        for path in sorted(folder.iterdir()):
            path.unlink()
        folder.rmdir()
        folder.symlink_to(rng.choice(["../foreign", "../../near", other.name, folder.name]))
    elif kind == "loop":
        shard.unlink()
        shard.symlink_to(rng.choice([shard.name, "../../notes.txt", "/dev/zero"]))
    elif kind == "pipe":
        shard.unlink()
        os.mkfifo(shard)
    elif kind == "folder":
        manifest.unlink()
        manifest.mkdir()
    else:
        (cache / ("0" * 32 + "-" + "0" * 8)).symlink_to("../foreign")
        (cache / "thesis").mkdir()
        (cache / "thesis" / "letter.txt").write_text("years of work")
        (folder / "letter.txt").write_text("years of work")
    words = rng.choice(
        [
            ["cache", "ls", "--cache", "cache"],
            ["cache", "verify", "--cache", "cache"],
            ["cache", "verify", "--cache", "cache", "--remove"],
            ["cache", "prune", "--cache", "cache", "--older-than", "0"],
            ["cache", "prune", "--cache", "cache", "--max-size", "0"],
            ["cache", "prune", "--cache", "cache", "--key", folder.name[:8]],
            ["recover", "teacher", "--out", "target", "--cache", "cache", *TINY],
            ["recover", "teacher", "--out", "target", "--cache", "cache", *TINY],
        ]
    )
    # Damage may be found (1); what is removed are folders and files of the cache's own names.
    return Case(words, TRIED, writes=["work/target", *(f"work/cache/{each.name}" for each in folders)])


def leftovers(rng: random.Random, desk: Desk) -> Case:
    """A target in which an earlier run of the command has left something that does not fit."""
    desk.take("teacher")
    desk.take("images")
    what = rng.choice(["recover", "recover", "train", "synthesize", "student"])
    buffer = io.BytesIO()
    contents: list[Any] = [
        {},
        [],
        3,
        {"step": 1},
        {"epoch": 10**9},
        {"state": {}},
        Planted(),
        {"network": {"a": torch.zeros(1)}},
    ]
    torch.save(rng.choice(contents), buffer)
    junk = rng.choice(
        [buffer.getvalue(), b"", rng.randbytes(100), b"{}", b"[" * 50_000, damaged(rng, buffer.getvalue())]
    )
    if what == "train":
        names = ["last.pt", "checkpoint.pt", "epoch-000001.pt", "state.pt"]
        for name in names:
            desk.file(f".target-training/{name}", junk)
        words = ["teacher", "train", "resnet8", "--dataset", "images", "--epochs", "1", "--set", "batch_size=4"]
        words += ["--arguments", '{"width_multiplier": 0.25}', "--out", "target"]
        return Case(words, ANY, writes=["work/target", "work/.target-training"])
    if what == "synthesize":
        record: Any = {"schema": "dfkd_ray.images/1", "key": "0" * 64, "format": "folder", "num_images": 4}
        content = json.dumps(
            rng.choice([changed(rng, record, 2), record, record | {"num_images": rng.choice(NUMBERS[:6])}])
        )
        content = rng.choice([content, content, "", "[" * 50_000, "9" * 5000, "null"])
        desk.file(f"target/{rng.choice(['synthesis.json', '.synthesis.json'])}", content)
        desk.file(f"target/{rng.choice(['train/0/a.png', 'part-000000.parquet', 'unlabelled/x.png'])}", junk)
        words = ["synthesize", "teacher", *OUT, "--num-images", "4", "--device", "cpu", "--set", "batch_size=4"]
        return Case(
            [*words, "--format", rng.choice(["folder", "parquet"])], ANY, writes=["work/target-cache", "work/target"]
        )
    desk.take("recovered", "target")
    if what == "student":
        path = desk.work / "target" / rng.choice(["student/teacher.json", "row.json", "student/weights.safetensors"])
        path.write_bytes(damaged(rng, path.read_bytes()))
    else:
        for name in (f"checkpoints/{'0' * 64}.pt", "checkpoints/step-000001.pt", "checkpoints/last.pt"):
            desk.file(f"target/{name}", junk)
    words = ["recover", "teacher", *OUT, *TINY, "--sparsity", rng.choice(["0.5", "0.75"])]
    return Case(words, ANY, writes=WRITES)
