"""Networks of timm, the Hugging Face Hub and torchvision by name: built, recorded, loaded, recovered, refused."""

import json
import re
import shlex
import sys
from collections import OrderedDict
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
import yaml
from PIL import Image
from torch import nn

import dfkd_ray
from dfkd_ray import batchnorm, bundles, config, models, results, sweep, synthesis, trial
from dfkd_ray.bundles import pretrained
from dfkd_ray.compression import pruning
from dfkd_ray.models import adapting, checks, libraries
from helpers import (
    CPU,
    TINY_SETS,
    assert_one_error,
    jobs_of,
    randomise_statistics,
    refusal,
    same_weights,
    set_words,
    tiny_sweep,
    tiny_trial,
    write_yaml,
)

timm = pytest.importorskip("timm")
hub = pytest.importorskip("huggingface_hub")

SMALL = "timm:test_byobnet?weights=random&num_classes=10&input=1x32x32"
NETWORK, REPOSITORY = "test_resnet", "timm/test_resnet.r160_in1k"  # small enough to write its 1,000 classes to a file
HUB_NAME = "someone/flowers"

# ---- architectures ---------------------------------------------------------------------------------------------------

NETWORKS = [
    ("timm:resnet10t", (3, 32, 32), {"channels": [16, 32, 64, 128]}),
    ("timm:regnetx_002", (3, 32, 32), {}),
    ("timm:efficientnet_b0", (3, 32, 32), {}),
    ("timm:efficientnet_lite0", (3, 32, 32), {}),
    ("timm:mobilenetv2_035", (3, 32, 32), {}),
    ("timm:mobilenetv3_small_050", (1, 32, 32), {}),
    ("timm:mobilenetv4_conv_small_035", (3, 32, 32), {}),
    ("timm:ghostnet_050", (3, 32, 32), {}),
    ("timm:densenet121", (3, 32, 32), {"growth_rate": 8}),
    ("timm:dpn48b", (3, 32, 32), {}),
    ("timm:vgg11_bn", (3, 32, 32), {"mlp_ratio": 1 / 64}),
    ("torchvision:shufflenet_v2_x0_5", (3, 32, 32), {}),
    ("timm:hrnet_w18_small", (3, 32, 32), {}),
    ("timm:inception_v3", (3, 75, 75), {}),
    ("timm:eca_resnext26ts", (3, 32, 32), {}),
]
TRIED = ("timm:resnet10t", "timm:ghostnet_050")  # MobileNetV3 is recovered by a command of the documents
ONE_STEP = {"method": "deepinversion", "batch_size": 4, "num_steps": 1, "num_threads": 1}


def of_library(architecture, shape, arguments):
    """A teacher in memory of a library's network whose BatchNorm layers do something."""
    torch.manual_seed(0)
    network = models.build(architecture, arguments, num_classes=10, image_shape=shape)
    randomise_statistics(network)
    channels = shape[0]
    of = {"num_classes": 10, "image_shape": shape, "mean": (0.5,) * channels, "std": (0.25,) * channels}
    info = bundles.BundleInfo(architecture=architecture, arguments=arguments, **of)
    return bundles.Teacher(bundles.freeze(network), info, bundles.teacher_hash(info), architecture)


@pytest.mark.parametrize(("architecture", "shape", "arguments"), NETWORKS, ids=[row[0] for row in NETWORKS])
def test_a_library_s_network_is_recorded_as_it_is_inverted_and_recovered(architecture, shape, arguments):
    teacher = of_library(architecture, shape, arguments)
    network = teacher.network
    images = torch.randn(2, *shape, generator=torch.Generator().manual_seed(1))
    inputs: dict[int, torch.Tensor] = {}

    def keep(layer, given):
        inputs[id(layer)] = given[0].clone()

    hooks = [layer.register_forward_pre_hook(keep) for layer in batchnorm.layers(network)]
    with torch.no_grad():
        expected = network(images)
        for hook in hooks:
            hook.remove()
        with batchnorm.recorded(network) as seen:
            torch.testing.assert_close(network(images), expected, atol=1e-4 * float(expected.abs().max()), rtol=1e-3)
    assert {id(layer) for layer in seen.layers} == set(inputs) and len(seen.layers) == len(inputs)
    for layer, mean, variance in zip(seen.layers, seen.means, seen.variances, strict=True):
        x = inputs[id(layer)]
        atol = 1e-4 * float(x.abs().max()) ** 2
        torch.testing.assert_close(mean, x.mean(dim=(0, 2, 3)), atol=atol, rtol=1e-3)
        torch.testing.assert_close(variance, x.var(dim=(0, 2, 3), correction=0), atol=atol, rtol=1e-3)
    batchnorm.check_recording(network, shape)
    settings = config.parse_synthesis(ONE_STEP)
    synthesis.check(teacher, settings)
    batch = synthesis.source(teacher, settings, CPU)[1](0)
    assert batch.images.shape == (4, *shape) and np.isfinite(batch.terms["bn"]) and batch.terms["bn"] > 0
    if architecture in TRIED:
        done = dfkd_ray.recover(teacher, sparsity=0.8, settings=TINY_SETS, progress=False)
        assert done.row["status"] == "finished" and done.row["achieved_sparsity"] == pytest.approx(0.8, abs=1e-3)


