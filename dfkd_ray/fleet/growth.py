"""Decides when a fleet adds or removes synthesizers. Pure: no Ray, no clock.

With a range `synthesizers` MIN-MAX at most MAX are up. An added one has a reservation that the autoscaler sees
(`placement.added_cpus`). While it is pending, the autoscaler may launch a machine for it. When it is removed, its
machine becomes idle and may be removed too. The fleet itself adds and removes only actors, never machines.

With "auto" the most is what the machines that are alive have room for (`placement.automatic`), so a fleet grows after
machines have joined. Its added synthesizers stay: they reserve no CPUs, and starting one again takes time.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Counts:
    """The state of a fleet at one moment. The first `fewest` synthesizers are permanent; the others are added ones."""

    fewest: int
    most: int
    up: int  # all synthesizers that answer
    free: int  # all that are up and have a free slot
    added: int = 0
    pending: int = 0  # of the added: those that have not answered yet
    idle: int = 0  # of the added: those that may go, and have had nothing to do for a while
    demand: int = 0  # batches that waiting readers will want, and that nobody has made or is making
    quiet: bool = False  # there has been no demand for a while


@dataclass(frozen=True)
class Change:
    """The decision: how many to add, how many idle ones to remove, whether to withdraw the pending ones."""

    add: int = 0
    remove: int = 0
    withdraw: bool = False


def change(counts: Counts) -> Change:
    """The next change of a fleet.

    It grows while there is demand and no slot is free: at most doubling, at most by the demand, and not while
    synthesizers of the previous step are pending, because their effect is not known yet. Otherwise it shrinks.
    """
    if counts.demand and not counts.free:
        if counts.pending:
            return Change()
        return Change(add=max(0, min(counts.up, counts.demand, counts.most - counts.fewest - counts.added)))
    return Change(remove=counts.idle, withdraw=counts.quiet)
