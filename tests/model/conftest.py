"""The default model, fetched once into the user's cache; its tests are skipped only where it cannot be had."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from minipaged.errors import ModelError
from minipaged.model.loading import zoo


@pytest.fixture(scope="session")
def smollm2_path() -> Path:
    try:
        return zoo.find("smollm2-135m")
    except ModelError as error:
        pytest.skip(str(error))


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """The suite runs on as many processes as there are cores: more threads would wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