@pytest.mark.parametrize("name", ["convnext_atto", "test_vit"])
def test_without_batchnorm_a_network_is_refused_by_deepinversion_with_what_it_can_do(name, tmp_path):
    teacher = bundles.load(f"timm:{name}?weights=random&num_classes=10&input=3x32x32")
    settings = config.validate(config.TrialConfig, tiny_trial("t"))
    refusal(lambda: trial.check(settings, teacher, ()), "no BatchNorm", "method=records", "noise")
    noise = {"synthesis": {"method": "noise"}, "reference.synthesis": {"method": "noise"}}
    trial.check(config.validate(config.TrialConfig, tiny_trial("t", **noise)), teacher, ())


@pytest.mark.parametrize(
    ("architecture", "says"),
    [
        ("timm:resnet19", "timm:resnet18"),
        ("timm:resnet18.a9_in1k", "resnet18.a1_in1k"),
        ("timm:", "no such network"),
        ("timm:create_model", "no such network"),
        ("torchvision:resnet19", "torchvision:resnet18"),
        ("torchvision:resnet50.IMAGENET1K_V3", "resnet50.IMAGENET1K_V2"),
        ("torchvision:fasterrcnn_resnet50_fpn", "no such network"),
        ("hf-hub:flowers", "hf-hub:OWNER/NAME"),
        ("hf-hub:../../flowers", "hf-hub:OWNER/NAME"),
        ("hf-hub:nobody/nothing", "`download`"),
    ],
)
def test_an_unknown_name_is_refused_with_close_ones(architecture, says, caches):
    refusal(lambda: models.build(architecture, {}, num_classes=10, image_shape=(3, 32, 32)), says)


@pytest.mark.parametrize("library", ["timm:resnet10t", "torchvision:resnet18"])
@pytest.mark.parametrize(
    "argument",
    [
        "pretrained",
        "weights",
        "checkpoint_path",
        "pretrained_cfg",
        "pretrained_cfg_overlay",
        "cache_dir",
        "num_classes",
    ],
)
def test_a_bundle_makes_no_factory_fetch_or_read_weights(library, argument):
    refusal(lambda: models.build(library, {argument: 1}, num_classes=10, image_shape=(3, 32, 32)), argument)


def test_a_wrong_argument_is_one_line():
    says = "cannot be built", "widht"
    refusal(lambda: models.build("timm:resnet10t", {"widht": 1}, num_classes=10, image_shape=(3, 32, 32)), *says)


def test_a_network_that_is_too_large_is_refused_before_it_is_built(monkeypatch):
    def build():
        return models.build("timm:resnet10t", {}, num_classes=10, image_shape=(3, 32, 32))

    built = []
    monkeypatch.setattr(models.adapting, "to_float32", lambda *_: built.append(1))
    monkeypatch.setattr(checks, "MAX_VALUES", 1000)
    refusal(build, "does not take images of 3x32x32", "values an image")
    monkeypatch.setattr(checks, "MAX_PARAMETERS", 1000)
    refusal(build, "parameters, expected at most 1,000")
    assert not built


def test_networks_of_one_size_and_torchvisions_are_built_for_the_images_given():
    for architecture in ("timm:test_vit", "torchvision:shufflenet_v2_x0_5"):
        network = models.build(architecture, {}, num_classes=7, image_shape=(3, 64, 64))
        assert network(torch.zeros(2, 3, 64, 64)).shape == (2, 7)
    _, arguments = libraries.builder("torchvision:vit_b_16", {}, 7, (3, 64, 64))
    assert arguments["image_size"] == 64
    refusal(lambda: libraries.builder("torchvision:resnet18", {}, 7, (1, 64, 64)), "3 channels", "timm:NAME")


def test_a_user_s_code_still_needs_trust_and_a_library_does_not():
    assert [models.module_of(name) for name in ("timm:a", "hf-hub:a/b", "torchvision:a", "resnet8")] == [None] * 4
    assert models.module_of("timm.models:create_model") == "timm.models" and models.module_of("nets:make") == "nets"
    of = tiny_trial("t", **{"student.architecture": "timm.models:create_model", "pruning.sparsity": 0})
    settings = config.validate(config.TrialConfig, of)
    refusal(lambda: trial.starting_student(settings, bundles.load(SMALL), CPU, ()), "is code", "trust_code=timm.models")


