"""Settings that can be changed while an engine runs: what each accepts, and how a change is written in a trace. `Scheduler.apply` makes it.

A change is an event of the trace: which setting (`other`) and its new value (`amount`, a whole number), so that a replay can say it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from minipaged.config import BATCHING, ORDERS, PREEMPTION, check_choice, check_real
from minipaged.errors import InputError

THOUSAND = 1000  # real values travel as thousandths


@dataclass(frozen=True, slots=True)
class RuntimeSetting:
    """`options` in order, for a word; else `highest`, for a real number from 0 up."""

    name: str
    about: str
    options: tuple[str, ...] = ()
    highest: float = 0.0

    def amount(self, value: object) -> int:
        """The value as it travels in an event. InputError if it is none of this setting's."""
        if self.options:
            check_choice(self.name, value, self.options)
            return self.options.index(str(value))
        return round(check_real(self.name, value, 0.0, self.highest) * THOUSAND)

    def value(self, amount: int) -> str | float:
        """Back from an event; raises IndexError for what is no option."""
        return self.options[amount] if self.options else amount / THOUSAND


SETTINGS: tuple[RuntimeSetting, ...] = (  # only ever extended at the end: traces name settings by their place
    RuntimeSetting("temperature", "of all requests here now", highest=10.0),
    RuntimeSetting("watermark", "share kept from newcomers", highest=0.5),
    RuntimeSetting("batching", "who may join the running", options=BATCHING),
    RuntimeSetting("policy", "who is served first", options=ORDERS),
    RuntimeSetting("preemption", "how a victim leaves", options=PREEMPTION),
)


class SettingChange(NamedTuple):
    """A setting, by its place in SETTINGS, and its new value."""

    setting: int
    amount: int

    @property
    def name(self) -> str:
        """The setting's name."""
        return SETTINGS[self.setting].name

    @property
    def value(self) -> str | float:
        """The new value."""
        return SETTINGS[self.setting].value(self.amount)

    @property
    def words(self) -> str:
        """`watermark is 0.1`. For an event of a later version: its number and value."""
        if not 0 <= self.setting < len(SETTINGS):
            return "a setting that this version does not know was turned"
        options = SETTINGS[self.setting].options
        value = self.value if not options or 0 <= self.amount < len(options) else "?"
        return f"{self.name} is {value if isinstance(value, str) else format(value, 'g')}"


def change_of(name: str, value: object) -> SettingChange:
    """The change that is asked for. InputError naming the settings or the values there are."""
    for place, setting in enumerate(SETTINGS):
        if setting.name == name:
            return SettingChange(place, setting.amount(value))
    raise InputError(f"there is no setting {name!r}: there are {', '.join(setting.name for setting in SETTINGS)}")
