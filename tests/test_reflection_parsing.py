"""Reading a teacher's reply: one well-formed answer, or a failure with a code."""

from __future__ import annotations

import json
from typing import Any

import pytest
from reflection_fakes import tagged

from stages.reflection.parsing import (
    ParseFailure,
    Rewrite,
    parse_instruction_reply,
    parse_response_reply,
    parse_whole_answer,
    parse_whole_instruction,
)
from stages.reflection.prompts import read_prompts
from stages.rows import Message

PROMPTS = read_prompts(None)

OLD = Rewrite("Name a fruit.", "Apple.")
NEW = Rewrite("Name two tropical fruits.", "Mango and papaya.")


class TestParsingInstructions:
    @pytest.mark.parametrize(
        "text",
        [
            tagged(*NEW),
            "The instruction is vague.\n\n" + tagged(*NEW),
            # Prose may speak of the tags, at the start of a line too.
            "I will write <new_instruction> and <new_response> below.\n" + tagged(*NEW),
            "<new_instruction> is where the new one goes.\n" + tagged(*NEW),
            "`<new_instruction>…</new_instruction>` comes first.\n" + tagged(*NEW),
            tagged(*NEW) + "\nI closed both </new_instruction> and </new_response> as asked.",
            f"<new_instruction>{NEW.instruction}</new_instruction>"
            f"\n<new_response>{NEW.response}</new_response>",
            # The order of the parts doesn't matter.
            tagged(response=NEW.response) + "\n" + tagged(instruction=NEW.instruction),
            "<think>\n" + tagged("draft", "draft") + "\n</think>\n\n" + tagged(*NEW),
        ],
    )
    def test_one_well_formed_answer(self, text: str) -> None:
        assert parse_instruction_reply(text, "stop", "tagged", OLD, PROMPTS) == NEW

    @pytest.mark.parametrize(
        ("text", "code"),
        [
            ("", "empty"),
            ("The instruction is vague.", "missing_tag"),
            # Both fields or neither.
            (tagged(instruction=NEW.instruction), "missing_tag"),
            (tagged(response=NEW.response), "missing_tag"),
            (tagged(NEW.instruction, ""), "empty"),
            (tagged("  \n ", NEW.response), "empty"),
            ("<new_instruction>\nNo end\n" + tagged(response="Text."), "missing_tag"),
            ("<new_instruction>\nNo end\n" + tagged(*NEW), "repeated_tag"),
            (tagged(*NEW) + "\n" + tagged(*NEW), "repeated_tag"),
            (tagged(*NEW) + "\n" + tagged(response="Another."), "repeated_tag"),
            (tagged(*NEW) + "\nmore of it\n</new_response>", "repeated_tag"),
            (tagged(NEW.instruction + "\n" + tagged(response="x"), "y"), "missing_tag"),
            (tagged(OLD.instruction, NEW.response), "unchanged"),
            (tagged(" name a  fruit.", NEW.response), "unchanged"),
            # No word differs, whatever stands around or inside of them.
            (tagged("Name a fruit??", NEW.response), "unchanged"),
            (tagged("name a fruit !", NEW.response), "unchanged"),
            (tagged("**Name a fruit**", NEW.response), "unchanged"),
            (tagged("## Name\u200b a fr\u00aduit", NEW.response), "unchanged"),
            (tagged("Name — a\u2060 fruit", NEW.response), "unchanged"),
            (tagged(NEW.instruction, "I'm sorry, but I can't help with that."), "refusal"),
            ("I cannot assist with this request.", "refusal"),
            (tagged(NEW.instruction, "..."), "placeholder"),
            (tagged("[your instruction here]", NEW.response), "placeholder"),
            (tagged(NEW.instruction, "N/A"), "placeholder"),
            (tagged("the instruction you wrote", "your answer to it"), "placeholder"),
            (tagged(NEW.instruction, NEW.instruction), "copied_prompt"),
            (tagged(NEW.instruction, f"Sure: {NEW.instruction}"), "copied_prompt"),
        ],
    )
    def test_anything_else_is_a_failure_with_a_code(self, text: str, code: str) -> None:
        result = parse_instruction_reply(text, "stop", "tagged", OLD, PROMPTS)
        assert isinstance(result, ParseFailure)
        assert result.code == code

    @pytest.mark.parametrize(
        ("instruction", "response", "echoes"),
        [
            ("What is 2 plus 3?", "Sure: what is 2 plus 3?", True),
            ("What is 2 plus 3?", "“What is 2 plus 3?”", True),
            ("What is 2 plus 3?", "What is 2 p\u200blus 3", True),
            ("What is 2 plus 3?", "What is 2 plus 3? What is 2 plus 3?", True),
            ("What is 2 plus 3?", "What is 2 plus 3? It is what is 2 plus 3?", True),
            ("What is 2 plus 3?", "You ask: what is 2 plus 3? That is five.", False),
            ("What is 2 plus 3?", "5", False),
            ("What is 2 plus 3?", "What is 2? Then 3 more make 5.", False),
            ("no no", "no no no", True),
            ("Why?", "Why?", True),
            ("Why?", "Why? Because.", False),
            ("Apples", "Apples are fruits.", False),
            ("求和", "求和", True),
            ("求和", "求和等于五", False),
            # A word that only begins like another is no copy.
            ("one", "ones", False),
        ],
    )
    def test_response_must_say_more_than_its_instruction(
        self, instruction: str, response: str, echoes: bool
    ) -> None:
        result = parse_whole_answer(response, "stop", instruction, PROMPTS)
        if echoes:
            assert isinstance(result, ParseFailure)
            assert result.code == "copied_prompt"
        else:
            assert result == response

    def test_reply_that_repeats_the_prompt(self) -> None:
        messages: list[Message] = [
            {"role": "user", "content": OLD.instruction},
            {"role": "assistant", "content": OLD.response},
        ]
        asked = PROMPTS.instruction_prompt(messages, "tagged")[0]["content"]
        critique = asked.split("</response>")[1].split("End with")[0]
        result = parse_instruction_reply(tagged(critique, "Yes."), "stop", "tagged", OLD, PROMPTS)
        assert isinstance(result, ParseFailure)
        assert result.code == "copied_prompt"
        # The whole prompt, its form included, is no answer either.
        assert isinstance(
            parse_instruction_reply(asked, "stop", "tagged", OLD, PROMPTS), ParseFailure
        )

    def test_whole_replies(self) -> None:
        assert parse_whole_instruction(" Do more. ", "stop", OLD, PROMPTS) == "Do more."
        for text, code in [(OLD.instruction, "unchanged"), (OLD.response, "unchanged")]:
            result = parse_whole_instruction(text, "stop", OLD, PROMPTS)
            assert isinstance(result, ParseFailure)
            assert result.code == code
        # A small model may repeat an example of the prompt as its own.
        example = "A pen costs 3 euros and a notebook twice as much. How much do 9 pens cost?"
        result = parse_whole_instruction(example, "stop", OLD, PROMPTS)
        assert isinstance(result, ParseFailure)
        assert result.code == "copied_prompt"
        # The old response may well answer the new instruction too.
        assert parse_whole_answer(OLD.response, "stop", NEW.instruction, PROMPTS) == OLD.response


