"""Hostile and clumsy sweep files, configs, words and targets end in a line, and touch nothing that is not theirs."""

import pytest

from fuzz.bench import bench as bench  # a fixture
from fuzz.command_lines import command_words, odd_names, secret_places, set_words, trials
from fuzz.sweep_files import config_files, sweep_files
from fuzz.targets import targets

LONGER = 8  # times as many, with `-m fuzz`
NUMBERS = {sweep_files: 100, config_files: 40, set_words: 40, command_words: 90, secret_places: 30, targets: 70}
NUMBERS |= {trials: 50, odd_names: 50}


@pytest.mark.parametrize("make", NUMBERS, ids=lambda make: make.__name__)
def test_of_words_none_does_more_than_end_in_a_line(bench, make):
    bench.check(make, NUMBERS[make])


@pytest.mark.fuzz
@pytest.mark.parametrize("make", NUMBERS, ids=lambda make: make.__name__)
def test_of_many_times_as_many_words_none_does_either(bench, make):
    bench.check(make, LONGER * NUMBERS[make])
