"""Reading files, and turning records of every form into turns."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from pydantic import ValidationError

from stages.errors import ConfigError, RowError
from stages.rows import canonical_json
from stages.sources.answers import extract_answer, last_boxed
from stages.sources.catalogue import KNOWN, known_source, resolved
from stages.sources.files import files_of
from stages.sources.forms import Parsed, detect_form, parse
from stages.sources.readers import BadRecord, Record, records
from stages.sources.reasons import REASONS, code_of
from stages.sources.settings import Source, Target

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason=f"the real data isn't at {DATA}")

USER = {"role": "user", "content": "Hi"}
BOT = {"role": "assistant", "content": "Hello"}
TURNS = [USER, BOT]


def source(**fields: Any) -> Source:
    return Source(**{"name": "s", "path": "x.jsonl", **fields})


def target(**fields: Any) -> Target:
    return Target(**{"name": "t", "path": "x.jsonl", **fields})


def read(path: Path, data: bytes, key: str | None = None) -> list[Record | BadRecord]:
    path.write_bytes(data)
    return list(records(str(path), key=key))


def values(found: list[Record | BadRecord]) -> list[dict[str, Any]]:
    assert not [one for one in found if isinstance(one, BadRecord)]
    return [one.value for one in found if isinstance(one, Record)]


def bad(found: list[Record | BadRecord]) -> list[tuple[int, str]]:
    return [(one.record, code_of(one.reason)) for one in found if isinstance(one, BadRecord)]


def reason(record: dict[str, Any], spec: Source | None = None) -> str:
    with pytest.raises(RowError) as caught:
        parse(record, spec or source())
    code = code_of(str(caught.value))
    assert code in REASONS
    return code


def turns(parsed: Parsed) -> list[tuple[str, str]]:
    return [(turn["role"], turn["content"]) for turn in parsed.messages]


# Readers

ROWS = [{"question": f"Q{i}\u2028\x85é", "answer": f"A{i}\r"} for i in range(3)]
JSONL = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS).encode()
PACKERS: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": zstandard.ZstdCompressor().compress,
}


def _csv_bytes() -> bytes:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, ["question", "answer"])
    writer.writeheader()
    writer.writerows(ROWS)
    return text.getvalue().encode()


def _parquet_bytes() -> bytes:
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(ROWS), sink)
    return sink.getvalue()


CONTENTS = {
    ".jsonl": JSONL,
    ".ndjson": JSONL.replace(b"\n", b"\r\n"),
    ".json": json.dumps(ROWS, indent=2).encode(),
    ".csv": _csv_bytes(),
    ".parquet": _parquet_bytes(),
}


@pytest.mark.parametrize("packed", PACKERS)
@pytest.mark.parametrize("kind", CONTENTS)
def test_every_type_compressed_or_not_gives_the_same_records(
    tmp_path: Path, kind: str, packed: str
) -> None:
    found = read(tmp_path / f"x{kind}{packed}", PACKERS[packed](CONTENTS[kind]))
    assert values(found) == ROWS
    assert [one.record for one in found] == [0, 1, 2]


@pytest.mark.parametrize("packed", [p for p in PACKERS if p])
def test_file_cut_in_half_gives_what_was_readable_and_one_reject_for_the_rest(
    tmp_path: Path, packed: str
) -> None:
    # Incompressible text, so that half the file holds some of its lines.
    import random

    chance = random.Random(0)
    lines = [json.dumps({"question": chance.randbytes(40).hex()}) for _ in range(20_000)]
    data = PACKERS[packed]("\n".join(lines).encode())
    found = read(tmp_path / f"x.jsonl{packed}", data[: len(data) // 2])
    last = found[-1]
    assert isinstance(last, BadRecord)
    assert code_of(last.reason) == "damaged_file"
    whole = [one.value for one in found if isinstance(one, Record)]
    assert 0 < len(whole) < len(lines)
    assert whole == [json.loads(line) for line in lines[: len(whole)]]


@pytest.mark.parametrize("packed", [p for p in PACKERS if p])
def test_file_that_is_not_what_its_name_says_is_one_reject(tmp_path: Path, packed: str) -> None:
    assert bad(read(tmp_path / f"x.jsonl{packed}", b"plain text\n" * 9)) == [(0, "damaged_file")]


def test_zstd_frames_one_after_another_are_all_read(tmp_path: Path) -> None:
    lines = JSONL.splitlines(keepends=True)
    data = b"".join(zstandard.ZstdCompressor().compress(line) for line in lines)
    assert values(read(tmp_path / "x.jsonl.zst", data)) == ROWS


def test_bad_lines_are_rejected_one_by_one_and_blank_lines_are_none(tmp_path: Path) -> None:
    lines = [
        b'\xef\xbb\xbf{"a": 1}',
        b'{"a": "half',
        b"",
        b"   ",
        b"[1]",
        b"3",
        b"null",
        b'{"a": NaN}',
        b'{"a": -Infinity}',
        b'{"a": 1e999}',
        b'{"a": 1} {"b": 2}',
        b"[" * 100_000,
        b'{"a": 2}',
    ]
    found = read(tmp_path / "x.jsonl", b"\n".join(lines))
    assert [one.value for one in found if isinstance(one, Record)] == [{"a": 1}, {"a": 2}]
    assert bad(found) == [
        (1, "unparsable"),
        (2, "wrong_type"),
        (3, "wrong_type"),
        (4, "wrong_type"),
        (5, "unparsable"),
        (6, "unparsable"),
        (7, "unparsable"),
        (8, "unparsable"),
        (9, "unparsable"),
    ]
    raws = [one.raw for one in found]
    assert raws[1] == '{"a": "half'
    assert max(map(len, raws)) == 10_000


@pytest.mark.parametrize(
    ("text", "records_read", "codes"),
    [
        ('[{"a": 1}, {"a": 2}, {"a": ', 2, ["damaged_file"]),
        ('[{"a": 1}, {"a": 2}', 2, ["damaged_file"]),
        ('[{"a": 1} {"a": 2}]', 1, ["damaged_file"]),
        ('[{"a": 1}] [{"a": 2}]', 1, ["damaged_file"]),
        ('[{"a": 1}, 5, {"a": NaN}, {"a": 2}]', 2, ["wrong_type", "unparsable"]),
        ('\ufeff\n [{"a": 1}] \n', 1, []),
        ("[]", 0, []),
        ("  \n", 0, []),
        ("hello", 0, ["damaged_file"]),
        ('{"canary": "x", "examples": [{"a": 1}, {"a": 2}]}', 2, []),
        ('{"version": 1, "rows": [{"a": 1}, {"a": Infinity}]}', 1, ["unparsable"]),
        ('{"one": [{"a": 1}], "two": [{"a": 1}]}', 0, ["unknown_form"]),
        ('{"canary": "x", "examples": [{"a": 1}, {"a"', 0, ["damaged_file"]),
        ('{"a": 1}\n{"a": 2}\n', 2, []),
        ('{"a": 1}\n{"a": \n{"a": 3}\n', 2, ["unparsable"]),
        ('{"a": \n{"a": 2}\n', 1, ["unparsable"]),
        ('{"messages": [{"role": "user", "content": "x"}]}', 1, []),
        ('{"instruction": "x", "output": "y", "tags": [{"a": 1}]}', 1, []),
    ],
)
def test_json_files_hold_lists_objects_or_lines(
    tmp_path: Path, text: str, records_read: int, codes: list[str]
) -> None:
    found = read(tmp_path / "x.json", text.encode())
    assert sum(isinstance(one, Record) for one in found) == records_read
    assert [code for _, code in bad(found)] == codes


def test_a_key_names_the_list_of_records(tmp_path: Path) -> None:
    data = b'{"one": [{"a": 1}], "two": [{"a": 2}, 7]}'
    found = read(tmp_path / "x.json", data, key="two")
    assert [one.value for one in found if isinstance(one, Record)] == [{"a": 2}]
    assert bad(found) == [(1, "wrong_type")]
    assert bad(read(tmp_path / "x.json", data, key="three")) == [(0, "damaged_file")]
    assert bad(read(tmp_path / "x.json", b"[]", key="two")) == [(0, "damaged_file")]
    with pytest.raises(ConfigError, match="records: two"):
        read(tmp_path / "x.jsonl", data, key="two")


def test_csv_keeps_quoted_newlines_nulls_and_long_fields(tmp_path: Path) -> None:
    long = "x" * 200_000
    data = f'\ufeffprompt,completion\r\n"a\r\nb\n""c""",d\r\n\r\ne\r\nf,"{long}"\r\n'
    found = values(read(tmp_path / "x.csv", data.encode()))
    assert found == [
        {"prompt": 'a\r\nb\n"c"', "completion": "d"},
        {"prompt": "e", "completion": None},
        {"prompt": "f", "completion": long},
    ]