class TestParsingResponses:
    @pytest.mark.parametrize(
        "response",
        [
            # The published parser stops at any "End" and refuses any "N/A" and "your answer".
            "Endangered species need space.",
            "Visit the Endpoint, then the End. [End]",
            "Write N/A where your answer would be empty.",
            "Close it with </new_response> and go on.",
            "I'm sorry for your loss, and I can't make it on Friday.",
            "Dear Ana,\n\nI'm sorry, but I can't come to the party.\n\nTom",
            "As an AI researcher, I ask what models know. I cannot answer it yet.",
            "I'm sorry, but I can't come to the party.",
            "def f(x):\n    return x < 3 > 2",
            "Use this:\n\n```html\n<p>answer</p>\n```",
        ],
    )
    @pytest.mark.parametrize("reply", ["tagged", "json", "whole"])
    def test_content_survives_word_for_word(self, response: str, reply: str) -> None:
        text = {
            "tagged": "Too short.\n" + tagged(response=response),
            "json": json.dumps({"critique": "Too short.", "new_response": response}),
            "whole": f"\n{response}\n",
        }[reply]
        assert parse_response_reply(text, "stop", reply, OLD, PROMPTS) == response

    @pytest.mark.parametrize("reply", ["tagged", "json", "whole"])
    def test_cut_reply_is_a_failure_in_every_form(self, reply: str) -> None:
        text = {
            "tagged": tagged(response="Complete."),
            "json": '{"new_response": "Complete."}',
            "whole": "Complete.",
        }[reply]
        result = parse_response_reply(text, "length", reply, OLD, PROMPTS)
        assert isinstance(result, ParseFailure)
        assert result.code == "truncated"

    @pytest.mark.parametrize(
        ("text", "code"),
        [
            ("As an AI language model, I have no fruit.", "refusal"),
            ("I'm sorry for the misunderstanding, but as a chatbot, I'm not able to.", "refusal"),
            ("I am sorry. I cannot provide that.", "refusal"),
            ("Sorry for the delay, but as a helpful AI, I can only be brief.", "refusal"),
            ("I\u2019m unable to fulfill this request.", "refusal"),
            ("APPLE.", "unchanged"),
            ("Name a fruit. Apple.", "copied_prompt"),
            ("…", "placeholder"),
            ("<new response>", "placeholder"),
            ("   ", "empty"),
        ],
    )
    def test_unusable_texts(self, text: str, code: str) -> None:
        result = parse_response_reply(text, "stop", "whole", OLD, PROMPTS)
        assert isinstance(result, ParseFailure)
        assert result.code == code

    @pytest.mark.parametrize(
        ("text", "expected"),
        [
            ('{"new_instruction": "A?", "new_response": "B."}', Rewrite("A?", "B.")),
            ('```json\n{"new_instruction": "A?", "new_response": "B."}\n```', Rewrite("A?", "B.")),
            ('{"new_instruction": "A?"}', "invalid_json"),
            ('{"new_instruction": "A?", "new_response": null}', "invalid_json"),
            ('{"new_instruction": "A?", "new_response": ["B."]}', "invalid_json"),
            (
                '{"new_instruction": "A", "new_instruction": "B", "new_response": "C"}',
                "invalid_json",
            ),
            ('{"new_instruction": "A?", "new_response": "B."} and more', "invalid_json"),
            ('["A?", "B."]', "invalid_json"),
            ("A? B.", "invalid_json"),
            ("[" * 100_000, "invalid_json"),
            ('{"new_instruction": "A?", "new_response": "\\ud800"}', "invalid_unicode"),
            ('{"new_instruction": "A?", "new_response": ""}', "empty"),
        ],
    )
    def test_json(self, text: str, expected: Rewrite | str) -> None:
        result = parse_instruction_reply(text, "stop", "json", OLD, PROMPTS)
        assert (result.code if isinstance(result, ParseFailure) else result) == expected


