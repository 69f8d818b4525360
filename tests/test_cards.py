"""Model cards of exported networks: what is known and where from, what is not known, and no text that is markup."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from markdown_it import MarkdownIt
from torch import nn

import dfkd_ray
from dfkd_ray import bundles, exporting, trial
from dfkd_ray.batches import Batch
from dfkd_ray.bundles import Teacher
from dfkd_ray.config import TrialConfig, validate
from dfkd_ray.exporting import card, card_metadata, images, markdown, origins
from helpers import TINY_INFO, TINY_NOISE, make_teacher, refusal, tiny_network, tiny_trial

HOSTILE = [
    "</code><script>alert(1)</script>",
    "![x](http://a/b.png) [y](javascript:1) <img src=x onerror=1>",
    "`` ` ``` ~~~ ` | --- |",
    "a\n---\ntags: [x]\n# heading\n* item",
    "---",
    "\u202e\x1b[31m&lt;b&gt; \\` $x$ @user #1 http://a.b www.a.b",
    "{{ x }} {0} %s !!python/object:os.system [a]: http://b",
]


@pytest.fixture(autouse=True)
def quick_images(monkeypatch):
    """Noise instead of synthesis."""

    def made(teacher, calibrates, *_):
        generator = torch.Generator().manual_seed(1)
        drawn = torch.randn(24, *teacher.info.input_shape, generator=generator).numpy()
        return images.Images(drawn, drawn if calibrates else None, "noise of a test")

    monkeypatch.setattr(images, "made", made)


def of(done: exporting.Exported) -> tuple[dict[str, Any], str]:
    """A written card's metadata and its text."""
    return parts(done.card.read_text(encoding="utf-8"))


def parts(text: str) -> tuple[dict[str, Any], str]:
    """A card's metadata and its text."""
    _, front, body = text.split("---\n", 2)
    return yaml.safe_load(front), body


def exported(network: Any, folder: Path, **options: Any) -> exporting.Exported:
    """Written as source code, the quickest format."""
    return dfkd_ray.export(network, folder, format="torch", **options)


def test_batches() -> list[Batch]:
    stored = np.random.default_rng(0).integers(0, 256, (20, *TINY_INFO.image_shape), dtype=np.uint8)
    return [Batch(0, stored, np.arange(20) % 10, "/home/somebody/pictures/test")]


test_batches.__test__ = False  # type: ignore[attr-defined]


@pytest.fixture(scope="module")
def recovered(tmp_path_factory) -> Path:
    """The folder of a recovery, as the command writes it: a student and its row."""
    place = tmp_path_factory.mktemp("recovery")
    teacher = Teacher(bundles.freeze(tiny_network()), TINY_INFO, bundles.teacher_hash(TINY_INFO), "tiny")
    config = validate(TrialConfig, tiny_trial("tiny", synthesis=TINY_NOISE, **{"pruning.sparsity": 0.5}), "test")
    outcome = trial.run(config, teacher, trial.Inputs(test_batches()))
    assert outcome.row["status"] == "finished", outcome.row["reason"]
    outcome.save_student(place / "student")
    (place / "row.json").write_text(json.dumps(outcome.row))
    return place


def test_the_card_of_a_student_has_the_numbers_of_its_row_and_says_where_they_are_from(recovered, tmp_path):
    row = json.loads((recovered / "row.json").read_text())
    done = exported(recovered / "student", tmp_path / "net")
    front, body = of(done)
    assert front["library_name"] == "pytorch" and front["pipeline_tag"] == "image-classification"
    assert {"dfkd-ray", "torch", "pruning", "knowledge-distillation", "data-free"} == set(front["tags"])
    for name in ("teacher_accuracy", "pruned_accuracy", "recovered_accuracy", "agreement"):
        assert f"{100 * row[name]:.2f} %" in body, name
    (result,) = front["model-index"][0]["results"]
    assert result["metrics"][0]["value"] == pytest.approx(row["recovered_accuracy"], abs=1e-6)
    assert result["dataset"] == {"type": "pictures-test", "name": "pictures/test"}
    assert row["test_sha256"][:12] in body and "20 images" in body
    for part in (row["teacher_hash"], row["trial_id"], row["commit"], f"{row['num_macs']:,}", "sparsity 0.5"):
        assert str(part) in body
    assert f"{row['reference_kl']:.3g}" in body and "without data" in body and "No real image was used" in body
    assert "do not make it faster" in body and "No claim of privacy" in body
    assert "somebody" not in body and str(tmp_path) not in body, "no path of this machine"


