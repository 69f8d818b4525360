"""Privacy audit: does a student, or do the synthetic images, tell whether an image was in the teacher's training set?

Likelihood ratio attacks with shadow teachers (`membership`) on what a data-free pipeline gives away (`audit`,
`shadows`). A folder holds all of it: shadow teachers, one sweep with all their students, a file of scores for each
teacher and arm. The same command goes on with what is missing, and reads the attacks from the scores.
"""

import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

import dfkd_ray
from dfkd_ray import commit, sweep, targets
from dfkd_ray.bench import audit as audits
from dfkd_ray.bench import membership, rates, shadows
from dfkd_ray.bench.audit import Audit, AuditConfig, Source
from dfkd_ray.bench.rates import Rate
from dfkd_ray.config import flat
from dfkd_ray.results.measurements import Row
from dfkd_ray.results.tables import encoded
from dfkd_ray.storage import Folder, Where

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CLAIM, SCHEMA = "privacy.json", "dfkd_ray.privacy/1"
TABLE, FIGURE = "attacks.parquet", "roc.png"
PRODUCT = targets.Product("a privacy audit", {CLAIM: targets.claims(SCHEMA)})
IMAGES, CANARIES = "images", "canaries"
CONTROL = "control"  # the scores of an arm against halves that no teacher was trained on
NAMES = {"online": "online", "online_own_variance": "online, own var.", "offline": "offline", "threshold": "threshold"}
MEMORISED = 0.2  # true positive rate at 1 % that an audit must find in teachers that learned their images by heart
CHANCE = 0.02  # and the highest that it may find where nothing is to be found


@dataclass(frozen=True)
class Attack:
    """One attack on one arm: over all shadows (`model` None) or on one. A rate is None where it cannot be resolved."""

    arm: str
    examples: str
    attack: str
    model: int | None
    num_members: int
    num_non_members: int
    auc: Rate
    tprs: dict[float, Rate | None]

    def row(self) -> dict[str, Any]:
        """As a row of the table."""
        names = ("arm", "examples", "attack", "model", "num_members", "num_non_members")
        row = {name: getattr(self, name) for name in names} | columns_of("auc", self.auc)
        for fpr, tpr in self.tprs.items():
            row |= columns_of(f"tpr_at_{fpr:g}", tpr)
        return row

    def measured(self) -> Row:
        """For a file of measurements."""
        tprs = {f"tpr_at_{fpr:g}": rate for fpr, rate in self.tprs.items()}
        counts = {"num_members": self.num_members, "num_non_members": self.num_non_members}
        labels = {"arm": self.arm, "examples": self.examples, "attack": self.attack}
        return Row(labels, {"auc": self.auc, **tprs, **counts})


def columns_of(name: str, rate: Rate | None) -> dict[str, float | None]:
    """A rate and its interval as columns."""
    if rate is None:
        return dict.fromkeys((name, f"{name}_low", f"{name}_high"))
    return {name: rate.value, f"{name}_low": rate.low, f"{name}_high": rate.high}


def run(config: AuditConfig, source: Source, out: Where) -> tuple[list[Attack], int]:
    """Run or resume an audit in a folder, print its table, and write table and figure; returns also failed trials.

    `ValueError` for a folder of another audit, or of anything else. An arm with a failed trial is left out, and said.
    """
    audit, place = Audit(config, source), targets.check(out, PRODUCT)
    audits.check(audit)
    claim(place, audit)
    begun, num_shadows = time.perf_counter(), config.num_shadows
    teachers = []
    for index in range(num_shadows):
        start = time.perf_counter()
        teachers.append(shadows.teacher_of(audit, index, place))
        print(f"teacher {index + 1}/{num_shadows}: {time.perf_counter() - start:.0f} s", flush=True)
        if "teacher" in config.arms:
            shadows.scores_of(audit, "teacher", index, teachers[-1], None, place)
    jobs = shadows.jobs_of(audit, teachers)
    start, failed = time.perf_counter(), []
    if jobs:
        data = sweep.Data(real_of=lambda teacher, settings: shadows.real_source(audit, teacher, settings))
        sweep.run(list(jobs.values()), place / shadows.SWEEP, (place / shadows.CACHE).uri, data=data)
        rows = {row["trial_id"]: row for row in sweep.rows_in(place / shadows.SWEEP, ["trial_id", "status", "reason"])}
        failed = [key for key, job in jobs.items() if rows.get(job.id, {}).get("status") != "finished"]
        for arm, index in failed:
            print(f"failed: {arm} of teacher {index + 1}: {rows.get(jobs[arm, index].id, {}).get('reason')}")
        print(f"{len(jobs)} students, {len(failed)} failed: {time.perf_counter() - start:.0f} s", flush=True)
    arms = [arm for arm in config.arms if arm not in {arm for arm, _ in failed}]
    start = time.perf_counter()
    phi = {
        arm: np.stack(
            [shadows.scores_of(audit, arm, i, teachers[i], jobs.get((arm, i)), place) for i in range(num_shadows)]
        )
        for arm in arms
    }
    print(f"scores of {audit.num_attacked:,} images: {time.perf_counter() - start:.0f} s", flush=True)
    found = attacked(audit, phi)
    write_table(place, audit, found)
    if phi:
        from dfkd_ray.report.figures import as_png

        place.write(FIGURE, as_png(curves(audit, phi)))
    for line in lines(audit, found, sorted({arm for arm, _ in failed})):
        print(line)
    print(f"{time.perf_counter() - begun:.0f} s; table: {place / TABLE}, figure: {place / FIGURE}")
    return found, len(failed)


