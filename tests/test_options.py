"""Options, `--set` and a file that say two things of one field; more real images than there are; options in errors."""

import ast
import re
from pathlib import Path

import pytest
import typer
import yaml

import dfkd_ray
from dfkd_ray import cli
from dfkd_ray.cli import errors
from dfkd_ray.cli.options import number_of, range_of, settled
from helpers import TINY_SETS, TINY_WORDS, assert_one_error, options_of, set_words, write_idx_set

OPTIONS = {
    "TEACHER": {"teacher": "a"},
    "--sparsity": {"pruning.sparsity": 0.5},
    "--method": {"synthesis.method": "noise"},
    "--seed": {"synthesis.seed": 3, "distillation.seed": 3},
    "--device": {"device": None},
}


@pytest.mark.parametrize(
    "assignment",
    [
        "teacher=b",
        "pruning.sparsity=0.6",
        "pruning.sparsity=true",
        "pruning={sparsity: 0.6}",
        "synthesis.method=records",
        "synthesis={method: records, num_steps: 3}",
        "distillation.seed=4",
    ],
)
def test_an_option_and_a_set_field_that_differ_are_refused_with_both(assignment):
    field = assignment.partition("=")[0]
    with pytest.raises(ValueError, match="two values for one field") as caught:
        settled({}, OPTIONS, [assignment])
    assert field in str(caught.value) and "--set" in str(caught.value)


def test_an_option_and_a_set_field_that_agree_are_one():
    sets = ["teacher=a", "pruning.sparsity=0.50", "synthesis={method: noise, batch_size: 8}", "distillation={seed: 3}"]
    assert settled({"device": "cpu"}, OPTIONS, [*sets, "device=cuda"]) == {
        "teacher": "a",
        "pruning": {"sparsity": 0.5},
        "synthesis": {"method": "noise", "batch_size": 8, "seed": 3},
        "distillation": {"seed": 3},
        "device": "cuda",
    }


def test_the_command_line_wins_over_a_file_but_for_another_teacher():
    assert settled({"teacher": "a", "pruning": {"sparsity": 0.1}}, OPTIONS, [])["pruning"]["sparsity"] == 0.5
    for other in ("b", ["a"], 3, "x" * 10**5):
        with pytest.raises(ValueError, match=r"two teachers: 'a' on the command line, .* in f\.yaml"):
            settled({"teacher": other}, OPTIONS, [], "f.yaml")


@pytest.mark.parametrize(
    "words",
    [
        ["--set", "teacher=other"],
        ["--sparsity", "0.5", "--set", "pruning.sparsity=0.6"],
        ["--method", "noise", "--set", "synthesis.method=records"],
        ["--seed", "1", "--set", "distillation.seed=2"],
        ["--device", "cpu", "--set", "device=cuda"],
        ["--set", "synthesis.seed=1", "--set", "synthesis.seed=2"],
        ["--config", "with_teacher.yaml"],
    ],
    ids=" ".join,
)
def test_recover_refuses_what_is_said_twice_before_any_work(run_cli, tiny_teacher, tmp_path, monkeypatch, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "with_teacher.yaml").write_text("teacher: other\n")
    done = run_cli("recover", str(tiny_teacher), "--out", str(tmp_path / "o"), *words)
    assert_one_error(done, 2, "leave one out")
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize(
    "words",
    [
        ["synthesize", "{t}", "--out", "o", "--method", "noise", "--set", "method=records"],
        ["synthesize", "{t}", "--out", "o", "--seed", "1", "--set", "synthesis.seed=2"],
        ["synthesize", "{t}", "--out", "o", "--set", "seed=1", "--set", "synthesis.seed=2"],
        ["teacher", "train", "resnet8", "--dataset", "mnist", "--out", "o", "--set", "dataset=cifar10"],
        ["teacher", "train", "resnet8", "--dataset", "mnist", "--out", "o", "--epochs", "3", "--set", "num_epochs=4"],
        ["teacher", "train", "resnet8", "--dataset", "mnist", "--out", "o", "--set", "architecture=resnet20"],
    ],
    ids=" ".join,
)
def test_other_commands_refuse_what_is_said_twice_before_any_work(run_cli, tiny_teacher, tmp_path, monkeypatch, words):
    monkeypatch.chdir(tmp_path)
    assert_one_error(run_cli(*(word.format(t=tiny_teacher) for word in words)), 2, "leave one out")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "content", ["method: [x]", "method: null", "method: {a: 1}", "method: 3", "method: real", "[1]"]
)
def test_a_synthesis_config_whose_method_is_none_is_refused_in_one_line(run_cli, tiny_teacher, tmp_path, content):
    (tmp_path / "c.yaml").write_text(content)
    words = ["--config", str(tmp_path / "c.yaml"), "--out", str(tmp_path / "o")]
    assert_one_error(run_cli("synthesize", str(tiny_teacher), *words), 2)


