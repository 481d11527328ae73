"""Arguments of the public calls, looked at before anything changes. Bad ones raise InputError (a ValueError) naming the value."""

from __future__ import annotations

from array import array
from collections.abc import Iterable

from minipaged.config import check_int
from minipaged.errors import InputError
from minipaged.memory.prefix_index import TOKEN_TYPE

HIGHEST_TOKEN = 2**32 - 1
_TEXT, _LISTS = (str, bytes), (list, tuple)


def token_array(token_ids: Iterable[int]) -> array[int]:
    """Token ids as unsigned 32-bit numbers."""
    if isinstance(token_ids, _TEXT):
        raise InputError(f"token_ids must be whole numbers from 0 to {HIGHEST_TOKEN}, not text: {token_ids[:20]!r}")
    try:
        ids = token_ids if isinstance(token_ids, _LISTS) else list(token_ids)
        tokens = array(TOKEN_TYPE, ids)
    except (TypeError, OverflowError, ValueError):
        raise InputError(_complaint(token_ids)) from None
    if bool in map(type, ids):
        raise InputError(_complaint(ids))
    return tokens


def _complaint(token_ids: Iterable[int]) -> str:
    allowed = f"token_ids must be whole numbers from 0 to {HIGHEST_TOKEN}"
    try:
        for token in token_ids:
            if isinstance(token, bool) or not isinstance(token, int) or not 0 <= token <= HIGHEST_TOKEN:
                return f"{allowed}, not {token!r}"
    except TypeError:
        return f"{allowed} in a sequence, not {token_ids!r}"
    return allowed


def check_salt(salt: str | None) -> None:
    """A salt is text, or None for the common cache."""
    if salt is not None and not isinstance(salt, str):
        raise InputError(f"salt must be text or None, not {salt!r}")


def id_list(name: str, values: Iterable[int], high: int | None = None) -> list[int]:
    """Whole numbers from 0 to `high`, in the order given."""
    try:
        ids = list(values)
    except TypeError:
        raise InputError(f"{name} must be a sequence of whole numbers, not {values!r}") from None
    for value in ids:
        check_int(name, value, 0, high)
    return ids
