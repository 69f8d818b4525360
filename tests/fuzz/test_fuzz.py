"""Hostile and clumsy words, sweep files, configs and targets, damaged and foreign bundles, records, tables, caches and
images: each ends in a line, and touches nothing that is not theirs."""

from collections.abc import Iterator

import pytest

from fuzz import fuzzing
from fuzz.bundle_files import manifests, records, weights
from fuzz.checkpoints import checkpoints
from fuzz.command_lines import command_words, odd_names, secret_places, set_words, trials
from fuzz.image_files import images
from fuzz.networks import networks
from fuzz.result_files import caches, leftovers, tables
from fuzz.sweep_files import config_files, sweep_files
from fuzz.targets import targets
from fuzz.weight_files import weight_files

# Inputs with `-m fuzz`; the default run makes a few of them.
NUMBERS = {sweep_files: 800, config_files: 320, set_words: 320, command_words: 720, secret_places: 240, targets: 560}
NUMBERS |= {trials: 400, odd_names: 400, manifests: 480, weights: 480, weight_files: 400, records: 400, tables: 640}
NUMBERS |= {caches: 360, leftovers: 240, images: 400, networks: 240, checkpoints: 240}
SHARE = 16  # one input in so many is made by the default run


@pytest.fixture(scope="module")
def bench(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[fuzzing.Bench]:
    """Runs the inputs of a family, as `--fuzz-seed` and `--fuzz-only` want them."""
    folder = tmp_path_factory.mktemp("fuzz")
    option = request.config.option
    with fuzzing.opened(folder, option.fuzz_seed, option.fuzz_only) as bench:
        yield bench


@pytest.mark.parametrize("make", NUMBERS, ids=lambda make: make.__name__)
def test_no_input_does_more_than_end_in_a_line(bench, make):
    bench.check(make, NUMBERS[make] // SHARE)


@pytest.mark.fuzz
@pytest.mark.parametrize("make", NUMBERS, ids=lambda make: make.__name__)
def test_of_many_times_as_many_inputs_none_does_either(bench, make):
    bench.check(make, NUMBERS[make])
