import hashlib
import json
import subprocess
import sys

import pytest
from pydantic import ValidationError

from dfkd_ray.config import (
    DeepInversionConfig,
    DistillationConfig,
    NoiseConfig,
    PruningConfig,
    RealConfig,
    TeacherTrainingConfig,
    TrialConfig,
    config_hash,
    field_paths,
    flat,
    parse_overrides,
    read_yaml,
    stable_hash,
    synthesis_key,
    validate,
    with_overrides,
)

# Another value than the default for every field of DeepInversion: each of them changes pixels.
OTHER_SYNTHESIS = {
    "seed": 12,
    "batch_size": 123,
    "num_steps": 123,
    "parametrisation": "pixel",
    "learning_rate": 0.123,
    "schedule": "constant",
    "label_loss": "entropy",
    "label_weight": 0.123,
    "bn_weight": 1.23,
    "bn_first_multiplier": 1.23,
    "tv_weight": 0.123,
    "l2_weight": 0.123,
    "jitter": 12,
    "flip": False,
    "precision": "float32",
    "channels_last": False,
    "compile": True,
    "fast": True,
    "plateau_patience": 12,
    "storage": "float16",
    "num_threads": 12,
}


def trial(**fields):
    return validate(TrialConfig, {"teacher": "t", **fields})


def errors_of(data, model=TrialConfig):
    with pytest.raises(ValueError) as caught:
        validate(model, data)
    return str(caught.value).splitlines()


def test_all_errors_come_at_once_each_with_its_path():
    lines = errors_of(
        {
            "pruning": {"sparsity": 1.5, "criterion": "biggest"},
            "synthesis": {"num_steps": "many"},
            "distillation": {"temprature": 3},
            "reference": {"synthesis": {"jitter": -1}},
        }
    )
    paths = ["pruning.criterion", "pruning.sparsity", "synthesis.num_steps", "distillation.temprature"]
    paths += ["reference.synthesis.jitter", "teacher"]
    assert sorted(line.split(": ")[1] for line in lines) == sorted(paths)


@pytest.mark.parametrize(
    ("data", "given", "meant"),
    [
        ({"distillation": {"temprature": 3}}, "distillation.temprature", "distillation.temperature"),
        ({"prunning": {}}, "prunning", "pruning"),
        ({"sparsity": 0.5}, "sparsity", "pruning.sparsity"),
        ({"synthesis": {"num_step": 3}}, "synthesis.num_step", "synthesis.num_steps"),
        ({"synthesis": {"method": "noise", "batchsize": 3}}, "synthesis.batchsize", "synthesis.batch_size"),
        (
            {"reference": {"synthesis": {"tvweight": 1}}},
            "reference.synthesis.tvweight",
            "reference.synthesis.tv_weight",
        ),
    ],
)
def test_a_misspelt_field_is_refused_with_the_name_that_was_meant(data, given, meant):
    assert errors_of({"teacher": "t", **data}) == [f"config: {given}: unknown field; did you mean {meant}?"]


def test_a_field_like_no_other_is_refused_without_a_guess():
    assert errors_of({"teacher": "t", "zzzzzz": 1}) == ["config: zzzzzz: unknown field"]


def test_a_hint_never_repeats_the_refused_name():
    (line,) = errors_of({"teacher": "t", "synthesis": {"method": "noise", "num_steps": 3}})
    assert line.startswith("config: synthesis.num_steps: ")
    assert "did you mean synthesis.num_steps?" not in line


