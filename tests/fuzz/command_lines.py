"""Generators of command lines: values after `--set`, words that are out of range, places that open nothing."""

import json
import random
import re

from fuzz.damage import HUGE, MARKS, NAMES, NUMBERS, PLACES, anything, scalar, text
from fuzz.fuzzing import ANY, TRIED, Case, Desk
from fuzz.sweep_files import dumped
from fuzz.templates import EDGES, SETTINGS, TINY, sweep_file

NARROW = ["--set", "batch_size=4", "--arguments", '{"width_multiplier": 0.25}']
FIELDS = ["pruning.sparsity", "pruning.criterion", "pruning.schedule", "student.architecture", "student.arguments"]
FIELDS += ["distillation.temperature", "distillation.batch_size", "distillation.bn_mode", "bn_num_images", "teacher"]
FIELDS += ["synthesis", "synthesis.method", "synthesis.seed", "synthesis.storage", "synthesis.precision", "reference"]
FIELDS += ["synthesis.bn_weight", "distillation.seed", "distillation.num_steps", "device", "synthesis.num_steps"]


def assignment(rng: random.Random) -> str:
    """A word after `--set`."""
    name = rng.choice([*FIELDS, *FIELDS, *SETTINGS, "nothing", "a.b.c", "synthesis..seed", ".", ""])
    value = scalar(rng)
    values = [json.dumps(anything(rng))[:200_000], text(rng), "", "[1", "{a: b", "&a [*a]", "[" * 3000, "!!python/x y"]
    values += ["{a: 1, a: 2}", "1:30", "true", "2001-01-01", "null", "9" * 30, "9" * 5000, "1e400", "-0", ".nan"]
    if rng.random() < 0.3:
        name = rng.choice(sorted(EDGES))
        return f"{name}={rng.choice(EDGES[name])}"
    name = rng.choice([name] * 8 + [text(rng)[:400]])
    return rng.choice([f"{name}={rng.choice(values)}"] * 8 + [f"{name}", f"{name}=={value}"])


def set_words(rng: random.Random, desk: Desk) -> Case:
    """A good command with one or two words after `--set`."""
    desk.take("teacher")
    desk.file("sweep.yaml", dumped(sweep_file()))
    sets = [word for _ in range(rng.choice([1, 1, 2])) for word in ("--set", assignment(rng))]
    commands = [
        ["sweep", "sweep.yaml", "--results", "target", "--cache", "target-cache", "--test-data", "none"],
        ["recover", "teacher", "--out", "target", "--cache", "target-cache", *TINY],
        ["synthesize", "teacher", "--out", "target", "--cache", "target-cache", "--num-images", "4", "--device", "cpu"],
        ["teacher", "train", "resnet8", "--dataset", "nothing", "--out", "target"],
    ]
    words = rng.choice(commands)
    return Case([*words, *sets], TRIED, writes=["work/target", "work/target-cache"])


