"""The embedding stage: which text is embedded, and how two parts make one vector."""

from __future__ import annotations

import asyncio
from collections import Counter
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from engine_fakes import FakeEmbedder

from stages.embedding.settings import EmbeddingSettings
from stages.embedding.stage import EmbeddingStage
from stages.engines.local import LocalHandle
from stages.engines.settings import ModelSettings

MODELS = {"encoder": ModelSettings(model="none")}


def turn(role: str, content: str) -> dict[str, Any]:
    return {"role": role, "content": content}


ROWS = [
    [turn("system", "Be kind."), turn("user", "One?"), turn("assistant", "1")],
    [turn("user", "Two?"), turn("assistant", "2")],
    [turn("user", "Three?")],
    [turn("user", "Two?"), turn("assistant", "22")],
]


def embedded(**settings: Any) -> pa.Table:
    stage = EmbeddingStage(EmbeddingSettings(**settings), MODELS)
    rows = pa.table({"id": [str(i) for i in range(len(ROWS))], "effective_messages": ROWS})
    engine = LocalHandle(FakeEmbedder(Counter()))
    return asyncio.run(stage.process(rows, {"encoder": engine}, {}))


def vector(text: str) -> np.ndarray:
    return FakeEmbedder(Counter()).embed([text]).vectors[0].astype(np.float64)


def test_parts_apart_weigh_squared_distances_as_asked() -> None:
    r"""|z - z'|^2 = w |u - u'|^2 + (1 - w) |v - v'|^2 and |z| = 1. Source: definition."""
    table = embedded(part="apart", prompt_weight=0.3)
    first, second, third, fourth = (
        None if z is None else np.array(z) for z in table["embedding"].to_pylist()
    )
    assert third is None
    assert table["embedding_status"].to_pylist()[2] == "failed: no_text: the row has no response"
    expected = 0.3 * np.sum((vector("One?") - vector("Two?")) ** 2)
    expected += 0.7 * np.sum((vector("1") - vector("2")) ** 2)
    assert np.sum((first - second) ** 2) == pytest.approx(expected, rel=1e-5)
    expected = 0.7 * np.sum((vector("2") - vector("22")) ** 2)
    assert np.sum((second - fourth) ** 2) == pytest.approx(expected, rel=1e-5)
    assert np.linalg.norm(first) == pytest.approx(1, abs=1e-6)
    assert table["embedding_chunks"].to_pylist() == [2, 2, None, 2]


def test_one_part_is_the_encoders_vector_of_its_text() -> None:
    expected = {"prompt": "One?", "response": "1", "both": "One?\n\n1"}
    for part, text in expected.items():
        found = np.array(embedded(part=part)["embedding"].to_pylist()[0])
        np.testing.assert_allclose(found, vector(text), atol=1e-6)
