"""Activation records as a whole: fitted in shards, written, read, refused, and what is reconstructed from them."""

import json
import shutil
from pathlib import Path

import jsonschema
import numpy as np
import pytest
import safetensors.torch
import torch
from torch import nn

from dfkd_ray import bundles, evaluation, synthesis, trial
from dfkd_ray.config import RecordsConfig, TrialConfig, validate
from dfkd_ray.records import finishing, fitting, format, taps
from dfkd_ray.synthesis import reconstruction
from helpers import make_teacher, refusal

LENET = {"architecture": "lenet5", "num_classes": 3, "image_shape": (1, 32, 32)}
CPU = torch.device("cpu")


def examples(num=90, num_classes=3, image_shape=(1, 32, 32), seed=0):
    """uint8 images whose class is how bright a third of them is."""
    rng = np.random.default_rng(seed)
    labels = np.arange(num) % num_classes
    images = rng.integers(0, 120, (num, *image_shape), dtype=np.uint8)
    height = image_shape[1] // num_classes
    for label in range(num_classes):
        images[labels == label, :, label * height : (label + 1) * height] += 130
    return torch.from_numpy(images), torch.from_numpy(labels)


def fitted(teacher, images, labels, kinds=format.KINDS, num_shards=1, **options):
    rows = np.arange(len(labels))
    plan = fitting.plan(teacher, labels.numpy(), rows, kinds, fitting.Options(rank=32, **options))
    totals = fitting.empty(plan)
    for shard in fitting.shards(lambda chosen: images[chosen], labels, rows, num_shards):
        totals.merge(fitting.fit(plan, teacher.network, shard))
    return finishing.finish(plan, totals, teacher)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A LeNet-5 for three classes."""
    return make_teacher(tmp_path_factory.mktemp("recorded") / "lenet")


@pytest.fixture(scope="module")
def records(plain):
    """All four records of it, fitted to all examples at once."""
    return fitted(plain, *examples())


@pytest.fixture(scope="module")
def teacher(plain, records):
    """The LeNet-5 with all four records in its bundle."""
    for record in records:
        bundles.save_record(str(plain.folder), record)
    return bundles.load(str(plain.folder))


# ---- fitting -------------------------------------------------------------------------------------------------------


def test_records_of_shards_are_the_record_of_the_whole(plain, records):
    for whole, parts in zip(records, fitted(plain, *examples(), num_shards=4), strict=True):
        assert whole.info == parts.info
        for name, tensor in whole.tensors.items():
            if name.endswith(".factor"):  # unique up to a rotation: what counts is the covariance
                own, other = (x @ x.transpose(1, 2) for x in (tensor.double(), parts.tensors[name].double()))
                assert (own - other).abs().max() <= 1e-3 * own.abs().max(), name  # float16
            elif tensor.is_floating_point():
                assert (tensor - parts.tensors[name]).abs().max() <= 1e-6 * tensor.abs().max(), name


def test_a_layers_part_holds_the_mean_and_covariance_of_its_outputs(teacher):
    images, labels = examples()
    with torch.no_grad(), taps.recorded(teacher.network, taps.find(teacher.network, (1, 32, 32))) as values:
        teacher.network((images.float() / 255 - 0.3) / 0.3)
        logits = values.outputs[-1] / 8.0
    for kind in ("top", "all"):
        record = teacher.record(kind)
        name = record.info.layers[-1].name
        for label in range(3):
            own = logits[labels == label].double()
            factor = record.tensors[f"{name}.factor"][label].double()
            torch.testing.assert_close(record.tensors[f"{name}.mean"][label].double(), own.mean(0), atol=1e-5, rtol=0)
            torch.testing.assert_close(factor @ factor.T, own.T.cov(), atol=1e-6, rtol=1e-3)
    assert [part.name for part in teacher.record("all").info.parts] == [
        x.name for x in teacher.record("all").info.layers
    ]
    assert teacher.record("all").info.parts[0].statistics == "low_rank", "6x28x28 units have no dense covariance"


class Heads(nn.Module):
    """Two linear heads, of which the mean is the answer (`both`), or the second; the ReLU works in place."""

    def __init__(self, both: bool):
        super().__init__()
        self.conv, self.relu = nn.Conv2d(1, 4, 3), nn.ReLU(inplace=True)
        self.a, self.b, self.both = nn.Linear(4, 3), nn.Linear(4, 3), both

    def forward(self, x):
        x = self.relu(self.conv(input=x)).mean((2, 3))
        first, second = self.a(x), self.b(x)
        return (first + second) / 2 if self.both else second


def test_values_are_those_before_a_relu_that_works_in_place_and_the_last_layer_gives_the_logits():
    torch.manual_seed(0)
    network, images = Heads(both=False).eval(), torch.randn(5, 1, 6, 6)
    found = taps.find(network, (1, 6, 6))
    assert [tap.name for tap in found] == ["conv", "a", "b"] and found[0].in_shape == (1, 6, 6)
    with taps.recorded(network, found) as values:
        logits = network(images)
    torch.testing.assert_close(values.outputs[0], network.conv(images).flatten(1))
    assert (values.outputs[0] < 0).any() and torch.equal(values.outputs[-1], logits)
    values.outputs[0].sum().backward()
    refusal(
        lambda: taps.find(Heads(both=True).eval(), (1, 6, 6)), "the last layer that runs, b, does not give the logits"
    )
    assert [tap.name for tap in taps.find(nn.Sequential(nn.Flatten(), nn.Linear(36, 3), nn.LogSoftmax(1)), (1, 6, 6))]


# The smallest records of the teacher above have 0.1 to 0.2 MB, the uncut ones 0.4 to 6 MB (top: 0.07).
@pytest.mark.parametrize("max_bytes", [250_000, 400_000, 1_000_000])
def test_every_record_has_at_most_the_bytes_asked_for_and_says_what_it_kept(teacher, max_bytes):
    uncut = {record.info.kind: record for record in fitted(teacher, *examples(), max_bytes=10**9)}
    for record in fitted(teacher, *examples(), max_bytes=max_bytes):
        size, kind = fitting.size_bytes(record), record.info.kind
        assert size <= max_bytes
        layers = format.layer_infos(taps.find(teacher.network, (1, 32, 32)))
        read = format.decode(format.encode(record), "r", teacher.hash, layers, kind)
        is_cut = fitting.size_bytes(uncut[kind]) > max_bytes
        assert is_cut == (kind != "top" and (size < fitting.size_bytes(uncut[kind])))
        if not is_cut:
            assert "explained_variance" not in record.info.notes
            assert all(torch.equal(tensor, uncut[kind].tensors[name]) for name, tensor in record.tensors.items())
        elif kind == "all":
            assert size > 0.7 * max_bytes
            assert all(0 < share <= 1 for share in record.info.notes["explained_variance"].values())
        targets = reconstruction.draw(read, torch.tensor([0, 1, 2]), torch.Generator().manual_seed(0))
        assert all(target.isfinite().all() for target in targets)


def test_the_size_is_known_before_any_image_is_read(teacher):
    images, labels = examples()
    for storage, kinds in (("gaussian", format.KINDS), ("exemplars", format.SPECTRAL)):
        options = fitting.Options(rank=32, storage=storage, num_exemplars=5)
        plan = fitting.plan(teacher, labels.numpy(), np.arange(len(labels)), kinds, options)
        most = {kind: fitting.largest_bytes(plan, kind) for kind in kinds}
        for record in fitted(teacher, images, labels, kinds, storage=storage, num_exemplars=5):
            size = fitting.size_bytes(record)
            assert size <= most[record.info.kind] <= 1.2 * size + 2**16


def test_a_limit_below_the_smallest_record_is_refused_before_the_pass(teacher):
    with pytest.raises(
        ValueError, match=r"`max_size` is 0\.07 MB: the smallest all record .* has 0\.\d+ MB; give more"
    ):
        fitted(teacher, *examples(), max_bytes=70_000)


def test_a_record_with_float32_factors_is_drawn_from_as_before(teacher, tmp_path):
    path, folder = copied(teacher, tmp_path, "all")

    def widened(header, tensors):
        for name in tensors:
            tensors[name] = tensors[name].float()

    rewritten(path, widened)
    record = bundles.load(str(folder)).record("all")
    found = reconstruction.draw(record, torch.tensor([2]), torch.Generator().manual_seed(3))
    generator = torch.Generator().manual_seed(3)
    for part, target in zip(record.info.parts, found, strict=True):
        mean, factor = (record.tensors[f"{part.name}.{what}"][2] for what in ("mean", "factor"))
        assert factor.dtype == torch.float32
        assert torch.equal(target, mean + torch.randn(1, part.rank, generator=generator) @ factor.T)


def test_a_spectral_record_with_all_coefficients_gives_the_signals_back(tmp_path):
    made = make_teacher(tmp_path / "t", "hinton_800", image_shape=(1, 4, 4))
    found = taps.find(made.network, (1, 4, 4))
    images, _ = examples(image_shape=(1, 4, 4))
    for kind in format.SPECTRAL:
        bases = fitting.make_bases(kind, made.network, found, rank=2000, seed=0)
        with torch.no_grad(), taps.recorded(made.network, found) as values:
            made.network(images.float() / 255)
            for signal, basis in zip(taps.basis_signals(kind, values, 8.0), bases, strict=True):
                if basis.shape[0] == basis.shape[1]:
                    torch.testing.assert_close(signal @ basis @ basis.T, signal, atol=1e-4, rtol=1e-3)
                torch.testing.assert_close(basis.T @ basis, torch.eye(basis.shape[1]), atol=1e-4, rtol=0)


def test_a_spectral_record_keeps_the_strongest_coefficients_and_says_how_many(teacher):
    for kind in format.SPECTRAL:
        info = teacher.record(kind).info
        num_units = sum(basis.units for basis in info.bases)
        kept = sum(basis.columns for basis in info.bases)
        assert info.parts[0].units == kept <= max(1, round(0.1 * num_units)) and info.share == 0.1


def test_a_class_with_one_example_and_a_unit_with_constant_output_are_recorded(tmp_path):
    made = make_teacher(tmp_path / "t", "hinton_800", image_shape=(1, 4, 4))
    with torch.no_grad():
        first = next(m for m in made.network.modules() if isinstance(m, torch.nn.Linear))
        first.weight[0], first.bias[0] = 0.0, 2.0
    images, labels = examples(61, image_shape=(1, 4, 4))
    labels[labels == 2] = 0
    labels[0] = 2
    records = fitted(made, images, labels)
    for record in records:
        assert record.info.num_examples[2] == 1
        assert all(tensor.isfinite().all() for tensor in record.tensors.values() if tensor.is_floating_point())
    shrunk = [part for part in records[-1].info.parts if any(part.shrinkage)]
    assert shrunk, "fewer examples than units: no covariance of full rank"


def test_activations_that_are_not_finite_are_refused_with_their_layer(tmp_path):
    made = make_teacher(tmp_path / "t")
    with torch.no_grad():
        layer = [m for m in made.network.modules() if isinstance(m, torch.nn.Conv2d)][1]
        assert layer.bias is not None
        layer.bias[0] = float("nan")
    with pytest.raises(ValueError, match=r"gives values that are not finite on one of the examples 0 to 89"):
        fitted(made, *examples())


def test_a_class_without_an_example_is_refused(tmp_path):
    images, labels = examples()
    with pytest.raises(ValueError, match="no example of class 2"):
        fitted(make_teacher(tmp_path / "t"), images[labels < 2], labels[labels < 2])


# ---- the file ------------------------------------------------------------------------------------------------------


def copied(teacher, tmp_path, kind):
    """The record's file in a bundle of its own, and the folder."""
    folder = tmp_path / "copy"
    (folder / "records").mkdir(parents=True)
    for name in ("teacher.json", "weights.safetensors", f"records/{kind}.safetensors"):
        (folder / name).write_bytes((teacher.folder.path / name).read_bytes())
    return folder / "records" / f"{kind}.safetensors", folder