ARCHITECTURES = ["resnet8", "resnet20", "wrn_16_1", "wrn_9999999_9", "wrn_16_100000", "wrn_-4_1", "wrn__", "lenet5"]
ARCHITECTURES += ["os:system", "os.path:join", "nothing:make", ":", "a:", ":b", "json:loads", "builtins:exit", "a:b:c"]
ARCHITECTURES += ["hinton_1200", "resnet18", "mobilenet_v2", "resnet"]
SHAPES = ["1x16x16", "3x32x32", "1x1x1", "0x1x1", "3x99999999x99999999", "1x16", "x", "²x16x16", "1x16x16x1", "-1x2x3"]
SHAPES += ["٣x16x16", "9" * 5000 + "x1x1", "1X16X16"]
ARGUMENTS = ["{}", '{"width_multiplier": 0.25}', '{"width_multiplier": 999}', '{"width_multiplier": -1}', "[]", "3", ""]
ARGUMENTS += [
    '{"width_multiplier": NaN}',
    '{"width_multiplier": "x"}',
    "{" * 5000,
    "[" * 50_000,
    '{"a": ' * 5000,
    "{a}",
]
ARGUMENTS += ['{"stem": "cifar"}', '{"stem": 3}', '{"num_classes": 3}', '{"width_multiplier": 1e308}', '{"\\u001b": 1}']
ARGUMENTS += ['{"self": 1}', '{"width_multiplier": true}', '{"width_multiplier": [1]}', '{"": {}}']
SECRET = "hunter2-of-nobody"
PLACES_WITH_SECRETS = [
    f"s3://key:{SECRET}@bucket/x?endpoint_override=127.0.0.1:9&scheme=http&region=us-east-1",
    f"ftp://user:{SECRET}@127.0.0.1:9/x",
    f"http://127.0.0.1:9/x?token={SECRET}",
    f"s3://bucket/x?secret_key={SECRET}&nothing=1",
    f"fsspec+sftp://user:{SECRET}@127.0.0.1:9/x",
    f"abc://user:{SECRET} @127.0.0.1/x",
    f"gs://127.0.0.1:9/x?access_token={SECRET}",
    f"file://user:{SECRET}@127.0.0.1/x",
    f"s3://key:{SECRET}@@bucket",
    f"https://user:{SECRET}@[::1",
    f"s3://bucket/x?endpoint_override=http://u:{SECRET}@127.0.0.1:9",
    f"ftp://127.0.0.1:9/x?signature={SECRET}",
]


# A word in angle brackets stands for one of what it names: values of a pool below, or a word as it is.
COMMANDS = """
teacher init <architecture> --image-shape <shape> --arguments <arguments> --num-classes <3|number> --out target
teacher init <architecture|word> --image-shape 1x16x16 --seed <number> --arguments <arguments|word> --out target
teacher import teacher/weights.safetensors --architecture <resnet8|architecture> --arguments <arguments> \
    --num-classes <3|number> --image-shape <1x16x16|shape> --mean <0.5|floats> --std <0.25|floats> --out target
teacher import teacher/weights.safetensors --architecture resnet8 --arguments {"width_multiplier":0.25} \
    --num-classes 3 --image-shape 1x16x16 --mean 0.5 --std 0.25 --pixel-range <0,1|floats> --class-names <names> \
    --out target
teacher train <architecture> --dataset <images|digits|place> --epochs <number> --seed <0|number> \
    --validation <0|5|number> --arguments <arguments> --out target --set num_epochs=1
teacher train resnet8 --dataset <dataset> --data-root <digits|place> --epochs 1 --set image_size=<number> --out target
teacher record <plain|teacher|place> --dataset <large|place> --kinds <top|top,all|magic|word> --share <0.1|number> \
    --rank <2|number> --temperature <8|number> --limit <3|number> --threads <1|number> --seed <0|number> \
    --max-size <1|number>
teacher record plain --dataset large --storage <exemplars|word> --allow-exemplars --kinds spectral \
    --num-exemplars <number> --threads 1
teacher info <place|word>
recover <teacher|place> --out target --cache <target-cache|place> TINY --sparsity <number> --seed <0|number> \
    --method <deepinversion|noise|records|real|word>
recover teacher --out target --cache target-cache TINY --test-data <images|mnist|validation|auto|place> \
    --data-root <digits|place> --trust-code <word>
recover teacher --out target --cache target-cache TINY --method real --real-data <images|mnist|place>
synthesize <teacher|place> --out target --cache target-cache --num-images <4|number> --format <folder|parquet|word> \
    --seed <0|number> --device <cpu|word> --synthesizers <auto|range|word> --batch-timeout <10|number>
synthesize teacher --out target --cache target-cache --gpus-per-synthesizer <number> --num-images 4
sweep sweep.yaml --results target --cache target-cache --test-data <none|place> --synthesizers <range|word> \
    --batch-timeout <10|number> --gpus-per-trial <0.5|number> --teachers <.|place>
sweep sweep.yaml --dry-run --gpus <number> --results target --cache target-cache --test-data none \
    --timings <target/f.json|notes.txt|sweep.yaml|foreign>
results place --table <trials|epochs|synthesis|word> --format <table|csv|markdown|latex|json|word> --limit <2|number>
results place --where <condition> --sort <-agreement|word|->
results place --where <condition> --where sparsity>=<word>
results <place|word> --columns <trial_id,trial_id|sparsity|word> --mean-std
report <place|word> --out <target/x.html|target>
cache ls --cache <place|word>
cache verify --cache <place|word>
cache prune --cache <cache|place> --older-than <number|1e300> --dry-run
cache prune --cache cache --max-size <1GB|1XB|²GB|word|number> --dry-run
cache prune --cache cache --key <word> --dry-run
schema <word>
<word>
teacher
cache <word>
sweep
--debug results
results --help
bench <word>
bench results --rows <number> --writers 0
"""


