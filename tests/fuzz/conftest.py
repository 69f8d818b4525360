"""One server and its templates for each file of tests."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
import fuzzing


@pytest.fixture(scope="module")
def bench(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[fuzzing.Bench]:
    """Runs the inputs of a family, as `--fuzz-seed` and `--fuzz-only` want them."""
    folder = tmp_path_factory.mktemp("fuzz")
    seed, only = request.config.getoption("--fuzz-seed"), request.config.getoption("--fuzz-only")
    with fuzzing.opened(folder, seed, only) as bench:
        yield bench
