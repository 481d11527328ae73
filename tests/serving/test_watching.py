"""Those who look on: an attached screen's source, the page's documents, hidden texts, and what watching costs."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from minipaged.config import SamplingParams
from minipaged.errors import InputError
from minipaged.serving.attach import attach
from minipaged.serving.live import LiveSource
from minipaged.trace.events import StepDelta
from minipaged.trace.file import Kind, Record, note
from minipaged.trace.player import Player
from minipaged.trace.snapshot import fold
from minipaged.tui.panes.text import text_lines
from minipaged.tui.reading.people import Person
from minipaged.tui.session import Session
from minipaged.tui.view import View
from tests.serving.engines import scripted
from tests.serving.running import Serving, serving


@pytest.fixture(scope="module")
def server() -> Iterator[Serving]:
    with serving(scripted, step_seconds=0.01, num_blocks=512) as found:
        yield found


@pytest.fixture
def traffic(server: Serving) -> Iterator[None]:
    """Some requests that run as long as the test."""
    stop = threading.Event()

    def ask(i: int) -> None:
        body = {"prompt": "secret " * (6 + i), "max_tokens": 2000, "n": 1 + i % 2, "stream": True}
        with (
            httpx.Client(timeout=30) as client,
            client.stream(
                "POST", server.url + "/v1/completions", json=body, headers={"x-request-id": f"mine-{i}"}
            ) as answer,
        ):
            for _ in answer.iter_raw():
                if stop.is_set():
                    return

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    link = server.run.app.link
    assert link is not None
    deadline = time.monotonic() + 10
    while sum(ticket.first_at > 0 for ticket in link.tickets.values()) < 4:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    yield
    stop.set()
    for thread in threads:
        thread.join(10)
    server.wait_idle()


def watched(source: LiveSource, deltas: int) -> list[StepDelta]:
    """The deltas, once there are so many."""
    assert source.wait(lambda: source.ready and len(source) >= deltas), source.ended
    return [source.delta(position) for position in range(len(source))]


@pytest.mark.usefixtures("traffic")
def test_an_attached_source_begins_with_the_state_and_follows(server: Serving) -> None:
    source = attach(server.url)
    watched(source, 20)
    assert source.header.model == "scripted"
    player = Player(source, len(source))
    assert player.snapshot.misfit == ""
    assert len(player.snapshot.tables) == 6, "the samples of the four requests, which were there before"
    assert player.snapshot.shared_saved_blocks > 0
    people = {n["id"] for n in source.notes if n.get("kind") == "request"}
    assert people == {f"mine-{i}" for i in range(4)}
    source.close()


@pytest.mark.usefixtures("traffic")
def test_texts_are_hidden_unless_they_are_shown(server: Serving) -> None:
    source = attach(server.url)
    watched(source, 5)
    states = [s for s in Player(source, len(source)).snapshot.sequences.values() if s.alive]
    assert len(states) == 6
    assert {bytes(state.text).decode().strip("·") for state in states} == {""}
    assert all(set(state.token_ids) == {0} for state in states)
    raw = b""
    with httpx.stream("GET", server.url + "/trace") as answer:
        for part in answer.iter_raw():
            raw += part
            if len(raw) > 50_000:
                break
    assert b"secret" not in raw
    source.close()


def test_texts_are_shown_where_the_server_says_so() -> None:
    with serving(scripted, step_seconds=0.01, options={"show_prompts": True}) as server:
        source = attach(server.url)
        server.complete(prompt="not secret", max_tokens=5)
        watched(source, 3)
        states = Player(source, len(source)).snapshot.sequences.values()
        assert any(bytes(state.text).startswith(b"not secret") for state in states)
        source.close()


@pytest.mark.usefixtures("traffic")
def test_the_page_is_sent_what_the_engine_holds(server: Serving) -> None:
    page = server.http.get("/")
    assert page.headers["content-type"].startswith("text/html")
    assert "http" not in page.text.replace("http-equiv", ""), "nothing comes from elsewhere"
    documents = []
    with httpx.stream("GET", server.url + "/blocks", timeout=10) as answer:
        for line in answer.iter_lines():
            if line.startswith("data: "):
                documents.append(json.loads(line[6:]))
            if len(documents) == 4:
                break
    last = documents[-1]
    assert last["step"] > documents[0]["step"] >= 0
    assert len(last["blocks"]) == 511
    assert sum(letter.isalpha() for letter in last["blocks"]) == 511 - last["free"] - last["cached"]
    assert any(letter.isupper() for letter in last["blocks"]), "two samples share their prompt's blocks"
    rows = {row["id"]: row for row in last["requests"]}
    assert rows["mine-1"]["method"] == "/v1/completions"
    assert rows["mine-1"]["prompt"] == 49
    assert rows["mine-1"]["blocks"] > 3
    assert rows["mine-1"]["first"] > 0
    assert rows["mine-1"]["rate"] > 0


def test_with_nobody_looking_on_the_engine_tells_nothing(server: Serving) -> None:
    link = server.run.app.link
    assert link is not None
    feed = server.run.app.feed
    deadline = time.monotonic() + 10
    while feed is not None and feed._watchers:
        assert time.monotonic() < deadline, "a watcher who left is still told"
        time.sleep(0.02)
    seen: list[Record] = []
    kept, link.on_trace = link.on_trace, seen.append
    server.complete(prompt="alone", max_tokens=20)
    link.on_trace = kept
    assert [record for record in seen if record.kind == Kind.DELTA] == []


@pytest.mark.usefixtures("traffic")
def test_screens_come_and_go_fifty_times(server: Serving) -> None:
    for i in range(50):
        source = attach(server.url)
        if i % 10 == 0:
            watched(source, 3)
        source.close()
    assert server.http.get("/health").status_code == 200


@pytest.mark.usefixtures("traffic")
def test_a_watcher_that_lags_jumps_to_a_keyframe(server: Serving, monkeypatch: pytest.MonkeyPatch) -> None:
    """The queue of one that does not read is cut, and what it reads afterwards folds without a misfit."""
    monkeypatch.setattr("minipaged.serving.http.watch.MAX_BEHIND", 5_000)
    app = server.run.app
    if app.feed is None:
        attach(server.url).close()
    feed = app.feed
    assert feed is not None
    joined: list[object] = []
    server.call_soon(lambda: joined.append(feed.join()))
    deadline = time.monotonic() + 20
    while not (joined and joined[0].jumps >= 2 and joined[0].synced):  # type: ignore[attr-defined]
        assert time.monotonic() < deadline
        time.sleep(0.02)
    watcher = joined[0]
    records = list(watcher.records)  # type: ignore[attr-defined]
    server.call_soon(feed.leave, watcher)
    kinds = [record.kind for record in records if record.kind != Kind.NOTE]
    assert kinds[0] == Kind.KEYFRAME
    assert Kind.KEYFRAME not in kinds[1:]


def test_a_jump_in_the_stream_is_followed(tmp_path: Path) -> None:
    """A source whose stream skips deltas: the player goes to the keyframe that stands there."""
    import io

    from minipaged.trace import codec
    from minipaged.trace.file import Header
    from tests.trace import scripted as scenes

    deltas = list(scenes.sharing_scene().deltas)
    records = [Record(Kind.HEADER, 0, _packed(Header().to_json()))]
    records.append(Record(Kind.KEYFRAME, -1, codec.encode_keyframe(fold([]))))
    records += [Record(Kind.DELTA, d.step, codec.encode_delta(d, level=0)) for d in deltas[:3]]
    records.append(Record(Kind.KEYFRAME, deltas[6].step, codec.encode_keyframe(fold(deltas[:7]))))
    records += [Record(Kind.DELTA, d.step, codec.encode_delta(d, level=0)) for d in deltas[7:]]
    stream = Header().to_bytes() + b"".join(record.to_bytes() for record in records)
    source = LiveSource(io.BytesIO(stream), io.BytesIO())
    assert source.wait(lambda: bool(source.ended) or len(source) == len(deltas) - 4)
    player = Player(source)
    player.advance(len(source))
    assert player.snapshot == fold(deltas)
    again = Player(source, len(source))
    assert again.snapshot == fold(deltas)


def _packed(head: dict[str, object]) -> bytes:
    from minipaged.trace import packing

    return packing.pack(head, {})


def test_attaching_to_what_is_no_server() -> None:
    with pytest.raises(InputError, match="there is no server"):
        attach("http://127.0.0.1:9")
    with pytest.raises(InputError, match="such as"):
        attach("ftp://x")
    with serving(scripted, options={"keys": ("sesame",)}) as server:
        with pytest.raises(InputError, match="key"):
            attach(server.url)
        attach(server.url, "sesame").close()
        assert httpx.get(server.url + "/?key=sesame").status_code == 200
        assert httpx.get(server.url + "/?key=other").status_code == 401


@pytest.mark.usefixtures("traffic")
def test_the_screen_names_who_asked(server: Serving) -> None:
    session = Session(attach(server.url))
    session.playback.start()
    deadline = time.monotonic() + 10
    while len(session.people) < 4 or not session.playback.ready or session.position < 5:
        assert time.monotonic() < deadline
        session.tick(time.monotonic())
        time.sleep(0.02)
    view = View(snapshot=session.snapshot, people=session.people)
    alive = [state for state in session.snapshot.sequences.values() if state.alive]
    assert len(alive) == 6
    shown = [text_lines(view, state, 140, most) for state in alive for most in (1, 3)]
    words = ["".join(text for line in lines for text, _ in line) for lines in shown]
    assert all("127.0.0.1 completions mine-" in text and ", first " in text for text in words)
    assert all("tok/s" in text for text in words)
    assert session.live is not None
    session.live.close()


def test_L75_a_clients_name_cannot_steer_the_terminal() -> None:
    person = Person.of_note(
        {"client": "\x1b[31m1", "method": "/v1/x\n", "id": "\x07\u202eid", "first": 0.1, "first_ns": 5}
    )
    assert "\x1b" not in person.client
    assert "\x07" not in person.id
    assert "\u202e" not in person.id
    assert note(kind="request").kind == Kind.NOTE


def test_a_screen_that_only_looks_on_says_so(server: Serving) -> None:
    source = attach(server.url)
    assert source.wait(lambda: source.ready)
    session = Session(source)
    assert not session.submit("hi", SamplingParams(max_tokens=2))
    assert "--allow-control" in session.message
    session.knob("max_num_seqs", 3)
    assert "--allow-control" in session.message
    source.pause()
    assert server.complete(prompt="x", max_tokens=2)["choices"], "nobody is paused"
    answer = server.http.post("/control", json={"do": "pause"})
    assert (answer.status_code, "--allow-control" in answer.text) == (403, True)
    source.close()


def test_who_may_control_pauses_and_steps_everybody_and_the_engine_runs_on_when_they_leave() -> None:
    with serving(scripted, step_seconds=0.01, num_blocks=512, options={"allow_control": True}) as server:
        source = attach(server.url)
        assert source.wait(lambda: source.ready)
        assert source.looks_on == ""
        link = server.run.app.link
        assert link is not None
        source.run()
        found: list[str] = []
        asker = threading.Thread(
            target=lambda: found.append(server.complete(prompt="x", max_tokens=300)["choices"][0]["text"])
        )
        asker.start()
        assert source.wait(lambda: len(source) > 5)
        source.pause()
        still = [-1]
        assert source.wait(lambda: _stands(source, still), 20)
        count = len(source)
        source.permit(3)
        assert source.wait(lambda: len(source) >= count + 3)
        time.sleep(0.1)
        source.poll()
        assert len(source) == count + 3
        assert httpx.get(server.url + "/health").status_code == 200
        for body in ({"do": "dance"}, {"do": "permit", "steps": 0}, {"do": "knob", "name": 5}):
            assert server.http.post("/control", json=body).status_code == 400
        stranger = server.http.post("/control", json={"do": "run"}, headers={"x-minipaged-watcher": "me"})
        assert stranger.status_code == 404
        assert asker.is_alive()
        source.close()
        asker.join(20)
        assert len(found[0]) == 300


def _stands(source: LiveSource, seen: list[int]) -> bool:
    """Whether nothing has come since the last look, a while ago."""
    time.sleep(0.1)
    before, seen[0] = seen[0], len(source)
    return before == len(source)
