"""Where the screen stands in a trace, and how it goes on: run, pause, step, seek, speed.

`Playback` moves a player along a source and, where the source is a live engine, hands out the permits the engine steps by. Its mode is
one value; `TRANSITIONS` lists which mode may follow which. Time is passed in.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import Enum

import numpy as np
import numpy.typing as npt

from minipaged.errors import TraceError
from minipaged.serving.live import LiveSource
from minipaged.trace.events import StepDelta
from minipaged.trace.player import SPEEDS, Player
from minipaged.trace.snapshot import Snapshot
from minipaged.trace.sources import Source

REPLAY_SPEED = 10.0  # steps a second


class Mode(Enum):
    """How the position changes from one frame to the next."""

    PAUSED = "paused"  # it stays until a key moves it
    FOLLOWING = "following"  # a live engine runs, and its newest step is shown
    REPLAYING = "replaying"  # steps that were recorded before are shown again at the chosen speed
    SCRIPTED = "scripted"  # a script decides: a branch on its way, a stop of the guide, a lesson


TRANSITIONS = {
    Mode.PAUSED: (Mode.FOLLOWING, Mode.REPLAYING, Mode.SCRIPTED),
    Mode.FOLLOWING: (Mode.PAUSED, Mode.SCRIPTED),
    Mode.REPLAYING: (Mode.PAUSED, Mode.FOLLOWING),
    Mode.SCRIPTED: (Mode.PAUSED, Mode.FOLLOWING),
}


@dataclass(frozen=True, slots=True)
class Progress:
    """What a tick did: the deltas that were applied, and a new message (None: the old one stays)."""

    applied: list[StepDelta]
    message: str | None = None


class Script:
    """What a playback does of its own accord. While the mode is SCRIPTED, the keys that move call the script.

    Methods that a key calls return the message to show; "" clears it. What is written here is what a script does that has no
    opinion: it lets the playback move as ever.
    """

    pace = math.inf  # the most steps a second that are asked of a live engine while it is followed
    yields = False  # whether a key that moves ends SCRIPTED, and does what it does without a script
    over = False  # whether nothing is left to do: the playback then forgets the script
    word = "PAUSED"  # the mode's name in the header while SCRIPTED
    caption = ""  # what to see at this moment
    flash: frozenset[int] = frozenset()  # blocks that stand out for a moment
    by_beats = False  # whether going from event to event means going from beat to beat

    def stop_at(self, delta: StepDelta, snapshot: Snapshot, now: float) -> str:
        """While FOLLOWING: why the run stops at this step, which makes it SCRIPTED; "" where it goes on."""
        return ""

    def tick(self, playback: Playback, now: float) -> str | None:
        """While SCRIPTED, once a frame: go on if it is time. A message, or None to leave the old one."""
        return None

    def speed_words(self, mode: Mode) -> str:
        """The speed in words; "": the playback's own words for it."""
        return ""

    def look_away(self, now: float) -> None:
        """While SCRIPTED: a window hides the panes in this frame."""

    def run(self, playback: Playback) -> str:
        """The key that runs or pauses."""
        return ""

    def step(self, playback: Playback, by: int) -> str:
        """The keys that go one step on (1) or back (-1)."""
        return ""

    def go(self, playback: Playback, position: int) -> str:
        """A key that goes to a position."""
        return playback.seek(position)