@pytest.mark.parametrize(
    ("text", "records_read", "expected"),
    [
        ("p,c\na,b\nc,d,e\nf,g\n", 2, [(1, "unparsable")]),
        ('p,c\na,b\nc,"d"e\nf,g\n', 2, [(1, "unparsable")]),
        ('p,c\na,b\nc,"d\ne,f\ng,h\n', 1, [(1, "damaged_file")]),
        ("p,p\na,b\n", 0, [(0, "damaged_file")]),
        ("p,c\n", 0, []),
    ],
)
def test_damaged_csv_loses_no_record_without_a_word(
    tmp_path: Path, text: str, records_read: int, expected: list[tuple[int, str]]
) -> None:
    found = read(tmp_path / "x.csv", text.encode())
    assert sum(isinstance(one, Record) for one in found) == records_read
    assert bad(found) == expected


def test_bytes_that_are_no_utf8_cost_only_their_record(tmp_path: Path) -> None:
    lines = b'{"question": "a", "answer": "b"}\n{"question": "\xff", "answer": "b"}\n'
    for name, data in {
        "x.jsonl": lines,
        "x.json": b"[" + lines.strip().replace(b"\n", b",") + b"]",
        "x.csv": b"question,answer\na,b\n\xff,b\n",
    }.items():
        good, broken = read(tmp_path / name, data)
        assert isinstance(good, Record)
        assert isinstance(broken, Record)
        assert turns(parse(good.value, source())) == [("user", "a"), ("assistant", "b")]
        assert reason(broken.value) == "invalid_unicode"
        broken.raw.encode()


