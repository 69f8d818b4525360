"""What is read of the user's: YAML, JSON and `--set` within bounds, and numbers that tables and seeds can hold."""

import json
import os
import sys
import time
from typing import Any

import pytest
import yaml

from dfkd_ray import config, sweep
from dfkd_ray.batches import mix_seed
from dfkd_ray.cli import inputs
from dfkd_ray.sweep import search

MODELS = [*(row.config for row in config.METHODS.values())]
MODELS += [config.PruningConfig, config.DistillationConfig, config.ReferenceConfig, config.TrialConfig]
MODELS += [config.TeacherTrainingConfig, sweep.SweepConfig, sweep.SearchConfig, search.AshaConfig]
NEEDED = {
    config.TrialConfig: {"teacher": "t"},
    config.TeacherTrainingConfig: {"architecture": "resnet8", "dataset": "mnist"},
    sweep.SweepConfig: {"base": {"teacher": "t"}, "grid": {"pruning.sparsity": [0.5]}},
    sweep.SearchConfig: {"space": {"pruning.sparsity": [0.5]}, "num_trials": 1},
}
INTEGERS = (int, int | None)
NUMBERS = [
    (model, name, field.annotation in INTEGERS)
    for model in MODELS
    for name, field in model.model_fields.items()
    if field.annotation in (*INTEGERS, float) or name in ("max_concurrent", "image_size")
]
# What no number of a config is; of these, what no floating-point one is.
NO_NUMBER = [True, False, "3", "x", "1e-3", [], {}, [1], float("nan"), float("inf"), -float("inf"), 10**400, 10**5000]
NO_INTEGER = [2**63, 10**20, 1e30, 1.5, -1]
SECTIONS = {
    config.DeepInversionConfig: "synthesis",
    config.PruningConfig: "pruning",
    config.DistillationConfig: "distillation",
    config.ReferenceConfig: "reference",
    config.TrialConfig: "",
}


def refused(call, *arguments) -> str:
    """The lines of what a call refuses; each is short, and nothing but a `ValueError` comes."""
    with pytest.raises(ValueError) as caught:
        call(*arguments)
    lines = str(caught.value).splitlines()
    assert lines and all(0 < len(line) <= 300 for line in lines) and len(lines) <= 21, lines
    return str(caught.value)


def read(tmp_path, text: str | bytes):
    path = tmp_path / "a.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return config.read_yaml(path)


# ---- numbers -------------------------------------------------------------------------------------------------------


def test_the_walk_over_numbers_finds_those_of_every_model():
    assert len(NUMBERS) > 60 and {model for model, _, _ in NUMBERS} == set(MODELS)


@pytest.mark.parametrize(
    ("model", "name", "is_integer"), NUMBERS, ids=lambda part: getattr(part, "__name__", str(part))
)
def test_no_number_field_takes_what_no_table_or_seed_can_hold(model, name, is_integer):
    seed = name == "seed"
    for value in [*NO_NUMBER, None, *(NO_INTEGER if is_integer else [1e39])]:
        if value is None and not model.model_fields[name].is_required() and model.model_fields[name].default is None:
            continue
        text = refused(config.validate, model, {**NEEDED.get(model, {}), name: value})
        assert name in text and text.count("\n") == 0, text
    if seed:
        kept: Any = config.validate(model, {**NEEDED.get(model, {}), name: 2**63 - 1})
        assert mix_seed(kept.seed, kept.seed) < 2**63


def test_no_number_of_a_sweep_file_is_beyond_its_bounds_wherever_it_stands():
    for model, prefix in SECTIONS.items():
        for name in [name for kind, name, is_integer in NUMBERS if kind is model and is_integer]:
            field = f"{prefix}.{name}".lstrip(".")
            for value in (True, "3", float("nan"), 2**63, 10**400):
                good = {"pruning.sparsity": [0.5]}
                base = config.with_overrides({"teacher": "t"}, {field: value})
                for file in (
                    {"base": base, "grid": good},
                    {"base": {"teacher": "t"}, "grid": {field: [value]}},
                    {"base": {"teacher": "t"}, "grid": good, "tiny": {field: value}},
                ):
                    assert name in refused(lambda file: sweep.expand(sweep.parse(file), {}), file)


@pytest.mark.parametrize("value", ["a\0b", "\ud800", "x" * 5000, ""])
def test_text_that_no_table_or_path_can_hold_is_refused(value):
    refused(config.validate, config.TrialConfig, {"teacher": value})
    refused(config.validate, config.TrialConfig, {"teacher": "t", "student": {"architecture": value}})
    if value:
        arguments = {"architecture": "a", "arguments": {"b": [value]}}
        refused(config.validate, config.TrialConfig, {"teacher": "t", "student": arguments})


