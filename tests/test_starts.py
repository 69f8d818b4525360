"""Students that start from a file of the user's: their weights, zeros, ids and rows, and what is refused."""

import gc
import json
import shutil
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import nn

from dfkd_ray import bundles, models, recovery, results, sweep, trial
from dfkd_ray.bundles import starts
from dfkd_ray.compression import pruning
from dfkd_ray.config import PruningConfig, TrialConfig, columns_of, validate
from dfkd_ray.sweep import worker
from helpers import (
    TINY_NOISE,
    TINY_SETS,
    assert_one_error,
    make_teacher,
    refusal,
    set_words,
    tiny_network,
    tiny_sweep,
    tiny_trial,
)

ZEROS = {"pruning.sparsity": 0}


@pytest.fixture(autouse=True)
def nothing_is_held():
    starts.HELD.clear()
    starts.SEEN.clear()


@pytest.fixture
def teacher(tiny_teacher: Path) -> bundles.Teacher:
    return bundles.load(str(tiny_teacher))


def config_of(weights, **fields):
    return validate(TrialConfig, tiny_trial("t", **({"student.weights": str(weights)} | ZEROS | fields)))


def pruned_state(sparsity=0.6, seed=5):
    """The state dict of a network of the tiny teacher's architecture that was trained and pruned elsewhere."""
    network = tiny_network(seed)
    pruning.apply(network, pruning.masks(network, PruningConfig(criterion="uniform", sparsity=sparsity)))
    return network.state_dict()


def saved(path, state=None):
    state = pruned_state() if state is None else state
    if path.suffix == ".safetensors":
        safetensors.torch.save_file({name: tensor.contiguous() for name, tensor in state.items()}, path)
    else:
        torch.save(state, path)
    return path


def zeros_of(state):
    return {name: tensor == 0 for name, tensor in state.items() if tensor.ndim > 1}


@pytest.mark.parametrize("name", ["w.safetensors", "w.pt", "wrapped.pt"])
def test_a_file_is_what_the_student_starts_from_and_its_zeros_stay(teacher, tmp_path, name):
    state = pruned_state()
    content = {"state_dict": {f"module.{key}": tensor for key, tensor in state.items()}} if "wrapped" in name else state
    path = saved(tmp_path / name, content)
    config = config_of(path)
    start = trial.starting_student(config, teacher, torch.device("cpu"), ())
    assert all(torch.equal(tensor, start.state_dict()[key]) for key, tensor in state.items())
    outcome = trial.run(config, teacher)
    row, student = outcome.row, outcome.student
    kept = zeros_of(state)
    assert row["num_kept_zeros"] == sum(int(mask.sum()) for mask in kept.values()) > 0
    assert student is not None and row["selected"] != "pruned" and row["reconstructed_agreement"] is not None
    assert all((student.state_dict()[key][mask] == 0).all() for key, mask in kept.items())
    assert row["achieved_sparsity"] == pytest.approx(0.6, abs=1e-3) and row["stored_bytes"] < 0.55 * row["dense_bytes"]
    assert row["student.weights"] == str(path) and row["student.weights_sha256"] == bundles.sha256(path)
    assert results.unfit(results.kept(row)) is None
    trained = [key for key in kept if not torch.equal(student.state_dict()[key], state[key])]
    assert len(trained) == len(kept)


def test_zeros_are_trained_where_they_need_not_stay(teacher, tmp_path):
    path = saved(tmp_path / "w.pt")
    row = trial.run(config_of(path, **{"student.keep_zeros": False}), teacher).row
    assert row["num_kept_zeros"] == 0 and row["achieved_sparsity"] < 0.01 and row["reconstructed_agreement"] is None


@pytest.mark.parametrize(("criterion", "sparsity"), [("uniform", 0.8), ("lamp", 0.3), ("wanda", 0.7)])
def test_further_pruning_adds_to_a_files_zeros(teacher, tmp_path, criterion, sparsity):
    state = pruned_state(0.6)
    fields = {"pruning.sparsity": sparsity, "pruning.criterion": criterion}
    outcome = trial.run(config_of(saved(tmp_path / "w.pt", state), **fields), teacher)
    assert outcome.student is not None
    own = outcome.student.state_dict()
    assert all((own[key][mask] == 0).all() for key, mask in zeros_of(state).items())
    assert outcome.row["achieved_sparsity"] >= max(0.6, sparsity) - 1e-3


def test_an_emptied_layer_is_a_warning(teacher, tmp_path):
    state = pruned_state()
    state["blocks.0.conv1.weight"] = torch.zeros_like(state["blocks.0.conv1.weight"])
    outcome = trial.run(config_of(saved(tmp_path / "w.pt", state)), teacher)
    assert "all weights of blocks.0.conv1.weight are zero" in outcome.row["warnings"]


