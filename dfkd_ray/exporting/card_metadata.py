"""The YAML at the head of a model card, in the form of the Hugging Face Hub.

Source: huggingface.co/docs/hub/model-cards, and the specification of `model-index` in hub-docs/modelcard.md: a result
has a task, a data set with type and name, and metrics. What is not known is left out.
"""

import re
from collections.abc import Mapping
from typing import Any

import yaml

from dfkd_ray.text import one_line

TAG = "dfkd-ray"  # of every card of this package; by it a repository is known as one that it has made
LIBRARIES = {"onnx": "onnx", "openvino": "openvino", "torch-export": "pytorch", "torch": "pytorch", "bundle": "pytorch"}
TASK = "image-classification"


def metadata(
    name: str,
    format: str,
    precision: str,
    *,
    is_of_images: bool,
    techniques: tuple[str, ...] = (),
    base_model: str | None = None,
    accuracy: float | None = None,
    test_set: str | None = None,
) -> dict[str, Any]:
    """The metadata of a card. `accuracy`: of the written file on the test data called `test_set`, in [0, 1]."""
    found: dict[str, Any] = {"library_name": LIBRARIES[format]}
    if is_of_images:
        found["pipeline_tag"] = TASK
    found["tags"] = [TAG, format, *([] if precision == "float32" else [precision]), *techniques]
    if base_model is not None:
        found["base_model"] = base_model
    if accuracy is not None and test_set is not None and is_of_images:
        result = {
            "task": {"type": TASK},
            "dataset": {"type": slug(test_set), "name": plain(test_set)},
            "metrics": [{"type": "accuracy", "value": round(accuracy, 6), "name": "Test accuracy"}],
        }
        found["model-index"] = [{"name": plain(name), "results": [result]}]
    return found


def front(found: Mapping[str, Any]) -> str:
    """The block between two lines of `---`. YAML's own writer quotes what would be syntax."""
    text = yaml.safe_dump(dict(found), sort_keys=False, allow_unicode=True, width=10**6)
    return f"---\n{text}---"


def plain(text: str) -> str:
    """A foreign text in one line without invisible characters."""
    return one_line(text, 120)


def slug(text: str) -> str:
    """A foreign name as an identifier."""
    return re.sub(r"[^a-z0-9_-]+", "-", text.lower()).strip("-")[:80] or "unknown"
