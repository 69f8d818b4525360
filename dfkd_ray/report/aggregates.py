"""The report's tables, as pure functions of the frames `trials` and `synthesis`. No figures, no HTML.

A *configuration* is a group of trials that differ only in seeds. *Best* always means the lowest KL divergence
from the teacher on the synthetic reference set, among trials of the newest version; test accuracy is shown, never used
to select. Standard deviations are sample standard deviations (n - 1), null for one trial.
"""

from collections.abc import Iterable
from typing import Any

import pandas as pd

from dfkd_ray.config import OF_TEACHER, TrialConfig
from dfkd_ray.ladder import BESIDE, RUNGS, STUDENTS
from dfkd_ray.report.wording import Frame, Series
from dfkd_ray.results.schemas import BEST_FIRST, REFERENCE_KIND, SEEDS, config_columns
from dfkd_ray.text import is_null

# The network's label covers the first three; the last is what was requested, not what was used.
NOT_CONFIGURATION = ("teacher", "student.architecture", "student.arguments", "device", *SEEDS)
AVERAGED = (
    *("agreement", "reference_kl", "lost", "achieved_sparsity", "stored_bytes", "dense_bytes", "wall_s"),
    *(f"at_{rung.name}" for rung in RUNGS),
    *(f"lost_{rung.name}" for rung in BESIDE),
    *("speed", "int8_latency_ratio", "int8_file_bytes", "macs_left", "num_teacher_passes", "num_student_passes"),
)
NUM_LEVELS = 12  # distinct sparsities a figure can show side by side
LEVEL_WIDTH = 0.05
BN_WEIGHT, TEMPERATURE = "synthesis.bn_weight", "distillation.temperature"
NUM_CELLS = 12  # values along one side of a heat map


def prepared(trials: Frame) -> Frame:
    """All trials with additional columns for grouping and display.

    `network`: label of teacher and student. `measure`: accuracy, or agreement if no trial of the network has test data.
    `at_<rung>`, `at_teacher`: the measure on each rung, in [0, 1]. `lost`, `lost_<rung>`: the teacher's value minus the
    rung's. `speed`: how many times as fast as the teacher, 1 in its shape, null where it was not measured. `macs_left`:
    the share of its multiplications. `level`: the requested sparsity, rounded to 0.05 if there are more than 12 levels.
    """
    network = network_labels(trials)
    tested = trials["recovered_accuracy"].notna().groupby(network).transform("any")
    new = {"network": network, "measure": tested.map({True: "accuracy", False: "agreement"})}
    for rung in STUDENTS:
        new[f"at_{rung.name}"] = trials[rung.accuracy].where(tested, trials[rung.agreement]).astype(float)
    new["at_teacher"] = trials["teacher_accuracy"].where(tested, 1.0).astype(float)
    new["lost"] = new["at_teacher"] - new["at_recovered"]
    new |= {f"lost_{rung.name}": new["at_teacher"] - new[f"at_{rung.name}"] for rung in BESIDE}
    new["macs_left"] = trials["num_macs"].astype(float) / trials["teacher_num_macs"]
    new["speed"] = trials["latency_ratio"].astype(float).where(new["macs_left"] != 1, 1.0)
    level = trials["pruning.sparsity"].astype(float).fillna(0.0)
    if level.nunique() > NUM_LEVELS:
        level = ((level / LEVEL_WIDTH).round() * LEVEL_WIDTH).clip(upper=1 - LEVEL_WIDTH / 2)
    new["level"] = level.round(6)
    real = trials["real_data"].astype("boolean").fillna(False).astype(bool)
    # All at once: a frame into which many columns are put one by one is slow.
    return pd.concat([trials.assign(real_data=real), pd.DataFrame(new)], axis=1)


def network_labels(trials: Frame) -> Series:
    """A label per row, equal for equal teacher (by hash), student, structure and its target: `resnet34 → resnet18`.

    To tell equal labels apart, the teacher's name, the student's arguments and the teacher's hash are appended; where a
    network was measured on several test sets, the test set.
    """
    name = trials["teacher"].fillna("unknown").map(lambda text: str(text).rstrip("/").rpartition("/")[2])
    identity = trials["teacher_hash"].fillna(trials["teacher"]).fillna("unknown")
    student, arguments = trials["student.architecture"].fillna(""), trials["student.arguments"].fillna("{}")
    keys: Frame = pd.DataFrame({"identity": identity, "student": student, "arguments": arguments})
    short = trials["teacher_architecture"].fillna(name) + student.map(lambda text: f" → {text}" if text else "")
    known: Frame = keys.assign(label=short, name=" (" + name + ")", hash=" [" + identity.str[:8] + "]")
    known = known.drop_duplicates(["identity", "student", "arguments"])
    known["with"] = " " + known["arguments"].where(known["arguments"] != "{}", "")
    for more in ("name", "with", "hash"):
        clash = known["label"].duplicated(keep=False)
        known.loc[clash, "label"] = (known["label"] + known[more])[clash].str.rstrip()
    labels = keys.merge(known, on=["identity", "student", "arguments"], how="left")["label"].set_axis(trials.index)
    # A sparsity of channels is a share of parameters or multiplications, and a pattern costs more accuracy: no table
    # mixes them.
    fields = ("structure", "pattern", "target")
    columns = (trials.get(f"pruning.{name}", pd.Series(index=trials.index, dtype=object)) for name in fields)
    labels += pd.Series([structure_label(*map(str, row)) for row in zip(*columns, strict=True)], trials.index)
    return labels + test_set_labels(trials, labels)