def test_a_record_reads_back_as_written_and_travels_as_arrays(teacher):
    for kind in format.KINDS:
        record = teacher.record(kind)
        assert record.info.kind == kind and record.info.teacher_hash == teacher.hash and len(record.sha256) == 64
    there = bundles.from_arrays(bundles.to_arrays(teacher))
    for kind in format.KINDS:
        assert there.record(kind).info == teacher.record(kind).info
        assert there.record(kind).sha256 == teacher.record(kind).sha256
        for name, tensor in teacher.record(kind).tensors.items():
            assert torch.equal(tensor, there.record(kind).tensors[name])


def test_a_record_of_another_teacher_is_refused(teacher, tmp_path):
    path, _ = copied(teacher, tmp_path, "top")
    other = make_teacher(tmp_path / "other", seed=1)
    (tmp_path / "other" / "records").mkdir()
    path.rename(tmp_path / "other" / "records" / "top.safetensors")
    with pytest.raises(ValueError, match=r"recorded on teacher .* use the record that was released with it"):
        other.record("top")


@pytest.mark.parametrize("kind", format.KINDS)
def test_a_truncated_record_is_refused(teacher, tmp_path, kind):
    path, folder = copied(teacher, tmp_path, kind)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match="not a whole record"):
        bundles.load(str(folder)).record(kind)


