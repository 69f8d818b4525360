"""Search with Optuna: its points as jobs, and its adapter to Ray Tune.

Optuna's study is never read from disk: it is rebuilt from the rows of the `trials` table.
"""

import itertools
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from dfkd_ray.batches import mix_seed
from dfkd_ray.config import LEFT_OUT
from dfkd_ray.config.fields import AUTO
from dfkd_ray.sweep.search import Domain, Point, SearchConfig, excess, loss
from dfkd_ray.sweep.tune_reports import METRIC, MODE
from dfkd_ray.text import is_null

MOST_ASKED = 200  # points in a row that give no new trial, before a space counts as exhausted


class Suggestions:
    """Optuna's points as jobs: `next()` returns one, `tell` reports its result to Optuna.

    `job_at(point)` is the job at a point, or None (the point is excluded, or its fields are incompatible). `probes` are
    jobs at the ends of the domains. They stand for all jobs where something must be known before the search starts.
    """

    def __init__(self, config: SearchConfig, job_at: Callable[[Point], Any | None], probes: Sequence[Any]):
        try:
            import optuna
        except ImportError:
            raise ValueError(
                "search.algorithm=optuna: Optuna is not installed; pip install 'dfkd_ray[search]', or algorithm: random"
            ) from None
        unfit = [name for name, values in config.domains.items() if values.is_log and not simple(values)]
        if unfit:
            raise ValueError(f"search.space.{unfit[0]}: Optuna has no quantised log domains; leave the q out")
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self.config, self.job_at, self.probes = config, job_at, probes
        self.domains = config.domains
        self.seen: set[str] = set()
        self.asked: dict[str, Any] = {}
        self.study: Any = None

    def begin(self, rows: Iterable[Mapping[str, Any]]) -> int:
        """Start from the rows of a `trials` table that lie in this space; returns the number of trials left to run.

        A failed trial is given to Optuna but not counted: another one replaces it. The sampler's seed depends on the
        number of known points; otherwise a resumed search would draw the same points again.
        """
        import optuna

        known = [(point, row) for row in rows if (point := self.point_of(row)) is not None]
        self.seen = {row["trial_id"] for _, row in known if row["status"] != "failed"}
        seed = mix_seed(self.config.seed, len(known)) % 2**32
        # Running trials count as bad ones (constant liar), so that concurrent trials differ.
        sampler = optuna.samplers.TPESampler(seed=seed, constant_liar=True)
        self.study = optuna.create_study(direction="minimize", sampler=sampler)
        distributions = {name: distribution(values) for name, values in self.domains.items()}
        for point, row in known:
            value = None if row["status"] == "failed" else loss(self.config.objective, row)
            trial = optuna.trial.create_trial(
                state=optuna.trial.TrialState.FAIL if value is None else optuna.trial.TrialState.COMPLETE,
                value=value,
                params=self.parameters(point),
                distributions=distributions,
                constraints=None if value is None else excess(self.config, row),
            )
            self.study.add_trial(trial)
        return max(0, self.config.num_trials - len(self.seen))

    def jobs_in(self, rows: Iterable[Mapping[str, Any]]) -> list[Any]:
        """The jobs of the rows that lie in this space."""
        return [self.job_at(point) for row in rows if (point := self.point_of(row)) is not None]

    def next(self) -> Any | None:
        """A job that has not been tried yet; None after `MOST_ASKED` points in a row that give none."""
        import optuna

        distributions = {name: distribution(values) for name, values in self.domains.items()}
        for _ in range(MOST_ASKED):
            trial = self.study.ask(fixed_distributions=distributions)
            job = self.job_at(self.point(trial.params))
            if job is not None and job.id not in self.seen:
                self.seen.add(job.id)
                self.asked[job.id] = trial
                return job
            self.study.tell(trial, state=optuna.trial.TrialState.FAIL)
        return None

    def tell(self, job_id: str, result: Mapping[str, Any] | None) -> None:
        """Report a job's row, or the same columns of it, to Optuna; None if the job failed."""
        import optuna

        trial = self.asked.pop(job_id)
        value = None if result is None else loss(self.config.objective, result)
        if result is None or value is None:
            self.study.tell(trial, state=optuna.trial.TrialState.FAIL)
            return
        for name, over in excess(self.config, result).items():
            trial.set_constraint(name, over)
        self.study.tell(trial, value)

    def point(self, parameters: Mapping[str, Any]) -> Point:
        """The point for Optuna's parameters. A choice is stored there as an index: Optuna takes only plain values."""
        domains = self.domains
        return {
            name: domains[name].values[value] if domains[name].kind == "choice" else domains[name].number(value)
            for name, value in parameters.items()
        }

    def parameters(self, point: Point) -> dict[str, Any]:
        """The inverse of `point`."""
        return {
            name: values.values.index(point[name]) if values.kind == "choice" else point[name]
            for name, values in self.domains.items()
        }

    def point_of(self, row: Mapping[str, Any]) -> Point | None:
        """The point of this space that a row of the `trials` table belongs to; None if there is none.

        The trial id decides. It is a hash of teacher, config and algorithm versions, so a row that differs in one of
        them belongs to no point.
        """
        row = {**row, **{name: default for name, default in LEFT_OUT.items() if is_null(row.get(name))}}
        candidates: list[list[Any]] = []
        for name, values in self.domains.items():
            if values.kind == "choice":
                held = [v for v in values.values if all(same(row.get(k), x) for k, x in columns(name, v).items())]
            else:
                value = row.get(name)
                held = [] if is_null(value) else [values.number(float(value))]  # type: ignore[arg-type]
            candidates.append(held)
        for combination in itertools.product(*candidates):
            point = dict(zip(self.domains, combination, strict=True))
            job = self.job_at(point)
            if job is not None and job.id == row["trial_id"]:
                return point
        return None


