"""HintonNet, LeNet-5, AlexNet, their halves; and trials whose networks have no BatchNorm."""

import functools
import itertools
import json
from typing import Any, cast

import numpy as np
import pytest
import torch
import torchvision
from torch import nn

from dfkd_ray import batchnorm, bundles, models, report, results, sweep, trial
from dfkd_ray.batches import Batch
from dfkd_ray.cli import show
from dfkd_ray.config import (
    DeepInversionConfig,
    NoiseConfig,
    RecordsConfig,
    TeacherTrainingConfig,
    TrialConfig,
    validate,
)
from dfkd_ray.data import LabelledImages
from dfkd_ray.models import without_batchnorm
from dfkd_ray.sweep import estimate
from dfkd_ray.sweep.combinations import applies
from helpers import TINY_NOISE, calibrated, estimated, tiny_trial

SHAPES = {
    "hinton_1200": (1, 28, 28),
    "hinton_800": (1, 28, 28),
    "lenet5": (1, 32, 32),
    "lenet5_half": (1, 32, 32),
    "alexnet": (3, 224, 224),
    "alexnet_half": (3, 224, 224),
}
# Weights and biases, counted by hand from the papers' layer sizes.
NUM_PARAMETERS = {
    "hinton_1200": 785 * 1200 + 1201 * 1200 + 1201 * 10,
    "hinton_800": 785 * 800 + 801 * 800 + 801 * 10,
    "lenet5": 6 * 26 + 16 * (6 * 25 + 1) + 120 * 401 + 84 * 121 + 10 * 85,
    "lenet5_half": 3 * 26 + 8 * (3 * 25 + 1) + 120 * 201 + 84 * 121 + 10 * 85,
}
FIELDS = {"pruning.sparsity": 0.0, "synthesis": TINY_NOISE, "reference.synthesis": TINY_NOISE, "bn_num_images": 16}
FIELDS |= {"distillation.num_images": 16, "distillation.num_steps": 3, "distillation.eval_every": 2}
HINTON_LIKE_TEACHER = {"student": {"architecture": "hinton_800", "arguments": {"hidden_dropout": 0.5}}}


def build(architecture, num_classes=10, image_shape=None, **arguments):
    shape = image_shape or SHAPES[architecture]
    return models.build(architecture, arguments, num_classes=num_classes, image_shape=shape)


@functools.cache
def untrained(architecture):
    torch.manual_seed(0)
    return build(architecture)


def layers(network: nn.Module) -> dict[str, Any]:
    return {name: m for name, m in network.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)}


def image_of(architecture, num=2):
    return torch.randn(num, *SHAPES[architecture], generator=torch.Generator().manual_seed(3))


def test_no_family_here_has_batchnorm():
    assert set(without_batchnorm.FAMILIES) == set(SHAPES)
    with torch.device("meta"):
        assert not any(batchnorm.layers(build(name)) for name in SHAPES)


@pytest.mark.parametrize("architecture", NUM_PARAMETERS)
def test_parameter_counts_are_those_of_the_papers_layer_sizes(architecture):
    with torch.device("meta"):
        count = sum(parameter.numel() for parameter in build(architecture).parameters())
    assert count == NUM_PARAMETERS[architecture]


def test_alexnet_at_full_width_has_torchvisions_names_shapes_and_outputs():
    own = untrained("alexnet")
    with torch.device("meta"):  # 57 million weights are slow to draw twice
        other = torchvision.models.alexnet(weights=None, num_classes=10).eval()
    assert list(other.state_dict()) == list(own.state_dict())
    assert all(own.state_dict()[name].shape == tensor.shape for name, tensor in other.state_dict().items())
    other.load_state_dict(own.state_dict(), assign=True)
    with torch.no_grad():
        torch.testing.assert_close(own(image_of("alexnet", 1)), other(image_of("alexnet", 1)))


@pytest.mark.parametrize("whole", ["lenet5", "alexnet"])
def test_a_half_has_half_of_the_filters_and_the_same_linear_widths(whole):
    with torch.device("meta"):
        full, half = layers(build(whole)), layers(build(f"{whole}_half"))
    assert list(full) == list(half)
    for name, layer in full.items():
        if isinstance(layer, nn.Conv2d):
            assert half[name].out_channels * 2 == layer.out_channels
        else:
            assert half[name].out_features == layer.out_features


