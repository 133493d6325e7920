"""Whether the models of a merge belong together: configs and tokenizers beside the donor's.

A tensor's name and shape do not say what its numbers mean. Rows of a query are heads of a size that
only the config knows; a rotary base of another value turns the same numbers into another model; the
same row of two embeddings may be of two tokens. So each model is compared with the donor, whose
config and tokenizer the output has:

- another type of model, or another class, is refused unless it is allowed;
- other differences of configs (`config_meaning` says what counts) are warnings, with both values;
- with slices, layers that are merged with each other are compared by what configs say of them;
- tokenizers are compared by id, where embeddings or heads are merged.
"""

from __future__ import annotations

import filecmp
import os

from oxmerge.errors import OxmergeError
from oxmerge.models.config_meaning import Statement, meaning_of, same, types_of
from oxmerge.models.names import is_vocabulary
from oxmerge.models.vocabularies import OPAQUE, compare, folder_beside, vocabularies
from oxmerge.output.config import describe_layers, without_layers
from oxmerge.problems import SHOWN_TENSORS, Problem

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Sequence
    from typing import Any

    from oxmerge.models.inputs import InputModel
    from oxmerge.planning.sections import Section
    from oxmerge.problems import Findings
    from oxmerge.schema import Tensors

__all__ = ["Belonging"]

#: Differences of one model that are spelt out.
_SHOWN = 12
_ALLOW = "if they are known to fit each other, pass `--allow-mismatch` (`allow_mismatch=True`)"
_CHECK = "check that these models were made from one; the output has the donor's value"
#: What configs say of sizes, but for the number of layers.
_SIZES = (
    "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim",
    "num_experts", "moe_intermediate_size",
)  # fmt: skip
_TOKENS = "merge models with one tokenizer; the output has the donor's"


