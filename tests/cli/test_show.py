"""What the long functions say of how far they are."""

from __future__ import annotations

import pytest

from slmkit.cli.show import TerminalReporter


def test_a_count_of_a_known_total_is_told_with_the_time_left(capsys: pytest.CaptureFixture[str]) -> None:
    update = TerminalReporter().counter("reference", 1_000)
    for rows in range(16, 1_000, 16):
        update(rows, rows * 100, 0)
    update(1_000, 100_000, 0)
    lines = capsys.readouterr().err.splitlines()
    assert 8 <= len(lines) <= 11  # a tenth each: not all 63
    assert lines[0] == "reference: 112/1,000 rows, 11,200 tokens, 0:00 left"
    assert lines[-1].startswith("reference: 1,000/1,000 rows, 100,000 tokens")


def test_without_a_total_few_documents_are_no_line(capsys: pytest.CaptureFixture[str]) -> None:
    update = TerminalReporter().counter("tokenizing")
    update(19_999, 5, 5)
    update(20_000, 6, 6)
    assert capsys.readouterr().err == "tokenizing: 20,000 documents, 6 tokens\n"