@pytest.mark.parametrize("architecture", SHAPES)
def test_each_layer_runs_once_in_order_and_the_next_sees_relu_of_an_output_left_as_it_was(architecture):
    network = untrained(architecture)
    ran, outputs, inputs = [], {}, {}

    def tap(name):
        def hook(_module, given, output):
            ran.append(name)
            inputs[name], outputs[name] = given[0], (output, output.clone())

        return hook

    hooks = [module.register_forward_hook(tap(name)) for name, module in layers(network).items()]
    with torch.no_grad():
        logits = network(image_of(architecture))
    for hook in hooks:
        hook.remove()
    assert ran == list(layers(network))
    for name, (output, as_made) in outputs.items():
        assert torch.equal(output, as_made), f"{name} was changed in place"
        assert (as_made < 0).any(), f"{name} is a ReLU's output already"
    assert torch.equal(logits, outputs[ran[-1]][0])
    assert all((inputs[name] >= 0).all() for name in ran[1:])
    for before, after in itertools.pairwise(ran):
        if outputs[before][0].ndim == inputs[after].ndim == 2:
            assert torch.equal(inputs[after], outputs[before][0].relu())


def test_lenet_pools_by_averages_of_two_by_two():
    network = build("lenet5")
    seen = []
    network.get_submodule("conv2").register_forward_pre_hook(lambda _module, given: seen.append(given[0]))
    images = image_of("lenet5")
    with torch.no_grad():
        network(images)
        maps = network.get_submodule("conv1")(images).relu()
    torch.testing.assert_close(seen[0], maps.unflatten(3, (14, 2)).unflatten(2, (14, 2)).mean(dim=(3, 5)))


def test_hinton_1200_drops_inputs_and_hidden_units_in_train_mode_only():
    network = build("hinton_1200").train()
    dropped = []
    for module in layers(network).values():
        module.register_forward_pre_hook(lambda _module, given: dropped.append(float((given[0] == 0).float().mean())))
    images = torch.rand(64, 1, 28, 28, generator=torch.Generator().manual_seed(0)) + 0.1
    torch.manual_seed(0)
    with torch.no_grad():
        first, second = network(images), network(images)
    assert dropped[0] == pytest.approx(0.2, abs=0.01)
    assert all(share == pytest.approx(0.75, abs=0.1) for share in dropped[1:3])  # a half by ReLU, a half of the rest
    assert not torch.equal(first, second)
    network.eval()
    with torch.no_grad():
        assert torch.equal(network(images), network(images))


def test_hinton_800_has_no_dropout_unless_asked_for():
    assert [module.p for module in build("hinton_800").modules() if isinstance(module, nn.Dropout)] == [0.0] * 3
    asked = build("hinton_800", input_dropout=0.2, hidden_dropout=0.5)
    assert [module.p for module in asked.modules() if isinstance(module, nn.Dropout)] == [0.2, 0.5, 0.5]


@pytest.mark.parametrize("architecture", SHAPES)
def test_the_signal_neither_dies_nor_grows_through_an_untrained_network(architecture):
    with torch.no_grad():
        spread = untrained(architecture)(image_of(architecture, 4)).std(dim=0).mean()
    assert 0.05 < float(spread) < 5


@pytest.mark.parametrize(
    ("architecture", "shape", "arguments", "says"),
    [
        ("lenet5", (1, 12, 32), {}, "LeNet-5 takes images from 16x16 pixels on, not 12x32"),
        ("alexnet_half", (3, 32, 32), {}, "does not take images of 3x32x32"),
        ("hinton_800", (1, 8, 8), {"input_dropout": 1.0}, "input_dropout is 1.0, expected a probability"),
        ("hinton_800", (1, 8, 8), {"hidden_dropout": "half"}, "hidden_dropout is 'half', expected a probability"),
        ("lenet5", (1, 32, 32), {"dropout": 0.5}, "dropout"),
    ],
)
def test_what_a_network_cannot_be_is_refused(architecture, shape, arguments, says):
    with pytest.raises(ValueError) as caught:
        build(architecture, image_shape=shape, **arguments)
    assert says in str(caught.value)


@pytest.fixture(scope="module")
def teacher_folder(tmp_path_factory):
    torch.manual_seed(5)
    folder = tmp_path_factory.mktemp("teachers") / "lenet5"
    info = bundles.BundleInfo(
        architecture="lenet5", num_classes=10, input_shape=(1, 16, 16), mean=(0.5,), std=(0.25,), trained=False
    )
    bundles.save(folder, info, build("lenet5", image_shape=(1, 16, 16)).state_dict())
    return folder