def test_set_labels(trials: Frame, networks: Series) -> Series:
    """What the label of a network says of its test set: nothing where it has one, so that no table mixes several."""
    if "test_sha256" not in trials or trials["test_sha256"].isna().all():
        return pd.Series("", trials.index)
    sha256, num = trials["test_sha256"], trials["num_test_images"].astype("Int64").astype(str)
    name = ", on " + trials["test_set"].fillna("unknown") + " (" + num + " images)"
    sets = pd.DataFrame({"network": networks, "name": name, "sha256": sha256}).dropna(subset=["sha256"])
    several: Any = sets.groupby("network")["sha256"].transform("nunique")
    alike: Any = sets.groupby(["network", "name"])["sha256"].transform("nunique")
    labels = (sets["name"] + (" [" + sets["sha256"].str[:8] + "]").where(alike > 1, "")).where(several > 1, "")
    return labels.reindex(trials.index, fill_value="")


def structure_label(structure: str, pattern: str, target: str) -> str:
    """What a network's label says of the structure of pruning; nothing of zeros anywhere, or of a null."""
    if structure == "n_of_m":
        return f", {pattern}"
    by = {"macs": " by MACs", "latency": " by latency"}.get(target, "")
    return f", channels{by}" if structure == "channels" else ""


def finished(rows: Frame) -> Frame:
    """The rows with a result."""
    return rows[rows["status"] == "finished"]


def varying(rows: Frame) -> list[str]:
    """The config columns that differ between trials, without seeds and fields that follow from the synthesis method."""
    fields = [name for name in config_columns(TrialConfig) if name in rows and name not in NOT_CONFIGURATION]
    if rows.empty:
        return []
    # Other methods do not have the field: null against a value tells no more than the method does.
    differs = rows[fields].groupby(rows["synthesis.method"].fillna("")).nunique(dropna=False).max() > 1
    differs["synthesis.method"] = rows["synthesis.method"].nunique() > 1
    if OF_TEACHER in fields:  # of one teacher: between teachers, the network's label says it
        differs[OF_TEACHER] = rows.groupby(rows["teacher_hash"].fillna(""))[OF_TEACHER].nunique(dropna=False).max() > 1
    return [name for name in fields if differs[name]]


def configurations(rows: Frame) -> Frame:
    """One row per configuration of finished trials: means, `<name>_std`, `num_seeds`, the `trial_id` of the best."""
    rows = finished(rows)
    algorithms = [name for name in ("trial_version", "synthesis_version") if name in rows]
    by = ["network", "measure", "real_data", "level", *algorithms, *varying(rows)]
    groups = rows.groupby(by, dropna=False, sort=False)
    means = groups[list(AVERAGED)].mean()
    spread = groups[list(AVERAGED)].std().add_suffix("_std")
    # Rows come best first.
    rest = groups.agg(num_seeds=("trial_id", "size"), trial_id=("trial_id", "first"))
    return pd.concat([means, spread, rest], axis=1).reset_index()


def best(configs: Frame) -> Frame:
    """The first configuration by `BEST_FIRST` for each network and sparsity, data-free and real separately."""
    by = [name for name in BEST_FIRST if name in configs]
    order = configs.sort_values(by, ascending=[BEST_FIRST[name] for name in by], kind="stable")
    chosen = order.drop_duplicates(["network", "real_data", "level"])
    return chosen.sort_values(["network", "real_data", "level"], kind="stable").reset_index(drop=True)