def rewritten(path: Path, change) -> None:
    """The file with a change to its header (a dict) and tensors (a dict)."""
    with safetensors.safe_open(path, "pt") as file:
        header = json.loads(file.metadata()[format.METADATA])
    tensors = safetensors.torch.load_file(path)
    change(header, tensors)
    path.write_bytes(safetensors.torch.save(tensors, metadata={format.METADATA: json.dumps(header)}))


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (
            lambda h, t: t.update({"coefficients.mean": t["coefficients.mean"][:, :-1].contiguous()}),
            "coefficients.mean is 3x",
        ),
        (lambda h, t: t.pop("basis.0"), "basis.0 is missing"),
        (lambda h, t: t.update(more=torch.zeros(2)), "more is no tensor of a spectral_pairs record"),
        (lambda h, t: t["coefficients.factor"].fill_(float("nan")), "values that are not finite"),
        (lambda h, t: h.update(schema_version="dfkd_ray.record/9"), "schema_version is 'dfkd_ray.record/9'"),
        (lambda h, t: h["layers"].pop(), "its layers are"),
        (lambda h, t: h.update(temperature=0), "temperature"),
        (lambda h, t: h.update(colour="red"), "colour: unknown field"),
    ],
    ids=["shape", "missing", "unknown", "nan", "version", "layers", "range", "field"],
)
def test_a_record_that_is_not_what_its_header_says_is_refused(teacher, tmp_path, change, why):
    path, folder = copied(teacher, tmp_path, "spectral_pairs")
    rewritten(path, change)
    with pytest.raises(ValueError, match=why):
        bundles.load(str(folder)).record("spectral_pairs")


