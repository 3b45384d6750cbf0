"""Data-Juicer's side of ingest.py, run by that script with the Python of its own environment.

Reads `{"pairs": [[prompt, response]], "threshold", "window", "permutations"}` on standard input;
the last line of its output is, for `exact` and `near`, `{"seconds", "kept"}`: row numbers. Near
duplicates are looked for among the rows that are left, by their responses.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any


def main() -> None:
    from data_juicer.core.data import NestedDataset
    from data_juicer.ops.deduplicator.document_deduplicator import DocumentDeduplicator
    from data_juicer.ops.deduplicator.document_minhash_deduplicator import (
        DocumentMinhashDeduplicator,
    )

    task = json.load(sys.stdin)
    rows = [
        {"text": json.dumps(pair), "row": number, "response": pair[1]}
        for number, pair in enumerate(task["pairs"])
    ]
    minhash = DocumentMinhashDeduplicator(
        window_size=task["window"],
        num_permutations=task["permutations"],
        jaccard_threshold=task["threshold"],
        text_key="response",
    )

    def left(op: Any, dataset: Any) -> tuple[float, Any]:
        started = time.perf_counter()
        dataset = op.run(dataset)
        return time.perf_counter() - started, dataset

    exact_seconds, distinct = left(DocumentDeduplicator(), NestedDataset.from_list(rows))
    near_seconds, near = left(minhash, distinct)
    print(
        json.dumps(
            {
                "exact": {"seconds": exact_seconds, "kept": distinct["row"][:]},
                "near": {"seconds": exact_seconds + near_seconds, "kept": near["row"][:]},
            }
        )
    )


if __name__ == "__main__":
    main()