def test_parquet_values_become_json(tmp_path: Path) -> None:
    import datetime
    import decimal

    table = pa.table(
        {
            "question": ["a", "b"],
            "score": [math.nan, 1.5],
            "at": [datetime.datetime(2024, 1, 2), None],
            "price": [decimal.Decimal("1.10"), None],
            "data": [b"\xff", None],
            "limit": [1.0, math.inf],
        }
    )
    path = tmp_path / "x.parquet"
    pq.write_table(table, path)
    first, second = records(str(path))
    assert isinstance(first, Record)
    assert first.value == {
        "question": "a",
        "score": None,
        "at": "2024-01-02T00:00:00",
        "price": "1.10",
        "data": "/w==",
        "limit": 1.0,
    }
    assert isinstance(second, BadRecord)
    assert code_of(second.reason) == "unparsable"
    path.write_bytes(path.read_bytes()[:-30])
    assert bad(list(records(str(path)))) == [(0, "damaged_file")]


def test_unreadable_paths_are_errors_not_rejects(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot read .*none\.jsonl"):
        list(records(str(tmp_path / "none.jsonl")))
    with pytest.raises(ConfigError, match="no known type"):
        list(records(str(tmp_path / "x.txt")))


# Forms

GOOD: list[tuple[str, dict[str, Any], dict[str, Any], list[tuple[str, str]]]] = [
    ("messages", {"messages": TURNS}, {}, [("user", "Hi"), ("assistant", "Hello")]),
    (
        "messages",
        {"messages": json.dumps(TURNS), "system": "S"},
        {},
        [("system", "S"), ("user", "Hi"), ("assistant", "Hello")],
    ),
    (
        "messages",
        {"messages": [{"role": "system", "content": ""}, *TURNS]},
        {},
        [("user", "Hi"), ("assistant", "Hello")],
    ),
    (
        "messages",
        {
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": "a"}, {"text": "b"}]},
                BOT,
            ]
        },
        {},
        [("user", "ab"), ("assistant", "Hello")],
    ),
    (
        "sharegpt",
        {
            "conversations": [
                {"from": "human", "value": "Hi"},
                {"from": "gpt", "value": " Hello\n"},
            ],
            "system": "S",
        },
        {},
        [("system", "S"), ("user", "Hi"), ("assistant", " Hello\n")],
    ),
    ("sharegpt", {"conversations": TURNS}, {}, [("user", "Hi"), ("assistant", "Hello")]),
    (
        "sharegpt",
        {
            "conversations": [{"from": "human", "value": "Hi"}],
            "chosen": {"from": "gpt", "value": "Good"},
            "rejected": {"from": "gpt", "value": "Bad"},
        },
        {"preference": "chosen"},
        [("user", "Hi"), ("assistant", "Good")],
    ),
    (
        "alpaca",
        {"instruction": "I", "input": "in", "output": "O"},
        {},
        [("user", "I\n\nin"), ("assistant", "O")],
    ),
    (
        "alpaca",
        {"instruction": "I", "input": " ", "response": "O", "output": "O"},
        {},
        [("user", "I"), ("assistant", "O")],
    ),
    (
        "alpaca",
        {"instruction": "", "input": "in", "output": "O"},
        {},
        [("user", "in"), ("assistant", "O")],
    ),
    (
        "alpaca",
        {"instruction": "I", "output": "O", "system": "S", "history": [["a", "b"], ["c", "d"]]},
        {},
        [
            ("system", "S"),
            ("user", "a"),
            ("assistant", "b"),
            ("user", "c"),
            ("assistant", "d"),
            ("user", "I"),
            ("assistant", "O"),
        ],
    ),
    (
        "prompt_completion",
        {"prompt": "P", "completion": "C", "label": True},
        {},
        [("user", "P"), ("assistant", "C")],
    ),
    (
        "prompt_completion",
        {"prompt": [USER], "completion": [BOT]},
        {},
        [("user", "Hi"), ("assistant", "Hello")],
    ),
    (
        "prompt_completion",
        {
            "prompt": "P",
            "chosen": [{"role": "user", "content": "P"}, BOT],
            "rejected": [{"role": "user", "content": "P"}, {"role": "assistant", "content": "no"}],
        },
        {"preference": "chosen"},
        [("user", "P"), ("assistant", "Hello")],
    ),
    (
        "messages",
        {"chosen": TURNS, "rejected": TURNS},
        {"preference": "chosen"},
        [("user", "Hi"), ("assistant", "Hello")],
    ),
    ("question_answer", {"question": "Q", "answer": "A"}, {}, [("user", "Q"), ("assistant", "A")]),
    (
        "problem_solution",
        {"problem": "P", "solution": "S", "answer": "4", "type": "x"},
        {},
        [("user", "P"), ("assistant", "S")],
    ),
]


