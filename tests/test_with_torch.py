"""Tests of arrays of torch, in a process that has used it for nothing else.

`test_torch_backend.py` loads torch too, into the process of all other tests.
"""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("file", ["torch_arrays.py"])
def test_with_torch(file: str) -> None:
    if importlib.util.find_spec("torch") is None:
        pytest.skip("not installed: torch (see the dependency group `test`)")
    path = Path(__file__).with_name(file)
    command = [sys.executable, "-m", "pytest", "--quiet", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
