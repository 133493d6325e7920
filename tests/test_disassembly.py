"""The kernels are what they claim to be: as wide as their level, and fused only where that is said.

Read from the disassembly of the extension itself, as it is installed.
"""

from __future__ import annotations

import platform
import re
import shutil
import subprocess

import pytest
from oxmerge import _core

pytestmark = pytest.mark.slow

REGISTERS = {"portable": "%xmm", "avx2": "%ymm", "avx512": "%zmm"}
#: Kernels that do not compute several elements at once at some level, and why.
NARROW = {
    r"\w+ Widen<f64, F64>|\w+ Widen<f32, F32>": "nothing is converted",
    r"avx2 Widen<f64, F16>|avx\d+ Narrow<f64, F32>": "few inputs of f64 are of these types",
    r"avx\d+ Thinned<F16, 3, .*>": "conversions of four inputs are too long for the compiler",
    r"avx512 Unpack<f64>": "bits are spread by halves of the register",
    r"portable Distance64": "SSE2 has no comparison of 64-bit integers",
    r"portable LowRank<.*>": "without an instruction for it each multiply-add is a call",
}


@pytest.fixture(scope="module")
def shells() -> dict[tuple[str, str], list[str]]:
    """Return the instructions of each kernel, with its types, at each level."""
    if platform.machine() not in {"x86_64", "AMD64"}:
        pytest.skip("the registers are those of x86-64")
    if shutil.which("objdump") is None:
        pytest.skip("to read instructions needs `objdump`, of binutils")
    if _core.build_info()["profile"] != "release":
        pytest.skip("kernels are wide where they are optimised: `pip install .`")
    options = ["--disassemble", "--demangle", "--no-show-raw-insn", "--no-addresses"]
    command = ["objdump", *options, _core.__file__]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = {}
    for function in text.split("\n\n"):
        head, _, body = function.strip().partition(">:\n")
        shell = re.search(r"oxmerge::kernels::level::(\w+)::<(.*)>", head)
        if shell is not None:
            kernel = re.sub(r"oxmerge::kernels::(\w+::)*", "", shell[2])
            found[shell[1], kernel] = [line for line in body.split("\n") if line.strip()]
    # Names are demangled as `-Csymbol-mangling-version=v0` makes them.
    assert {level for level, _ in found} == set(REGISTERS)
    return found


def packed(body: list[str], register: str) -> int:
    """Return how many instructions compute, compare or convert what lies in such registers."""
    mnemonics = [line.split()[0] for line in body if register in line]
    return sum(not re.fullmatch(r".*(ss|sd)|.*(mov|xor).*", each) for each in mnemonics)


def test_kernels_are_as_wide_as_their_level(shells: dict[tuple[str, str], list[str]]) -> None:
    assert len(shells) > 3 * 100
    narrow = re.compile("|".join(NARROW))
    found = [
        (level, kernel)
        for (level, kernel), body in shells.items()
        if packed(body, REGISTERS[level]) < 2 and not narrow.fullmatch(f"{level} {kernel}")
    ]
    assert found == []


@pytest.mark.parametrize("real", ["f32", "f64"])
def test_the_logarithm_is_as_wide_as_its_level(
    shells: dict[tuple[str, str], list[str]], real: str
) -> None:
    # It is in one kernel with narrow ones such as `abs`. Nothing else in there divides.
    for level, register in REGISTERS.items():
        body = shells[level, f"Unary<{real}>"]
        assert any(re.match(r"\s*v?divpd", line) and register in line for line in body), level


def test_only_products_of_low_rank_are_fused(shells: dict[tuple[str, str], list[str]]) -> None:
    fused = {
        (level, kernel.partition("<")[0])
        for (level, kernel), body in shells.items()
        if any(re.match(r"\s*vfn?m", line) for line in body)
    }
    assert fused == {("avx2", "LowRank"), ("avx512", "LowRank")}