def claim(place: Folder, audit: Audit) -> None:
    """Claim the folder for this audit; `ValueError` with the first field that differs if another one has claimed it."""
    fields = flat(audit.config.model_dump(mode="json", exclude=set(audits.NOT_COMPARED)))
    before = targets.head(place, CLAIM)
    if before is not None:
        found = json.loads(before)  # an object, by its schema
        try:
            earlier = dict(json.loads(found["settings"]))
        except (KeyError, TypeError, ValueError):
            raise ValueError(f"{place / CLAIM}: it is damaged; give a new folder") from None
        for name in (*fields, *earlier):
            if fields.get(name) != earlier.get(name):
                raise ValueError(
                    f"{place}: an audit with {name}={earlier.get(name)}, now it is {fields.get(name)}; give the same "
                    "settings, or a new folder"
                )
        if found.get("audit") != audit.hash:
            raise ValueError(
                f"{place}: an audit of other images or labels, or by another version of the algorithms; give the same, "
                "or a new folder"
            )
        return
    targets.claim(place, CLAIM, SCHEMA, audit=audit.hash, settings=json.dumps(fields))


def groups(audit: Audit) -> Iterator[tuple[str, slice]]:
    """What is attacked separately: the images with their own labels, and the canaries."""
    num = audit.config.num_canaries
    yield IMAGES, slice(num, audit.num_attacked)
    if num:
        yield CANARIES, slice(0, num)


def attacked(audit: Audit, phi: dict[str, np.ndarray]) -> list[Attack]:
    """All attacks on all arms, over all shadows and on each; and the control on the first arm.

    `phi`: by arm, (shadows, attacked images, queries).
    """
    found = []
    for examples, own in groups(audit):
        keep = audit.keep[:, own]
        for arm, values in phi.items():
            for name, attack in membership.ATTACKS.items():
                scores = attack(values[:, own], keep)
                found.append(measured(audit, (arm, examples, name, None), scores, keep))
                for model in range(len(scores)):
                    key = (arm, examples, name, model)
                    found.append(measured(audit, key, scores[model], keep[model]))
        for values in list(phi.values())[:1]:
            drawn = membership.halves(len(keep), keep.shape[1], audit.config.seed + 1)
            scores = membership.ATTACKS["online"](values[:, own], drawn)
            found.append(measured(audit, (CONTROL, examples, "online", None), scores, drawn))
    return found


def measured(audit: Audit, key: tuple[str, str, str, int | None], scores: np.ndarray, keep: np.ndarray) -> Attack:
    """The rates of these scores."""
    members, non_members = scores[keep], scores[~keep]
    tprs = {
        fpr: rates.tpr_at(members, non_members, fpr) if len(non_members) >= rates.fewest_non_members(fpr) else None
        for fpr in audit.config.fprs
    }
    area = rates.auc(members, non_members)
    return Attack(*key, len(members), len(non_members), area, tprs)


def write_table(place: Folder, audit: Audit, found: Sequence[Attack]) -> None:
    """Write the attacks as Parquet; the settings are in the metadata of its schema."""
    about = {
        "schema": SCHEMA,
        "audit": audit.hash,
        "settings": audit.config.model_dump_json(),
        "package_version": dfkd_ray.__version__,
        "commit": commit.of_package() or "",
    }
    table = pa.Table.from_pylist([attack.row() for attack in found])
    place.write(TABLE, encoded(table.replace_schema_metadata({"dfkd_ray.privacy": json.dumps(about)})))


def percent(share: float) -> str:
    """A share in percent, with three digits or two after the point."""
    return f"{100 * share:.{2 if share < 0.09995 else 1}f}"


