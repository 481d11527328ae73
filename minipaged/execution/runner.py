"""What runs an engine's steps: the interface that eager.py, graphs.py and the simulated runner have in common.

This is also where work can be spread over devices: a StepPlan is integers and arrays only, so a runner may send it to other processes
instead of running it. A tensor-parallel runner sends every plan to all ranks, each of which has its heads of the KV pool under the same
block ids, and reads one rank's tokens. A pipeline-parallel runner sends it to the first stage and reads the last one's tokens; the engine
then keeps as many steps in flight as there are stages.
"""

from __future__ import annotations

from typing import Protocol

from minipaged.scheduling.plan import StepPlan, StepTokens


class Pending(Protocol):
    """A launched step."""

    def tokens(self) -> StepTokens:
        """Wait for the step and return what it drew."""
        ...


class Runner(Protocol):
    """Runs plans in the order they are launched: swap-outs, swap-ins, copies, then KV writes and attention layer by layer, then draws.

    A layer writes the keys and values of all tokens of the step before any of them attends.
    """

    def num_blocks(self) -> int:
        """Blocks in the device pool, the null block included; the same on all ranks."""
        ...

    def launch(self, plan: StepPlan) -> Pending:
        """Start a step; returns before it is done where the device allows."""
        ...
