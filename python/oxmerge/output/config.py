"""The `config.json` of a merged model: the donor's, with the few values that the merge changes.

Three things can change: the element type, the number of layers, and what the config says about
each layer. Only the keys that say so are edited, where the donor has them and as it spells them;
all others, known or not, keep their values and their order.

What a config says about each layer comes in two forms:

- a *list* of what each layer is (`layer_lists` knows how), rebuilt from the layers' own configs;
- a *rule over positions* (`first_k_dense_replace`), which cannot follow a layer that moves. Each
  known rule is evaluated for every output layer and compared with what it said of the layer at
  its old place; an unknown one is accepted when all layers keep their place in its period.

What does not fit, or is about layers and not understood, is an error: the output would load and
compute something else.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from oxmerge.errors import PlanError
from oxmerge.models.config_meaning import is_language_config, is_model_config
from oxmerge.models.layer_lists import DEPTH_KEYS, extra_layers, numbers_layers, read_form, values
from oxmerge.models.modules import kind_of
from oxmerge.output.position_rules import RULE_KEYS, RULES, Rule, unknown_counts, unknown_rules
from oxmerge.problems import Problem
from oxmerge.schema import DTYPE_NAMES

TYPE_CHECKING = False
if TYPE_CHECKING:
    from oxmerge.models.layer_lists import Form
    from oxmerge.models.names import Stack

Config = Mapping[str, Any]
Path = tuple[str, ...]

# Looked at where none of those fits.
_RARE_DEPTH_KEYS = (
    "num_decoder_layers", "decoder_layers", "num_encoder_layers", "encoder_layers", "num_layer",
    "num_blocks", "n_blocks", "num_hidden_blocks", "depth",
)  # fmt: skip
# Found beside one of those, they say the same again.
_SECOND_DEPTH_KEYS = ("num_layer", "num_blocks", "n_blocks", "num_hidden_blocks")
# Keys of rules that say something of the whole model too.
_MEANT_FOR_ALL = frozenset((
    "hidden_size_per_layer_input", "num_mem_blocks", "scale_attn_by_inverse_layer_idx",
    "scale_depth",
))  # fmt: skip
_DTYPE_KEYS = ("torch_dtype", "dtype")


def edit_config(
    donor_config: Config,
    *,
    dtype: str | None = None,
    stacks: Sequence[Restacked] = (),
    writes_head: bool = False,
) -> tuple[dict[str, Any], list[str]]:
    """Return the output's config, and a note on each change.

    Parameters
    ----------
    donor_config
        The parsed `config.json` of the model whose names and side files the output takes.
    dtype
        The element type of the output's float tensors (`bfloat16` or `BF16`), or None to leave
        the donor's word. Written to every `torch_dtype` or `dtype` that the donor has, in nested
        model configs too; if it has none, `torch_dtype` is appended, which all versions read.
    stacks
        What becomes of each of the donor's stacks; empty when the recipe has no slices.
    writes_head
        Whether the output has an output head tensor of its own.

    Returns
    -------
    tuple
        The config as a new dictionary, and the notes.

    Raises
    ------
    PlanError
        With every layer list that cannot be rebuilt and every position rule that no longer fits.
    """
    edit = _Edit(copy.deepcopy(dict(donor_config)))
    if dtype is not None:
        _edit_dtype(edit, DTYPE_NAMES.get(dtype, dtype))
    for restacked in stacks:
        _edit_layers(edit, donor_config, restacked, stacks)
    if writes_head and says_tied(edit.config):
        edit.notes.append(
            "the donor's config says `tie_word_embeddings: true`: readers that tie will use the "
            "input embedding and ignore the output head that is written"
        )
    if edit.problems:
        raise _misfit(edit.problems)
    return edit.config, edit.notes


def describe_layers(config: Config, stack: Stack) -> Callable[[int], dict[str, object]]:
    """Return a function from a layer of a stack to what a config says of it, by key."""
    depth = stack.depth
    try:
        scopes = _scopes(config, stack)
    except PlanError:
        scopes = []
    inners = [_dig(config, scope) for scope in scopes]
    forms = {
        ".".join((*scope, *path)): form
        for scope, inner in zip(scopes, inners, strict=True)
        for path, value in values(inner)
        if (form := read_form(path[-1], value, depth, extra_layers(inner))) is not None
    }
    rules = [(rule, inner) for inner in inners for rule in RULES if rule.stands_in(inner)]

    def describe(layer: int) -> dict[str, object]:
        said = {name: form.says(layer) for name, form in forms.items()}
        return said | {", ".join(rule.keys): rule.kind(inner, layer) for rule, inner in rules}

    return describe


def without_layers(config: Config, depth: int) -> dict[str, Any]:
    """Return a config of that depth without what it says of single layers."""
    kept: dict[str, Any] = {}
    for key, value in config.items():
        is_rule = key in RULE_KEYS - _MEANT_FOR_ALL
        if not is_rule and read_form(key, value, depth, extra_layers(config)) is None:
            kept[key] = without_layers(value, depth) if isinstance(value, dict) else value
    return kept


def json_text(value: Config) -> str:
    """Return a config or a report as it is written to disk: indented, in UTF-8, a last newline."""
    text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
    try:
        text.encode()
    except UnicodeEncodeError:
        # A lone surrogate, as of a path that is no UTF-8; legal in JSON as an escape only.
        return json.dumps(value, indent=2) + "\n"
    return text


def _misfit(problems: Sequence[Problem]) -> PlanError:
    return PlanError("the config cannot follow the layers", problems=problems)


@dataclass(frozen=True, slots=True)
class Restacked:
    """What becomes of a stack of the donor's.

    Attributes
    ----------
    stack
        The stack as the donor has it.
    layer_map
        For each output layer, the config of the model it comes from and its number there; None
        where no slices are taken of it.
    """

    stack: Stack
    layer_map: Sequence[tuple[Config, int]] | None

    @property
    def depth(self) -> int:
        """How many layers it has in the output."""
        return self.stack.depth if self.layer_map is None else len(self.layer_map)


@dataclass
class _Edit:
    config: dict[str, Any]
    notes: list[str] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)

    def problem(self, message: str, advice: str | None = None) -> None:
        """Record a reason why there can be no config."""
        self.problems.append(Problem("config-layers", message, file="config.json", advice=advice))

    def set(self, path: Path, value: Any) -> None:  # noqa: ANN401
        """Put `value` at `path`, noting the change if it is one."""
        parent = _dig(self.config, path[:-1])
        old = parent.get(path[-1])
        if old == value and type(old) is type(value):
            return
        parent[path[-1]] = value
        self.notes.append(_describe_change(path, old, value))


def _describe_change(path: Path, old: object, new: object) -> str:
    name = ".".join(path)
    if isinstance(old, list) and isinstance(new, list):
        return f"`{name}` follows the layers: {len(old)} entries became {len(new)}"
    return f"`{name}`: {_short(old)} became {_short(new)}"


def _short(value: object) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 40 else text[:37] + "..."  # noqa: PLR2004


def _dig(config: Config, path: Path) -> Any:  # noqa: ANN401
    """Return the value at `path`, or None."""
    value: Any = config
    for key in path:
        if not isinstance(value, Mapping):
            return None
        value = value.get(key)
    return value


def _nested_configs(config: Config, path: Path = ()) -> Iterator[tuple[Path, Config]]:
    """Yield `config` and the model configs inside it, outermost first."""
    yield path, config
    for key, value in config.items():
        if is_model_config(key) and isinstance(value, Mapping):
            yield from _nested_configs(value, (*path, key))


def says_tied(config: Config) -> bool:
    """Tell whether a config, or a model config inside it, ties the head to the embedding."""
    return any(inner.get("tie_word_embeddings") is True for _, inner in _nested_configs(config))


def _edit_dtype(edit: _Edit, dtype: str) -> None:
    found = [
        (*path, key)
        for path, inner in _nested_configs(edit.config)
        for key in _DTYPE_KEYS
        if key in inner
    ]
    for path in found or [("torch_dtype",)]:
        edit.set(path, dtype)


def _edit_layers(
    edit: _Edit, donor: Config, restacked: Restacked, stacks: Sequence[Restacked]
) -> None:
    layer_map, depth = restacked.layer_map, restacked.stack.depth
    if layer_map is None:
        return
    unchanged = len(layer_map) == depth and all(
        layer == position and config == donor for position, (config, layer) in enumerate(layer_map)
    )
    if unchanged:
        return
    scopes = _scopes(donor, restacked.stack)
    if not scopes:
        edit.problem(
            f"the donor's config names no layer count of {depth} "
            f"({', '.join(DEPTH_KEYS)}), so its depth cannot be changed",
            advice="give the donor a config that counts its layers",
        )
        return
    for path in scopes:
        restack = _Restack(edit, donor, layer_map, restacked.stack, path)
        restack.run(_others_in(path, donor, restacked, stacks))


def _others_in(
    path: Path, donor: Config, restacked: Restacked, stacks: Sequence[Restacked]
) -> dict[str, Restacked]:
    """Return which other stacks a nested config counts too, by the keys that count them."""
    found: dict[str, Restacked] = {}
    for other in stacks:
        if other is not restacked and path in _scopes(donor, other.stack):
            found |= dict.fromkeys(_depth_keys(_dig(donor, path), other.stack), other)
    return found


def _scopes(config: Config, stack: Stack) -> list[Path]:
    """Find the nested configs with the stack's layer count.

    Those of its kind go before others: of language, unless its name tells what it sees or hears.
    """
    depth = stack.depth
    found = [path for path, inner in _nested_configs(config) if _depth_keys(inner, stack)]
    language = [path for path in found if all(map(is_language_config, path))]
    kind = kind_of(stack.prefix)
    if kind is not None:
        own = [path for path in found if kind_of(".".join(path)) is kind]
        language = own or [path for path in language if kind_of(".".join(path)) is None]
    if language or len(found) <= 1:
        return language or found
    names = ", ".join(f"`{'.'.join(path)}`" for path in found)
    message = f"several nested configs have {depth} layers, and it is not clear which is meant"
    advice = "merge whole models with `models`"
    raise _misfit(
        [Problem("config-layers", message, file="config.json", found=names, advice=advice)]
    )


def _depth_keys(config: Config, stack: Stack) -> list[str]:
    """Return the keys that count the layers of a stack."""
    common, rare = (
        [key for key in keys if type(config.get(key)) is int and config[key] == stack.depth]
        for keys in (DEPTH_KEYS, _RARE_DEPTH_KEYS)
    )
    own = [key for key in rare if _half(key.split("_")) == _half(stack.prefix.split("."))]
    if _half(stack.prefix.split(".")) is None:
        return common or rare
    # An encoder is also what keys count that name neither half.
    if "encoder" in stack.prefix.split("."):
        return [*common, *own] or rare
    return own or common


def _half(words: Sequence[str]) -> str | None:
    """Return which half of a model a name is of, where there are two."""
    return next((word for word in ("encoder", "decoder") if word in words), None)


@dataclass
class _Restack:
    """Rebuilds one (nested) config for new layers."""

    edit: _Edit
    donor: Config
    layer_map: Sequence[tuple[Config, int]]
    stack: Stack
    scope: Path
    followed: set[str] = field(default_factory=set)

    @property
    def depth(self) -> int:
        return self.stack.depth

    def run(self, others: Mapping[str, Restacked]) -> None:
        """Rebuild it; `others` are stacks that it counts too, by key."""
        inner = _dig(self.donor, self.scope)
        for key in dict.fromkeys((*_depth_keys(inner, self.stack), *_SECOND_DEPTH_KEYS)):
            if inner.get(key) == self.depth:
                if key in others and others[key].depth != len(self.layer_map):
                    self._counts_both(key, others[key])
                self.edit.set((*self.scope, key), len(self.layer_map))
        for path, value in values(inner):
            self._rebuild(path, value)
        self._note_lists_of_others()
        self._check_rules()

    def _rebuild(self, path: Path, value: object) -> None:
        key, whole = path[-1], (*self.scope, *path)
        form = read_form(key, value, self.depth, extra_layers(_dig(self.donor, self.scope)))
        if form is None:
            if numbers_layers(key, value) and key not in RULE_KEYS:
                self._not_understood(whole)
            return
        said = []
        configs = {id(config): config for config, _ in self.layer_map}
        forms = {each: self._form_in(config, path) for each, config in configs.items()}
        for position, (config, layer) in enumerate(self.layer_map):
            theirs = forms[id(config)]
            if theirs is None or theirs.kind != form.kind:
                self._cannot_follow(whole, position, layer)
                return
            said.append(theirs.says(layer))
        followed = form.follow(said, self.layer_map)
        if followed is None:
            self._torn_apart(whole)
        else:
            self.edit.set(whole, followed)
            self.followed.add(key)

    def _form_in(self, config: Config, path: Path) -> Form | None:
        """Return the form of a list in the config of a source."""
        inner, depth = _dig(config, self.scope), self._source_depth(config)
        if depth is None:
            return None
        return read_form(path[-1], _dig(inner, path), depth, extra_layers(inner))

    def _source_depth(self, config: Config) -> int | None:
        """Return the layer count of a source, under the keys that hold the donor's."""
        for key in _depth_keys(_dig(self.donor, self.scope), self.stack):
            count = _dig(config, (*self.scope, key))
            if isinstance(count, int):
                return count
        return None

    def _counts_both(self, key: str, other: Restacked) -> None:
        self.edit.problem(
            f"`{'.'.join((*self.scope, key))}` counts the layers of `{self.stack.prefix}` and of "
            f"`{other.stack.prefix}`, which would have {len(self.layer_map)} and {other.depth}",
            advice="choose slices that leave both with equally many layers",
        )

    def _cannot_follow(self, path: Path, position: int, layer: int) -> None:
        self.edit.problem(
            f"`{'.'.join(path)}` speaks of each layer, but the config of the model that output "
            f"layer {position} comes from does not speak so of its layer {layer}",
            advice="stack models whose configs have the same lists",
        )

    def _not_understood(self, path: Path) -> None:
        self.edit.problem(
            f"`{'.'.join(path)}` seems to be about single layers, and oxmerge does not know how",
            advice="keep all layers in their places, or take the key out of the donor's config if "
            "it has no effect",
        )

    def _torn_apart(self, path: Path) -> None:
        self.edit.problem(
            f"`{'.'.join(path)}` joins layers, and some are no longer where they were beside the "
            "layer whose keys and values they use",
            advice="choose slices that keep such layers together",
        )

    def _note_lists_of_others(self) -> None:
        """Point at per-layer lists that sources have and the donor lacks."""
        seen: set[Path] = set()
        for config in {id(config): config for config, _ in self.layer_map}.values():
            inner, depth = _dig(config, self.scope), self._source_depth(config)
            if not isinstance(inner, Mapping) or depth is None:
                continue
            seen.update(p for p, value in values(inner) if self._form_in(config, p) is not None)
        missing = sorted(p for p in seen if _dig(self.donor, (*self.scope, *p)) is None)
        self.edit.notes.extend(
            f"`{'.'.join((*self.scope, *path))}` of a source is left out: "
            "the donor's config does not have it"
            for path in missing
        )

    def _check_rules(self) -> None:
        output = _dig(self.edit.config, self.scope)
        sources = [(_dig(config, self.scope) or {}, layer) for config, layer in self.layer_map]
        for rule in RULES:
            inners = [output, *(inner for inner, _ in sources)]
            if not any(rule.stands_in(inner) for inner in inners):
                self._note_unread(rule, output, sources)
                continue
            moved = [
                (position, layer, rule.kind(output, position), rule.kind(inner, layer))
                for position, (inner, layer) in enumerate(sources)
            ]
            self._report(rule.keys, [entry for entry in moved if entry[2] != entry[3]])
        for key, value in unknown_rules(output):
            if key not in self.followed:
                self._check_unknown(key, value, sources)
        for key, value in unknown_counts(_dig(self.donor, self.scope), self.depth):
            self.edit.problem(
                f"`{key}: {value}` seems to tie a layer's kind to its position, and oxmerge does "
                "not know how",
                advice="keep all layers in their places, or take the key out of the donor's config "
                "if it has no effect",
            )

    def _note_unread(
        self, rule: Rule, output: Config, sources: Sequence[tuple[Config, int]]
    ) -> None:
        """Tell of a rule that a list stands in for, if the rule alone would say something else."""
        alone = replace(rule, replaced_by=None)
        keys = [key for key in rule.keys if key in RULE_KEYS and output.get(key) is not None]
        if keys and any(
            alone.kind(output, position) != alone.kind(inner, layer)
            for position, (inner, layer) in enumerate(sources)
        ):
            names = ", ".join(f"`{key}`" for key in keys)
            self.edit.notes.append(
                f"{names} no longer tells the kinds of the layers: `{rule.replaced_by}` does, and "
                "readers that do not look at it would take layers for others"
            )

    def _report(self, keys: Sequence[str], misfits: list[tuple[int, int, object, object]]) -> None:
        if not misfits:
            return
        position, layer, there, here = misfits[0]
        names = ", ".join(f"`{key}`" for key in keys)
        more = f" (and {len(misfits) - 1} more)" if len(misfits) > 1 else ""
        self.edit.problem(
            f"by {names} output layer {position} would be read as {there}, but it was {here} as "
            f"layer {layer} of its model{more}",
            advice="choose slices in which every layer keeps its kind",
        )

    def _check_unknown(
        self, key: str, value: int | str, sources: Sequence[tuple[Config, int]]
    ) -> None:
        period = len(value) if isinstance(value, str) else value
        fits = all(
            inner.get(key) == value and layer % period == position % period
            for position, (inner, layer) in enumerate(sources)
        )
        if not fits:
            self.edit.problem(
                f"`{key}: {_short(value)}` seems to tie a layer's kind to its position, and "
                "oxmerge does not know how",
                advice=f"use slices that move layers by multiples of {period} only, or take the "
                "key out of the donor's config if it has no effect",
            )