@pytest.fixture
def teacher(teacher_folder):
    return bundles.load(str(teacher_folder))


def config_of(folder, **overrides):
    return validate(TrialConfig, tiny_trial(folder, **FIELDS | overrides))


def labelled(num, seed=0):
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (num, 1, 16, 16), dtype=np.uint8), rng.integers(0, 10, num)


def real(index):
    return Batch(index, *labelled(8, index), "real")


@pytest.mark.parametrize("method", ["noise", "real"])
@pytest.mark.parametrize("student", ["lenet5_half", "hinton_800", None])
def test_a_trial_without_batchnorm_runs_and_has_no_batchnorm_rung(teacher, teacher_folder, tmp_path, method, student):
    config = config_of(teacher_folder, **{"synthesis.method": method, "student.architecture": student})
    outcome = trial.run(config, teacher, trial.Inputs(test=[Batch(0, *labelled(20), "test")], real=real))
    row = outcome.row
    assert row["status"] == "finished" and row["num_images"] == 16
    assert row["bn_reestimated_accuracy"] is None and row["bn_reestimated_agreement"] is None
    for rung in ("teacher", "pruned", "recovered"):
        assert 0 <= row[f"{rung}_accuracy"] <= 1
    assert 0 <= row["agreement"] <= 1
    outcome.save_student(tmp_path / "student")
    assert bundles.load(str(tmp_path / "student")).info.architecture == (student or "lenet5")


@pytest.mark.parametrize("student", ["lenet5_half", None])
@pytest.mark.parametrize("method", ["dafl", "dfad", "zskt"])
def test_generators_that_match_no_statistics_serve_a_network_without_batchnorm(
    teacher, teacher_folder, method, student
):
    small = {"batch_size": 8, "num_rounds": 2, "num_steps": 1, "num_channels": 4, "num_inputs": 4, "num_threads": 1}
    synthesis = {"method": method, **small}
    row = trial.run(config_of(teacher_folder, synthesis=synthesis, **{"student.architecture": student}), teacher).row
    assert row["status"] == "finished" and row["num_images"] == 16
    assert row["num_teacher_passes"] - row["num_student_passes"] == (16 if method == "dafl" else 0)


def test_a_network_with_batchnorm_keeps_its_rung_with_a_reference_of_noise(tiny_teacher):
    row = trial.run(config_of(tiny_teacher), bundles.load(str(tiny_teacher))).row
    assert 0 <= row["bn_reestimated_agreement"] <= 1 and row["reference.synthesis.method"] == "noise"
    assert "reference.synthesis.num_steps" not in row


def test_a_student_with_batchnorm_of_a_teacher_without_has_the_rung(teacher, teacher_folder):
    student = {"architecture": "resnet8", "arguments": {"width_multiplier": 0.25}}
    row = trial.run(config_of(teacher_folder, student=student), teacher).row
    assert 0 <= row["bn_reestimated_agreement"] <= 1


@pytest.mark.parametrize("name", ["synthesis", "reference.synthesis"])
def test_deepinversion_without_batchnorm_is_refused_by_its_field(teacher, teacher_folder, name):
    with pytest.raises(
        ValueError, match=rf"^{name}.method=deepinversion: the teacher has no BatchNorm layer"
    ) as caught:
        trial.run(config_of(teacher_folder, **{f"{name}.method": "deepinversion"}), teacher)
    others = "records, where it has some, dafl, or noise" if name == "synthesis" else "records, or noise"
    assert str(caught.value).endswith(f"{name}.method={others}")


@pytest.mark.parametrize("mode", ["frozen", "reestimated", "paired"])
def test_a_batchnorm_mode_that_cannot_act_is_refused(teacher, teacher_folder, mode):
    with pytest.raises(ValueError, match=f"bn_mode={mode} acts on BatchNorm, and the student has none") as caught:
        trial.run(config_of(teacher_folder, **{"distillation.bn_mode": mode}), teacher)
    assert "\n" not in str(caught.value)


