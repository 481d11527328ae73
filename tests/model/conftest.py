"""The default model, fetched once into the user's cache; its tests are skipped only where it cannot be had."""

from __future__ import annotations

from pathlib import Path

import pytest

from minipaged.errors import ModelError
from minipaged.model import zoo


@pytest.fixture(scope="session")
def smollm2_path() -> Path:
    try:
        return zoo.find("smollm2-135m")
    except ModelError as error:
        pytest.skip(str(error))
