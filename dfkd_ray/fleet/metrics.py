"""The fleet's Ray metrics, `dfkd_ray_*`: images, cache hits, queue depth, idle share of each synthesizer."""

from collections.abc import Mapping
from typing import Any

from ray.util.metrics import Counter, Gauge


class Metrics:
    """The metrics of one coordinator."""

    def __init__(self) -> None:
        tags = ("synthesizer",)
        self.images = Counter("dfkd_ray_images", "synthetic images made")
        self.found = Counter("dfkd_ray_cache_hits", "batches read from the cache")
        self.queue = Gauge("dfkd_ray_queue_depth", "batches waited for and not being made")
        self.idle = Gauge("dfkd_ray_idle_share", "idle share of a synthesizer since it is up", tag_keys=tags)
        self.rate = Gauge("dfkd_ray_images_per_s", "synthetic images made per second")

    def show(self, status: Mapping[str, Any]) -> None:
        """Update the gauges from a coordinator's status."""
        self.queue.set(status["queue_depth"])
        self.rate.set(status["images_per_s"])
        for name, share in status["idle"].items():
            if share is not None:
                self.idle.set(share, tags={"synthesizer": name})
