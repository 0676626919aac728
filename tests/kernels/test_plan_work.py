"""A plan whose work was changed is refused, or runs within the tensors of the call; it never ends the process."""

import os
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).with_name("changed_work.py")
CHANGES = ["every_field", "several_fields", "other_lengths", "other_plans"]


def test_changed_work_is_refused_or_stays_within_the_tensors(tmp_path):
    note = tmp_path / "tried"
    done = subprocess.run(
        [sys.executable, "-W", "error", SCRIPT, note, *CHANGES],
        # The heap checks itself where it can, so that a write beyond an allocation shows.
        env={**os.environ, "MALLOC_CHECK_": "3", "MALLOC_PERTURB_": "165"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    tried = note.read_text() if note.exists() else "nothing"
    assert done.returncode == 0, f"exit {done.returncode} on {tried}\n{done.stderr[-2000:]}"
