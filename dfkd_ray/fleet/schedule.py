"""The coordinator's scheduler: which batch is made next, and which stay in memory. Pure: no Ray, clocks or threads.

Batches are made on demand. A reader gives the indices that it waits for and the index up to which it will read. At most
`window` batches ahead of it are made, and only while no reader waits for a slot. Keys share the slots in proportion to
their waiting requests, so none starves (stride scheduling: the key with the least service per demand is next). Source:
Waldspurger and Weihl 1995, "Stride Scheduling". References to batches are kept up to a budget of bytes. The least
recently read are dropped first; those batches can be read from the cache.
"""

import heapq
import itertools
from collections import Counter, OrderedDict
from dataclasses import dataclass, field
from typing import Any

PAGE = 4096  # indices


@dataclass
class Key:
    """The state of one synthesis key: batches that are cached, being made, waited for, or to be made ahead."""

    cached: set[int] = field(default_factory=set)
    in_flight: set[int] = field(default_factory=set)
    waiting: dict[int, int] = field(default_factory=dict)  # index → requests that wait for it
    # Heaps: `wanted` has indices with a waiting reader, `ahead` those within a reader's window. An entry is stale if
    # it is not in the set `listed_…` of its heap.
    wanted: list[int] = field(default_factory=list)
    listed_wanted: set[int] = field(default_factory=set)
    ahead: list[int] = field(default_factory=list)
    listed_ahead: set[int] = field(default_factory=set)
    # A byte per index, in pages: 1 if a window has covered the index and it is listed ahead, in flight or available.
    seen: dict[int, bytearray] = field(default_factory=dict)
    num_waiting: int = 0
    # By heap: the slots given, each divided by the demand at the time; and whether the key is in that heap's queue.
    service: dict[str, float] = field(default_factory=lambda: {"wanted": 0.0, "ahead": 0.0})
    queued: dict[str, bool] = field(default_factory=lambda: {"wanted": False, "ahead": False})
    errors: dict[int, str] = field(default_factory=dict)
    fresh: set[int] = field(default_factory=set)  # made in this run and not yet given to a reader
    ends: Counter[int] = field(default_factory=Counter)  # by waiting reader: the index (exclusive) up to which it reads


