"""Rows that hold text of targets or evaluation sets are rejected, on made-up and on real data."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pipeline.why import story
from stages.errors import ConfigError, StageError
from stages.ingest import ContaminationSettings, IngestReport, IngestSettings, ingest
from stages.sources.settings import Source, Target
from stages.storage import Store

LONG = "A train leaves the town at noon and reaches the sea at four; how far did it go?"


def lines(path: Path, records: list[Any]) -> str:
    path.write_text("".join(json.dumps(one) + "\n" for one in records))
    return str(path)


def rejects(store: Store, report: IngestReport) -> list[dict[str, Any]]:
    return [row for name, _ in report.reject_shards for row in store.read_table(name).to_pylist()]


@pytest.fixture
def pool(tmp_path: Path) -> Source:
    records = [
        {"question": LONG, "answer": "It went far."},
        {"question": "Who asks this?", "answer": f"You asked: {LONG.lower()} I say far."},
        {"question": "Who asks that?", "answer": "Nobody."},
        {"question": LONG, "answer": "It went far."},
        {"question": "Name the largest planet of our sun!", "answer": "Jupiter."},
    ]
    return Source(name="pool", path=lines(tmp_path / "pool.jsonl", records))


@pytest.fixture
def goal(tmp_path: Path) -> Target:
    return Target(name="goal", path=lines(tmp_path / "goal.jsonl", [{"question": LONG}]))


def test_rows_that_hold_a_target_are_rejected_with_the_words_they_share(
    tmp_path: Path, pool: Source, goal: Target
) -> None:
    store = Store(str(tmp_path / "run"))
    planets = Target(
        name="planets",
        path=lines(tmp_path / "p.jsonl", [{"question": "Name the largest planet of our sun"}]),
    )
    report = ingest(
        [pool], [goal], IngestSettings(), store, contamination=ContaminationSettings(sets=[planets])
    )
    numbers = report.as_dict()["sources"]["pool"]
    assert (numbers["kept"], numbers["rejected"]) == (1, {"contaminated": 4})
    assert numbers["overlaps"] == {"goal": {"exact": 2, "ngram": 1}, "planets": {"exact": 1}}
    found = rejects(store, report)
    assert [row["reason"] for row in found] == [
        "contaminated: goal, exact",
        "contaminated: goal, ngram",
        "contaminated: goal, exact",
        "contaminated: planets, exact",
    ]
    assert found[1]["overlap"].startswith("a train leaves the town")
    assert json.loads(found[1]["raw"])["question"] == "Who asks this?"
    assert all(len(row["id"]) == 32 for row in found)
    # Sets are compared with and not written.
    assert report.as_dict()["evaluation_sets"]["planets"]["kept"] == 1
    assert store.read_table("targets/part-00000.parquet").num_rows == 1


def test_targets_can_be_left_out_and_responses_looked_for(
    tmp_path: Path, pool: Source, goal: Target
) -> None:
    off = ContaminationSettings(targets=False)
    report = ingest([pool], [goal], IngestSettings(), Store(str(tmp_path / "a")), contamination=off)
    assert report.sources["pool"].rejected == {"duplicate": 1}
    said = f"You asked: {LONG.lower()} I say far."
    answers = Target(
        name="answers", path=lines(tmp_path / "q.jsonl", [{"question": "Where?", "answer": said}])
    )
    held = {"exact": 1, "ngram": 2}
    for part, found in (
        ("prompt", {}),
        ("response", {"answers": held}),
        ("both", {"answers": held}),
    ):
        wanted = ContaminationSettings(targets=False, sets=[answers], part=part)
        report = ingest(
            [pool], [], IngestSettings(), Store(str(tmp_path / part)), contamination=wanted
        )
        assert report.as_dict()["sources"]["pool"]["overlaps"] == found


@pytest.mark.parametrize("part", ["response", "both"])
def test_short_responses_of_targets_may_answer_other_questions(tmp_path: Path, part: Any) -> None:
    asked = ["Is it so, by all that we know about the red planet?", "How many of them are there?"]
    said = ["No.", "5", "It went far.", " ".join(str(i) for i in range(12))]
    goal = Target(
        name="goal",
        path=lines(
            tmp_path / "goal.jsonl",
            [{"question": f"{asked[0]} {text}", "answer": text} for text in said],
        ),
    )
    records = [{"question": asked[1] + text, "answer": text} for text in said]
    # A prompt of theirs counts as before where it is the whole turn.
    records.append({"question": "And now?", "answer": f"{asked[0]} No"})
    pool = Source(name="pool", path=lines(tmp_path / "pool.jsonl", records))
    wanted = ContaminationSettings(part=part)
    report = ingest(
        [pool], [goal], IngestSettings(), Store(str(tmp_path / "run")), contamination=wanted
    )
    asked_too = {"goal": {"exact": 1}} if part == "both" else {}
    assert report.as_dict()["sources"]["pool"]["overlaps"] == asked_too


def test_yes_and_no_of_a_real_target_reject_no_row(tmp_path: Path, shared_data: Path) -> None:
    bbh = Target(name="bbh", path=str(shared_data / "targets" / "bbh" / "*.json"))
    t0 = Source(name="t0", path=str(shared_data / "sources" / "t0_20k.jsonl.gz"), rows=(0, 3000))
    report = ingest(
        [t0],
        [bbh],
        IngestSettings(max_reject_rate=1),
        Store(str(tmp_path / "run")),
        contamination=ContaminationSettings(part="both"),
    )
    assert report.sources["t0"].overlaps == {}


def test_a_question_is_found_without_an_answer_too(tmp_path: Path, goal: Target) -> None:
    asked = {"role": "user", "content": LONG}
    path = lines(
        tmp_path / "x.jsonl",
        [
            {"question": LONG, "answer": ""},
            {"question": LONG},
            {"messages": [asked]},
            {"instruction": "Say it:", "input": LONG, "output": " "},
            # These lack more than the response, or hold another text.
            {"question": LONG, "answer": 3},
            {"question": "", "answer": ""},
            {"question": "Who asks?", "answer": ""},
            {"question": "Who asks?", "answer": "Me."},
        ],
    )
    store = Store(str(tmp_path / "run"))
    wanted = IngestSettings(max_reject_rate=0.4)
    report = ingest([Source(name="x", path=path)], [goal], wanted, store)
    found = rejects(store, report)
    assert [row["reason"].partition(":")[0] for row in found] == [
        *["contaminated"] * 4, "wrong_type", *["empty_turn"] * 2
    ]  # fmt: skip
    assert report.as_dict()["sources"]["x"]["overlaps"] == {"goal": {"exact": 3, "ngram": 1}}
    assert [row["record"] for row in found] == list(range(7))
    assert json.loads(found[1]["raw"]) == {"question": LONG}


def test_rows_of_anchors_stay(tmp_path: Path, pool: Source, goal: Target) -> None:
    anchor = pool.model_copy(update={"name": "anchor", "role": "anchor"})
    report = ingest([pool, anchor], [goal], IngestSettings(allow_empty_sources=True),
                    Store(str(tmp_path / "run")))  # fmt: skip
    assert report.sources["anchor"].kept == 4
    assert report.sources["pool"].rejected == {"contaminated": 3, "duplicate": 2}


def test_a_source_of_nothing_else_stops_the_run_unless_allowed(
    tmp_path: Path, goal: Target
) -> None:
    path = lines(tmp_path / "x.jsonl", [{"question": LONG, "answer": "far"}])
    with pytest.raises(StageError, match=r"contaminated 1.*allow_empty_sources"):
        ingest([Source(name="x", path=path)], [goal], IngestSettings(), Store(str(tmp_path / "r")))
    wanted = IngestSettings(allow_empty_sources=True)
    other = lines(tmp_path / "y.jsonl", [{"question": "Who?", "answer": "Me."}])
    sources = [Source(name="x", path=path), Source(name="y", path=other)]
    report = ingest(sources, [goal], wanted, Store(str(tmp_path / "s")))
    assert (report.sources["x"].kept, report.sources["y"].kept) == (0, 1)
    with pytest.raises(StageError, match="no source has a row left"):
        ingest(sources[:1], [goal], wanted, Store(str(tmp_path / "t")))


def test_a_set_that_cannot_be_read_is_an_error(tmp_path: Path, pool: Source) -> None:
    bad = Target(name="eval", path=lines(tmp_path / "e.jsonl", [{"what": 1}, {"question": "ok"}]))
    wanted = ContaminationSettings(sets=[bad])
    with pytest.raises(StageError, match=r"evaluation set eval: 1 of 2 records are rejected"):
        ingest([pool], [], IngestSettings(), Store(str(tmp_path / "run")), contamination=wanted)
    gone = ContaminationSettings(sets=[Target(name="eval", path=str(tmp_path / "gone.jsonl"))])
    with pytest.raises(ConfigError, match=r"gone\.jsonl"):
        ingest([pool], [], IngestSettings(), Store(str(tmp_path / "run")), contamination=gone)


def test_recipe_reads_sets_beside_it_and_their_content_counts(recipe: Any, execute: Any) -> None:
    recipe.write_rows("figs", 3, 5)
    (recipe.path.parent / "figs.jsonl").write_text(
        json.dumps({"question": "What about apples number 4?", "answer": "No."}) + "\n"
    )
    recipe.value["contamination"] = {"sets": [{"name": "figs", "path": "figs.jsonl"}]}
    execute("ingest")
    manifest = json.loads((recipe.run_folder / "ingest" / "manifest.json").read_text())
    assert manifest["report"]["sources"]["apples"]["overlaps"] == {"figs": {"exact": 1}}
    row = Store(str(recipe.run_folder)).read_table("ingest/rejects/part-00000.parquet")
    told = story(str(recipe.run_folder), row["id"][0].as_py())
    assert "rejected: contaminated: figs, exact" in told
    assert "they share: what about apples number 4" in told
    (recipe.path.parent / "figs.jsonl").write_text('{"question": "What about pears number 1?"}\n')
    assert execute("ingest").kinds("ingest") == ["start", "done"]
    assert execute("ingest").kinds("ingest") == ["kept"]


def test_story_of_a_record_without_id_is_found_by_its_number(recipe: Any, execute: Any) -> None:
    pears = recipe.path.parent / "pears.jsonl"
    count = len(pears.read_text().splitlines())
    with pears.open("a") as file:
        file.write(json.dumps({"question": "What about figs number 1?", "answer": ""}) + "\n")
        file.write('{"question": \n')
    (recipe.path.parent / "figs.jsonl").write_text('{"question": "What about figs number 1?"}\n')
    recipe.value["contamination"] = {"sets": [{"name": "figs", "path": "figs.jsonl"}]}
    recipe.value["ingest"]["max_reject_rate"] = 0.5
    execute("ingest")
    run = str(recipe.run_folder)
    told = story(run, f"pears:{count}")
    assert "no id" in told
    assert "rejected: contaminated: figs, exact" in told
    assert told == story(run, f"pears.jsonl:{count}")
    assert "rejected: unparsable" in story(run, f"pears:{count + 1}")
    kept = story(run, "pears:3")
    assert "pears: pears.jsonl, record 3" in kept
    assert "licence" in kept
    with pytest.raises(ConfigError, match=f"pears:{count + 2}"):
        story(run, f"pears:{count + 2}")


# Real data


def real(shared_data: Path, name: str) -> Source:
    return Source(name="pool", path=str(shared_data / "sources" / name))


def overlapping(
    tmp_path: Path, shared_data: Path, name: str, *targets: str
) -> tuple[IngestReport, list[dict[str, Any]]]:
    store = Store(str(tmp_path / name))
    sets = [
        Target(name=target.split(".")[0], path=str(shared_data / "targets" / target))
        for target in targets
    ]
    report = ingest([real(shared_data, name)], sets, IngestSettings(), store)
    return report, rejects(store, report)


def test_all_of_math_500_is_found_in_a_training_file(tmp_path: Path, shared_data: Path) -> None:
    report, found = overlapping(tmp_path, shared_data, "math_5000.jsonl", "math500.jsonl")
    published = {
        json.loads(line)["problem"]
        for line in (shared_data / "targets" / "math500.jsonl").read_text().splitlines()
    }
    exact = [row for row in found if row["reason"] == "contaminated: math500, exact"]
    assert len(published) == len(exact) == 500
    assert {json.loads(row["raw"])["problem"] for row in exact} == published
    # Other problems share 13 words with one of them: phrases of competitions, or the same problem
    # with other numbers.
    assert report.sources["pool"].overlaps["math500"]["ngram"] == 62


def test_all_gsm8k_test_questions_are_found_in_a_training_file(
    tmp_path: Path, shared_data: Path
) -> None:
    report, found = overlapping(tmp_path, shared_data, "math_adapters.json", "gsm8k_test.jsonl")
    questions = {
        json.loads(line)["question"].strip()
        for line in (shared_data / "targets" / "gsm8k_test.jsonl").read_text().splitlines()
    }
    records = json.loads((shared_data / "sources" / "math_adapters.json").read_bytes())
    held = {one["instruction"].strip() for one in records} & questions
    contaminated = [row for row in found if row["overlap"] is not None]
    rejected = {json.loads(row["raw"])["instruction"].strip() for row in contaminated}
    assert len(held) == 1055
    assert held == rejected
    # Three of them have no answer: they are told as contaminated too.
    numbers = report.sources["pool"]
    assert numbers.overlaps == {"gsm8k_test": {"exact": 1055}}
    assert numbers.rejected["empty_turn"] == 0
    assert sum(row["id"] is None for row in contaminated) == 3


TARGETS = ("gsm8k_test.jsonl", "math500.jsonl", "aime24.jsonl", "aime25.jsonl", "mbpp.jsonl",
           "humaneval.jsonl.gz", "truthfulqa.csv", "mt_bench_questions.jsonl")  # fmt: skip


@pytest.mark.parametrize(
    ("name", "overlaps"),
    [
        # Code that every solution of one textbook problem holds, and a question in other words.
        ("gpteacher_codegen.json", {"mt_bench_questions": {"ngram": 3}, "mbpp": {"ngram": 3}}),
        ("alpaca_5000.json", {"truthfulqa": {"exact": 2}}),
        ("dolly_3k.json", {}),
        ("flan_cot_strategyqa.json", {}),
        ("small_instructions.json", {}),
        # Problems of the same authors: the phrases of four questions.
        ("gsm8k_train.jsonl", {"gsm8k_test": {"ngram": 4}}),
    ],
)
def test_few_rows_of_other_sources_are_taken_for_contaminated(
    tmp_path: Path, shared_data: Path, name: str, overlaps: dict[str, dict[str, int]]
) -> None:
    report, _ = overlapping(tmp_path, shared_data, name, *TARGETS)
    assert report.sources["pool"].as_dict()["overlaps"] == overlaps
