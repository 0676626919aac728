"""Calls compile as Triton's launcher specialises them: what neither the interpreter nor the listed variants show."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
PROBES = Path(__file__).with_name("launch_probes.py")


def test_what_calls_launch_compiles():
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(ROOT / "build" / "triton"), "PAGEDKV_NATIVE": "0", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, PROBES], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    words = json.loads(done.stdout.splitlines()[-1])
    assert words == dict.fromkeys(words, "compiled")