def test_a_library_s_network_is_a_student(tiny_teacher):
    fields = {"student.architecture": "timm:test_byobnet", "pruning.sparsity": 0}
    settings = config.validate(config.TrialConfig, tiny_trial(tiny_teacher, **fields))
    outcome = trial.run(settings, bundles.load(str(tiny_teacher)))
    assert outcome.row["status"] == "finished", outcome.row["reason"]
    assert outcome.student_info is not None and outcome.student_info.architecture == "timm:test_byobnet"


def test_without_timm_one_line_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    for name in (SMALL, "hf-hub:someone/flowers"):
        refusal(lambda name=name: bundles.load(name), "pip install 'dfkd_ray[timm]'")


# ---- teachers by name ------------------------------------------------------------------------------------------------


@pytest.fixture
def caches(tmp_path, monkeypatch):
    """Empty caches of both libraries, and a record of what is asked of the network."""
    monkeypatch.setattr(hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    asked = []

    def unreachable(*words, **_):
        asked.append(words)
        raise ConnectionError("no route to the Hub")

    monkeypatch.setattr(hub, "hf_hub_download", unreachable)
    monkeypatch.setattr(torch.hub, "download_url_to_file", unreachable)
    return SimpleNamespace(folder=tmp_path, asked=asked)


def put_on_hub(folder, repository, files):
    """A repository in huggingface_hub's cache, laid out as that library does."""
    place = folder / "hub" / f"models--{repository.replace('/', '--')}"
    snapshot = place / "snapshots" / "0123abcd"
    (place / "blobs").mkdir(parents=True, exist_ok=True)
    (place / "refs").mkdir(exist_ok=True)
    snapshot.mkdir(parents=True, exist_ok=True)
    (place / "refs" / "main").write_text("0123abcd")
    for name, data in files.items():
        blob = place / "blobs" / f"blob-of-{name.replace('.', '-')}"
        blob.write_bytes(data)
        (snapshot / name).symlink_to(blob)


def made(**arguments):
    """A timm network with statistics that do something."""
    torch.manual_seed(0)
    network = timm.create_model(NETWORK, **arguments).eval()
    randomise_statistics(network)
    return network


def as_bytes(network):
    return safetensors.torch.save({name: tensor.contiguous() for name, tensor in network.state_dict().items()})


def test_a_library_s_weights_are_read_from_its_cache_offline(caches):
    network = made()
    put_on_hub(caches.folder, REPOSITORY, {"model.safetensors": as_bytes(network)})
    teacher = bundles.load(f"timm:{NETWORK}")
    known = timm.models.get_pretrained_cfg(NETWORK)
    info = teacher.info
    assert (info.mean, info.std, info.image_shape) == (known.mean, known.std, known.input_size)
    assert info.num_classes == 1000 and info.trained and info.pixel_range == (0, 1) and teacher.folder is None
    images = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(teacher.network(images), network(images))
    assert not caches.asked
    refusal(lambda: bundles.load(f"timm:{NETWORK}?num_classes=10"), "1000 classes", "weights=random")
    refusal(lambda: bundles.load(f"timm:{NETWORK}?input=1x32x32"), "3 channels", "teacher import")
    assert bundles.load(f"timm:{NETWORK}?input=3x64x64").info.image_shape == (3, 64, 64)


def test_weights_that_lack_a_tensor_or_hold_nan_are_refused(caches):
    state = made().state_dict()
    name = next(name for name in state if name.endswith("running_var"))
    for change in ({name: None}, {name: torch.full_like(state[name], float("nan"))}, {name: -state[name]}):
        files = {key: tensor for key, tensor in {**state, **change}.items() if tensor is not None}
        path = caches.folder / "hub"
        for old in path.rglob("*") if path.exists() else ():
            if not old.is_dir():
                old.unlink()
        put_on_hub(caches.folder, REPOSITORY, {"model.safetensors": safetensors.torch.save(files)})
        refusal(lambda: bundles.load(f"timm:{NETWORK}"), name)


@pytest.mark.parametrize("name", [f"timm:{NETWORK}", "torchvision:resnet18", "hf-hub:someone/flowers"])
def test_missing_weights_are_fetched_only_where_that_is_said(name, caches):
    refusal(lambda: bundles.load(name), "`download`")
    assert not caches.asked
    with pytest.raises(OSError, match="cannot be fetched: ConnectionError: no route to the Hub") as caught:
        bundles.load(name, download=True)
    assert caches.asked and "\n" not in str(caught.value)


def test_what_is_fetched_is_loaded_and_then_found_in_the_cache(caches, monkeypatch):
    fetched = []

    def fetch(repository, file, revision=None):
        fetched.append(file)
        if file != "pytorch_model.bin":
            raise hub.errors.EntryNotFoundError("404")
        torch.save(made().state_dict(), caches.folder / file)
        put_on_hub(caches.folder, repository, {file: (caches.folder / file).read_bytes()})
        return libraries.cached(repository, file)

    monkeypatch.setattr(hub, "hf_hub_download", fetch)
    first = bundles.load(f"timm:{NETWORK}", download=True)
    assert fetched == ["model.safetensors", "pytorch_model.bin"] and same_weights(first.network, made())
    assert bundles.load(f"timm:{NETWORK}").hash == first.hash and len(fetched) == 2


def test_a_pickle_that_runs_code_is_not_opened(caches):
    class Runs:
        def __reduce__(self):
            return (print, ("ran",))

    torch.save({"a": Runs()}, caches.folder / "bad.bin")
    put_on_hub(caches.folder, REPOSITORY, {"pytorch_model.bin": (caches.folder / "bad.bin").read_bytes()})
    refusal(lambda: bundles.load(f"timm:{NETWORK}"), "cannot be read as plain tensors")


def flowers(**more):
    known = {"num_classes": 3, "input_size": [1, 32, 32], "mean": [0.3], "std": [0.2], "label_names": ["a", "b", "c"]}
    return {"architecture": NETWORK, "pretrained_cfg": {**known, "fixed_input_size": False}, **more}


def test_a_network_of_the_hub_is_timm_s_with_its_own_classes_and_normalisation(caches):
    network = made(num_classes=3, in_chans=1, act_layer="silu")
    description = json.dumps(flowers(num_classes=3, model_args={"act_layer": "silu", "in_chans": 1})).encode()
    put_on_hub(caches.folder, HUB_NAME, {"config.json": description, "model.safetensors": as_bytes(network)})
    teacher = bundles.load(f"hf-hub:{HUB_NAME}")
    info = teacher.info
    assert (info.architecture, info.arguments) == (f"timm:{NETWORK}", {"act_layer": "silu"})
    assert (info.num_classes, info.image_shape, info.mean, info.class_names) == (3, (1, 32, 32), (0.3,), tuple("abc"))
    images = torch.randn(2, 1, 32, 32)
    torch.testing.assert_close(teacher.network(images), network(images))
    assert libraries.structure(f"hf-hub:{HUB_NAME}", {}) == (f"timm:{NETWORK}", {"act_layer": "silu"})
    student = models.build(f"hf-hub:{HUB_NAME}", {}, num_classes=5, image_shape=(1, 32, 32))
    assert student(images).shape == (2, 5)


@pytest.mark.parametrize(
    ("description", "says"),
    [
        ({"architectures": ["ResNetForImageClassification"], "model_type": "resnet"}, "dfkd_ray.recover"),
        ({"architecture": "no_such_net", "pretrained_cfg": {}}, "config is none of timm's"),
        (flowers(architecture="no_such_net"), "no such network"),
        (flowers(model_args={"checkpoint_path": "x"}), "checkpoint_path"),
        (flowers(model_args=[1]), "none of timm's"),
        ([1], "names no network"),
    ],
)
def test_a_description_that_is_none_of_timm_s_is_refused(description, says, caches):
    files = {"config.json": json.dumps(description).encode(), "model.safetensors": as_bytes(made(num_classes=3))}
    put_on_hub(caches.folder, HUB_NAME, files)
    refusal(lambda: bundles.load(f"hf-hub:{HUB_NAME}"), says)


def default_weights(architecture) -> Any:
    """torchvision's recommended weights of a network."""
    from torchvision import models as torchvision

    weights: Any = torchvision.get_model_weights(architecture)
    return weights.DEFAULT


def put_in_torch_hub(folder, architecture, state):
    url = default_weights(architecture).url
    path = folder / "torch" / "hub" / "checkpoints" / url.rpartition("/")[2]
    path.parent.mkdir(parents=True)
    torch.save(state, path)
    return path


def test_torchvision_s_weights_are_read_from_torch_hub_s_folder(caches, monkeypatch):
    from torchvision import models as torchvision

    network = torchvision.get_model("mnasnet0_5").eval()
    randomise_statistics(network)
    state = {k: v for k, v in network.state_dict().items() if not k.endswith("num_batches_tracked")}  # as of 2017
    path = put_in_torch_hub(caches.folder, "mnasnet0_5", state)
    refusal(lambda: bundles.load("torchvision:mnasnet0_5"), path.name, "SHA-256", "fetch it again")
    monkeypatch.setattr(pretrained, "URL_HASH", re.compile("none"))
    teacher = bundles.load("torchvision:mnasnet0_5?input=3x64x64")
    categories = default_weights("mnasnet0_5").meta["categories"]
    assert teacher.info.class_names == tuple(categories) and teacher.info.mean == (0.485, 0.456, 0.406)
    assert bundles.load("torchvision:mnasnet0_5.IMAGENET1K_V1").info.image_shape == (3, 224, 224)
    images = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(teacher.network(images), network(images))
    back = bundles.from_arrays(bundles.to_arrays(teacher))
    assert same_weights(back.network, teacher.network) and not caches.asked


def test_torchvision_s_googlenet_computes_what_torchvision_s_own_does(caches, monkeypatch):
    from torchvision import models as torchvision

    network = torchvision.googlenet(aux_logits=True, transform_input=True, init_weights=False).eval()
    randomise_statistics(network)
    put_in_torch_hub(caches.folder, "googlenet", network.state_dict())
    monkeypatch.setattr(pretrained, "URL_HASH", re.compile("none"))
    teacher = bundles.load("torchvision:googlenet?input=3x64x64")
    images = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(teacher.network(images), network(images), rtol=1e-3, atol=1e-3)
    assert not any(name.startswith("aux") for name in teacher.network.state_dict())


def test_densenets_of_2017_have_today_s_names():
    old = {"features.denseblock1.denselayer1.norm.1.weight": torch.ones(1), "classifier.bias": torch.ones(1)}
    today = pretrained.plain_names(old, "torchvision:densenet121")
    assert set(today) == {"features.denseblock1.denselayer1.norm1.weight", "classifier.bias"}


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ("", "'' is no option"),
        ("weights", "'weights' is no option"),
        ("weights=", "'weights=' is no option"),
        ("pretrained=1", "'pretrained=1' is no option"),
        ("num_classes=ten", "num_classes is 'ten'"),
        ("weights=random&num_classes=-1", "num_classes is '-1'"),
        ("weights=random&num_classes=1", "num_classes"),
        ("weights=random&num_classes=0", "num_classes"),
        ("weights=random&input=32", "CHANNELSxHEIGHTxWIDTH"),
        ("weights=random&input=3x32xx", "CHANNELSxHEIGHTxWIDTH"),
        ("weights=random&input=3x0x32", "input_shape"),
        ("weights=random&seed=x", "seed is 'x'"),
        ("seed=1", "seed goes with weights=random"),
        ("weights=random&weights=random", "weights is given twice"),
        ("weights=nowhere.safetensors", "nowhere.safetensors: no such weights file"),
        ("weights=.", "a folder, expected a file"),
    ],
)
def test_any_other_option_of_a_name_is_one_line(options, says, caches):
    refusal(lambda: bundles.load(f"timm:{NETWORK}?{options}"), says)


