"""Each correction of Triton's interpreter is needed, and with it the interpreter gives what plain torch does."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

PROBES = Path(__file__).with_name("interpreter_probes.py")

WITHOUT = {
    "dot of bfloat16": "wrong: ",
    "float32 to bfloat16": "wrong: ",
    "float32 to float8_e4m3fn": "wrong: ",
    "float32 to float8_e5m2": "wrong: ",
    "NaN of float8_e4m3fn": "wrong: ",
    "NaN of float8_e5m2": "wrong: ",
    # Until 2.4, numpy made a number of an array that holds one.
    "loop to a loaded number": "raises: TypeError" if np.lib.NumpyVersion(np.__version__) >= "2.4.0" else "r",
    "infinity less infinity": "raises: RuntimeWarning",
    "maximum beside NaN": "raises: ",
    "larger of NaN and a number": "wrong: ",
}


@pytest.fixture(scope="module")
def words():
    """What each probe gives, without the corrections and with them: in processes of their own, for they stay."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    processes = {
        which: subprocess.Popen([sys.executable, PROBES, which], stdout=subprocess.PIPE, env=environment)
        for which in ("bare", "corrected")
    }
    return {which: json.loads(process.communicate()[0]) for which, process in processes.items()}


@pytest.mark.parametrize("probe", WITHOUT)
def test_a_correction_is_needed(probe, words):
    assert words["bare"][probe].startswith(WITHOUT[probe])


@pytest.mark.parametrize("probe", WITHOUT)
def test_a_correction_is_right(probe, words):
    assert words["corrected"][probe] == "right"


def test_every_probe_is_judged(words):
    assert set(words["bare"]) == set(words["corrected"]) == set(WITHOUT)