def test_the_id_goes_by_content_and_not_by_name(teacher, tmp_path):
    (tmp_path / "other").mkdir()
    first, again = saved(tmp_path / "a.pt"), tmp_path / "other" / "b.pt"
    shutil.copy(first, again)
    ids = {}
    for name, path in {"first": first, "again": again, "second": saved(tmp_path / "c.pt", pruned_state(0.7))}.items():
        ids[name] = trial.trial_id(trial.pinned(config_of(path), teacher), teacher)
    ids["none"] = trial.trial_id(trial.pinned(validate(TrialConfig, tiny_trial("t", **ZEROS)), teacher), teacher)
    ids["trained"] = trial.trial_id(trial.pinned(config_of(first, **{"student.keep_zeros": False}), teacher), teacher)
    assert ids["first"] == ids["again"] and len(set(ids.values())) == 4


def test_configs_without_a_file_have_the_ids_that_they_had(teacher):
    config = validate(TrialConfig, tiny_trial("t"))
    assert config.model_dump(mode="json")["student"] == {"architecture": None, "arguments": {}}
    assert {name for name in columns_of(config) if name.startswith("student")} == {
        "student.architecture",
        "student.arguments",
    }


def test_a_file_that_changes_is_read_again_and_refused_under_its_old_hash(teacher, tmp_path):
    path = saved(tmp_path / "w.pt")
    before = trial.pinned(config_of(path), teacher)
    saved(path, pruned_state(0.7))
    assert trial.pinned(config_of(path), teacher).student.weights_sha256 != before.student.weights_sha256
    starts.HELD.clear()
    refusal(lambda: trial.pinned(before, teacher), "student.weights", "has changed")


def test_what_is_read_stays_in_memory_up_to_a_limit(teacher, tmp_path, monkeypatch):
    paths = [saved(tmp_path / f"{share}.pt", pruned_state(share)) for share in (0.2, 0.4)]
    pinned = [trial.pinned(config_of(path), teacher) for path in paths]
    (tmp_path / "0.2.pt").unlink()
    trial.starting_student(pinned[0], teacher, torch.device("cpu"), ())
    monkeypatch.setattr(starts, "MOST_HELD", 1)
    trial.pinned(config_of(paths[1]), teacher)
    assert len(starts.HELD) == 1
    refusal(lambda: trial.pinned(pinned[0], teacher), "no such file or bundle")


def other_student(folder, network, architecture, **changes):
    info = {"num_classes": 10, "input_shape": (1, 16, 16), "mean": (0.286,), "std": (0.353,)} | changes
    bundles.save(folder, bundles.BundleInfo(architecture=architecture, **info), network.state_dict())
    return folder


def test_a_bundle_brings_its_architecture(teacher, tmp_path):
    same = {name: getattr(teacher.info, name) for name in ("mean", "std", "pixel_range")}
    torch.manual_seed(0)
    network = models.build("resnet8", {"width_multiplier": 0.25}, num_classes=10, image_shape=(1, 16, 16))
    pruning.apply(network, pruning.masks(network, PruningConfig(sparsity=0.5)))
    arguments = {"arguments": {"width_multiplier": 0.25}, **same}
    folder = other_student(tmp_path / "other", network, "resnet8", **arguments)
    config = config_of(folder)
    outcome = trial.run(config, teacher)
    row = outcome.row
    assert row["student.architecture"] == "resnet8" and json.loads(row["student.arguments"]) == arguments["arguments"]
    assert row["reconstructed_agreement"] is None and "another architecture" in row["warnings"]
    assert row["achieved_sparsity"] == pytest.approx(0.5, abs=1e-3)
    outcome.save_student(tmp_path / "recovered")
    assert bundles.load(str(tmp_path / "recovered")).info.arguments == arguments["arguments"]
    pinned = trial.pinned(config, teacher)
    assert trial.pinned(pinned, teacher) == pinned
    fields = {"student.architecture": "resnet20"}
    refusal(lambda: trial.check(config_of(folder, **fields), teacher, ()), "names its own architecture")


def test_a_bundle_of_the_teachers_architecture_is_reconstructed(teacher, tmp_path):
    bundles.save(tmp_path / "pruned", teacher.info, pruned_state(), list(pruning.prunable(teacher.network)))
    row = trial.run(config_of(tmp_path / "pruned"), teacher).row
    assert row["student.architecture"] is None and row["reconstructed_agreement"] is not None
    assert row["achieved_sparsity"] == pytest.approx(0.6, abs=1e-3)