def test_a_name_says_which_random_weights_and_its_hash_follows():
    first, again, other = (bundles.load(name) for name in (SMALL, SMALL, f"{SMALL}&seed=1"))
    assert first.hash == again.hash != other.hash and not first.info.trained
    assert first.info.image_shape == (1, 32, 32) and first.name == "timm:test_byobnet"
    assert len(first.info.mean) == 1


def test_a_file_s_weights_have_the_hash_of_the_bundle_that_is_imported_of_it(run_cli, tmp_path):
    network = made(num_classes=10)
    torch.save(network.state_dict(), tmp_path / "own.pt")
    teacher = bundles.load(f"timm:{NETWORK}?weights={tmp_path / 'own.pt'}&num_classes=10")
    words = ["--architecture", f"timm:{NETWORK}", "--num-classes", "10", "--out", str(tmp_path / "net")]
    done = run_cli("teacher", "import", str(tmp_path / "own.pt"), *words)
    assert done.code == 0 and "as timm says: input_shape 3x160x160, mean 0.5" in done.out, done
    imported = bundles.load(str(tmp_path / "net"))
    assert imported.hash == teacher.hash and same_weights(imported.network, network)
    assert imported.info.class_names == ()
    says = "does not fit the architecture or class count"
    refusal(lambda: bundles.load(f"timm:{NETWORK}?weights={tmp_path / 'own.pt'}"), says)