class Belonging:
    """Compares models with the donor, and collects what differs.

    Parameters
    ----------
    donor : InputModel
        The model whose config and tokenizer the output has.
    allow_mismatch : bool
        Whether a model of another type is a warning only.
    findings : Findings
        Takes models of another type, and other differences.
    """

    def __init__(self, donor: InputModel, findings: Findings, *, allow_mismatch: bool) -> None:
        self._findings = findings
        self._donor = donor
        self._allow = allow_mismatch

    def compare_configs(self, models: Sequence[InputModel], sections: Sequence[Section]) -> None:
        """Compare configs, but for what they say of single layers that slices move."""
        prefixes = {section.donor.stack.prefix for section in sections if section.donor.stack}
        for model in models:
            if model is not self._donor and model.config and self._donor.config:
                self._compare_types(model)
                self._compare_keys(model, prefixes)

    def fold_sizes(self, models: Sequence[InputModel]) -> None:
        """Make one problem of all unequal shapes of a model whose config has other sizes."""
        problems = self._findings.problems
        for model in models:
            ours, theirs = (_sizes(each) for each in (self._donor, model))
            differing = [key for key in ours if key in theirs and ours[key] != theirs[key]]
            files = {model.path, *model.paths}
            folded = [
                problem
                for problem in problems
                if problem.code in {"layer-count", "tensor-shape"} and problem.file in files
            ]
            if not folded or not any(key in _SIZES for key in differing):
                continue
            tensors = [problem.tensor for problem in folded if problem.tensor is not None]
            problem = Problem(
                "other-size",
                f"`{model.reference}` has other sizes than the donor `{self._donor.reference}`",
                file=_config_path(model),
                expected=", ".join(f"`{key}` {ours[key]}" for key in differing),
                found=", ".join(f"{theirs[key]}" for key in differing),
                advice="use models of one architecture and size",
                tensors=tuple(tensors[:SHOWN_TENSORS]),
                count=max(1, len(tensors)),
            )
            gone = set(map(id, folded))
            problems[:] = [each for each in problems if id(each) not in gone] + [problem]

    def compare_layers(self, sections: Sequence[Section]) -> None:
        """Compare what configs say of layers that are merged with each other."""
        for section in sections:
            first = section.donor
            for source in section.sources:
                model = source.model
                if source is not first and source.stack and first.stack:
                    theirs = describe_layers(model.config, source.stack)
                    ours = describe_layers(first.model.config, first.stack)
                    fitting = min(
                        section.length,
                        source.stack.depth - source.start,
                        first.stack.depth - first.start,
                    )
                    pairs = [(first.start + at, source.start + at) for at in range(fitting)]
                    self._compare_kinds(
                        section, model, [(n, m, ours(n), theirs(m)) for n, m in pairs]
                    )

    def compare_tokenizers(self, models: Sequence[InputModel], tensors: Tensors) -> None:
        """Compare the tokens of models whose embeddings or heads are in the output."""
        named = [at for at, name in enumerate(tensors.names) if is_vocabulary(name)]
        rows = [tensor for tensor in map(tensors.__getitem__, named) if len(tensor.shape) > 1]
        used = {source.model for tensor in rows for source in tensor.sources}
        most = max((tensor.shape[0] for tensor in rows), default=0)
        for model in models:
            if model is not self._donor and model.reference in used:
                self._findings.warnings += self._compare_tokens(model, most)

    # Configs.

    def _compare_types(self, model: InputModel) -> None:
        one, other = (each.config.get("model_type") for each in (self._donor, model))
        if one and other and one != other:
            related = types_of(self._donor.config) & types_of(model.config)
            self._differ("model_type", model, f"`{one}`", f"`{other}`", refuse=not related)
            return
        classes, others = (_classes(each.config) for each in (self._donor, model))
        if classes and others and classes.keys().isdisjoint(others):
            expected, found = (_listed(each.values()) for each in (classes, others))
            self._differ("architectures", model, expected, found, refuse=True)

    def _differ(
        self, key: str, model: InputModel, expected: str, found: str, *, refuse: bool
    ) -> None:
        message = f"`{model.reference}` is another kind of model than `{self._donor.reference}`"
        refuse = refuse and not self._allow
        advice = f"merge models of one architecture; {_ALLOW}" if refuse else _CHECK
        problem = Problem(
            "other-architecture",
            f"{message} by `{key}`",
            file=_config_path(model),
            expected=expected,
            found=found,
            advice=advice,
        )
        (self._findings.problems if refuse else self._findings.warnings).append(problem)

    def _compare_keys(self, model: InputModel, moved: Collection[str]) -> None:
        ours, theirs = (_meaning(each, moved) for each in (self._donor, model))
        differing = [
            key
            for key, value in ours.items()
            if key in theirs and not same(value.value, theirs[key].value)
        ]
        for key in differing[:_SHOWN]:
            self._findings.warnings.append(self._key_differs(key, model, ours[key], theirs[key]))
        if len(differing) > _SHOWN:
            names = ", ".join(f"`{key}`" for key in differing[_SHOWN : 2 * _SHOWN])
            more = ", ..." if len(differing) > 2 * _SHOWN else ""
            message = f"`{model.reference}` differs from `{self._donor.reference}` in more keys"
            found, file = f"{len(differing) - _SHOWN}: {names}{more}", _config_path(model)
            problem = Problem("config-differs", message, file=file, found=found, advice=_CHECK)
            self._findings.warnings.append(problem)

    def _key_differs(
        self, key: str, model: InputModel, ours: Statement, theirs: Statement
    ) -> Problem:
        key = ours.key or theirs.key or key
        message = f"`{model.reference}` differs from `{self._donor.reference}` in `{key}`"
        one, other = ours.value, theirs.value
        at = _first_difference(one, other)
        if at is not None:
            message = message[:-1] + f"[{at}]`"
            ours, theirs = Statement(one[at]), Statement(other[at])
        return Problem(
            "config-differs",
            message,
            file=_config_path(model),
            expected=str(ours),
            found=str(theirs),
            advice=_CHECK,
        )

    def _compare_kinds(
        self,
        section: Section,
        model: InputModel,
        pairs: Sequence[tuple[int, int, dict[str, object], dict[str, object]]],
    ) -> None:
        told: set[str] = set()
        for layer, other, ours, theirs in pairs:
            for key, kind in ours.items():
                if key in told or key not in theirs or same(kind, theirs[key]):
                    continue
                told.add(key)
                message = (
                    f"layer {other} of `{model.reference}` is merged with layer {layer} of "
                    f"`{section.donor.model.reference}`, and is of another kind by `{key}`"
                )
                advice = "choose ranges in which layers of one kind meet"
                self._findings.warnings.append(
                    Problem(
                        "config-differs",
                        message,
                        section.where,
                        expected=str(Statement(kind)),
                        found=str(Statement(theirs[key])),
                        advice=advice,
                    )
                )

    # Tokenizers.

    def _compare_tokens(self, model: InputModel, rows: int) -> Iterator[Problem]:
        ours, theirs = (each.tokenizer_folder for each in (self._donor, model))
        names = f"`{model.reference}` and `{self._donor.reference}`"
        found = vocabularies(ours, theirs)
        if found is None:
            yield from _compare_opaque(names, ours, theirs)
            return
        one, other = found
        try:
            difference = compare(one, other, rows)
        except (OxmergeError, OSError) as error:
            yield _not_compared(names, error, other[0])
            return
        if difference is None:
            return
        (lacking, lacked), examples = difference["lacking"], difference["examples"]
        if difference["differing"]:
            shown = ", ".join(
                f"{at} is `{first}` in the donor and `{second}` here"
                for at, first, second in examples
                if first is not None and second is not None
            )
            message = f"{names} have other tokens for the same ids, which are the same rows"
            count = f"{difference['differing']} of {difference['shared']}: {shown}"
            yield Problem("tokenizer-differs", message, file=other[0], found=count, advice=_TOKENS)
        if lacking or lacked:
            alone = [each for each in examples if each[1] is None or each[2] is None]
            shown = ", ".join(
                f"{at} is `{first}` in the donor" if second is None else f"{at} is `{second}` here"
                for at, first, second in alone
            )
            message = f"{names} do not have tokens for the same ids"
            count = f"{lacking} only in the donor, {lacked} only here: {shown}"
            yield Problem("tokenizer-differs", message, file=other[0], found=count, advice=_TOKENS)


