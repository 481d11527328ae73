"""A branch: a new engine is asked the same prompts before the same steps, up to the step where it is to part from the old run."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable

from minipaged.config import SamplingParams
from minipaged.tui.playback import Playback, Script

Asked = tuple[str, SamplingParams]


class Branch(Script):
    """prompts: (position, what to ask before that step). until: the position to come to. then_run: go on there by itself."""

    word = "BRANCHING"

    def __init__(
        self,
        prompts: Iterable[tuple[int, Asked]],
        until: int,
        submit: Callable[[str, SamplingParams], object],
        *,
        then_run: bool = False,
    ) -> None:
        self._prompts = deque(prompts)
        self._until, self._submit, self._then_run = until, submit, then_run
        self._permitted = 0  # the position that the permits so far lead to

    def tick(self, playback: Playback, now: float) -> str | None:
        """Ask what is due, and permit the steps up to the next prompt."""
        live = playback.live
        if live is None or not live.ready:
            return None
        here = len(live)
        while self._prompts and self._prompts[0][0] <= here:
            self._submit(*self._prompts.popleft()[1])
        if here < self._until:
            # Counted from what was permitted, not from what has arrived: a step may be on its way here.
            target = min([self._until, *(at for at, _ in self._prompts)])
            if target > self._permitted:
                live.permit(target - self._permitted)
                self._permitted = target
            return None
        playback.end_script()
        playback.seek(here)
        if self._then_run:
            playback.toggle()
            return "a new run from the same prompts and seeds"
        return "a new run from the same prompts and seeds: change something, and press space"

    def run(self, playback: Playback) -> str:
        """A branch comes to its step first: other steps in between would put the prompts elsewhere."""
        return f"the new run first comes to step {self._until}"

    def step(self, playback: Playback, by: int) -> str:
        """What has come so far can be looked at."""
        if by > 0 and playback.at_edge:
            return self.run(playback)
        return playback.seek(playback.position + by)
