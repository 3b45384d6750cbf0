"""Endpoints: what is sent, what comes of every answer that a server can give, and that limits hold.

The server is a real one on the loopback interface (endpoint_server.py); nothing of the client is
replaced.
"""

from __future__ import annotations

import asyncio
import gc
import json
import logging
import math
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from email.utils import format_datetime
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
from endpoint_server import Answer, Asked, EndpointServer, json_answer, refusal, reply
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from stages.engines import Completion, Sampling, Usage, traffic
from stages.engines.chat import ChatFailure, ChatRequest
from stages.engines.endpoint import EndpointChat, request_seed
from stages.engines.local import make_engine
from stages.engines.settings import EndpointSettings, ModelSettings
from stages.engines.traffic import Pace, backoff_wait_s, retry_after_s
from stages.errors import ConfigError, EngineError
from stages.rows import Message

KEY = "sk-test-0123456789abcdef"
SAMPLING = Sampling(max_new_tokens=32, temperature=0.5, top_p=0.9)


@pytest.fixture
def server() -> Iterator[EndpointServer]:
    with EndpointServer() as running:
        yield running


def messages(text: str) -> list[Message]:
    return [{"role": "system", "content": "Be brief."}, {"role": "user", "content": text}]


def requests(n: int) -> list[ChatRequest]:
    return [ChatRequest(messages(f"question {i}"), seed=i) for i in range(n)]


def endpoint(url: str, **options: Any) -> EndpointSettings:
    quick = {"max_retry_wait_s": 0.01, "timeout_s": 10, "max_retries": 2}
    return EndpointSettings.model_validate({"base_url": url, **quick, **options})


def asked(
    server: EndpointServer | str,
    what: Sequence[ChatRequest],
    sampling: Sampling = SAMPLING,
    **options: Any,
) -> list[Completion | ChatFailure]:
    url = server if isinstance(server, str) else server.url
    chat = EndpointChat("a-model", endpoint(url, **options))
    try:
        return asyncio.run(chat.chat(what, sampling))
    finally:
        chat.close()


