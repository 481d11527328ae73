"""Further real clients, of the extra `clients`: by hand, pytest -m slow tests/serving/test_clients.py."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.serving.engines import scripted
from tests.serving.running import Serving, serving

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def server() -> Iterator[Serving]:
    with serving(scripted) as found:
        yield found


def test_anthropic(server: Serving) -> None:
    anthropic = pytest.importorskip("anthropic")
    client = anthropic.Anthropic(base_url=server.url, api_key="none", max_retries=0)
    asked = {"model": "scripted", "messages": [{"role": "user", "content": "hi"}]}
    whole = client.messages.create(**asked, max_tokens=8)
    assert whole.stop_reason == "max_tokens"
    with client.messages.stream(**asked, max_tokens=8) as stream:
        assert "".join(stream.text_stream) == whole.content[0].text
    assert client.messages.count_tokens(**asked).input_tokens == len("<user>hi</><assistant>")
    with pytest.raises(anthropic.BadRequestError):
        client.messages.create(**asked, max_tokens=10_000)


def test_langchain(server: Serving) -> None:
    langchain_openai = pytest.importorskip("langchain_openai")
    chat = langchain_openai.ChatOpenAI(base_url=server.url + "/v1", api_key="none", model="scripted", max_tokens=8)
    whole = chat.invoke("hi").content
    assert len(whole) == 8
    assert "".join(piece.content for piece in chat.stream("hi")) == whole