def test_arguments_of_an_architecture_are_plain_data():
    loop: list = []
    loop.append(loop)
    for value in (float("nan"), 10**400, {1: 2}, loop, object(), b"x", {"a": {(1, 2): 3}}, list(range(2000))):
        arguments = {"architecture": "a", "arguments": {"b": value}}
        refused(config.validate, config.TrialConfig, {"teacher": "t", "student": arguments})


# ---- YAML ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "line", "says"),
    [
        ("a: 1\nb: 2\na: 3\n", 3, "'a' is given twice, first on line 1"),
        ("base:\n  seed: 1\n  seed: 1\n", 3, "first on line 2"),
        ("a: {b: 1, b: 2}\n", 1, "twice"),
        ("a: &a [*a]\n", 1, "stands within itself"),
        ("a: &a {b: {c: *a}}\n", 1, "stands within itself"),
        ("a: *b\n", 1, "&b"),
        ("a: " + "[" * 5000, 1, ""),
        ("a: " + "{b: " * 50 + "}" * 50, 1, "nested deeper than"),
        ("\n".join("  " * i + "a:" for i in range(500)), None, ""),
        ("a: 1\nb: 010\n", 2, "octal"),
        ("a: 1\n5: 3\n", 2, "'5' is no name"),
        ("on: 3\n", 1, "'on' is no name"),
        ("? [a]\n: 1\n", 1, "is no name"),
        ("a: !!python/name:os.system 1\n", 1, "the tag"),
        ("a: !!binary aGk=\n", 1, "the tag"),
        ("a: !!set {b: null}\n", 1, "the tag"),
        ("a: !!timestamp 2001-01-01\n", 1, "the tag"),
        ("a: 1\n---\nb: 2\n", 2, "second document"),
        ("a: " + "1" * 5000 + "\n", 1, "5,000 digits"),
        ("a: [1\n", 2, ""),
    ],
)
def test_yaml_that_means_two_things_or_has_no_end_is_refused_with_its_line(tmp_path, text, line, says):
    told = refused(read, tmp_path, text)
    assert told.count("\n") == 0 and says in told and "a.yaml: not valid YAML: " in told
    if line is not None:
        assert f"not valid YAML: line {line}: " in told
    told = refused(config.parse_overrides, [f"x={text}"])
    assert told.startswith("`set` 'x=")


@pytest.mark.parametrize(
    "slot", ["base: {x: %s}", "tiny: %s", "exclude: [%s]", "base: {student: {arguments: {a: %s}}}"]
)
@pytest.mark.parametrize("leaf", ["1", "x" * 4000])
def test_aliases_that_stand_for_too_much_are_refused_before_they_are_written_out(tmp_path, slot, leaf):
    lines = [f"about: [&a0 [{leaf}]]", "about2:"]
    lines += [f"  - &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 11)]
    start = time.process_time()
    assert "aliases" in refused(read, tmp_path, "\n".join([*lines, slot.replace("%s", "*a10")]))
    assert time.process_time() - start < 250  # a hang


def test_aliases_and_merges_of_sane_size_are_read(tmp_path):
    text = "a: &a {x: 1, y: 2}\nb: {<<: *a, y: 3}\nc: *a\nd: {<<: [{z: 1}, *a]}\n"
    assert read(tmp_path, text) == yaml.safe_load(text)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1:30", "1:30"),
        ("2001-01-01", "2001-01-01"),
        ("1e-3", 1e-3),
        ("1e3", 1000.0),
        ("-.5", -0.5),
        ("0x10", 16),
        ("1_000", 1000),
        ("0", 0),
        ("0.5", 0.5),
        ("yes", True),
        ("'010'", "010"),
        ("'3'", "3"),
        ("!!str 3", "3"),
        ("~", None),
        ("=", "="),
    ],
)
def test_scalars_are_what_a_reader_takes_them_for(tmp_path, text, value):
    found = read(tmp_path, f"a: {text}\n")["a"]
    assert found == value and type(found) is type(value)
    assert config.parse_overrides([f"a={text}"]) == {"a": value}


@pytest.mark.parametrize("field", ["synthesis.num_steps", "distillation.temperature"])
def test_a_time_of_day_is_no_number(field):
    told = refused(config.validate, config.TrialConfig, config.with_overrides({"teacher": "t"}, {field: "1:30"}))
    assert "1:30" in told
    data = config.with_overrides({"teacher": "t"}, config.parse_overrides([f"{field}=1:30"]))
    refused(config.validate, config.TrialConfig, data)


