"""A synthesizer for benchmarks and tests of the fleet: it makes known arrays after a given sleep, without a network."""

import asyncio
import random
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from dfkd_ray import cache
from dfkd_ray.batches import Batch
from dfkd_ray.config import stable_hash
from dfkd_ray.fleet.synthesizer import NotOpened, Spec, told, whereabouts

NUMERICS = "simulated"


def simulated_spec(name: str, shape: tuple[int, ...], seconds: tuple[float, float] = (0.0, 0.0)) -> Spec:
    """A spec whose batches are uint8 arrays of `shape` (batch, channels, height, width); `seconds`: (least, most)."""
    config = {"method": "simulated", "name": name, "shape": list(shape), "seconds": list(seconds)}
    return Spec(stable_hash(config), config, "train", "none", "none", None)


def simulated_batch(key: str, index: int, config: Mapping[str, Any]) -> Batch:
    """The batch: all pixels have one value, except the first bytes, which hold the index."""
    images = np.full(tuple(config["shape"]), (index * 31 + int(key[:4], 16)) % 256, np.uint8)
    flat = images.reshape(-1)
    stamp = np.frombuffer(index.to_bytes(4, "little"), np.uint8)[: len(flat)]
    flat[: len(stamp)] = stamp
    return Batch(index, images, np.arange(len(images), dtype=np.int64), key)


class Simulated:
    """As `Synthesizer`, but asynchronous, so that one process can simulate many slots. It only sleeps."""

    def __init__(self, cache_root: str | None, device: str, fetch: Callable[[Any], Any]):
        self.cache_root = cache_root
        self.specs: dict[str, Spec] = {}

    async def hello(self) -> dict[str, Any]:
        """As `Synthesizer.hello`."""
        return {"numerics": NUMERICS, **whereabouts()}

    async def open(self, spec: Spec) -> None:
        """As `Synthesizer.open`."""
        self.specs[spec.key] = spec

    async def batch(self, key: str, index: int) -> tuple[Batch, dict[str, Any]]:
        """As `Synthesizer.batch`."""
        if key not in self.specs:
            raise NotOpened(key)
        start, config = time.perf_counter(), self.specs[key].config
        folder = cache.folder_of(self.cache_root, key, NUMERICS) if self.cache_root else None
        found = cache.read(folder, index, key) if folder else None
        if found is not None:
            return found, told(found, True, time.perf_counter() - start)
        low, high = config["seconds"]
        if high:
            await asyncio.sleep(random.Random(f"{key}{index}").uniform(low, high))
        batch = simulated_batch(key, index, config)
        if folder:
            cache.write(folder, batch)
        return batch, told(batch, False, time.perf_counter() - start)
