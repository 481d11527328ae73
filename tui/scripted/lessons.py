"""The lessons' content: each drives a real block manager through a few beats; every number in a caption is read from it.

A word is a token and four of them fill a block, so that a whole story fits the screen.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from minipaged.memory.block_manager import BlockManager
from minipaged.trace.file import Header
from minipaged.trace.observed import Actor, ManagerTrace
from minipaged.trace.sources import ListSource

BLOCK_SIZE = 4


@dataclass(frozen=True, slots=True)
class Beat:
    """A moment of a lesson and what to see in it."""

    position: int
    caption: str


@dataclass(frozen=True, slots=True)
class Lesson:
    """A trace with beats."""

    title: str
    source: ListSource
    beats: tuple[Beat, ...]


class Stage:
    """Drives a manager by words and collects beats."""

    def __init__(self, num_blocks: int, *, num_host_blocks: int = 0, prefix_caching: bool = True) -> None:
        self.manager = BlockManager(
            num_blocks, BLOCK_SIZE, num_host_blocks=num_host_blocks, prefix_caching=prefix_caching, watermark=0.0
        )
        self.beats: list[Beat] = []
        self._ids: dict[str, int] = {}
        self._token_bytes: dict[int, bytes] = {}
        self.trace = ManagerTrace(self.manager, BLOCK_SIZE, self._token_bytes)

    def _tokens(self, text: str) -> list[int]:
        tokens = [self._ids.setdefault(word, len(self._ids)) for word in text.split()]
        self._token_bytes.update((token, f" {word}".encode()) for token, word in zip(tokens, text.split(), strict=True))
        return tokens

    def wait(self, seq: int, text: str) -> None:
        """A sequence queues."""
        tokens = self._tokens(text)
        self.trace.actors[seq] = Actor(status="waiting", token_ids=tokens, num_prompt=len(tokens))

    def admit(self, seq: int, text: str = "") -> int:
        """A sequence reads its text (or, waiting, what it has). Returns the tokens found in the cache."""
        if seq not in self.trace.actors:
            self.wait(seq, text)
        actor = self.trace.actors[seq]
        actor.status = "running"
        found = self.manager.allocate(seq, actor.token_ids)
        if found is None:
            raise RuntimeError("the lesson's pool is too small for its script")
        self.manager.mark_computed(seq, actor.token_ids[found.cached_tokens :])
        actor.num_computed = len(actor.token_ids)
        return found.cached_tokens

    def write(self, seq: int, text: str) -> bool:
        """The next words; False, and nothing changed, where there is no room."""
        tokens, actor = self._tokens(text), self.trace.actors[seq]
        if self.manager.append(seq, len(tokens)) is None:
            return False
        self.manager.mark_computed(seq, tokens)
        actor.token_ids += tokens
        actor.num_computed = len(actor.token_ids)
        return True

    def fork(self, parent: int, child: int) -> None:
        """A child with the parent's words and table."""
        self.manager.fork(parent, child)
        old = self.trace.actors[parent]
        words = list(old.token_ids)
        self.trace.actors[child] = Actor(parent, "running", words, old.num_prompt, old.num_computed)

    def end(self, seq: int, status: str = "finished") -> None:
        """Its blocks go back."""
        self.manager.free(seq)
        self.trace.actors[seq].status = status
        if status == "waiting":
            self.trace.actors[seq].num_computed = 0

    def swap(self, seq: int, way: str) -> None:
        """Out to the host, or in again."""
        done = self.manager.swap_out([seq]) if way == "out" else self.manager.swap_in([seq])
        if done is None:
            raise RuntimeError("the lesson's pools are too small for its script")
        self.trace.actors[seq].status = "swapped" if way == "out" else "running"

    def table(self, seq: int) -> str:
        """Its blocks, as one reads them."""
        ids = [str(block) for block in self.manager.table(seq)]
        return ids[0] if len(ids) == 1 else ", ".join(ids[:-1]) + " and " + ids[-1]

    def step(self) -> None:
        """What was done becomes a step of the trace."""
        self.trace.step()
        self.manager.begin_step()

    def beat(self, caption: str) -> None:
        """A beat here."""
        self.beats.append(Beat(len(self.trace.deltas), caption))

    def lesson(self, title: str) -> Lesson:
        """All of it."""
        return Lesson(title, ListSource(self.trace.deltas, header=Header(model="lesson")), tuple(self.beats))