def test_what_is_given_at_an_import_wins_over_the_library(run_cli, tmp_path):
    torch.save(made(num_classes=4, in_chans=1).state_dict(), tmp_path / "own.pt")
    words = ["--architecture", f"timm:{NETWORK}", "--num-classes", "4", "--input-shape", "1x32x32"]
    done = run_cli("teacher", "import", str(tmp_path / "own.pt"), *words, "--out", str(tmp_path / "net"))
    assert_one_error(done, 2, f"--mean, --std of timm:{NETWORK}: missing")
    done = run_cli(
        *("teacher", "import", str(tmp_path / "own.pt"), *words),
        *("--mean", "0.1", "--std", "0.2", "--out", str(tmp_path / "net")),
    )
    assert done.code == 0, done
    info = bundles.load(str(tmp_path / "net")).info
    assert (info.num_classes, info.image_shape, info.mean, info.std) == (4, (1, 32, 32), (0.1,), (0.2,))


def test_options_that_an_import_needs_are_named_all_at_once(run_cli, tmp_path):
    torch.save({}, tmp_path / "own.pt")
    file, out = str(tmp_path / "own.pt"), ("--out", str(tmp_path / "net"))
    done = run_cli("teacher", "import", file, "--architecture", "resnet18", "--std", "1,1,1", *out)
    assert_one_error(done, 2, "--num-classes, --input-shape, --mean of resnet18: missing")
    done = run_cli("teacher", "import", file, *out)
    assert_one_error(done, 2, "--architecture, --num-classes, --input-shape, --mean, --std: missing")
    done = run_cli("teacher", "import", SMALL, "--num-classes", "3", *out)
    assert_one_error(done, 2, "--num-classes", "says it itself")
    assert not (tmp_path / "net").exists()