def test_without_its_row_the_card_has_what_the_bundle_says_and_says_what_is_missing(recovered, tmp_path):
    bundle = bundles.load(str(recovered / "student"))
    alone = replace(bundle, folder=None)
    _, body = of(exported(alone, tmp_path / "net"))
    assert bundle.info.test_accuracy is not None
    assert "The row of its trial was not found" in body and "Images: method `noise`" in body
    assert f"{100 * bundle.info.test_accuracy:.2f} %" in body and "as its bundle says" in body


def test_the_row_of_another_trial_is_not_taken(recovered, tmp_path):
    bundle = bundles.load(str(recovered / "student"))
    row = json.loads((recovered / "row.json").read_text()) | {"trial_id": "t-000000000000"}
    refusal(lambda: exported(bundle, tmp_path / "net", row=row), "t-000000000000", bundle.info.notes["trial_id"])
    assert list(tmp_path.iterdir()) == []
    for text in (json.dumps(row), "[", "[1]", json.dumps(row | {"trial_id": None})):
        place = tmp_path / "recovery"
        bundles.save(place / "student", bundle.info, bundle.network.state_dict())
        (place / "row.json").write_text(text)
        assert origins.row_of(bundles.load(str(place / "student"))) is None


def test_the_row_of_a_student_of_a_sweep_is_found_in_its_table(recovered, tmp_path):
    from dfkd_ray import results

    row = json.loads((recovered / "row.json").read_text())
    results.write(tmp_path, "trials", [row], row["trial_id"])
    bundle = bundles.load(str(recovered / "student"))
    bundles.save(tmp_path / "students" / row["trial_id"], bundle.info, bundle.network.state_dict())
    found = origins.row_of(bundles.load(str(tmp_path / "students" / row["trial_id"])))
    assert found is not None and found["agreement"] == row["agreement"]


def test_a_network_without_an_origin_has_a_card_that_says_what_is_not_known(tmp_path):
    teacher = make_teacher(tmp_path / "own", num_classes=4)
    front, body = of(exported(teacher, tmp_path / "net"))
    assert front == {"library_name": "pytorch", "pipeline_tag": "image-classification", "tags": ["dfkd-ray", "torch"]}
    for part in ("It is not trained", "is not known here", "| accuracy | not known |", "The accuracy of this network"):
        assert part in body
    assert "licence" in body and "No real image" not in body


def test_the_accuracy_of_an_int8_file_is_the_one_measured_on_it_or_not_known(recovered, tmp_path):
    """The card is made from what `export` returns: no file is quantised here, which takes long."""
    bundle = bundles.load(str(recovered / "student"))
    row, name = json.loads((recovered / "row.json").read_text()), tmp_path / "net"
    assert bundle.info.test_accuracy is not None
    done = replace(exported(bundle, name, test=test_batches()), precision="int8", format="onnx", accuracy=0.3125)
    front, body = parts(card.text(done, bundle, row))
    assert front["model-index"][0]["results"][0]["metrics"][0]["value"] == 0.3125
    assert "| accuracy of this file | 31.25 % | `pictures/test` (20 images" in body and "int8" in front["tags"]
    worse = replace(done, accuracy=None, test_set=None, warning="the int8 file answers differently")
    front, body = parts(card.text(worse, bundle, row))
    assert "* The int8 file answers differently.\n" in body
    assert "model-index" not in front and "| accuracy of this int8 file | not known |" in body
    assert "static quantisation" in body and "**The accuracy of this int8 file is not known**" in body


@pytest.mark.parametrize(
    ("teacher", "base"),
    [
        ("hf-hub:owner/name", "owner/name"),
        ("hf-hub:owner/name@main", "owner/name"),
        ("hf-hub:owner/name?weights=random", None),
        ("hf-hub:owner/name?weights=/home/a.pt", None),
        ("timm:resnet18", None),
        ("/data/teachers/mine", None),
    ],
)
def test_the_base_model_is_named_only_if_its_weights_are_from_the_hub(teacher, base, recovered, tmp_path):
    row = json.loads((recovered / "row.json").read_text()) | {"teacher": teacher}
    front, body = of(exported(recovered / "student", tmp_path / "net", row=row))
    assert front.get("base_model") == base and "/home/" not in body and "/data/" not in body