def test_the_schema_beside_the_module_is_that_of_the_header_and_accepts_every_record(teacher):
    schema = json.loads((Path(format.__file__).parent / "record.schema.json").read_text())
    assert schema == format.json_schema(), "write it anew: json.dumps(format.json_schema(), indent=1)"
    for kind in format.KINDS:
        jsonschema.validate(teacher.record(kind).info.model_dump(mode="json"), schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(teacher.record("top").info.model_dump(mode="json") | {"kind": "bottom"}, schema)


def test_exemplars_are_the_strongest_coefficients_of_single_examples(tmp_path):
    made = make_teacher(tmp_path / "t")
    with pytest.raises(ValueError, match="stored as spectral coefficients"):
        fitted(made, *examples(), kinds=("top",), storage="exemplars")
    for record in fitted(made, *examples(), kinds=format.SPECTRAL, storage="exemplars", num_exemplars=4):
        assert sorted(record.tensors["labels"].tolist()) == [0] * 4 + [1] * 4 + [2] * 4
        assert record.tensors["indices"].shape == record.tensors["values"].shape and "single" in record.info.leaks
        checked = format.from_arrays(format.to_arrays(record))
        target = reconstruction.draw(checked, torch.tensor([0, 1, 2, 2]), torch.Generator().manual_seed(0))[0]
        assert target.shape == (4, sum(basis.columns for basis in record.info.bases)) and (target != 0).any()


# ---- reconstruction ------------------------------------------------------------------------------------------------


def config_of(kind, **more) -> RecordsConfig:
    plain = {"record": kind, "batch_size": 12, "num_steps": 40, "num_threads": 1}
    return RecordsConfig.model_validate(plain | more)


@pytest.mark.parametrize("kind", format.KINDS)
def test_batches_are_deterministic_labelled_in_turn_and_closer_to_the_record_than_their_start(teacher, kind):
    key, make = synthesis.source(teacher, config_of(kind), CPU)
    again_key, again = synthesis.source(teacher, config_of(kind), CPU)
    batch = make(1)
    assert key == again_key and np.array_equal(batch.images, again(1).images)
    assert batch.labels.tolist() == [(12 + i) % 3 for i in range(12)] and batch.images.dtype == np.uint8
    start = synthesis.source(teacher, config_of(kind, num_steps=1), CPU)[1](1)
    assert batch.terms["record"] < 0.8 * start.terms["record"]
    assert not np.array_equal(batch.images, make(0).images)


def test_images_of_a_batch_do_not_touch_each_other(teacher):
    """A batch of the first half of the targets gives the first half of the images."""
    record = teacher.record("spectral_pairs")
    found = taps.find(teacher.network, (1, 32, 32))
    config = config_of("spectral_pairs", num_steps=20)
    labels = torch.arange(8) % 3
    generator = torch.Generator().manual_seed(0)
    drawn = reconstruction.draw(record, labels, generator)
    targets = reconstruction.targets_of(record, drawn, residual=True)
    parts = reconstruction.initial_parts(config.model_copy(update={"batch_size": 8}), (1, 32, 32), generator, CPU)

    def run(num):
        return reconstruction.reconstruct(
            teacher.network,
            found,
            record,
            config,
            teacher.info.space,
            [part[:num] for part in parts],
            [target[:num] for target in targets],
            labels[:num],
        )[0]

    assert float((run(8)[:4] - run(4)).abs().quantile(0.99)) < 1e-3  # but for rounding at the corners of ReLU


def test_a_spectral_loss_is_the_distance_of_coefficients_and_with_the_residual_that_of_signals(teacher):
    record, found = teacher.record("spectral_pairs"), taps.find(teacher.network, (1, 32, 32))
    drawn = reconstruction.draw(record, torch.tensor([0, 1, 2]), torch.Generator().manual_seed(0))
    with torch.no_grad(), taps.recorded(teacher.network, found) as values:
        teacher.network(torch.randn(3, 1, 32, 32, generator=torch.Generator().manual_seed(1)))
        signals = taps.basis_signals("spectral_pairs", values, record.info.temperature)
        targets = reconstruction.targets_of(record, drawn, residual=True)
        with_residual = reconstruction.record_term(record, values, targets, residual=True)
        without = reconstruction.record_term(record, values, drawn, residual=False)
    own = fitting.coefficients(signals, record.bases)
    num_units = sum(signal.shape[1] for signal in signals)
    kept = (drawn[0] - own).square().sum() / (3 * num_units)
    outside = (sum(signal.square().sum() for signal in signals) - own.square().sum()) / (3 * num_units)
    torch.testing.assert_close(without, kept)
    torch.testing.assert_close(with_residual, kept + outside, rtol=1e-2, atol=0)  # bases are rounded to float16


def test_a_layers_target_is_a_sample_and_not_the_covariance_times_noise(teacher):
    """The published sampler multiplies noise by Sigma; the moments of many samples tell the two apart."""
    record = teacher.record("top")
    (target,) = reconstruction.draw(record, torch.zeros(20_000, dtype=torch.long), torch.Generator().manual_seed(0))
    name = record.info.parts[0].name
    factor = record.tensors[f"{name}.factor"][0].float()
    torch.testing.assert_close(
        target.T.cov(), factor @ factor.T, rtol=0.05, atol=0.02 * float((factor @ factor.T).max())
    )


def test_frozen_dropout_holds_one_filter_for_a_whole_batch(tmp_path):
    made = make_teacher(tmp_path / "t", "hinton_1200", image_shape=(1, 8, 8))
    x = torch.rand(1, 1, 8, 8).expand(5, 1, 8, 8)
    with torch.no_grad():
        plain = made.network(x)
        with reconstruction.frozen_dropout(made.network, "frozen", 3):
            first, second = made.network(x), made.network(x)
        assert torch.equal(first, second) and torch.allclose(first, first[:1]) and not torch.allclose(first, plain)
        assert torch.equal(made.network(x), plain)
    with (
        pytest.raises(ValueError, match="no dropout layer"),
        reconstruction.frozen_dropout(make_teacher(tmp_path / "l").network, "frozen", 0),
    ):
        pass


def test_a_teacher_with_batchnorm_and_a_record_uses_both(tmp_path, tiny_teacher):
    folder = tmp_path / "both"
    folder.mkdir()
    for path in tiny_teacher.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    made = bundles.load(str(folder))
    for record in fitted(made, *examples(60, 10, (1, 16, 16)), kinds=("spectral_pairs",)):
        bundles.save_record(str(folder), record)
    made = bundles.load(str(folder))
    alone, both = (synthesis.source(made, config_of("spectral_pairs", bn_weight=w), CPU)[1](0) for w in (0.0, 1.0))
    assert "bn" in both.terms and "bn" not in alone.terms and not np.array_equal(alone.images, both.images)
    plain = config_of("top", bn_weight=1.0)
    lenet = make_teacher(tmp_path / "l")
    for record in fitted(lenet, *examples(), kinds=("top",)):
        bundles.save_record(str(tmp_path / "l"), record)
    with pytest.raises(ValueError, match="no BatchNorm layer"):
        synthesis.source(bundles.load(str(tmp_path / "l")), plain, CPU)


def test_a_trial_is_named_by_its_record_compared_on_its_mixtures_and_another_record_is_another_trial(
    teacher, tmp_path, monkeypatch
):
    settings = {"method": "records", "record": "top", "batch_size": 8, "num_steps": 3, "num_threads": 1}
    config = validate(
        TrialConfig,
        {
            "teacher": str(teacher.folder),
            "pruning": {"sparsity": 0},
            "student": {"architecture": "lenet5_half"},
            "synthesis": settings,
            "bn_num_images": 2,
            "reference": {"num_images": 8, "synthesis": settings},
            "distillation": {"num_images": 16, "num_steps": 4, "batch_size": 8, "num_threads": 1, "eval_every": 2},
            "device": "cpu",
        },
    )
    compared, real = [], evaluation.reference
    monkeypatch.setattr(evaluation, "reference", lambda *words: compared.append(words[1]) or real(*words))
    outcome = trial.run(config, teacher)
    (made,) = [row for row in outcome.synthesis if row["domain"] == "reference"]
    wanted = trial.Round(teacher, trial.pinned(config, teacher).reference.synthesis, CPU, "reference")
    ((batch, _),) = trial.Local().read(wanted, [0])
    assert made["method"] == "records" and compared[0].dtype == np.float32
    np.testing.assert_array_equal(compared[0], evaluation.mixtures(batch.images, teacher.info.space))
    sha256 = teacher.record("top").sha256
    assert outcome.row["status"] == "finished" and outcome.row["synthesis.record_sha256"] == sha256
    assert outcome.row["trial_id"] == trial.trial_id(trial.pinned(config, teacher), teacher)
    assert outcome.row["bn_reestimated_agreement"] is None, "there is no BatchNorm to re-estimate"
    path, folder = copied(teacher, tmp_path, "top")
    rewritten(path, lambda header, tensors: header["notes"].update(dataset="another"))
    assert trial.pinned(config, bundles.load(str(folder))) != trial.pinned(config, teacher)
    wrong = trial.pinned(config, teacher)
    with pytest.raises(ValueError, match="it is another one"):
        trial.pinned(wrong, bundles.load(str(folder)))
    with pytest.raises(ValueError, match=r"no all record in its bundle .*dfkd-ray teacher record"):
        trial.pinned(config.model_copy(update={"synthesis": config_of("all")}), bundles.load(str(folder)))


# ---- the command ---------------------------------------------------------------------------------------------------


@pytest.fixture
def dataset(tmp_path):
    """A folder data set of three classes, and an untrained LeNet-5 for it."""
    from PIL import Image

    images, labels = examples(24)
    for index, (image, label) in enumerate(zip(images, labels.tolist(), strict=True)):
        folder = tmp_path / "data" / "train" / f"class{label}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image[0].numpy()).save(folder / f"{index}.png")
    make_teacher(tmp_path / "t")
    return tmp_path / "data", tmp_path / "t"


def test_the_command_writes_all_records_prints_their_sizes_and_ray_workers_write_the_same(dataset, run_cli):
    data, folder = dataset
    words = ["teacher", "record", str(folder), "--dataset", str(data), "--rank", "8", "--threads", "1"]
    done = run_cli(*words)
    assert done.code == 0, done.err
    for kind in format.KINDS:
        size = (folder / "records" / f"{kind}.safetensors").stat().st_size
        assert f"{kind}: {size / 1e6:.2f} MB" in done.out
    assert "no single example" in done.out
    alone = bundles.load(str(folder)).record("spectral_pairs")
    done = run_cli(*words, "--workers", "2", "--kinds", "spectral_pairs")
    assert done.code == 0, done.err
    over_ray = bundles.load(str(folder)).record("spectral_pairs")
    assert over_ray.info.model_copy(update={"notes": {}}) == alone.info.model_copy(update={"notes": {}})
    torch.testing.assert_close(
        over_ray.tensors["coefficients.mean"], alone.tensors["coefficients.mean"], atol=1e-5, rtol=1e-5
    )
    told = run_cli("teacher", "info", str(folder))
    assert "records          all, spectral, spectral_pairs, top" in told.out


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["--kinds", "bottom"], ["--kinds bottom: expected top, all, spectral, spectral_pairs"]),
        (["--share", "0"], ["--share 0.0: expected a number above 0"]),
        (["--storage", "gauss"], ["expected gaussian or exemplars"]),
        (["--storage", "exemplars"], ["single training examples", "--allow-exemplars"]),
        (["--storage", "exemplars", "--allow-exemplars"], ["choose kinds spectral and spectral_pairs"]),
        (["--limit", "1"], ["no example of class"]),
        (["--max-size", "0"], ["--max-size 0.0: expected a number of MB above 0"]),
        (["--temperature", "-8"], ["--temperature -8: expected 1e-06 to 1e+06"]),
        (["--temperature", "nan"], ["--temperature nan: expected"]),
        (["--max-size", "nan"], ["--max-size nan: expected a number of MB above 0"]),
        (["--max-size", "0.07"], ["--max-size", "the smallest all record", "give more"]),
        (["--max-size", "9", "--storage", "exemplars", "--allow-exemplars"], ["--max-size bounds Gaussian records"]),
    ],
    ids=[
        *(
            "kind",
            "share",
            "storage",
            "exemplars",
            "kinds of exemplars",
            "class",
            "size",
            "temperature",
            "no temperature",
        ),
        *("nan", "small", "other"),
    ],
)
def test_wrong_words_are_one_line(dataset, run_cli, words, parts):
    data, folder = dataset
    done = run_cli("teacher", "record", str(folder), "--dataset", str(data), *words)
    assert done.code == 2 and len(done.err.splitlines()) == 1 and all(part in done.err for part in parts), done.err
    assert not (folder / "records").exists()


