"""Warnings of a trial: what looks wrong in its images or its student, and what to change. Pure.

Without data a user cannot see that images are useless. A warning does not stop a trial; it is in the row (`warnings`),
on the terminal and in the report.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from dfkd_ray.batches import NO_LABEL
from dfkd_ray.bundles import Teacher
from dfkd_ray.config import TrialConfig
from dfkd_ray.distillation import Pool
from dfkd_ray.heads import positive_share
from dfkd_ray.image_sources import mean_term
from dfkd_ray.ladder import PRUNED, TEACHER, ended_early

LEAST_AGREEMENT = 0.5  # of images and the labels that they were made for
LEAST_CONFIDENCE = 0.5  # mean over images of the probability of the teacher's answers; with few classes:
LEAST_OF_TWO = 0.75  # where guessing has 0.5
NEAR_CHANCE = 1.5  # times the accuracy of guessing; with few classes:
NEAR_HALF = 0.6
MANY_IMAGES = 10  # images per class from which each class is expected to be seen


def warnings_of(
    config: TrialConfig, teacher: Teacher, row: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], pool: Pool
) -> Iterator[str]:
    """The warnings of a finished trial: `row` as far as it is filled, `rows` of its batches, and its images."""
    num_classes, method = teacher.info.num_classes, config.synthesis.method
    one_class = teacher.info.head == "softmax"
    guessing = 1 / num_classes if one_class else 0.5
    accuracy = row.get(TEACHER.accuracy)
    if accuracy is not None and teacher.info.trained and accuracy < min(NEAR_CHANCE * guessing, NEAR_HALF):
        yield (
            f"the teacher's own test accuracy is {accuracy:.2%}, near chance: its mean, std, pixel range or order of "
            "classes may be other ones"
        )
    agreement = mean_term(rows, "label_agreement")
    # Independent labels are mostly 0, and an image on which all are agrees with that share of them.
    least = LEAST_AGREEMENT if one_class else 1 - LEAST_AGREEMENT * positive_share(num_classes)
    wanted = "the class that they were made for" if one_class else "what the images were made for"
    if agreement is not None and agreement < least:
        yield (
            f"the teacher sees {agreement:.0%} of the {'images' if one_class else 'labels'} as {wanted}: raise "
            "synthesis.num_steps, or the weight of its label term"
        )
    labels = np.unique(pool.labels[pool.labels != NO_LABEL])
    if one_class and 0 < len(labels) < num_classes:
        # A generator's labels are what the teacher sees, however many images there are.
        few = config.distillation.num_images < num_classes
        advice = f": set distillation.num_images to {num_classes:,} or more" if few else ""
        yield f"{num_classes - len(labels):,} of {num_classes:,} classes have no image{advice}"
    if config.student.architecture is None and any(row.get("num_steps") == 0 for row in rows):
        yield (
            f"synthesis.method={method} has no term without a student, so the images of round 0, on which the pruned "
            "network is repaired, are of an untrained generator: use another method, or set student.architecture"
        )
    histogram = json.loads(row["class_histogram"])
    unseen = sum(count == 0 for count in histogram)
    if unseen and len(pool.labels) >= MANY_IMAGES * num_classes:
        what = "classes" if one_class else "labels"
        yield f"the teacher predicts {unseen:,} of {num_classes:,} {what} for none of the {method} images"
    if row["image_confidence"] < max(LEAST_CONFIDENCE, min(2 * guessing, LEAST_OF_TWO)) and method != "noise":
        yield (
            "the teacher is not sure of the images: the mean probability of its answers is "
            f"{row['image_confidence']:.2f}"
        )
    agreed, first = row.get("agreement"), row.get(str(PRUNED.agreement))
    trains = config.student.is_new and config.distillation.num_steps > 0
    if trains and agreed is not None and first is not None and agreed <= first:
        yield (
            "the new student agrees with the teacher no more than it did with its first random weights: it has learned "
            "nothing (more or better images, or more steps, may help)"
        )
    if row.get("selected") == PRUNED.name and config.distillation.num_steps > 0 and not ended_early(row):
        yield (
            "plain pruning is closest to the teacher and is the student: training on the images did not improve it "
            "(more or better images, or a lower distillation.learning_rate, may)"
        )