def test_a_teacher_by_name_becomes_a_bundle_and_has_no_folder_before(run_cli, tmp_path):
    teacher = bundles.load(SMALL)
    assert teacher.record_kinds() == []
    refusal(lambda: teacher.record("top"), "no folder", "teacher import")
    refusal(lambda: bundles.check_record_target(SMALL, ["top"]), "no folder", "teacher import")
    assert_one_error(run_cli("teacher", "record", SMALL, "--dataset", "none"), 2, "no folder", "teacher import")
    done = run_cli("teacher", "import", SMALL, "--out", str(tmp_path / "net"))
    assert done.code == 0 and bundles.load(str(tmp_path / "net")).hash == teacher.hash, done
    done = run_cli("teacher", "init", "timm:test_byobnet", "--out", str(tmp_path / "init"))
    assert done.code == 0 and bundles.load(str(tmp_path / "init")).info.architecture == "timm:test_byobnet"


def test_each_command_has_the_option_that_fetches_weights(run_cli, caches):
    name, out = f"timm:{NETWORK}", ("--out", str(caches.folder / "out"))
    file = write_yaml(caches.folder / "s.yaml", tiny_sweep(name, {"pruning.sparsity": [0.5]}))
    for words in (
        ("recover", name, *out),
        ("synthesize", name, *out),
        ("teacher", "info", name),
        ("teacher", "import", name, *out),
        ("sweep", str(file), "--results", str(caches.folder / "results")),
    ):
        says = "its weights are not on this machine", "fetch them with --download", "?weights=FILE"
        assert_one_error(run_cli(*words), 2, *says)
        assert_one_error(run_cli(*words, "--download"), 3, "cannot be fetched: ConnectionError")
    assert not (caches.folder / "out").exists()


def test_the_trials_of_a_sweep_over_teachers_by_name_run_in_other_processes(tmp_path):
    other = SMALL.replace("test_byobnet", "test_efficientnet")
    for job in jobs_of(tiny_sweep(SMALL, {"teacher": [SMALL, other]})):
        there = replace(job, teacher=bundles.from_arrays(bundles.to_arrays(job.teacher)))  # as Ray sends it
        sweep.run_job(there, trial.Inputs(images=trial.Local(tmp_path / "cache")), tmp_path / "out")
    rows = results.read(tmp_path / "out", "trials")
    assert set(rows["status"]) == {"finished"} and set(rows["teacher"]) == {SMALL, other}
    for name in rows["trial_id"]:
        student = bundles.load(str(tmp_path / "out" / "students" / name))
        assert student.info.architecture in ("timm:test_byobnet", "timm:test_efficientnet")


# ---- output objects of transformers ----------------------------------------------------------------------------------


class Output(OrderedDict):
    """As transformers' ModelOutput: a dictionary whose entries are attributes too, and a tuple by number."""

    def __getattr__(self, name):
        return self[name]

    def __getitem__(self, key):
        return list(self.values())[key] if isinstance(key, int) else super().__getitem__(key)


@dataclass
class PlainOutput:
    logits: torch.Tensor
    hidden_states: None = None


class Classifier(nn.Module):
    """As an image classifier of transformers: takes `pixel_values` and `labels`, and gives an output object."""

    def __init__(self, kind):
        super().__init__()
        torch.manual_seed(0)
        self.kind, self.conv, self.bn = kind, nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
        self.classifier = nn.Linear(8, 5)

    def forward(self, pixel_values=None, labels=None, return_dict=None):
        features = torch.relu(self.bn(self.conv(pixel_values)))
        logits = self.classifier(features.mean(dim=(2, 3)))
        return self.kind(logits=logits) if self.kind is PlainOutput else self.kind(state=features, logits=logits)


