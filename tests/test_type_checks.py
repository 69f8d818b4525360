"""Types are checked while tests run, of functions with and without array shapes."""

from typing import Any

import beartype.roar
import jaxtyping
import pytest
import torch

from dfkd_ray import losses, storage, text

WRONG: Any = 5


def test_an_argument_of_another_type_is_refused():
    with pytest.raises(beartype.roar.BeartypeCallHintViolation):
        text.shortened(WRONG, 3)


def test_an_argument_of_another_type_is_refused_by_a_method(tmp_path):
    with pytest.raises(beartype.roar.BeartypeCallHintViolation):
        storage.folder(tmp_path).read(WRONG)


def test_arrays_of_different_shapes_are_refused():
    with pytest.raises(jaxtyping.TypeCheckError):
        losses.batchnorm_distance(*(torch.zeros(length) for length in (1, 1, 5, 5)))