def pools(rng: random.Random) -> dict[str, list[str]]:
    """What a name in a command stands for."""
    numbers = ["9" * 5000 if number is HUGE else str(number) for number in NUMBERS]
    word = text(rng)
    return {
        "architecture": ARCHITECTURES,
        "shape": SHAPES,
        "arguments": ARGUMENTS,
        "number": numbers,
        "word": [word],
        "place": [*PLACES, word, "place", "teacher", "cache", "notes.txt", "foreign"],
        "floats": ["nan", "inf", "", "a,b", "1e400", "0", "-1", "1e-320", "1,0", "0,1,2", "-1e308,1e308", word],
        "names": ["a,b,c", "a", ",,", f"a,b,{rng.choice(MARKS)}", word],
        "dataset": ["mnist", "cifar10", "svhn", "celeba", "images", "fashion_mnist"],
        "range": ["auto", "0", "1-2", "2-1", "²", "-1", "1.5", "9" * 5000],
        "condition": [word, f"{word}=1", "sparsity", "status=null", "=", ">", "agreement<nan", f"teacher={word}"],
    }


def filled(rng: random.Random, command: str) -> list[str]:
    """A command as words, with values in it."""
    values = pools(rng)

    def value(match: re.Match[str]) -> str:
        name = rng.choice(match[1].split("|"))
        return rng.choice(values[name]) if name in values else name

    words = [re.sub(r"<([^>]+)>", value, word) for word in command.split()]
    return [word for each in words for word in (TINY if each == "TINY" else [each])]


def command_words(rng: random.Random, desk: Desk) -> Case:
    """A command line whose words are out of range, of another kind, or for another place."""
    for name in ("teacher", "plain", "images", "large", "digits", "place", "cache"):
        desk.take(name)
    desk.file("sweep.yaml", dumped(sweep_file()))
    command = rng.choice(COMMANDS.strip().replace("\\\n", " ").split("\n"))
    words = [word.replace("\0", "") for word in filled(rng, command)]
    writes = ["work/target", "work/target-cache", "work/.target-training"]
    if words[:2] == ["teacher", "record"]:
        writes.append("work/plain/records")
        writes.append("work/teacher/records")
    if words[:1] == ["report"]:
        writes += ["work/place/report.html", "work/place/report"]
    return Case(words, TRIED, writes=writes, encoding=rng.choice(["utf-8", "utf-8", "ascii"]), raw_out="csv" in words)