def _meaning(model: InputModel, moved: Collection[str]) -> dict[str, Statement]:
    config = model.config
    for prefix in moved:
        stack = model.layout.stacks.get(prefix)
        config = config if stack is None else without_layers(config, stack.depth)
    return meaning_of(config)


def _sizes(model: InputModel) -> dict[str, int]:
    """Return the sizes that a model's config states, its number of layers among them."""
    said = {key: value.value for key, value in meaning_of(model.config).items()}
    sizes = {key: said[key] for key in _SIZES if type(said.get(key)) is int}
    return sizes | ({} if model.stack is None else {"num_hidden_layers": model.stack.depth})


def _classes(config: dict[str, Any]) -> dict[str, str]:
    """Return the classes that a config names; `LLaMAForCausalLM` is an old spelling of one."""
    listed = config.get("architectures")
    names = listed if isinstance(listed, list) else []
    return {name.casefold(): name for name in names if isinstance(name, str)}


def _listed(names: Any) -> str:  # noqa: ANN401
    return ", ".join(f"`{name}`" for name in names)


def _first_difference(one: Any, other: Any) -> int | None:  # noqa: ANN401
    if isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        pairs = zip(one, other, strict=True)
        return next((at for at, (a, b) in enumerate(pairs) if not same(a, b)), None)
    return None


def _config_path(model: InputModel) -> str:
    return os.path.join(folder_beside(model.path), "config.json")


def _compare_opaque(names: str, one: str, other: str) -> Iterator[Problem]:
    for name in OPAQUE:
        ours, theirs = os.path.join(one, name), os.path.join(other, name)
        if os.path.isfile(ours) and os.path.isfile(theirs):
            try:
                equal = filecmp.cmp(ours, theirs, shallow=False)
            except OSError as error:
                yield _not_compared(names, error, theirs)
                return
            if not equal:
                message = f"{names} have other tokenizers, whose tokens cannot be compared"
                advice = f"{_TOKENS}; with a `tokenizer.json` beside each, tokens are compared"
                yield Problem("tokenizer-differs", message, file=theirs, advice=advice)
            return


def _not_compared(names: str, error: Exception, file: str) -> Problem:
    message = f"the tokenizers of {names} cannot be compared"
    if isinstance(error, OxmergeError):
        story = error.as_problem()
        reason = story.message if story.found is None else f"{story.message}: {story.found}"
        return Problem("unreadable-config", message, file=story.file or file, found=reason)
    # Without the path, which stands beside it.
    number = error.errno if isinstance(error, OSError) else None
    reason = str(error) if number is None else os.strerror(number).lower()
    return Problem("unreadable-config", message, file=file, found=reason)