def test_a_bundle_with_fewer_channels_starts_and_is_saved_with_its_edits(teacher, tmp_path):
    fields = {"pruning.structure": "channels", "pruning.sparsity": 0.4}
    first = trial.run(validate(TrialConfig, tiny_trial("t", **fields)), teacher)
    info = first.save_student(tmp_path / "small")
    outcome = trial.run(config_of(tmp_path / "small"), teacher)
    assert outcome.row["num_parameters"] == first.row["num_parameters"]
    assert outcome.save_student(tmp_path / "again").shape_edits == info.shape_edits
    bundles.load(str(tmp_path / "again"))
    paired = config_of(tmp_path / "small", **{"distillation.bn_mode": "paired"})
    refusal(lambda: trial.check(paired, teacher, ()), "bn_mode=paired needs a student with the teacher's layers")
    further = trial.run(config_of(tmp_path / "small", **fields), teacher)
    further.save_student(tmp_path / "smaller")
    loaded = bundles.load(str(tmp_path / "smaller"))
    assert pruning.num_parameters(loaded.network) == further.row["num_parameters"] < outcome.row["num_parameters"]


def test_zeros_that_the_pruning_would_not_keep_are_refused(teacher, tmp_path):
    path = saved(tmp_path / "w.pt")
    for fields in ({"pruning.schedule": "cubic"}, {"pruning.structure": "channels"}):
        wanted = {"pruning.sparsity": 0.5, **fields}
        refusal(lambda wanted=wanted: trial.check(config_of(path, **wanted), teacher, ()), "keep_zeros=false")
        trial.check(config_of(path, **wanted, **{"student.keep_zeros": False}), teacher, ())


def spoiled(name, change):
    state = pruned_state()
    state[name] = change(state[name])
    return state


