"""Names: the structure of a model, read off its tensor names and its config's layer counts.

No list of architectures decides anything. A *stack* is a prefix that is numbered 0 to n-1 without
gaps (``model.layers``), where n is a layer count that stands in the config. Only the first number
of a name counts: further ones, as of experts, belong to the rest of the name. Some models have a
few layers more than their config counts, for predicting further tokens; those, and every tensor
in no stack, are *loose*.

Loose tensors lie on the input side of the stack (embeddings) or on its output side (final norm,
head). A short table of words decides which.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

__all__ = [
    "Layout",
    "Place",
    "Stack",
    "find_layer_counts",
    "find_layout",
    "is_head",
    "is_vocabulary",
    "join",
    "position",
    "side_of",
]

#: A model may have so many layers more than its config counts.
MOST_EXTRA_LAYERS = 8

#: No longer than any count of layers: a stranger's name may have thousands of digits.
_NUMBER = re.compile(r"(?:^|\.)(0|[1-9][0-9]{0,8})(?:\.|$)")

#: Words of config keys that count layers: `num_hidden_layers`, `n_layer`, `depth`, ...
_COUNT_WORDS = frozenset(("layer", "layers", "depth", "block", "blocks"))
#: Words of keys that count something else, or that number a layer rather than count them.
_OTHER_WORDS = frozenset((
    "nextn", "mtp", "window", "dropout", "freq", "norm", "size", "type", "types", "shared", "idx",
    "index", "start", "offset", "period", "interval", "select", "feature", "dense", "skip",
    "replace", "dim",
))  # fmt: skip

#: Words between the dots of a loose tensor's name that put it on the output side, whatever else.
_HEAD_WORDS = frozenset(("lm_head", "embed_out", "embedding_norm", "predictions", "cls", "mtp"))
#: Words that put it on the input side, and parts of words.
_INPUT_WORDS = frozenset((
    "emb", "wte", "wpe", "shared", "stem", "conv1", "conv_in", "ln_pre", "pre_layernorm",
    "pre_layer_norm", "pre_layrnorm", "class_token", "cls_token", "mask_token", "pos_drop",
))  # fmt: skip
_INPUT_PARTS = ("embed", "position", "token_type", "patch", "_emb", "emb_")
#: Words that put it on the output side, and their endings.
_OUTPUT_WORDS = frozenset((
    "head", "heads", "score", "classifier", "pooler", "ln_f", "ln_out", "ln_post", "norm", "norm_f",
    "norm_out", "out_norm", "layernorm", "layer_norm", "post_layernorm", "post_layer_norm",
    "output", "output_layer", "output_norm", "qa_outputs", "generator", "vocab_transform",
    "vocab_projector", "vocab_layer_norm",
))  # fmt: skip
_OUTPUT_ENDS = ("_head", "final_norm", "final_layernorm", "final_layer_norm")

#: What the embedding of a language model is called at the end, where a head may be tied to it.
_EMBEDDING_ENDS = (
    "embed_tokens.weight", "wte.weight", "word_embeddings.weight", "embed_in.weight",
    "backbone.embeddings.weight",
)  # fmt: skip
#: Last module of the name of a head, and of any tensor with a row for each token.
_HEAD_MODULES = frozenset(("lm_head", "embed_out", "output", "output_layer", "decoder"))
_VOCABULARY_MODULES = _HEAD_MODULES | frozenset((
    "embed_tokens", "word_embedding", "word_embeddings", "wte", "tok_embeddings", "embedding",
    "embeddings", "shared", "embed_in", "embed_tokens_per_layer", "predictions", "vocab_projector",
))  # fmt: skip


@dataclass(frozen=True, slots=True)
class Stack:
    """A run of numbered layers.

    Attributes
    ----------
    prefix : str
        What stands before the number, without the dot.
    depth : int
        How many layers there are.
    """

    prefix: str
    depth: int


@dataclass(frozen=True, slots=True)
class Place:
    """Where a tensor is in a stack.

    Attributes
    ----------
    stack : Stack
        The stack.
    layer : int
        The layer's number; at or above the depth for an extra layer.
    rest : str
        What follows the number, without the dot.
    """

    stack: Stack
    layer: int
    rest: str

    @property
    def is_extra(self) -> bool:
        """Whether it is in an extra layer, which is loose."""
        return self.layer >= self.stack.depth


@dataclass(frozen=True, slots=True)
class Layout:
    """The stacks of a model.

    Attributes
    ----------
    stacks : dict of str to Stack
        By prefix, in order of appearance.
    numbered : dict of str to int
        How many numbers each numbered prefix has, stack or not.
    gaps : frozenset of str
        The prefixes whose numbers leave some out.
    """

    stacks: dict[str, Stack]
    numbered: dict[str, int]
    gaps: frozenset[str] = frozenset()

    def place(self, name: str) -> Place | None:
        """Return where a tensor is; None for a tensor that is in no stack."""
        match = _NUMBER.search(name)
        stack = None if match is None else self.stacks.get(name[: match.start()])
        if match is None or stack is None:
            return None
        return Place(stack, int(match[1]), name[match.end() :])

    def position(self, name: str) -> float:
        """Return where a tensor is among the layers of its stack, from 0 to 1.

        Loose tensors are at 0, and all are where no stack is known. Those that are numbered beside
        a stack are where their number is among others, as in mergekit. Modules in a sequence, some
        of which have no tensors and leave gaps (``mlp.0`` and ``mlp.2``), are one layer together,
        and that is at 1.
        """
        place = self.place(name)
        if place is not None:
            return 0.0 if place.is_extra else position(place.layer, place.stack.depth)
        match = _NUMBER.search(name)
        if match is None or not self.stacks:
            return 0.0
        prefix = name[: match.start()]
        return 1.0 if prefix in self.gaps else position(int(match[1]), self.numbered.get(prefix, 0))

    @property
    def only_stack(self) -> Stack | None:
        """The stack, if there is exactly one."""
        return next(iter(self.stacks.values())) if len(self.stacks) == 1 else None


def join(prefix: str, layer: int, rest: str = "") -> str:
    """Return the name of a tensor in a layer, or what the names of all of them begin with."""
    return ".".join(part for part in (prefix, str(layer), rest) if part)


def position(layer: int, depth: int) -> float:
    """Return where a layer is in a run of them, from 0 to 1; 1 for the only one."""
    return layer / (depth - 1) if depth > 1 else 1.0


def find_layer_counts(config: Mapping[str, object]) -> frozenset[int]:
    """Return every layer count that stands in a model's config, nested ones included."""
    counts: set[int] = set()
    for key, value in config.items():
        if isinstance(value, dict):
            counts |= find_layer_counts(value)
        elif type(value) is int and value > 0 and _counts_layers(key):
            counts.add(value)
    return frozenset(counts)


