"""Bundles as a format of export, with weights as they are or rounded to float16: what is kept, stated and refused."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

import dfkd_ray
from dfkd_ray import bundles, exporting
from dfkd_ray.batches import Batch
from dfkd_ray.bundles import Teacher
from dfkd_ray.compression import channels, pruning
from dfkd_ray.config import PruningConfig
from dfkd_ray.description import BundleInfo
from dfkd_ray.exporting import bundle_files, images
from helpers import refusal

RESNET = "fashion_mnist_resnet8"
WEIGHTS = "weights.safetensors"


@pytest.fixture(autouse=True)
def quick_images(monkeypatch):
    """Noise instead of synthesis."""

    def made(teacher, *_):
        generator = torch.Generator().manual_seed(1)
        return images.Images(torch.randn(24, *teacher.info.input_shape, generator=generator).numpy(), None, "noise")

    monkeypatch.setattr(images, "made", made)


def exported(network: Any, folder: Path, precision: str = "float16", **options: Any) -> exporting.Exported:
    return dfkd_ray.export(network, folder, format="bundle", precision=precision, **options)


def saved(folder: Path, change=lambda name, tensor: tensor, **described: Any) -> str:
    """A bundle of the trained ResNet-8 with changed weights, stored as a trial stores a pruned student."""
    dense = dfkd_ray.load(RESNET)
    state = {name: change(name, tensor) for name, tensor in dense.network.state_dict().items()}
    has_zeros = any(bool((state[name] == 0).any()) for name in pruning.prunable(dense.network))
    pruned = tuple(pruning.prunable(dense.network)) if has_zeros else ()
    bundles.save(folder, dense.info.model_copy(update=described), state, pruned)
    return str(folder)


def pruned(_name: str, tensor: Tensor) -> Tensor:
    """The largest quarter of a weight; the rest is zero."""
    if tensor.ndim < 2:
        return tensor
    return tensor * (tensor.abs() >= tensor.abs().flatten().kthvalue(int(0.75 * tensor.numel())).values)


def sliced(folder: Path) -> str:
    """A bundle with half of the channels."""
    dense = dfkd_ray.load(RESNET)
    config = PruningConfig(structure="channels", sparsity=0.5, importance="magnitude")
    found = channels.prepare(dense.network, dense.info.image_shape, config.importance)
    edits = channels.choose(dense.network, found, config).edits
    info = dense.info.model_copy(update={"shape_edits": edits, "schema_version": "dfkd_ray.bundle/2"})
    bundles.save(folder, info, channels.sliced(dense.network, edits).state_dict())
    return str(folder)


KINDS = {
    "pruned": lambda folder: saved(folder, pruned),
    "dense": saved,
    "channels": sliced,
    "independent labels": lambda folder: saved(folder, pruned, head="sigmoid"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_float16_weights_are_the_nearest_values_in_a_smaller_file_and_load_as_float32(kind, tmp_path):
    source = KINDS[kind](tmp_path / "student")
    done = exported(source, tmp_path / "low")
    before, after = bundles.load(source), bundles.load(str(done.path))
    parameters = {name for name, _ in before.network.named_parameters()}
    state = after.network.state_dict()
    for name, tensor in before.network.state_dict().items():
        wanted = tensor.half().float() if name in parameters else tensor
        assert state[name].dtype == tensor.dtype and torch.equal(state[name], wanted), name
    assert pruning.num_nonzero(after.network) == pruning.num_nonzero(before.network)
    size, largest = (done.path / WEIGHTS).stat().st_size, (tmp_path / "student" / WEIGHTS).stat().st_size
    assert size < 0.7 * largest and done.float32_bytes > done.size_bytes == sum(f.stat().st_size for f in done.files)
    assert (after.info.head, after.info.shape_edits) == (before.info.head, before.info.shape_edits)
    assert done.precision == "float16" and 0 < done.comparison.largest_difference < 0.05 * done.comparison.spread


def test_in_float32_the_weights_are_those_of_the_student_s_own_file(tmp_path):
    for number, source in enumerate((saved(tmp_path / "pruned", pruned), saved(tmp_path / "dense"))):
        done = exported(source, tmp_path / str(number), precision="float32")
        assert (done.path / WEIGHTS).read_bytes() == (Path(source) / WEIGHTS).read_bytes()
        assert bundles.load(str(done.path)).hash == bundles.load(source).hash
        assert bundles.load(str(done.path)).info == bundles.load(source).info


@pytest.mark.parametrize("precision", ["float32", "float16"])
def test_weights_that_are_float16_values_already_come_back_in_the_same_bytes(precision, tmp_path):
    first = exported(saved(tmp_path / "student", pruned), tmp_path / "first")
    again = exported(str(first.path), tmp_path / "again", precision=precision)
    assert (again.path / WEIGHTS).read_bytes() == (first.path / WEIGHTS).read_bytes()
    assert again.comparison.largest_difference < 1e-5
    assert bundles.read_info(again.path) == bundles.read_info(first.path), "where its weights are from is not forgotten"
    assert "rounded to the nearest float16 values" in again.card.read_text()


def test_what_is_too_small_for_float16_stays_a_value_and_is_counted(tmp_path):
    small = torch.tensor([1e-12, -3e-8, 2e-8, 0.0, -0.0, 6e-8, 1.0])
    low = bundle_files.nearest(small)
    assert low.dtype == torch.float16
    assert low.tolist() == [2.0**-24, -(2.0**-24), 2.0**-24, 0.0, 0.0, 2.0**-24, 1.0]
    assert torch.equal(torch.signbit(low), torch.signbit(small))

    def tiny(name: str, tensor: Tensor) -> Tensor:
        tensor = pruned(name, tensor).clone()
        if name == "fc.weight":
            tensor[0, :3] = torch.tensor([1e-12, -1e-20, 0.1])
        return tensor

    done = exported(saved(tmp_path / "student", tiny), tmp_path / "low")
    found = bundles.load(str(done.path))
    assert found.network.state_dict()["fc.weight"][0, :2].tolist() == [2.0**-24, -(2.0**-24)]
    assert found.info.notes["float16"]["num_raised"] == 2 and "2 values were too small" in done.card.read_text()


def test_a_value_that_float16_cannot_hold_is_refused_and_nothing_is_left(tmp_path, run_cli):
    source = saved(tmp_path / "student", lambda name, tensor: tensor * 1e6 if name == "conv1.weight" else tensor)
    refusal(lambda: exported(source, tmp_path / "low"), "conv1.weight", "at most 65504", "take float32")
    done = run_cli("export", source, "--format", "bundle", "--float16", "--out", str(tmp_path / "low"))
    assert done.code == 2 and "conv1.weight" in done.err.strip().splitlines()[-1], done.err
    assert [path.name for path in tmp_path.iterdir()] == ["student"]


def test_running_statistics_beyond_float16_stay_as_they_are(tmp_path):
    def wide(name: str, tensor: Tensor) -> Tensor:
        return tensor * 1e12 if name == "bn1.running_var" else tensor

    done = exported(saved(tmp_path / "student", wide), tmp_path / "low")
    before, after = (bundles.load(str(path)).network.state_dict() for path in (tmp_path / "student", done.path))
    assert float(after["bn1.running_var"].max()) > 65504
    assert torch.equal(after["bn1.running_var"], before["bn1.running_var"])


def test_a_network_in_memory_is_refused_before_images_are_made(tmp_path, monkeypatch):
    monkeypatch.setattr("dfkd_ray.exporting.images.made", lambda *_: pytest.fail("images were made"))
    network = nn.Sequential(nn.Flatten(), nn.Linear(4, 3))
    teacher = Teacher.from_network(network, num_classes=3, input_shape=(1, 2, 2), mean=0.5, std=0.5)
    for precision in ("float32", "float16"):
        refusal(
            lambda precision=precision: exported(teacher, tmp_path / "low", precision=precision),
            "in memory has no bundle",
        )
    assert list(tmp_path.iterdir()) == []


def test_card_and_description_say_what_was_rounded_and_claim_no_accuracy_that_was_not_measured(tmp_path):
    source = saved(tmp_path / "student", pruned, test_accuracy=0.75)
    done = exported(source, tmp_path / "low")
    info, text = bundles.read_info(done.path), done.card.read_text()
    assert info.test_accuracy is None
    own = bundles.read_info(source)
    assert info.notes["float16"] == {"weights_sha256": own.weights_sha256, "test_accuracy": 0.75, "num_raised": 0}
    for part in (
        "- float16",
        "dfkd_ray, float16.",
        own.weights_sha256,
        "| accuracy of this float16 file | not known |",
    ):
        assert part in text, part
    assert "**The accuracy of this float16 file is not known**" in text and "75.00 %" not in text
    assert "model-index" not in text and "zeros are stored" not in text and "stored dense" not in text
    stored = np.random.default_rng(0).integers(0, 256, (20, 1, 32, 32), dtype=np.uint8)
    test = [Batch(0, stored, np.arange(20) % 10, "of a test")]
    measured = exported(source, tmp_path / "measured", test=test)
    assert measured.accuracy is not None and f"| accuracy of this file | {100 * measured.accuracy:.2f} % |" in (
        measured.card.read_text()
    )
    refusal(lambda: exported(source, tmp_path / "low"), "there already")


def test_the_program_of_the_card_gives_the_logits_of_the_bundle(tmp_path, monkeypatch):
    done = exported(saved(tmp_path / "student", pruned), tmp_path / "low")
    program = done.card.read_text().split("```python\n")[1].split("```")[0]
    monkeypatch.chdir(tmp_path)
    given: dict[str, Any] = {"images": torch.zeros(2, 1, 32, 32)}
    exec(program, given)
    assert torch.equal(given["logits"], bundles.load("low").network(given["images"]))


def test_a_network_whose_architecture_is_trusted_code_is_a_bundle_of_that_code(tmp_path, monkeypatch):
    code = "from torch import nn\n\ndef tied(num_classes):\n    layer = nn.Conv2d(3, 3, 3, padding=1)\n"
    code += "    return nn.Sequential(layer, nn.ReLU(), layer, nn.Flatten(), nn.Linear(192, num_classes))\n"
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "code_of_a_user.py").write_text(code)
    monkeypatch.syspath_prepend(str(tmp_path / "code"))
    torch.manual_seed(0)
    layer = nn.Conv2d(3, 3, 3, padding=1)
    network = nn.Sequential(layer, nn.ReLU(), layer, nn.Flatten(), nn.Linear(192, 4))
    about = {
        "architecture": "code_of_a_user:tied",
        "arguments": {"num_classes": 4},
        "num_classes": 4,
        "input_shape": (3, 8, 8),
    }
    info = BundleInfo.model_validate({**about, "mean": (0.5,) * 3, "std": (0.5,) * 3})
    bundles.save(tmp_path / "student", info, network.state_dict())
    done = exported(dfkd_ray.load(str(tmp_path / "student"), trust_code="code_of_a_user"), tmp_path / "low")
    assert 'dfkd_ray.load("low", trust_code="code_of_a_user").network' in done.card.read_text()
    refusal(lambda: dfkd_ray.load(str(done.path)), "trust_code=code_of_a_user")
    state = dfkd_ray.load(str(done.path), trust_code="code_of_a_user").network.state_dict()
    assert all(torch.equal(state[name], tensor.half().float()) for name, tensor in network.state_dict().items())


def test_a_note_of_unknown_origin_rounds_nothing(tmp_path):
    """A bundle that says float16 and holds other values keeps them."""
    notes = {"float16": {"weights_sha256": "`<b>", "num_raised": "many"}}
    source = saved(tmp_path / "student", pruned, notes=notes)
    done = exported(source, tmp_path / "same", precision="float32")
    before, after = (bundles.load(str(path)).network.state_dict() for path in (source, done.path))
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert "`<b>" not in done.card.read_text().replace("`` `<b> ``", "")
    (tmp_path / "same" / "teacher.json").write_text(
        json.dumps(json.loads((tmp_path / "same" / "teacher.json").read_text()) | {"notes": {"float16": 3}})
    )
    assert exported(str(tmp_path / "same"), tmp_path / "other").precision == "float16"


def test_a_bundle_that_is_another_network_is_not_kept(tmp_path, monkeypatch):
    row = exporting.FORMATS["bundle"]

    def broken(teacher: Teacher, texts) -> dict[str, bytes]:
        network = dfkd_ray.load(RESNET).network
        nn.init.normal_(network.get_parameter("fc.weight"))
        return row.write(replace(teacher, network=network), texts)

    monkeypatch.setitem(exporting.FORMATS, "bundle", replace(row, write=broken))
    with pytest.raises(FloatingPointError, match="is not the network"):
        exported(RESNET, tmp_path / "low")
    assert list(tmp_path.iterdir()) == []


def test_rounded_tensors_are_float16_in_a_packed_file(tmp_path):
    done = exported(RESNET, tmp_path / "low")
    stored = safetensors.torch.load((done.path / WEIGHTS).read_bytes())
    state = bundles.from_stored(stored)
    parameters = {name for name, _ in dfkd_ray.load(RESNET).network.named_parameters()}
    assert {name for name, tensor in state.items() if tensor.dtype == torch.float16} == parameters
