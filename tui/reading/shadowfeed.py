"""What other systems would hold (shadows), for a trace that does not carry them: computed step by step, and kept for every position."""

from __future__ import annotations

from collections.abc import Mapping

from minipaged.baselines.shadows import ShadowListener, answer_lengths
from minipaged.errors import TraceError
from minipaged.trace.events import ShadowDelta, StepDelta
from minipaged.trace.sources import Source

SYSTEMS = ("orca-max", "orca-pow2", "orca-oracle")
MOST_STEPS = 20_000  # of a recording; a longer one is followed to here
A_FRAME = 400  # steps followed in one frame
MAX_LEN = 2048


class ShadowFeed:
    """What other systems would hold after each step of a source."""

    def __init__(self, source: Source, limits: Mapping[int, int] | None = None) -> None:
        self.source = source
        self.hindsight = not source.live  # whether true answer lengths are known
        self._limits = dict(limits or {})  # request -> most new tokens asked for
        self._request_of: dict[int, int] = {}
        self._computed: list[tuple[ShadowDelta, ...]] = []
        self._listener: ShadowListener | None = None

    def limit(self, request: int, max_tokens: int) -> None:
        """A request's most new tokens, as they become known."""
        self._limits[request] = max_tokens

    def follow(self, *, most: int = A_FRAME) -> None:
        """Catch up with the source, at most so many steps."""
        if self._listener is None:
            self._listener = self._make()
        end = min(len(self.source), MOST_STEPS, len(self._computed) + most)
        while len(self._computed) < end:
            try:
                delta = self.source.delta(len(self._computed))
            except TraceError:
                return
            self._note(delta)
            self._computed.append(self._listener(delta))

    def _make(self) -> ShadowListener:
        max_len = self.source.header.setting("max_model_len", MAX_LEN)
        if self.hindsight:
            known = answer_lengths(self.source.delta(at) for at in range(min(len(self.source), MOST_STEPS)))
            return ShadowListener(SYSTEMS, max_len=max_len, outputs=known)
        return ShadowListener(SYSTEMS, max_len=max_len, limit_of=self._limit_of)

    def _note(self, delta: StepDelta) -> None:
        for patch in delta.sequences:
            self._request_of[patch.sequence] = patch.request

    def _limit_of(self, sequence: int) -> int:
        return self._limits.get(self._request_of.get(sequence, -1), MAX_LEN)

    def at(self, position: int) -> dict[str, ShadowDelta]:
        """By system, after the first `position` steps."""
        if not 0 < position <= len(self._computed):
            return {}
        return {shadow.system: shadow for shadow in self._computed[position - 1]}