def secret_places(rng: random.Random, desk: Desk) -> Case:
    """URIs that open nothing, with a password in each."""
    for name in ("teacher", "images"):
        desk.take(name)
    desk.file("sweep.yaml", dumped(sweep_file()))
    uri = rng.choice(PLACES_WITH_SECRETS)
    init = ["teacher", "init", "resnet8", "--image-shape", "1x16x16"]
    words = rng.choice(
        [
            ["teacher", "info", uri],
            [*init, "--out", uri],
            ["teacher", "record", uri, "--dataset", "images"],
            ["teacher", "train", "resnet8", "--dataset", uri, "--out", "target"],
            ["recover", uri, "--out", "target", *TINY],
            ["recover", "teacher", "--out", uri, *TINY],
            ["recover", "teacher", "--out", "target", "--cache", uri, *TINY],
            ["recover", "teacher", "--out", "target", "--cache", "target-cache", *TINY, "--test-data", uri],
            ["sweep", "sweep.yaml", "--results", uri, "--test-data", "none"],
            ["sweep", "sweep.yaml", "--results", "target", "--cache", uri, "--test-data", "none"],
            ["sweep", "sweep.yaml", "--results", "target", "--set", f"teacher={uri}", "--test-data", "none"],
            ["sweep", "sweep.yaml", "--teachers", uri, "--test-data", "none", "--results", "target"],
            ["sweep", uri, "--results", "target"],
            ["synthesize", "teacher", "--out", "target", "--cache", uri],
            ["results", uri],
            ["report", uri],
            ["cache", "ls", "--cache", uri],
            ["cache", "verify", "--cache", uri],
            ["cache", "prune", "--cache", uri, "--older-than", "0"],
            ["results", "place", "--out", uri],
        ]
    )
    return Case(words, frozenset({2, 3, 77}), writes=["work/target", "work/target-cache"], secret=SECRET)


def trials(rng: random.Random, desk: Desk) -> Case:
    """One trial with values at the edges of what a config takes."""
    desk.take("teacher")
    desk.take("plain")
    names = rng.sample(sorted(EDGES), rng.choice([1, 1, 2, 3]))
    values: dict[str, object] = {**SETTINGS, **{name: rng.choice(EDGES[name]) for name in names}}
    if (bundle := rng.choice(["teacher", "teacher", "teacher", "plain"])) == "plain":
        kind = rng.choice(["top", "all", "spectral", "spectral_pairs"])
        for part in ("synthesis", "reference.synthesis"):
            values |= {f"{part}.method": "records", f"{part}.record": kind}
    sets = [word for name, value in values.items() for word in ("--set", f"{name}={value}")]
    words = ["recover", bundle, "--out", "target", "--cache", "target-cache", "--test-data", "none", "--device", "cpu"]
    return Case([*words, *sets], TRIED, writes=["work/target", "work/target-cache"])


def odd_names(rng: random.Random, desk: Desk) -> Case:
    """Good folders with names that a terminal, a table or a page would act on."""
    name = rng.choice([each for each in (*MARKS, *NAMES) if "/" not in each and len(each.encode()) < 200])
    bundle, place, cache = f"t{name}", f"r{name}", f"c{name}"
    for kind, to in (("teacher", bundle), ("place", place), ("cache", cache), ("images", f"i{name}")):
        desk.take(kind, to)
    info = json.loads((desk.work / bundle / "teacher.json").read_text())
    info |= {"class_names": [f"{name}{index}" for index in range(3)], "dataset": rng.choice([None, name])}
    (desk.work / bundle / "teacher.json").write_text(json.dumps(info))
    desk.file(f"s{name}.yaml", dumped(sweep_file(bundle)))
    commands = [
        ["teacher", "info", bundle],
        ["recover", bundle, "--out", "target", "--cache", cache, *TINY],
        ["recover", bundle, "--out", "target", "--cache", cache, *TINY, "--test-data", f"i{name}"],
        ["synthesize", bundle, "--out", "target", "--cache", cache, "--num-images", "4", "--device", "cpu"],
        ["sweep", f"s{name}.yaml", "--results", place, "--cache", cache, "--test-data", "none"],
        ["sweep", f"s{name}.yaml", "--results", place, "--cache", cache, "--test-data", "none", "--dry-run"],
        ["teacher", "train", "resnet8", "--dataset", f"i{name}", "--epochs", "1", *NARROW, "--out", "target"],
        ["results", place, "--format", rng.choice(["table", "markdown", "latex"])],
        ["report", place],
        ["cache", rng.choice(["ls", "verify"]), "--cache", cache],
        ["cache", "prune", "--cache", cache, "--older-than", "0"],
    ]
    writes = ["work/target", f"work/{place}", f"work/{cache}", "work/.target-training"]
    return Case(rng.choice(commands), ANY, writes=writes, encoding=rng.choice(["utf-8", "ascii"]))
