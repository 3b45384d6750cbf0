"""What makes a data set publishable: splits, prefixes, trainers' files, licences, Croissant."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from emission_runs import Run, assistant, read, two_sources, user, written
from hypothesis import given, settings
from hypothesis import strategies as st

from stages.errors import StageError
from stages.rows import LABEL, REJECTS
from stages.storage import Store, parquet_bytes


@pytest.fixture
def run() -> Run:
    return two_sources()


@pytest.fixture
def url(tmp_path: Any) -> str:
    return str(tmp_path / "run")


def prompts(lines: list[dict[str, Any]]) -> set[str]:
    return {turn["content"] for line in lines for turn in line["messages"][:-1]}


@settings(max_examples=25)
@given(
    st.lists(st.integers(0, 12), min_size=20, max_size=60),
    st.lists(st.integers(0, 12), min_size=60, max_size=60),
    st.floats(0.01, 0.5),
)
def test_no_prompt_is_on_both_sides(
    tmp_path_factory: Any, asked: list[int], rewritten: list[int], share: float
) -> None:
    """Neither the prompt that stands nor the one that it replaced is on the other side."""
    run = Run()
    run.add("sums", len(asked))
    for i, (row, old, new) in enumerate(zip(run.rows, asked, rewritten, strict=False)):
        row["messages"] = [user(f"q{old}"), assistant(f"{i}")]
        changed = i % 4 == 0 and new != old
        row["messages_reflected"] = [user(f"q{new}"), assistant(f"{i}")] if changed else None
        row["keep"] = True
    folder = str(tmp_path_factory.mktemp("run"))
    try:
        outcome = run.emit(folder, validation=share)
    except StageError as error:
        assert "none would be left to train on" in str(error)  # noqa: PT017 - allowed, not asked for
        return
    train, held = read(outcome), read(outcome, "validation")
    assert len(train) + len(held) == len(asked)
    assert train
    sides = [
        prompts(side) | {t["content"] for line in side for t in _original(line)}
        for side in (train, held)
    ]
    assert not sides[0] & sides[1]
    counts = {"train": len(train), "validation": len(held)}
    assert outcome.report["splits"] == {split: count for split, count in counts.items() if count}


@settings(max_examples=25)
@given(st.data())
def test_side_of_a_prompt_depends_on_no_other_row(tmp_path_factory: Any, data: Any) -> None:
    """Nor on how often it is asked, on what a rewrite made of it, or on a smaller share."""
    seed = data.draw(st.integers(0, 9), "seed")
    share = data.draw(st.floats(0.05, 0.5), "share")
    asked = data.draw(st.lists(st.integers(0, 40), min_size=30, max_size=60), "prompts")
    kept = data.draw(st.integers(15, len(asked)), "rows of the smaller run")
    rewritten = data.draw(st.sets(st.integers(0, len(asked) - 1)), "rewritten rows")

    def sides(count: int, share: float, changed: set[int]) -> dict[int, str]:
        run = Run()
        run.add("sums", count)
        for i, row in enumerate(run.rows):
            row["messages"] = [user(f"q{asked[i]}"), assistant(f"{i}")]
            new = [user(f"better {i}"), assistant(f"{i}")]
            row["messages_reflected"] = new if i in changed else None
            row["keep"] = True
        folder = str(tmp_path_factory.mktemp("run"))
        try:
            outcome = run.emit(folder, seed=seed, validation=share)
        except StageError:
            return dict.fromkeys(asked[:count], "validation")
        of = {row["id"]: asked[i] for i, row in enumerate(run.rows)}
        return {
            of[line["id"]]: split
            for split, where in (("train", "data"), ("validation", "validation"))
            for line in read(outcome, where)
        }

    whole = sides(len(asked), share, set())
    for part in (sides(kept, share, set()), sides(kept, share, rewritten)):
        assert part == {prompt: whole[prompt] for prompt in asked[:kept]}
    smaller = sides(len(asked), share / 2, set())
    assert all(whole[prompt] == "validation" for prompt in whole if smaller[prompt] != "train")


def test_share_of_prompts_held_out_is_near_what_is_asked_for(url: str) -> None:
    """Within four standard deviations of a binomial, also where every prompt was rewritten."""
    run = Run()
    run.add("sums", 2_000)
    for i, row in enumerate(run.rows):
        row["keep"] = True
        row["messages_reflected"] = [user(f"better {i}"), assistant("yes")] if i % 2 else None
    for share in (0.05, 0.3):
        held = len(read(run.emit(url, validation=share), "validation"))
        assert abs(held - 2_000 * share) < 4 * (2_000 * share * (1 - share)) ** 0.5


def _original(line: dict[str, Any]) -> list[dict[str, Any]]:
    turns = (line.get("provenance") or {}).get("original") or []
    return turns[:-1]


def test_validation_is_cut_out_and_the_rest_stays_as_it_was(run: Run, url: str) -> None:
    whole = read(run.emit(url, budget_rows=80))
    outcome = run.emit(url, budget_rows=80, validation=0.1)
    train, held = read(outcome), read(outcome, "validation")
    assert held
    assert [line for line in whole if line not in held] == train
    assert [line for line in whole if line in held] == held
    front = yaml.safe_load(outcome.files["README.md"].decode().split("---\n")[1])
    assert front["configs"][0]["data_files"] == [
        {"split": "train", "path": "data/train-*.parquet"},
        {"split": "validation", "path": "validation/validation-*.parquet"},
    ]
    emitted = outcome.tables["emitted.parquet"].to_pylist()
    where = {line["id"]: line["shard"] for line in emitted}
    assert {where[line["id"]] for line in held} == {"validation/validation-00000-of-00001.parquet"}
    again = run.emit(url, shards=7, budget_rows=80, validation=0.1)
    assert again.files == outcome.files


def test_without_a_held_out_prompt_card_and_report_say_so(run: Run, url: str) -> None:
    outcome = run.emit(url, budget_rows=20, validation=1e-9)
    assert len(read(outcome)) == 20
    assert not [name for name in outcome.files if name.startswith("validation/")]
    for name in ("README.md", "report.html"):
        shown = outcome.files[name].decode().replace("&#39;", "'")
        assert "There is no validation split: no prompt's hash fell into the share 1e-09" in shown
    front = yaml.safe_load(outcome.files["README.md"].decode().split("---\n")[1])
    assert [one["split"] for one in front["configs"][0]["data_files"]] == ["train"]
    info = json.loads(outcome.files["dataset_info.json"])
    assert set(info) == {"small"}


def test_nothing_left_to_train_on_is_refused(run: Run, url: str) -> None:
    for row in run.rows:
        row["messages"], row["messages_reflected"] = [user("same"), assistant(row["id"])], None
    sides = []
    for seed in range(20):
        try:
            run.emit(url, budget_rows=20, validation=0.5, seed=seed)
            sides.append("train")
        except StageError as error:
            assert "none would be left to train on" in str(error)  # noqa: PT017
            sides.append("validation")
    assert set(sides) == {"train", "validation"}


def prefixed(run: Run) -> Run:
    """Prefixes of 3 ids (wholes of 12 on every fifth row) after 4 ids of prompt."""
    rows = range(len(run.rows))
    run.column("prefix_kind", LABEL, ["full" if i % 5 == 0 else "prefix" for i in rows])
    run.column("prefix_prompt_ids", pa.list_(pa.int32()), [[1, 2, 3, 1000 + i] for i in rows])
    run.column(
        "prefix_ids", pa.list_(pa.int32()), [[i + 1] * (12 if i % 5 == 0 else 3) for i in rows]
    )
    run.column("prefix_text", pa.string(), [f"text {i}" for i in rows])
    run.column("prefix_sampled_tokens", pa.int32(), [12 if i % 5 == 0 else 3 for i in rows])
    run.column("prefixes_status", LABEL, ["ok"])
    return run


def test_prefix_lines_are_ids_with_the_prompt_masked(run: Run, url: str) -> None:
    outcome = prefixed(run).emit(url, budget_rows=60)
    of = {row["id"]: row for row in run.rows}
    lines = read(outcome, "prefix")
    assert {line["id"] for line in lines} == {line["id"] for line in read(outcome)}
    assert [line["id"] for line in lines] == [line["id"] for line in read(outcome)]
    for line in lines:
        row = of[line["id"]]
        assert line["input_ids"] == row["prefix_prompt_ids"] + row["prefix_ids"]
        assert line["labels"] == [-100] * 4 + row["prefix_ids"]
        assert line["attention_mask"] == [1] * len(line["labels"])
        assert (line["kind"], line["text"]) == (row["prefix_kind"], row["prefix_text"])
    assert not [name for name in read(outcome)[0]["provenance"] if name.startswith("prefix")]


def test_prefix_counts_and_saving(run: Run, url: str) -> None:
    outcome = prefixed(run).emit(url, budget_rows=60)
    lines, facts = read(outcome, "prefix"), outcome.report["prefix"]
    kinds = Counter(line["kind"] for line in lines)
    trained = 12 * kinds["full"] + 3 * kinds["prefix"]
    assert facts["kinds"] == kinds
    assert facts["trained_tokens"] == trained
    assert facts["prompt_tokens"] == 4 * 60
    assert facts["mean_whole_tokens"] == 12
    assert facts["estimated_whole_tokens"] == 12 * 60
    assert facts["trained_saving"] == pytest.approx(1 - trained / 720)
    drawn = sum(row["prefix_sampled_tokens"] for row in run.rows)
    assert facts["sampled_tokens"] == drawn
    assert facts["sampled_saving"] == pytest.approx(1 - drawn / (12 * len(run.rows)))
    html, card = (outcome.files[name].decode() for name in ("report.html", "README.md"))
    for text in (html, card):
        assert f"{facts['trained_saving']:.1%}" in text
    assert yaml.safe_load(card.split("---\n")[1])["configs"][1]["config_name"] == "prefix"


def test_one_prefix_a_prompt_and_splits_are_those_of_the_rows(run: Run, url: str) -> None:
    for i, row in enumerate(run.rows):
        row["messages"] = [user(f"q{i // 3}"), assistant(f"{i}")]
        row["messages_reflected"] = None
    outcome = prefixed(run).emit(url, validation=0.2)
    rows = {line["id"]: line["messages"][0]["content"] for line in read(outcome)}
    held = {line["id"]: line["messages"][0]["content"] for line in read(outcome, "validation")}
    for split, texts in (("train", rows), ("validation", held)):
        data = outcome.files[f"prefix/{split}-00000-of-00001.parquet"]
        lines = pq.read_table(pa.BufferReader(data)).to_pylist()
        asked = [texts[line["id"]] for line in lines]
        assert sorted(asked) == sorted(set(texts.values()))


def test_without_whole_solutions_no_saving_is_claimed(run: Run, url: str) -> None:
    prefixed(run)
    for row in run.rows:
        row["prefix_kind"] = "prefix"
    outcome = run.emit(url, budget_rows=20)
    assert outcome.report["prefix"]["trained_saving"] is None
    assert "the saving isn't known" in outcome.files["report.html"].decode()


def loaded_by_llama_factory(folder: Path, name: str) -> list[Any]:
    """Rows as LLaMA-Factory's loader takes them: every file of a folder is one split."""
    entry = json.loads((folder / "dataset_info.json").read_text())[name]
    files = sorted((folder / entry["file_name"]).iterdir())
    return [row for file in files for row in pq.read_table(file).to_pylist()]