PROMPT = "The best thing about the sea is that it never"  # ten words: two full blocks and a half


def copy_on_write() -> Lesson:
    """The five beats of sharing."""
    stage = Stage(8)
    stage.admit(0, PROMPT)
    stage.step()
    last = stage.manager.table(0)[-1]
    stage.beat(
        "A has read its prompt: ten words, four to a block. Its table says where they lie: "
        f"blocks {stage.table(0)}. Block {last} is half full."
    )
    stage.fork(0, 1)
    stage.step()
    stage.beat(
        "A second answer, B, starts from the same words. B's table appears with the SAME numbers, and the cells read 2. No memory copied."
    )
    stage.beat(
        f"Now B wants to write its next word, into block {last}. But A reads that block too: its count is 2, so not in place."
    )
    stage.beat("Which block number in which table will change? Make up your mind, then press space.")
    stage.write(1, "sleeps")
    stage.step()
    new = stage.manager.table(1)[-1]
    shared = " and ".join(str(block) for block in stage.manager.table(1)[:-1])
    stage.beat(
        f"◆ Block {last} was copied to {new}, B's last entry flips {last}→{new}, and B's word goes there. The count of {last} goes 2→1."
    )
    stage.write(0, "ends")
    stage.step()
    stage.beat(
        f"A writes in {last} itself: it is the last one there. One block copied; {shared} stay shared. That is copy-on-write."
    )
    return stage.lesson("Sharing and copy-on-write")


