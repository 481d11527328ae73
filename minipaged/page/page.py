"""A trace as one HTML file: its frames, the styles and the scripts stand in it, and it may load nothing.

What a trace says is untrusted: the script puts it on the page as text alone, and the page's policy lets no other script run.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import zlib
from functools import cache
from html import escape
from pathlib import Path

from minipaged.errors import InputError
from minipaged.page.frames import document
from minipaged.text.safe import one_line
from minipaged.trace.sources import Source

MOST_BYTES = 16 << 20  # of a page; a browser opens more than that slowly
HERE = Path(__file__).parent


@cache
def part(name: str) -> str:
    """A file that stands beside this one."""
    return (HERE / name).read_text(encoding="utf-8")


def run_page(source: Source) -> str:
    """The page of a trace. InputError where it would be too large."""
    found = document(source)
    text = json.dumps(found, separators=(",", ":")).encode()
    data = base64.b64encode(zlib.compress(text, 9)).decode()
    title = f"minipaged · {found['model']}" if found["model"] else "minipaged"
    page = _filled(escape(one_line(title)), data)
    if len(page) > MOST_BYTES:
        raise InputError(
            f"the page would weigh {len(page) / 1e6:.0f} MB, more than {MOST_BYTES / 1e6:.0f} MB: record fewer steps,"
            " or open this trace with minipaged tui --replay"
        )
    return page


def _filled(title: str, data: str) -> str:
    style, script = part("look.css") + part("run.css"), part("map.js") + part("run.js")
    policy = (
        f"default-src 'none'; script-src {_hash_of(script)}; style-src {_hash_of(style)};"
        " base-uri 'none'; form-action 'none'"
    )
    values = {"POLICY": policy, "TITLE": title, "STYLE": style, "SCRIPT": script, "DATA": data}
    return re.sub("|".join(values), lambda found: values[found[0]], part("run.html"))


def _hash_of(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
