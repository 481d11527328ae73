"""Where the screen stands in a trace: run, pause, step, seek, find. Drives a player and, if the trace is live, the engine's permits.

Knows players, sources and the clock that it is given; knows nothing of widgets.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from minipaged.config import SamplingParams
from minipaged.errors import TraceError
from minipaged.serving.live import LiveSource
from minipaged.trace.events import Event, ShadowDelta, StepDelta
from minipaged.trace.player import SPEEDS, Player
from minipaged.trace.snapshot import Snapshot
from minipaged.trace.sources import Source
from minipaged.tui.finding import cause_of, find, next_event
from minipaged.tui.moves import RecentMoves, moves_in
from minipaged.tui.shadowfeed import ShadowFeed

Asked = tuple[str, SamplingParams]
REPLAY_SPEED = 10.0  # steps a second
WORDS_SECONDS = 6.0  # that a message stands while steps go by


@dataclass(frozen=True, slots=True)
class Change:
    """What a tick changed: the blocks that may differ (None: any), and whether anything moved at all."""

    ids: npt.NDArray[np.int32] | None
    moved: bool


NOTHING = Change(np.zeros(0, np.int32), False)


class Session:
    """One trace being looked at."""

    def __init__(self, source: Source, *, speed: float | None = None) -> None:
        self.source = source
        self.live = source if isinstance(source, LiveSource) else None
        self.playing = self.live is not None
        self._replaying = False  # whether a resting engine's past is played again
        default = math.inf if self.live is not None else REPLAY_SPEED
        self.speed = default if speed is None else speed
        self.message = ""
        self.failed = ""  # why the engine could not start or go on
        self.input_error = False  # whether that was the user's input
        self.bookmarks: set[int] = set()
        self.query = ""
        self.feed: ShadowFeed | None = None  # other systems on the same requests, once somebody has asked
        self._limits: dict[int, int] = {}  # request -> most new tokens
        self.asked: dict[int, Asked] = {}  # request -> what was asked, as far as the engine took it
        self._pending: deque[Asked] = deque()  # asked, and not yet taken or refused
        self._script: deque[tuple[int, Asked]] = deque()  # a branch: what to ask before which step
        self._until = -1  # a branch: the step to come to first; -1: none
        self._then_run = False  # a run again: what to do when it is reached
        self._turned: dict[str, object] = {}  # knobs, as far as the engine turned them
        self.branched = False
        self._player: Player | None = None
        self._loading = False  # whether `message` says how loading goes
        self._all = True  # the next change concerns every block
        self._owed = 0  # single steps asked of the engine and not yet seen
        self._moves = RecentMoves()
        self._read = ("", 0.0)  # the message, and since when it stands
        self.refused: list[str] = []  # why prompts were not taken
        self._due = 0.0
        self._last: float | None = None
        if self.live is None:
            self._player = Player(source)
            if source.header.finding:
                self._player.seek(len(source))
                self.message = source.header.finding

    # What there is.

    @property
    def caption(self) -> str:
        """What to see here, where somebody explains; "" elsewhere."""
        return ""

    @property
    def ready(self) -> bool:
        """Whether there is a state to show."""
        return self._player is not None

    @property
    def position(self) -> int:
        """Deltas behind us."""
        return self._player.position if self._player is not None else 0

    @property
    def snapshot(self) -> Snapshot:
        """The state here."""
        return self._player.snapshot if self._player is not None else Snapshot()

    @property
    def delta(self) -> StepDelta | None:
        """What led here."""
        return self._player.delta if self._player is not None else None

    @property
    def at_edge(self) -> bool:
        """Whether nothing newer is known."""
        return self.position >= len(self.source)

    @property
    def at_full_speed(self) -> bool:
        """Whether an engine steps as fast as it can."""
        live = self.live
        return live is not None and live.running and not live.idle and not live.ended

    @property
    def word(self) -> str:
        """Where we are in one word."""
        live = self.live
        if live is None:
            return "PLAYING" if self.playing else "REPLAY"
        if self._replaying:
            return "PLAYING"
        if live.ended:
            return "ENDED"
        if not live.ready:
            return "LOADING"
        if self._until >= 0:
            return "BRANCHING"
        if not self.playing:
            return "PAUSED"
        return "IDLE" if live.idle and self.at_edge else "LIVE"

    @property
    def pace(self) -> float:
        """Steps a second that are asked of a live engine."""
        return self.speed

    @property
    def speed_text(self) -> str:
        """The speed in words."""
        return "full speed" if math.isinf(self.speed) else f"{self.speed:g} steps/s"

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
        told = self.snapshot.shadows
        if told or self.feed is None:
            return told
        self.feed.follow()
        return self.feed.at(self.position)

    # Time.

    def look_away(self, now: float) -> None:
        """Something stands before the panes: nothing that is to be read there goes by itself."""

    def tick(self, now: float) -> Change:
        """Take in what is new and go on as far as the speed allows."""
        heard = self._listen()
        passed = 0.0 if self._last is None else max(0.0, now - self._last)
        self._last = now
        applied: list[StepDelta] = []
        if self.live is not None and self._until >= 0 and self.live.ready:
            self._walk_script(self.live)
        if self.live is not None and self.playing and not math.isinf(self.pace):
            self._pace(self.live, passed)
        player = self._player
        if player is not None:
            if self.live is not None and not self._replaying:
                applied = self._tick_live(player, now)
            elif self.playing:
                applied = self._tick_recorded(player, now)
        heard |= self._follow_moves(applied, now)
        self._let_words_go(now)
        if self.source.damage and self.at_edge:
            self.message = self.source.damage
        return self._change(applied, heard)

    def _follow_moves(self, applied: list[StepDelta], now: float) -> bool:
        if self.playing:
            return self._moves.follow(applied, now)
        self._moves.forget()
        return False

    @property
    def moves(self) -> Mapping[int, str]:
        """Who has just gone from queue to queue: while it runs for long enough to be seen, else in this very step."""
        return self._moves.kinds if self.playing else moves_in(self.delta)

    @property
    def flash(self) -> frozenset[int]:
        """Blocks to look at."""
        return frozenset()

    def _let_words_go(self, now: float) -> None:
        """A message makes way for what happens, once there was time to read it."""
        if self.message != self._read[0]:
            self._read = (self.message, now)
        elif self.message and self.playing and not self._loading and now - self._read[1] > WORDS_SECONDS:
            self.message = ""

    def _change(self, applied: list[StepDelta], moved: bool) -> Change:
        if self._all:
            self._all = False
            return Change(None, True)
        if not applied:
            return Change(NOTHING.ids, True) if moved else NOTHING
        return Change(self._player.changed if self._player is not None else NOTHING.ids, True)

    def _listen(self) -> bool:
        live = self.live
        if live is None or (live.ended and not live.notes and (self._player is not None or not len(live))):
            return False
        came = live.poll() > 0
        if self._player is None and len(live):
            self._player = Player(live)
        if self._loading and live.ready:
            self._loading, self.message = False, ""
        while live.notes:
            came = True
            self._hear(live.notes.popleft())
        if live.ended and not self._replaying:
            self.playing = False
            self.message = self.failed or f"{live.ended}: what it did can still be looked at"
            return True
        return came

    def _hear(self, note: dict[str, object]) -> None:
        kind, text = note.get("kind"), str(note.get("text", ""))
        if kind == "failed":
            self.failed, self.input_error = text, bool(note.get("input_error"))
        if kind == "submitted":
            self._taken(note.get("request"))
        elif kind == "turned":
            self._turned[str(note.get("name"))] = note.get("value")
            self.message = text
        else:
            if kind == "refused":
                self.refused.append(text)
                if self._pending:
                    self._pending.popleft()
            self.message = text
            self._loading = kind == "status"

    def _taken(self, request: object) -> None:
        if isinstance(request, int) and self._pending:
            self.asked[request] = asked = self._pending.popleft()
            self._limits[request] = asked[1].max_tokens
            if self.feed is not None:
                self.feed.limit(request, asked[1].max_tokens)

    def _tick_recorded(self, player: Player, now: float) -> list[StepDelta]:
        """Play what is known; a live trace goes on living at its end."""
        player.speed = REPLAY_SPEED if self._replaying and math.isinf(self.speed) else self.speed
        applied = player.tick(now)
        if self.at_edge:
            self._replaying = False
            self.playing = self.live is not None and not self.live.ended
            self._let_run()
        return applied

    def _tick_live(self, player: Player, now: float) -> list[StepDelta]:
        if self.playing:
            return self._follow(player, now)
        if self._owed and player.behind:
            count = min(self._owed, player.behind)
            self._owed -= count
            return player.advance(count)
        return []

    def _follow(self, player: Player, now: float) -> list[StepDelta]:
        """What has come of a run that is being watched."""
        return player.advance(player.behind)

    def _pace(self, live: LiveSource, passed: float) -> None:
        self._due = min(self._due + passed * self.pace, max(1.0, self.pace / 4))
        whole = int(self._due)
        if whole and live.outstanding == 0 and not live.idle:
            self._due -= whole
            live.permit(whole)

    # Going about.

    def toggle(self) -> None:
        """Run or pause. Running a live trace returns to its edge."""
        self.message = ""
        if self.playing:
            self.pause()
        elif self.live is not None and not self.at_edge and (self.live.idle or self.live.ended):
            self.playing = self._replaying = True  # the engine rests: what it did is played again
            self._rest()
        elif self.live is not None and self.live.ended:
            self.message = f"{self.live.ended}: there is nothing to run"
        else:
            if self.live is None and self.at_edge:
                self.seek(0)
            self.playing = True
            self._rest()
            self._let_run()

    def _rest(self) -> None:
        if self._player is not None:
            self._player.rest()

    def _let_run(self) -> None:
        live = self.live
        if live is not None and self.playing:
            self.seek(len(self.source))
            self._due = 0.0
            if math.isinf(self.pace):
                live.run()
            else:
                live.pause()

    def start(self) -> None:
        """A live engine begins to run, if this session is running."""
        self._let_run()

    def pause(self) -> None:
        """Stop here; a live engine stops after the step it is in."""
        self.playing, self._replaying, self._owed = False, False, 0
        if self.live is not None:
            self.live.pause()

    def step(self) -> None:
        """One step forward: in the trace if there is more of it, else of the engine itself."""
        self._take_over()
        if not self.at_edge:
            self.seek(self.position + 1)
        elif self.live is not None and not self.live.ended:
            if self.live.idle:
                self.message = "the engine has nothing to do: press a to add a prompt"
            else:
                self._owed += 1
                self.live.permit(1)
        else:
            self.message = "this is the end of the trace"

    def back(self) -> None:
        """One step back."""
        self.go(self.position - 1)

    def go(self, position: int) -> None:
        """Pause, and be at `position`."""
        self._take_over()
        self.seek(position)

    def _take_over(self) -> None:
        """From here on it goes as keys are pressed."""
        if self.playing:
            self.pause()
        self.message = ""

    def seek(self, position: int) -> None:
        """Be at `position`, clamped."""
        if self._player is not None and position != self.position:
            try:
                self._player.seek(position)
            except TraceError as error:
                self.message = str(error)
            self._all = True

    def refresh(self) -> None:
        """The next change concerns every block: another trace stood on the screen."""
        self._all = True

    def change_speed(self, by: int) -> None:
        """Faster or slower."""
        at = SPEEDS.index(self.speed) if self.speed in SPEEDS else len(SPEEDS) - 1
        self.speed = SPEEDS[max(0, min(len(SPEEDS) - 1, at + by))]
        self.message = ""
        self._let_run()

    # Finding.

    def _arrive(self, found: int | str) -> None:
        """Go to what was found, or say why nothing was."""
        if isinstance(found, str):
            self.message = found
        else:
            self.go(found)

    def next_event(self, direction: int) -> None:
        """To the next (1) or previous (-1) step in which something but writing happened, or a bookmark stands."""
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

    # The engine.

    def submit(self, prompt: str, params: SamplingParams) -> bool:
        """Add a prompt; False where there is no engine."""
        if self.live is None or self.live.ended:
            self.message = "this is a recording: a prompt needs a live engine"
            return False
        self._pending.append((prompt, params))
        self.live.submit(prompt, params)
        return True

    @property
    def settings(self) -> Mapping[str, object]:
        """The engine's settings as they are now."""
        return {**self.source.header.engine, **self._turned}

    def follow_script(self, script: list[tuple[int, Asked]], until: int, *, then_run: bool = False) -> None:
        """A branch: ask the same at the same steps, come to `until`, and stand there, or go on."""
        self.playing, self.branched = False, True
        self._script, self._until, self._then_run = deque(script), until, then_run

    def _walk_script(self, live: LiveSource) -> None:
        here = len(live)
        while self._script and self._script[0][0] <= here:
            self.submit(*self._script.popleft()[1])
        if here >= self._until:
            self._until = -1
            self.seek(here)
            if self._then_run:
                self.toggle()
            self.message = "a new run from the same prompts and seeds" + (
                "" if self._then_run else ": change something, and press space"
            )
        elif live.outstanding == 0 and not live.idle:
            live.permit(min([self._until, *(at for at, _ in self._script)]) - here)

    def knob(self, name: str, value: object) -> None:
        """Turn a knob of the engine."""
        if self.live is None or self.live.ended:
            self.message = "this is a recording: it has no knobs"
        else:
            self.live.knob(name, value)
