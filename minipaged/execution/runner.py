"""What a runner is: something that can launch a plan and, later, tell the tokens it drew."""

from __future__ import annotations

from typing import Protocol

from minipaged.scheduling.plan import StepPlan, StepTokens


class Pending(Protocol):
    """A launched step."""

    def tokens(self) -> StepTokens:
        """Wait for the step and return what it drew."""
        ...


class Runner(Protocol):
    """Executes plans in the order they are launched."""

    def num_blocks(self) -> int:
        """Blocks in the device pool, the null block included."""
        ...

    def launch(self, plan: StepPlan) -> Pending:
        """Start a step; returns before it is done where the device allows."""
        ...
