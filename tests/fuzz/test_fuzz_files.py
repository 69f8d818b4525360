"""Damaged and foreign bundles, records, tables, caches and images end in a line, and touch nothing of others."""

import pytest

from fuzz.bench import bench as bench  # a fixture
from fuzz.bundle_files import manifests, records, weights
from fuzz.image_files import images
from fuzz.result_files import caches, leftovers, tables
from fuzz.weight_files import weight_files

LONGER = 8  # times as many, with `-m fuzz`
NUMBERS = {manifests: 60, weights: 60, weight_files: 50, records: 50, tables: 80, caches: 45, leftovers: 30, images: 50}


@pytest.mark.parametrize("make", NUMBERS, ids=lambda make: make.__name__)
def test_of_files_none_does_more_than_end_in_a_line(bench, make):
    bench.check(make, NUMBERS[make])


@pytest.mark.fuzz
@pytest.mark.parametrize("make", NUMBERS, ids=lambda make: make.__name__)
def test_of_many_times_as_many_files_none_does_either(bench, make):
    bench.check(make, LONGER * NUMBERS[make])
