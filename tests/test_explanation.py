"""Explanations of a run over made-up activations, against activations computed by hand."""

from __future__ import annotations

import asyncio
import json
import re
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from conftest import STUDENT
from engine_fakes import WIDTH, FakeReader

from pipeline.explain import explanation
from stages.dictionary.artifact import read_autoencoder
from stages.engines.local import LocalHandle
from stages.engines.model_files import load_tokenizer
from stages.engines.settings import ModelSettings
from stages.errors import ConfigError
from stages.explanation.explainer import Explainer, shared_activation
from stages.explanation.settings import ExplanationSettings
from stages.features.settings import FeaturesSettings
from stages.prototypes.artifact import read_prototypes
from stages.storage import Store


def test_shared_activation_is_each_latents_part_of_the_sum_of_minima() -> None:
    z, p = np.array([1.0, 0, 3, 2], np.float32), np.array([2.0, 5, 1, 0], np.float32)
    assert shared_activation(z, p).tolist() == [0.5, 0, 0.5, 0]
    assert shared_activation(z, 0 * p).tolist() == [0, 0, 0, 0]


@pytest.fixture
def run(recipe: Any, execute: Any) -> Any:
    del recipe.value["reflection"]
    recipe.value["features"] = {"active_above": 0.0, "max_frequency": 0.25}
    recipe.value["selection"] = {"method": "mixed", "score": "similarity", "rows": 6}
    recipe.value["explanation"] = {"rows": 4, "latents": 3}
    recipe.value["emission"] = {}
    execute()
    return recipe


def token_codes(run: Any, row: dict[str, Any]) -> tuple[list[int], np.ndarray]:
    """Content tokens of a row and their codes, from the fakes' states by token."""
    tokenizer = load_tokenizer(ModelSettings(model=STUDENT))
    tokens = [
        token
        for turn in row["messages"]
        for token in tokenizer(turn["content"], add_special_tokens=False)["input_ids"]
    ]
    states = [np.random.default_rng(token).normal(size=WIDTH) for token in tokens]
    sae = read_autoencoder(Store(str(run.run_folder / "dictionary")))
    with torch.no_grad():
        return tokens, sae.encode(torch.tensor(np.array(states)).float()).numpy()


def records(run: Any) -> dict[str, dict[str, Any]]:
    files = sorted((run.run_folder / "ingest").glob("part-*.parquet"))
    return {row["id"]: row for file in files for row in pq.read_table(file).to_pylist()}


def weights(run: Any) -> np.ndarray:
    counted = read_prototypes(Store(str(run.run_folder / "prototypes"))).frequencies
    assert counted is not None
    assert 0 < (counted.token_share <= 0.25).mean() < 1
    return counted.token_share <= 0.25


def test_report_explains_selected_rows_by_what_they_share(run: Any) -> None:
    explained = json.loads((run.run_folder / "explanation" / "explanations.json").read_text())
    decisions = pq.read_table(run.run_folder / "selection" / "decisions.parquet").to_pylist()
    kept = {row["id"] for row in decisions if row["keep"]}
    assert len({row["id"] for row in explained} & kept) == 4
    rows = records(run)
    prototypes = read_prototypes(Store(str(run.run_folder / "prototypes")))
    page = (run.run_folder / "dataset" / "report.html").read_text()
    tokenizer = load_tokenizer(ModelSettings(model=STUDENT))
    for row in explained:
        tokens, codes = token_codes(run, rows[row["id"]])
        z = codes.mean(0) * weights(run)
        p = prototypes.codes[prototypes.tasks.index(row["task"])] * weights(run)
        shares = np.minimum(z, p) / np.minimum(z, p).sum()
        best = np.argsort(-shares, kind="stable")[:3]
        assert [one["latent"] for one in row["latents"]] == best.tolist()
        for one in row["latents"]:
            latent = one["latent"]
            assert one["share"] == pytest.approx(shares[latent], rel=1e-4)
            assert one["row"] == pytest.approx(z[latent], rel=1e-4)
            strongest = one["places"][0]
            assert strongest["activation"] == pytest.approx(codes[:, latent].max(), rel=1e-4)
            # The same token elsewhere in the row is as strong.
            assert strongest["token"] == tokenizer.decode([tokens[codes[:, latent].argmax()]])
        assert row["id"] in page
    assert "What made rows similar" in page
    assert "Coverage of the targets" in page


