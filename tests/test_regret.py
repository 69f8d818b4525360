"""What the choice without data costs: rank correlation and regret, by hand."""

import math
from pathlib import Path

import pandas as pd
import pytest

from dfkd_ray import report, results
from dfkd_ray.report import aggregates
from table_rows import full_row


def frame(kls: list[float], lost: list[float], levels: list[float], **changes) -> pd.DataFrame:
    """Prepared rows of one network with these KLs, points lost and sparsities."""
    rows = [
        full_row(n, sparsity=level, seed=n, reference_kl=kl, recovered_accuracy=0.94 - gone, **changes)
        for n, (kl, gone, level) in enumerate(zip(kls, lost, levels, strict=True))
    ]
    return aggregates.prepared(as_read(rows))


def as_read(rows: list[dict]) -> pd.DataFrame:
    """Rows with all columns of the table, as they are read."""
    return pd.DataFrame(rows).reindex(columns=list(dict.fromkeys([*results.schema("trials").names, *rows[0]])))


def test_the_regret_is_what_the_trial_of_the_lowest_kl_loses_against_the_best_of_its_sparsity():
    rows = frame([0.1, 0.2, 0.3, 0.5, 0.4, 0.9], [0.01, 0.02, 0.005, 0.03, 0.05, 0.08], [0.5] * 3 + [0.9] * 3)
    (found,) = aggregates.regret(rows).to_dict("records")
    assert found["network"] == "resnet20" and found["num_trials"] == 6
    assert found["regret"] == pytest.approx((0.005 + 0.02) / 2) and found["largest"] == pytest.approx(0.02)
    # KL ranks 1 2 3 | 2 1 3 against losses 2 3 1 | 1 2 3: Spearman is 1 - 6 Σd² / (n (n² - 1)).
    assert found["within"] == pytest.approx(((1 - 6 * 6 / 24) + (1 - 6 * 2 / 24)) / 2)
    assert found["correlation"] == pytest.approx(1 - 6 * (1 + 1 + 4 + 1 + 1 + 0) / (6 * 35))


def test_a_perfect_order_has_no_regret():
    rows = frame([0.1, 0.2, 0.3], [0.01, 0.02, 0.03], [0.9] * 3)
    (found,) = aggregates.regret(rows).to_dict("records")
    assert found["correlation"] == found["within"] == pytest.approx(1) and found["regret"] == 0


def test_trials_on_real_images_without_test_data_or_of_an_older_version_do_not_count():
    new = frame([0.1, 0.2, 0.3], [0.01, 0.02, 0.03], [0.9] * 3, trial_version=3)
    old = frame([0.001, 0.002], [0.5, 0.4], [0.9] * 2, trial_version=2)
    real = frame([0.0001], [0.6], [0.9], trial_version=3, real_data=True)
    rows = pd.concat([new, old, real], ignore_index=True)
    (found,) = aggregates.regret(rows).to_dict("records")
    assert found["num_trials"] == 3 and found["regret"] == 0
    untested = aggregates.prepared(as_read([full_row(n, seed=n, recovered_accuracy=None) for n in range(2)]))
    assert aggregates.regret(untested).empty


def test_one_trial_has_neither():
    (found,) = aggregates.regret(frame([0.1], [0.01], [0.9])).to_dict("records")
    assert all(math.isnan(found[name]) for name in ("correlation", "within", "regret", "largest"))


def test_the_report_says_what_the_choice_costs(tmp_path: Path):
    results.write(tmp_path, "trials", [full_row(n, seed=n, reference_kl=0.1 * (n + 1)) for n in range(4)], "part")
    report.write(tmp_path)
    page = (tmp_path / "report.html").read_text()
    assert "The choice without data" in page and "largest regret" in page