class Schedule:
    """The state of all keys. An index goes: asked for → in flight → held (and cached) → dropped → read again."""

    def __init__(self, budget_bytes: int):
        self.budget_bytes = budget_bytes
        self.keys: dict[str, Key] = {}
        self.held: OrderedDict[tuple[str, int], tuple[Any, int]] = OrderedDict()
        self.held_bytes = 0
        self.service = {"wanted": 0.0, "ahead": 0.0}  # of the key last served; a newly queued key starts here
        # Heaps of (service, order of joining, key): all keys whose own heap is not empty; its entries may be stale.
        self.queues: dict[str, list[tuple[float, int, str]]] = {"wanted": [], "ahead": []}
        self.joined = itertools.count()

    def ask(self, key: str, index: int) -> None:
        """A reader starts to wait for a batch."""
        state = self.keys[key]
        state.waiting[index] = state.waiting.get(index, 0) + 1
        state.num_waiting += 1
        if index not in state.in_flight:
            self._list(key, "wanted", index)

    def _list(self, key: str, name: str, index: int) -> None:
        """Put an index on one of a key's heaps, unless it is listed there, and queue the key."""
        state = self.keys[key]
        listed = getattr(state, f"listed_{name}")
        if index not in listed:
            listed.add(index)
            heapq.heappush(getattr(state, name), index)
        if not state.queued[name]:  # it had nothing to make: it gets no credit for that time
            state.queued[name] = True
            state.service[name] = max(state.service[name], self.service[name])
            heapq.heappush(self.queues[name], (state.service[name], next(self.joined), key))

    def stop_asking(self, key: str, index: int) -> None:
        """A reader stops waiting for a batch."""
        state = self.keys[key]
        state.waiting[index] -= 1
        state.num_waiting -= 1
        if state.waiting[index] == 0:
            del state.waiting[index]

    def wait(self, key: str, until: int) -> None:
        """A reader starts to wait; it will read up to `until` (exclusive)."""
        self.keys[key].ends[until] += 1

    def stop_waiting(self, key: str, until: int) -> None:
        """That reader stops waiting."""
        ends = self.keys[key].ends
        ends[until] -= 1
        if not ends[until]:
            del ends[until]

    def look_ahead(self, key: str, position: int, until: int, window: int) -> None:
        """Allow `window` batches to be made ahead for a reader at `position` that reads up to `until` (exclusive)."""
        state, end = self.keys[key], min(until, position + window)
        # The window of a large fleet is long and moves by a few indices at a time: visit only the new ones.
        while position < end:
            number, begin = divmod(position, PAGE)
            seen = state.seen.setdefault(number, bytearray(PAGE))
            offset = seen.find(0, begin, end - number * PAGE)
            while offset >= 0:
                seen[offset] = 1
                index = number * PAGE + offset
                if index not in state.in_flight and not self.available(key, index):
                    self._list(key, "ahead", index)
                offset = seen.find(0, offset + 1, end - number * PAGE)
            position = (number + 1) * PAGE

    def _lose(self, key: str, index: int) -> None:
        """Note that a batch is not available or in flight any more: the next window that covers it lists it again."""
        number, offset = divmod(index, PAGE)
        if number in self.keys[key].seen:
            self.keys[key].seen[number][offset] = 0

    def available(self, key: str, index: int) -> bool:
        """Whether a batch exists, in memory or in the cache, or has failed for good."""
        state = self.keys[key]
        return index in state.cached or (key, index) in self.held or index in state.errors

    def next_to_make(self) -> tuple[str, int] | None:
        """The batch for the next free slot, marked as in flight; None if there is nothing to make."""
        for name, queue in self.queues.items():
            while queue:
                best = queue[0][2]
                if best not in self.keys:  # dropped
                    heapq.heappop(queue)
                    continue
                state = self.keys[best]
                if not self._tidy(best, state, name):
                    heapq.heappop(queue)
                    state.queued[name] = False
                    continue
                index = heapq.heappop(getattr(state, name))
                state.listed_wanted.discard(index)
                state.listed_ahead.discard(index)
                state.in_flight.add(index)
                self.service[name] = max(self.service[name], state.service[name])
                state.service[name] += 1.0 / max(1, state.num_waiting) if name == "wanted" else 1.0
                heapq.heapreplace(queue, (state.service[name], next(self.joined), best))
                return best, index
        return None

    def _tidy(self, key: str, state: Key, name: str) -> bool:
        """Drop indices at the head of a heap that need not be made any more; returns whether an index is left."""
        heap, listed = getattr(state, name), getattr(state, f"listed_{name}")
        while heap:
            index = heap[0]
            stale = index not in listed or index in state.in_flight or self.available(key, index)
            if name == "wanted":
                stale = stale or index not in state.waiting
            if not stale:
                return True
            heapq.heappop(heap)
            listed.discard(index)
        return False

    def wants_reading(self, key: str, index: int) -> bool:
        """Whether a batch must be read from the cache (not in memory, not in flight). If so, it becomes in flight."""
        state = self.keys[key]
        if index not in state.cached or (key, index) in self.held or index in state.in_flight:
            return False
        state.in_flight.add(index)
        return True

    def hold(self, key: str, index: int, ref: Any, size_bytes: int, *, cached: bool, fresh: bool) -> None:
        """Keep the reference of a new batch, and drop the least recently read ones beyond the budget."""
        state = self.keys[key]
        if fresh:
            state.fresh.add(index)
        state.in_flight.discard(index)
        if cached:
            state.cached.add(index)
        self.forget(key, index)
        self.held[key, index] = (ref, size_bytes)
        self.held_bytes += size_bytes
        while self.held_bytes > self.budget_bytes and len(self.held) > 1:
            (other, dropped), (_, size) = self.held.popitem(last=False)
            self.held_bytes -= size
            if dropped not in self.keys[other].cached:
                self._lose(other, dropped)

    def ref(self, key: str, index: int) -> Any | None:
        """The reference of a batch in memory, marked as most recently read; None if it is not in memory."""
        found = self.held.get((key, index))
        if found is None:
            return None
        self.held.move_to_end((key, index))
        return found[0]

    def hand_out(self, key: str, index: int) -> tuple[Any, bool] | None:
        """(reference, found) of a batch in memory; `found` is False for the first reader of a new batch."""
        ref = self.ref(key, index)
        if ref is None:
            return None
        fresh = self.keys[key].fresh
        found = index not in fresh
        fresh.discard(index)
        return ref, found

    def collect(self, key: str, indices: list[int]) -> dict[str, Any]:
        """What there is for a reader: `ready` (index → as of `hand_out`) and `errors` (index → reason)."""
        errors = self.keys[key].errors
        found = {index: self.hand_out(key, index) for index in indices}
        return {
            "ready": {index: handed for index, handed in found.items() if handed is not None},
            "errors": {index: errors[index] for index in indices if index in errors},
        }

    def forget(self, key: str, index: int) -> None:
        """Drop the reference of a batch, because its object is lost or replaced."""
        found = self.held.pop((key, index), None)
        if found:
            self.held_bytes -= found[1]
            if index not in self.keys[key].cached:
                self._lose(key, index)

    def not_there(self, key: str, index: int) -> None:
        """A batch in flight was lost (its synthesizer died, its shard was damaged): make it again if it is wanted."""
        state = self.keys[key]
        state.in_flight.discard(index)
        state.cached.discard(index)
        self._lose(key, index)
        if index in state.waiting:
            self._list(key, "wanted", index)

    def fail(self, key: str, index: int, reason: str) -> None:
        """Record why a batch cannot be made: every reader that asks for it gets this error."""
        self.keys[key].in_flight.discard(index)
        self.keys[key].errors[index] = reason

    def drop(self, key: str) -> bool:
        """Forget a key and its references; returns whether it is gone. While one of its batches is in flight or waited
        for, the key stays, but no more batches are made ahead."""
        state = self.keys.get(key)
        if state is None:
            return True
        state.ahead.clear()
        state.listed_ahead.clear()
        if state.in_flight or state.waiting:
            return False
        for held_key, index in list(self.held):
            if held_key == key:
                self.forget(key, index)
        del self.keys[key]
        return True

    @property
    def queue_depth(self) -> int:
        """The number of batches that readers wait for and that are not being made."""
        return sum(len(set(state.waiting) - state.in_flight) for state in self.keys.values())

    @property
    def demand(self) -> int:
        """The number of batches that waiting readers will need and that are neither made nor being made.

        It is not limited by the window: it tells how many synthesizers would be useful. Indices that a reader skips
        count too.
        """
        total = 0
        for key, state in self.keys.items():
            if state.waiting and state.ends:
                begin, end = min(state.waiting), max(state.ends)
                there = state.cached | state.in_flight | state.errors.keys()
                there |= {index for held_key, index in self.held if held_key == key}
                total += max(0, end - begin - sum(begin <= index < end for index in there))
        return total
