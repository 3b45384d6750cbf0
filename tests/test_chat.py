"""Messages to a model that runs here, and the cache before one that doesn't."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from stages.engines import Completion, GenerationRequest, Sampling, Usage
from stages.engines.chat import UNANSWERED, ChatFailure, ChatRequest, TemplatedChat
from stages.engines.chat_cache import CachedChat
from stages.engines.generation_cache import CachedGenerator
from stages.engines.spent import Spent
from stages.engines.tokens import chat_tokens
from stages.errors import EngineError
from stages.rows import Message
from stages.storage import Store

SAMPLING = Sampling(8)


def asking(text: str) -> list[Message]:
    return [{"role": "user", "content": text}]


class Echo:
    """Writes back the ids it was given, and notes them."""

    def __init__(self) -> None:
        self.requests: list[GenerationRequest] = []

    async def generate(self, requests: Sequence[GenerationRequest], sampling: Sampling) -> Any:
        self.requests += requests
        return [Completion((7,) * 3, f"seed {one.seed}", "stop", -1.0) for one in requests]


class TestTemplatedChat:
    def test_replies_and_failures_in_order(self, student_tokenizer: Any) -> None:
        echo = Echo()
        chat = TemplatedChat(echo, student_tokenizer, window=120)
        texts = ["How many?", "long " * 200, "", "How <|im_end|> much?"]
        requests = [ChatRequest(asking(text), seed) for seed, text in enumerate(texts)]
        found = asyncio.run(chat.chat(requests, Sampling(16)))
        ids = [
            chat_tokens(student_tokenizer, asking(text), open_turn=True).ids
            for text in (texts[0], texts[2], texts[3])
        ]
        assert [list(one.prompt) for one in echo.requests] == ids
        assert [one.seed for one in echo.requests] == [0, 2, 3]
        long = found[1]
        assert isinstance(long, ChatFailure)
        assert long.code == "prompt_too_long"
        assert "16 new ones exceed 120" in long.detail
        assert found[0] == Completion((7,) * 3, "seed 0", "stop", -1.0, Usage(len(ids[0]), 3))
        assert found[3] == Completion((7,) * 3, "seed 3", "stop", -1.0, Usage(len(ids[2]), 3))

    def test_window_is_filled_to_the_last_token(self, student_tokenizer: Any) -> None:
        length = len(chat_tokens(student_tokenizer, asking("How many?"), open_turn=True).ids)
        request = [ChatRequest(asking("How many?"), 0)]
        for room, fits in [(length + 5, True), (length + 4, False)]:
            chat = TemplatedChat(Echo(), student_tokenizer, room)
            (found,) = asyncio.run(chat.chat(request, Sampling(5)))
            assert isinstance(found, Completion) is fits

    def test_a_template_that_refuses(self, student_tokenizer: Any) -> None:
        refusing = type(student_tokenizer).from_pretrained(student_tokenizer.name_or_path)
        refusing.chat_template = "{{ raise_exception('no ' + messages[0]['role']) }}"
        chat = TemplatedChat(Echo(), refusing, 100)
        (found,) = asyncio.run(chat.chat([ChatRequest(asking("How many?"), 0)], Sampling(5)))
        assert found == ChatFailure("chat_template", "no user")

    def test_nothing_to_ask(self, student_tokenizer: Any) -> None:
        assert asyncio.run(TemplatedChat(Echo(), student_tokenizer, 9).chat([], Sampling(5))) == []


class Asked:
    """A ChatGenerator that notes prompts, and answers by a rule."""

    def __init__(self, rule: Callable[[str], Completion | ChatFailure] | None = None) -> None:
        self.prompts: list[str] = []
        self.rule = rule or answer

    async def chat(self, requests: Sequence[ChatRequest], sampling: Sampling) -> list[Any]:
        texts = [request.messages[-1]["content"] for request in requests]
        self.prompts += texts
        await asyncio.sleep(0)
        return [self.rule(text) for text in texts]


def answer(text: str) -> Completion:
    return Completion((), f"About {text}.", "stop", -1.0, Usage(4, 2))


def questions(n: int) -> list[ChatRequest]:
    return [ChatRequest(asking(f"question {i}"), seed=i) for i in range(n)]


@pytest.fixture
def store(tmp_path: Any) -> Store:
    return Store(str(tmp_path / "cache"))


def cached(
    store: Store,
    chat: Asked,
    requests: Sequence[ChatRequest],
    sampling: Sampling = SAMPLING,
    identity: str = "model",
) -> list[Completion | ChatFailure]:
    return asyncio.run(CachedChat(chat, store, identity, 4).chat(requests, sampling))


class TestCachedChat:
    def test_what_was_answered_isnt_asked_again(self, store: Store) -> None:
        first = cached(store, Asked(), questions(10))
        again = Asked()
        assert cached(store, again, questions(12)) == [
            *first,
            answer("question 10"),
            answer("question 11"),
        ]
        assert again.prompts == ["question 10", "question 11"]

    @pytest.mark.parametrize(
        "change",
        [
            {"requests": [ChatRequest(asking("question 0 "), 0)]},
            {"requests": [ChatRequest([{"role": "system", "content": "question 0"}], 0)]},
            {"requests": [ChatRequest([*asking("x"), *asking("question 0")], 0)]},
            {"requests": [ChatRequest(asking("question 0"), 1)]},
            {"sampling": Sampling(9)},
            {"sampling": Sampling(8, temperature=0.5)},
            {"sampling": Sampling(8, top_p=0.5)},
            {"sampling": Sampling(8, schema="{}")},
            {"identity": "another model"},
        ],
    )
    def test_whatever_determines_a_reply_is_part_of_its_key(
        self, store: Store, change: dict[str, Any]
    ) -> None:
        cached(store, Asked(), questions(1))
        again = Asked()
        cached(store, again, **{"requests": questions(1), **change})
        assert len(again.prompts) == 1

    def test_failures_are_not_kept(self, store: Store) -> None:
        down = ChatFailure("server_error", "no")
        found = cached(store, Asked(lambda t: down if "3" in t else answer(t)), questions(6))
        assert found[3] == down
        again = Asked()
        assert cached(store, again, questions(6))[3] == answer("question 3")
        assert again.prompts == ["question 3"]

    def test_equal_requests_are_asked_once(self, store: Store) -> None:
        chat = Asked()
        found = cached(store, chat, [questions(1)[0]] * 3)
        assert found == [answer("question 0")] * 3
        assert chat.prompts == ["question 0"]

    def test_a_slow_reply_holds_up_no_commit_of_others(self, store: Store) -> None:
        """Once the others are there, what a kill would lose is the slow one alone."""

        async def run() -> None:
            slow, others = asyncio.Event(), asyncio.Event()
            done: list[str] = []

            class Slow(Asked):
                async def chat(self, requests: Any, sampling: Any) -> list[Any]:
                    if requests[0].seed == 0:
                        await slow.wait()
                    found = await super().chat(requests, sampling)
                    done.extend(one.text for one in found)
                    if len(done) == 8:
                        others.set()
                    return found

            call = asyncio.create_task(
                CachedChat(Slow(), store, "model", 4).chat(questions(9), Sampling(8))
            )
            await others.wait()
            again = Asked()
            await CachedChat(again, store, "model", 4).chat(questions(9), Sampling(8))
            assert again.prompts == ["question 0"]
            slow.set()
            await call

        asyncio.run(run())

    def test_what_was_answered_before_an_error_is_kept(self, store: Store) -> None:
        def rule(text: str) -> Completion:
            if text == "question 9":
                raise EngineError("the key is refused")
            return answer(text)

        with pytest.raises(EngineError, match="the key is refused"):
            cached(store, Asked(rule), questions(10))
        again = Asked()
        cached(store, again, questions(10))
        assert again.prompts == ["question 9"]

    def test_an_endpoint_where_nothing_answers_is_an_error(self, store: Store) -> None:
        cached(store, Asked(), questions(2))
        down = ChatFailure("endpoint_down", "http://host/v1: nothing answers; tried 3 times")
        with pytest.raises(EngineError, match=r"endpoint is down: http://host/v1.* 3 requests"):
            cached(store, Asked(lambda text: down), questions(5))
        # One that answers at times isn't down.
        found = cached(store, Asked(lambda t: down if "3" in t else answer(t)), questions(5))
        assert [isinstance(one, ChatFailure) for one in found] == [False] * 3 + [True, False]

    def test_spending_counts_what_was_asked(self, store: Store) -> None:
        cached(store, Asked(), questions(2))
        failing = Asked(lambda t: ChatFailure("timeout", "") if "4" in t else answer(t))
        chat = CachedChat(failing, store, "model", 4)
        asyncio.run(chat.chat(questions(5), Sampling(8)))
        assert chat.spent == Spent(
            requests=3, failures=1, prompt_tokens=2 * 4, generated_tokens=2 * 2
        )

    def test_unknown_usage_survives_the_cache(self, store: Store) -> None:
        unknown = Completion((), "x", "content_filter", -1.0, None)
        cached(store, Asked(lambda text: unknown), questions(1))
        assert cached(store, Asked(), questions(1)) == [unknown]


def test_a_schema_is_part_of_a_generations_key_and_none_changes_nothing() -> None:
    cache = CachedGenerator(Echo(), Store("memory://keys"), "model", 4)
    request = GenerationRequest([1, 2], 3)
    # The key as it was before there were schemas: caches in use stay good.
    assert cache._key(request, Sampling(8)) == "f2e75283ac5cb19f6e8d99507aa6e88a"
    assert cache._key(request, Sampling(8, schema="{}")) != cache._key(request, Sampling(8))
    assert cache._key(request, Sampling(8, schema="{}")) != cache._key(
        request, Sampling(8, schema='{"type": "string"}')
    )


def test_codes_of_a_rows_own_fault_are_not_asked_again() -> None:
    own = {"prompt_too_long", "chat_template", "content_filter", "refusal"}
    assert own.isdisjoint(UNANSWERED)