class TestWhatIsSent:
    def test_request(self, server: EndpointServer, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("TEACHER_KEY", KEY)
        seed = 2**63 + 12345
        turns = [*messages("Hello, «мир»")]
        turns[1]["train"] = True
        sampling = Sampling(7, 0.25, 0.75, schema='{"type": "object"}')
        asked(
            server,
            [ChatRequest(turns, seed)],
            sampling,
            api_key_env="TEACHER_KEY",
            body={"chat_template_kwargs": {"enable_thinking": False}},
        )
        (seen,) = server.asked
        assert seen.path == "/v1/chat/completions"
        assert seen.headers["authorization"] == f"Bearer {KEY}"
        assert seen.value == {
            "model": "a-model",
            "messages": [
                {"role": "system", "content": "Be brief."},
                {"role": "user", "content": "Hello, «мир»"},
            ],
            "temperature": 0.25,
            "top_p": 0.75,
            "max_tokens": 7,
            "seed": request_seed(seed),
            "response_format": {
                "type": "json_schema",
                "json_schema": {"name": "reply", "strict": True, "schema": {"type": "object"}},
            },
            "chat_template_kwargs": {"enable_thinking": False},
        }

    def test_without_key_and_with_the_newer_limit(self, server: EndpointServer) -> None:
        asked(server, requests(1), limit_field="max_completion_tokens")
        (seen,) = server.asked
        assert "authorization" not in seen.headers
        assert seen.value["max_completion_tokens"] == 32
        assert {"max_tokens", "response_format"}.isdisjoint(seen.value)

    @given(st.integers(0, 2**64 - 1))
    def test_seed_fits_every_server(self, seed: int) -> None:
        assert 0 <= request_seed(seed) < 2**31
        assert request_seed(seed) != request_seed(seed ^ 1)
        assert request_seed(seed) != request_seed(seed ^ (1 << 63))


class TestReplies:
    def test_text_reason_and_usage(self, server: EndpointServer) -> None:
        server.script = lambda one, _: reply("Two words", "length")
        (done,) = asked(server, requests(1))
        assert isinstance(done, Completion)
        assert (done.text, done.finish_reason, done.token_ids) == ("Two words", "length", ())
        assert done.usage == Usage(10, 2)
        assert math.isnan(done.log_prob)

    @pytest.mark.parametrize(
        ("answer", "text"),
        [
            (
                reply("Yes.", reasoning_content="Let me see."),
                "<think>\nLet me see.\n</think>\n\nYes.",
            ),
            (reply("Yes.", reasoning="Let me see."), "<think>\nLet me see.\n</think>\n\nYes."),
            (reply("Yes.", reasoning=None), "Yes."),
            (reply(None), ""),
            (reply("Filtered he", "content_filter"), "Filtered he"),
            (reply("snow ☃ \U0001f600"), "snow ☃ \U0001f600"),
        ],
    )
    def test_forms_of_message(self, server: EndpointServer, answer: Answer, text: str) -> None:
        server.script = lambda *_: answer
        (done,) = asked(server, requests(1))
        assert isinstance(done, Completion)
        assert done.text == text

    @pytest.mark.parametrize(
        "usage",
        [
            None,
            {},
            {"total_tokens": 3},
            {"prompt_tokens": "many"},
            {"prompt_tokens": -1, "completion_tokens": 2},
            {"prompt_tokens": True, "completion_tokens": 2},
            {"prompt_tokens": 2**40, "completion_tokens": 2},
            {"prompt_tokens": 3, "completion_tokens": 10**30},
        ],
    )
    def test_usage_that_isnt_reported_is_unknown(self, server: EndpointServer, usage: Any) -> None:
        value = json.loads(reply("Yes.").body) | {"usage": usage}
        server.script = lambda *_: json_answer(value)
        (done,) = asked(server, requests(1))
        assert isinstance(done, Completion)
        assert done.usage is None

    def test_replies_come_in_the_order_of_requests(self, server: EndpointServer) -> None:
        """Whatever order the server answers in: here the first one last."""
        first = asyncio.Event()

        def script(one: Asked, times: int) -> Answer:
            if len(server) == 20:
                server.set(first)
            done = reply(f"About {one.prompt}.")
            held = first if one.prompt == "question 0" else None
            return Answer(body=done.body, held=held)

        server.script = script
        found = asked(server, requests(20))
        assert [done.text for done in found if isinstance(done, Completion)] == [
            f"About question {i}." for i in range(20)
        ]


LONG = reply("word " * 400_000)
DOWN = "http://127.0.0.1:1/v1"

# What the server does each time, the code that comes of it, and how often it is asked.
BAD: list[tuple[str, Answer, str, int]] = [
    ("slow", Answer(held=asyncio.Event()), "timeout", 3),
    ("limited", refusal(429, "Slow down."), "rate_limited", 3),
    ("limited_for_a_time", refusal(429, "Slow down.", Retry_After="1"), "rate_limited", 3),
    ("broken", refusal(500, "Oops."), "server_error", 3),
    ("overloaded", Answer(503, b"<html>busy</html>"), "server_error", 3),
    ("half_json", Answer(body=b'{"choices": [{"message": {"content": "He'), "bad_reply", 3),
    ("html", Answer(body=b"<html>welcome</html>"), "bad_reply", 3),
    ("no_choices_field", json_answer({"object": "chat.completion"}), "bad_reply", 3),
    ("error_in_200", json_answer({"error": {"message": "No GPU."}}), "bad_reply", 3),
    (
        "no_message",
        json_answer({"choices": [{"text": "x", "finish_reason": "stop"}]}),
        "bad_reply",
        3,
    ),
    ("called_a_tool", reply("x", "tool_calls"), "bad_reply", 3),
    ("deep_json", Answer(body=b"[" * 100_000), "bad_reply", 3),
    ("empty_choices", json_answer({"choices": []}), "empty_choices", 3),
    ("cut_body", Answer(body=reply("Hello.").body, sent=20), "connection_lost", 3),
    ("closed", Answer(silent=True), "connection_lost", 3),
    ("huge", LONG, "reply_too_large", 1),
    ("surrogate", Answer(body=reply("x").body.replace(b'"x"', rb'"\ud800"')), "invalid_unicode", 1),
    ("no_utf8", Answer(body=reply("x").body.replace(b'"x"', b'"\xff"')), "invalid_unicode", 1),
    ("no_answer", reply(None, refusal="I'd rather not."), "refusal", 1),
    ("bad_field", refusal(400, "temperature must be 1"), "bad_request", 1),
    ("unprocessable", Answer(422, b'{"detail": [{"msg": "bad role"}]}'), "bad_request", 1),
    (
        "too_long",
        refusal(400, "Too much.", "context_length_exceeded"),
        "prompt_too_long",
        1,
    ),
    (
        "too_long_in_words",
        Answer(400, b'{"object": "error", "message": "maximum context length is 9 tokens"}'),
        "prompt_too_long",
        1,
    ),
    ("too_long_to_send", Answer(413, b"too large"), "prompt_too_long", 1),
    ("filtered", refusal(400, "No.", "content_filter"), "content_filter", 1),
    ("flagged", refusal(403, "Your input was flagged."), "content_filter", 1),
]


class TestBadAnswers:
    @pytest.mark.parametrize(
        ("answer", "code", "times"), [case[1:] for case in BAD], ids=[case[0] for case in BAD]
    )
    def test_one_request_fails_with_a_code_and_the_others_dont(
        self, server: EndpointServer, answer: Answer, code: str, times: int
    ) -> None:
        server.script = lambda one, _: answer if one.prompt == "question 1" else reply("Good.")
        options = {"timeout_s": 0.3} if answer.held else {}
        before, failed, after = asked(server, requests(3), max_reply_bytes=1_000_000, **options)
        assert isinstance(before, Completion)
        assert isinstance(after, Completion)
        assert isinstance(failed, ChatFailure)
        assert failed.code == code
        assert server.url in failed.detail
        assert ("; tried 3 times" in failed.detail) == (times == 3)
        assert sum(one.prompt == "question 1" for one in server.asked) == times

    @pytest.mark.parametrize(
        "answer", [case[1] for case in BAD if case[3] == 3], ids=[c[0] for c in BAD if c[3] == 3]
    )
    def test_what_passes_is_tried_until_it_has_passed(
        self, server: EndpointServer, answer: Answer
    ) -> None:
        server.script = lambda one, times: answer if times < 3 else reply("Good.")
        options = {"timeout_s": 0.3} if answer.held else {}
        (done,) = asked(server, requests(1), **options)
        assert isinstance(done, Completion)
        assert len(server) == 3

    def test_an_answer_that_is_too_large_isnt_read_to_its_end(self, server: EndpointServer) -> None:
        endless = Answer(body=b" " * 100_000_000)
        server.script = lambda *_: endless
        (failed,) = asked(server, requests(1), max_reply_bytes=10_000)
        assert isinstance(failed, ChatFailure)
        assert failed.code == "reply_too_large"
        server.wait_for(lambda: server.connections == 0)
        # What the kernel's buffers take at most is sent in vain.
        assert server.bytes_sent < 20_000_000

    def test_an_answer_that_trickles_in_isnt_waited_for(self, server: EndpointServer) -> None:
        """The limit is on the whole reply: httpx's own is on every read."""
        slow = Answer(body=b"{" + b" " * 1000, sent=1000)

        async def trickle(reader: Any, writer: Any) -> None:
            await reader.readuntil(b"\r\n\r\n")
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n")
            for byte in slow.body:
                writer.write(bytes([byte]))
                await writer.drain()
                await asyncio.sleep(0.05)

        async def run() -> list[Completion | ChatFailure]:
            trickling = await asyncio.start_server(trickle, "127.0.0.1", 0)
            port = trickling.sockets[0].getsockname()[1]
            chat = EndpointChat(
                "m", endpoint(f"http://127.0.0.1:{port}/v1", timeout_s=0.3, max_retries=0)
            )
            try:
                return await chat.chat(requests(1), SAMPLING)
            finally:
                chat.close()
                trickling.close()

        started = time.monotonic()
        (failed,) = asyncio.run(run())
        assert isinstance(failed, ChatFailure)
        assert failed.code == "timeout"
        assert time.monotonic() - started < 10

    def test_nothing_there(self) -> None:
        found = asked(DOWN, requests(2))
        assert [one.code for one in found if isinstance(one, ChatFailure)] == ["endpoint_down"] * 2
        assert all("nothing answers" in str(one) and DOWN in str(one) for one in found)

    @pytest.mark.parametrize(
        ("answer", "named"),
        [
            (refusal(401, f"Incorrect API key provided: {KEY}."), ["TEACHER_KEY"]),
            (refusal(403, "Forbidden."), ["TEACHER_KEY"]),
            (refusal(402, "Insufficient balance."), ["TEACHER_KEY", "nothing left"]),
            (refusal(429, "You ran out.", "insufficient_quota"), ["TEACHER_KEY", "nothing left"]),
            (refusal(404, "The model does not exist.", "model_not_found"), ["'a-model'"]),
            (Answer(404, b'{"detail": "Not Found"}'), ["'a-model'", "base_url"]),
            (refusal(400, "Model Not Exist"), ["'a-model'"]),
            (refusal(400, "a-model is not a valid model ID"), ["'a-model'"]),
            (Answer(307, b"", {"Location": "https://elsewhere.example/v1"}), ["elsewhere.example"]),
        ],
    )
    def test_what_no_request_can_pass_stops_all(
        self,
        server: EndpointServer,
        monkeypatch: pytest.MonkeyPatch,
        caplog: pytest.LogCaptureFixture,
        answer: Answer,
        named: list[str],
    ) -> None:
        monkeypatch.setenv("TEACHER_KEY", KEY)
        server.script = lambda *_: answer
        with pytest.raises(EngineError) as raised:
            asked(server, requests(50), api_key_env="TEACHER_KEY", concurrency=2)
        assert all(text in str(raised.value) for text in [server.url, *named])
        assert KEY not in str(raised.value)
        # Those that were under way, and no more.
        assert len(server) <= 4
        # An error of a call that nobody waits for any more is no news.
        gc.collect()
        assert not caplog.text


class TestLimits:
    def test_so_many_at_once_and_no_more(self, server: EndpointServer) -> None:
        full = asyncio.Event()

        def script(one: Asked, times: int) -> Answer:
            if server.most_at_once == 3:
                server.set(full)
            return Answer(body=reply("Good.").body, held=full)

        server.script = script
        found = asked(server, requests(30), concurrency=3)
        assert server.most_at_once == 3
        assert all(isinstance(one, Completion) for one in found)

    def test_several_calls_share_the_limit(self, server: EndpointServer) -> None:
        chat = EndpointChat("m", endpoint(server.url, concurrency=2))

        async def calls() -> None:
            await asyncio.gather(*(chat.chat(requests(5), SAMPLING) for _ in range(4)))

        asyncio.run(calls())
        chat.close()
        assert len(server) == 20
        assert server.most_at_once <= 2

    def test_requests_a_minute(self, server: EndpointServer) -> None:
        """600 a minute: one every tenth of a second, with any number of slots."""
        asked(server, requests(6), requests_per_minute=600)
        times = [one.at for one in server.asked]
        assert times[-1] - times[0] >= 0.45

    def test_tokens_a_minute(self, server: EndpointServer) -> None:
        """12 tokens a reply at 2,400 a minute, one at a time: one reply every 0.3 s."""
        server.script = lambda *_: reply("Two words")
        asked(server, requests(3), tokens_per_minute=2400, concurrency=1)
        first, second, third = (one.at for one in server.asked)
        assert min(second - first, third - second) >= 0.28

    @given(st.lists(st.tuples(st.floats(0, 30), st.floats(0, 50)), max_size=60), st.floats(1, 1000))
    def test_pace_keeps_its_average(self, steps: list[tuple[float, float]], rate: float) -> None:
        """Over the time from the first to the last start, less than the rate and one amount."""
        pace, now, spent = Pace(rate), 0.0, 0.0
        for idle, amount in steps:
            now += idle
            now += pace.wait_s(now)
            assert spent <= rate / 60 * now + 1e-6
            pace.spend(now, amount)
            spent += amount

    def test_no_reply_takes_more_than_a_minute(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Whatever its endpoint says that it took."""
        clock = [100.0]

        async def sleep(seconds: float) -> None:
            clock[0] += seconds

        monkeypatch.setattr(traffic, "time", SimpleNamespace(monotonic=lambda: clock[0]))
        monkeypatch.setattr(traffic, "asyncio", SimpleNamespace(sleep=sleep))
        limits = traffic.Traffic(tokens_per_minute=50)
        for tokens, seconds in ((25, 30), (10**7, 60), (5, 6)):
            before = clock[0]
            limits.spend_tokens(tokens)
            asyncio.run(limits.turn())
            assert clock[0] - before == pytest.approx(seconds)

    @pytest.mark.parametrize("header", ["0.4", "date"])
    def test_retry_after_is_waited_for_by_all(self, server: EndpointServer, header: str) -> None:
        told = format_datetime(datetime.fromtimestamp(time.time() + 1.9, UTC), usegmt=True)
        limited = refusal(429, "Wait.", Retry_After=told if header == "date" else header)
        server.script = lambda *_: limited if len(server) == 1 else reply("Good.")
        found = asked(server, requests(3), concurrency=1, max_retry_wait_s=0.4)
        assert all(isinstance(one, Completion) for one in found)
        times = [one.at for one in server.asked]
        # Dates have whole seconds, and 1.9 s from now is past 0.4 s whatever is cut off.
        assert times[1] - times[0] >= 0.38

    def test_retry_after_has_a_limit(self, server: EndpointServer) -> None:
        server.script = lambda *_: refusal(429, "Wait.", Retry_After="86400")
        (failed,) = asked(server, requests(1))
        assert isinstance(failed, ChatFailure)
        assert len(server) == 3

    @pytest.mark.parametrize(
        ("header", "seconds"),
        [
            (None, None),
            ("3", 3.0),
            ("0.5", 0.5),
            ("Sat, 21 Nov 2026 16:21:10 GMT", 10.0),
            ("Sat, 21 Nov 2026 16:20:00 GMT", 0.0),
            ("Sat, 21 Nov 2026 16:21:10 -0000", 10.0),
            ("Mon, 99999999999999999999 Jan 2026 00:00:00 GMT", None),
            ("Mon, 1 Jan 99999999999999999999 00:00:00 GMT", None),
            ("soon", None),
            ("-3", None),
            ("nan", None),
            ("", None),
        ],
    )
    def test_retry_after(self, header: str | None, seconds: float | None) -> None:
        now = datetime(2026, 11, 21, 16, 21, 0, tzinfo=UTC).timestamp()
        assert retry_after_s(header, now) == seconds

    @given(st.integers(0, 2**64 - 1), st.integers(1, 10**6), st.floats(0.001, 1000))
    def test_backoff_is_seeded_and_bounded(self, seed: int, tries: int, longest: float) -> None:
        wait = backoff_wait_s(seed, tries, longest)
        assert wait == backoff_wait_s(seed, tries, longest)
        assert 0 <= wait <= min(longest, 2.0 ** min(tries - 1, 1000))

    def test_backoff_is_spread_over_its_whole_range(self) -> None:
        """Full jitter: uniform from 0 to the ceiling, so that retries don't come in waves."""
        for tries, ceiling in [(1, 1), (4, 8), (9, 60)]:
            waits = sorted(backoff_wait_s(seed, tries, 60) for seed in range(2000))
            for share in (0.1, 0.5, 0.9):
                assert waits[int(share * 2000)] == pytest.approx(
                    share * ceiling, abs=0.04 * ceiling
                )


class TestClosing:
    def sockets(self, server: EndpointServer) -> int:
        found = psutil.Process().net_connections()
        return sum(bool(one.raddr) and one.raddr.port == server.port for one in found)

    def test_nothing_is_left(self, server: EndpointServer) -> None:
        before = threading.active_count()
        chat = EndpointChat("m", endpoint(server.url))
        asyncio.run(chat.chat(requests(4), SAMPLING))
        assert self.sockets(server) > 0
        chat.close()
        chat.close()
        assert self.sockets(server) == 0
        assert threading.active_count() == before
        server.wait_for(lambda: server.connections == 0)

    def test_what_is_under_way_is_dropped(self, server: EndpointServer) -> None:
        server.script = lambda *_: Answer(held=asyncio.Event())
        chat = EndpointChat("m", endpoint(server.url))

        async def interrupted() -> None:
            call = asyncio.create_task(chat.chat(requests(4), SAMPLING))
            await asyncio.to_thread(server.wait_for, lambda: len(server) == 4)
            chat.close()
            with pytest.raises(asyncio.CancelledError):
                await call

        asyncio.run(interrupted())
        assert self.sockets(server) == 0

    def test_a_cancelled_call_is_no_longer_asked(self, server: EndpointServer) -> None:
        server.script = lambda *_: Answer(held=asyncio.Event())
        chat = EndpointChat("m", endpoint(server.url, concurrency=2))

        async def cancelled() -> None:
            call = asyncio.create_task(chat.chat(requests(9), SAMPLING))
            await asyncio.to_thread(server.wait_for, lambda: len(server) == 2)
            call.cancel()
            with pytest.raises(asyncio.CancelledError):
                await call
            server.script = lambda *_: reply("Good.")
            (done,) = await chat.chat(requests(1), SAMPLING)
            assert isinstance(done, Completion)

        asyncio.run(cancelled())
        chat.close()
        assert len(server) == 3


class TestKey:
    def test_missing(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv("TEACHER_KEY", raising=False)
        with pytest.raises(ConfigError, match=r"TEACHER_KEY isn't set.*127\.0\.0\.1"):
            EndpointChat("m", endpoint(DOWN, api_key_env="TEACHER_KEY"))

    @pytest.mark.parametrize("broken", [f"{KEY}\n", f"{KEY} x", f"{KEY}é"])
    def test_unusable(self, monkeypatch: pytest.MonkeyPatch, broken: str) -> None:
        monkeypatch.setenv("TEACHER_KEY", broken)
        with pytest.raises(ConfigError, match="TEACHER_KEY") as raised:
            EndpointChat("m", endpoint(DOWN, api_key_env="TEACHER_KEY"))
        assert KEY not in str(raised.value)

    def test_never_told(
        self,
        server: EndpointServer,
        monkeypatch: pytest.MonkeyPatch,
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        """Neither logged at any level, nor shown by the engine, nor echoed from the endpoint."""
        monkeypatch.setenv("TEACHER_KEY", KEY)
        told: list[Any] = []
        with caplog.at_level(logging.DEBUG):
            for answer in (
                refusal(400, f"Bad header: Bearer {KEY}"),
                refusal(500, f"Can't parse {KEY}"),
                refusal(429, f"Slow down, {KEY}"),
                Answer(418, f"plain {KEY}".encode()),
                json_answer({"error": {"message": f"no {KEY}"}}),
                Answer(silent=True),
            ):
                server.script = lambda *_, a=answer: a
                settings = endpoint(server.url, api_key_env="TEACHER_KEY", max_retries=0)
                chat = EndpointChat("m", settings)
                told += asyncio.run(chat.chat(requests(1), SAMPLING))
                told += [chat, vars(chat), settings, settings.model_dump_json()]
                chat.close()
        assert all(one.headers["authorization"].endswith(KEY) for one in server.asked)
        assert KEY not in caplog.text
        assert all(KEY not in f"{one!r} {one!s}" for one in told)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"base_url": "localhost:8000/v1"}, "http:// or https://"),
        ({"base_url": "https:///v1"}, "name a host"),
        ({"base_url": "https://user:secret@host/v1"}, "no user, password"),
        ({"base_url": "https://host/v1?key=1"}, "no user, password or query"),
        ({"base_url": "https://host/v1/chat/completions"}, "before /chat/completions"),
        ({"api_key_env": "sk-123"}, "pattern"),
        ({"body": {"temperature": 1}}, "temperature is set by"),
        ({"price_in": 1.0}, "go together"),
        ({"concurrency": 0}, "greater than"),
        ({"timeout_s": 0}, "greater than"),
    ],
)
def test_settings_that_cant_be(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        EndpointSettings.model_validate({"base_url": "https://host/v1", **change})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"engine": "openai"}, "go together"),
        ({"endpoint": {"base_url": "https://host/v1"}}, "go together"),
        (
            {"engine": "openai", "endpoint": {"base_url": "https://host/v1"}, "max_length": 99},
            "max_length has no meaning",
        ),
        (
            {"engine": "openai", "endpoint": {"base_url": "https://host/v1"}, "dtype": "bfloat16"},
            "dtype has no meaning",
        ),
    ],
)
def test_models_that_cant_be(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        ModelSettings.model_validate({"model": "m", **change})


def test_cost_by_hand() -> None:
    priced = endpoint(DOWN, price_in=0.5, price_out=2.0)
    assert priced.cost(3_000_000, 250_000) == pytest.approx(1.5 + 0.5)
    assert endpoint(DOWN).cost(3, 4) is None


@pytest.mark.parametrize("kind", ["scorer", "reader", "embedder"])
def test_an_endpoint_only_writes(kind: str) -> None:
    model = ModelSettings(model="m", engine="openai", endpoint=endpoint(DOWN))
    with pytest.raises(ConfigError, match=f"a {kind} needs"):
        make_engine(kind, model)


def test_an_endpoint_is_a_generator() -> None:
    model = ModelSettings(model="m", engine="openai", endpoint=endpoint(DOWN))
    engine: EndpointChat = make_engine("generator", model)
    made: Callable[[], None] = engine.close
    made()