def test_real_images_and_records_are_said():
    facts = {"trial_id": "t-0", "synthesis.method": "real", "real_data": True}
    assert "**The images are real**" in " ".join(card.of_trial(facts))
    assert card.techniques(facts) == ("knowledge-distillation",)
    said = " ".join(card.of_trial({"trial_id": "t-0", "synthesis.method": "records"}))
    assert "statistics that were taken from training data" in said and "No real image" not in said


# ---- nothing from outside is markup ----------------------------------------------------------------------------------


def shape_of(body: str) -> list[tuple[str, str]]:
    """The structure of a text in Markdown: all tokens but what is in code."""
    parser = MarkdownIt("gfm-like", {"linkify": False}).enable("table")
    tokens = parser.parse(body)
    flat = [inner for token in tokens for inner in (token, *(token.children or []))]
    return [(token.type, token.tag) for token in flat]


@pytest.mark.parametrize("word", HOSTILE)
def test_no_text_from_outside_is_markdown_html_or_yaml(word, recovered, tmp_path):
    bundle, row = bundles.load(str(recovered / "student")), json.loads((recovered / "row.json").read_text())

    def card_of(word: str) -> tuple[dict[str, Any], str]:
        info = bundle.info.model_copy(update={"class_names": (word,) * 10, "architecture": word, "dataset": word})
        texts = ("teacher", "teacher_hash", "commit", "package_version", "torch_version", "test_set")
        texts += ("pruning.structure", "synthesis.method", "test_sha256")
        own = row | dict.fromkeys(texts, word) | {"class_histogram": word}
        teacher = replace(bundle, info=info, name=word)
        done = exported(teacher, tmp_path / f"{len(list(tmp_path.iterdir()))}", row=own)
        return of(done)

    front, body = card_of(word)
    plain_front, plain_body = card_of("plain")
    assert front.keys() == plain_front.keys() and front["tags"] == plain_front["tags"]
    assert shape_of(body) == shape_of(plain_body)
    assert "html_inline" not in dict(shape_of(body)) and "\x1b" not in body and "\u202e" not in body


@pytest.mark.parametrize("word", [*HOSTILE, "`", "", "   ", "a" * 500])
def test_a_code_span_gives_its_text_back(word):
    text = markdown.code(word)
    (token,) = [each for each in MarkdownIt().parseInline(text)[0].children or [] if each.type != "text"]
    assert token.type == "code_inline" and "\n" not in text
    if len(word) < 100 and word.isprintable() and word.strip():
        assert token.content == " ".join(word.split())


def test_the_metadata_are_those_of_huggingface_hub(tmp_path):
    hub = pytest.importorskip("huggingface_hub")
    found = card_metadata.metadata(
        "x: y",
        "onnx",
        "int8",
        is_of_images=True,
        techniques=("pruning",),
        base_model="owner/name",
        accuracy=0.9375,
        test_set="Fashion: MNIST",
    )
    result = hub.EvalResult(
        task_type="image-classification",
        dataset_type="fashion-mnist",
        dataset_name="Fashion: MNIST",
        metric_type="accuracy",
        metric_value=0.9375,
        metric_name="Test accuracy",
    )
    theirs = hub.ModelCardData(
        library_name="onnx",
        pipeline_tag="image-classification",
        tags=["dfkd-ray", "onnx", "int8", "pruning"],
        base_model="owner/name",
        model_name="x: y",
        eval_results=[result],
    )
    assert found == theirs.to_dict() == yaml.safe_load(theirs.to_yaml())
    read = hub.ModelCard(f"{card_metadata.front(found)}\n\n# x\n")
    assert read.data.to_dict() == found and read.data.eval_results == [result]


def test_signals_are_no_image_classification_and_a_card_needs_no_extra(tmp_path, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    network = nn.Sequential(nn.Conv1d(2, 4, 3), nn.BatchNorm1d(4), nn.Flatten(), nn.Linear(32, 3))
    teacher = Teacher.from_network(network, num_classes=3, input_shape=(2, 10), mean=0.5, std=0.5)
    front, body = of(exported(teacher, tmp_path / "net"))
    assert "pipeline_tag" not in front and "(batch, channels, length) = (any, 2, 10)" in body
