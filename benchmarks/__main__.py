"""The command line: which cases, how long, where the figures go."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

from . import machine, report
from .case import Options, WrongResultError
from .ops import all_cases
from .runner import Figure, run_case


def main(arguments: list[str] | None = None) -> int:
    """Runs the cases asked for; 1 when an op was wrong."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--only", action="append", metavar="TEXT", help="cases whose name contains TEXT; repeatable")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write all figures there")
    parser.add_argument("--quick", action="store_true", help="one shape an op, few rounds: a look, not a result")
    parser.add_argument("--list", action="store_true", help="name the cases and stop")
    parser.add_argument("--layout", choices=("NHD", "HND"), default="NHD", help="of the pages")
    parser.add_argument("--threads", type=int, help="torch.set_num_threads")
    options = parser.parse_args(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    specs = [
        spec
        for spec in all_cases(Options(options.layout, options.quick))
        if not options.only or any(text in spec.name for text in options.only)
    ]
    if options.list:
        print("\n".join(spec.name for spec in specs))
        return 0
    if not specs:
        parser.error(f"no case has a name that contains {' or '.join(options.only)}")
    described = machine.describe()
    report.print_machine(described)
    figures: list[Figure] = []
    wrong = 0
    with torch.inference_mode():
        for spec in specs:
            torch.manual_seed(0)
            try:
                measured = run_case(spec, options.quick)
            except WrongResultError as error:
                wrong += 1
                print(f"\n{spec.name}\n  not timed: {error}", flush=True)
                continue
            report.print_case(measured)
            figures += measured
    if options.json:
        report.write_json(options.json, described, figures)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
