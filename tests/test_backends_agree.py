"""Scores and picks of one recipe on every backend."""

from __future__ import annotations

from typing import Any

import pyarrow.parquet as pq
import pytest
from sae_files import write_sparsify

from pipeline.backend import LocalBackend
from pipeline.config import read_config
from pipeline.ray_backend import RayBackend
from pipeline.runner import Run


def test_similarities_and_picks_are_the_same_here_and_on_ray(recipe: Any) -> None:
    """Other processes, other shards and other batches: the same scores, the same rows."""
    write_sparsify(recipe.path.parent / "autoencoder", d=576, n=192, k=8)
    student = recipe.value["models"]["student"]
    for stage in ("difficulty", "reflection", "embedding", "mixture", "emission"):
        del recipe.value[stage]
    recipe.value["dictionary"] = {"layer": 2, "path": str(recipe.path.parent / "autoencoder")}
    recipe.value["selection"]["share"] = 0.4
    found = []
    for where, rows_per_shard, batch_tokens in (
        (LocalBackend(), 8, 2048),
        (RayBackend(place_timeout_s=60, shards_in_flight=2), 5, 128),
    ):
        recipe.value["execution"]["run"] = str(recipe.path.parent / f"of-{rows_per_shard}")
        recipe.value["ingest"]["rows_per_shard"] = rows_per_shard
        recipe.value["models"]["student"] = {**student, "batch_tokens": batch_tokens}
        Run(read_config(recipe.save()), lambda _: None, backend=where).execute()
        scores = pq.read_table(sorted((recipe.run_folder / "features").glob("*.parquet")))
        picks = pq.read_table(recipe.run_folder / "selection" / "decisions.parquet")
        found.append(
            (
                {row["id"]: row["similarity"] for row in scores.to_pylist()},
                {row["id"] for row in picks.to_pylist() if row["keep"]},
            )
        )
    (here, kept), (there, kept_there) = found
    assert len(here) == 19
    assert len(set(here.values())) == 19
    assert there == pytest.approx(here, abs=1e-5)
    assert kept_there == kept
    assert len(kept) == 8