def test_llama_factory_reads_each_split_by_its_folder(run: Run, url: str, tmp_path: Path) -> None:
    outcome = run.emit(url, budget_rows=60, validation=0.1, shard_bytes=4_000)
    written(outcome, str(tmp_path / "set"))
    info = json.loads(outcome.files["dataset_info.json"])
    assert set(info) == {"small", "small-validation"}
    for name, folder in (("small", "data"), ("small-validation", "validation")):
        assert loaded_by_llama_factory(tmp_path / "set", name) == read(outcome, folder)
    tags = info["small"]["tags"]
    turn = read(outcome)[0]["messages"][0]
    assert turn[tags["role_tag"]] == tags["user_tag"]
    assert tags["content_tag"] in turn
    alpaca = run.emit(url, budget_rows=60, format="alpaca")
    columns = json.loads(alpaca.files["dataset_info.json"])["small"]["columns"]
    assert set(columns.values()) <= set(read(alpaca)[0])


def test_axolotl_reads_the_folder_by_its_card(
    run: Run, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    outcome = prefixed(run).emit(url, budget_rows=60, validation=0.1)
    written(outcome, str(tmp_path / "dataset"))
    config = yaml.safe_load(outcome.files["trainers/axolotl.yaml"])
    assert config["train_on_inputs"] is False
    monkeypatch.chdir(tmp_path)
    for key, folder in (("datasets", "data"), ("test_datasets", "validation")):
        (entry,) = config[key]
        assert entry["roles_to_train"] == ["assistant"]
        rows = datasets.load_dataset(
            entry["path"], entry["name"], split=entry["split"], cache_dir=str(tmp_path / "cache")
        )
        assert [line[entry["field_messages"]] for line in rows] == [
            line["messages"] for line in read(outcome, folder)
        ]


@pytest.mark.parametrize(
    ("turn", "absent"),
    [
        ({"tool_calls": "[]"}, {"TRL", "Axolotl", "LLaMA-Factory"}),
        ({"reasoning": "so"}, {"TRL", "Axolotl", "LLaMA-Factory"}),
        ({"train": False}, {"TRL", "LLaMA-Factory"}),
        ({"name": "Ada"}, set()),
    ],
)
def test_trainers_that_would_lose_something_get_no_file_and_the_card_says_why(
    run: Run, url: str, turn: dict[str, Any], absent: set[str]
) -> None:
    for row in run.rows:
        row["messages"][1].update(turn)
        row["messages_reflected"] = None
    outcome = run.emit(url, budget_rows=60)
    names = {
        "TRL": "trainers/trl_sft.py",
        "Axolotl": "trainers/axolotl.yaml",
        "LLaMA-Factory": "dataset_info.json",
    }
    assert {trainer for trainer, name in names.items() if name not in outcome.files} == absent
    card = outcome.files["README.md"].decode()
    for trainer in absent:
        assert f"{trainer}: no file, because it would lose `{next(iter(turn))}`" in card
    if "train" in turn:
        config = yaml.safe_load(outcome.files["trainers/axolotl.yaml"])
        assert config["datasets"][0]["message_field_training"] == "train"


@pytest.mark.parametrize("form", ["messages", "prompt_completion", "alpaca"])
def test_croissant_is_valid_and_its_records_are_the_rows(
    run: Run, url: str, tmp_path: Path, form: str
) -> None:
    import mlcroissant as mlc

    outcome = prefixed(run).emit(
        url, budget_rows=60, validation=0.1, shard_bytes=4_000, format=form
    )
    written(outcome, str(tmp_path / "set"))
    dataset = mlc.Dataset(str(tmp_path / "set" / "croissant.json"))
    assert not dataset.metadata.issues.errors
    for name, folder in (("train", "data"), ("validation", "validation")):
        found = [
            {key.removeprefix(f"{name}/"): value for key, value in record.items()}
            for record in dataset.records(name)
        ]
        lines = read(outcome, folder)
        assert len(found) == len(lines)
        assert {record["id"].decode() for record in found} == {line["id"] for line in lines}
        assert set(found[0]) == set(lines[0])
        turns = {"messages": "messages", "prompt_completion": "prompt"}.get(form)
        of = {line["id"]: line for line in lines}
        for record in found if turns else ():
            told = [
                {key.rpartition("/")[2]: value.decode() for key, value in turn.items()}
                for turn in record[turns]
            ]
            assert told == of[record["id"].decode()][turns]
    prefix = list(dataset.records("prefix-train"))
    first = read(outcome, "prefix")[0]
    assert [int(i) for i in prefix[0]["prefix-train/input_ids"]] == first["input_ids"]


def with_concepts(run: Run, url: str) -> Run:
    """Two latents a token of each row, in every third only one; a row in seven has none."""
    count = range(len(run.rows))
    none = [i % 7 == 6 for i in count]
    run.column(
        "concept_input_ids",
        pa.list_(pa.int32()),
        [None if none[i] else [i, i + 1, i + 2] for i in count],
    )
    slots = [[[i, -1 if i % 3 else i + 1]] * 2 + [[-1, -1]] for i in count]
    run.column("concept_ids", pa.list_(pa.list_(pa.int32())), slots)
    scores = [[[0.5, 0.0 if i % 3 else 0.25]] * 2 + [[0.0, 0.0]] for i in count]
    run.column("concept_scores", pa.list_(pa.list_(pa.float32())), scores)
    run.column("concept_row_ids", pa.list_(pa.int32()), [[i] for i in count])
    run.column("concept_row_scores", pa.list_(pa.float32()), [[0.5]])
    run.recipe = {
        "models": {"small": {"model": "hub/small"}},
        "dictionary": {"layer": 3},
        "concepts": {"student": "small"},
    }
    run.identities = {"dictionary": {"version": 1}}
    dictionary = Store(f"{url}/dictionary")
    dictionary.write_json("cfg.json", {"d_sae": 200})
    dictionary.write_bytes("sae_weights.safetensors", b"weights")
    return run


def plain(value: Any) -> Any:
    """Nested arrays as lists."""
    return [plain(one) for one in value] if np.ndim(value) else np.asarray(value).item()


def test_croissant_describes_concepts(run: Run, url: str, tmp_path: Path) -> None:
    import mlcroissant as mlc

    outcome = with_concepts(run, url).emit(url, budget_rows=60, validation=0.2, shard_bytes=4_000)
    written(outcome, str(tmp_path / "set"))
    dataset = mlc.Dataset(str(tmp_path / "set" / "croissant.json"))
    assert not dataset.metadata.issues.errors
    lines: dict[str, list[Any]] = {split: [] for split in ("train", "validation")}
    for name in outcome.files:
        if name.startswith("concepts/") and name.endswith(".parquet"):
            split = name.removeprefix("concepts/").split("-")[0]
            lines[split] += pq.read_table(pa.BufferReader(outcome.files[name])).to_pylist()
    assert {record.id for record in dataset.metadata.record_sets} == {
        "train", "validation", "concepts-train", "concepts-validation"
    }  # fmt: skip
    for split, written_lines in lines.items():
        assert written_lines
        of = {line["id"]: line for line in written_lines}
        records = list(dataset.records(f"concepts-{split}"))
        assert len(records) == len(written_lines)
        for record in records:
            told = {key.rpartition("/")[2]: value for key, value in record.items()}
            line = of[told.pop("id").decode()]
            assert told.pop("source").decode() == line["source"]
            assert set(told) == set(line) - {"id", "source"}
            assert {name: plain(value) for name, value in told.items()} == {
                name: line[name] for name in told
            }


@pytest.mark.parametrize(
    ("form", "trains"),
    [
        ("messages", {"TRL": "every assistant turn", "LLaMA-Factory": "`mask_history` stay false",
                      "Axolotl": "every assistant turn"}),
        ("prompt_completion", {"TRL": "the completion alone"}),
    ],
)  # fmt: skip
def test_card_says_what_each_trainer_trains_on(
    run: Run, url: str, form: str, trains: dict[str, str]
) -> None:
    card = run.emit(url, budget_rows=20, format=form).files["README.md"].decode()
    for trainer, words in trains.items():
        (line,) = (line for line in card.splitlines() if line.startswith(f"* {trainer}: "))
        assert words in line


def test_windows_tell_what_models_did_not_see(run: Run, url: str) -> None:
    run.column("response_truncated", pa.bool_(), [True, False, False, None])
    run.column("embedding_chunks", pa.int32(), [1, 3, 1, 1, 2])
    run.recipe = {
        "models": {"small": {"model": "hub/small", "max_length": 512}, "enc": {"model": "hub/enc"}},
        "difficulty": {"student": "small"},
        "embedding": {"encoder": "enc"},
    }
    run.statuses = {"difficulty": {"ok": 90, "failed: prompt_too_long": 8, "not_requested": 32}}
    outcome = run.emit(url, budget_rows=20)
    windows = {
        (w["stage"], w["what"]): w for w in json.loads(outcome.files["lineage.json"])["windows"]
    }
    cut = [row["response_truncated"] for row in run.rows]
    found = windows["difficulty", "responses cut"]
    assert (found["asked"], found["cut"]) == (130 - cut.count(None), cut.count(True))
    assert (found["model"], found["window"]) == ("small", 512)
    found = windows["embedding", "texts embedded in chunks"]
    assert (found["asked"], found["cut"], found["window"]) == (130, 52, None)
    found = windows["difficulty", "rows left out"]
    assert (found["asked"], found["cut"]) == (98, 8)
    card = outcome.files["README.md"].decode()
    assert "| difficulty | small | 512 | responses cut | 33 of 98 | 33.7% |" in card


def test_windows_tell_what_a_teacher_was_not_asked(run: Run, url: str) -> None:
    results = ["accepted", "prompt_too_long", "tie", None, "prompt_too_long"]
    run.column("reflection_response_result", LABEL, results)
    run.recipe = {
        "models": {
            "small": {"model": "hub/small", "max_length": 512},
            "large": {"model": "hub/large", "max_length": 2048},
        },
        "reflection": {"student": "small", "teacher": "large"},
    }
    outcome = run.emit(url, budget_rows=20)
    asked = [
        row["reflection_response_result"]
        for row in run.rows
        if row["reflection_status"] != "not_requested" and row["reflection_response_result"]
    ]
    (found,) = json.loads(outcome.files["lineage.json"])["windows"]
    assert (found["model"], found["window"], found["what"]) == ("large", 2048, "requests left out")
    assert (found["asked"], found["cut"]) == (len(asked), asked.count("prompt_too_long"))
    assert 0 < found["cut"] < found["asked"]


def test_models_have_the_weights_that_stages_recorded(run: Run, url: str) -> None:
    run.recipe = {
        "models": {
            "small": {"model": "hub/small", "dtype": "bfloat16", "max_length": 9},
            "idle": {"model": "hub/idle"},
        },
        "difficulty": {"student": "small"},
        "reflection": {"student": "small", "teacher": "small"},
    }
    model = {"settings": {"model": "hub/small"}, "weights": "hub:hub/small:4f2a"}
    run.identities = {"difficulty": {"version": 3, "models": {"student": model}}}
    outcome = run.emit(url, budget_rows=20)
    models = {m["name"]: m for m in json.loads(outcome.files["lineage.json"])["models"]}
    assert models["small"]["weights"] == "hub:hub/small:4f2a"
    assert models["idle"]["weights"] is None
    roles = ["difficulty.student", "reflection.student", "reflection.teacher"]
    assert models["small"]["roles"] == roles
    assert (
        "| difficulty | 3 | `difficultydifficultydifficulty` |"
        in outcome.files["README.md"].decode()
    )


def warned(run: Run, url: str) -> list[str]:
    outcome = run.emit(url, budget_rows=60)
    lineage = json.loads(outcome.files["lineage.json"])
    assert lineage["warnings"] == outcome.report["warnings"]
    for name in ("README.md", "report.html"):
        shown = outcome.files[name].decode().replace("&#39;", "'")
        assert all(text in shown for text in lineage["warnings"])
    return list(outcome.report["warnings"])


def test_warnings_of_unknown_and_noncommercial_licences(run: Run, url: str) -> None:
    for row in run.rows:
        row["messages_reflected"] = None
    assert warned(run, url) == []
    for row in run.rows[:50]:
        row["license"] = None
    run.sources[0]["license"] = None
    (text,) = warned(run, url)
    assert text.startswith("15 emitted rows state no licence (of sums)")
    for row in run.rows[:50]:
        row["license"] = "CC BY-NC 4.0"
    (text,) = warned(run, url)
    assert text.startswith("15 emitted rows are under non-commercial licences (cc-by-nc-4.0)")
    card = run.emit(url, budget_rows=60).files["README.md"].decode()
    assert yaml.safe_load(card.split("---\n")[1])["license"] == "cc-by-nc-4.0"
    for row, stated in zip(run.rows[:50], ["unknown", "MIT AND n/a", "other"] * 17, strict=False):
        row["license"] = stated
    (text,) = warned(run, url)
    assert text.startswith("15 emitted rows state no licence (of sums)")


@pytest.mark.parametrize(
    ("terms", "warns", "tag"),
    [(None, True, "mit"), ("unrestricted", False, "mit"), ("CC-BY-NC-4.0", False, "cc-by-nc-4.0")],
)
def test_terms_of_a_teacher_count_where_it_wrote(
    url: str, terms: str | None, warns: bool, tag: str
) -> None:
    run = Run()
    run.add("sums", 30, license="mit")
    run.recipe = {
        "models": {"big": {"model": "hub/big", "terms": terms}},
        "reflection": {"teacher": "big"},
    }
    outcome = run.emit(url)
    assert bool(outcome.report["warnings"]) == warns
    if warns:
        assert "models.big wrote text of" in outcome.report["warnings"][0]
    card = outcome.files["README.md"].decode()
    assert yaml.safe_load(card.split("---\n")[1])["license"] == tag
    for row in run.rows:
        row["messages_reflected"] = None
    quiet = run.emit(url)
    assert quiet.report["warnings"] == []
    assert yaml.safe_load(quiet.files["README.md"].decode().split("---\n")[1])["license"] == "mit"


def test_reasons_are_counted_without_the_ids_of_other_rows(run: Run, url: str) -> None:
    dropped = [row for row in run.rows if not row["keep"]]
    for i, row in enumerate(dropped):
        row["reason"] = f"duplicate_text: {run.rows[i]['id']}" if i % 2 else "below_cut"
    counts = json.loads(run.emit(url).files["lineage.json"])["counts"]["dropped"]
    assert counts == {"below_cut": 13, "duplicate_text": 13}


def test_rows_to_look_at_are_of_every_fate_and_reason(run: Run, url: str) -> None:
    for i, row in enumerate(row for row in run.rows if not row["keep"]):
        row["reason"] = "rare" if i == 3 else "below_cut"
    run.rejects = [
        {"source": "sums", "file": "f", "record": i, "reason": f"{code}: {i}", "raw": "x" * 5_000}
        for i, code in enumerate(["empty_turn"] * 40 + ["unparsable"])
    ]
    html = run.emit(url, budget_rows=60).files["report.html"].decode()
    fates = Counter(part.split('"')[0] for part in html.split('<details data-fate="')[1:])
    assert fates["emitted"] == 60
    assert fates["selected"] == 104 - 60
    assert fates["dropped"] == 26
    assert fates["rejected"] == 5 + 1
    assert "· rare<" in html
    assert "x" * 700 not in html


def test_rejects_are_the_same_however_they_are_sharded(tmp_path: Path) -> None:
    from stages.emission.rejects import rejected_examples

    rows = [
        {"source": "s", "file": "f", "record": i, "reason": "ab"[i % 2], "raw": str(i)}
        for i in range(50)
    ]
    found = []
    for shards in (1, 4):
        store = Store(str(tmp_path / str(shards)))
        for k, part in enumerate(np.array_split(np.arange(50), shards)):
            table = pa.Table.from_pylist([rows[i] for i in part], schema=REJECTS)
            store.write_bytes(f"rejects/part-{k:05d}.parquet", parquet_bytes(table))
        found.append(rejected_examples(store, 3))
    assert found[0] == found[1]
    assert Counter(row["reason"] for row in found[0]) == {"a": 5, "b": 5}
    assert rejected_examples(Store(str(tmp_path / "none")), 3) == []


def test_shards_have_pages_an_index_and_bounded_row_groups(url: str) -> None:
    run = Run()
    run.add("long", 40)
    for row in run.rows:
        row["messages"][1]["content"] = row["id"] * 200_000  # 6.4 MB a row
        row["messages_reflected"] = None
    outcome = run.emit(url, provenance=False)
    (data,) = [data for name, data in outcome.files.items() if name.startswith("data/")]
    meta = pq.read_metadata(pa.BufferReader(data))
    assert meta.num_row_groups >= 3
    for i in range(meta.num_row_groups):
        column = meta.row_group(i).column(0)
        assert meta.row_group(i).total_byte_size < 90_000_000
        assert column.compression == "ZSTD"
        assert column.has_offset_index
        assert column.has_column_index