def _counts_layers(key: object) -> bool:
    words = str(key).lower().split("_")
    return not _COUNT_WORDS.isdisjoint(words) and _OTHER_WORDS.isdisjoint(words)


def find_layout(names: Iterable[str], counts: frozenset[int]) -> Layout:
    """Return the stacks among tensor names.

    Parameters
    ----------
    names : iterable of str
        The names, in file order.
    counts : frozenset of int
        The layer counts in the config.
    """
    numbers: dict[str, set[int]] = {}
    for name in names:
        match = _NUMBER.search(name)
        if match is not None:
            numbers.setdefault(name[: match.start()], set()).add(int(match[1]))
    depths = ((prefix, _depth(found, counts)) for prefix, found in numbers.items())
    return Layout(
        stacks={prefix: Stack(prefix, depth) for prefix, depth in depths if depth},
        numbered={prefix: len(found) for prefix, found in numbers.items()},
        gaps=frozenset(prefix for prefix, found in numbers.items() if max(found) >= len(found)),
    )


def _depth(numbers: set[int], counts: frozenset[int]) -> int:
    """Return the layer count that fits a set of numbers, or 0."""
    length = len(numbers)
    if max(numbers) != length - 1:
        return 0
    fitting = [count for count in counts if 0 <= length - count <= MOST_EXTRA_LAYERS]
    return max(fitting, default=0)


def side_of(name: str) -> str | None:
    """Return the side of a loose tensor: ``input``, ``output``, or None when it does not say.

    Examples
    --------
    >>> side_of("model.embed_tokens.weight"), side_of("lm_head.weight"), side_of("gate.weight")
    ('input', 'output', None)
    """
    words = name.lower().split(".")
    if not _HEAD_WORDS.isdisjoint(words):
        return "output"
    if not _INPUT_WORDS.isdisjoint(words) or any(part in name.lower() for part in _INPUT_PARTS):
        return "input"
    at_the_end = any(word.endswith(_OUTPUT_ENDS) for word in words)
    return "output" if at_the_end or not _OUTPUT_WORDS.isdisjoint(words) else None


def is_head(name: str) -> bool:
    """Tell whether a tensor is the head that turns states into tokens."""
    return _last_module(name) in _HEAD_MODULES


def find_embedding(names: Iterable[str]) -> str | None:
    """Return the embedding that a head may be tied to, if there is exactly one."""
    found = [name for name in names if name.endswith(_EMBEDDING_ENDS)]
    return found[0] if len(found) == 1 else None


def is_vocabulary(name: str) -> bool:
    """Tell whether a tensor probably has a row for each token."""
    return _last_module(name) in _VOCABULARY_MODULES


def _last_module(name: str) -> str:
    """Return the module that a weight or bias belongs to."""
    module, _, kind = name.rpartition(".")
    return module.rpartition(".")[2] if kind in ("weight", "bias") else ""