def test_a_misused_cubic_field_hides_no_other_error_of_its_section():
    lines = errors_of({"teacher": "t", "pruning": {"schedule_end": 0.3, "sparsity": 2}})
    assert any("schedule_end" in line for line in lines)
    assert any("pruning.sparsity" in line for line in lines)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("pruning.sparsity", 1.0),
        ("pruning.sparsity", -0.1),
        ("pruning.sparsity", float("nan")),
        ("pruning.criterion", "random"),
        ("synthesis.batch_size", 1),
        ("synthesis.learning_rate", 0),
        ("synthesis.bn_weight", -1),
        ("synthesis.tv_weight", float("inf")),
        ("synthesis.precision", "float16"),
        ("synthesis.storage", "uint16"),
        ("synthesis.num_threads", 0),
        ("synthesis.num_steps", 1.5),
        ("synthesis", 3),
        ("synthesis", None),
        ("distillation.temperature", 0),
        ("distillation.num_steps", -1),
        ("distillation.momentum", 1.0),
        ("distillation.bn_mode", "eval"),
        ("distillation.flip", "perhaps"),
        ("distillation.clip_norm", "none"),
        ("reference.num_images", 1),
        ("reference.synthesis.method", "real"),
        ("student.arguments", [1]),
        ("device", "tpu"),
        ("teacher", 3),
    ],
)
def test_a_value_out_of_range_is_refused_with_its_path(path, value):
    (line,) = errors_of(with_overrides({"teacher": "t"}, {path: value}))
    assert line.startswith(f"config: {path}: ")


def test_a_missing_teacher_is_said():
    assert errors_of({}) == ["config: teacher: missing, a value is needed"]


def test_a_dotted_name_in_a_file_is_told_to_be_nested():
    (line,) = errors_of({"teacher": "t", "distillation.num_steps": 6})
    assert line == "config: distillation.num_steps: write it nested, distillation: {num_steps: …}"


def test_an_unknown_synthesis_method_is_refused_with_the_methods_there_are():
    (line,) = errors_of({"teacher": "t", "synthesis": {"method": "gan"}})
    assert line.startswith("config: synthesis.method: unknown method 'gan'; expected ")
    assert all(method in line for method in ("deepinversion", "noise", "real"))


def test_the_error_names_the_file_that_was_read():
    with pytest.raises(ValueError, match=r"^sweeps/a\.yaml: teacher: missing"):
        validate(TrialConfig, {}, "sweeps/a.yaml")


@pytest.mark.parametrize(
    ("data", "says"),
    [
        ({"pruning": {"schedule_end": 0.3}}, "schedule_end acts with schedule=cubic only"),
        ({"pruning": {"schedule_every": 5}}, "schedule_every acts with schedule=cubic only"),
        ({"student": {"arguments": {"width_multiplier": 0.5}}}, "no architecture"),
        ({"synthesis": {"method": "noise"}, "distillation": {"label_weight": 1}}, "needs labels"),
        ({"synthesis": {"label_weight": 0, "bn_weight": 0}}, "nothing ties the images to the teacher"),
        ({"student": {"architecture": "resnet8"}, "distillation": {"bn_mode": "frozen"}}, "bn_mode=trained"),
        ({"student": {"architecture": "resnet8"}, "distillation": {"bn_mode": "paired"}}, "bn_mode=trained"),
        (
            {"student": {"architecture": "resnet8", "weights": "a.pt"}, "distillation": {"bn_mode": "paired"}},
            "bn_mode=paired needs a student with the teacher's layers",
        ),
    ],
)
def test_an_option_that_cannot_act_is_refused(data, says):
    (line,) = errors_of({"teacher": "t", **data})
    assert says in line


def test_cubic_fields_are_taken_with_the_cubic_schedule():
    pruning = trial(pruning={"schedule": "cubic", "schedule_end": 0.3, "schedule_every": 5}).pruning
    assert (pruning.schedule_end, pruning.schedule_every) == (0.3, 5)


@pytest.mark.parametrize(("method", "kind"), [("deepinversion", DeepInversionConfig), ("noise", NoiseConfig)])
def test_the_method_chooses_the_synthesis_fields(method, kind):
    assert type(trial(synthesis={"method": method}).synthesis) is kind
    assert type(trial(synthesis={}).synthesis) is DeepInversionConfig


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"synthesis": {"method": "noise", "seed": 3}},
        {"synthesis": {"method": "real"}, "pruning": {"schedule": "cubic", "schedule_end": 0.25}},
        {"student": {"architecture": "resnet8", "arguments": {"width_multiplier": 0.5}}},
    ],
)
def test_a_dumped_config_is_read_back_equal(fields):
    config = trial(**fields)
    assert validate(TrialConfig, json.loads(config.model_dump_json())) == config


