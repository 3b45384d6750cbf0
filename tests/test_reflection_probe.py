"""The probe of reply forms: what a teacher can keep to is what it is asked for."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pyarrow as pa
import pytest
from reflection_fakes import SMALL, TOKENIZER, FakeTeacher, chat, reflect, student, table, tagged
from sharded import Tables

from stages.engines import Completion, Sampling
from stages.engines.chat import ChatFailure, ChatRequest
from stages.engines.settings import ModelSettings
from stages.errors import StageError
from stages.reflection.probe import RepliesStage, probed_form
from stages.reflection.settings import ReflectionSettings
from stages.reflection.stage import ReflectionStage
from stages.storage import Store

ROWS = table([chat(f"What is {i} + {i}?", f"It is {2 * i}.") for i in range(30)])


def probed(
    reply: Callable[[str], str], rows: pa.Table = ROWS, shard: int = 7, **settings: Any
) -> tuple[dict[str, Any], FakeTeacher]:
    stage = RepliesStage(
        ReflectionSettings(max_new_tokens=64, **settings), {"teacher": SMALL, "student": SMALL}, 3
    )
    teacher = FakeTeacher(reply)
    tables = Tables(rows, shard)
    artifact = asyncio.run(stage.fit(tables, Tables(rows.slice(0, 0), 1), {"teacher": teacher}))
    return json.loads(artifact.files["replies.json"]), teacher


def in_json(prompt: str) -> str:
    if "one JSON object" not in prompt:
        return "Certainly, here goes nothing."
    names = [name for name in ("new_instruction", "new_response") if f'"{name}"' in prompt]
    return json.dumps({"critique": "Too easy."} | {name: f"Text of {name}." for name in names})


def in_tags(prompt: str) -> str:
    if "<new_instruction>" in prompt:
        return tagged("Explain doubling.", "Adding a number to itself doubles it.")
    if "<new_response>" in prompt:
        return tagged(response="Double it, since both summands are equal.")
    return in_json(prompt)


def freely(prompt: str) -> str:
    return f"{len(prompt)} is what comes to mind."


@pytest.mark.parametrize(
    ("reply", "form"), [(in_json, "json"), (in_tags, "tagged"), (freely, "whole")]
)
def test_the_form_that_can_be_read_is_taken(reply: Callable[[str], str], form: str) -> None:
    found, _ = probed(reply)
    assert found["reply"] == form
    assert found["asked"] == 16
    assert found["failures"][form] == {}


def test_an_instruction_alone_is_probed_alone() -> None:
    found, teacher = probed(in_tags, phases="instruction")
    assert found["asked"] == 8
    prompts = [TOKENIZER.decode(one.prompt) for call in teacher.calls for one in call]
    assert all("<new_instruction>" in prompt for prompt in prompts if "<new_response>" in prompt)


def test_the_sample_depends_on_neither_order_nor_shards() -> None:
    asked = []
    for rows, shard in ((ROWS, 7), (ROWS.take(list(range(29, -1, -1))), 30)):
        _, teacher = probed(in_tags, rows, shard)
        asked.append({tuple(one.prompt) for call in teacher.calls for one in call})
    assert asked[0] == asked[1]


def test_a_teacher_that_nobody_can_read_stops_the_run() -> None:
    with pytest.raises(StageError, match=r"none of 16 replies .* in any form"):
        probed(lambda prompt: "")


class Endpoint:
    """An endpoint that writes tags, but for requests that it doesn't answer, by their place."""

    def __init__(self, refused: Mapping[int, ChatFailure]) -> None:
        self.refused = refused
        self.asked = 0

    async def chat(
        self, requests: Sequence[ChatRequest], sampling: Sampling
    ) -> list[Completion | ChatFailure]:
        done = [in_tags(request.messages[-1]["content"]) for request in requests]
        places = range(self.asked, self.asked + len(requests))
        self.asked += len(requests)
        return [
            self.refused.get(place) or Completion((), text, "stop", -1.0)
            for place, text in zip(places, done, strict=True)
        ]


def probed_endpoint(refused: Mapping[int, ChatFailure]) -> dict[str, Any]:
    behind = ModelSettings.model_validate(
        {"model": "big", "engine": "openai", "endpoint": {"base_url": "http://host/v1"}}
    )
    stage = RepliesStage(
        ReflectionSettings(max_new_tokens=64), {"teacher": behind, "student": SMALL}, 3
    )
    nothing = Tables(ROWS.slice(0, 0), 1)
    engines = {"teacher": Endpoint(refused)}
    artifact = asyncio.run(stage.fit(Tables(ROWS, 7), nothing, engines))
    found: dict[str, Any] = json.loads(artifact.files["replies.json"])
    return found


@pytest.mark.parametrize("refused", [range(16), [3], [15], range(16, 32)])
def test_a_busy_endpoint_chooses_no_form(refused: Sequence[int]) -> None:
    busy = ChatFailure("rate_limited", "http://host/v1: Slow down.")
    with pytest.raises(StageError, match=r"rate_limited: .*Slow down\..* run again") as raised:
        probed_endpoint(dict.fromkeys(refused, busy))
    assert f"{len(refused)} of 16 requests to big" in str(raised.value)


def test_a_form_that_an_endpoint_refuses_counts_as_one_that_fails() -> None:
    """It will refuse it the next time too: many servers know no schema."""
    assert probed_endpoint({})["reply"] == "tagged"
    found = probed_endpoint(
        dict.fromkeys(range(16), ChatFailure("bad_request", "http://host/v1: No."))
    )
    assert found["failures"]["tagged"] == {"bad_request": 16}
    assert found["reply"] == "json"


def test_rows_without_an_exchange_cannot_be_tried() -> None:
    with pytest.raises(StageError, match=r"set reflection\.reply"):
        probed(in_tags, table([[{"role": "user", "content": "Hello?"}]]))


def test_the_stage_asks_in_the_form_that_was_found(tmp_path: Any) -> None:
    """As with that form in the recipe."""
    store = Store(str(tmp_path))
    found, _ = probed(in_json)
    store.write_bytes("replies.json", json.dumps(found).encode())
    assert probed_form(store) == "json"
    texts = {"Text of new_response.": -0.5} | {f"It is {2 * i}.": -0.7 for i in range(30)}
    judge = student(texts, {text: -0.4 for text in texts})
    stage = ReflectionStage(
        ReflectionSettings(max_new_tokens=64), {"teacher": SMALL, "student": SMALL}, seed=7
    )
    assert stage.artifacts() == ("replies",)
    engines = {"teacher": FakeTeacher(in_json), "student": judge}
    auto = asyncio.run(stage.process(ROWS, engines, {"replies": store})).to_pylist()
    assert auto == reflect(ROWS, FakeTeacher(in_json), judge, reply="json")
    assert {row["reflection_instruction_result"] for row in auto} == {"accepted"}