def test_report_shows_the_top_rows_of_the_latents_that_explain_most(run: Any) -> None:
    folder = run.run_folder / "explanation"
    explained = json.loads((folder / "explanations.json").read_text())
    shares: Counter[int] = Counter()
    for row in explained:
        shares.update({one["latent"]: one["share"] for one in row["latents"]})
    found = json.loads((folder / "latents.json").read_text())
    assert [one["latent"] for one in found] == [latent for latent, _ in shares.most_common(3)]
    decisions = pq.read_table(run.run_folder / "selection" / "decisions.parquet").to_pylist()
    kept = [row["id"] for row in decisions if row["keep"]]
    peaks = {row: token_codes(run, records(run)[row])[1].max(axis=0) for row in kept}
    page = (run.run_folder / "dataset" / "report.html").read_text()
    assert "Where these latents are strongest" in page
    for one in found:
        of_rows = {row: float(peak[one["latent"]]) for row, peak in peaks.items()}
        assert one["read"] == len(kept)
        assert one["active"] == sum(peak > 0 for peak in of_rows.values())
        strongest = sorted(of_rows.values(), reverse=True)[:3]
        assert [row["peak"] for row in one["rows"]] == pytest.approx(strongest, rel=1e-4)
        for row in one["rows"]:
            assert row["peak"] == pytest.approx(of_rows[row["id"]], rel=1e-4)
            assert row["places"][0]["activation"] == row["peak"]
            assert row["id"][:12] in page


@contextmanager
def fake_reader(_kind: str, _settings: Any) -> Iterator[Any]:
    yield LocalHandle(FakeReader(Counter())), None


def test_command_explains_a_row(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.explain.opened", fake_reader)
    explained = json.loads((run.run_folder / "explanation" / "explanations.json").read_text())
    text = explanation(str(run.run_folder), explained[0]["id"][:12], 5)
    assert f"nearest task {explained[0]['task']}" in text
    assert f"of {explained[0]['source']}: kept\n" in text
    told = re.findall(r"latent (\d+): ([\d.]+)%", text)
    for (latent, share), one in zip(told, explained[0]["latents"], strict=False):
        assert int(latent) == one["latent"]
        assert float(share) == pytest.approx(100 * one["share"], abs=0.06)


def test_command_explains_a_dropped_row_and_says_so(
    run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.explain.opened", fake_reader)
    decisions = pq.read_table(run.run_folder / "selection" / "decisions.parquet").to_pylist()
    dropped = next(row for row in decisions if row["reason"] == "below_cut")
    text = explanation(str(run.run_folder), dropped["id"], 5)
    assert f"row        {dropped['id']} of {dropped['source']}: dropped, below_cut\n" in text


def test_command_finds_the_rows_of_a_latent(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.explain.opened", fake_reader)
    decisions = pq.read_table(run.run_folder / "selection" / "decisions.parquet").to_pylist()
    kept = [row["id"] for row in decisions if row["keep"]]
    peaks = {row: token_codes(run, records(run)[row])[1].max(axis=0) for row in kept}
    latent = int(np.argmax(sum(peaks.values())))
    text = explanation(str(run.run_folder), str(latent), 50)
    told = re.findall(r"row (\w{32}) of \w+: up to ([\d.e-]+)", text)
    expected = sorted((row for row in kept if peaks[row][latent] > 0),
                      key=lambda row: -peaks[row][latent])  # fmt: skip
    assert [float(peak) for _, peak in told] == pytest.approx(
        [float(peaks[row][latent]) for row in expected], rel=1e-3
    )
    assert {row for row, _ in told} == set(expected)
    assert f"Active in {len(expected)} of " in text
    few = explanation(str(run.run_folder), str(latent), 1)
    assert "of 1 rows read" in few


def test_command_says_what_is_not_there(run: Any) -> None:
    with pytest.raises(ConfigError, match=r"no latent 999999: the dictionary has \d+"):
        explanation(str(run.run_folder), "999999", 5)
    with pytest.raises(ConfigError, match="holds no row"):
        explanation(str(run.run_folder), "0" * 12, 5)


def test_places_name_the_tokens_around(student_tokenizer: Any, run: Any) -> None:
    folder = run.run_folder
    explainer = Explainer(
        ExplanationSettings(latents=1, places=1, window=3),
        FeaturesSettings(max_frequency=0.25),
        2,
        ModelSettings(model=STUDENT),
        Store(str(folder / "dictionary")),
        Store(str(folder / "prototypes")),
    )
    text = "alpha beta gamma delta epsilon zeta eta theta iota kappa"
    messages = [{"role": "user", "content": text}, {"role": "assistant", "content": "Yes."}]
    reader = LocalHandle(FakeReader(Counter()))
    (one,) = asyncio.run(explainer.row(messages, "plums", reader))
    (place,) = one.places
    shown = place.before + place.token + place.after
    assert len(student_tokenizer(shown, add_special_tokens=False)["input_ids"]) <= 7
    assert shown.replace("user\n", "").strip() in text or "Yes." in shown
