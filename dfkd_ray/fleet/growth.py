"""Decides when the fleet adds or removes synthesizers within `synthesizers` MIN-MAX. Pure: no Ray, no clock.

The fleet adds and removes only actors; the autoscaler adds and removes machines. An added actor has a reservation that
the autoscaler sees (`placement.added_cpus`). While it is pending, the autoscaler may launch a machine for it. When it
is removed, its machine becomes idle and may be removed too.
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
    pending: int = 0  # added ones that have not answered yet
    idle: int = 0  # added ones without work for `Settings.idle_s`
    demand: int = 0  # batches that waiting readers will need and that are neither made nor being made
    quiet: bool = False  # no demand for a while


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
