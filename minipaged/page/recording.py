"""What an LLM did, step by step, kept in memory: a notebook draws it, a file keeps it."""

from __future__ import annotations

import os
from collections.abc import Callable
from html import escape

from minipaged.errors import InputError
from minipaged.page.page import run_page
from minipaged.trace.events import StepDelta
from minipaged.trace.file import Header, StreamWriter
from minipaged.trace.sources import ListSource

MOST_STEPS = 10_000  # kept; later ones are not recorded
FRAME_HEIGHT = 760  # pixels of the page in a notebook

Subscribe = Callable[[Callable[[StepDelta], None]], Callable[[], None]]


class Recording:
    """The steps of an engine since the recording began. A notebook shows it as a page that plays.

    len() is the number of steps. Recording stops after MOST_STEPS of them; `clear` begins anew.
    """

    def __init__(self, subscribe: Subscribe, header: Callable[[], Header]) -> None:
        """subscribe: calls a listener with each step from now on, and returns the way out. header: what the trace is of."""
        self._subscribe = subscribe
        self._header = header
        self._deltas: list[StepDelta] = []
        self._leave: Callable[[], None] | None = subscribe(self._take)

    def _take(self, delta: StepDelta) -> None:
        self._deltas.append(delta)
        if len(self._deltas) >= MOST_STEPS:
            self.stop()

    def __len__(self) -> int:
        return len(self._deltas)

    @property
    def source(self) -> ListSource:
        """The steps so far, as whoever plays or folds traces takes them."""
        return ListSource(self._deltas, header=self._header())

    def stop(self) -> None:
        """Record no further step. What was recorded stays."""
        leave, self._leave = self._leave, None
        if leave is not None:
            leave()

    def clear(self) -> None:
        """Forget all steps and begin anew, with what the engine holds now."""
        self.stop()
        self._deltas = []
        self._leave = self._subscribe(self._take)

    def html(self) -> str:
        """The page of the run, which plays in a browser without a network. InputError where it would be too large."""
        return run_page(self.source)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the trace to a file, for `minipaged show` and `minipaged tui --replay`. InputError where it cannot be written."""
        source = self.source
        try:
            with open(path, "wb") as out:
                writer = StreamWriter(out, source.header)
                for position in range(len(source)):
                    writer.delta(source.delta(position))
                writer.finish()
        except OSError as error:
            raise InputError(f"{os.fspath(path)}: cannot be written: {error.strerror}") from None

    def _words(self) -> str:
        if not self._deltas:
            return "a trace without a step yet: generate something, then show it again"
        full = f" (it ends here: {MOST_STEPS:,} steps are kept at most; clear() begins anew)"
        return f"a trace of {len(self):,} steps{full if len(self) >= MOST_STEPS else ''}"

    def __repr__(self) -> str:
        return f"<{self._words()}; save(path) writes it for minipaged show>"

    def _repr_html_(self) -> str:
        """The page in a frame of its own, so that neither its styles nor its script touch the notebook."""
        if not self._deltas:
            return f"<p>{escape(self._words())}</p>"
        try:
            page = self.html()
        except InputError as error:
            return f"<p>{escape(self._words())}: {escape(str(error))}</p>"
        return (
            f'<iframe title="{escape(self._words())}" sandbox="allow-scripts" srcdoc="{escape(page)}"'
            f' style="width: 100%; height: {FRAME_HEIGHT}px; border: 0"></iframe>'
        )
