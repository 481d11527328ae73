"""Windows over the screen: add a prompt, find, help, and a side pane on a narrow terminal. Escape leaves; letters typed stay inside."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import ClassVar

from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Grid, Vertical, VerticalScroll
from textual.message import Message
from textual.screen import ModalScreen
from textual.widgets import Button, Input, Label, OptionList, Static
from textual.widgets.option_list import Option

from minipaged.config import SamplingParams, check_int
from minipaged.errors import InputError
from minipaged.scheduling.runtime_settings import SETTINGS
from minipaged.tui.panes.pane import Pane

MOST_BLOCKS = 1_000_000  # of a next run: ten times the largest pool that the map is measured with
Asked = tuple[str, SamplingParams]

_FIELDS = (
    ("n", "samples", "1"),
    ("max_tokens", "most tokens", "64"),
    ("temperature", "temperature", "0"),
    ("beam_width", "beams", ""),
    ("priority", "priority", "0"),
    ("seed", "seed", ""),
)


class Window(ModalScreen[object]):
    """Base: escape leaves with nothing."""

    BINDINGS: ClassVar[list[BindingType]] = [Binding("escape", "leave", "leave", id="window.leave", priority=True)]

    def action_leave(self) -> None:
        """Close without an answer."""
        self.dismiss(None)


class AddPrompt(Window):
    """Text and sampling; answers with (prompt, SamplingParams)."""

    def compose(self) -> ComposeResult:
        """The form."""
        with Vertical(classes="window", id="add"):
            yield Label("Add a prompt: it joins the next step", classes="title")
            yield Input(placeholder="Once upon a time", id="prompt")
            with Grid(id="fields"):
                for name, label, default in _FIELDS:
                    yield Label(label)
                    yield Input(value=default, id=name, compact=True)
            yield Label("", id="problem", markup=False)
            yield Button("add (enter)", id="ok", compact=True)
            yield Label("tab: next field · enter: add · escape: leave", classes="hint")

    def on_input_submitted(self) -> None:
        """Enter adds."""
        self._done()

    def on_button_pressed(self) -> None:
        """So does the button."""
        self._done()

    def _done(self) -> None:
        prompt = self.query_one("#prompt", Input).value
        try:
            if not prompt.strip():
                raise InputError("the prompt is empty: type something")
            params = parse_params({name: self.query_one(f"#{name}", Input).value for name, _, _ in _FIELDS})
        except InputError as error:
            self.query_one("#problem", Label).update(f"✗ {error}")
            return
        self.dismiss((prompt, params))


class Choice(Static, can_focus=True):
    """One of a few words: left, right and space go through them."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("left,h", "turn(-1)", "the one before", show=False, id="choice.left"),
        Binding("right,l,space", "turn(1)", "the next one", show=False, id="choice.right"),
        Binding("enter", "done", "done", show=False, id="choice.done"),
    ]

    class Done(Message):
        """Enter was pressed."""

    def __init__(self, options: tuple[str, ...], value: str, *, id: str) -> None:
        super().__init__(id=id, markup=False)
        self.options = options
        self.at = options.index(value) if value in options else 0

    @property
    def value(self) -> str:
        """The word chosen."""
        return self.options[self.at]

    def on_mount(self) -> None:
        """Show it."""
        self.action_turn(0)

    def action_turn(self, by: int) -> None:
        """Another word."""
        self.at = (self.at + by) % len(self.options)
        self.update("".join(f"[{word}]" if n == self.at else f" {word} " for n, word in enumerate(self.options)))

    def action_done(self) -> None:
        """Say that it is enough."""
        self.post_message(self.Done())

    def on_click(self) -> None:
        """The next word."""
        self.action_turn(1)