@pytest.mark.parametrize("kind", [Output, PlainOutput])
def test_a_classifier_that_gives_an_output_object_is_recovered(kind):
    network = Classifier(kind)
    done = dfkd_ray.recover(
        network, image_shape=(3, 16, 16), num_classes=5, mean=0.5, std=0.5, settings=TINY_SETS, progress=False
    )
    images = torch.randn(4, 3, 16, 16)
    assert done.row["status"] == "finished" and done.student(images).shape == (4, 5)
    taken = bundles.Teacher.from_network(network, image_shape=(3, 16, 16), num_classes=5, mean=0.5, std=0.5).network
    torch.testing.assert_close(taken(images), network.eval()(images).logits)
    assert any("logits are taken" in note for note in adapting.notes(taken))


# ---- the documents ---------------------------------------------------------------------------------------------------

ROOT = Path(__file__).parents[1]
PAGES = (ROOT / "README.md", ROOT / "dfkd_ray/models/README.md")
FENCE = re.compile(r"^```(\w+)\n(.*?)^```$", re.M | re.S)
README, NETWORKS_PAGE = (page.read_text() for page in PAGES)
DOORS = README.partition("## Your own network")[2].partition("\n## ")[0]
FEW = {name: 2 if value == 8 else value for name, value in TINY_SETS.items()}  # images are of 224x224


def fences(text, language):
    return [block for kind, block in FENCE.findall(text) if kind == language]


def commands_in(block):
    """The words of each command, and the tiny settings, which are no part of the document."""
    for line in block.replace("\\\n", " ").splitlines():
        command, *words = shlex.split(line, comments=True)
        assert command == "dfkd-ray", line
        yield [*words, *set_words(FEW), "--cache", "cache"] if words[0] == "recover" else words


def run_python(block, settings, **given):
    """The names that a block of Python leaves; `recover` has tiny settings too, which are no part of the document."""
    names, recover = dict(given), dfkd_ray.recover
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dfkd_ray, "recover", lambda *args, **named: recover(*args, settings=settings, **named))
        exec(compile(block, "README", "exec"), names)  # the document's own words
    return names


@pytest.fixture
def filled_caches(caches, monkeypatch):
    """The caches with the networks that the documents name, and the working folder with own weights."""
    from torchvision import models as torchvision

    for name in ("mobilenetv3_small_050", "convnext_atto"):
        network = timm.create_model(name).eval()
        put_on_hub(
            caches.folder, timm.models.get_pretrained_cfg(name).hf_hub_id, {"model.safetensors": as_bytes(network)}
        )
    description = json.dumps(flowers(num_classes=3, model_args={"in_chans": 1})).encode()
    files = {"config.json": description, "model.safetensors": as_bytes(made(num_classes=3, in_chans=1))}
    put_on_hub(caches.folder, "OWNER/NAME", files)
    put_in_torch_hub(caches.folder, "shufflenet_v2_x0_5", torchvision.get_model("shufflenet_v2_x0_5").state_dict())
    monkeypatch.setattr(pretrained, "URL_HASH", re.compile("none"))
    monkeypatch.chdir(caches.folder)
    torch.save(timm.create_model("mobilenetv3_small_050", num_classes=10).state_dict(), "weights.pt")
    return caches


OWN = """
from torch import nn

def make(depth):
    layers = [nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU()]
    for _ in range(depth):
        layers += [nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10))
"""


def own_network(folder):
    """A package with a network, its weights, and a folder of test images with a class for each of its outputs."""
    (folder / "my_package").mkdir()
    (folder / "my_package" / "nets.py").write_text(OWN)
    names = {}
    exec(OWN, names)
    network = names["make"](3)
    randomise_statistics(network)
    torch.save({"state_dict": network.state_dict()}, folder / "own.pt")
    for number in range(10):
        place = folder / "path" / "to" / "folder" / "test" / f"class {number}"
        place.mkdir(parents=True)
        Image.new("RGB", (32, 32), (20 * number, 100, 100)).save(place / "0.png")
    return network


def test_the_doors_of_the_readme_run_as_written(run_cli, filled_caches):
    own_network(filled_caches.folder)
    library, own = (list(commands_in(block)) for block in fences(DOORS, "sh"))
    assert [words[0] for words in library] == ["recover"] * 3 and [words[0] for words in own].count("recover") == 1
    for words in (*library, *own):
        done = run_cli(*words)
        assert done.code == 0, (words, done)
        out = words[words.index("--out") + 1]
        if words[0] == "recover":
            row = json.loads(Path(out, "row.json").read_text())
            assert row["status"] == "finished" and row["teacher"] == words[1]
            assert row["achieved_sparsity"] == pytest.approx(0.75, abs=0.01)
            assert row["num_test_images"] == (10 if "--test-data" in words else None)
    about = dfkd_ray.load("own", "my_package.nets").info
    assert (about.input_shape, about.mean, about.arguments) == ((3, 32, 32), (0.5,) * 3, {"depth": 3})
    assert_one_error(run_cli("teacher", "info", "own"), 2, "--trust-code")
    assert not filled_caches.asked


