"""The endpoint against a real server on the loopback: what passes is tried again, what does not costs its row only."""

from __future__ import annotations

import base64
import io
import json
import logging
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from guardalign.errors import ConfigError, RowError
from guardalign.judges import UNPARSED, EndpointJudge, Exchange
from guardalign.models import endpoint
from guardalign.models.endpoint import Pace
from guardalign.types import Reply, Sample, Verdict
from tests.runs import rows, run
from tests.small_lvlms import picture

KEY = "sk-loopback-0123456789"
VARIABLE = "GUARDALIGN_TEST_KEY"
Answer = tuple[int, dict[str, str], Any]
"""status, headers, body (bytes as they are, anything else as JSON)"""


def says(text: str | None) -> Answer:
    return 200, {}, {"choices": [{"message": {"content": text}}], "usage": {"prompt_tokens": 7, "completion_tokens": 2}}


def status(code: int, body: Any = None, **headers: str) -> Answer:
    return code, {name.replace("_", "-"): value for name, value in headers.items()}, body or {}


@dataclass
class Server:
    """Gives its answers in turn, then the last for ever; remembers what it was asked and when."""

    answers: list[Answer | Callable[[dict[str, Any]], Answer]]
    seen: list[dict[str, Any]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    slow: float = 0.0
    url: str = ""

    def next(self, body: dict[str, Any], headers: dict[str, str]) -> Answer:
        with LOCK:
            self.seen.append(body)
            self.headers.append(headers)
            self.times.append(time.monotonic())
            answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        return answer(body) if callable(answer) else answer


LOCK = threading.Lock()


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Server]]:
    monkeypatch.setenv(VARIABLE, KEY)
    monkeypatch.setattr(endpoint, "FIRST_WAIT", 0.02)
    running: list[ThreadingHTTPServer] = []

    def start(*answers: Answer | Callable[[dict[str, Any]], Answer], slow: float = 0.0) -> Server:
        server = Server(list(answers), slow=slow)

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                code, headers, content = server.next(body | {"_path": self.path}, dict(self.headers))
                time.sleep(server.slow)
                raw = content if isinstance(content, bytes) else json.dumps(content).encode()
                self.send_response(code)
                for name, value in {"Content-Length": str(len(raw)), **headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(raw)

            def log_message(self, *_: Any) -> None:
                """Says nothing."""

        http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        http.handle_error = lambda *_: None  # type: ignore[method-assign]  # a client that gave up is no error here
        threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        running.append(http)
        server.url = f"http://127.0.0.1:{http.server_port}/v1"
        return server

    yield start
    for http in running:
        http.shutdown()
        http.server_close()


def settings(server: Server, **more: Any) -> EndpointJudge:
    return EndpointJudge(**{"url": server.url, "model": "judge-1", "key_variable": VARIABLE, "retries": 2, **more})


def exchange(answer: str = "Here is how.", prompt: str = "How?", look: Image.Image | None = None) -> Exchange:
    return Exchange(Sample("s1", prompt, None, "here"), Reply(answer, 1, 1, "end"), look)


def test_a_success_is_a_verdict_and_is_counted(serve: Callable[..., Server]) -> None:
    server = serve(says("Yes."), says("**no**"))
    judge = settings(server, prompt_price=3.0, answer_price=10.0).ready()
    name = "endpoint/judge-1"
    assert judge([exchange(), exchange("I can't help with that.")]) == [
        Verdict(False, True, name),
        Verdict(True, False, name),
    ]
    assert judge.counters == {
        "judge_requests": 2,
        "judge_retries": 0,
        "judge_prompt_tokens": 14,
        "judge_answer_tokens": 4,
        "judge_cost_millionths": 14 * 3 + 4 * 10,
    }
    first = server.seen[0]
    assert (first["_path"], first["model"]) == ("/v1/chat/completions", "judge-1")
    assert (first["temperature"], first["max_tokens"]) == (0.0, 64)
    assert first["messages"][0]["content"].startswith("Request: How? Answer: Here is how.")
    assert server.headers[0]["Authorization"] == f"Bearer {KEY}"


def test_options_reach_the_request(serve: Callable[..., Server], tmp_path: Path) -> None:
    template = tmp_path / "ask.txt"
    template.write_text("{prompt}|{answer}|JSON please: {x}")
    server = serve(says('{"unsafe": true, "categories": ["S9"]}'))
    more = {"template": str(template), "expects": "json", "temperature": None, "token_limit": "max_completion_tokens"}
    (verdict,) = settings(server, **more).ready()([exchange("{prompt}", "{answer}")])
    assert (verdict.unsafe, verdict.categories) == (True, ("S9",))
    sent = server.seen[0]
    assert "temperature" not in sent and "max_tokens" not in sent and sent["max_completion_tokens"] == 64
    assert sent["messages"][0]["content"] == "{answer}|{prompt}|JSON please: {x}"


def test_a_picture_is_sent_small_as_a_data_url_and_only_when_asked_for(serve: Callable[..., Server]) -> None:
    server = serve(says("no"))
    assert not settings(server).ready().sees_pictures
    settings(server).ready()([exchange(look=picture())])
    judge = settings(server, image_size=40).ready()
    assert judge.sees_pictures
    judge([exchange(look=picture()), exchange()])
    plain, seen, without = [body["messages"][0]["content"] for body in server.seen]
    assert isinstance(plain, str) and isinstance(without, str)
    assert [part["type"] for part in seen] == ["image_url", "text"]
    head, _, encoded = seen[0]["image_url"]["url"].partition(",")
    assert head == "data:image/jpeg;base64"
    with Image.open(io.BytesIO(base64.b64decode(encoded))) as sent:
        assert (sent.format, max(sent.size)) == ("JPEG", 40)


def test_a_429_waits_as_long_as_it_was_told(serve: Callable[..., Server]) -> None:
    server = serve(status(429, Retry_After="1"), says("no"))
    judge = settings(server).ready()
    assert judge([exchange()])[0].unsafe is False
    assert 0.95 <= server.times[1] - server.times[0] < 5
    assert (judge.counters["judge_requests"], judge.counters["judge_retries"]) == (2, 1)


def test_a_retry_after_may_be_a_date_and_holds_for_all_threads(serve: Callable[..., Server]) -> None:
    moment = format_datetime(datetime.now(UTC) + timedelta(seconds=3), usegmt=True)
    assert 1.5 < endpoint._retry_after(moment) <= 3
    assert [endpoint._retry_after(value) for value in (None, "soon", "-5", "2", "0.5")] == [0, 0, 0, 2, 0.5]
    pace = Pace(0)
    pace.pause(0.3)
    started = time.monotonic()
    pace.wait()
    assert time.monotonic() - started >= 0.29


def test_a_server_that_asks_for_too_long_a_wait_costs_the_row_at_once(serve: Callable[..., Server]) -> None:
    server = serve(status(429, Retry_After="9999"))
    with pytest.raises(RowError, match="answered 429; given up after 1 attempt"):
        settings(server).ready()([exchange()])


@pytest.mark.parametrize("first", [status(500), status(503), status(408), (200, {}, b"<html>"), (200, {}, {"a": 1})])
def test_what_passes_is_tried_again(first: Answer, serve: Callable[..., Server]) -> None:
    server = serve(first, says("yes"))
    assert settings(server).ready()([exchange()])[0].unsafe is True
    assert len(server.seen) == 2


def test_waits_double_and_are_jittered(serve: Callable[..., Server], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endpoint, "FIRST_WAIT", 0.2)
    server = serve(status(500), status(500), status(500), says("no"))
    settings(server, retries=3).ready()([exchange()])
    gaps = [late - early for early, late in zip(server.times, server.times[1:], strict=False)]
    for gap, most in zip(gaps, (0.2, 0.4, 0.8), strict=True):
        assert most / 2 - 0.01 <= gap <= most + 0.3


@pytest.mark.parametrize(
    ("answer", "reason", "requests"),
    [
        (status(500), "answered 500; given up after 3 attempts", 3),
        ((200, {}, b"nonsense"), "answered something that is no chat completion; given up after 3 attempts", 3),
        ((200, {}, {"choices": []}), "no chat completion", 3),
        ((200, {}, {"choices": [{"message": {"content": 7}}]}), "no chat completion", 3),
        (status(400), "answered 400; given up after 1 attempt", 1),
        (
            status(400, {"error": {"code": "context_length_exceeded", "message": "secret words of the row"}}),
            r"answered 400 \(context_length_exceeded\); given up",
            1,
        ),
        (status(400, {"error": {"code": "Secret Words"}}), "answered 400; given up", 1),
    ],
)
def test_lasting_trouble_is_a_row_error_without_content(
    answer: Answer, reason: str, requests: int, serve: Callable[..., Server]
) -> None:
    server = serve(answer)
    with pytest.raises(
        RowError, match=f"sample s1: the judge's endpoint {reason}" if "no chat" not in reason else reason
    ) as caught:
        settings(server).ready()([exchange("the secret answer", "the secret prompt")])
    assert caught.value.kind == "judging_failed"
    assert len(server.seen) == requests
    assert "secret" not in str(caught.value).casefold() and KEY not in str(caught.value)


def test_a_time_out_and_a_dead_server_are_row_errors(serve: Callable[..., Server]) -> None:
    server = serve(says("no"), slow=0.6)
    with pytest.raises(RowError, match=r"did not answer within 0\.2 s; given up after 2 attempts"):
        settings(server, timeout=0.2, retries=1).ready()([exchange()])
    dead = Server([], url="http://127.0.0.1:9/v1")
    with pytest.raises(ConfigError, match=r"judge\.url: .* cannot be reached \(ConnectionError\); is it running"):
        settings(dead, retries=1).ready()([exchange()])
    ready = settings(serve(says("no")), retries=1).ready()
    ready([exchange()])
    ready.endpoint.address = "http://127.0.0.1:9/v1/chat/completions"  # it went down in mid-run: the row's misfortune
    with pytest.raises(RowError, match=r"cannot be reached \(ConnectionError\); given up after 2 attempts"):
        ready([exchange()])


@pytest.mark.parametrize(
    ("answer", "sentence"),
    [
        (status(401), r"judge\.key_variable: the endpoint refuses the key in that variable \(401\)"),
        (status(403), r"refuses the key"),
        (status(404), r"judge\.url: the endpoint knows no such address or no model judge-1"),
        (status(302, Location="http://127.0.0.1:9/"), r"judge\.url: the endpoint sends elsewhere"),
    ],
)
def test_what_the_user_can_mend_stops_the_run(answer: Answer, sentence: str, serve: Callable[..., Server]) -> None:
    server = serve(answer)
    with pytest.raises(ConfigError, match=sentence) as caught:
        settings(server).ready()([exchange()])
    assert len(server.seen) == 1 and KEY not in str(caught.value)


def test_a_filter_that_forbids_one_rows_content_costs_that_row(serve: Callable[..., Server]) -> None:
    """Gateways answer 403 to what they will not read; a key that was let in before is not what is wrong."""
    judge = settings(serve(says("No."), status(403), says("Yes."))).ready()
    assert judge([exchange()])[0].unsafe is False
    with pytest.raises(RowError, match=r"the judge's endpoint answered 403; given up after 1 attempt"):
        judge([exchange()])
    assert judge([exchange()])[0].unsafe is True


@pytest.mark.parametrize("text", ["perhaps", "", None, "yes or no?"])
def test_an_unparsable_text_is_no_verdict_and_no_error(text: str | None, serve: Callable[..., Server]) -> None:
    judge = settings(serve(says(text))).ready()
    assert judge([exchange("I can't help with that.")]) == [Verdict(None, None, "endpoint/judge-1", problem=UNPARSED)]
    assert judge.counters["judge_retries"] == 0


def test_requests_keep_the_pace_which_actors_share(serve: Callable[..., Server]) -> None:
    server = serve(says("no"))
    judge = settings(server, requests_per_minute=600).ready(num_actors=2)
    threads = [threading.Thread(target=judge, args=([exchange()],)) for _ in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(server.times) == 5
    assert max(server.times) - min(server.times) >= 4 * 0.2 - 0.05


def test_the_key_is_in_no_setting_no_message_and_no_repr(
    serve: Callable[..., Server], monkeypatch: pytest.MonkeyPatch
) -> None:
    server = serve(says("no"))
    judge = settings(server)
    assert KEY not in repr(judge) + judge.fingerprint + repr(vars(judge.ready()))
    monkeypatch.delenv(VARIABLE)
    with pytest.raises(ConfigError, match=f"the environment variable {VARIABLE} is not set here"):
        judge.ready()
    monkeypatch.setenv(VARIABLE, "two\nlines")
    with pytest.raises(ConfigError, match="holds no valid key"):
        judge.ready()
    settings(server, key_variable=None).ready()([exchange()])
    assert "Authorization" not in server.headers[-1]


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ({"url": ""}, r"judge\.url is missing"),
        ({"url": "ftp://x/v1"}, "must begin with http"),
        ({"url": f"http://user:{KEY}@x/v1"}, "neither user nor query"),
        ({"url": f"http://x/v1?key={KEY}"}, "neither user nor query"),
        ({"url": "http://["}, "no valid address"),
        ({"model": ""}, r"judge\.model is missing"),
        ({"key_variable": KEY}, "it names the variable, it never holds the key itself"),
        ({"expects": "json"}, r"judge\.expects json needs a judge\.template"),
        ({"template": "/no/such/file"}, r"judge\.template: /no/such/file cannot be read"),
        ({"parallel": 0}, r"judge\.parallel must be positive"),
        ({"timeout": float("inf")}, r"judge\.timeout"),
        ({"retries": -1}, r"judge\.retries must be 0 or above"),
        ({"image_size": -1}, r"judge\.image_size"),
    ],
)
def test_wrong_options_are_named_and_secrets_not_repeated(wrong: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence) as caught:
        EndpointJudge(**{"url": "http://localhost:1/v1", "model": "m", **wrong})
    assert KEY not in str(caught.value)