def test_configs_are_frozen():
    config = trial()
    with pytest.raises(ValidationError):
        config.pruning.sparsity = 0.5  # pyright: ignore[reportAttributeAccessIssue] - what is refused
    assert config.pruning.sparsity == 0.75


def test_the_json_schema_for_editors_names_every_section():
    schema = TrialConfig.model_json_schema()
    assert set(schema["properties"]) == set(TrialConfig.model_fields)
    assert schema["$defs"]["PruningConfig"]["additionalProperties"] is False


def test_field_paths_cover_every_leaf_of_a_dump():
    paths = set(field_paths(TrialConfig))
    for method in ("deepinversion", "noise", "real"):
        dump = trial(synthesis={"method": method}).model_dump(mode="json")
        assert set(flat(dump)) <= paths
    assert "reference.synthesis.jitter" in paths


def test_importing_the_configs_imports_nothing_heavy():
    code = "import sys, dfkd_ray.config; print(sorted({'torch', 'ray', 'numpy', 'pandas'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_mapping_of_yaml_is_read(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text("teacher: t\npruning: {sparsity: 0.9}\n")
    assert read_yaml(path) == {"teacher": "t", "pruning": {"sparsity": 0.9}}


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "no such file"),
        (b"a: [1", "not valid YAML"),
        (b"\xff\xfe\x00\x80", "not valid YAML"),
        (b"- 1\n- 2\n", "expected a mapping of fields, got list"),
        (b"", "expected a mapping of fields, got NoneType"),
    ],
)
def test_a_broken_file_is_refused_by_name(tmp_path, content, says):
    path = tmp_path / "a.yaml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError) as caught:
        read_yaml(path)
    assert str(caught.value).startswith(f"{path}: {says}")


def test_yaml_that_would_run_code_is_refused(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text(
        f"a: !!python/object/apply:pathlib.Path.touch [!!python/object/apply:pathlib.Path [{tmp_path}/ran]]"
    )
    with pytest.raises(ValueError, match="not valid YAML"):
        read_yaml(path)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("assignment", "parsed"),
    [
        ("a.b=1", {"a.b": 1}),
        ("a=0.5", {"a": 0.5}),
        ("a=x", {"a": "x"}),
        ("a=null", {"a": None}),
        ("a=true", {"a": True}),
        ("a=[1, 2]", {"a": [1, 2]}),
        ("a=b=c", {"a": "b=c"}),
        ("a={b: 1}", {"a": {"b": 1}}),
        (" a.b = 1", {"a.b": 1}),
    ],
)
def test_set_values_are_yaml(assignment, parsed):
    assert parse_overrides([assignment]) == parsed


def test_a_field_set_twice_to_two_values_is_refused_with_both():
    assert parse_overrides(["a=1", "b=2", "a=1.0"]) == {"a": 1, "b": 2}
    for both in (["a=1", "a=3"], ["a=1", "a=true"], ["a.b=1", "a={b: 2}"], ["a={b: 2}", "a.b=1"]):
        with pytest.raises(ValueError, match=r"^`set` a\S*: (set twice, to 1 and to|lies within a)"):
            parse_overrides(both)


@pytest.mark.parametrize("assignment", ["a.b", "=1", "", "a=[1", "a={"])
def test_a_set_that_is_no_assignment_is_refused_as_given(assignment):
    with pytest.raises(ValueError) as caught:
        parse_overrides([assignment])
    assert repr(assignment) in str(caught.value)


def test_scientific_notation_reaches_a_number_field():
    data = with_overrides({"teacher": "t"}, parse_overrides(["distillation.weight_decay=1e-4"]))
    assert validate(TrialConfig, data).distillation.weight_decay == 1e-4


def test_overrides_make_missing_sections_and_keep_the_rest():
    data = {"teacher": "t", "pruning": {"sparsity": 0.5, "criterion": "lamp"}}
    result = with_overrides(data, {"pruning.sparsity": 0.9, "reference.synthesis.seed": 7})
    assert result == {
        "teacher": "t",
        "pruning": {"sparsity": 0.9, "criterion": "lamp"},
        "reference": {"synthesis": {"seed": 7}},
    }


