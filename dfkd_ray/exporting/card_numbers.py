"""The numbers of a model card: accuracies, distance from the teacher, sizes, the file against its network."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from dfkd_ray import ladder
from dfkd_ray.bundles import Teacher
from dfkd_ray.compression import operations, pruning
from dfkd_ray.exporting import origins
from dfkd_ray.exporting.markdown import code, table

if TYPE_CHECKING:
    from dfkd_ray.exporting import Exported

UNKNOWN = "not known"


def numbers(done: "Exported", teacher: Teacher, facts: Mapping[str, Any]) -> str:
    """Accuracies, distance from the teacher, sizes, and the comparison of the file with the network."""
    rows = [*accuracies(done, teacher, facts), *distances(facts, done.is_of_trial), *sizes(done, teacher, facts)]
    found = done.comparison
    compared = (
        f"The file was run on {found.num_images} mixed images, {done.images}, and compared with the network that it "
        f"was written from: the same answer on {share(found.agreement)}, logits that differ by at most "
        f"{found.largest_difference:.2g} (their standard deviation is {found.spread:.2g}), KL divergence "
        f"{found.kl:.2g} nats. These three numbers are without data too."
    )
    return f"{table(('what', 'value', 'measured on'), rows)}\n\n{compared}"


def accuracies(done: "Exported", teacher: Teacher, facts: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """Rows of accuracies: of the teacher and of the student after each stage, of the network, of the file."""
    on = set_text(facts.get("test_set"), facts.get("num_test_images"), facts.get("test_sha256"))
    rows = [
        (f"accuracy, {'teacher' if rung is ladder.TEACHER else f'student {rung.how}'}", share(facts[rung.accuracy]), on)
        for rung in ladder.RUNGS
        if rung.accuracy in facts
    ]
    info = teacher.info
    if not rows and info.test_accuracy is not None:
        noted = info.notes.get("test_set") or {}
        on = set_text(noted.get("name", info.dataset), noted.get("num_images"), noted.get("sha256"))
        rows.append(("accuracy of the float32 network, as its bundle says", share(info.test_accuracy), on))
    if done.accuracy is not None and done.network_accuracy is not None and done.test_set is not None:
        on = set_text(*(done.test_set[name] for name in ("name", "num_images", "sha256")))
        rows += [
            ("accuracy of the network before it was written", share(done.network_accuracy), on),
            ("accuracy of this file", share(done.accuracy), on),
        ]
    elif done.precision != "float32":
        rows.append((f"accuracy of this {done.precision} file", UNKNOWN, "no test data was given when it was written"))
    return rows or [("accuracy", UNKNOWN, "no test data was given")]


def distances(facts: Mapping[str, Any], with_int8: bool) -> list[tuple[str, str, str]]:
    """Rows of the student's distance from its teacher, and of its int8 file's."""
    mixed = "mixtures of " if facts.get("reference.mixed", True) else ""
    shapes = " with random shapes" if facts.get("reference.mixed_with") == "shapes" else ""
    many = facts.get("reference.num_images")
    on = f"{'' if many is None else f'{many:,} '}{mixed}synthetic images{shapes}, held out of training; without data"
    rows, of = [], [("agreement", "reference_kl", "float32 network")]
    if with_int8:
        of.append(("quantised_agreement", "quantised_kl", "this int8 file"))
    for agreement, kl, what in of:
        if agreement in facts:
            rows.append((f"same answer as the teacher ({what})", share(facts[agreement]), on))
        if kl in facts:
            rows.append((f"KL divergence from the teacher, nats ({what})", f"{facts[kl]:.3g}", on))
    return rows


def sizes(done: "Exported", teacher: Teacher, facts: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """Rows of sizes and of multiplications."""
    network = teacher.network
    of_teacher = {
        name: f"of the teacher: {facts[name]:,}"
        for name in ("teacher_num_parameters", "teacher_num_macs")
        if name in facts
    }
    nonzero = pruning.num_nonzero(network)
    macs = operations.num_macs(network, teacher.info.image_shape)
    num_bytes = f"{done.size_bytes:,} bytes"
    against = "all files but this card"
    if done.precision != "float32":
        against = f"the same format in float32: {done.float32_bytes:,} bytes"
    return [
        ("parameters", f"{pruning.num_parameters(network):,}", of_teacher.get("teacher_num_parameters", "")),
        ("parameters that are not zero", f"{nonzero:,}", "" if done.format == "bundle" else "zeros are stored too"),
        ("multiplications (MACs) for one input", f"{macs:,}", of_teacher.get("teacher_num_macs", "")),
        ("size of the written files", num_bytes, against),
    ]


def set_text(name: Any, num_images: Any, digest: Any) -> str:
    """A test set in words."""
    if name is None:
        return f"a test set that is {UNKNOWN} here"
    of = [
        *([f"{num_images:,} images"] if num_images else []),
        *([f"SHA-256 {code(str(digest)[:12])}"] if digest else []),
    ]
    return code(origins.public_name(str(name))) + (f" ({', '.join(of)})" if of else "")


def share(value: float) -> str:
    """A fraction in percent."""
    return f"{100 * value:.2f} %"