@pytest.mark.parametrize(("form", "record", "settings", "expected"), GOOD)
def test_each_form_becomes_turns(
    form: str,
    record: dict[str, Any],
    settings: dict[str, Any],
    expected: list[tuple[str, str]],
) -> None:
    assert detect_form(record) == form
    assert turns(parse(record, source(**settings))) == expected
    assert turns(parse(record, source(form=form, **settings))) == expected


BAD: list[tuple[str, dict[str, Any]]] = [
    ("unknown_form", {"text": "just text"}),
    ("unknown_form", {}),
    ("bad_label", {"messages": TURNS, "label": False}),
    ("bad_label", {"prompt": "a", "completion": "b", "label": "False"}),
    ("preference_pair", {"prompt": "a", "chosen": "b", "rejected": "c"}),
    ("preference_pair", {"prompt": "a", "completion": "b", "rejected": "c"}),
    ("preference_pair", {"instruction": "a", "output": "b", "chosen": "c"}),
    ("missing_turn", {"messages": []}),
    ("missing_turn", {"messages": [{"role": "system", "content": "S"}, BOT]}),
    ("missing_turn", {"messages": [BOT]}),
    ("missing_turn", {"prompt": [], "completion": "b"}),
    ("empty_turn", {"messages": [USER, {"role": "assistant", "content": " \n"}]}),
    ("empty_turn", {"messages": [USER, {"role": "assistant", "content": None}]}),
    ("empty_turn", {"messages": [USER, {"role": "assistant"}]}),
    ("empty_turn", {"instruction": "I", "input": "", "output": "\t"}),
    ("empty_turn", {"instruction": " ", "input": "", "output": "O"}),
    ("empty_turn", {"instruction": "I", "output": "O", "history": [["a", ""]]}),
    ("empty_turn", {"prompt": "p", "completion": "</s>"}),
    ("no_assistant_turn", {"messages": [USER]}),
    ("no_assistant_turn", {"messages": [USER, BOT, USER]}),
    ("no_assistant_turn", {"instruction": "I", "input": "", "output": None}),
    ("no_assistant_turn", {"question": "Q"}),
    ("no_assistant_turn", {"prompt": "p", "completion": [USER]}),
    ("bad_roles", {"messages": [USER, {"role": "wizard", "content": "x"}]}),
    ("bad_roles", {"messages": [USER, {"content": "x"}]}),
    ("bad_roles", {"messages": [USER, {"role": 3, "content": "x"}]}),
    ("bad_roles", {"messages": [BOT, USER, BOT]}),
    ("bad_roles", {"messages": [USER, {"role": "tool", "content": "x"}, BOT]}),
    ("wrong_type", {"messages": "no JSON"}),
    ("wrong_type", {"messages": {"role": "user"}}),
    ("wrong_type", {"messages": ["Hi", "Hello"]}),
    ("wrong_type", {"messages": [USER, {"role": "assistant", "content": 5}]}),
    ("wrong_type", {"messages": [{**USER, "content": [{"type": "image_url"}]}, BOT]}),
    ("wrong_type", {"messages": [USER, {**BOT, "weight": 0.5}]}),
    ("wrong_type", {"messages": [USER, {**BOT, "reasoning": ["x"]}]}),
    ("wrong_type", {"messages": [USER, {**BOT, "tool_calls": "no JSON"}]}),
    ("wrong_type", {"messages": TURNS, "tools": "no JSON"}),
    ("wrong_type", {"messages": TURNS, "system": 5}),
    ("wrong_type", {"instruction": "I", "output": 5}),
    ("wrong_type", {"instruction": ["I"], "output": "O"}),
    ("wrong_type", {"instruction": "I", "input": 5, "output": "O"}),
    ("wrong_type", {"instruction": "I", "output": "O", "history": [["a"]]}),
    ("wrong_type", {"instruction": "I", "output": "O", "history": "x"}),
    ("wrong_type", {"prompt": ["a", "b"], "completion": "c"}),
    ("ambiguous", {"instruction": "I", "output": "O", "response": "R"}),
    ("ambiguous", {"messages": [USER, {**BOT, "reasoning": "a", "thinking": "b"}]}),
    ("ambiguous", {"messages": [{"role": "system", "content": "S"}, *TURNS], "system": "T"}),
    ("invalid_unicode", {"prompt": "\ud800", "completion": "c"}),
    ("invalid_unicode", {"prompt": "p", "completion": "c", "note": "\udfff"}),
    ("unparsable", {"prompt": "p", "completion": "c", "score": math.nan}),
]


