"""Which batch is made next, and which stay in memory: the coordinator's decisions, without Ray, clocks or threads.

Batches are made on demand. A reader says which indices it waits for and how far it will go; at most `window` batches
ahead of it are made, and only while no reader anywhere is waiting for a slot. Keys share the slots in proportion to
their waiting requests (stride scheduling: the key with the least service per demand is next), so none starves however
many there are. Source: Waldspurger and Weihl 1995, "Stride Scheduling". References are kept up to a budget of bytes,
the least recently read go first: those batches live in the cache.
"""

import heapq
import itertools
from collections import Counter, OrderedDict
from dataclasses import dataclass, field
from typing import Any

PAGE = 4096  # indices


@dataclass
class Key:
    """One synthesis key: what is cached, being made, waited for, and coming."""

    cached: set[int] = field(default_factory=set)
    in_flight: set[int] = field(default_factory=set)
    waiting: dict[int, int] = field(default_factory=dict)  # index → requests that wait for it
    # Heaps of indices with a waiting reader, and within some reader's window. What is not listed there is stale.
    wanted: list[int] = field(default_factory=list)
    listed_wanted: set[int] = field(default_factory=set)
    ahead: list[int] = field(default_factory=list)
    listed_ahead: set[int] = field(default_factory=set)
    # A byte per index, in pages: 1 where some window has seen it and it is listed ahead, in flight or available since.
    seen: dict[int, bytearray] = field(default_factory=dict)
    num_waiting: int = 0
    # By heap: slots given, each divided by the demand at the time; and whether the key is among those to be served.
    service: dict[str, float] = field(default_factory=lambda: {"wanted": 0.0, "ahead": 0.0})
    queued: dict[str, bool] = field(default_factory=lambda: {"wanted": False, "ahead": False})
    errors: dict[int, str] = field(default_factory=dict)
    fresh: set[int] = field(default_factory=set)  # made here, and no reader has had them yet
    ends: Counter[int] = field(default_factory=Counter)  # of waiting readers: how far they will go (exclusive)


