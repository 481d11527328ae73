"""One browser for the tests of the pages; they are skipped where there is none."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.page.browser import Browser, find_browser


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    """A headless Chromium."""
    command = find_browser()
    if command is None:
        pytest.skip("no Chromium is installed: pages are tested in a real browser (apt-get install chromium)")
    found = Browser(command)
    yield found
    found.close()