@pytest.mark.parametrize(("code", "record"), BAD)
def test_bad_records_are_refused_with_their_reason(code: str, record: dict[str, Any]) -> None:
    assert reason(record) == code


def test_preference_that_has_no_chosen_or_two_answers_is_refused() -> None:
    wants = source(preference="chosen")
    assert reason({"prompt": "p", "chosen": None, "rejected": "r"}, wants) == "no_assistant_turn"
    assert reason({"messages": TURNS, "chosen": "c", "rejected": "r"}, wants) == "ambiguous"
    assert reason({"prompt": "p", "completion": "b", "chosen": "c"}, wants) == "ambiguous"
    # A column map doesn't get around the question either.
    mapped = source(columns={"prompt": "prompt", "response": "chosen"})
    assert reason({"prompt": "p", "chosen": "c", "rejected": "r"}, mapped) == "preference_pair"


def test_openai_fields_of_turns_are_kept() -> None:
    calls = [{"id": "1", "type": "function", "function": {"name": "z", "arguments": "{}"}}]
    parsed = parse(
        {
            "messages": [
                {"role": "developer", "content": "S"},
                {"role": "user", "content": "Q", "name": "ann"},
                {"role": "assistant", "content": None, "tool_calls": calls, "weight": 0},
                {"role": "tool", "content": "42", "tool_call_id": "1"},
                {"role": "assistant", "content": "A", "reasoning_content": "R", "weight": 1},
            ],
            "tools": [{"type": "function", "function": {"name": "z", "description": "é"}}],
            "id": 7,
        },
        source(),
    )
    assert parsed.messages == [
        {"role": "system", "content": "S"},
        {"role": "user", "content": "Q", "name": "ann"},
        {"role": "assistant", "content": "", "tool_calls": json.dumps(calls), "train": False},
        {"role": "tool", "content": "42"},
        {"role": "assistant", "content": "A", "reasoning": "R", "train": True},
    ]
    assert parsed.tools is not None
    assert json.loads(parsed.tools)[0]["function"]["description"] == "é"
    assert parsed.extra == '{"id":7,"turns":[{},{},{},{"tool_call_id":"1"},{}]}'


