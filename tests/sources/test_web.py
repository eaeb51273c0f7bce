"""Pictures from the web: what is fetched, what is never asked, and that a hostile server costs one row and no more."""

from __future__ import annotations

import contextlib
import csv
import gzip
import json
import ssl
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from guardalign.config import InputConfig
from guardalign.errors import ConfigError, RowError
from guardalign.sources import make_source, web
from guardalign.sources.public_net import is_public
from guardalign.sources.web import WebLimits, fetch

HERE = "127.0.0.1"
NAMES = {"pictures.example": [HERE], "xn--bcher-kva.example": [HERE], "inside.example": ["10.0.0.1"]}
"""what the tests' resolver knows"""
Answer = Callable[[BaseHTTPRequestHandler], None]
LIMITS = WebLimits(seconds=10, most_bytes=100_000)


@dataclass
class Web:
    """A real server on this machine, reached under names that only these tests know."""

    port: int
    answers: dict[str, Answer] = field(default_factory=dict)
    """by path without the query"""
    asked: list[tuple[str, dict[str, str]]] = field(default_factory=list)
    """path and headers of every request"""
    looked_up: list[str] = field(default_factory=list)
    names: dict[str, list[str]] = field(default_factory=lambda: {name: list(places) for name, places in NAMES.items()})

    def url(self, path: str, host: str = "pictures.example", scheme: str = "http") -> str:
        return f"{scheme}://{host}:{self.port}{path}"

    def resolve(self, host: str, port: int) -> list[str]:
        self.looked_up.append(host)
        if host not in self.names:
            raise OSError(-2, "no such name")
        return self.names[host]


def say(status: int, body: bytes = b"", **headers: str) -> Answer:
    def answer(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(status)
        for name, value in {"Content_Length": str(len(body)), **headers}.items():
            handler.send_header(name.replace("_", "-"), value)
        handler.end_headers()
        handler.wfile.write(body)

    return answer


def raw(content: bytes) -> Answer:
    def answer(handler: BaseHTTPRequestHandler) -> None:
        handler.wfile.write(content)

    return answer


def serve(found: Web, context: ssl.SSLContext | None = None) -> Iterator[Web]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            found.asked.append((self.path, dict(self.headers)))
            self.close_connection = True
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                found.answers[self.path.partition("?")[0]](self)

        def log_message(self, *_: object) -> None:
            pass

    class Server(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, *_: object) -> None:  # a client that hangs up is what is tested
            pass

    server = Server((HERE, 0), Handler)
    if context is not None:
        server.socket = context.wrap_socket(server.socket, server_side=True)
    found.port = server.server_address[1]
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield found
    server.shutdown()
    server.server_close()


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Web]:
    """The server; its address alone counts as public, its port as asked."""
    found = Web(0)
    for each in serve(found):
        monkeypatch.setattr(web, "resolve", found.resolve)
        monkeypatch.setattr(web, "is_public", lambda address: address == HERE or is_public(address))
        monkeypatch.setattr(web, "PORTS", {*web.PORTS, found.port})
        monkeypatch.setattr(web, "FIRST_WAIT", 0.01)
        yield each


def refusal(url: str, limits: WebLimits = LIMITS) -> RowError:
    with pytest.raises(RowError) as found:
        fetch(url, "a17", limits)
    assert str(found.value).startswith("the picture of sample a17 ") and "\n" not in str(found.value)
    return found.value


@pytest.mark.parametrize(
    "address",
    [
        *("127.0.0.1", "127.9.9.9", "0.0.0.0", "10.1.2.3", "172.16.0.1", "192.168.1.1", "169.254.169.254"),
        *("100.64.0.1", "100.100.100.200", "192.0.0.192", "198.18.0.1", "224.0.0.1", "239.1.1.1", "240.0.0.1"),
        *("255.255.255.255", "192.0.2.1", "168.63.129.16", "192.88.99.1"),
        *("::1", "::", "fe80::1", "fe80::1%eth0", "2606:4700::1111%eth0", "fec0::1", "fd00:ec2::254", "ff02::1"),
        *("2001:db8::1", "3fff::1", "100::1", "2001:0:4136:e378::1", "5f00::1"),
        *("::ffff:127.0.0.1", "::ffff:10.0.0.1", "::127.0.0.1", "::ffff:0:7f00:1"),
        *("2002:7f00:1::", "2002:a9fe:a9fe::", "64:ff9b::7f00:1", "64:ff9b::a9fe:a9fe", "64:ff9b:1::1"),
        *("", "localhost", "1", "0x7f000001"),
    ],
)
def test_no_private_local_or_special_address_is_public(address: str) -> None:
    assert not is_public(address)