def simple(values: Domain) -> bool:
    """Whether a domain is continuous, or a range of consecutive integers."""
    return values.step is None or (values.is_integer and values.step == 1)


def distribution(values: Domain) -> Any:
    """A domain as an Optuna distribution."""
    from optuna import distributions as d

    if values.kind == "choice":
        return d.CategoricalDistribution(range(len(values.values)))
    low, high = values.ends()
    if values.is_integer:
        return d.IntDistribution(low, high, log=values.is_log, step=int(values.step or 1))
    return d.FloatDistribution(low, high, log=values.is_log, step=values.step)


def columns(name: str, value: Any) -> dict[str, Any]:
    """A field's value as columns of the `trials` table."""
    if isinstance(value, Mapping) and name != "student.arguments":
        return {k: v for part, inner in value.items() for k, v in columns(f"{name}.{part}", inner).items()}
    return {name: json.dumps(value, sort_keys=True) if isinstance(value, Mapping) else value}


def same(cell: Any, value: Any) -> bool:
    """Whether a cell of a table may come from a value of a config."""
    if value == AUTO:  # the row has what it stood for; the trial's id decides
        return True
    return is_null(cell) if value is None else not is_null(cell) and cell == value


def searcher(suggestions: Suggestions, add: Callable[[Any], int]) -> Any:
    """A Ray Tune searcher that draws from `suggestions`; `add` gives each job its number. Configs are sent as JSON."""
    from ray.tune.search import Searcher

    class Asking(Searcher):
        """Maps Tune's trial ids to job ids."""

        def __init__(self, suggestions: Suggestions, add: Callable[[Any], int]):
            super().__init__(metric=METRIC, mode=MODE)
            self.suggestions, self.add = suggestions, add
            self.jobs: dict[str, str] = {}

        def __getstate__(self) -> dict[str, Any]:
            return {}  # Tune pickles its searcher for its own resume, which is not used; the ledger cannot be pickled

        def set_search_properties(self, *_args: Any, **_options: Any) -> bool:
            """Nothing to set: space and metric are fixed."""
            return True

        def suggest(self, trial_id: str) -> Any:
            """The next job as a Tune config."""
            job = self.suggestions.next()
            if job is None:
                return Searcher.FINISHED
            self.jobs[trial_id] = job.id
            config = job.config.model_dump_json()
            return {"job": self.add(job), "id": job.id, "config": config, "teacher_hash": job.teacher.hash}

        def on_trial_complete(self, trial_id: str, result: dict | None = None, error: bool = False) -> None:
            """Pass a trial's result on to Optuna."""
            failed = error or not result or bool(result.get("failed"))
            self.suggestions.tell(self.jobs[trial_id], None if failed else result)

        def save(self, checkpoint_path: str) -> None:
            """Nothing to save: a search is resumed from the rows."""

        def restore(self, checkpoint_path: str) -> None:
            """Nothing to restore, for the same reason."""

    return Asking(suggestions, add)
