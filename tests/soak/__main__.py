# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""Runs the ops, the models and killed training runs for a long time, and checks what they leave.

    make soak [SOAK_MINUTES=30]
    python -m tests.soak --minutes 30
    python -m tests.soak --minutes 1 --part ops

ops: random calls in eight threads, some compared with a call in one thread. models: images of
random sizes through the slim models of Shapes. kills: training runs killed at random moments, while
they draw Shapes, while they write a checkpoint and while they evaluate, then resumed to the weights
of a run without kills. large: input gradients of more than 2**31 elements, if the memory is free.
Prints counts and resident memory each minute; exits with 1 after any failure.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
from pathlib import Path

from tests.soak import kills, large, models, ops
from tests.soak.progress import Progress

PARTS = ("ops", "models", "kills", "large")


def main(words: list[str] | None = None) -> int:
    """Runs the parts, which share the time equally, and returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--minutes", type=float, default=30, help="of all parts together")
    add("--part", choices=PARTS, action="append", help="only this part; may be repeated")
    add("--seed", type=int, default=random.SystemRandom().randrange(2**31), help="default: random")
    options = parser.parse_args(words)
    parts = options.part or PARTS
    timed = [part for part in parts if part != "large"]
    print(f"seed {options.seed}; {options.minutes:g} minutes: {', '.join(parts)}", flush=True)
    failures = 0
    for part in parts:
        seconds = 0.0 if part == "large" else 60 * options.minutes / len(timed)
        progress = Progress(part, seconds, bounded=part in ("ops", "models"))
        if part == "kills":
            with tempfile.TemporaryDirectory(prefix="dcn_soak_") as folder:
                kills.run(progress, options.seed, Path(folder))
        else:
            {"ops": ops.run, "models": models.run, "large": large.run}[part](progress, options.seed)
        progress.finish()
        failures += len(progress.failures)
    print(f"soak: {failures} failures")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
