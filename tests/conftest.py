"""Checkpoints that several test modules merge."""

from __future__ import annotations

import os
import signal
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import snapshot
from writers import random_arrays, tuned, write_model

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

#: More than one piece of several blocks, odd lengths, less than a block, one element, bands.
SHAPES = {
    "embed.weight": (1531, 909),
    "layers.0.weight": (257, 255),
    "layers.0.bias": (65537,),
    "layers.1.weight": (3, 11, 7),
    "scale": (1,),
    # Few rows of many columns.
    "layers.1.experts": (2, 9, 8001),
}


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add what writes snapshots anew."""
    parser.addoption("--update-snapshots", action="store_true", help="write snapshots anew")


def pytest_configure(config: pytest.Config) -> None:
    """Tell `snapshot` whether to."""
    snapshot.is_updating = config.getoption("--update-snapshots")


@pytest.fixture(scope="session", autouse=True)
def interruptible() -> Iterator[None]:
    """Let signals act here and in the processes that tests start.

    A job in the background of a script has Ctrl-C switched off, one of `nohup` that it is hung up
    on, and they hand that on.
    """
    acting: dict[signal.Signals, Any] = {
        signal.SIGINT: signal.default_int_handler,
        **dict.fromkeys((signal.SIGHUP, signal.SIGQUIT, signal.SIGTERM), signal.SIG_DFL),
    }
    before = {number: signal.signal(number, action) for number, action in acting.items()}
    yield
    for number, action in before.items():
        signal.signal(number, action)


@pytest.fixture(scope="session", autouse=True)
def no_hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Have nothing of the Hub here, and nobody ask it; tests of it say otherwise."""
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith(("HF_", "HUGGINGFACE_"))]:
            patch.delenv(name)
        patch.setenv("HF_HOME", str(tmp_path_factory.mktemp("hub")))
        patch.setenv("HF_HUB_OFFLINE", "1")
        yield


@pytest.fixture(scope="session")
def family(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model and three fine-tunes of it: bf16, bf16, f32 and f16."""
    folder = tmp_path_factory.mktemp("family")
    base = random_arrays(SHAPES, seed=0)
    ids = {"position_ids": np.arange(77, dtype=np.int64)}
    write_model(folder / "base", {**base, **ids}, "BF16")
    for seed, (name, dtype) in enumerate({"a": "BF16", "b": "F32", "c": "F16"}.items(), start=1):
        write_model(folder / name, {**tuned(base, seed), **ids}, dtype)
    return folder


@pytest.fixture(scope="session")
def twins(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two small models `a` and `b`, and a recipe `linear.yml` for them."""
    folder = tmp_path_factory.mktemp("twins")
    shapes = {"x": (300, 401), "y": (17,)}
    for seed, name in enumerate("ab"):
        write_model(folder / name, random_arrays(shapes, seed), "BF16")
    models = "".join(f"- {{model: {n}, parameters: {{weight: 1}}}}\n" for n in "ab")
    (folder / "linear.yml").write_text(f"merge_method: linear\nmodels:\n{models}")
    return folder