BAD = {
    "wrong_shape": (lambda: spoiled("conv1.weight", lambda w: w[:2]), "does not fit the architecture or class count"),
    "missing_key": (lambda: {k: v for k, v in pruned_state().items() if k != "conv1.weight"}, "conv1.weight"),
    "other_classes": (lambda: spoiled("fc.weight", lambda w: w[:3]), "class count"),
    "nan": (lambda: spoiled("conv1.weight", lambda w: w * float("nan")), "not finite"),
    "negative_variance": (lambda: spoiled("bn1.running_var", lambda v: v - 1000), "negative"),
    "no_weights": (lambda: {"a": 1}, "no named tensors"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_file_that_does_not_fit_is_refused_before_anything_is_made(teacher, tmp_path, name):
    make, said = BAD[name]
    path = saved(tmp_path / "w.pt", make())
    refusal(lambda: trial.run(config_of(path), teacher), "student.weights: ", said)


def test_files_that_are_none_are_refused(teacher, tmp_path):
    refusal(lambda: trial.pinned(config_of(tmp_path / "none.pt"), teacher), "student.weights", "no such file or bundle")
    refusal(lambda: trial.pinned(config_of(tmp_path), teacher), "student.weights", "teacher.json")
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(saved(tmp_path / "w.safetensors").read_bytes()[:900])
    refusal(lambda: trial.pinned(config_of(cut), teacher), "student.weights", "cut.safetensors")


@pytest.mark.parametrize(
    ("field", "value"), [("num_classes", 7), ("input_shape", (1, 20, 20)), ("mean", (0.1,)), ("head", "sigmoid")]
)
def test_a_bundle_for_other_images_or_classes_is_refused(teacher, tmp_path, field, value):
    info = teacher.info.model_copy(update={field: value})
    network = models.build("resnet8", info.arguments, num_classes=info.num_classes, image_shape=info.input_shape)
    bundles.save(tmp_path / "b", info, network.state_dict())
    refusal(lambda: trial.check(config_of(tmp_path / "b"), teacher, ()), "student.weights", f"has {field} ")


def test_fields_of_a_file_without_one_are_refused():
    for name, value in {"keep_zeros": False, "weights_sha256": "a", "weights_key": "ema"}.items():
        refusal(
            lambda n=name, v=value: validate(TrialConfig, tiny_trial("t", **{f"student.{n}": v})), f"{name} is of a"
        )


def test_of_several_sets_of_weights_one_is_named(teacher, tmp_path):
    path = saved(tmp_path / "w.pt", {"first": pruned_state(0.5), "second": pruned_state(0.6, seed=6)})
    refusal(lambda: trial.check(config_of(path), teacher, ()), "student.weights_key=first")
    chosen = trial.pinned(config_of(path, **{"student.weights_key": "second"}), teacher)
    start = trial.starting_student(chosen, teacher, torch.device("cpu"), ())
    assert torch.equal(start.state_dict()["conv1.weight"], pruned_state(0.6, seed=6)["conv1.weight"])
    saved(path, {"model": pruned_state(0.5), "ema": pruned_state(0.6, seed=6)})
    assert "averages of its weights (ema)" in trial.run(config_of(path), teacher).row["warnings"]


class Own(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.bn, self.fc = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 3)

    def forward(self, x):
        return self.fc(torch.relu(self.bn(self.conv(x))).mean((2, 3)))


def test_from_python_a_network_in_memory_has_a_pruned_copy_in_a_file(tmp_path):
    network, other = Own().eval(), Own()
    pruning.apply(other, pruning.masks(other, PruningConfig(criterion="uniform", sparsity=0.5)))
    path = saved(tmp_path / "own.safetensors", other.state_dict())
    settings = TINY_SETS | {"student.weights": str(path)}
    described = {"input_shape": (1, 8, 8), "num_classes": 3, "mean": 0.5, "std": 0.25}
    done = recovery.recover(network, sparsity=0.0, settings=settings, progress=False, **described)
    own, given = done.student.state_dict()["conv.weight"], other.state_dict()["conv.weight"]
    assert done.row["num_kept_zeros"] == 24 and torch.equal(own == 0, given == 0)


def test_in_a_sweep_the_weights_travel_and_workers_need_not_reach_the_file(
    teacher, tiny_teacher, tmp_path, monkeypatch
):
    import ray

    path = saved(tmp_path / "w.pt")
    grid = {"student.weights": [None, str(path)], "distillation.temperature": [2.0, 4.0]}
    data = tiny_sweep(tiny_teacher, grid, **ZEROS, synthesis=TINY_NOISE)
    plan = sweep.prepare(sweep.parse(data), bundles.load)
    assert len(plan.jobs) == 4 and len({job.id for job in plan.jobs}) == 4
    from dfkd_ray.sweep.runner import starts_of

    travels = {name: [starts.to_arrays(start)] for name, start in starts_of(plan.jobs).items()}
    assert len(travels) == 1
    path.unlink()
    starts.HELD.clear()
    monkeypatch.setattr(ray, "get", lambda reference: reference)
    job = next(job for job in plan.jobs if job.config.student.weights)
    shared = worker.Shared(
        str(tmp_path / "place"),
        None,
        (),
        None,
        None,
        {teacher.hash: [bundles.to_arrays(teacher)]},
        {teacher.hash: [None]},
        {},
        students=travels,
    )
    row = json.loads(worker.in_worker(job.id, job.config, teacher.hash, shared)["row"])
    assert row["status"] == "finished" and row["num_kept_zeros"] > 0 and row["trial_id"] == job.id
    gc.collect()


def words_of_the_document():
    """The command of the section on files in the document of networks."""
    text = Path(models.__file__).with_name("README.md").read_text(encoding="utf-8")
    section = text.partition("## A student from a file\n")[2].partition("\n## ")[0]
    return section.partition("```sh\n")[2].partition("\n```")[0].split()


def test_the_documents_command_recovers_a_file(run_cli, tiny_teacher, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own").symlink_to(tiny_teacher)
    saved(tmp_path / "pruned.safetensors")
    program, *words = words_of_the_document()
    assert program == "dfkd-ray" and "student.weights=pruned.safetensors" in words
    done = run_cli(*words, *set_words(TINY_SETS))
    assert done.code == 0, done.err
    row = json.loads((tmp_path / "runs" / "pruned" / "row.json").read_text())
    assert row["num_kept_zeros"] > 0 and row["student.weights"] == "pruned.safetensors"
    assert pruning.achieved_sparsity(bundles.load("runs/pruned/student").network) == row["achieved_sparsity"]
    (tmp_path / "pruned.safetensors").unlink()
    gone = run_cli(*words[:-1], "runs/second", *set_words(TINY_SETS))
    assert_one_error(gone, 2, "student.weights", "pruned.safetensors", "no such file")
    assert not (tmp_path / "runs" / "second").exists()


def test_a_teacher_with_other_shapes_is_told_from_the_file(tmp_path):
    lenet = make_teacher(tmp_path / "lenet", "lenet5", num_classes=10)
    path = saved(tmp_path / "w.pt")
    refusal(
        lambda: trial.check(config_of(path, synthesis=TINY_NOISE, **{"reference.synthesis": TINY_NOISE}), lenet, ()),
        "student.weights",
        "does not fit",
    )
