# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""Compiles deformops' Triton kernels for the convolutions whose name contains MATCH.

    PYTHONPATH=tools python -m bench.precompile [MATCH]

Its autotuner compiles about 40 kernels for each shape and dtype, one after the other: minutes. Here
the shapes and dtypes run in parallel. Their timings disturb each other: remove *.autotune.json from
Triton's cache afterwards, and the autotuner times the compiled kernels again. Its keys contain
neither the batch nor tf32, which deformops (3.0.1) never uses: one batch in float32 serves all.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
from concurrent.futures import ProcessPoolExecutor

from .cases import CONV_CASES, DEFORMOPS, ConvCase, Rival, Setting

DTYPES = ("float32", "float16", "bfloat16")


def compile_kernels(case: ConvCase, dtype: str) -> None:
    """Runs deformops once, which tunes it and leaves its kernels in Triton's cache."""
    setting = Setting("cuda", dtype, threads=1, batch=case.batch)
    case.rivals(setting)[Rival(DEFORMOPS)].run("forward+backward")


def main(match: str = "") -> None:
    jobs = [(case, dtype) for case in CONV_CASES if match in case.name for dtype in DTYPES]
    context = multiprocessing.get_context("spawn")
    workers = min(len(jobs), os.cpu_count() or 1)
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        for job in [pool.submit(compile_kernels, *job) for job in jobs]:
            job.result()
    print(f"deformops: compiled for {len(jobs)} shapes and dtypes")


if __name__ == "__main__":
    main(*sys.argv[1:])
