"""The classes under the spec, as fixtures."""

from __future__ import annotations

import pytest

from tests import spec_options


@pytest.fixture(scope="session")
def block_manager_class() -> type:
    """What --block-manager names."""
    return spec_options.block_manager_class()


@pytest.fixture(scope="session")
def scheduler_class() -> type:
    """What --scheduler names."""
    return spec_options.scheduler_class()