@pytest.mark.parametrize("name", [".", "/dev/zero", "no.yaml", "x" * 300, "x" * 100_000], ids=range(5))
def test_a_name_that_is_no_file_is_an_input_error_with_a_short_name(run_cli, tiny_teacher, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    for words in (
        ["sweep", name],
        ["recover", str(tiny_teacher), "--config", name, "--out", "o"],
        ["synthesize", str(tiny_teacher), "--config", name, "--out", "o"],
        ["recover", name, "--out", "o"],
    ):
        done = run_cli(*words)
        assert_one_error(done, 2)
        assert len(done.err.strip()) <= 300


@pytest.mark.parametrize("text", ["²", "1e3", "10" * 50, "-1", "1-", "3-2", "1-2-3", "0-1", "100001", "", "9" * 5000])
def test_numbers_of_synthesizers_that_are_none_are_refused(text):
    with pytest.raises(ValueError, match="--synthesizers"):
        range_of(text)
    with pytest.raises(ValueError, match="--synthesizers"):
        number_of(text)


# ---- real images ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("field", "num"), [("distillation.num_images", 41), ("bn_num_images", 55_000)])
def test_more_real_images_than_there_are_is_found_before_anything_starts(
    run_cli, tiny_teacher, tmp_path, monkeypatch, field, num
):
    monkeypatch.setattr("ray.init", lambda *_a, **_k: pytest.fail("Ray was started"))
    write_idx_set(tmp_path / "data")
    sets = {name: value for name, value in TINY_SETS.items() if not name.startswith("synthesis.")}
    sets |= {"synthesis.batch_size": 8}
    real = ["--real-data", "mnist", "--data-root", str(tmp_path / "data"), "--test-data", "none"]
    words = set_words({**sets, field: num})
    done = run_cli("recover", str(tiny_teacher), "--method", "real", "--out", str(tmp_path / "o"), *real, *words)
    assert_one_error(done, 2, "40 images", f"{field} asks for {num:,}")
    assert not (tmp_path / "o").exists()

    base = {"teacher": str(tiny_teacher), "synthesis": {"method": "real"}}
    (tmp_path / "s.yaml").write_text(yaml.safe_dump({"base": base, "grid": {field: [8, num]}}))
    words = set_words({name: value for name, value in sets.items() if name != field})
    for more in ([], ["--dry-run"]):
        done = run_cli("sweep", str(tmp_path / "s.yaml"), "--results", str(tmp_path / "r"), *real, *words, *more)
        assert_one_error(done, 2, "40 images", f"{field} asks for {num:,}")
    assert not (tmp_path / "r" / "trials").exists()


def test_as_many_real_images_as_there_are_is_enough(run_cli, tiny_teacher, tmp_path):
    write_idx_set(tmp_path / "data")
    sets = {name: value for name, value in TINY_SETS.items() if not name.startswith("synthesis.")}
    words = set_words(sets | {"distillation.num_images": 40, "synthesis.batch_size": 16})
    real = ["--method", "real", "--real-data", "mnist", "--data-root", str(tmp_path / "data"), "--test-data", "none"]
    done = run_cli("recover", str(tiny_teacher), "--out", str(tmp_path / "o"), *real, *words)
    assert done.code == 0, done.err


def test_tiny_options_are_set_once():
    assert len({word.partition("=")[0] for word in TINY_WORDS[1::2]}) == len(TINY_SETS)


def test_no_module_below_the_command_line_names_an_option_of_it():
    known, root, named = options_of(typer.main.get_command(cli.app)), Path(dfkd_ray.__file__).parent, []
    for path in sorted(root.rglob("*.py")):
        if path.is_relative_to(root / "cli"):
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                found = known & set(re.findall(r"--[a-z][a-z-]*", node.value))
                named += [f"{path.relative_to(root)}:{node.lineno}: {name}" for name in sorted(found)]
    assert len(known) > 60 and not named, named


@pytest.mark.parametrize(
    ("message", "shown"),
    [
        ("raise `batch_timeout`", "raise --batch-timeout"),
        ("`gpus_per_trial=0`: a share", "--gpus-per-trial 0: a share"),
        ("no `data_root`, no `batch_timeout`", "no `data_root`, no --batch-timeout"),
        ("`ray start --head` starts one; `set` is unknown", "`ray start --head` starts one; `set` is unknown"),
    ],
)
def test_parameters_that_an_error_names_are_shown_as_options_of_the_command(message, shown):
    assert errors.with_options(message, ["--batch-timeout", "--gpus-per-trial"]) == shown


def test_the_options_are_those_of_the_command_that_was_given(run_cli, tmp_path):
    command = typer.main.get_command(cli.app)
    assert "--data-root" in cli.options_of(command, ["--debug", "teacher", "train", "resnet8", "--epochs", "1"])
    assert cli.options_of(command, ["teacher", "info", "x"]) == ["--trust-code", "--download"]
    words = ["teacher", "train", "resnet8", "--out", str(tmp_path / "t"), "--data-root", str(tmp_path)]
    assert_one_error(run_cli(*words, "--dataset", "cifar10"), 2, "as --data-root, or fetch it with --download")
