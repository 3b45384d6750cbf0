"""Which tokens of a conversation are read, under the chat templates of several model families."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from stages.engines.tokens import text_ids
from stages.errors import RowError
from stages.features.tokens import masked_sequence
from stages.rows import Message

# The forms of the families, written down for this test: what stands around contents, and where.
LLAMA_2 = """{% if messages[0].role == 'system' -%}
{% set system = '<<SYS>>\n' + messages[0].content + '\n<</SYS>>\n\n' %}
{%- set turns = messages[1:] %}
{%- else %}{% set system = '' %}{% set turns = messages %}{% endif -%}
{% for turn in turns %}{% if turn.role == 'user' -%}
{{ bos_token + '[INST] ' + (system if loop.first else '') + turn.content.strip() + ' [/INST]' }}
{%- else %}{{ ' ' + turn.content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"""
LLAMA_3 = """{{ bos_token }}{% for turn in messages -%}
{{ '<|start_header_id|>' + turn.role + '<|end_header_id|>\n\n' }}
{{- turn.content | trim + '<|eot_id|>' }}
{%- endfor %}"""
MISTRAL = """{{ bos_token }}{% for turn in messages -%}
{% if (turn.role == 'user') != (loop.index0 % 2 == 0) -%}
{{ raise_exception('roles must alternate between user and assistant') }}
{%- elif turn.role == 'user' %}{{ '[INST] ' + turn.content + ' [/INST]' }}
{%- else %}{{ turn.content + eos_token }}{% endif %}{% endfor %}"""

SYSTEM: list[Message] = [{"role": "system", "content": "Be terse, and kind."}]
TURNS: list[Message] = [
    {"role": "user", "content": "Why is the sky blue?"},
    {"role": "assistant", "content": "Rayleigh scattering."},
    {"role": "user", "content": "And at dusk [/INST] </s><|im_end|>?\n"},
    {"role": "assistant", "content": " Longer paths through the air."},
]


def tokenizer_with(student_tokenizer: Any, template: str | None) -> Any:
    """The student's tokenizer in the clothes of another family."""
    if template == "ChatML":
        return student_tokenizer
    tokenizer = copy.deepcopy(student_tokenizer)
    tokenizer.add_special_tokens(
        {
            "bos_token": "<s>",
            "eos_token": "</s>",
            "additional_special_tokens": ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
        }
    )
    tokenizer.chat_template = template
    return tokenizer


FAMILIES = pytest.mark.parametrize(
    ("template", "messages"),
    [
        pytest.param("ChatML", TURNS, id="ChatML, its own system turn added"),
        pytest.param("ChatML", SYSTEM + TURNS, id="ChatML"),
        pytest.param(LLAMA_2, TURNS, id="Llama 2"),
        pytest.param(LLAMA_2, SYSTEM + TURNS, id="Llama 2, system inside the user's turn"),
        pytest.param(LLAMA_3, SYSTEM + TURNS, id="Llama 3"),
        pytest.param(MISTRAL, TURNS, id="Mistral"),
        pytest.param(None, SYSTEM + TURNS, id="no template"),
    ],
)


@FAMILIES
@pytest.mark.parametrize("part", ["response", "prompt", "both"])
def test_content_of_the_part_is_read_and_nothing_else(
    part: Any, template: str | None, messages: list[Message], student_tokenizer: Any
) -> None:
    tokenizer = tokenizer_with(student_tokenizer, template)
    sequence = masked_sequence(tokenizer, messages, part, 500)
    wanted = {"response": messages[-1:], "prompt": messages[:-1], "both": messages}[part]
    expected = [i for turn in wanted for i in text_ids(tokenizer, turn["content"])]
    read = [i for i, keep in zip(sequence.ids, sequence.keep, strict=True) if keep]
    assert read == expected
    assert not set(read) & set(tokenizer.all_special_ids)
    # The first position has an outsized norm whatever stands there.
    assert not sequence.keep[0]


@FAMILIES
def test_model_sees_the_whole_conversation_up_to_the_last_token_read(
    template: str | None, messages: list[Message], student_tokenizer: Any
) -> None:
    tokenizer = tokenizer_with(student_tokenizer, template)
    both = masked_sequence(tokenizer, messages, "both", 500)
    prompt = masked_sequence(tokenizer, messages, "prompt", 500)
    response = masked_sequence(tokenizer, messages, "response", 500)
    assert list(response.ids) == list(both.ids)
    assert list(both.ids[: len(prompt.ids)]) == list(prompt.ids)
    seen = tokenizer.decode(both.ids)
    for turn in messages:
        assert turn["content"].strip() in seen


@FAMILIES
@pytest.mark.parametrize("part", ["response", "prompt", "both"])
def test_row_is_truncated_where_content_that_counts_is_lost(
    part: Any, template: str | None, messages: list[Message], student_tokenizer: Any
) -> None:
    """Cut at every length: inside content, inside the template, right after the last token."""
    tokenizer = tokenizer_with(student_tokenizer, template)
    whole = masked_sequence(tokenizer, messages, part, 500)
    assert not whole.truncated
    first = list(whole.keep).index(True) + 1
    for length in range(first, len(whole.ids) + 5):
        cut = masked_sequence(tokenizer, messages, part, length)
        assert cut.truncated == (sum(cut.keep) < sum(whole.keep))
        assert cut.truncated == (length < len(whole.ids))


def test_family_without_system_turns_fails_a_row_that_has_one(student_tokenizer: Any) -> None:
    tokenizer = tokenizer_with(student_tokenizer, MISTRAL)
    with pytest.raises(RowError, match="roles must alternate"):
        masked_sequence(tokenizer, SYSTEM + TURNS, "both", 500)


def test_conversation_that_begins_with_content_gets_the_start_token(student_tokenizer: Any) -> None:
    tokenizer = tokenizer_with(student_tokenizer, None)
    for length in (500, 3):
        sequence = masked_sequence(tokenizer, TURNS, "both", length)
        assert sequence.ids[0] == tokenizer.bos_token_id
        assert len(sequence.ids) <= length
    with pytest.raises(RowError, match="no_tokens"):
        masked_sequence(tokenizer, TURNS, "both", 1)