def test_training_on_real_labels_alone_learns_them_and_is_selected_by_kl(teacher, teacher_folder):
    """Labels that the teacher does not give: what follows them was not taught by it."""
    means = np.arange(8) * 25 + 20

    def source(index):
        rng = np.random.default_rng(index)
        images = (means[:, None, None, None] + rng.integers(0, 20, (8, 1, 16, 16))).astype(np.uint8)
        return Batch(index, images, np.arange(8), "real")

    fields = {
        "student.architecture": "lenet5_half",
        "synthesis.method": "real",
        **{"distillation.kl_weight": 0.0, "distillation.label_weight": 1.0, "distillation.mixup": 0.0},
        **{"distillation.num_images": 64, "distillation.batch_size": 32, "distillation.num_steps": 150},
        **{"distillation.eval_every": 50, "distillation.learning_rate": 0.1, "distillation.flip": False},
        **{"distillation.shift": 0, "distillation.precision": "float32"},
    }
    test = [source(100)]
    outcome = trial.run(config_of(teacher_folder, **fields), teacher, trial.Inputs(test=test, real=source))
    looks = cast(list[dict[str, float]], outcome.epochs)
    assert [look["loss"] == look["label"] for look in looks[1:]] == [True] * 3
    assert looks[-1]["label"] < 0.5 * looks[1]["label"]
    best = min(looks[1:], key=lambda look: look["reference_kl"])  # random weights are no result
    assert outcome.row["best_step"] == best["step"] and outcome.row["agreement"] == best["agreement"]
    assert outcome.row["reference_kl"] == best["reference_kl"]


def test_dropout_is_on_in_the_student_off_in_the_teacher(teacher_folder, tmp_path, monkeypatch):
    torch.manual_seed(0)
    info = bundles.load(str(teacher_folder)).info.model_copy(update={"architecture": "hinton_1200"})
    bundles.save(tmp_path / "hinton", info, build("hinton_1200", image_shape=(1, 16, 16)).state_dict())
    modes = set()
    forward = without_batchnorm.HintonNet.forward

    def watched(self, x):
        modes.add((self.fc1.out_features, self.training, torch.is_grad_enabled()))
        return forward(self, x)

    monkeypatch.setattr(without_batchnorm.HintonNet, "forward", watched)
    config = config_of(tmp_path / "hinton", **HINTON_LIKE_TEACHER)
    assert trial.run(config, bundles.load(str(tmp_path / "hinton"))).row["status"] == "finished"
    assert (800, True, True) in modes  # training
    assert all(not training for _, training, with_grad in modes if not with_grad)
    assert not any(training for width, training, _ in modes if width == 1200)


def test_a_student_with_dropout_is_the_same_each_time_and_leaves_the_global_generator_alone(teacher, teacher_folder):
    states, draws = [], []
    for seed in (1, 2):
        torch.manual_seed(seed)
        outcome = trial.run(config_of(teacher_folder, **HINTON_LIKE_TEACHER), teacher)
        draws.append(torch.rand(3))
        torch.manual_seed(seed)
        draws.append(torch.rand(3))
        assert outcome.student is not None
        states.append((outcome.row["agreement"], outcome.row["reference_kl"], outcome.student.state_dict()))
    assert torch.equal(draws[0], draws[1]) and torch.equal(draws[2], draws[3])
    assert states[0][:2] == states[1][:2]
    assert all(torch.equal(tensor, states[1][2][name]) for name, tensor in states[0][2].items())