class TestFaultsOfThePublishedParser:
    """What its parser takes for a rewrite and isn't one, or cuts, or refuses without reason."""

    @pytest.mark.parametrize(
        "text",
        [
            # It refuses "N/A" anywhere in an answer and "your answer" anywhere in a text.
            tagged("State your answer in one line.", "Write N/A where your instruction is void."),
            # It ends a response at any "End", so these are empty or cut.
            tagged("What is rare?", "Endangered species.\n[End]\nEnd of the list."),
            # It counts tags in prose, and takes the prose between them.
            "I will write [Better Answer] and <new_response> below.\n" + tagged("A?", "B."),
            "Both <new_instruction> and </new_instruction> are below.\n" + tagged("A?", "B."),
            # It strips numbering from the end of an instruction.
            tagged("Complete the list:\n1. a\n2. b\n\n3.", "c"),
            tagged("A?", "B.").replace("\n", "\r\n"),
        ],
    )
    def test_good_replies(self, text: str) -> None:
        new = parse_instruction_reply(text, "stop", "tagged", OLD, PROMPTS)
        assert isinstance(new, Rewrite)
        # Both parts whole, and nothing else.
        assert tagged(*new) == text.replace("\r\n", "\n")[-len(tagged(*new)) :]

    @pytest.mark.parametrize(
        ("text", "finish_reason", "code"),
        [
            # It falls back field by field: a new instruction beside the old answer.
            (tagged(instruction="A?"), "stop", "missing_tag"),
            (tagged(response="B."), "stop", "missing_tag"),
            (tagged("A?", "N/A"), "stop", "placeholder"),
            (tagged("A?", "your answer"), "stop", "placeholder"),
            # It takes the end of the text for the end of an answer.
            (tagged("A?") + "\n<new_response>\nB, which is cut o", "length", "truncated"),
            (tagged("A?") + "\n<new_response>\nB without an end", "stop", "missing_tag"),
            (tagged("A?", "B."), "length", "truncated"),
            # It takes a stretch of text between two tags.
            (tagged("A?", "B.") + "\n" + tagged(response="C."), "stop", "repeated_tag"),
            ("<new_response>\nor so.\n" + tagged("A?", "B."), "stop", "repeated_tag"),
        ],
    )
    def test_bad_replies(self, text: str, finish_reason: Any, code: str) -> None:
        result = parse_instruction_reply(text, finish_reason, "tagged", OLD, PROMPTS)
        assert isinstance(result, ParseFailure)
        assert result.code == code


class TestThinking:
    @pytest.mark.parametrize(
        ("text", "expected"),
        [
            ("<think>\nHm.\n</think>\n\nA pear.", "A pear."),
            # The chat template opened it, so only its end is there.
            ("Hm.\nOr so.\n</think>\n\nA pear.", "A pear."),
            ("</think>\nA pear.", "A pear."),
            ("The tags <think>and</think> mark it.", "The tags <think>and</think> mark it."),
            ("<think>\nHm, and no end", "unclear_thinking"),
            ("Hm, so it is.</think>A pear.", "unclear_thinking"),
            ("Close it with </think> and go on.", "unclear_thinking"),
            ("<think>\nHm.\n</think>\n", "empty"),
        ],
    )
    def test_reasoning_is_no_part_of_a_rewrite(self, text: str, expected: str) -> None:
        result = parse_response_reply(text, "stop", "whole", OLD, PROMPTS)
        assert (result.code if isinstance(result, ParseFailure) else result) == expected

    def test_drafts_in_the_reasoning_do_not_count(self) -> None:
        text = tagged("draft", "draft") + "\n</think>\n" + tagged(*NEW)
        assert parse_instruction_reply(text, "stop", "tagged", OLD, PROMPTS) == NEW
        unclosed = "<think>\n" + tagged(*NEW)
        result = parse_instruction_reply(unclosed, "stop", "tagged", OLD, PROMPTS)
        assert isinstance(result, ParseFailure)
        assert result.code == "unclear_thinking"
