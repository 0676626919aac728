"""Runs some cases of the conformance suite, one by one, and says how each ended in a line of JSON.

A kernel that reads outside of memory leaves a process that cannot use the GPU any more: it then ends with status 3.
"""

from __future__ import annotations

import argparse
import json
import sys

import torch

from pagedkv.testing.conformance import conformance_cases
from pagedkv.testing.conformance.report import run_cases

BROKEN = 3


def main() -> int:
    """The cases of an op from one number on up to another."""
    parser = argparse.ArgumentParser()
    parser.add_argument("op")
    parser.add_argument("start", type=int)
    parser.add_argument("stop", type=int)
    parser.add_argument("--backend", default="triton")
    parser.add_argument("--device", default="cuda")
    options = parser.parse_args()
    torch.set_num_threads(1)
    for number, case in enumerate(conformance_cases(options.op)):
        if not options.start <= number < options.stop:
            continue
        print(json.dumps({"started": str(case), "number": number}), flush=True)
        report = run_cases([case], options.backend, options.device)
        verdict = "passed" if report.passed else "failed" if report.failed else "not offered"
        words = (*report.failed.values(), *report.not_offered.values(), "")[0]
        is_broken = options.device != "cpu" and verdict == "failed" and _is_broken()
        # A compiler's error begins with where it is and ends with what it is.
        words = words if len(words) <= 800 else f"{words[:400]} ... {words[-400:]}"
        print(json.dumps({"case": str(case), "number": number, "verdict": verdict, "words": words}), flush=True)
        if is_broken:
            return BROKEN
    return 0


def _is_broken() -> bool:
    try:
        torch.cuda.synchronize()
    except Exception:  # noqa: BLE001 - any error of the driver
        return True
    return False


if __name__ == "__main__":
    sys.exit(main())
