"""docs/python.md: its code, as it stands, with the embedded student, and without Ray."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def test_the_page_runs_without_ray(tmp_path: Path) -> None:
    blocks = re.findall(
        r"^```python\n(.*?)^```", (ROOT / "docs/python.md").read_text(), re.M | re.S
    )
    assert len(blocks) >= 8
    script = tmp_path / "page.py"
    ending = "import sys\nassert 'ray' not in sys.modules\nprint('came to the end')\n"
    script.write_text("\n".join([*blocks, ending]))
    done = subprocess.run(
        [sys.executable, str(script)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_WAIT_POLICY": "PASSIVE"},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "came to the end"
    # Frames, with vectors of the encoder's width.
    assert "DataFrame [384, 384, 384, 384, 384]" in done.stdout
    # Progress of every stage is shown.
    for stage in ("difficulty", "reflection", "dictionary", "embedding", "emission"):
        assert stage in done.stderr
