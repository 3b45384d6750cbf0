"""Tables of conversations of one turn each."""

from __future__ import annotations

import pyarrow as pa

from stages.rows import MESSAGES


def table(texts: list[tuple[str, str]], tasks: list[str] | None = None) -> pa.Table:
    messages = [
        [{"role": "user", "content": q}, {"role": "assistant", "content": a}] for q, a in texts
    ]
    made = pa.table(
        {
            "id": [f"{i:032x}" for i in range(len(texts))],
            "effective_messages": pa.array(messages, MESSAGES),
        }
    )
    return made if tasks is None else made.append_column("task", pa.array(tasks))
