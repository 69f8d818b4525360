"""How many synthesizers a fleet adds and removes while it runs: the decision, without Ray or clocks.

Of a range (`--synthesizers MIN-MAX`) MAX is the most. An added one reserves what an autoscaler sees
(`placement.added_cpus`): while it is pending it is demand, for which machines are launched, and when it is gone its
machine is idle and may be taken back. So no machine is launched or ended here.

With `--synthesizers auto` the most is what the machines that are alive have room for (`placement.automatic`), so a
fleet grows after machines have joined. Those that it adds stay: they reserve no CPUs, and starting one again takes
time. So none of them counts as idle here, and none is withdrawn.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Counts:
    """A fleet at one moment. The first `fewest` synthesizers have a reservation and always stay; others are added."""

    fewest: int
    most: int
    up: int  # of all: those that answer
    free: int  # of all: those that are up and could make another batch now
    added: int = 0
    pending: int = 0  # of the added: those that have not answered yet
    idle: int = 0  # of the added: those that may go, and have had nothing to do for a while
    demand: int = 0  # batches that waiting readers will want, and that nobody has made or is making
    quiet: bool = False  # there has been no demand for a while


@dataclass(frozen=True)
class Change:
    """What to do: add so many, remove those that are idle, withdraw those that are not up."""

    add: int = 0
    remove: int = 0
    withdraw: bool = False


def change(counts: Counts) -> Change:
    """The next step of a fleet.

    It grows while readers wait and everybody is busy: at most doubling, never beyond what is wanted, and not while
    those of the step before are pending (what they do is not known yet).
    """
    if counts.demand and not counts.free:
        if counts.pending:
            return Change()
        return Change(add=max(0, min(counts.up, counts.demand, counts.most - counts.fewest - counts.added)))
    return Change(remove=counts.idle, withdraw=counts.quiet)
