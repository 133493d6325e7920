"""What type checkers are told: NumPy in, NumPy out; torch in, torch out."""

from __future__ import annotations

import dataclasses
import inspect
import os
import subprocess
import sys
from pathlib import Path

import oxmerge
import pytest
from oxmerge.options import PlanOptions, RunOptions

SOURCES = Path(__file__).parent.parent / "python"
#: Stands for torch, which need not be installed, and takes long to look into.
TORCH = "class Tensor:\n    def data_ptr(self) -> int: ...\n"
#: The package's own modules are looked at with all of torch elsewhere.
CONFIG = "[mypy]\nstrict = True\n[mypy-oxmerge.*]\nignore_errors = True\n"
KERNELS = {
    "weighted_sum": "[x, x], [1, 2]",
    "task_vector": "x, x",
    "top_k_mask": "x, 1",
    "row_top_k_mask": "x, 1, every=2",
    "random_mask_by_rank": "x, (0.2, 0.7)",
    "sign_consensus": "[x, x]",
    "convert": "x, 'float16'",
    "linear": "[x, x], weight=1",
    "slerp": "[x], x, t=0.5",
    "nuslerp": "[x, x], weight=[1, 2]",
    "task_arithmetic": "[x], x, weight=1",
    "ties": "[x], x, weight=1",
    "dare_linear": "[x], x, weight=1",
    "dare_ties": "[x], x, weight=1",
    "passthrough": "[x]",
}
OTHERS = """
assert_type(oxmerge.merge_tensors("ties", [x], x, weight=1), OUT)
assert_type(oxmerge.merge_tensors("linear", [x], weight=1, out=x), IN)
assert_type(oxmerge.merge_tensors("linear", [other], weight=1, out=x), IN)
assert_type(oxmerge.merge_state_dicts("ties", [{"x": x}], {"x": x}, weight=1), dict[str, OUT])
held = OrderedDict({"x": x})
assert_type(
    oxmerge.merge_state_dicts("linear", [{"x": other}], weight=1, out=held), OrderedDict[str, IN]
)
assert_type(kernels.random_mask(3, 0.5), NDArray[Any])
assert_type(kernels.random_mask(3, 0.5, out=x), IN)
"""


@pytest.mark.parametrize(
    ("given", "result", "gram"),
    [
        ("NDArray[np.float32]", "NDArray[Any]", "NDArray[np.float64]"),
        ("torch.Tensor", "torch.Tensor", "torch.Tensor"),
        ("array[float]", "NDArray[Any]", "NDArray[np.float64]"),
    ],
)
def test_types(tmp_path: Path, given: str, result: str, gram: str) -> None:
    pytest.importorskip("mypy", reason="not installed: mypy (see the dependency group `lint`)")
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.pyi").write_text(TORCH)
    calls = [f"assert_type(kernels.{name}({call}), OUT)" for name, call in KERNELS.items()]
    calls.append(f"assert_type(kernels.gram([x]), {gram})")
    text = "\n".join(
        [
            "from array import array",
            "from collections import OrderedDict",
            "from typing import Any, assert_type",
            "import numpy as np",
            "import torch",
            "from numpy.typing import NDArray",
            "import oxmerge",
            "from oxmerge import kernels",
            f"x: {given}",
            "other: NDArray[np.float16]",
            *calls,
            OTHERS,
        ]
    )
    script = tmp_path / "script.py"
    script.write_text(text.replace("OUT", result).replace("IN", given))
    (tmp_path / "mypy.ini").write_text(CONFIG)
    command = [sys.executable, "-m", "mypy", "--config-file=mypy.ini", script.name]
    paths = os.pathsep.join([str(tmp_path), str(SOURCES)])
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
        env={**os.environ, "MYPYPATH": paths},
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_options_are_those_of_one_place() -> None:
    """Keywords of functions are fields of `PlanOptions` and `RunOptions`, with their defaults."""
    known = {
        field.name: (field.type, field.default)
        for each in (PlanOptions, RunOptions)
        for field in dataclasses.fields(each)
    }
    own = {"with_side_files", "beside"}
    for function, lacks, has in (
        (oxmerge.merge, own, set[str]()),
        (oxmerge.sweep, own | {"ray", "parts"}, {"together"}),
    ):
        keywords = {
            name: (given.annotation, given.default)
            for name, given in inspect.signature(function).parameters.items()
            if given.kind is given.KEYWORD_ONLY and name not in has
        }
        assert keywords == {name: of for name, of in known.items() if name not in lacks}
