"""The inputs that fuzzers found for Python's readers: each gives a plan, or an error of oxmerge."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import oxmerge
import pytest
from fuzzed import TARGETS

KEPT = Path(__file__).parent / "fuzz" / "corpus"


@pytest.mark.parametrize("name", TARGETS)
def test_inputs_that_were_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.chdir(tmp_path)  # and back
    inputs = sorted((KEPT / name).iterdir())
    assert inputs
    for each in inputs:
        with suppress(oxmerge.OxmergeError):
            TARGETS[name](tmp_path, each.read_bytes())
