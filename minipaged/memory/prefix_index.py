"""Content key -> block: which full block holds the KV of these tokens behind that prefix.

A block's key is the BLAKE2b digest (256 bits) of its parent's key and its own tokens; the first block's parent key is drawn
from the salt. So a key covers the tokens, all that came before them, and the extras, and a collision is out of reach (it is
never Python's `hash`). Knows keys and blocks; knows nothing of sequences, references or eviction.

Duplicates: when two sequences compute the same tokens side by side, the block published first keeps the key. The second stays
its holder's own, has no key, and is an empty block once it is freed. No table is ever rewritten to merge the two.
"""

from __future__ import annotations

from array import array
from hashlib import blake2b

TOKEN_TYPE = "I"  # unsigned, 4 bytes: token ids from 0 to 2**32 - 1
_UNSALTED = bytes(32)


def root_key(salt: str | None) -> bytes:
    """The parent key of a first block. No salt and the empty salt are two worlds."""
    return (
        _UNSALTED
        if salt is None
        else blake2b(salt.encode("utf-8", "surrogatepass"), digest_size=32, person=b"salt").digest()
    )


def next_key(parent: bytes, tokens: bytes) -> bytes:
    """The key of a block whose tokens (as bytes of a TOKEN_TYPE array) follow the block of key `parent`."""
    return blake2b(parent + tokens, digest_size=32).digest()


class PrefixIndex:
    """A bijection between keys and the blocks that can be found by them. All operations are O(1) per block."""

    def __init__(self) -> None:
        self._block_of: dict[bytes, int] = {}
        self._key_of: dict[int, bytes] = {}

    def __len__(self) -> int:
        return len(self._key_of)

    def __contains__(self, block: int) -> bool:
        """Whether this block can be found by its content."""
        return block in self._key_of

    def publish(self, key: bytes, block: int) -> bool:
        """Let `block` be found by `key`; False, and nothing changed, if another block already is, or the block has a key."""
        if key in self._block_of or block in self._key_of:
            return False
        self._block_of[key] = block
        self._key_of[block] = key
        return True

    def erase(self, block: int) -> bool:
        """Forget the block's key, as its content is about to change; False if it had none."""
        key = self._key_of.pop(block, None)
        if key is None:
            return False
        del self._block_of[key]
        return True

    def blocks(self) -> list[int]:
        """The blocks that have a key, in the order they were published."""
        return list(self._key_of)

    def match(self, tokens: array[int], block_size: int, salt: str | None, most: int) -> tuple[list[int], list[bytes]]:
        """The longest run of leading full blocks that are here, at most `most`: blocks and keys. The first miss ends it."""
        blocks: list[int] = []
        keys: list[bytes] = []
        data, stride = tokens.tobytes(), block_size * tokens.itemsize
        key, find = root_key(salt), self._block_of.get
        for start in range(0, most * stride, stride):
            key = blake2b(key + data[start : start + stride], digest_size=32).digest()
            block = find(key)
            if block is None:
                break
            blocks.append(block)
            keys.append(key)
        return blocks, keys