@pytest.mark.parametrize(
    "address", ["8.8.8.8", "2606:4700:4700::1111", "::ffff:8.8.8.8", "64:ff9b::808:808", "2002:808:808::1"]
)
def test_public_addresses_are_public(address: str) -> None:
    assert is_public(address)


LOOPBACK = (
    *("127.0.0.1", "localhost", "LOCALHOST", "localhost.", "127.1", "2130706433", "0x7f000001", "0x7f.1"),
    *("0177.0.0.1", "017700000001", "0", "0.0.0.0", "[::1]", "[::]", "[0:0:0:0:0:0:0:1]", "[::ffff:127.0.0.1]"),
    *("[::ffff:7f00:1]", "[::1%25lo]", "①②⑦.⓪.⓪.①", "127。0。0。1", "%31%32%37.0.0.1", "127.0.0.1%2f@x.example"),
)


@pytest.mark.parametrize("host", LOOPBACK)
def test_no_way_of_writing_this_machine_reaches_it(host: str, server: Web, monkeypatch: pytest.MonkeyPatch) -> None:
    server.answers["/secret"] = say(200, b"within")
    monkeypatch.undo()  # the real check and the real resolver
    monkeypatch.setattr(web, "PORTS", {server.port})
    assert refusal(server.url("/secret", host)).kind == "image_missing"
    assert server.asked == []


def test_a_picture_is_fetched_under_its_name_and_nothing_is_sent_along(
    server: Web, monkeypatch: pytest.MonkeyPatch
) -> None:
    for variable in ("http_proxy", "HTTP_PROXY", "https_proxy", "ALL_PROXY"):
        monkeypatch.setenv(variable, "http://127.0.0.1:9")
    server.answers |= {"/a.png": say(200, b"picture", Set_Cookie="a=b"), "/b.png": say(302, Location="/a.png")}
    server.answers["/b.png"] = say(302, Location="/a.png?size=2", Set_Cookie="a=b")
    assert fetch(server.url("/b.png"), "a17", LIMITS) == b"picture"
    assert [path for path, _ in server.asked] == ["/b.png", "/a.png?size=2"]
    for _, headers in server.asked:
        assert set(headers) == {"Host", "User-Agent", "Accept", "Accept-Encoding"}
        assert headers["Host"] == f"pictures.example:{server.port}"
        assert headers["Accept-Encoding"] == "identity"


def test_international_names_and_paths_are_asked_in_ascii(server: Web) -> None:
    server.answers["/%C3%BC%20b.png"] = say(200, b"picture")
    assert fetch(server.url("/ü b.png#part", "Bücher.example"), "a17", LIMITS) == b"picture"
    assert server.looked_up == ["xn--bcher-kva.example"]
    assert server.asked[0][1]["Host"] == f"xn--bcher-kva.example:{server.port}"


