"""Half an hour of kills, stops, full disks and closed pipes changes nothing that a sweep leaves. `pytest -m soak`."""

import json
import sys
import time
from pathlib import Path

import pandas as pd
import pytest

from dfkd_ray import cache, devices, results, storage, sweep, trial
from helpers import jobs_of, sweep_of_twelve, write_yaml
from soak.soaking import Figures, Soak, disks, files_below
from table_rows import comparable

NUM_EVENTS = 100  # at least, in a soak of full length
FULL_MINUTES = 30.0
ORDERS = {"trials": ["trial_id"], "epochs": ["trial_id", "step"], "synthesis": ["synthesis_key", "batch_index"]}


def undisturbed(data: dict, folder: Path) -> tuple[list[str], Path, Path]:
    """The same trials one after the other in this process, without Ray: ids, results, cache."""
    jobs = jobs_of(data)
    for job in jobs:
        sweep.run_job(job, trial.Inputs(images=trial.Local(folder / "cache")), folder / "results")
    return [job.id for job in jobs], folder / "results", folder / "cache"


def assert_same(place: Path, cached: Path, alone: tuple[list[str], Path, Path]) -> None:
    """Deterministic columns, students, pictures and every image that was made are those of the undisturbed run."""
    ids, wanted, wanted_cache = alone
    assert set(results.read(place, "trials")["status"]) == {"finished"}
    for table, order in ORDERS.items():
        pd.testing.assert_frame_equal(comparable(place, table, order), comparable(wanted, table, order))
    for job in ids:
        assert files_below(place / "students" / job) == files_below(wanted / "students" / job), job
    assert files_below(place / "images") == files_below(wanted / "images")
    numerics = devices.numerics_class(devices.resolve("cpu"))
    for key in set(results.read(wanted, "synthesis")["synthesis_key"]):
        folders = [cache.folder_of(storage.folder(root), key, numerics) for root in (cached, wanted_cache)]
        assert cache.indices(folders[0]) >= cache.indices(folders[1]) != set()
        for index in cache.indices(folders[1]):
            here, there = (cache.read(folder, index, key) for folder in folders)
            assert here is not None and there is not None
            assert here.images.tobytes() == there.images.tobytes() and here.labels.tobytes() == there.labels.tobytes()


@pytest.mark.soak
@pytest.mark.timeout(0)
def test_what_a_sweep_leaves_is_the_same_however_it_is_disturbed_and_no_final_row_ever_goes(
    tiny_teacher, tmp_path, request, capsys
):
    minutes, seed = request.config.getoption("--soak-minutes"), request.config.getoption("--soak-seed")
    data = sweep_of_twelve(tiny_teacher)
    write_yaml(tmp_path / "twelve.yaml", data)
    alone = undisturbed(data, tmp_path / "alone")
    figures, start = Figures(seed), time.monotonic()
    wanted = NUM_EVENTS if minutes >= FULL_MINUTES else 1

    def enough() -> bool:
        return time.monotonic() - start >= 60 * minutes and figures.num_events >= wanted

    try:
        while not enough():
            name = f"sweep-{figures.num_sweeps}"
            with disks(tmp_path, name) as (results_disk, cache_disk):
                place, cached = results_disk.folder / "r", cache_disk.folder / "c"
                words = [
                    sys.executable,
                    "-m",
                    "dfkd_ray",
                    "sweep",
                    str(tmp_path / "twelve.yaml"),
                    "--synthesizers",
                    "2",
                ]
                words += ["--results", str(place), "--cache", str(cached), "--test-data", "none"]
                soak = Soak(
                    words, place, tmp_path / f"{name}.log", (results_disk, cache_disk), figures, f"{seed}:{name}"
                )
                soak.run(len(alone[0]), enough)
                assert not figures.problems, "\n".join(figures.problems[:5])
                assert_same(place, cached, alone)
            figures.num_sweeps += 1
    finally:
        figures.minutes = round((time.monotonic() - start) / 60, 2)
        text = json.dumps(figures.plain(), indent=1)
        (tmp_path / "figures.json").write_text(text)
        with capsys.disabled():
            sys.stdout.write(f"\n{text}\nfigures: {tmp_path / 'figures.json'}\n")
