"""What the screen shows of one trace: a playback, the message line, marks and bookmarks, other systems beside it, what was asked.

Finding, asking the engine for something, and taking in what it answers are done here; moving in time is the playback's.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from minipaged.config import SamplingParams
from minipaged.serving.live import LiveSource
from minipaged.trace.events import Event, ShadowDelta, Stats, StepDelta
from minipaged.trace.snapshot import Snapshot
from minipaged.trace.sources import Source
from minipaged.tui.playback import Mode, Playback
from minipaged.tui.reading.finding import cause_of, find, next_event
from minipaged.tui.reading.moves import RecentMoves, moves_in
from minipaged.tui.reading.people import Person
from minipaged.tui.reading.shadowfeed import ShadowFeed
from minipaged.tui.reading.trends import Trends
from minipaged.tui.scripted.branch import Asked, Branch
from minipaged.tui.scripted.lessons import Lesson
from minipaged.tui.scripted.tour import Tour
from minipaged.tui.scripted.walk import LessonWalk

MESSAGE_SECONDS = 6.0  # that a message stands while steps go by
MAX_PEOPLE = 4096  # the newest requests of a server
RECORDING = "this is a recording"


@dataclass(frozen=True, slots=True)
class Change:
    """What a tick changed: the blocks that may differ (None: any), and whether anything moved at all."""

    ids: npt.NDArray[np.int32] | None
    moved: bool


NOTHING = Change(np.zeros(0, np.int32), False)


class Session:
    """One trace being looked at. guided: a live run goes slowly at first, and stops where there is something to explain."""

    def __init__(
        self, source: Source, *, speed: float | None = None, guided: bool = False, ends_fullest: bool = False
    ) -> None:
        self.source = source
        self.ends_fullest = ends_fullest
        self.playback = Playback(source, speed=speed, ends_fullest=ends_fullest)
        self._trends = Trends(source)
        if guided:
            self.playback.script = Tour()
        self.message = ""
        self.failed = ""  # why the engine could not start or go on
        self.input_error = False  # whether that was the user's input
        self.bookmarks: set[int] = set()
        self.query = ""
        self.branched = False  # whether this run repeats another one's beginning
        self.feed: ShadowFeed | None = None  # other systems on the same requests, once somebody has asked
        self.asked: dict[int, Asked] = {}  # request -> what was asked, as far as the engine took it
        self.people: dict[int, Person] = {}  # request -> who asked a server for it
        self.refused: list[str] = []  # why prompts were not taken
        self._pending: deque[Asked] = deque()  # asked, and not yet taken or refused
        self._limits: dict[int, int] = {}  # request -> most new tokens
        self._settings: dict[str, object] = {}  # changed while the engine ran
        self._loading = False  # whether `message` says how loading goes
        self._message_since = ("", 0.0)  # a message, and since when it stands
        self._moves = RecentMoves()
        if source.header.finding and self.live is None:
            self.playback.seek(len(source))
            self.message = source.header.finding

    @classmethod
    def of_lesson(cls, lesson: Lesson, *, animated: bool) -> Session:
        """A lesson at its first beat."""
        session = cls(lesson.source)
        LessonWalk(lesson, animated=animated).begin(session.playback)
        return session

    # The moment that is shown.

    @property
    def live(self) -> LiveSource | None:
        """The engine, where there is one."""
        return self.playback.live

    @property
    def position(self) -> int:
        """How many deltas lead to the state that is shown."""
        return self.playback.position

    @property
    def snapshot(self) -> Snapshot:
        """The state that is shown."""
        return self.playback.snapshot

    @property
    def delta(self) -> StepDelta | None:
        """The last delta before this moment."""
        return self.playback.delta

    @property
    def moves(self) -> Mapping[int, str]:
        """Who has just gone from queue to queue: while it runs for long enough to be seen, else in this very step."""
        return self._moves.kinds if self.playback.moving else moves_in(self.delta)

    @property
    def pending(self) -> tuple[str, ...]:
        """Prompts that no step has shown yet: not taken by the engine, or taken while its first step is under way."""
        taken = () if len(self.source) else self.asked.values()
        return tuple(prompt for prompt, _ in (*taken, *self._pending))

    @property
    def final(self) -> Stats | None:
        """What a run that is over has come to, while its fullest moment is shown."""
        return self.source.delta(len(self.source) - 1).stats if self.playback.done else None

    @property
    def trends_behind(self) -> bool:
        """Whether the figures do not reach to this step yet."""
        return self._trends.behind

    def trends(self) -> npt.NDArray[np.float32]:
        """The figures of the steps up to this one."""
        self._trends.follow()
        return self._trends.upto(self.position)

    # Other systems.

    def limits(self, known: Mapping[int, int]) -> None:
        """Requests' most new tokens, where others asked for them."""
        self._limits.update(known)

    def compare(self) -> None:
        """Follow what other systems would hold, from the trace's start on."""
        if self.feed is None:
            self.feed = ShadowFeed(self.source, self._limits)

    def shadows(self) -> Mapping[str, ShadowDelta]:
        """What other systems would hold here: the trace's own shadows, else those that are followed."""
        recorded = self.snapshot.shadows
        if recorded or self.feed is None:
            return recorded
        self.feed.follow()
        return self.feed.at(self.position)

    # Time.

    def tick(self, now: float) -> Change:
        """Take in what the engine sent, and go on as far as the playback does."""
        came = self._receive()
        progress = self.playback.tick(now)
        if progress.message is not None:
            self.message = progress.message
        if self.playback.moving:
            came |= self._moves.follow(progress.applied, now)
        else:
            self._moves.forget()
        self._expire_message(now)
        if self.source.damage and self.playback.at_edge:
            self.message = self.source.damage
        return self._change(progress.applied, came)

    def _expire_message(self, now: float) -> None:
        """A message makes way for what happens, once there was time to read it."""
        if self.message != self._message_since[0]:
            self._message_since = (self.message, now)
            return
        read = now - self._message_since[1] > MESSAGE_SECONDS
        if read and self.playback.moving and not self._loading:
            self.message = ""

    def _change(self, applied: list[StepDelta], moved: bool) -> Change:
        if self.playback.take_jump():
            return Change(None, True)
        if not applied:
            return Change(NOTHING.ids, True) if moved else NOTHING
        return Change(self.playback.take_changed(), True)

    # What the engine sends.

    def _receive(self) -> bool:
        live = self.live
        if live is None or (live.ended and not live.notes and (self.playback.ready or not len(live))):
            return False
        came = live.poll() > 0
        if self._loading and live.ready:
            self._loading, self.message = False, ""
        while live.notes:
            came = True
            self._take_note(live.notes.popleft())
        if live.ended and self.playback.mode is not Mode.REPLAYING:
            self.message = self.failed or f"{live.ended}: what it did can still be looked at"
            return True
        return came

    def _take_note(self, note: Mapping[str, object]) -> None:
        kind, text = note.get("kind"), str(note.get("text", ""))
        if kind == "request":
            request = note.get("request")
            if isinstance(request, int):
                self.people[request] = Person.of_note(note)
                while len(self.people) > MAX_PEOPLE:
                    del self.people[next(iter(self.people))]
            return
        if kind == "submitted":
            self._take_submitted(note.get("request"))
            return
        self.message = text
        if kind == "turned":
            self._settings[str(note.get("name"))] = note.get("value")
            return
        self._loading = kind == "status"
        if kind == "failed":
            self.failed, self.input_error = text, bool(note.get("input_error"))
        elif kind == "refused":
            self.refused.append(text)
            if self._pending:
                self._pending.popleft()

    def _take_submitted(self, request: object) -> None:
        if isinstance(request, int) and self._pending:
            self.asked[request] = asked = self._pending.popleft()
            self._limits[request] = asked[1].max_tokens
            if self.feed is not None:
                self.feed.limit(request, asked[1].max_tokens)

    # Going about.

    def go(self, position: int) -> None:
        """Pause, and be at `position`."""
        self.message = self.playback.go(position)

    def _arrive(self, found: int | str) -> None:
        """Go to what was found, or say why nothing was."""
        if isinstance(found, str):
            self.message = found
        else:
            self.go(found)

    def next_event(self, direction: int) -> None:
        """To the next (1) or previous (-1) step in which something but writing happened, or a bookmark stands; in a lesson, to a beat."""
        script = self.playback.script
        if script is not None and script.by_beats:
            self.message = self.playback.step(direction)
        else:
            self._arrive(next_event(self.source, self.position, direction, self.bookmarks))

    def bookmark(self) -> None:
        """Set or take away a bookmark here."""
        self.bookmarks ^= {self.position}
        self.message = f"bookmark {'set' if self.position in self.bookmarks else 'taken away'}: {{ and }} stop there"

    def find(self, query: str, direction: int = 1) -> None:
        """Go to what is asked: a kind of event (cow, preempt, swap …), `seq B`, `block 31`, `step 40`."""
        self.query = " ".join(query.split())
        self._arrive(find(self.source, self.snapshot, self.position, self.query, direction))

    def why(self, event: Event) -> None:
        """Go to the step of the event that caused this one."""
        here = self.delta.events if self.delta is not None else ()
        self._arrive(cause_of(self.source, self.position, event, here))

    # Asking the engine.

    def cannot_steer(self, what: str) -> str:
        """Why the engine cannot be asked, `what` a recording lacks; "" where it can."""
        if self.live is None or self.live.ended:
            return f"{RECORDING}: {what}"
        return self.live.looks_on

    def submit(self, prompt: str, params: SamplingParams) -> bool:
        """Add a prompt; False where there is no engine that takes one."""
        self.message = self.cannot_steer("a prompt needs a live engine")
        if self.live is None or self.message:
            return False
        self._pending.append((prompt, params))
        self.live.submit(prompt, params)
        return True

    @property
    def settings(self) -> Mapping[str, object]:
        """The engine's settings as they are now."""
        return {**self.source.header.engine, **self._settings}

    def repeat(self, prompts: Iterable[tuple[int, Asked]], until: int, *, then_run: bool = False) -> None:
        """Become a branch: ask the same before the same steps, come to `until`, and stand there, or go on."""
        self.branched = True
        self.playback.begin(Branch(prompts, until, self.submit, then_run=then_run))

    def knob(self, name: str, value: object) -> None:
        """Change a setting of the running engine."""
        self.message = self.cannot_steer("its settings cannot be changed")
        if self.live is not None and not self.message:
            self.live.knob(name, value)