def answers(chosen: Frame) -> Frame:
    """The best data-free configurations by network and level, with the upper bound on real images (`bound_…`).

    A network with only real-image trials has its real rows here, with `real_data` true.
    """
    own, real = chosen[~chosen["real_data"]], chosen[chosen["real_data"]]
    bound = real.rename(columns={name: f"bound_{name}" for name in ("at_recovered", "lost", "lost_std", "num_seeds")})
    kept = ["network", "level", "bound_at_recovered", "bound_lost", "bound_lost_std", "bound_num_seeds"]
    joined = own.merge(bound[kept], on=["network", "level"], how="left")
    only_real = real[~real["network"].isin(own["network"])]
    frames = [frame for frame in (joined, only_real) if len(frame)]
    return pd.concat(frames, ignore_index=True) if frames else joined


def regret(rows: Frame) -> Frame:
    """By network: how well the choice without data does, over finished, data-free trials with test accuracy.

    `num_trials`; `correlation`: Spearman's rank correlation of `reference_kl` with the points lost; `within`: the same
    at one sparsity, mean over sparsities with at least three trials; `regret`: accuracy that the trial of the lowest KL
    loses against the best at its sparsity, mean over sparsities with at least two trials; `largest`: the largest. Of
    several versions or kinds of reference images, only the first by `BEST_FIRST` counts. Null where nothing is defined.
    """
    found = []
    for network, own in comparable(rows).groupby("network", sort=False):
        levels = [level for _, level in own.groupby("level") if len(level) > 1]
        costs = [level.loc[level["reference_kl"].idxmin(), "lost"] - level["lost"].min() for level in levels]
        within = [rank_correlation(level) for level in levels if len(level) > 2]
        found.append(
            {
                "network": network,
                "num_trials": len(own),
                "correlation": rank_correlation(own),
                "within": pd.Series(within, dtype=float).mean(),
                "regret": pd.Series(costs, dtype=float).mean(),
                "largest": pd.Series(costs, dtype=float).max(),
            }
        )
    columns = ["network", "num_trials", "correlation", "within", "regret", "largest"]
    return pd.DataFrame(found, columns=columns)


def comparable(rows: Frame) -> Frame:
    """The rows that `regret` is about: data-free, with test accuracy, and of one kind of reference set per network."""
    told = rows[~rows["real_data"] & (rows["measure"] == "accuracy") & rows["reference_kl"].notna()]
    told = told[told["lost"].notna()]
    kinds = [name for name in REFERENCE_KIND if name in told]
    if not kinds or told.empty:
        return told
    order = told.sort_values(kinds, ascending=[BEST_FIRST[name] for name in kinds], kind="stable")
    first = order.drop_duplicates("network").set_index("network")[kinds].loc[told["network"]].set_index(told.index)
    is_same = (told[kinds] == first) | (told[kinds].isna() & first.isna())
    return told[is_same.fillna(False).all(axis=1)]


def rank_correlation(rows: Frame) -> float:
    """Spearman's rank correlation of `reference_kl` and `lost`; NaN if one of them does not vary."""
    return float(rows["reference_kl"].rank().corr(rows["lost"].rank())) if len(rows) > 1 else float("nan")


def heat_maps(rows: Frame, network: str) -> dict[float, Frame]:
    """Sparsity → mean of `at_recovered` over data-free trials, with BN weights as rows and temperatures as columns.

    Only sparsities with at least two cells; empty if a side has more than 12 values (a search, not a grid).
    """
    own = finished(rows)
    own = own[(own["network"] == network) & ~own["real_data"] & own["at_recovered"].notna()]
    own = own.dropna(subset=[BN_WEIGHT, TEMPERATURE])
    if max(own[BN_WEIGHT].nunique(), own[TEMPERATURE].nunique()) > NUM_CELLS:
        return {}
    maps = {}
    for level in sorted(own["level"].unique()):
        part = own[own["level"] == level]
        cells = part.pivot_table(index=BN_WEIGHT, columns=TEMPERATURE, values="at_recovered", aggfunc="mean")
        if cells.size > 1:
            maps[float(level)] = cells
    return maps


def front(configs: Frame, cost: str = "stored_bytes", cheap_is_high: bool = False) -> Frame:
    """The Pareto front of the data-free configurations in a cost and `at_recovered`, the cheapest first."""
    own = configs[~configs["real_data"]].dropna(subset=[cost, "at_recovered"])
    own = own.sort_values([cost, "at_recovered"], ascending=[not cheap_is_high, False], kind="stable")
    better = own["at_recovered"] > own["at_recovered"].cummax().shift(fill_value=-1.0)
    return own[better].reset_index(drop=True)