def about(body: dict[str, Any]) -> Answer:
    """Refuses to judge two requests, mumbles at another, says no to the rest."""
    text = body["messages"][0]["content"]
    if "[broken]" in text:
        return status(500)
    return says("who knows" if "[odd]" in text else "Yes." if "[harm]" in text else "No.")


@pytest.mark.parametrize("engine", ["local", pytest.param("ray", marks=pytest.mark.slow)])
def test_an_audit_loses_no_row_and_keeps_answers_of_failed_verdicts(
    engine: str,
    serve: Callable[..., Server],
    tmp_path: Path,
    ray_cluster: None,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    server = serve(about)
    source = tmp_path / "in.csv"
    marks = ["", "[broken]", "[odd]", "[harm]", "", "[broken]", "[harm]", ""]
    source.write_text("prompt\n" + "".join(f"What is in the picture? {mark}\n" for mark in marks))
    variable = "GUARDALIGN_TEST_KEY"
    flags = ["--recipe", "none", "--input.format", "csv", "--input.path", source, "--shard_rows", 4]
    flags += ["--judge.name", "endpoint", "--judge.url", server.url, "--judge.model", "judge-1"]
    flags += ["--judge.retries", 1, "--engine", engine, "--output", tmp_path / "out"]
    named = variable if engine == "local" else "null"  # workers of a running cluster have their own environment
    flags += ["--judge.key_variable", named]
    with caplog.at_level(logging.DEBUG):
        assert run(*flags) == 0
    found = list(rows(tmp_path / "out").values())
    assert [row["error_kind"] for row in found] == ["judging_failed" if m == "[broken]" else None for m in marks]
    assert all(row["response"] is not None and row["stop_reason"] for row in found)
    assert [row["unsafe"] for row in found] == [{"": False, "[harm]": True}.get(mark) for mark in marks]
    assert [row["verdict_problem"] for row in found] == [UNPARSED if mark == "[odd]" else None for mark in marks]
    assert all(row["refused"] is None for row, mark in zip(found, marks, strict=True) if mark in ("[odd]", "[broken]"))
    record = json.loads((tmp_path / "out/run.json").read_text())
    totals = record["totals"]
    assert (totals["unparsed"], totals["unsafe"], totals["assessed"]) == (1, 2, 5)
    assert totals["errors"] == {"judging_failed": 2}
    counters = totals["counters"]
    canaries = 2
    assert counters["judge_requests"] == len(server.seen) == canaries + 8 + 2 == 10 + counters["judge_retries"]
    assert counters["judge_prompt_tokens"] == (canaries + 6) * 7
    printed = capfd.readouterr()
    assert "unsafe    2 of 5" in printed.out and "unparsed  1 verdicts" in printed.out
    written = [path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()]
    everything = b"".join([*written, caplog.text.encode(), printed.out.encode(), printed.err.encode()])
    assert KEY.encode() not in everything


def test_a_refused_key_stops_the_audit_with_one_line(
    serve: Callable[..., Server], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server = serve(status(401))
    flags = ["--recipe", "none", "--judge.name", "endpoint", "--judge.url", server.url, "--judge.model", "judge-1"]
    assert run(*flags, "--judge.key_variable", VARIABLE, "--limit", 6, "--output", tmp_path / "out") == 2
    told = capsys.readouterr().err.strip().splitlines()[-1]
    assert "refuses the key" in told and KEY not in told
    assert len(server.seen) <= 6
