"""A user's own keys: a TOML file of `id = "key"` lines. The ids stand in the help's last lines and in SCREEN's bindings."""

from __future__ import annotations

import os
import tomllib
from collections.abc import Collection
from pathlib import Path

from minipaged.errors import InputError


def keys_path() -> Path:
    """Where the file is looked for: MINIPAGED_KEYS, else the user's configuration folder."""
    chosen = os.environ.get("MINIPAGED_KEYS")
    base = Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config")
    return Path(chosen) if chosen else base / "minipaged" / "keys.toml"


def load_keys(known: Collection[str], path: Path | None = None) -> dict[str, str]:
    """The file's keys by binding id, {} where there is no file. InputError naming what is wrong with it."""
    path = keys_path() if path is None else path
    try:
        written = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise InputError(f"{path}: cannot be read as TOML ({error})") from None
    flat = _flat(written)
    for name, key in flat.items():
        if name not in known:
            raise InputError(f"{path}: there is no binding {name!r}; there are {', '.join(sorted(known))}")
        if not isinstance(key, str) or not key:
            raise InputError(f'{path}: {name} must be a key such as "s" or "ctrl+n", not {key!r}')
    return {name: str(key) for name, key in flat.items()}


def _flat(written: dict[str, object], lead: str = "") -> dict[str, object]:
    """`event.next = "x"` reads as a table in TOML: put the names together again."""
    flat: dict[str, object] = {}
    for name, value in written.items():
        if isinstance(value, dict):
            flat.update(_flat(value, f"{lead}{name}."))
        else:
            flat[lead + name] = value
    return flat
