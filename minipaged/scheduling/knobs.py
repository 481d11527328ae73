"""Settings that can be turned while an engine runs: what each accepts, and what turning it does to the scheduler.

A turn is an event of the trace: which knob (`other`) and to what (`amount`, whole numbers), so that a replay can say it.
Whatever a check lets through can be applied at any later step. Knows the scheduler; knows nothing of who turns.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

from minipaged.config import BATCHING, ORDERS, PREEMPTION, check_choice, check_real
from minipaged.errors import InputError

if TYPE_CHECKING:
    from minipaged.scheduling.scheduler import Scheduler

THOUSAND = 1000  # real values travel as thousandths


@dataclass(frozen=True, slots=True)
class Knob:
    """A setting. `options` in order, for a word; else `highest`, for a real number from 0 up."""

    name: str
    about: str
    apply: Callable[[Scheduler, str | float], None]
    options: tuple[str, ...] = ()
    highest: float = 0.0

    def amount(self, value: object) -> int:
        """The value as it travels in an event. InputError if it is none of this knob's."""
        if self.options:
            check_choice(self.name, value, self.options)
            return self.options.index(str(value))
        return round(check_real(self.name, value, 0.0, self.highest) * THOUSAND)

    def value(self, amount: int) -> str | float:
        """Back from an event; raises IndexError for what is no option."""
        return self.options[amount] if self.options else amount / THOUSAND


class Turn(NamedTuple):
    """A knob, by its place in KNOBS, and its new value."""

    knob: int
    amount: int

    @property
    def words(self) -> str:
        """`watermark is 0.1`."""
        if not 0 <= self.knob < len(KNOBS):
            return "a setting that this version does not know was turned"
        knob = KNOBS[self.knob]
        value = knob.value(self.amount) if not knob.options or 0 <= self.amount < len(knob.options) else "?"
        return f"{knob.name} is {value if isinstance(value, str) else format(value, 'g')}"


def check(scheduler: Scheduler, name: str, value: object) -> Turn:
    """The turn that is asked for. InputError naming the knobs or the values there are."""
    number = next((at for at, knob in enumerate(KNOBS) if knob.name == name), None)
    if number is None:
        raise InputError(f"there is no knob {name!r}: there are {', '.join(knob.name for knob in KNOBS)}")
    if name == "watermark" and not hasattr(scheduler.manager, "set_watermark"):
        raise InputError("this engine's block manager has no watermark to turn")
    return Turn(number, KNOBS[number].amount(value))


def apply(scheduler: Scheduler, turn: Turn) -> None:
    """From the next `schedule()` on."""
    knob = KNOBS[turn.knob]
    knob.apply(scheduler, knob.value(turn.amount))


def _temperature(scheduler: Scheduler, value: str | float) -> None:
    for request in scheduler.requests.values():
        if request.params.beam_width is None:  # a beam search does not sample
            request.params = replace(request.params, temperature=float(value))
            for sequence in request.alive:
                if sequence.slot >= 0:
                    scheduler.batch.set_sampling(sequence)


def _watermark(scheduler: Scheduler, value: str | float) -> None:
    scheduler.manager.set_watermark(float(value))


def _setting(name: str) -> Callable[[Scheduler, str | float], None]:
    def apply(scheduler: Scheduler, value: str | float) -> None:
        scheduler.configure(replace(scheduler.config, **{name: value}))  # type: ignore[arg-type]

    return apply


KNOBS: tuple[Knob, ...] = (  # only ever extended at the end: traces name knobs by their place
    Knob("temperature", "of all requests here now", _temperature, highest=10.0),
    Knob("watermark", "share kept from newcomers", _watermark, highest=0.5),
    Knob("batching", "who may join the running", _setting("batching"), options=BATCHING),
    Knob("policy", "who is served first", _setting("policy"), options=ORDERS),
    Knob("preemption", "how a victim leaves", _setting("preemption"), options=PREEMPTION),
)
