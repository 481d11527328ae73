"""`minipaged show`: a recorded run on the screen, or as a page for a browser."""

from __future__ import annotations

import os
from pathlib import Path

from minipaged.errors import InputError
from minipaged.page.page import run_page
from minipaged.trace.sources import FileSource


def write_page(trace: Path, out: Path, *, force: bool = False) -> str:
    """Write the page of a recorded run. Returns a sentence on it; InputError, and nothing is changed, where it cannot be done."""
    if out.is_dir():
        raise InputError(f"{out} is a folder: name a file in it, such as {out / trace.with_suffix('.html').name}")
    if not out.resolve().parent.is_dir():
        raise InputError(f"{out}: the folder {out.resolve().parent} does not exist")
    if out.exists() and (not force or out.samefile(trace)):
        raise InputError(f"{out} exists: name another file" + ("" if force else ", or give --force to replace it"))
    source = FileSource(trace)
    try:
        text = run_page(source)
        length, damage = len(source), source.damage
    finally:
        source.close()
    beside = out.with_name(f".{out.name}.{os.getpid()}")  # whole or not at all
    try:
        beside.write_text(text, encoding="utf-8")
        beside.replace(out)
    except OSError as error:
        beside.unlink(missing_ok=True)
        raise InputError(f"{out}: cannot be written: {error.strerror}") from None
    words = f"{out}: {length:,} steps, {len(text) / 1000:,.0f} kB; open it in a browser"
    return f"{words} ({damage})" if damage else words
