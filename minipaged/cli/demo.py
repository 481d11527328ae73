"""The run that `minipaged` shows on its own: prompts chosen so that paging, sharing, copy-on-write and the prefix cache all happen."""

from __future__ import annotations

from minipaged.config import SamplingParams

_SHARED = (
    "An operating system keeps the memory of each program in pages of one size. A table says where each page lies. "
    "A model that writes text can keep its memory in the same way. "
)

DEMO: tuple[tuple[str, SamplingParams], ...] = (
    (_SHARED + "The first advantage is that", SamplingParams(max_tokens=96)),
    (_SHARED + "Two answers can share a page, so", SamplingParams(n=3, max_tokens=64, temperature=0.9, seed=7)),
    (_SHARED + "When a page is full,", SamplingParams(max_tokens=80)),
    ("Once upon a time, in a library that never closed,", SamplingParams(max_tokens=120)),
    ("The three most useful facts about prime numbers are:", SamplingParams(max_tokens=96)),
    ("Dear neighbour, about the noise last night:", SamplingParams(n=2, max_tokens=72, temperature=0.8, seed=3)),
    ("A recipe for bread with four ingredients:\n1.", SamplingParams(max_tokens=100)),
)
