"""Which tokens of a sequence stay in memory: all of them, a sliding window, attention sinks and a window, or heavy hitters.

One object says it to everybody: to commit (which table entries may go), to admission (how many blocks a sequence holds at most), to the
prefix cache (which blocks a hit needs, what may be published) and to the kernels (which positions a query sees).

Table entries are numbered as the sequence's blocks are. The first `front` of them hold the sinks and stay; behind them the entries that no
later query sees are spare. So what is held is the front, and the blocks of the window.

Source: sliding windows: Longformer (Beltagy et al., 2020), Mistral 7B (Jiang et al., 2023); sinks: StreamingLLM (Xiao et al., 2024).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from minipaged.config import check_int
from minipaged.errors import InputError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Count = TypeVar("Count", int, npt.NDArray[np.int32])

MOST_TOKENS = 2**31 - 1
FORMS = "all, window:W, sinks:S+window:W or h2o:HEAVY+RECENT, with whole numbers of tokens for S, W, HEAVY and RECENT"
_WORDS = re.compile(r"(?:sinks:(?P<sinks>\d+)\+)?window:(?P<window>\d+)|h2o:(?P<heavy>\d+)\+(?P<recent>\d+)")


@dataclass(frozen=True, slots=True)
class Retention:
    """The query at position i sees itself, the `window` - 1 positions before it, and the first `sinks` ones; everything if window is None.

    Or, with `heavy`: itself, the `recent` - 1 tokens before it, and of all others the `heavy` ones that the queries so far have attended to
    most. A prompt is read in whole before any of it goes.

    InputError for a number out of range, for sinks without a window, and for heavy hitters beside a window.
    """

    window: int | None = None
    sinks: int = 0
    heavy: int = 0
    recent: int = 0

    def __post_init__(self) -> None:
        check_int("the sinks of a retention policy", self.sinks, 0, MOST_TOKENS)
        if self.window is not None:
            check_int("the window of a retention policy", self.window, 1, MOST_TOKENS)
        elif self.sinks:
            raise InputError(f"sinks need a window beside them: sinks:{self.sinks}+window:W")
        if self.heavy or self.recent:
            check_int("the heavy hitters of a retention policy", self.heavy, 1, MOST_TOKENS // 2)
            check_int("the recent tokens beside heavy hitters", self.recent, 1, MOST_TOKENS // 2)
            if self.window is not None:
                raise InputError(
                    f"heavy hitters have recent tokens in place of a window: h2o:{self.heavy}+{self.recent}"
                )

    def __str__(self) -> str:
        if self.heavy:
            return f"h2o:{self.heavy}+{self.recent}"
        if self.window is None:
            return "all"
        return f"sinks:{self.sinks}+window:{self.window}" if self.sinks else f"window:{self.window}"

    @staticmethod
    def parse(text: str) -> Retention:
        """The policy that a text names. InputError for anything but FORMS."""
        if text == "all":
            return KEEP_ALL
        found = _WORDS.fullmatch(text) if isinstance(text, str) else None
        if found is None:
            alone = isinstance(text, str) and re.fullmatch(r"sinks:\d+", text)
            raise InputError(
                f"retention must be {FORMS}, not {text!r:.80}" + (": sinks need a window" if alone else "")
            )
        if found["heavy"] is not None:
            if not int(found["heavy"]):
                raise InputError(
                    f"retention {text!r:.80} keeps no heavy hitters: window:{found['recent']:.20} says the same"
                )
            return Retention(heavy=int(found["heavy"]), recent=int(found["recent"]))
        sinks = found["sinks"]
        if sinks is not None and int(sinks) == 0:
            raise InputError(f"retention {text!r:.80} keeps no sinks: window:{found['window']:.20} says the same")
        return Retention(int(found["window"]), int(sinks or 0))

    @property
    def keeps_all(self) -> bool:
        """Whether nothing ever goes."""
        return self.window is None and not self.heavy

    @property
    def budget(self) -> int:
        """With heavy hitters: tokens that a query sees, itself included; what a sequence holds once its prompt is computed."""
        return self.heavy + self.recent

    @property
    def shares(self) -> bool:
        """Whether sequences may share blocks with each other and with the prefix cache. Heavy hitters' scores stand in the blocks, and are
        sums over one sequence's queries."""
        return not self.heavy

    def left_out(self, num_computed: Count, num_prompt: Count) -> Count:
        """With heavy hitters: tokens that have gone once so many are computed. The next one finds `budget` - 1 others. Takes and gives
        numbers or arrays of them."""
        return (num_computed - (self.budget - 1)) * (num_computed >= num_prompt) * (num_computed >= self.budget)

    @property
    def publishes(self) -> bool:
        """Whether blocks may be published that are computed after others were released. A window's keys and values depend on the tokens
        alone; what streams behind sinks is kept to itself, and so is what follows a release that no policy has asked for."""
        return self.window is not None and not self.sinks

    def front(self, block_size: int) -> int:
        """Leading table entries that stay: whole blocks of sinks."""
        return -(-self.sinks // block_size)

    def spare_until(self, num_computed: Count, block_size: int) -> Count:
        """Where the spare entries end once so many tokens are computed: those from `front` up to here, if there are any, are seen by no
        later query. Takes and gives a number or an array of them."""
        if self.window is None:
            return num_computed * 0
        return (num_computed - self.window + 1) // block_size

    def spare(self, num_computed: int, block_size: int) -> range:
        """The spare entries once so many tokens are computed."""
        front = self.front(block_size)
        return range(front, max(front, self.spare_until(num_computed, block_size)))

    def most_blocks(self, num_tokens: int, block_size: int, chunk: int | None = None) -> int:
        """Most blocks that a sequence of num_tokens tokens holds at once, if a step computes at most `chunk` of them (None: all)."""
        whole = -(-num_tokens // block_size)
        if self.window is None:
            return whole
        # The positions that a chunk sees and writes begin anywhere in a block. One more, since the newest block that is full counts as
        # computed only when the next step is planned.
        span = self.window - 1 + min(num_tokens, chunk if chunk is not None else num_tokens)
        return min(whole, self.front(block_size) + (span + block_size - 2) // block_size + 2)

    def most_blocks_of_request(
        self, num_prompt: int, max_new_tokens: int, num_sequences: int, block_size: int, chunk: int | None = None
    ) -> int:
        """The same for several sequences of one prompt: they hold its full blocks once, and share the step's `chunk`."""
        longest, shared = num_prompt + max_new_tokens, num_prompt // block_size
        if self.heavy:  # all of the prompt until it is computed; then each its own
            whole = self.most_blocks(num_prompt, block_size)
            return max(whole, num_sequences * self.most_blocks(min(longest, max(self.budget, 1)), block_size))
        apart = shared + num_sequences * (-(-longest // block_size) - shared)
        if self.window is None:
            return apart
        others = (num_sequences - 1) * self.most_blocks(longest, block_size, 1)
        return min(apart, others + self.most_blocks(longest, block_size, chunk))


KEEP_ALL = Retention()
