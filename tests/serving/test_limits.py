"""What strangers may send: heads and bodies within limits, in time, and connections that go on after an error."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator

import pytest

from tests.serving.engines import scripted
from tests.serving.running import Serving, connect, raw_request, read_all, serving

OK = {"prompt": "xyz", "max_tokens": 3}


@pytest.fixture(scope="module")
def server() -> Iterator[Serving]:
    with serving(scripted) as found:
        yield found


def status_of(answer: bytes) -> int:
    return int(answer.split(b" ", 2)[1])


def error_of(answer: bytes) -> str:
    return str(json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["message"])


def sent_until_cut_off(connection: socket.socket, part: bytes, most: int) -> int:
    """How many parts could be sent before the server closed."""
    for sent in range(most):
        try:
            connection.sendall(part)
        except (BrokenPipeError, ConnectionResetError):
            return sent
    return most


def test_a_head_that_is_too_large(server: Serving) -> None:
    for head in (b"x-filler: " + b"f" * 70_000, b"\r\n".join(b"x-%d: %s" % (i, b"f" * 500) for i in range(200))):
        connection = connect(server.port)
        connection.sendall(b"GET /health HTTP/1.1\r\nhost: x\r\n" + head + b"\r\n\r\n")
        answer = read_all(connection)
        assert status_of(answer) == 431
        assert "headers" in error_of(answer)
    connection = connect(server.port)
    connection.sendall(b"GET /" + b"a" * 70_000 + b" HTTP/1.1\r\n\r\n")
    assert status_of(read_all(connection)) == 431


def test_a_header_of_64_mib_is_cut_off_long_before_its_end(server: Serving) -> None:
    connection = connect(server.port)
    connection.sendall(b"GET /health HTTP/1.1\r\nx-filler: ")
    assert sent_until_cut_off(connection, b"f" * (1 << 20), 64) < 16


def test_a_body_that_is_too_large(server: Serving) -> None:
    connection = connect(server.port)
    connection.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 209715200\r\n\r\n")
    answer = read_all(connection)
    assert status_of(answer) == 413
    assert b"connection: close" in answer
    connection = connect(server.port)
    connection.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n")
    chunk = b"10000\r\n" + b"x" * 65536 + b"\r\n"
    assert sent_until_cut_off(connection, chunk, 3200) < 800


def test_a_chunked_body(server: Serving) -> None:
    connection = connect(server.port)
    content = json.dumps(OK).encode()
    connection.sendall(
        b"POST /v1/completions HTTP/1.1\r\nhost: x\r\nconnection: close\r\ntransfer-encoding: chunked\r\n\r\n"
    )
    for byte in content:
        connection.sendall(b"1\r\n" + bytes([byte]) + b"\r\n")
    connection.sendall(b"0\r\n\r\n")
    assert b'"text":"def"' in read_all(connection)


def test_a_head_that_never_ends(server: Serving, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("minipaged.serving.http.limits.HEAD_SECONDS", 0.3)
    for start in (b"", b"GET /health HT", b"GET /health HTTP/1.1\r\nhost: x\r\n"):
        connection = connect(server.port)
        connection.sendall(start)
        begun = time.monotonic()
        answer = read_all(connection)
        assert status_of(answer) == 408
        assert time.monotonic() - begun < 5


def test_a_body_that_never_ends(server: Serving, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("minipaged.serving.http.asgi.BODY_SECONDS", 0.3)
    connection = connect(server.port)
    connection.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 100\r\n\r\n{")
    assert status_of(read_all(connection)) == 408


def test_bytes_that_are_no_http(server: Serving) -> None:
    for data in (b"\x16\x03\x01\x02\x00", b"hello\r\n\r\n", b"GET / HTTP/9.9\r\n\r\n"):
        connection = connect(server.port)
        connection.sendall(data)
        answer = read_all(connection)
        assert status_of(answer) == 400
        assert error_of(answer)


def test_a_connection_goes_on_after_a_refusal(server: Serving) -> None:
    connection = connect(server.port)
    wanted = [400, 404, 405, 200, 400, 200]
    requests = [raw_request("/v1/completions", {"prompt": 3}), b"GET /x HTTP/1.1\r\nhost: x\r\n\r\n"]
    requests += [b"GET /tokenize HTTP/1.1\r\nhost: x\r\n\r\n", raw_request("/v1/completions", OK)]
    requests += [raw_request("/tokenize", {"prompt": []}), raw_request("/v1/completions", OK, "connection: close\r\n")]
    for request in requests[:-1]:
        connection.sendall(request)
        time.sleep(0.05)
    connection.sendall(requests[-1])
    answers = read_all(connection).split(b"HTTP/1.1 ")[1:]
    assert [int(answer[:3]) for answer in answers] == wanted


def test_pipelined_requests_are_answered_in_order(server: Serving) -> None:
    connection = connect(server.port)
    bodies = [{"prompt": "x" * i, "max_tokens": 1} for i in range(1, 21)]
    requests = [raw_request("/v1/completions", body) for body in bodies]
    requests[-1] = raw_request("/v1/completions", bodies[-1], "connection: close\r\n")
    connection.sendall(b"".join(requests))
    texts = [piece.split(b'"')[0].decode() for piece in read_all(connection).split(b'"text":"')[1:]]
    assert texts == [chr(97 + i % 26) for i in range(1, 21)]


def test_absurd_numbers_are_refused_at_once(server: Serving) -> None:
    for extra in ({"n": 1025}, {"n": 2**62}, {"stop": ["s"] * 10_000}, {"best_of": 10**9}, {"logprobs": 10**9}):
        server.refusal({**OK, **extra})
        begun = time.perf_counter()
        status, _ = server.refusal({**OK, **extra})
        assert status == 400
        assert time.perf_counter() - begun < 0.25


def test_a_client_that_expects_a_100_gets_it(server: Serving) -> None:
    connection = connect(server.port)
    head, _, body = raw_request("/v1/completions", OK, "connection: close\r\nexpect: 100-continue\r\n").partition(
        b"\r\n\r\n"
    )
    connection.sendall(head + b"\r\n\r\n")
    assert connection.recv(100).startswith(b"HTTP/1.1 100")
    connection.sendall(body)
    assert b'"text":"def"' in read_all(connection)