def deployed(configs: Frame) -> Frame:
    """Data-free students whose speed is known, and their int8 files, a row each: `kind` is `float32` or `int8`.

    Of an int8 file `at_recovered`, `speed` and `stored_bytes` are its own.
    """
    own = configs[~configs["real_data"]]
    own_columns = {"at_recovered": "at_quantised", "speed": "int8_latency_ratio", "stored_bytes": "int8_file_bytes"}
    names = {**own_columns, "at_recovered_std": "at_quantised_std", "speed_std": "int8_latency_ratio_std"}
    int8 = own.assign(**{name: own[other] for name, other in names.items()}, kind="int8")
    frames = [frame.dropna(subset=["speed", "at_recovered"]) for frame in (own.assign(kind="float32"), int8)]
    return pd.concat([frame for frame in frames if len(frame)] or frames[:1], ignore_index=True)


def sharing(rows: Frame, batches: Frame) -> Frame:
    """One row per distinct synthesis: its cost with and without sharing.

    `made_s`: seconds of its batches, each counted once. `apart_s`: the sum over its trials of the seconds that their
    images cost. `saved_s`: the difference. A reference set (`domain` reference) is one row per teacher, used by all its
    trials. Real images are left out.
    """
    made = batches[batches["method"] != "real"].dropna(subset=["synthesis_key"])
    rows = rows.dropna(subset=["synthesis_key"])
    parts = [
        used(made[made["domain"] == "train"], rows, "synthesis_key", "synthesis_wall_s").assign(domain="train"),
        used(made[made["domain"] == "reference"], rows, "teacher_hash", "reference_wall_s").assign(domain="reference"),
    ]
    table = pd.concat([part for part in parts if len(part)] or parts[:1], ignore_index=True)
    table["saved_s"] = (table["apart_s"] - table["made_s"]).clip(lower=0.0)
    return table.sort_values("apart_s", ascending=False, kind="stable").reset_index(drop=True)


def used(batches: Frame, rows: Frame, by: str, seconds: str) -> Frame:
    """Batches joined with the trials that used them, by a column of both tables."""
    made = batches.groupby(by, sort=False).agg(
        num_keys=("synthesis_key", "nunique"),
        synthesis_key=("synthesis_key", "first"),
        teacher_hash=("teacher_hash", "first"),
        num_batches=("batch_index", "size"),
        num_images=("num_images", "sum"),
        made_s=("wall_s", "sum"),
    )
    paid = rows.dropna(subset=[seconds])
    uses = paid.groupby(by).agg(num_trials=("trial_id", "size"), apart_s=(seconds, "sum"))
    return made.join(uses).fillna({"num_trials": 0, "apart_s": 0.0}).reset_index(drop=True)


def failures(rows: Frame) -> Frame:
    """Failed trials by reason, the most frequent first: `num_trials`, `networks`, the first `trial_ids`."""
    failed = rows[rows["status"] == "failed"].assign(reason=lambda frame: frame["reason"].fillna("no reason given"))
    return by_text(failed, "reason")


def warnings(rows: Frame) -> Frame:
    """Warnings of trials by text, the most frequent first, with the columns of `failures`."""
    pairs = zip(rows["warnings"], rows["latency_warning"], strict=True)
    texts = ["; ".join(str(text) for text in pair if not is_null(text)) or None for pair in pairs]
    return by_text(rows.assign(warnings=texts).dropna(subset=["warnings"]), "warnings")


def by_text(rows: Frame, name: str) -> Frame:
    """Rows grouped by a text column, the most frequent first: `num_trials`, `networks`, the first `trial_ids`."""
    groups = rows.groupby(name, sort=False)
    table = groups.agg(
        num_trials=("trial_id", "size"),
        networks=("network", lambda names: ", ".join(dict.fromkeys(names))),
        trial_ids=("trial_id", lambda ids: ", ".join(list(ids.dropna())[:3])),
    )
    return table.sort_values("num_trials", ascending=False, kind="stable").reset_index()


def provenance(rows: Frame, columns: Iterable[str]) -> dict[str, dict[str, int]]:
    """Column → value → number of trials, most frequent first, without nulls."""
    counts = {name: rows[name].value_counts().items() for name in columns}
    # pandas stores integers with nulls as floats.
    return {
        name: {f"{value:g}" if isinstance(value, float) else str(value): int(num) for value, num in counts[name]}
        for name in counts
    }


def teachers(rows: Frame) -> Frame:
    """One row per teacher: names, architecture, hash, accuracy, test set, number of trials."""
    known = rows.assign(teacher_hash=rows["teacher_hash"].fillna("unknown"))
    return (
        known.groupby("teacher_hash", sort=False)
        .agg(
            teacher=("teacher", "first"),
            teacher_architecture=("teacher_architecture", "first"),
            teacher_accuracy=("teacher_accuracy", "first"),
            test_set=("test_set", "first"),
            num_test_images=("num_test_images", "first"),
            num_trials=("trial_id", "size"),
        )
        .reset_index()
    )