def test_a_resumed_training_with_dropout_gives_the_same_weights(tmp_path):
    from dfkd_ray import teachers

    images = torch.randint(0, 256, (64, 1, 8, 8), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    data = LabelledImages("made", lambda rows: images[rows], torch.arange(64) % 2, ("a", "b"), (1, 8, 8))
    config = TeacherTrainingConfig(
        architecture="hinton_1200", dataset="made", num_epochs=2, batch_size=16, learning_rate=0.02, num_threads=1
    )
    _, undisturbed = teachers.train(config, data)

    class Killed(Exception):
        pass

    write = teachers.write_checkpoint

    def kill(folder, *args):
        write(folder, *args)
        raise Killed

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        patch.setattr(teachers, "write_checkpoint", kill)
        teachers.train(config, data, checkpoint=tmp_path / "ckpt")
    _, resumed = teachers.train(config, data, checkpoint=tmp_path / "ckpt")
    other = resumed.state_dict()
    assert all(torch.equal(tensor, other[name]) for name, tensor in undisturbed.state_dict().items())


def test_tables_ladder_and_report_show_a_rung_that_is_not_there(teacher, teacher_folder, tmp_path, capsys):
    changes = [{"student.architecture": "lenet5_half"}, {"pruning.sparsity": 0.5}]
    outcomes = [
        trial.run(config_of(teacher_folder, **change), teacher, trial.Inputs(test=[Batch(0, *labelled(20), "test")]))
        for change in changes
    ]
    rows = [outcome.row for outcome in outcomes]
    for outcome in outcomes:
        results.write(tmp_path, "trials", [outcome.row], outcome.row["trial_id"])
        looks = [{"trial_id": outcome.row["trial_id"], **look} for look in outcome.epochs]
        results.write(tmp_path, "epochs", looks, outcome.row["trial_id"])
        results.write(tmp_path, "synthesis", outcome.synthesis, outcome.row["trial_id"])
    table = results.read(tmp_path, "trials")
    assert set(table["bn_reestimated_accuracy"].isna()) == set(table["bn_reestimated_agreement"].isna()) == {True}
    assert set(table["reference.synthesis.method"]) == {"noise"}
    assert set(table["reference.synthesis.num_steps"].isna()) == {True}
    show.print_ladder(rows[0], tmp_path)
    line = next(line for line in capsys.readouterr().out.splitlines() if "BN re-estimated" in line)
    assert [cell.strip() for cell in line.strip("│ ").split("│")][1:] == ["-", "-", "-"]
    report.write(tmp_path, tmp_path / "without.html")
    with_rung = {**rows[0], "trial_id": "t-0", "bn_reestimated_accuracy": 0.1, "bn_reestimated_agreement": 0.1}
    results.write(tmp_path, "trials", [with_rung], "t-0")
    report.write(tmp_path, tmp_path / "with.html")
    for name, there in (("without", False), ("with", True)):
        page = (tmp_path / f"{name}.html").read_text(encoding="utf-8")
        assert ("BN only" in page) is there and ("BN re-estimated" in page) is there


def test_the_reference_set_is_of_any_data_free_method_and_never_real():
    assert validate(TrialConfig, {"teacher": "t"}).reference.synthesis.method == "deepinversion"
    with pytest.raises(ValueError) as caught:
        validate(TrialConfig, {"teacher": "t", "reference": {"synthesis": {"method": "real"}}})
    says = "config: reference.synthesis.method: unknown method 'real'; expected deepinversion, records, noise, shapes"
    assert str(caught.value) == says
    with pytest.raises(ValueError, match=r"reference\.synthesis\.num_steps: unknown field"):
        validate(TrialConfig, {"teacher": "t", "reference": {"synthesis": {"method": "noise", "num_steps": 3}}})


def test_the_default_references_key_and_columns_are_those_of_before():
    """Rows and cached batches made before other methods came keep their meaning."""
    names = [name for name in results.schema("trials").names if name.startswith("reference.")]
    assert names[:4] == [
        "reference.num_images",
        "reference.synthesis.method",
        "reference.synthesis.seed",
        "reference.synthesis.batch_size",
    ]
    fields = {*DeepInversionConfig.model_fields, *RecordsConfig.model_fields, *NoiseConfig.model_fields}
    own = {"reference.num_images", "reference.mixed", "reference.mixed_with"}
    assert set(names) == own | {*(f"reference.synthesis.{field}" for field in fields)}
    assert len(names) == len(set(names))
    assert json.loads(str(results.schema("trials").metadata[b"dfkd_ray.schema"].rpartition(b"/")[2].decode())) == 8


def test_a_sweep_leaves_out_overrides_of_another_references_method(teacher_folder):
    base = tiny_trial(teacher_folder, **FIELDS)
    assert not applies("reference.synthesis.num_steps", base, {})
    assert applies("reference.synthesis.batch_size", base, {}) and applies("reference.num_images", base, {})
    assert applies("reference.synthesis.num_steps", {"teacher": "t"}, {})
    assert applies("reference.synthesis.nonsense", base, {})  # an error, told when it is validated


def test_estimates_count_a_reference_of_noise_as_a_synthesis(teacher, teacher_folder):
    jobs = sweep.plan([config_of(teacher_folder, **{"student.architecture": "lenet5_half"})], lambda _name: teacher)
    made = estimate.syntheses(jobs)
    assert [(one.domain, one.config.method, one.num_batches) for one in made] == [
        ("reference", "noise", 1),
        ("train", "noise", 2),
    ]
    whole = estimated(jobs, calibrated(jobs, cap_s=1.0), 1)
    assert whole.trials_h > 0 and whole.wall_s > 0
