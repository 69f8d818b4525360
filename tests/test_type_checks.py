"""Types are checked while tests run. That shapes are, `test_losses.py` shows."""

from typing import Any

import beartype.roar
import pytest

from dfkd_ray import storage, text

WRONG: Any = 5


def test_an_argument_of_another_type_is_refused():
    with pytest.raises(beartype.roar.BeartypeCallHintViolation):
        text.shortened(WRONG, 3)


def test_an_argument_of_another_type_is_refused_by_a_method(tmp_path):
    with pytest.raises(beartype.roar.BeartypeCallHintViolation):
        storage.folder(tmp_path).read(WRONG)