def prefix_hit() -> Lesson:
    """Equal beginnings are found, not computed."""
    stage = Stage(8)
    stage.admit(0, "You are a kind helper Answer in one line What is a page")
    stage.step()
    stage.beat(
        f"A has read 13 words into blocks {stage.table(0)}. Full blocks are remembered by what they and all words before them say."
    )
    stage.write(0, "A sheet")
    stage.step()
    stage.end(0)
    stage.step()
    stage.beat(
        "A is done. Its full blocks are free now, and show ░: their words are still known. A partly filled block is not kept."
    )
    stage.beat("B will ask another question after the same eight first words. How many of its words must be computed?")
    found = stage.admit(1, "You are a kind helper Answer in one line Who wrote it")
    stage.step()
    hit = ", ".join(str(block) for block in stage.manager.table(1)[: found // BLOCK_SIZE])
    stage.beat(
        f"{found} words were found: B's table begins with blocks {hit}, as they lie. Only the other {12 - found} were computed."
    )
    stage.beat(
        "A hit is always a beginning: the first block that differs ends it, for every later word depends on what stands before."
    )
    return stage.lesson("A prefix hit")


def preemption() -> Lesson:
    """The pool runs dry; the latest gives way and computes again."""
    stage = Stage(8, prefix_caching=False)
    stage.admit(0, "Once upon a time there was a king")
    stage.admit(1, "My bread needs flour and also salt and")
    stage.step()
    free = stage.manager.usage().free
    stage.beat(f"A holds {stage.table(0)}, B holds {stage.table(1)}. Seven blocks are all there is: {free} are free.")
    stage.write(0, "who lost his")
    stage.write(1, "water then bake")
    stage.step()
    stage.write(0, "crown one day")
    stage.step()
    stage.beat(
        "Both have grown, block by block. A takes the last free block: the pool is full, and nothing was reserved ahead."
    )
    stage.write(1, "it")
    stage.step()
    stage.beat("B needs a block too, and there is none. Who must give way?")
    stage.end(1, "waiting")
    stage.step()
    stage.beat(
        "B, the latest to come. Its blocks go back and it waits, with all its words kept: only their keys and values are lost."
    )
    stage.write(0, "in the deep wood")
    stage.end(0)
    stage.step()
    stage.admit(1)
    stage.step()
    stage.beat(
        "A is done, so B starts again: its words are read once more in one go (recompute), and its text goes on unchanged."
    )
    return stage.lesson("Preemption by recompute")


def swapping() -> Lesson:
    """The pool runs dry; a sequence moves to CPU memory."""
    stage = Stage(7, num_host_blocks=8)
    stage.admit(0, "Once upon a time there was a king who")
    stage.admit(1, "My bread needs flour and also salt and water")
    stage.step()
    stage.beat(f"A holds {stage.table(0)}, B holds {stage.table(1)}: all six blocks there are. And both will grow.")
    stage.swap(1, "out")
    stage.step()
    host = len(stage.manager.host_table(1))
    stage.beat(
        f"B makes way, but keeps its work: its {host} blocks are copied to CPU memory ▽, and its device blocks are free."
    )
    stage.write(0, "lost his crown in the wood")
    stage.step()
    stage.beat(f"A goes on, into {stage.table(0)}. Some of them were B's a moment ago.")
    stage.end(0)
    stage.swap(1, "in")
    stage.step()
    stage.beat(
        f"A is done. B comes back, into blocks {stage.table(1)}: other places than before. "
        "Its table says so, and nothing is computed again."
    )
    return stage.lesson("Swapping to CPU memory")


def beam_step() -> Lesson:
    """Beams fork from winners and losers are dropped."""
    stage = Stage(8)
    stage.admit(0, "The capital of France is a")
    stage.fork(0, 1)
    stage.step()
    stage.beat(f"Two beams, A and B, go on from one prompt. Both tables name blocks {stage.table(0)}.")
    stage.write(0, "town")
    stage.write(1, "city")
    stage.step()
    stage.beat(
        "Each wrote its own word: the shared last block was copied for one of them, the full block stays shared."
    )
    stage.beat("The two best next words both follow B's. What becomes of A, and of its blocks?")
    stage.fork(1, 2)
    stage.step()
    stage.beat(
        "First the winner forks: C has B's table, no memory copied. Forking before dropping keeps what they share."
    )
    stage.end(0)
    stage.step()
    stage.beat(
        "Then the loser A is dropped. What only A held is free at once; what others name lives on, its count one less."
    )
    stage.write(1, "known")
    stage.write(2, "called")
    stage.step()
    stage.beat(
        "B and C write: where they still share a part-filled block, one of them copies it. This repeats in every step of a beam search."
    )
    return stage.lesson("A step of a beam search")


def eviction() -> Lesson:
    """Cached blocks are forgotten when their room is needed."""
    stage = Stage(6)
    stage.admit(0, "The sun is a star and it shines on us")
    stage.step()
    stage.end(0)
    stage.step()
    stage.beat(
        "A is done. Its two full blocks stay cached ░: free, yet still known. Blocks never used before are taken first."
    )
    stage.admit(1, "The moon is a rock that follows the earth round and round")
    stage.step()
    stage.beat(f"B holds {stage.table(1)}. No plain free block is left, only cached ones.")
    stage.beat("B goes on. Which cached block will be forgotten first: the beginning of A's text, or its end?")
    stage.write(1, "the sun")
    stage.step()
    gone = stage.manager.table(1)[-1]
    stage.beat(
        f"Block {gone}, the end: without its beginning no text can be found, so the deepest block is forgotten first."
    )
    stage.end(1)
    stage.step()
    found = stage.admit(2, "The sun is a star")
    stage.step()
    stage.beat(f"B is done, and C begins like A: {found} words are found again. The beginning was worth keeping.")
    return stage.lesson("Eviction")


LESSONS: dict[str, Callable[[], Lesson]] = {
    "copy-on-write": copy_on_write,
    "prefix hit": prefix_hit,
    "preemption": preemption,
    "swap": swapping,
    "beam step": beam_step,
    "eviction": eviction,
}
