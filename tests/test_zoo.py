"""Every specimen plans, and every one of its tensors is accounted for."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import zoo
from oxmerge.models.names import find_layer_counts, find_layout
from oxmerge.recipe.recipe import Recipe
from snapshot import check_snapshot

if TYPE_CHECKING:
    from pathlib import Path

    from oxmerge.planning.plans import Plan


def plan_two(tmp_path: Path, specimen: zoo.Specimen) -> Plan:
    for name in ("a", "b"):
        zoo.write(tmp_path / name, specimen, files=2)
    models = [{"model": name, "parameters": {"weight": 0.5}} for name in ("a", "b")]
    recipe = Recipe.from_mapping({"merge_method": "linear", "models": models})
    return zoo.plan_in(tmp_path, recipe)


@pytest.mark.parametrize("name", zoo.ZOO)
def test_every_tensor_is_accounted_for(tmp_path: Path, name: str) -> None:
    specimen = zoo.ZOO[name]()
    merge = plan_two(tmp_path, specimen)
    assert [tensor.name for tensor in merge.tensors] == list(specimen.tensors)
    assert merge.warnings == ()
    for account in merge.accounting:
        names = [name for _, names in zoo.fates(account) for name in names]
        assert sorted(names) == sorted(specimen.tensors)
    check_snapshot(name, zoo.accounts(merge))


STACKS = {
    "gpt2": {"h": 3},
    "gpt2_transformer": {"transformer.h": 3},
    "bert": {"bert.encoder.layer": 2},
    "t5": {"encoder.block": 2, "decoder.block": 3},
    "llama": {"model.layers": 4},
    "mixtral": {"model.layers": 2},
    "deepseek": {"model.layers": 3},
    "qwen2_vl": {"model.layers": 3, "visual.blocks": 2},
    "mamba": {"backbone.layers": 3},
}


@pytest.mark.parametrize("name", zoo.ZOO)
def test_stacks_are_found(name: str) -> None:
    specimen = zoo.ZOO[name]()
    stacks = find_layout(specimen.tensors, find_layer_counts(specimen.config)).stacks
    assert {prefix: stack.depth for prefix, stack in stacks.items()} == STACKS[name]


@pytest.mark.parametrize("name", [name for name, stacks in STACKS.items() if len(stacks) == 1])
def test_every_model_with_one_stack_can_be_sliced(tmp_path: Path, name: str) -> None:
    specimen = zoo.ZOO[name]()
    zoo.write(tmp_path / "a", specimen)
    ((prefix, depth),) = STACKS[name].items()
    slices = [
        {"sources": [{"model": "a", "layer_range": [0, depth]}]},
        {"sources": [{"model": "a", "layer_range": [depth - 1, depth]}]},
    ]
    recipe = Recipe.from_mapping({"merge_method": "passthrough", "slices": slices})
    merge = zoo.plan_in(tmp_path, recipe)
    layers = (*((0, layer) for layer in range(depth)), (0, depth - 1))
    assert merge.layer_map == {prefix: layers}
    account = merge.accounting[0]
    assert account.dropped_count == 0
    assert len(account.copied) == len(specimen.tensors)