def test_sharegpt_calls_and_observations_become_tool_calls() -> None:
    tools = '[{"name": "f"}]'
    parsed = parse(
        {
            "conversations": [
                {"from": "human", "value": "Q"},
                {"from": "function_call", "value": '{"name": "f", "arguments": {"x": 1}}'},
                {"from": "observation", "value": "2"},
                {"from": "gpt", "value": "A"},
            ],
            "tools": tools,
        },
        source(),
    )
    assert [turn["role"] for turn in parsed.messages] == ["user", "assistant", "tool", "assistant"]
    calls = parsed.messages[1]["tool_calls"]
    assert calls is not None
    assert json.loads(calls) == [
        {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
    ]
    assert parsed.tools == tools
    assert parse({"messages": TURNS, "tools": "[]"}, source()).tools is None


@pytest.mark.parametrize(
    ("text", "kept", "stripped"),
    [
        ("done<|endoftext|>", "done", True),
        ("done \n<|im_end|>\n", "done \n", True),
        ("done</s><|eot_id|> <end_of_turn>", "done", True),
        ("<|endoftext|> is a token ", "<|endoftext|> is a token ", False),
        ("<b><s>old</s>", "<b><s>old</s>", False),
        ("done<|end_of_text|>.", "done<|end_of_text|>.", False),
        (" done\n\n", " done\n\n", False),
    ],
)
def test_end_markers_are_stripped_from_the_end_of_responses_and_nothing_else(
    text: str, kept: str, stripped: bool
) -> None:
    parsed = parse({"prompt": f" {text}", "completion": text}, source())
    assert turns(parsed) == [("user", f" {text}"), ("assistant", kept)]
    assert parsed.end_markers is stripped


def test_other_columns_are_kept_without_loss() -> None:
    record = {"question": "Q", "answer": "A", "b": [1, {"é": None}], "a": 1.5, "n": None}
    extra = parse(record, source()).extra
    assert extra == '{"a":1.5,"b":[1,{"é":null}],"n":null}'
    assert parse({"question": "Q", "answer": "A"}, source()).extra is None
    mine = {"messages": [{**USER, "id": 3}, BOT], "turns": "own"}
    assert parse(mine, source()).extra == '{"_turns":[{"id":3},{}],"turns":"own"}'


def test_license_is_the_records_own_or_the_sources() -> None:
    spec = source(license="MIT")
    assert parse({"question": "Q", "answer": "A", "license": "CC0-1.0"}, spec).license == "CC0-1.0"
    assert parse({"question": "Q", "answer": "A", "license": None}, spec).license == "MIT"


@pytest.mark.parametrize(
    ("stated", "license_", "extra"),
    [
        ({"licence": "CC0-1.0"}, "CC0-1.0", None),
        ({"licenses": ["CC0-1.0"]}, "CC0-1.0", '{"licenses":["CC0-1.0"]}'),
        ({"license": ["MIT", "CC-BY-NC-4.0"]}, "MIT AND CC-BY-NC-4.0", ...),
        ({"license": '["CC-BY-NC-4.0"]'}, "CC-BY-NC-4.0", ...),
        ({"license": {"name": "CC-BY-NC-4.0", "url": "u"}}, "CC-BY-NC-4.0", ...),
        ({"license": [{"url": "u"}, None, ""]}, "u AND unknown AND unknown", ...),
        ({"license": [""]}, "unknown", ...),
        ({"license": "[MIT](u)"}, "[MIT](u)", None),
        ({"license": "unknown"}, "unknown", None),
        ({"license": "3"}, "3", None),
        ({"license": " "}, "MIT", None),
        ({"license": []}, "MIT", ...),
        ({"license": 3}, RowError, None),
        ({"license": {"by": "me"}}, RowError, None),
        ({"license": [["MIT"]]}, RowError, None),
        ({"license": "MIT", "licence": "CC0-1.0"}, RowError, None),
    ],
)
@pytest.mark.parametrize("mapped", [False, True])
def test_stated_license_is_never_taken_for_the_sources(
    stated: dict[str, Any], license_: Any, extra: Any, mapped: bool
) -> None:
    columns = {"prompt": "question", "response": "answer"} if mapped else None
    spec = source(license="MIT", columns=columns)
    record = {"question": "Q", "answer": "A", **stated}
    if license_ is RowError:
        assert reason(record, spec) in ("wrong_type", "ambiguous")
        return
    parsed = parse(record, spec)
    assert parsed.license == license_
    assert parsed.extra == (canonical_json(stated) if extra is ... else extra)


def test_column_map_names_the_license() -> None:
    spec = source(columns={"prompt": "licence", "response": "a", "license": "terms"})
    parsed = parse({"licence": "Q", "a": "A", "terms": "CC0-1.0", "license": "MIT"}, spec)
    assert (turns(parsed)[0], parsed.license) == (("user", "Q"), "CC0-1.0")
    unmapped = source(columns={"prompt": "licence", "response": "a"}, license="MIT")
    assert parse({"licence": "Q", "a": "A"}, unmapped).license == "MIT"


def test_column_map_reads_any_columns() -> None:
    spec = source(
        columns={"prompt": "Ask", "input": "Ctx", "response": "label", "answer": "key"},
        license="MIT",
    )
    parsed = parse({"Ask": "Q", "Ctx": "C", "label": "yes", "key": 3, "question": "q"}, spec)
    assert turns(parsed) == [("user", "Q\n\nC"), ("assistant", "yes")]
    assert (parsed.answer, parsed.extra) == ("3", '{"question":"q"}')
    assert reason({"Ask": "Q", "label": "yes", "key": [3]}, spec) == "wrong_type"
    assert reason({"Ctx": None, "label": "yes"}, spec) == "missing_turn"
    # `label` is the response here, not a verdict on one.
    assert reason({"Ask": "Q", "label": False}, spec) == "wrong_type"
    talk = source(columns={"messages": "chat"})
    assert turns(parse({"chat": TURNS}, talk)) == [("user", "Hi"), ("assistant", "Hello")]


def test_targets_may_lack_the_response() -> None:
    for record in (
        {"messages": [USER]},
        {"prompt": "Hi"},
        {"prompt": "Hi", "completion": " "},
        {"question": "Hi", "answer": None},
        {"instruction": "Hi", "input": ""},
    ):
        assert turns(parse(record, target())) == [("user", "Hi")]
    several = parse({"turns": ["Hi", "More"], "id": 1}, target(columns={"prompt": "turns"}))
    assert turns(several) == [("user", "Hi")]
    assert several.extra == '{"id":1,"turns":["Hi","More"]}'
    assert reason({"question": " "}, target()) == "empty_turn"


def test_task_column_names_the_task() -> None:
    spec = target(task_column="task")
    parsed = parse({"task": "sums", "question": "Q", "answer": "A"}, spec)
    assert (parsed.task, parsed.extra) == ("sums", None)
    assert reason({"question": "Q", "answer": "A"}, spec) == "no_task"


# Answers


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"so \boxed{2}.", "2"),
        (r"\boxed{1} or \boxed{\frac{1}{2}}$", r"\frac{1}{2}"),
        (r"\boxed{\left\{ x \mid x > 0 \right.} and {more}", r"\left\{ x \mid x > 0 \right."),
        (r"\fbox{7}", "7"),
        (r"\boxed{unclosed", None),
        ("no box", None),
    ],
)
def test_last_box_is_found_with_balanced_braces(text: str, answer: str | None) -> None:
    assert last_boxed(text) == answer
    assert extract_answer(text, "boxed") == (answer.strip() if answer else None)


