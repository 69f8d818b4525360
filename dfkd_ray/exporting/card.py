"""The model card of an exported network: what it is, its numbers, how it was made, its limits, how to load it.

Every number is measured or from the row of the trial that made the network; what is not known is said to be unknown.
Texts from a bundle, a row or a path are code spans, or literals of a program.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import dfkd_ray
from dfkd_ray import commit, models
from dfkd_ray.bundles import Teacher
from dfkd_ray.compression import pruning
from dfkd_ray.exporting import bundle_files, card_metadata, origins
from dfkd_ray.exporting.card_numbers import UNKNOWN, numbers
from dfkd_ray.exporting.code_layout import text as literal
from dfkd_ray.exporting.images import NUM_CALIBRATION
from dfkd_ray.exporting.markdown import block, bullets, code

if TYPE_CHECKING:
    from dfkd_ray.exporting import Exported

FORMATS = {
    "onnx": "ONNX",
    "openvino": "OpenVINO",
    "torch-export": "torch.export",
    "torch": "PyTorch source code",
    "bundle": "of a bundle of dfkd_ray",
}
MOST_CLASSES = 50  # names that are listed
PRUNING = {
    "unstructured": "single weights are zero",
    "n_of_m": "of every few neighbouring weights some are zero",
    "channels": "whole channels are removed",
}


def text(done: "Exported", teacher: Teacher, row: Mapping[str, Any] | None) -> str:
    """The card of an export. `row`: of the trial that made the network, if there is one.

    `ValueError` if the row is of another trial.
    """
    facts = origins.facts(teacher, row)
    accuracy, test_set = own_accuracy(done, teacher)
    head = card_metadata.metadata(
        teacher.name,
        done.format,
        done.precision,
        is_of_images=len(teacher.info.input_shape) == 3,
        techniques=techniques(facts),
        base_model=origins.hub_repository(str(facts.get("teacher", teacher.name))),
        accuracy=accuracy,
        test_set=test_set,
    )
    sections = {
        "Numbers": numbers(done, teacher, facts),
        "Input and classes": input_and_classes(teacher),
        "How to load it": block(loading(done, teacher)),
        "How it was made": bullets(making(done, teacher, facts)),
        "Limits": bullets(limits(done, teacher, facts)),
    }
    body = "\n\n".join(f"## {heading}\n\n{part}" for heading, part in sections.items())
    return f"{card_metadata.front(head)}\n\n# {code(done.path.name)}\n\n{summary(done, teacher, facts)}\n\n{body}\n"


def is_student(facts: Mapping[str, Any]) -> bool:
    """Whether a network is known to be a student of this package."""
    return "trial_id" in facts


def is_data_free(facts: Mapping[str, Any]) -> bool:
    """Whether a student was distilled on synthetic images."""
    return facts.get("synthesis.method") not in (None, "real") and not facts.get("real_data", False)


def techniques(facts: Mapping[str, Any]) -> tuple[str, ...]:
    """Tags of what was done to a student."""
    if not is_student(facts):
        return ()
    pruned = ("pruning",) if facts.get("pruning.sparsity") else ()
    return (*pruned, "knowledge-distillation", *(("data-free",) if is_data_free(facts) else ()))


def own_accuracy(done: "Exported", teacher: Teacher) -> tuple[float | None, str | None]:
    """The accuracy of the written file and the test set's name, where both are known.

    A float32 file has its network's accuracy: it was compared. Another one has only what was measured on it.
    """
    if done.accuracy is not None and done.test_set is not None:
        return done.accuracy, origins.public_name(str(done.test_set["name"]))
    noted = teacher.info.notes.get("test_set")
    if done.precision != "float32" or teacher.info.test_accuracy is None or noted is None:
        return None, None
    return teacher.info.test_accuracy, origins.public_name(str(noted["name"]))


def summary(done: "Exported", teacher: Teacher, facts: Mapping[str, Any]) -> str:
    """The first paragraph."""
    info = teacher.info
    kind = "classes" if info.head == "softmax" else "independent labels"
    what = (
        f"A classifier ({code(origins.public_name(info.architecture), 80)}, {info.num_classes:,} {kind}, input "
        f"{'x'.join(map(str, info.input_shape))}) in the format {FORMATS[done.format]}, "
        f"{done.precision}."
    )
    if not info.trained:
        what += " **It is not trained**: its weights are random."
    if not is_student(facts):
        return f"{what} How the network was made is {UNKNOWN} here: its bundle does not say so."
    how = "without training data, on synthetic images" if is_data_free(facts) else "on images that are real"
    if "synthesis.method" not in facts:
        how = f"on images whose origin is {UNKNOWN} here"
    return f"{what} It is a student: made smaller than its teacher, and repaired {how}."


def input_and_classes(teacher: Teacher) -> str:
    """What the network takes and gives."""
    info = teacher.info
    sides = ("channels", "length") if len(info.input_shape) == 2 else ("channels", "height", "width")
    names = [code(name, 40) for name in info.class_names[:MOST_CLASSES]]
    more = f" and {len(info.class_names) - len(names):,} more" if len(info.class_names) > len(names) else ""
    outputs = "one class each" if info.head == "softmax" else "a label each, independent of the others"
    return bullets(
        [
            f"Input `images`: float32 (batch, {', '.join(sides)}) = (any, {', '.join(map(str, info.input_shape))}), "
            "normalised: (pixel - mean) / std per channel.",
            f"Pixels from {info.pixel_range[0]:g} to {info.pixel_range[1]:g}; mean {floats(info.mean)}, std "
            f"{floats(info.std)}.",
            f"Output `logits`: float32 (batch, {info.num_classes:,}), {outputs}, without softmax or sigmoid.",
            f"Names in the order of the outputs: {', '.join(names)}{more}." if names else "The classes have no names.",
        ]
    )


def floats(values: Sequence[float]) -> str:
    """Numbers with commas."""
    return ", ".join(f"{value:g}" for value in values)


def loading(done: "Exported", teacher: Teacher) -> list[str]:
    """A program of few lines that runs the file."""
    module = models.module_of(teacher.info.architecture)
    trust = "" if module is None else f", trust_code={literal(module)}"
    name = literal(done.path.name)
    return {
        "onnx": [
            "import onnxruntime",
            f"session = onnxruntime.InferenceSession({name})",
            'logits = session.run(None, {"images": images})[0]  # images: a numpy array',
        ],
        "openvino": [
            "import openvino",
            f'network = openvino.Core().compile_model({name}, "CPU")  # the .bin lies beside it',
            "logits = network([images])[0]  # images: a numpy array",
        ],
        "torch-export": [
            "import torch",
            f"network = torch.export.load({name}).module()",
            "logits = network(images)  # images: a tensor",
        ],
        "torch": [
            "from model import load, normalised  # in the folder of model.py; it needs torch and safetensors",
            "network = load()",
            "logits = network(normalised(pixels))  # pixels: a tensor",
        ],
        "bundle": [
            "import dfkd_ray",
            f"network = dfkd_ray.load({name}{trust}).network  # float32",
            "logits = network(images)  # images: a tensor",
        ],
    }[done.format]


def making(done: "Exported", teacher: Teacher, facts: Mapping[str, Any]) -> list[str]:
    """How the network and the file were made."""
    lines = of_trial(facts) if is_student(facts) else [f"How it was trained is {UNKNOWN} here."]
    if not is_student(facts) and teacher.info.dataset is not None:
        lines = [f"Trained on {code(origins.public_name(teacher.info.dataset))}, as its bundle says."]
    lines += of_values(done, teacher, facts)
    own = commit.of_package()
    lines.append(f"Written by dfkd_ray {dfkd_ray.__version__}{f', commit {own}' if own else ''}.")
    return lines


def of_values(done: "Exported", teacher: Teacher, facts: Mapping[str, Any]) -> list[str]:
    """What was done to the values of the weights, by this export or before."""
    lines = []
    note = teacher.info.notes.get(bundle_files.NOTE)
    if isinstance(note, Mapping):
        before, raised = code(note.get("weights_sha256") or UNKNOWN, 80), note.get("num_raised")
        lines.append(
            "float16: weights, biases, and scales and shifts of BatchNorm are rounded to the nearest float16 values, "
            f"from weights with SHA-256 {before}; BatchNorm's running statistics are not. Accuracies and agreement of "
            "the trial are from before that."
        )
        if type(raised) is int and raised > 0:
            lines[-1] += f" {raised:,} values were too small for float16, and became its smallest, 6e-8."
    if done.is_int8:
        images = f"{NUM_CALIBRATION} images that are no data ({done.images})"
        if done.is_of_trial:
            numbers = [facts[name] for name in ("quantisation.num_images", "num_images") if name in facts]
            images = f"{f'{min(numbers):,}' if numbers else 'some'} of the images that the student was distilled on"
        lines.append(
            f"int8: static quantisation by ONNX Runtime; the ranges of activations are from {images}, and biases are "
            "corrected on them."
        )
        if done.is_of_trial and facts.get("int8_steps"):
            lines.append(
                f"Its weights were then distilled for {facts['int8_steps']:,} steps through fake quantisation."
            )
    return lines


def of_trial(facts: Mapping[str, Any]) -> list[str]:
    """How a student was made."""

    def known(template: str, *names: str) -> list[str]:
        if not all(name in facts for name in names):
            return []
        values = [facts[name] for name in names]
        return [template.format(*(code(value, 60) if isinstance(value, str) else value for value in values))]

    teacher = code(origins.public_name(str(facts["teacher"]))) if "teacher" in facts else UNKNOWN
    structure = PRUNING.get(str(facts.get("pruning.structure", "unstructured")), UNKNOWN)
    lines = [
        f"Teacher: {teacher}"
        + (f", hash {code(facts['teacher_hash'], 80)}" if "teacher_hash" in facts else "")
        + "; trial "
        + code(facts["trial_id"])
        + "."
    ]
    if facts.get("pruning.sparsity"):
        lines.append(f"Pruning: {structure}; sparsity {facts['pruning.sparsity']:g}" + measured_sparsity(facts) + ".")
    lines += known("Images: method {}", "synthesis.method")
    if "synthesis.method" in facts:
        lines[-1] += "".join(
            [
                *known(", {:,} images", "distillation.num_images"),
                *known(", {:,} steps of synthesis", "synthesis.num_steps"),
                *known(", seed {}", "synthesis.seed"),
                ".",
            ]
        )
    lines += known("Distillation: {:,} steps, seed {}.", "distillation.num_steps", "distillation.seed")
    if facts.get("synthesis.method") == "records":
        lines.append(
            "The images are synthetic. They are made from the teacher and from activation records, which are "
            "statistics that were taken from training data."
        )
    elif is_data_free(facts):
        lines.append("The images are synthetic: made from the teacher alone. No real image was used.")
    elif "synthesis.method" in facts:
        lines.append("**The images are real**: this student is an upper bound, and not data-free.")
    by = [
        *known("dfkd_ray {}", "package_version"),
        *([f"commit {code(facts['commit'], 50)}"] if "commit" in facts else []),
        *([f"PyTorch {code(facts['torch_version'], 40)}"] if "torch_version" in facts else []),
    ]
    row = "" if "package_version" in facts else " The row of its trial was not found, so its measurements are missing."
    lines.append(f"Trained by {', '.join(by)}." if by else f"The version that trained it is {UNKNOWN} here.{row}")
    return lines


def measured_sparsity(facts: Mapping[str, Any]) -> str:
    """The sparsity that was reached, where it is known."""
    found = facts.get("achieved_sparsity")
    return "" if found is None else f" (reached: {found:.4g})"


def limits(done: "Exported", teacher: Teacher, facts: Mapping[str, Any]) -> list[str]:
    """What the network and the numbers above do not say."""
    lines = []
    if done.accuracy is None and (done.precision != "float32" or teacher.info.test_accuracy is None):
        of = "this network" if done.precision == "float32" else f"this {done.precision} file"
        lines.append(
            f"**The accuracy of {of} is {UNKNOWN}**: no test data was given. Agreement and KL divergence on synthetic "
            "images say how near it is to another network, and not how often it is right."
        )
    if done.warning:
        lines.append(f"{done.warning[0].upper()}{done.warning[1:]}.")
    lines += [
        "It has the faults of the network that it was made from, and perhaps more on classes or images that are rare.",
        "No claim of privacy follows from synthetic images: weights, and images made from them, can show what the "
        "training data looked like.",
        "The licence is that of the network that it was made from, which is not known here.",
    ]
    structure = facts.get("pruning.structure")
    if facts.get("pruning.sparsity") and structure == "channels":
        lines.append(
            "Fewer channels are fewer multiplications; how much faster that is, is to be measured where it runs."
        )
    elif done.format == "bundle":
        lines.append("Its zeros, if it has any, make the file smaller and not the network faster.")
    elif pruning.num_nonzero(teacher.network) < 0.9 * pruning.num_parameters(teacher.network):
        special = " without kernels for this pattern" if structure == "n_of_m" else ""
        lines.append(f"Its zeros do not make it faster or its file smaller{special}: weights are stored dense.")
    if done.is_int8:
        lines.append(
            "An x86 CPU without VNNI may saturate in 16 bits on int8 networks: compare the answers on the machine that "
            "runs it."
        )
    return lines