def test_the_connection_goes_to_the_address_that_was_checked_and_no_second_lookup_leads_elsewhere(
    server: Web, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = iter([[HERE], ["10.0.0.1"]])
    server.answers["/a.png"] = say(200, b"picture")
    monkeypatch.setattr(web, "resolve", lambda host, port: next(answers))
    assert fetch(server.url("/a.png"), "a17", LIMITS) == b"picture"
    assert next(answers) == ["10.0.0.1"], "the name was looked up twice"


def test_a_name_that_turns_private_between_attempts_is_refused(server: Web, monkeypatch: pytest.MonkeyPatch) -> None:
    answers = iter([[HERE], ["169.254.169.254"]])
    server.answers["/a.png"] = say(503)
    monkeypatch.setattr(web, "resolve", lambda host, port: next(answers))
    assert "private or local" in str(refusal(server.url("/a.png")))
    assert len(server.asked) == 1


def test_one_private_address_among_public_ones_is_enough_to_refuse(server: Web) -> None:
    server.names["pictures.example"] = [HERE, "10.0.0.1"]
    assert "private or local" in str(refusal(server.url("/a.png")))
    assert server.asked == []


def test_an_address_that_takes_no_connection_gives_way_to_the_next(
    server: Web, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(web, "is_public", lambda address: True)
    server.answers["/a.png"] = say(200, b"picture")
    server.names["pictures.example"] = ["127.0.0.9", HERE]
    assert fetch(server.url("/a.png"), "a17", LIMITS) == b"picture"


@pytest.mark.parametrize(
    ("location", "words"),
    [
        ("http://inside.example/a.png", "private or local"),
        ("http://169.254.169.254/latest/meta-data", "private or local"),
        ("//10.0.0.1/a.png", "leads nowhere"),  # the tests' resolver knows names only
        ("file:///etc/passwd", "something else than http"),
        ("ftp://pictures.example/a.png", "something else than http"),
        ("gopher://pictures.example/a", "something else than http"),
        ("data:image/png;base64,AAAA", "something else than http"),
        ("http://user:word@pictures.example/a.png", "a user in it"),
        ("http://pictures.example:22/a.png", "port other than"),
        ("http://[::1/a.png", "is none"),
        ("https:///a.png", "without a proper host"),
        ("", "to nowhere"),
    ],
)
def test_every_redirect_is_checked_afresh(location: str, words: str, server: Web) -> None:
    server.names |= {"169.254.169.254": ["169.254.169.254"]}
    server.answers["/a.png"] = say(302, Location=location)
    assert words in str(refusal(server.url("/a.png")))
    assert len(server.asked) == 1 or words == "leads nowhere"


def test_three_redirects_are_followed_and_a_loop_ends(server: Web) -> None:
    for number in range(5):
        server.answers[f"/{number}"] = say(307, Location=f"/{number + 1}")
    server.answers |= {"/5": say(200, b"picture"), "/loop": say(301, Location="/loop")}
    assert fetch(server.url("/2"), "a17", LIMITS) == b"picture"
    assert "more than 3 times" in str(refusal(server.url("/1")))
    server.asked.clear()
    assert "more than 3 times" in str(refusal(server.url("/loop")))
    assert len(server.asked) == 4


def drip(first: bytes, then: bytes) -> Answer:
    def answer(handler: BaseHTTPRequestHandler) -> None:
        handler.wfile.write(first)
        for _ in range(400):
            handler.wfile.write(then)
            time.sleep(0.02)

    return answer


SLOW = {
    "a body with a length": drip(b"HTTP/1.1 200 OK\r\nContent-Length: 90000\r\n\r\n", b"x"),
    "a body without a length": drip(b"HTTP/1.1 200 OK\r\n\r\n", b"x"),
    "chunks": drip(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", b"1\r\nx\r\n"),
    "a chunk's head": drip(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", b"0"),
    "headers": drip(b"HTTP/1.1 200 OK\r\n", b"A: b\r\n"),
    "one header": drip(b"HTTP/1.1 200 OK\r\nA: ", b"b"),
    "the status": drip(b"HTTP/1.1 200 ", b"O"),
    "nothing": drip(b"", b""),
}


@pytest.mark.parametrize("what", SLOW)
def test_a_server_that_drips_is_left_at_the_deadline(what: str, server: Web) -> None:
    server.answers["/a.png"] = SLOW[what]
    began = time.monotonic()
    error = refusal(server.url("/a.png"), WebLimits(0.4, 100_000))
    assert (error.kind, "within 0.4 s" in str(error)) == ("image_missing", True), str(error)
    assert 0.3 < time.monotonic() - began < 2


def test_a_lookup_that_hangs_is_left_at_the_deadline(server: Web, monkeypatch: pytest.MonkeyPatch) -> None:
    def hang(host: str, port: int) -> list[str]:
        time.sleep(5)
        return []

    monkeypatch.setattr(web, "resolve", hang)
    began = time.monotonic()
    assert "within 0.3 s" in str(refusal(server.url("/a.png"), WebLimits(0.3, 100)))
    assert time.monotonic() - began < 2


def endless(head: bytes, piece: bytes) -> Answer:
    def answer(handler: BaseHTTPRequestHandler) -> None:
        handler.wfile.write(head)
        while True:
            handler.wfile.write(piece)

    return answer


@pytest.mark.parametrize(
    "answer",
    [
        endless(b"HTTP/1.1 200 OK\r\n\r\n", b"x" * 10_000),
        endless(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", b"2710\r\n" + b"x" * 10_000 + b"\r\n"),
        endless(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nffffffffff\r\n", b"x" * 10_000),
        say(200, b"small", Content_Length="100001"),
    ],
)
def test_more_bytes_than_allowed_are_refused_whatever_the_server_says_of_them(answer: Answer, server: Web) -> None:
    server.answers["/a.png"] = answer
    error = refusal(server.url("/a.png"))
    assert (error.kind, "input.url_bytes" in str(error)) == ("image_too_large", True)
    assert len(server.asked) == 1


def test_a_chunk_size_without_an_end_is_left_after_few_bytes(server: Web) -> None:
    sent = [0]

    def answer(handler: BaseHTTPRequestHandler) -> None:
        handler.wfile.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
        while sent[0] < 10**8:
            handler.wfile.write(b"0" * 100_000)
            sent[0] += 100_000

    server.answers["/a.png"] = answer
    assert refusal(server.url("/a.png")).kind == "image_missing"
    assert 0 < sent[0] < 3 * 2 * 10**7, "what the connection's buffers take in three attempts, and not all of it"


def test_a_deadline_that_passes_while_connecting_leaves_no_open_connection(
    server: Web, monkeypatch: pytest.MonkeyPatch
) -> None:
    connections = []

    def late(target: Any, addresses: list[str], visit: Any) -> Any:
        connections.append(connect(target, addresses, visit))
        time.sleep(0.4)
        return connections[0]

    connect = web._connect
    monkeypatch.setattr(web, "_connect", late)
    assert "within 0.3 s" in str(refusal(server.url("/a.png"), WebLimits(0.3, 100)))
    assert [connection.sock for connection in connections] == [None]


def test_exactly_the_allowed_bytes_are_read(server: Web) -> None:
    server.answers["/a.png"] = say(200, b"x" * 100_000)
    assert len(fetch(server.url("/a.png"), "a17", LIMITS)) == 100_000
    server.answers["/a.png"] = raw(b"HTTP/1.1 200 OK\r\n\r\n" + b"x" * 100_001)
    assert refusal(server.url("/a.png")).kind == "image_too_large"


def test_a_compressed_answer_is_refused_and_never_inflated(server: Web) -> None:
    for name in ("gzip", "deflate", "br", "zstd", "GZIP", "identity, gzip"):
        server.answers["/a.png"] = say(200, gzip.compress(bytes(1_000_000)), Content_Encoding=name)
        assert "compressed" in str(refusal(server.url("/a.png")))


BROKEN = {
    "cut short": b"HTTP/1.1 200 OK\r\nContent-Length: 500\r\n\r\nshort",
    "two lengths": b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\nshorts",
    "no HTTP": b"\x16\x03\x01 hello\r\n\r\n",
    "empty": b"",
    "a bad chunk": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\nxx",
    "a minus chunk": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n-5\r\nxx",
    "too many headers": b"HTTP/1.1 200 OK\r\n" + b"A: b\r\n" * 200 + b"\r\n",
    "a long header": b"HTTP/1.1 200 OK\r\nA: " + b"b" * 70_000 + b"\r\n\r\n",
    "a strange status": b"HTTP/1.1 99999 OK\r\n\r\n",
    "HTTP/0.9": b"just bytes",
}


@pytest.mark.parametrize("what", BROKEN)
def test_whatever_a_server_says_becomes_one_sentence(what: str, server: Web) -> None:
    server.answers["/a.png"] = raw(BROKEN[what])
    error = refusal(server.url("/a.png"))
    assert (error.kind, "could not be fetched" in str(error)) == ("image_missing", True)


def test_what_may_pass_is_tried_again_and_what_will_not_is_not(server: Web) -> None:
    later = iter([say(500), say(503), say(200, b"picture")])
    server.answers |= {"/a.png": lambda handler: next(later)(handler), "/b.png": say(503), "/c.png": say(404)}
    assert fetch(server.url("/a.png"), "a17", LIMITS) == b"picture"
    for path, attempts in (("/b.png", 3), ("/c.png", 1)):
        server.asked.clear()
        assert "answered" in str(refusal(server.url(path)))
        assert len(server.asked) == attempts


@pytest.mark.parametrize("status", [201, 204, 206, 304, 400, 401, 403, 404, 410, 451])
def test_only_200_is_a_picture(status: int, server: Web) -> None:
    server.answers["/a.png"] = say(status, b"" if status in (204, 304) else b"picture")
    assert f"answered {status}" in str(refusal(server.url("/a.png")))


def test_no_sentence_and_no_log_line_repeats_what_may_be_secret(server: Web, caplog: pytest.LogCaptureFixture) -> None:
    server.answers |= {"/404": say(404), "/302": say(302, Location="ftp://MARKER/?MARKER"), "/raw": raw(b"")}
    urls = [server.url(f"{path}?key=MARKER#MARKER") for path in server.answers]
    urls += [f"http://{host}/?key=MARKER" for host in ("MARKER:MARKER@pictures.example", "MARKER.example", "[MARKER")]
    urls += ["http://pictures.example:22/MARKER?MARKER", "http://inside.example/?MARKER", "https://:MARKER@/"]
    for url in urls:
        assert "marker" not in str(refusal(url)).lower()
    server.answers["/odd"] = raw(b"HTTP/1.1 200 OK\r\nno header\r\n\r\npicture")
    fetch(server.url("/odd?key=MARKER"), "a17", LIMITS)
    assert "MARKER" not in caplog.text


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Certificate and key in one file, for pictures.example, signed by itself."""
    path = tmp_path_factory.mktemp("tls") / "both.pem"
    command = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 2 -subj /CN=pictures.example"
    alternative = "subjectAltName=DNS:pictures.example"
    made = [*command.split(), "-addext", alternative, "-keyout", str(path), "-out", f"{path}.crt"]
    try:
        subprocess.run(made, check=True, capture_output=True)
    except FileNotFoundError:
        pytest.skip("openssl is not installed")
    path.write_text(path.read_text() + Path(f"{path}.crt").read_text())
    return path


@pytest.fixture
def https(certificate: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Web]:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    found = Web(0)
    for each in serve(found, context):
        monkeypatch.setattr(web, "resolve", found.resolve)
        monkeypatch.setattr(web, "is_public", lambda address: True)
        monkeypatch.setattr(web, "PORTS", {found.port})
        monkeypatch.setattr(web, "FIRST_WAIT", 0.01)
        yield each


def test_https_checks_the_certificate_for_the_name_and_not_for_the_address(
    https: Web, certificate: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    https.answers |= {"/a.png": say(200, b"picture"), "/b.png": say(302, Location="http://pictures.example/a.png")}
    https.names["other.example"] = [HERE]
    assert "certificate" in str(refusal(https.url("/a.png", scheme="https"))), "nobody vouches for it yet"
    trusting = ssl.create_default_context(cafile=certificate)
    monkeypatch.setattr(web, "_trust", lambda: trusting)
    assert fetch(https.url("/a.png", scheme="https"), "a17", LIMITS) == b"picture"
    assert "certificate" in str(refusal(https.url("/a.png", "other.example", "https")))
    monkeypatch.setattr(web, "PORTS", {80, https.port})
    assert "https to http" in str(refusal(https.url("/b.png", scheme="https")))


def test_a_tls_server_that_drips_is_left_at_the_deadline(
    https: Web, certificate: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trusting = ssl.create_default_context(cafile=certificate)
    monkeypatch.setattr(web, "_trust", lambda: trusting)
    https.answers["/a.png"] = SLOW["headers"]
    began = time.monotonic()
    assert "within 0.5 s" in str(refusal(https.url("/a.png", scheme="https"), WebLimits(0.5, 100)))
    assert time.monotonic() - began < 2


def jsonl(folder: Path, rows: list[dict[str, Any]]) -> InputConfig:
    (folder / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return InputConfig("jsonl", str(folder / "t.jsonl"))


def comma(folder: Path, rows: list[dict[str, Any]]) -> InputConfig:
    with (folder / "t.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return InputConfig("csv", str(folder / "t.csv"))


def parquet(folder: Path, rows: list[dict[str, Any]]) -> InputConfig:
    pq.write_table(pa.Table.from_pylist(rows), folder / "t.parquet")
    return InputConfig("parquet", str(folder / "t.parquet"))


def parquet_struct(folder: Path, rows: list[dict[str, Any]]) -> InputConfig:
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    images = pa.array([{"bytes": None, "path": row["image"]} for row in rows], kind)
    others = pa.Table.from_pylist([{key: row[key] for key in ("sample_id", "prompt")} for row in rows])
    pq.write_table(others.append_column("image", images), folder / "t.parquet")
    return InputConfig("parquet", str(folder / "t.parquet"))


def huggingface(folder: Path, rows: list[dict[str, Any]]) -> InputConfig:
    import datasets

    datasets.Dataset.from_list(rows).save_to_disk(str(folder / "saved"))
    return InputConfig("huggingface", str(folder / "saved"))


@pytest.mark.parametrize("write", [jsonl, comma, parquet, parquet_struct, huggingface])
def test_every_source_that_names_pictures_fetches_them_only_when_told_to(
    write: Callable[..., InputConfig], tmp_path: Path, server: Web, read_all: Any
) -> None:
    (tmp_path / "here.png").write_bytes(b"local")
    server.answers |= {"/a.png": say(200, b"far"), "/b.png": say(404)}
    rows = [("far", server.url("/a.png?MARKER")), ("gone", server.url("/b.png?MARKER"))]
    rows += [("local", str(tmp_path / "here.png"))]
    config = write(tmp_path, [{"sample_id": name, "image": place, "prompt": "p"} for name, place in rows])
    config = InputConfig(config.format, config.path, image_root=str(tmp_path))
    plan, off = read_all(config)
    assert [(row["image"], row["error_kind"]) for row in off] == [
        (None, "image_missing"),
        (None, "image_missing"),
        (b"local", None),
    ]
    assert "input.allow_urls is off" in off[0]["error"]
    assert server.asked == []
    on_plan, on = read_all(InputConfig(config.format, config.path, image_root=str(tmp_path), allow_urls=True))
    assert [row["image"] for row in on] == [b"far", None, b"local"]
    assert "answered 404" in on[1]["error"] and "MARKER" not in on[1]["error"]
    assert on_plan.files == plan.files, "the census asks nobody and lists files only"
    assert sorted(path for path, _ in server.asked) == ["/a.png?MARKER", "/b.png?MARKER"]


def test_pictures_of_a_shard_are_waited_for_together(tmp_path: Path, server: Web) -> None:
    def late(handler: BaseHTTPRequestHandler) -> None:
        time.sleep(0.2)
        say(200, handler.path.encode())(handler)

    server.answers |= {f"/{number}": late for number in range(16)}
    rows = [{"sample_id": f"s{number}", "image": server.url(f"/{number}"), "prompt": "p"} for number in range(16)]
    config = jsonl(tmp_path, rows)
    source = make_source(InputConfig("jsonl", config.path, allow_urls=True))
    (shard,) = source.plan(16, None).shards
    began = time.monotonic()
    table = source.read(shard)
    assert time.monotonic() - began < 16 * 0.2 * 0.6
    assert table["image"].to_pylist() == [f"/{number}".encode() for number in range(16)], "in the order of the rows"


@pytest.mark.parametrize("form", ["webdataset", "micro", "figstep"])
def test_formats_whose_rows_name_no_picture_of_their_own_refuse_the_setting(form: Any) -> None:
    path = "" if form == "micro" else "somewhere"
    with pytest.raises(ConfigError, match=r"input\.allow_urls has no meaning"):
        make_source(InputConfig(form, path, allow_urls=True))