def cell(rate: Rate | None) -> str:
    """A true positive rate for the terminal, in percent."""
    return "–" if rate is None else f"{percent(rate.value)} ({percent(rate.low)}-{percent(rate.high)})"


def lines(audit: Audit, found: Sequence[Attack], left_out: Sequence[str]) -> Iterator[str]:
    """The printed tables, at most 80 columns wide."""
    config = audit.config
    for examples, _ in groups(audit):
        rows = [one for one in found if one.examples == examples and one.model is None]
        if not rows:
            continue
        what = "images with their own labels" if examples == IMAGES else "canaries: images trained on with wrong labels"
        num = config.num_audited if examples == IMAGES else config.num_canaries
        yield f"{num:,} {what}"
        yield (
            f"{config.num_shadows} teachers: {rows[0].num_members:,} members, {rows[0].num_non_members:,} non-members; "
            "95 % intervals"
        )
        heads = "".join(f"{f'TPR, % at FPR {100 * fpr:g} %':>20}" for fpr in config.fprs)
        yield f"{'arm':<10}{'attack':<17}{heads}{'AUC':>12}"
        for one in rows:
            cells = "".join(f"{cell(one.tprs[fpr]):>20}" for fpr in config.fprs)
            half = (one.auc.high - one.auc.low) / 2
            yield f"{one.arm:<10}{NAMES[one.attack]:<17}{cells}{f'{one.auc.value:.3f}±{half:.3f}':>12}"
        for fpr in config.fprs:
            if rows[0].tprs[fpr] is None:
                needed = rates.fewest_non_members(fpr)
                yield f"–: an FPR of {100 * fpr:g} % needs {needed:,} non-members"
        yield ""
    for arm in left_out:
        yield f"left out: {arm}, of which a trial failed"
    missing = [arm for arm in ("teacher", *audits.STUDENTS, "nearest") if arm not in config.arms]
    if missing:
        yield f"not audited: {', '.join(missing)}"
    yield f"{CONTROL}: the first arm's scores against halves that no teacher was trained on"


def self_test(found: Sequence[Attack]) -> list[str]:
    """What contradicts an audit of teachers that learned their images by heart; empty if nothing does."""
    at = {(one.arm, one.attack): one.tprs.get(0.01) for one in found if one.examples == IMAGES and one.model is None}
    seen, control = at.get(("teacher", "online")), at.get((CONTROL, "online"))
    if seen is None or control is None:
        return ["it reads the arm teacher at fprs=0.01, and one of the two was left out"]
    wrong = []
    if seen.value < MEMORISED:
        wrong.append(f"TPR at 1 % is {seen.value:.3f} on memorising teachers, expected at least {MEMORISED}")
    if control.value > CHANCE:
        wrong.append(f"TPR at 1 % is {control.value:.3f} on the control, expected at most {CHANCE}")
    return wrong


def curves(audit: Audit, phi: dict[str, np.ndarray]) -> "Figure":
    """ROC curves of the online attack, both axes logarithmic: a line per arm, and chance."""
    from matplotlib.ticker import NullFormatter

    from dfkd_ray.report.figures import INK, PALETTE, new_figure, style

    parts = list(groups(audit))
    with style():
        figure = new_figure(3.2 * len(parts) + 0.6)
        axes = figure.subplots(len(parts), 1, squeeze=False, sharex=True)[:, 0]
        for one, (examples, own) in zip(axes, parts, strict=True):
            keep = audit.keep[:, own]
            least = 1 / int((~keep).sum())
            for color, (arm, values) in zip(PALETTE, phi.items(), strict=False):
                scores = membership.ATTACKS["online"](values[:, own], keep)
                false, true = rates.roc(scores[keep], scores[~keep])
                shown = np.unique(np.searchsorted(false, np.geomspace(least, 1, 400)).clip(max=len(false) - 1))
                one.plot(false[shown], true[shown], color=color, label=arm)
            one.plot([least, 1], [least, 1], color=INK, linewidth=1.0, linestyle=(0, (6, 3)), label="chance")
            one.set_xscale("log")
            one.set_yscale("log")
            one.set_ylim(least, 1.2)
            for axis in (one.xaxis, one.yaxis):  # the style shows no formulas, as 10 to a power would be
                axis.set_major_formatter(lambda value, _place: f"{100 * value:g}")
                axis.set_minor_formatter(NullFormatter())
            one.set_ylabel("true positive rate, %")
            one.set_title({IMAGES: "images", CANARIES: "canaries"}[examples])
        axes[-1].set_xlabel("false positive rate, %")
        handles, labels = axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=3)
    return figure