def test_answer_comes_from_its_column_before_the_pattern() -> None:
    spec = source(answer_pattern=r"####\s*(.+)$")
    assert parse({"question": "Q", "answer": "x\n#### 1,200"}, spec).answer == "1,200"
    assert parse({"question": "Q", "answer": "no mark"}, spec).answer is None
    row = {"problem": "P", "solution": "#### 5", "answer": "7"}
    assert parse(row, spec).answer == "7"
    assert parse({**row, "answer": ""}, spec).answer == "5"


# Settings


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"name": "a b"}, "name"),
        ({"path": ""}, "path is empty"),
        ({"path": []}, "path is empty"),
        ({"rows": [5, 5]}, "start < stop"),
        ({"rows": [-1, 5]}, "start < stop"),
        ({"answer_pattern": "("}, "no regular expression"),
        ({"answer_pattern": "a"}, "exactly one"),
        ({"answer_pattern": "(a)(b)"}, "exactly one"),
        ({"form": "columns"}, "needs a column map"),
        ({"form": "alpaca", "columns": {"prompt": "a", "response": "b"}}, "no effect"),
        ({"columns": {"response": "b"}}, "must map `prompt` or `messages`"),
        ({"columns": {"prompt": "b"}}, "must map `response`"),
        ({"columns": {"messages": "a", "prompt": "b"}}, "one or the other"),
        ({"columns": {"prompt": "a", "response": "b", "reply": "c"}}, "reply"),
        (
            {"columns": {"prompt": "a", "response": "b", "answer": "c"}, "answer_pattern": "(x)"},
            "remove one",
        ),
        ({"repeats": 0}, "repeats"),
        ({"max_reject_rate": 1.5}, "max_reject_rate"),
        ({"shuffle": True}, "shuffle"),
    ],
)
def test_wrong_settings_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        source(**fields)


