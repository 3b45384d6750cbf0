"""Prompts files: every text and field is checked, and their content is what counts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from reflection_fakes import SMALL, TOKENIZER, FakeTeacher, chat, reflect, student, table, tagged
from typer.testing import CliRunner

from pipeline.cli import app
from pipeline.config import read_config
from pipeline.flow import flow_of
from pipeline.identity import fingerprint, stage_identities
from stages.difficulty import losses
from stages.errors import ConfigError
from stages.reflection.parsing import ParseFailure, Rewrite, parse_instruction_reply
from stages.reflection.prompts import default_prompts_file, read_prompts


def written(path: Path, **changes: Any) -> str:
    texts = yaml.safe_load(default_prompts_file())
    texts |= changes
    path.parent.mkdir(exist_ok=True)
    path.write_text(yaml.safe_dump({k: v for k, v in texts.items() if v is not None}))
    return str(path)


def test_the_command_prints_a_file_that_reads_as_the_default(tmp_path: Path) -> None:
    printed = CliRunner().invoke(app, ["prompts"])
    assert printed.exit_code == 0
    (tmp_path / "mine.yaml").write_text(printed.stdout)
    assert read_prompts(str(tmp_path / "mine.yaml")) == read_prompts(None)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"response": None}, "response: the text is missing"),
        ({"responses": "x"}, "responses: no text is called so"),
        ({"response": "{instruction} {response} {form}"}, r"response: .*\{context\} is missing"),
        ({"tagged_form": "{parts} {extra}"}, r"tagged_form: .*\{extra\} is unknown"),
        ({"tagged_form": "{parts!r}"}, r"tagged_form: .*\{parts!\} is unknown"),
        ({"tagged_form": "{parts:>9}"}, r"tagged_form: .*\{parts:\} is unknown"),
        ({"tagged_form": "{parts} {"}, "tagged_form: .*written twice"),
        ({"whole_response": "Better {response}"}, "whole_response: .*its fields are none"),
        ({"whole_response": " \n"}, "whole_response: the text is empty"),
        ({"whole_answer": 3}, "whole_answer: .*string"),
        ({"whole_examples": [{"task": "A"}]}, "whole_examples.0.harder: the text is missing"),
        ({"version": 2}, "version: "),
    ],
)
def test_what_is_wrong_is_named_with_the_file_and_the_text(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    path = written(tmp_path / "mine.yaml", **changes)
    with pytest.raises(ConfigError, match=f"mine.yaml: .*{message}"):
        read_prompts(path)


def test_files_that_are_none(tmp_path: Path) -> None:
    (tmp_path / "list.yaml").write_text("- a\n")
    (tmp_path / "bad.yaml").write_text("a: [\n")
    for name, message in [
        ("absent.yaml", "doesn't exist"),
        ("list.yaml", "no texts by name"),
        ("bad.yaml", "no valid YAML"),
    ]:
        with pytest.raises(ConfigError, match=rf"{name}.* {message}"):
            read_prompts(str(tmp_path / name))


def test_a_teacher_is_asked_in_the_wording_of_the_file(tmp_path: Path) -> None:
    """Row texts with braces go in as they are, and a literal brace is written twice."""
    path = written(
        tmp_path / "mine.yaml",
        instruction="{context}Frage: {instruction} Antwort: {response} {{x}} {form}",
        context="Vorher: {turns} ",
        tagged_form="Form: {parts}",
        new_instruction="deine {{Frage}}",
    )
    teacher = FakeTeacher(lambda prompt: tagged("deine {Frage}", "Ja."))
    rows = table([chat("{Q}", "{A}", ("user", "Hallo"), ("assistant", "Hi"))])
    judge = student({"{A}": -0.5}, {"{A}": -0.1})
    (row,) = reflect(rows, teacher, judge, phases="instruction", prompts=path)
    (((request,),)) = teacher.calls
    assert (
        "Vorher: user: Hallo\n\nassistant: Hi Frage: {Q} Antwort: {A} {x} Form: <new_instruction>\n"
        "deine {Frage}\n</new_instruction>"
    ) in TOKENIZER.decode(request.prompt)
    # What stands for a part in this file is known again.
    assert row["reflection_instruction_result"] == "placeholder"


def test_a_reply_that_repeats_the_wording_of_the_file_is_a_copied_prompt(tmp_path: Path) -> None:
    own = "Please write a question that nobody could answer at once"
    text = f"{{context}}{{instruction}}{{response}}{own}. {{form}}"
    prompts = read_prompts(written(tmp_path / "mine.yaml", instruction=text))
    result = parse_instruction_reply(
        tagged(own.upper() + ".", "Yes."), "stop", "tagged", Rewrite("Q", "A"), prompts
    )
    assert isinstance(result, ParseFailure)
    assert result.code == "copied_prompt"
    default = parse_instruction_reply(
        tagged(own, "Yes."), "stop", "tagged", Rewrite("Q", "A"), read_prompts(None)
    )
    assert default == Rewrite(own, "Yes.")


def test_content_is_part_of_the_fingerprint_and_place_is_not(tmp_path: Path, recipe: Any) -> None:
    def identity(path: str | None) -> dict[str, Any]:
        recipe.value["reflection"]["prompts"] = path
        config = read_config(recipe.save())
        return stage_identities(config, flow_of(config))["reflection"]

    default = identity(None)
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "mine.yaml").write_text("# mine\n" + default_prompts_file())
    # A relative path is taken from the recipe's folder.
    assert identity("a/mine.yaml") == default
    assert identity(written(tmp_path / "b" / "moved.yaml")) == default
    changed = identity(written(tmp_path / "b" / "moved.yaml", new_answer="what you answer"))
    assert fingerprint(changed) != fingerprint(default)
    assert set(_differing(changed, default)) == {"settings.prompts"}


def test_wording_of_the_reverse_prompt_is_part_of_what_depends_on_it(
    recipe: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def differing(**difficulty: Any) -> dict[str, set[str]]:
        recipe.value["difficulty"] = difficulty
        config = read_config(recipe.save())
        before = stage_identities(config, flow_of(config))
        with monkeypatch.context() as patched:
            patched.setattr(losses, "REVERSE_PROMPT", "What was asked? {response}")
            after = stage_identities(config, flow_of(config))
        names = ("difficulty", "reflection")
        return {name: set(_differing(before[name], after[name])) for name in names}

    own = {"settings.reverse_prompt"}
    assert differing(rifd=False) == {"difficulty": set(), "reflection": own}
    compat = differing(rifd=True, mode="compat", template="alpaca")
    assert compat == {"difficulty": set(), "reflection": own}
    both = differing(rifd=True)
    assert both["difficulty"] == own
    assert own <= both["reflection"]


def test_paths_of_a_machine_are_not_in_what_is_published(tmp_path: Path, recipe: Any) -> None:
    recipe.value["reflection"]["prompts"] = written(tmp_path / "secret" / "mine.yaml")
    config = read_config(recipe.save())
    assert json.dumps(config.portable_recipe["reflection"]).count("mine.yaml") == 1
    assert "secret" not in json.dumps(config.portable_recipe["reflection"])
    assert SMALL.model_copy(update={"model": "/secret/teacher"}).portable_name == "teacher"


def _differing(one: dict[str, Any], other: dict[str, Any], place: str = "") -> list[str]:
    found = []
    for key in one.keys() | other.keys():
        a, b = one.get(key), other.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            found += _differing(a, b, f"{place}{key}.")
        elif a != b:
            found.append(place + key)
    return found