class Schedule:
    """The state of all keys. Indices go: asked for → in flight → held (and cached) → dropped → read again."""

    def __init__(self, budget_bytes: int):
        self.budget_bytes = budget_bytes
        self.keys: dict[str, Key] = {}
        self.held: OrderedDict[tuple[str, int], tuple[Any, int]] = OrderedDict()
        self.held_bytes = 0
        self.service = {"wanted": 0.0, "ahead": 0.0}  # of the key last served: where one that wanted nothing joins
        # Heaps of (service, order of joining, key): every key with something on its own heap, which may be stale.
        self.queues: dict[str, list[tuple[float, int, str]]] = {"wanted": [], "ahead": []}
        self.joined = itertools.count()

    def ask(self, key: str, index: int) -> None:
        """A reader waits for a batch from now on."""
        state = self.keys[key]
        state.waiting[index] = state.waiting.get(index, 0) + 1
        state.num_waiting += 1
        if index not in state.in_flight:
            self._list(key, "wanted", index)

    def _list(self, key: str, name: str, index: int) -> None:
        """Put an index on one of a key's heaps, once, and the key among those to be served."""
        state = self.keys[key]
        listed = getattr(state, f"listed_{name}")
        if index not in listed:
            listed.add(index)
            heapq.heappush(getattr(state, name), index)
        if not state.queued[name]:  # it had nothing to make, and saves up no claim from that time
            state.queued[name] = True
            state.service[name] = max(state.service[name], self.service[name])
            heapq.heappush(self.queues[name], (state.service[name], next(self.joined), key))

    def stop_asking(self, key: str, index: int) -> None:
        """That reader has it, or has gone."""
        state = self.keys[key]
        state.waiting[index] -= 1
        state.num_waiting -= 1
        if state.waiting[index] == 0:
            del state.waiting[index]

    def wait(self, key: str, until: int) -> None:
        """A reader waits, and will go on to `until` (exclusive)."""
        self.keys[key].ends[until] += 1

    def stop_waiting(self, key: str, until: int) -> None:
        """It has something, or has gone."""
        ends = self.keys[key].ends
        ends[until] -= 1
        if not ends[until]:
            del ends[until]

    def look_ahead(self, key: str, position: int, until: int, window: int) -> None:
        """A reader at `position` will go on to `until` (exclusive): up to `window` batches may be made for it."""
        state, end = self.keys[key], min(until, position + window)
        # A window of a large fleet is long, and a reader moves it by a few indices at a time: only those are new.
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
        """A batch that was there or on its way is neither: the next window that sees it lists it again."""
        number, offset = divmod(index, PAGE)
        if number in self.keys[key].seen:
            self.keys[key].seen[number][offset] = 0

    def available(self, key: str, index: int) -> bool:
        """Whether a batch exists already, in memory or in the cache, or has failed for good."""
        state = self.keys[key]
        return index in state.cached or (key, index) in self.held or index in state.errors

    def next_to_make(self) -> tuple[str, int] | None:
        """The batch that the next free slot is for, now in flight; None when there is nothing to make."""
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
        """Drop indices at the head of a heap that need no making any more; whether something is left."""
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
        """Whether a batch is in the cache but not in memory, and nobody is fetching it; it is in flight from now on."""
        state = self.keys[key]
        if index not in state.cached or (key, index) in self.held or index in state.in_flight:
            return False
        state.in_flight.add(index)
        return True

    def hold(self, key: str, index: int, reference: Any, size_bytes: int, *, cached: bool, fresh: bool) -> None:
        """A batch is there: keep its reference, drop the least recently read ones beyond the budget."""
        state = self.keys[key]
        if fresh:
            state.fresh.add(index)
        state.in_flight.discard(index)
        if cached:
            state.cached.add(index)
        self.forget(key, index)
        self.held[key, index] = (reference, size_bytes)
        self.held_bytes += size_bytes
        while self.held_bytes > self.budget_bytes and len(self.held) > 1:
            (other, dropped), (_, size) = self.held.popitem(last=False)
            self.held_bytes -= size
            if dropped not in self.keys[other].cached:
                self._lose(other, dropped)

    def reference(self, key: str, index: int) -> Any | None:
        """The reference of a batch in memory, now the most recently read."""
        found = self.held.get((key, index))
        if found is None:
            return None
        self.held.move_to_end((key, index))
        return found[0]

    def hand_out(self, key: str, index: int) -> tuple[Any, bool] | None:
        """A batch in memory for a reader: its reference, and whether it was found rather than made for this reader."""
        reference = self.reference(key, index)
        if reference is None:
            return None
        fresh = self.keys[key].fresh
        found = index not in fresh
        fresh.discard(index)
        return reference, found

    def collect(self, key: str, indices: list[int]) -> dict[str, Any]:
        """What there is for a reader: `ready` (index → as of `hand_out`) and `errors` (index → reason)."""
        errors = self.keys[key].errors
        found = {index: self.hand_out(key, index) for index in indices}
        return {
            "ready": {index: handed for index, handed in found.items() if handed is not None},
            "errors": {index: errors[index] for index in indices if index in errors},
        }

    def forget(self, key: str, index: int) -> None:
        """Drop a reference: its object is lost, or it is replaced."""
        found = self.held.pop((key, index), None)
        if found:
            self.held_bytes -= found[1]
            if index not in self.keys[key].cached:
                self._lose(key, index)

    def not_there(self, key: str, index: int) -> None:
        """A batch in flight did not come (its maker died, its shard was damaged): make it again if it is wanted."""
        state = self.keys[key]
        state.in_flight.discard(index)
        state.cached.discard(index)
        self._lose(key, index)
        if index in state.waiting:
            self._list(key, "wanted", index)

    def fail(self, key: str, index: int, reason: str) -> None:
        """A batch cannot be made: everybody who asks is told why."""
        self.keys[key].in_flight.discard(index)
        self.keys[key].errors[index] = reason

    def drop(self, key: str) -> bool:
        """Forget a key and all its references, unless a batch of it is in flight or waited for: then nothing is done
        but to make no more ahead. Whether it is gone."""
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
        """Batches that readers wait for and nobody is making."""
        return sum(len(set(state.waiting) - state.in_flight) for state in self.keys.values())

    @property
    def demand(self) -> int:
        """Batches that waiting readers will want and that nobody has made or is making, however far ahead they are.

        More than any window: it says how many synthesizers could be of use. Indices that a reader leaves out count too.
        """
        total = 0
        for key, state in self.keys.items():
            if state.waiting and state.ends:
                begin, end = min(state.waiting), max(state.ends)
                there = state.cached | state.in_flight | state.errors.keys()
                there |= {index for held_key, index in self.held if held_key == key}
                total += max(0, end - begin - sum(begin <= index < end for index in there))
        return total
