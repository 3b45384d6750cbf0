"""Data-Juicer's side of scoring.py, run by that script with the Python of its own environment.

Reads `{"model": folder, "rows": [{"query", "response"}]}` on standard input; the last line of its
output is `{"seconds", "scores"}`. Loading the model isn't timed.
"""

from __future__ import annotations

import json
import os
import sys
import time

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def main() -> None:
    from data_juicer.ops.filter.instruction_following_difficulty_filter import (
        InstructionFollowingDifficultyFilter,
    )
    from data_juicer.utils.constant import Fields, StatsKeys

    task = json.load(sys.stdin)
    score = InstructionFollowingDifficultyFilter(
        hf_model=task["model"], query_template="{query}", response_template="{response}"
    )

    def scores(rows: list[dict[str, str]]) -> list[float]:
        return [
            score.compute_stats_single({**row, Fields.stats: {}})[Fields.stats][StatsKeys.ifd_score]
            for row in rows
        ]

    scores(task["rows"][:1])
    start = time.perf_counter()
    found = scores(task["rows"])
    print(json.dumps({"seconds": time.perf_counter() - start, "scores": found}))


if __name__ == "__main__":
    main()
