"""What headers, configs and the directory show about a model by themselves: no weights are read."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from itertools import islice

from oxmerge import _core
from oxmerge.errors import OxmergeError
from oxmerge.json_files import read_object
from oxmerge.models.names import find_layer_counts, is_head, is_vocabulary, side_of
from oxmerge.models.places import layout_of, size_of
from oxmerge.models.vocabularies import folder_beside, token_files
from oxmerge.problems import SHOWN_TENSORS, Problem, shorten, without_hint
from oxmerge.schema import DTYPE_SIZES

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from typing import Any

    from oxmerge._core import TensorInfo
    from oxmerge.models.inputs import InputModel

__all__ = ["Found", "about", "embedding_of", "head_of", "look", "look_at_vocabulary"]

#: Programs beside weights, and files that run code when they are loaded.
_PROGRAMS = ("*.py", "*.so", "*.sh")
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.pickle")
#: Files of a directory that are looked at: a stranger's may have any number.
_MOST_FILES = 10_000
#: Layers of a stack in which one that is unlike all others is odd.
_LEAST_LAYERS = 4
_MATRIX = 2
#: What configs call the width of a model.
_WIDTHS = ("hidden_size", "n_embd", "d_model", "dim")
#: Rows for images and starts that some types of models have beyond their `vocab_size`.
_MORE_ROWS = {"mllama": 8, "mllama_text_model": 8, "moshi": 1}
_SPECIAL = re.compile(r"(bos|eos|pad|unk|sep|cls|mask|decoder_start)_token_id")


@dataclass(slots=True)
class Found:
    """What was found about a model so far, by how bad it is."""

    errors: list[Problem] = field(default_factory=list)
    warnings: list[Problem] = field(default_factory=list)
    notes: list[Problem] = field(default_factory=list)


def about(
    code: str,
    message: str,
    tensors: list[str],
    advice: str,
    *,
    expected: str | None = None,
    found: str | None = None,
) -> Problem:
    """Return one problem that tensors share."""
    return Problem(
        code,
        message,
        tensor=tensors[0],
        expected=expected,
        found=found,
        advice=advice,
        tensors=tuple(tensors[:SHOWN_TENSORS]),
        count=len(tensors),
    )


def look(model: InputModel, found: Found) -> None:
    """Add what is wrong or odd about a model, from its headers and the files beside them."""
    tensors = [model.checkpoint.tensor(at) for at in range(len(model.checkpoint))]
    _look_at_index(model, tensors, found)
    look_at_vocabulary(model, found)
    _look_at_matrices(model, tensors, found)
    _look_at_layers(model, tensors, found)
    _look_at_head(model, found)
    _look_at_tokens(model, found)
    _look_beside(model, found)


def look_at_vocabulary(model: InputModel, found: Found) -> None:
    """Add what a config says otherwise of the embedding than it is: this takes no time."""
    config, embedding = model.config, embedding_of(model)
    if embedding is None or not config:
        return
    rows, width = embedding.shape
    more = _MORE_ROWS.get(str(config.get("model_type")), 0)
    vocabularies = sorted({size + more for size in _whole_numbers(config, "vocab_size")})
    if vocabularies and rows not in vocabularies:
        said = " or ".join(map(str, vocabularies))
        found.errors.append(_unlike_config(model, embedding, "rows", said, rows))
    # Some have embeddings narrower than their layers; but the config says so.
    stated = next((shorten(repr(config[key])) for key in _WIDTHS if key in config), None)
    if stated is not None and width not in _whole_numbers(config, ""):
        found.errors.append(_unlike_config(model, embedding, "columns", stated, width))
    for key, value in config.items():
        ids = value if isinstance(value, list) else [value]
        beyond = [each for each in ids if type(each) is int and each >= rows]
        if beyond and _SPECIAL.fullmatch(key):
            message = f"`{key}` of the config is a token without a row in the embedding"
            problem = Problem(
                "vocabulary-rows",
                message,
                file=model.path,
                tensor=embedding.written,
                expected=f"ids below {rows}",
                found=str(beyond[0]),
            )
            found.errors.append(problem)


def embedding_of(model: InputModel) -> TensorInfo | None:
    """Return the matrix that has a row for each token and is read first, if there is one."""
    tables = (each for each in _loose_matrices(model) if not is_head(each.name))
    is_table = (each for each in tables if is_vocabulary(each.name))
    return next((each for each in is_table if side_of(each.name) == "input"), None)


def head_of(model: InputModel) -> TensorInfo | None:
    """Return the matrix that turns states into tokens, if it is stored."""
    heads = (each for each in _loose_matrices(model) if is_head(each.name))
    return next((each for each in heads if side_of(each.name) == "output"), None)


def _loose_matrices(model: InputModel) -> Iterator[TensorInfo]:
    """Yield the matrices whose names have no number."""
    for lead, first, count in model.runs:
        of_run = range(first, first + count) if not lead else ()
        tensors = (model.checkpoint.tensor(at) for at in of_run)
        yield from (each for each in tensors if len(each.shape) == _MATRIX)


def _look_at_index(model: InputModel, tensors: list[TensorInfo], found: Found) -> None:
    index = model.checkpoint.index
    if index is None:
        return
    metadata = read_object(index["path"]).get("metadata")
    said = metadata.get("total_size") if isinstance(metadata, dict) else None
    size = sum(size_of(each) * DTYPE_SIZES[each.dtype] for each in tensors)
    if type(said) is int and said != size:
        message = "the index says another size than its tensors have"
        advice = "loaders do not mind; save the model anew to mend it"
        found.notes.append(
            Problem(
                "index-size",
                message,
                file=index["path"],
                expected=str(said),
                found=str(size),
                advice=advice,
            ),
        )


def _look_at_matrices(model: InputModel, tensors: list[TensorInfo], found: Found) -> None:
    """Compare the matrices of a plain decoder with what its config says of them."""
    config = model.config
    numbers = {key: value for key, value in config.items() if type(value) is int and value > 0}
    heads, width = numbers.get("num_attention_heads"), numbers.get("hidden_size")
    if model.stack is None or heads is None or width is None:
        return
    each = numbers.get("head_dim", width // heads)
    if "qk_nope_head_dim" in numbers:  # latent attention: its keys have no matrix of their own
        each = numbers["qk_nope_head_dim"] + numbers.get("qk_rope_head_dim", 0)
    queries = heads * each
    # Layers that look at a window may have heads of their own, such as `swa_num_key_value_heads`.
    dims = {each, *_whole_numbers(config, "head_dim")}
    of_keys = {"num_key_value_heads": heads} | numbers
    others = [
        [count * dim for count in _whole_numbers(of_keys, key) for dim in dims]
        for key in ("num_attention_heads", "num_key_value_heads")
    ]
    keys = of_keys["num_key_value_heads"] * each
    rows: dict[str, tuple[str, list[int | None]]] = {
        # Some have a gate for each number of a head, in the same matrix.
        "self_attn.q_proj.weight": ("attention heads", [queries, 2 * queries, *others[0]]),
        "self_attn.k_proj.weight": ("key and value heads", [keys, *others[1]]),
        "mlp.up_proj.weight": ("`intermediate_size`", [numbers.get("intermediate_size")]),
    }
    places = ((tensor, model.layout.place(tensor.name)) for tensor in tensors)
    parts = [
        (t, place.rest) for t, place in places if place is not None and len(t.shape) == _MATRIX
    ]
    for part, (what, fitting) in rows.items():
        wanted = fitting[0]
        of_kind = [tensor for tensor, rest in parts if rest == part]
        odd = [t for t in of_kind if wanted is not None and t.shape[0] not in fitting]
        if odd:
            message = f"the config says another number of rows, by its {what}"
            advice = "compare `config.json` with that of the model it was made from"
            found.warnings.append(
                about(
                    "config-size",
                    message,
                    [t.name for t in odd],
                    expected=str(wanted),
                    found=str(odd[0].shape[0]),
                    advice=advice,
                ),
            )


def _unlike_config(
    model: InputModel, tensor: TensorInfo, what: str, expected: str, found: int
) -> Problem:
    return Problem(
        "config-size",
        f"the embedding has another number of {what} than the config says",
        file=model.file_of(tensor),
        tensor=tensor.written,
        expected=expected,
        found=str(found),
        advice="loaders refuse it: mend `config.json`, or use the one that belongs to the weights",
    )


def _whole_numbers(config: Mapping[str, Any], ending: str) -> Iterator[int]:
    """Yield the whole numbers of a config and of those in it, of keys that end so."""
    for key, value in config.items():
        if isinstance(value, dict):
            yield from _whole_numbers(value, ending)
        elif type(value) is int and key.endswith(ending):
            yield value


def _look_at_layers(model: InputModel, tensors: list[TensorInfo], found: Found) -> None:
    layout = layout_of(model)
    depths = find_layer_counts(model.config)
    if depths and not layout.stacks and layout.numbered:
        prefix, count = max(layout.numbered.items(), key=lambda pair: pair[1])
        if count == model.config.get("num_hidden_groups"):
            return  # layers that share their weights
        message = "the config counts other layers than there are"
        there = f"{count}, in `{prefix}`"
        expected = " or ".join(map(str, sorted(depths)))
        advice = "some files may be missing: compare with the model's page, or download it again"
        found.errors.append(
            Problem(
                "config-size",
                message,
                file=model.path,
                expected=expected,
                found=there,
                advice=advice,
            ),
        )
    shapes: dict[tuple[str, str], dict[int, tuple[int, ...]]] = {}
    beyond: dict[tuple[str, int], list[str]] = {}
    for tensor in tensors:
        place = layout.place(tensor.name)
        if place is None:
            continue
        if place.is_extra:
            beyond.setdefault((place.stack.prefix, place.layer), []).append(place.rest)
        else:
            of_layers = shapes.setdefault((place.stack.prefix, place.rest), {})
            of_layers[place.layer] = tuple(tensor.shape)
    for (prefix, layer), rests in beyond.items():
        # One that predicts further tokens has tensors that others lack, and belongs there.
        if all((prefix, rest) in shapes for rest in rests):
            message = "a layer beyond those that the config counts, which loaders leave out"
            names = [f"{prefix}.{layer}.{rest}" for rest in rests]
            expected = f"{layout.stacks[prefix].depth} layers"
            advice = "compare `config.json` with that of the model it was made from"
            found.warnings.append(about("config-size", message, names, advice, expected=expected))
    # Layers with tensors that no other has are of another kind by design.
    own = {
        (prefix, next(iter(of_layers)))
        for (prefix, _), of_layers in shapes.items()
        if len(of_layers) == 1
    }
    for (prefix, rest), of_layers in shapes.items():
        _look_at_layers_of(prefix, rest, of_layers, layout.stacks[prefix].depth, own, found)


def _look_at_layers_of(
    prefix: str,
    rest: str,
    shapes: dict[int, tuple[int, ...]],
    depth: int,
    own: set[tuple[str, int]],
    found: Found,
) -> None:
    """Tell of an inner layer that is alone in lacking a tensor, or in its shape.

    The first and the last layer often differ by design.
    """
    if depth < _LEAST_LAYERS or len(shapes) < depth - 1:
        return
    advice = "if that is not by design, download the model again"
    lacks = (layer for layer in range(depth) if layer not in shapes)
    lacking = next((layer for layer in lacks if (prefix, layer) not in own), None)
    if lacking is not None and 0 < lacking < depth - 1:
        message = f"a layer lacks what all others have, `{rest}`"
        name = f"{prefix}.{lacking}.{rest}"
        found.warnings.append(Problem("uneven-layers", message, tensor=name, advice=advice))
    common = shapes[0 if 0 in shapes else 1]
    alone = [layer for layer, shape in shapes.items() if shape != common]
    if len(alone) == 1 and 0 < alone[0] < depth - 1:
        message = f"a layer has `{rest}` of another shape than all others"
        name = f"{prefix}.{alone[0]}.{rest}"
        found.warnings.append(
            Problem(
                "uneven-layers",
                message,
                tensor=name,
                expected=str(list(common)),
                found=str(list(shapes[alone[0]])),
                advice=advice,
            ),
        )


def _look_at_head(model: InputModel, found: Found) -> None:
    if head_of(model) is not None or model.config.get("tie_word_embeddings") is not False:
        return
    embedding = embedding_of(model)
    if embedding is not None and any(
        side_of(each.name) == "output" and each.shape[0] == embedding.shape[0]
        for each in _loose_matrices(model)
    ):
        return  # a head by another name
    named = model.config.get("architectures")
    if isinstance(named, list) and any(str(name).endswith("ForCausalLM") for name in named):
        message = "there is no head, and the config does not tie it to the embedding"
        advice = "loaders fill it with random numbers: some files may be missing"
        found.errors.append(Problem("missing-head", message, file=model.path, advice=advice))


def _look_at_tokens(model: InputModel, found: Found) -> None:
    embedding = embedding_of(model)
    files = token_files(model.tokenizer_folder)
    if embedding is None or not files:
        return
    rows = embedding.shape[0]
    try:
        largest = _core.largest_token(files)
    except (OxmergeError, OSError) as error:
        message = f"the tokenizer cannot be read: {without_hint(error)[0]}"
        found.errors.append(Problem("unreadable-config", message))
        return
    if largest is not None and largest >= rows:
        problem = Problem(
            "vocabulary-rows",
            "the tokenizer has tokens without a row in the embedding",
            file=files[0],
            expected=f"ids below {rows}",
            found=str(largest),
            advice="texts with them fail: resize the embedding, or use the tokenizer it came with",
        )
        found.errors.append(problem)


def _look_beside(model: InputModel, found: Found) -> None:
    folder = folder_beside(model.path) or os.curdir
    if not model.config:
        message = "there is no `config.json` that could be read beside the weights"
        advice = "loaders need one: copy that of the model it was made from"
        found.warnings.append(Problem("missing-config", message, file=folder, advice=advice))
    try:
        with os.scandir(folder) as entries:
            names = sorted(entry.name for entry in islice(entries, _MOST_FILES))
    except OSError:
        return
    programs = _like(names, _PROGRAMS)
    maps = [
        name
        for name in ("config.json", "tokenizer_config.json")
        if read_object(os.path.join(folder, name)).get("auto_map")
    ]
    if programs or maps:
        message = "the model comes with code of its own, which loaders run if they are allowed to"
        advice = "read it before `trust_remote_code`; oxmerge itself runs none"
        seen = ", ".join([*programs, *(f"`auto_map` in {name}" for name in maps)])
        found.warnings.append(
            Problem("remote-code", message, file=folder, found=seen, advice=advice)
        )
    pickles = _like(names, _PICKLES)
    if pickles:
        message = "files beside the weights can run code when they are loaded"
        advice = "remove them, if the safetensors files are all that is needed"
        found.warnings.append(
            Problem("pickle", message, file=folder, found=", ".join(pickles), advice=advice),
        )


def _like(names: list[str], patterns: tuple[str, ...]) -> list[str]:
    return [name for name in names if any(fnmatchcase(name.lower(), each) for each in patterns)]
