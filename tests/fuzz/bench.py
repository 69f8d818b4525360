"""One server and its templates for each file of tests.

A fixture in a module, not in a `conftest.py`: tests import from the one above by its name, of which there may be one.
"""

from collections.abc import Iterator

import pytest

from fuzz import fuzzing


@pytest.fixture(scope="module")
def bench(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[fuzzing.Bench]:
    """Runs the inputs of a family, as `--fuzz-seed` and `--fuzz-only` want them."""
    folder = tmp_path_factory.mktemp("fuzz")
    option = request.config.option
    with fuzzing.opened(folder, option.fuzz_seed, option.fuzz_only) as bench:
        yield bench