class Knobs(Window):
    """The engine's settings that can be turned while it runs; answers with those that were changed.

    settings: what they are now. The size of the pool is one of them, but only the next run can have another.
    """

    def __init__(self, settings: Mapping[str, object]) -> None:
        super().__init__()
        current = {knob.name: settings.get(knob.name, knob.options[0] if knob.options else "") for knob in SETTINGS}
        self._settings = {**current, "num_blocks": settings.get("num_blocks", "")}

    def compose(self) -> ComposeResult:
        """A line for each setting."""
        with Vertical(classes="window", id="knobs"):
            yield Label("Knobs: they act from the next step on", classes="title")
            with Grid(classes="knobs"):
                for knob in SETTINGS:
                    yield Label(knob.name)
                    value = str(self._settings[knob.name])
                    if knob.options:
                        yield Choice(knob.options, value, id=knob.name)
                    else:
                        yield Input(value=value, placeholder="as each was asked", id=knob.name, compact=True)
                    yield Label(knob.about, classes="hint")
                yield Label("num_blocks")
                yield Input(value=str(self._settings["num_blocks"]), id="num_blocks", compact=True)
                yield Label("next run (R), null block too", classes="hint")
            yield Label("", id="problem", markup=False)
            yield Label("tab: next · ← →: choose · enter: turn · escape: leave", classes="hint")

    def on_input_submitted(self) -> None:
        """Enter turns what was changed."""
        self._done()

    def on_choice_done(self) -> None:
        """On a word too."""
        self._done()

    def _done(self) -> None:
        try:
            changed = {name: value for name, value in self._typed() if str(value) != str(self._settings[name])}
        except InputError as error:
            self.query_one("#problem", Label).update(f"✗ {error}")
            return
        self.dismiss(changed or None)

    def _typed(self) -> Iterator[tuple[str, object]]:
        """What stands in the fields, checked; empty ones left out."""
        for knob in SETTINGS:
            if knob.options:
                yield knob.name, self.query_one(f"#{knob.name}", Choice).value
            elif text := self.query_one(f"#{knob.name}", Input).value.strip():
                yield knob.name, knob.value(knob.amount(_number(knob.name, text, float)))
        if text := self.query_one("#num_blocks", Input).value.strip():
            yield "num_blocks", check_int("num_blocks", _number("num_blocks", text, int), 2, MOST_BLOCKS)


def _number(name: str, text: str, read: Callable[[str], object]) -> object:
    try:
        return read(text)
    except ValueError:
        raise InputError(f"{name} must be a number, not {text!r}") from None


def parse_params(fields: dict[str, str]) -> SamplingParams:
    """SamplingParams from what was typed; an empty field keeps its default. Raises InputError naming the value."""
    readers: dict[str, Callable[[str], object]] = {"temperature": float}
    given = {name: _number(name, text, readers.get(name, int)) for name, text in fields.items() if text.strip()}
    return SamplingParams(**given)  # type: ignore[arg-type]


class Ask(Window):
    """One line of text."""

    def __init__(self, title: str, hint: str, value: str = "") -> None:
        super().__init__()
        self._title, self._hint, self._value = title, hint, value

    def compose(self) -> ComposeResult:
        """A line and a hint."""
        with Vertical(classes="window small"):
            yield Label(self._title, classes="title")
            yield Input(value=self._value, id="line")
            yield Label(self._hint, classes="hint")

    def on_input_submitted(self, event: Input.Submitted) -> None:
        """Enter answers."""
        self.dismiss(event.value)


class Choose(Window):
    """One of a few words."""

    def __init__(self, title: str, options: list[str]) -> None:
        super().__init__()
        self._title, self._options = title, options

    def compose(self) -> ComposeResult:
        """A list."""
        with Vertical(classes="window small"):
            yield Label(self._title, classes="title")
            yield OptionList(*(Option(option, id=str(at)) for at, option in enumerate(self._options)))
            yield Label("enter: choose · escape: leave", classes="hint")

    def on_option_list_option_selected(self, event: OptionList.OptionSelected) -> None:
        """Enter chooses."""
        self.dismiss(self._options[event.option_index])


class Reading(Window):
    """A text to read: help, a lesson's list. Any of its closing keys leaves."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("question_mark,f1,q,enter", "leave", "leave", show=False, id="reading.leave")
    ]

    def __init__(self, title: str, text: str) -> None:
        super().__init__()
        self._title, self._text = title, text

    def compose(self) -> ComposeResult:
        """The text, scrolling."""
        with Vertical(classes="window reading"):
            yield Label(self._title, classes="title")
            with VerticalScroll():
                yield Static(self._text, markup=False)
            yield Label("escape leaves", classes="hint")


class Overlay(Window):
    """A side pane over a narrow screen. The pane is made for it and goes with it."""

    BINDINGS: ClassVar[list[BindingType]] = [Binding("q,5,6,7", "leave", "leave", show=False, id="overlay.leave")]

    def __init__(self, title: str, pane: Pane) -> None:
        super().__init__()
        self._title = title
        self.pane = pane

    def compose(self) -> ComposeResult:
        """The pane in a frame."""
        with Vertical(classes="window overlay"):
            yield Label(self._title, classes="title")
            yield self.pane
            yield Label("escape leaves", classes="hint")
