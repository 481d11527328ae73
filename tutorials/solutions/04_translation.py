"""Solutions of lesson 4, Translation: each body stands where the exercise, ../04_translation.py, has its stub."""


def slot(table: list[int], position: int, block_size: int) -> int:
    """lesson 4, task 1: slot"""
    if not 0 <= position < len(table) * block_size:
        raise IndexError(f"position {position} is outside of {len(table)} blocks of {block_size}")
    return table[position // block_size] * block_size + position % block_size


def slot_mapping(tables: list[list[int]], starts: list[int], lengths: list[int], block_size: int) -> list[int]:
    """lesson 4, task 2: slot_mapping"""
    return [
        slot(table, position, block_size)
        for table, start, length in zip(tables, starts, lengths, strict=True)
        for position in range(start, start + length)
    ]


def who_lives_at(tables: list[list[int]], lengths: list[int], where: int, block_size: int) -> tuple[int, int] | None:
    """lesson 4, task 3: who_lives_at"""
    block, place = divmod(where, block_size)
    for sequence, (table, length) in enumerate(zip(tables, lengths, strict=True)):
        if block in table:
            position = table.index(block) * block_size + place
            return (sequence, position) if position < length else None
    return None