def test_the_readme_s_network_in_memory_runs_as_written(tmp_path):
    (block,) = fences(DOORS, "python")
    done = run_python(block, TINY_SETS, network=own_network(tmp_path))["done"]
    assert done.row["status"] == "finished" and done.images.shape == (8, 3, 32, 32)
    assert done.student(torch.zeros(2, 3, 32, 32)).shape == (2, 10)
    assert len(block.splitlines()) <= 10 and all(len(text.splitlines()) <= 10 for text in fences(DOORS, "sh"))


def test_the_commands_of_the_page_on_networks_run_as_written(run_cli, filled_caches):
    lines = [words for block in fences(NETWORKS_PAGE, "sh") for words in commands_in(block)]
    lines = [words for words in lines if not any("student.weights" in word for word in words)]  # in test_starts.py
    done = {words[words.index("--out") + 1]: run_cli(*words) for words in lines}
    assert len(done) == len(lines) >= 4 and all(each.code == 0 for each in done.values()), done
    assert not filled_caches.asked
    of_random_weights(run_cli, done["runs/random"])


def of_random_weights(run_cli, done):
    """The network of random weights has become a student, and nothing untrue is said of either."""
    row = json.loads(Path("runs/random/row.json").read_text())
    assert row["status"] == "finished" and row["teacher"].startswith("timm:mobilenetv3_small_050?weights=random")
    assert row["num_test_images"] is None and row["test_set"] is None
    student = dfkd_ray.load("runs/random/student")
    assert student.info.architecture == "timm:mobilenetv3_small_050"
    assert student.network(torch.zeros(2, 3, 32, 32)).shape == (2, 10)
    assert row["num_parameters"] == sum(p.numel() for p in student.network.parameters())
    assert pruning.achieved_sparsity(student.network) == row["achieved_sparsity"] == pytest.approx(0.75, abs=1e-3)
    about = run_cli("teacher", "info", "runs/random/student")
    # Nobody has trained it, so nothing is wrong with its statistics, and it knows nothing of its test accuracy.
    for line in ("trained          NO: random weights", "test accuracy    unknown", "images           3x32x32"):
        assert line in about.out
    assert "warning" not in done.err + about.err and "its BatchNorm statistics" not in done.out


def test_the_page_s_signals_with_independent_labels_run_as_written():
    (block,) = [block for block in fences(NETWORKS_PAGE, "python") if "signals" in block]
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv1d(2, 4, 9), nn.BatchNorm1d(4), nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(4, 5)
    )
    rng = np.random.default_rng(0)
    signals, labels = rng.integers(0, 256, (6, 2, 1000), np.uint8), rng.integers(0, 2, (6, 5))
    row = run_python(block, TINY_SETS, network=network, signals=signals, labels=labels)["done"].row
    right = (network.eval()((torch.from_numpy(signals) / 255 - 0.5) / 0.25).detach().numpy() > 0) == labels
    assert row["teacher_accuracy"] == pytest.approx(right.mean(), abs=2 / 30) and row["test_set"] == "name"


def test_the_documents_python_with_a_classifier_of_transformers_runs_as_written(monkeypatch):
    (text,) = [text for text in fences(NETWORKS_PAGE, "python") if "transformers" in text]
    network: Any = Classifier(PlainOutput)
    network.config, saved = SimpleNamespace(num_labels=5), []
    monkeypatch.setattr(Classifier, "save_pretrained", lambda _self, place: saved.append(place), raising=False)

    class Processor:
        image_mean, image_std = [0.4, 0.5, 0.6], [0.2, 0.2, 0.2]

        def __call__(self, image, return_tensors):
            assert image.mode == "RGB" and return_tensors == "pt"
            return {"pixel_values": torch.zeros(1, 3, 16, 16)}

    stub = SimpleNamespace(
        AutoModelForImageClassification=SimpleNamespace(from_pretrained=lambda _name: network),
        AutoImageProcessor=SimpleNamespace(from_pretrained=lambda _name: Processor()),
    )
    monkeypatch.setitem(sys.modules, "transformers", stub)
    ran = run_python(text, TINY_SETS)
    assert ran["done"].row["status"] == "finished" and saved == ["student"]
    assert ran["done"].images.shape[1:] == (3, 16, 16)


def test_the_documents_sweep_over_libraries_networks_is_valid():
    (text,) = fences(NETWORKS_PAGE, "yaml")
    trials = sweep.expand(sweep.parse(yaml.safe_load(text)), {})
    named = [pretrained.parse(settings.teacher) for settings in trials]
    assert [request.name for request in named] == ["timm:resnet18", "torchvision:resnet18", "timm:resnet26"]
    assert named[2].weights == "own.safetensors" and named[2].num_classes == 10