def test_a_kind_that_is_given_twice_is_recorded_once(dataset, run_cli):
    data, folder = dataset
    headers = []
    for kinds in (["top"], ["top, all", "top"]):
        words = [word for kind in kinds for word in ("--kinds", kind)]
        assert run_cli("teacher", "record", str(folder), "--dataset", str(data), *words).code == 0
        headers.append(bundles.load(str(folder)).record("top").info.num_examples)
        shutil.rmtree(folder / "records")
    assert headers[0] == headers[1]


def test_the_command_says_the_sizes_before_the_pass_and_keeps_to_them(dataset, run_cli):
    data, folder = dataset
    done = run_cli("teacher", "record", str(folder), "--dataset", str(data), "--max-size", "0.3", "--kinds", "top,all")
    assert done.code == 0, done.err
    lines = done.out.splitlines()
    assert lines[0].startswith("top: at most 0.") and "uncut" not in lines[0]
    assert lines[1].startswith("all: at most 0.30 MB (--max-size; uncut up to ")
    assert any("kept of the variance: conv1 " in line for line in lines)
    assert (folder / "records" / "all.safetensors").stat().st_size <= 300_000


def test_exemplars_are_written_when_allowed_and_said_to_be_what_they_are(dataset, run_cli):
    data, folder = dataset
    words = ["--storage", "exemplars", "--allow-exemplars", "--kinds", "spectral_pairs", "--rank", "8"]
    done = run_cli("teacher", "record", str(folder), "--dataset", str(data), *words)
    assert done.code == 0 and "compressed activations of single training examples" in done.out
    assert bundles.load(str(folder)).record("spectral_pairs").info.storage == "exemplars"