def test_wrong_targets_are_refused() -> None:
    with pytest.raises(ValidationError, match="both task and task_column"):
        target(task="a", task_column="b")
    with pytest.raises(ValidationError, match="anchor"):
        target(role="anchor")


# Files


def test_files_are_named_as_the_recipe_names_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("d/b.jsonl", "d/sub/a.json", "d/README.md", "e/b.jsonl"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("{}")
    monkeypatch.chdir(tmp_path)

    def names(path: str | list[str]) -> list[str]:
        return [file.name for file in files_of(source(path=path))]

    assert names("d/b.jsonl") == ["b.jsonl"]
    assert names("./d") == ["b.jsonl", "sub/a.json"]
    assert names(f"{tmp_path}/d/") == ["b.jsonl", "sub/a.json"]
    assert names("d/*.jsonl") == ["b.jsonl"]
    assert names("*/b.jsonl") == ["d/b.jsonl", "e/b.jsonl"]
    assert names(["e", "d/*.jsonl"]) == ["e/b.jsonl", "d/b.jsonl"]
    assert names(f"file://{tmp_path}/d/b.jsonl") == ["b.jsonl"]
    assert names(["d/b.jsonl", "e/b.jsonl"]) == ["d/b.jsonl", "e/b.jsonl"]
    with pytest.raises(ConfigError, match="nowhere"):
        names("nowhere.jsonl")
    with pytest.raises(ConfigError, match=r"README\.md is of no known type"):
        names("d/*")


# Catalogue


def test_known_files_are_found_by_name_whatever_the_folder_or_compression() -> None:
    assert known_source("s3://b/t0_20k.jsonl.gz") == known_source("t0_20k.jsonl") != {}
    assert known_source("/data/bbh/snarks.json")["records"] == "examples"
    assert known_source("/data/snarks.json") == known_source("mine.jsonl") == {}


@pytest.mark.parametrize("name", KNOWN)
def test_every_map_is_a_valid_target(name: str) -> None:
    assert target(path=name, **KNOWN[name]).form != "auto"


def test_explicit_settings_go_before_the_map() -> None:
    mine = resolved(source(answer_pattern="(x)", license="own"), "gsm8k_train.jsonl")
    assert (mine.form, mine.answer_pattern, mine.license) == ("question_answer", "(x)", "own")
    other = source(form="alpaca")
    assert resolved(other, "gsm8k_train.jsonl") == other


@needs_data
def test_every_file_of_the_shared_data_is_known() -> None:
    files = [*(DATA / "sources").iterdir(), *(DATA / "targets").rglob("*.*")]
    assert len(files) == 57 - 1
    assert [str(file) for file in files if not known_source(str(file))] == []


@needs_data
def test_half_a_real_file_keeps_the_records_before_the_cut(tmp_path: Path) -> None:
    data = (DATA / "sources" / "alpaca_5000.json").read_bytes()
    whole = json.loads(data)
    *good, last = read(tmp_path / "x.json", data[: len(data) // 2])
    assert values(good) == whole[: len(good)]
    assert len(good) > 2000
    assert bad([last]) == [(len(good), "damaged_file")]


@needs_data
def test_newline_like_characters_inside_strings_split_no_record() -> None:
    path = DATA / "sources" / "t0_20k.jsonl.gz"
    assert len(gzip.decompress(path.read_bytes()).decode().splitlines()) == 20_018
    assert len(values(list(records(str(path))))) == 20_000


def test_importing_sources_and_ingest_loads_no_heavy_library() -> None:
    code = (
        "import sys, stages.sources, stages.ingest; "
        "heavy = {'torch', 'ray', 'transformers', 'datasets', 'pandas'} & sys.modules.keys(); "
        "sys.exit(str(heavy) if heavy else 0)"
    )
    root = Path(__file__).resolve().parents[1]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
