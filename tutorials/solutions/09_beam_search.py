"""Solutions of lesson 9, Beam search: each body stands where the exercise, ../09_beam_search.py, has its stub."""


def best(scores: list[float], logprobs: list[tuple[float, ...]], width: int) -> list[Candidate]:
    """lesson 9, task 1: best"""
    candidates = [
        Candidate(parent, token, score + logprob)
        for parent, (score, row) in enumerate(zip(scores, logprobs, strict=True))
        for token, logprob in enumerate(row)
    ]
    candidates.sort(key=lambda c: (-c.score, c.parent, c.token))
    return candidates[:width]


def reorder(manager: Manager, beams: list[str], parents: list[int], names: list[str]) -> None:
    """lesson 9, task 2: reorder"""
    for parent, name in zip(parents, names, strict=True):
        manager.fork(beams[parent], name)
    for beam in beams:
        manager.free(beam)


def saved(tables: list[list[int]]) -> float:
    """lesson 9, task 3: saved"""
    named = sum(len(table) for table in tables)
    distinct = len({block for table in tables for block in table})
    return 1 - distinct / named
