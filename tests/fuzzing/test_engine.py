# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""What `make fuzz` does around libFuzzer."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import core, given, settings
from hypothesis import strategies as st

from tests.fuzzing import __main__ as engine


def test_all_integers_of_a_range_are_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(core, "BytestringProvider", core.BytestringProvider)  # restores it
    engine.draw_from_full_ranges()
    drawn = set()

    @settings(database=None)
    @given(st.tuples(st.integers(1000, 1010), st.integers(-3, 2)))
    def collect(numbers: tuple[int, int]) -> None:
        drawn.add(numbers)

    for first in range(16):
        for second in range(8):
            collect.hypothesis.fuzz_one_input(bytes([first, second]))
    assert drawn == {(i, j) for i in range(1000, 1011) for j in range(-3, 3)}


WORKER = """
print("#2\\tINITED cov: 3")
print("dcn_plugin found AssertionError: a call of 7 in findings/1")
print("dcn_plugin found AssertionError: a call of 7 in findings/2")
print("==12== ERROR: AddressSanitizer: heap-buffer-overflow on address 0x6020")
print("    #0 in dcn::kernel")
print("artifact_prefix='./'; Test unit written to findings/crash-3")
raise SystemExit(1)
"""


def test_findings_are_printed_once_with_their_file(capsys: pytest.CaptureFixture[str]) -> None:
    findings: dict[str, str] = {}
    for _ in range(2):
        assert engine.run_worker([sys.executable, "-c", WORKER], findings) == ""
    assert findings == {
        "AssertionError: a call of 7": "findings/1",
        "==N== ERROR: AddressSanitizer: heap-buffer-overflow on address N": "findings/crash-3",
    }
    printed = capsys.readouterr().out
    assert printed.count("make fuzz FUZZ_REPLAY=findings/crash-3") == 1
    assert "dcn::kernel" in printed and "INITED cov: 3" in printed


def test_a_worker_that_fails_without_a_finding_is_a_problem(
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = [sys.executable, "-c", "import no_such_module"]
    assert engine.run_worker(words, {}) == "; a worker ended with 1"
    assert "No module named 'no_such_module'" in capsys.readouterr().out


def test_numbers_do_not_make_another_finding() -> None:
    assert engine.normalized("size 3, address 0x7f\nmore") == "size N, address N"


def test_counts_are_a_line_per_function(capsys: pytest.CaptureFixture[str]) -> None:
    counts = Counter({"roi_pool: value": 3, "roi_pool: ValueError": 1, engine.EXECUTIONS: 4})
    engine.print_counts(counts)
    assert capsys.readouterr().out.split() == ["roi_pool", "4:", "ValueError", "1,", "value", "3"]


def test_the_corpus_is_seeded_once(tmp_path: Path) -> None:
    engine.seed_corpus(tmp_path)
    (tmp_path / "random-0").write_bytes(b"kept")
    engine.seed_corpus(tmp_path)
    assert len(list(tmp_path.iterdir())) == engine.SEEDS
    assert (tmp_path / "random-0").read_bytes() == b"kept"
