"""What near duplicates are found by: each row's shingles, and bands of its MinHash signature."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from stages.dictionary.settings import Part
from stages.ingest.bands import bands_of
from stages.ingest.settings import NearDuplicateSettings
from stages.storage import Store
from stages.words import HashArray, IntArray, hashed_words

_SEED = 1
"""Of the permutations: signatures of all rows of all runs can be compared."""

_ROWS_AT_ONCE = 128


@dataclass(frozen=True)
class SketchTask:
    """A shard to sketch: its name, the number of its first row over all shards, and the file."""

    part: str
    first: int
    name: str


def band_names(settings: NearDuplicateSettings) -> list[str]:
    """Columns of a sketch that hold a band each."""
    bands, _ = bands_of(settings.threshold, settings.permutations, settings.recall)
    return [f"band_{band:03d}" for band in range(bands)]


def write_sketch(
    store: Store, settings: NearDuplicateSettings, ranks: Mapping[str, int], task: SketchTask
) -> None:
    """Sketch the rows of a shard; rows without a word are left out.

    Writes the columns `row` (number over all shards), `rank` (of its source, by `ranks`), `length`
    (characters compared), `shingles` (distinct, sorted), `set` (a number that equal shingles
    share) and one column a band.

    Args:
        store: holds the shard, and gets the sketch.
        settings: what is compared, and how.
        ranks: of every source.
        task: which shard.
    """
    table = store.read_arrow(task.part, ["source", "messages"])
    texts = compared_texts(table["messages"].combine_chunks(), settings.part)
    numbers, before = hashed_words(texts).ngrams(settings.shingle)
    shingles, ends = _distinct(numbers, before)
    filled = np.flatnonzero(np.diff(ends))
    ends = np.concatenate([[0], ends[1:][filled]])
    sources = table["source"].to_pylist()
    lists = pa.LargeListArray.from_arrays(pa.array(ends), pa.array(shingles))
    sets = _set_numbers(shingles, ends)
    columns = {
        "row": pa.array(task.first + filled),
        "rank": pa.array([ranks[sources[place]] for place in filled], pa.int32()),
        "length": pc.utf8_length(texts).take(pa.array(filled)).cast(pa.int32()),
        "set": pa.array(sets),
        "shingles": lists,
    }
    # Many short texts are the same: their signatures are computed once.
    _, first, places = np.unique(sets, return_index=True, return_inverse=True)
    signatures = _signatures(lists.take(pa.array(first)), settings.permutations)[places]
    bands = _band_numbers(signatures, settings)
    store.write_arrow(task.name, pa.table(columns | bands))


def compared_texts(messages: pa.Array, part: Part) -> pa.Array:
    """The text of each conversation's part, with reasoning and tool calls; system turns left out.

    Args:
        messages: conversations that end with the assistant's turn.
        part: its prompt, its response, or both.

    Returns:
        large_string [conversations].
    """
    turns = messages.flatten()
    offsets = messages.offsets.to_numpy() - messages.offsets[0].as_py()
    last = np.zeros(len(turns), bool)
    last[offsets[1:] - 1] = True
    said = pc.not_equal(turns.field("role"), "system").to_numpy(zero_copy_only=False)
    if part != "both":
        said = said & (last if part == "response" else ~last)
    before = np.concatenate([[0], np.cumsum(said)])[offsets]
    texts = _turn_texts(turns).filter(pa.array(said))
    lists = pa.ListArray.from_arrays(pa.array(before, pa.int32()), texts)
    return pc.binary_join(lists, "\n").cast(pa.large_string())


def _turn_texts(turns: pa.StructArray) -> pa.Array:
    """What each turn says, its reasoning and its tool calls, a line each, string [turns]."""
    content, reasoning, calls = map(turns.field, ("content", "reasoning", "tool_calls"))
    if reasoning.null_count == calls.null_count == len(turns):
        return content
    # As one word: the names of its JSON's fields would make any two calls alike.
    calls = pc.replace_substring_regex(calls, r"\s+", "")
    return pc.binary_join_element_wise(content, reasoning, calls, "\n", null_handling="skip")


def _distinct(numbers: HashArray, before: IntArray) -> tuple[HashArray, IntArray]:
    """Each row's distinct numbers, sorted, and how many stand before each row."""
    for start, end in pairwise(before.tolist()):
        numbers[start:end].sort()
    new = np.ones(len(numbers), dtype=bool)
    new[1:] = numbers[1:] != numbers[:-1]
    new[before[:-1][before[:-1] < len(numbers)]] = True
    return numbers[new], np.concatenate([[0], np.cumsum(new)])[before]


def _set_numbers(shingles: HashArray, ends: IntArray) -> HashArray:
    """A number of each row's set of shingles, uint64 [rows]."""
    mixed = (shingles ^ (shingles >> np.uint64(29))) * np.uint64(0xBF58476D1CE4E5B9)
    sums = np.concatenate([np.zeros(1, np.uint64), np.cumsum(mixed ^ (mixed >> np.uint64(32)))])
    numbers: HashArray = np.diff(sums[ends])
    return numbers


def _signatures(shingles: pa.LargeListArray, permutations: int) -> HashArray:
    """MinHash signatures, uint64 [rows, permutations]."""
    from rensa import RMinHash

    flat, ends = shingles.flatten().to_numpy(), shingles.offsets.to_numpy()
    found = np.empty((len(shingles), permutations), np.uint64)
    # A signature passes through Python's numbers: of few rows at once they stay in the cache.
    for start in range(0, len(found), _ROWS_AT_ONCE):
        some = ends[start : start + _ROWS_AT_ONCE + 1]
        matrix = RMinHash.digest_matrix_from_flat_token_hashes(
            flat[some[0] : some[-1]], (some - some[0]).astype(np.uint64), permutations, _SEED
        )
        found[start : start + _ROWS_AT_ONCE] = matrix.to_rows()
    return found


def _band_numbers(signatures: HashArray, settings: NearDuplicateSettings) -> dict[str, pa.Array]:
    """A number for each band of each row: equal for equal hashes."""
    _, width = bands_of(settings.threshold, settings.permutations, settings.recall)
    columns = {}
    for band, name in enumerate(band_names(settings)):
        number = np.zeros(len(signatures), np.uint64)
        for column in signatures[:, band * width : (band + 1) * width].T:
            number = (number ^ column) * np.uint64(0x9E3779B97F4A7C15)
            number ^= number >> np.uint64(32)
        columns[name] = pa.array(number)
    return columns