def test_what_is_no_file_of_sane_size_is_refused_and_not_read(tmp_path):
    folder, pipe, large, loop = tmp_path / "folder", tmp_path / "pipe", tmp_path / "large", tmp_path / "loop"
    folder.mkdir()
    os.mkfifo(pipe)
    with large.open("wb") as file:
        file.truncate(1 << 40)
    loop.symlink_to(loop)
    names = [
        folder,
        pipe,
        large,
        loop,
        "/dev/zero",
        tmp_path / "no",
        "x" * 1000,
        "x" * 100_000,
        "a\0b",
        folder / "x" / "y",
    ]
    for name in names:
        assert refused(config.read_yaml, type(tmp_path)(name)).count("\n") == 0


@pytest.mark.parametrize("content", [b"\xff\xfea\x00", b"a: \x00\n", b"a: \x1b[0m\n", b'"\\ud800": 1\n', b"\xc3"])
def test_bytes_that_are_no_text_are_refused_in_one_printable_line(tmp_path, content):
    assert refused(read, tmp_path, content).isprintable()


# ---- JSON and words ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        '{"a": 1, "a": 2}',
        '{"a": NaN}',
        '{"a": Infinity}',
        '{"a": 1e999}',
        '{"a": ' + "9" * 400 + "}",
        '{"a": ' + "9" * 5000 + "}",
        '{"a": "\\ud800"}',
        '{"a": "\\u0000"}',
        '{"a": ' + "[" * 100_000 + "]" * 100_000 + "}",
        '{"a": ' + "[" * 40 + "]" * 40 + "}",
        '{"a": "' + "x" * 2_000_000 + '"}',
        "[1]",
        "{",
        "",
    ],
    ids=range(14),
)
def test_json_of_the_command_line_that_is_not_plain_is_refused_in_one_line(text):
    assert refused(inputs.parse_json, text, "--arguments").count("\n") == 0


@pytest.mark.parametrize(
    ("assignment", "says"),
    [
        ("a..b=1", "is empty"),
        (".a=1", "is empty"),
        ("a.=1", "is empty"),
        ("a. .b=1", "is empty"),
        ("=1", "expected FIELD=VALUE"),
        ("a", "expected FIELD=VALUE"),
        ("a=", "a=null"),
        ("a=  ", "a=null"),
        ("a=#b", "quote"),
        ("a" * 2000 + "=1", "too long"),
        (".".join("a" * 1000) + "=1", "is too long"),
        ("a=" + "9" * 100_000, "digits"),
        ("a=" + "x" * 2_000_000, "more than"),
    ],
    ids=range(13),
)
def test_a_set_that_is_no_assignment_is_one_clear_line(assignment, says):
    told = refused(config.parse_overrides, [assignment])
    assert says in told and told.startswith("`set` ") and told.count("\n") == 0


@pytest.mark.parametrize("call", [lambda: inputs.parse_shape("²x2x2"), lambda: inputs.parse_floats("nan,1", "--mean")])
def test_words_that_only_look_like_numbers_are_refused(call):
    assert "expected" in refused(call)


@pytest.mark.parametrize(
    "value", [10**5000, ["x" * 10**6], {"a": ["x" * 10**6] * 50}, {i: i for i in range(10**5)}], ids=range(4)
)
def test_an_error_shows_no_more_of_a_value_than_fits(value):
    told = refused(config.validate, config.TrialConfig, {"teacher": "t", "device": value, "bn_num_images": value})
    assert "device" in told and sys.getsizeof(told) < 1000


def test_many_errors_are_twenty_lines_and_a_count():
    told = refused(config.validate, config.TrialConfig, {"teacher": "t", **{f"x{i}": 1 for i in range(100_000)}})
    assert told.splitlines()[-1] == "and 99,980 errors more"


@pytest.mark.parametrize("method", [["x"], None, {"a": 1}, 3, "magic", "x" * 10**5], ids=range(6))
def test_a_method_that_is_none_is_refused_wherever_a_config_is_read(method):
    refused(config.parse_synthesis, {"method": method})
    refused(config.validate, config.TrialConfig, {"teacher": "t", "synthesis": {"method": method}})
    refused(config.validate, config.TrialConfig, {"teacher": "t", "reference": {"synthesis": {"method": method}}})


def test_a_config_written_by_a_sweep_is_read_back_equal(tmp_path):
    settings = config.validate(config.TrialConfig, {"teacher": "007", "distillation": {"learning_rate": 1e-7}})
    data = read(tmp_path, yaml.safe_dump(json.loads(settings.model_dump_json())))
    assert config.validate(config.TrialConfig, data) == settings