class Playback:
    """A position in a source. speed: steps a second; inf: as fast as they come. Without one, a live engine runs at full speed.

    ends_fullest: a run that is over shows the step at which most blocks were in use, for at its end they are all free again.
    """

    def __init__(self, source: Source, *, speed: float | None = None, ends_fullest: bool = False) -> None:
        self.source = source
        self._ends_fullest = ends_fullest
        self._rested: tuple[int, int] | None = None  # where a run that was over came to stand: its length, the position
        self._seen = 0  # how long the trace was when a run was last over
        self.live = source if isinstance(source, LiveSource) else None
        self.mode = Mode.PAUSED if self.live is None else Mode.FOLLOWING
        self.speed = speed if speed is not None else REPLAY_SPEED if self.live is None else math.inf
        self.script: Script | None = None
        self._player = Player(source) if self.live is None else None
        self._jumped = True  # whether the next frame may differ in every block
        self._single_steps = 0  # asked of the engine and not yet seen
        self._due = 0.0  # steps that the engine may take by now at this pace; a fraction is kept
        self._last: float | None = None  # time of the tick before

    # What there is.

    @property
    def ready(self) -> bool:
        """Whether there is a state to show."""
        return self._player is not None

    @property
    def position(self) -> int:
        """How many deltas lead to the state that is shown."""
        return self._player.position if self._player is not None else 0

    @property
    def snapshot(self) -> Snapshot:
        """The state at this position."""
        return self._player.snapshot if self._player is not None else Snapshot()

    @property
    def delta(self) -> StepDelta | None:
        """The last delta before this position."""
        return self._player.delta if self._player is not None else None

    def take_changed(self) -> npt.NDArray[np.int32]:
        """The device blocks that have changed since this was last asked."""
        return self._player.take_changed() if self._player is not None else np.zeros(0, np.int32)

    @property
    def at_edge(self) -> bool:
        """Whether nothing newer is known."""
        return self.position >= len(self.source)

    @property
    def moving(self) -> bool:
        """Whether steps go by without a key."""
        return self.mode in (Mode.FOLLOWING, Mode.REPLAYING)

    @property
    def done(self) -> bool:
        """Whether the run is over and its fullest moment is shown."""
        if self._rested != (len(self.source), self.position) or self.mode in (Mode.REPLAYING, Mode.SCRIPTED):
            return False
        return self.live is None or (self.live.idle and not self.live.ended)

    def _stand_at_fullest(self) -> None:
        """A run is over: go to its fullest step, the last one where there are several."""
        first, length = self._seen, len(self.source)
        if not self._ends_fullest or first >= length:
            return
        occupied = self.source.occupied[first:length]
        position = length - int(occupied[::-1].argmax())
        self.seek(position)
        self._seen = 0 if self.live is None else length
        self._rested = (length, position)

    @property
    def at_full_speed(self) -> bool:
        """Whether a live engine steps as fast as it can."""
        live = self.live
        return live is not None and live.running and not live.idle and not live.ended

    @property
    def word(self) -> str:
        """The mode in one word, for people."""
        live = self.live
        if self.mode is Mode.REPLAYING:
            return "PLAYING"
        if live is not None and live.ended:
            return "ENDED"
        if live is not None and not live.ready:
            return "LOADING"
        if self.mode is Mode.SCRIPTED and self.script is not None:
            return self.script.word
        if self.done:
            return "DONE"
        if live is None:
            return "REPLAY"
        if self.mode is Mode.PAUSED:
            return "PAUSED"
        return "IDLE" if live.idle and self.at_edge else "LIVE"

    @property
    def pace(self) -> float:
        """Steps a second that are asked of a live engine."""
        return self.speed if self.script is None else min(self.speed, self.script.pace)

    @property
    def speed_text(self) -> str:
        """The speed in words."""
        scripted = self.script.speed_words(self.mode) if self.script is not None else ""
        return scripted or ("full speed" if math.isinf(self.speed) else f"{self.speed:g} steps/s")

    def take_jump(self) -> bool:
        """Whether the position has jumped since this was last asked, so that any block may differ."""
        jumped, self._jumped = self._jumped, False
        return jumped

    def refresh(self) -> None:
        """Have every block painted anew with the next frame."""
        self._jumped = True

    # Modes.

    def _enter(self, mode: Mode) -> None:
        if mode is self.mode:
            return
        if mode not in TRANSITIONS[self.mode]:
            raise RuntimeError(f"a playback that is {self.mode.value} cannot become {mode.value}")
        self.mode = mode

    def start(self) -> None:
        """Let the live engine run, if it is followed: at full speed by itself, else by permits."""
        live = self.live
        if live is not None and self.mode is Mode.FOLLOWING:
            self.seek(len(self.source))
            self._due = 0.0
            if math.isinf(self.pace):
                live.run()
            else:
                live.pause()

    def pause(self) -> None:
        """Stay here; a live engine stops after the step it is in."""
        self._enter(Mode.PAUSED)
        self._single_steps = 0
        if self.live is not None:
            self.live.pause()

    def resume(self) -> None:
        """Follow the engine from this position on."""
        self._enter(Mode.FOLLOWING)
        self._rest()

    def follow(self) -> None:
        """Go to the engine's newest step, and let it run."""
        self.resume()
        self.start()

    def _replay(self) -> None:
        self._enter(Mode.REPLAYING)
        self._rest()

    def _rest(self) -> None:
        if self._player is not None:
            self._player.rest()

    def begin(self, script: Script) -> None:
        """Let a script decide from now on."""
        self.script = script
        self._enter(Mode.SCRIPTED)

    def end_script(self) -> None:
        """Forget the script. Where it decided, the playback stands still."""
        self.script = None
        if self.mode is Mode.SCRIPTED:
            self._enter(Mode.PAUSED)

    def take_over(self) -> None:
        """A key moves from here on: whatever moved by itself stops, except a script that does not yield."""
        if self.moving or (self.mode is Mode.SCRIPTED and self.script is not None and self.script.yields):
            self.pause()

    # Time.

    def look_away(self, now: float) -> None:
        """A window hides the panes in this frame: nothing that is to be read there goes by itself."""
        if self.mode is Mode.SCRIPTED and self.script is not None:
            self.script.look_away(now)

    def tick(self, now: float) -> Progress:
        """Go on as far as the mode and the speed allow. now: seconds, any origin."""
        live = self.live
        passed = 0.0 if self._last is None else max(0.0, now - self._last)
        self._last = now
        if self._player is None and len(self.source):
            self._player = Player(self.source)
        if live is not None and live.ended and self.mode is not Mode.REPLAYING:
            self._enter(Mode.PAUSED)
        message = None
        if self.mode is Mode.SCRIPTED and self.script is not None:
            message = self.script.tick(self, now)
        if live is not None and self.mode is Mode.FOLLOWING and not math.isinf(self.pace):
            self._permit_by_pace(live, passed)
        player = self._player
        if player is None:
            return Progress([], message)
        if self.mode is Mode.REPLAYING:
            return Progress(self._tick_replaying(player, now), message)
        if self.mode is Mode.FOLLOWING:
            followed = self._tick_following(player, now)
            return Progress(followed.applied, message if followed.message is None else followed.message)
        if self.mode is Mode.PAUSED and self._single_steps and player.behind:
            count = min(self._single_steps, player.behind)
            self._single_steps -= count
            return Progress(player.advance(count), message)
        return Progress([], message)

    def _tick_replaying(self, player: Player, now: float) -> list[StepDelta]:
        """At the end of what is known a live engine is followed again."""
        live = self.live
        player.speed = REPLAY_SPEED if live is not None and math.isinf(self.speed) else self.speed
        applied = player.tick(now)
        if self.at_edge:
            if live is not None and not live.ended:
                self._enter(Mode.FOLLOWING)
                self._seen = 0  # all of it was shown again
                self.start()
            else:
                self._enter(Mode.PAUSED)
                self._stand_at_fullest()
        return applied

    def _tick_following(self, player: Player, now: float) -> Progress:
        """All that has come; with a script step by step, up to where it stops."""
        applied: list[StepDelta] = []
        if self.done:
            return Progress(applied)
        while self.script is not None and player.behind and (came := player.advance(1)):
            applied += came
            if message := self.script.stop_at(came[0], player.snapshot, now):
                self._enter(Mode.SCRIPTED)
                if self.live is not None:
                    self.live.pause()
                return Progress(applied, message)
            self.let_script_go()
        if self.script is None:
            applied += player.advance(player.behind)
        if self.live is not None and self.live.idle and not player.behind:
            self._stand_at_fullest()
        return Progress(applied)

    def let_script_go(self) -> None:
        """Forget a script that has nothing left to do, and run at one's own speed."""
        if self.script is not None and self.script.over:
            self.script = None
            self.start()

    def _permit_by_pace(self, live: LiveSource, passed: float) -> None:
        self._due = min(self._due + passed * self.pace, max(1.0, self.pace / 4))
        whole = int(self._due)
        if whole and live.outstanding == 0 and not live.idle:
            self._due -= whole
            live.permit(whole)

    # Keys. Each returns the message to show, "" for none.

    def toggle(self) -> str:
        """Run or pause. Running a live trace returns to its newest step; where the engine rests, its past is shown again."""
        live = self.live
        if self.mode is Mode.SCRIPTED and self.script is not None:
            return self.script.run(self)
        if self.done:
            self.pause()
            self.seek(0)
            self._replay()
        elif self.moving:
            self.pause()
        elif live is None:
            if self.at_edge:
                self.seek(0)
            self._replay()
        elif not self.at_edge and (live.idle or live.ended):
            self._replay()
        elif live.ended:
            return f"{live.ended}: there is nothing to run"
        else:
            self.follow()
        return ""

    def step(self, by: int = 1) -> str:
        """One step on (1) or back (-1): in the trace, or, at its newest step, of the engine itself."""
        if self.mode is Mode.SCRIPTED and self.script is not None and not self.script.yields:
            return self.script.step(self, by)
        self.take_over()
        if by < 0 or not self.at_edge:
            return self.seek(self.position + by)
        if self.live is None or self.live.ended:
            return "this is the end of the trace"
        if self.live.idle:
            return "the engine has nothing to do: press a to add a prompt"
        self._single_steps += 1
        self.live.permit(1)
        return ""

    def go(self, position: int) -> str:
        """Pause, and be at `position`."""
        if self.mode is Mode.SCRIPTED and self.script is not None and not self.script.yields:
            return self.script.go(self, position)
        self.take_over()
        return self.seek(position)

    def seek(self, position: int) -> str:
        """Be at `position`, clamped to what there is; the mode stays. Returns what is wrong with the trace there, or ""."""
        if self._player is None or position == self.position:
            return ""
        self._jumped = True
        try:
            self._player.seek(position)
        except TraceError as error:
            return str(error)
        return ""

    def change_speed(self, by: int) -> str:
        """The next faster (1) or slower (-1) speed. Whoever chooses a speed needs no guide: a script that yields is over."""
        at = SPEEDS.index(self.speed) if self.speed in SPEEDS else len(SPEEDS) - 1
        self.speed = SPEEDS[max(0, min(len(SPEEDS) - 1, at + by))]
        if self.script is not None and self.script.yields:
            self.script = None
            if self.mode is Mode.SCRIPTED:
                self.follow()
        self.start()
        return ""
