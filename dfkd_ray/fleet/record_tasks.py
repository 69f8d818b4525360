"""Makes activation records on Ray: a task for each data shard sums a teacher's statistics.

A task's arguments are labels, rows, and references. The plan, the teacher and the reader of the images are put into the
object store once. Ray runs a task again if its process dies.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import ray
from ray.exceptions import RayTaskError

from dfkd_ray.fleet.session import connected

if TYPE_CHECKING:
    from dfkd_ray.bundles import Teacher
    from dfkd_ray.records.fitting import Plan, Shard, Totals


def fit(
    plan: "Plan",
    teacher: "Teacher",
    shards: "Sequence[Shard]",
    num_threads: int,
    *,
    address: str | None = None,
    progress: Callable[[int], None] | None = None,
    on_lost: Callable[[str], None] | None = None,
) -> "Totals":
    """Run `records.fitting.fit` on every shard in Ray workers and merge the totals; `on_lost` as in `connected`.

    `ValueError` as in `records.fitting.fit`.
    """
    from dfkd_ray import bundles
    from dfkd_ray.records import fitting

    with connected(address, on_lost=on_lost):
        task: Any = ray.remote(fit_shard)
        task = task.options(num_cpus=min(num_threads, max(1.0, ray.cluster_resources().get("CPU", 1.0))))
        read, shared = ray.put(shards[0].read), ray.put((plan, bundles.to_arrays(teacher)))
        running = [task.remote([read], shared, shard.labels, shard.rows, num_threads) for shard in shards]
        left = dict(zip(running, shards, strict=True))
        while left:
            ended, _ = ray.wait(list(left), num_returns=1)
            shard = left.pop(ended[0])
            if progress:
                progress(len(shard.rows))
        totals = fitting.empty(plan)
        for ref in running:  # in the order of the shards: sums in another order differ in the last bits
            try:
                totals.merge(ray.get(ref))
            except RayTaskError as error:
                if isinstance(error.cause, ValueError):
                    raise ValueError(str(error.cause)) from None
                raise
        return totals


def fit_shard(read: list[Any], shared: tuple[Any, Any], labels: Any, rows: Any, num_threads: int) -> "Totals":
    """The totals of one shard; runs in a Ray worker."""
    from dfkd_ray import bundles
    from dfkd_ray.records import fitting

    plan, arrays = shared
    shard = fitting.Shard(ray.get(read[0]), labels, rows)
    return fitting.fit(plan, bundles.from_arrays(arrays).network, shard, num_threads)