def test_overrides_change_neither_argument():
    data = {"a": {"b": {"c": 1}}}
    overrides = {"student": {"architecture": "x"}, "student.arguments": {"w": 1}, "a.b.c": 2}
    copies = json.loads(json.dumps([data, overrides]))
    with_overrides(data, overrides)
    assert [data, overrides] == copies


def test_an_override_through_a_plain_value_is_refused():
    with pytest.raises(ValueError, match=r"^teacher\.name: 'teacher' is a plain value"):
        with_overrides({"teacher": "t"}, {"teacher.name": 1})


def test_flat_names_are_dotted_and_containers_become_json():
    data = {"a": {"b": {"c": 1}}, "d": {}, "e": [1, 2], "f": None}
    assert flat(data) == {"a.b.c": 1, "d": "{}", "e": "[1, 2]", "f": None}


def test_a_stable_hash_is_that_of_the_canonical_json():
    expected = hashlib.sha256(b'{"a":[1,2.5,null],"b":"x"}').hexdigest()
    assert stable_hash({"b": "x", "a": [1, 2.5, None]}) == expected


def test_a_stable_hash_of_what_json_cannot_say_is_refused():
    with pytest.raises(ValueError):
        stable_hash({"a": float("nan")})


def test_configs_hash_by_value_and_by_every_field():
    base = trial()
    assert config_hash(base) == config_hash(trial(pruning={"sparsity": 0.75}, bn_num_images=1024))
    others = [
        trial(pruning={"sparsity": 0.5}),
        trial(bn_num_images=512),
        trial(distillation={"seed": 1}),
        trial(reference={"synthesis": {"seed": 1}}),
        trial(student={"architecture": "resnet8"}),
        trial(synthesis={"method": "noise"}),
        trial(teacher="u"),
        trial(device="cpu"),
    ]
    assert len({config_hash(config) for config in [base, *others]}) == len(others) + 1


def test_the_other_values_name_every_synthesis_field():
    assert set(OTHER_SYNTHESIS) == set(DeepInversionConfig.model_fields) - {"method"}


@pytest.mark.parametrize("name", OTHER_SYNTHESIS)
def test_the_synthesis_key_changes_with_every_pixel_field(name):
    base = DeepInversionConfig()
    other = validate(DeepInversionConfig, {name: OTHER_SYNTHESIS[name]})
    assert getattr(other, name) != getattr(base, name)
    assert synthesis_key("ab", other) != synthesis_key("ab", base)


def test_the_synthesis_key_changes_with_teacher_method_and_domain():
    keys = [
        synthesis_key("ab", DeepInversionConfig()),
        synthesis_key("cd", DeepInversionConfig()),
        synthesis_key("ab", DeepInversionConfig(), domain="reference"),
        synthesis_key("ab", NoiseConfig()),
        synthesis_key("ab", RealConfig()),
    ]
    assert len(set(keys)) == len(keys)


@pytest.mark.parametrize(
    "fields",
    [
        {"pruning": {"sparsity": 0.5, "criterion": "lamp", "spare_first": True}},
        {"student": {"architecture": "resnet8"}},
        {"bn_num_images": 64},
        {"distillation": {"num_images": 64, "num_steps": 3, "seed": 5, "temperature": 2, "batch_size": 32}},
        {"reference": {"num_images": 64, "synthesis": {"seed": 9}}},
        {"synthesis": DeepInversionConfig().model_dump()},  # defaults written out
    ],
)
def test_the_synthesis_key_changes_with_nothing_else(fields):
    assert synthesis_key("ab", trial(**fields).synthesis) == synthesis_key("ab", trial().synthesis)


@pytest.mark.parametrize(
    "model", [DeepInversionConfig, NoiseConfig, RealConfig, PruningConfig, DistillationConfig, TeacherTrainingConfig]
)
def test_every_number_has_a_range(model):
    numbers = {name: field for name, field in model.model_fields.items() if field.annotation in (int, float)}
    assert numbers
    assert [name for name, field in numbers.items() if not field.metadata] == []
