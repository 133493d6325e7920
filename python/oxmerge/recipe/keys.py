"""Keys of a recipe: each is read, without effect, or unknown.

A key that the dialect does not know is a problem with a suggestion. One that it knows, but that has
no effect where it stands, is a warning that says where it would act.
"""

from __future__ import annotations

from collections.abc import Mapping
from reprlib import Repr

from oxmerge.methods import DIALECT_PARAMETERS, IDLE_PARAMETERS
from oxmerge.problems import Place, Problem, did_you_mean, near, shorten
from oxmerge.recipe.yaml_faults import explain_slip

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, TypeGuard

    from oxmerge.problems import Findings

__all__ = [
    "EXTENSION_KEYS",
    "KeyReader",
    "at_item",
    "at_key",
    "is_mapping",
    "show",
    "show_key",
    "without_effect",
]

#: Letters of a value that a message shows.
_SHOWN = 60
#: From how much of a key on it is a slip for another, of 1: one letter of five may be another.
_SLIP = 0.8
#: Stands for a value that a message has no need of.
_UNSAID = object()

#: Every key of the dialect, and where it acts.
_ACTS_IN = {
    "merge_method": "at the top level",
    "models": "at the top level",
    "slices": "at the top level",
    "modules": "at the top level",
    "base_model": "at the top level or in a slice",
    "dtype": "at the top level",
    "out_dtype": "at the top level",
    "parameters": "at the top level, in a slice, a model or a source",
    "tokenizer": "at the top level",
    "tokenizer_source": "at the top level",
    "chat_template": "at the top level",
    "oxmerge": "at the top level",
    "tokens": "in `tokenizer`",
    "pad_to_multiple_of": "in `tokenizer`",
    "sources": "in a slice",
    "model": "in an entry of `models` or `sources`",
    "layer_range": "in a source of a slice",
    "filter": "in a conditional value",
    "value": "in a conditional value",
}
#: The keys under `oxmerge`.
EXTENSION_KEYS = frozenset(("keep", "on_mismatch", "layer_scale", "rename"))
_NEVER_ACTS = {
    "residual_weight": "it is part of the dialect, but nothing ever used it",
    "name": "it names one merge of several in one file",
    "override_architecture": "names and shapes come from the files, not from an architecture",
    "int8_mask": "it saves memory in other tools, and may be left out",
    **IDLE_PARAMETERS,
    # Options of mergekit's command line, which does not read them here either.
    "random_seed": "pass `--seed`",
    "seed": "pass `--seed`",
    "device": "pass `--device`",
    "num_threads": "pass `--threads`",
    "out_shard_size": "pass `--shard-size`",
    "allow_crimes": "pass `--allow-mismatch`",
    "copy_tokenizer": "the donor's tokenizer is copied",
    "trust_remote_code": "no code of a model is run",
    "lazy_unpickle": "tensors are read as they are needed",
    "low_cpu_memory": "pass `--memory`",
    "cuda": "pass `--device cuda`",
    "write_model_card": "a model card is written",
    # Where notebooks and scripts around mergekit keep what they pass to it.
    **dict.fromkeys(
        (
            "output",
            "output_dir",
            "output_path",
            "out_path",
            "save_path",
            "output_model",
            "model_name",
        ),
        "the command names the output: `oxmerge merge recipe.yml merged/`",
    ),
}
#: Keys that belong to what stands beside them.
_BELONGS = {
    "revision": "put it behind the name of the model: `model: path@revision`",
    "lora": "put it behind the name of the model: `model: path+lora`",
}


def at_key(place: Place, mapping: object, key: object) -> Place:
    """Return the place of a key of the mapping that stands at a place."""
    line, column = getattr(mapping, "marks", {}).get(key, (place.line, place.column))
    name = show_key(key)
    return Place(f"{place.path}.{name}" if place.path else name, line, column, place.file)


def at_item(place: Place, listed: object, index: int) -> Place:
    """Return the place of an item of the list that stands at a place."""
    marks = getattr(listed, "marks", ())
    line, column = marks[index] if index < len(marks) else (place.line, place.column)
    return Place(f"{place.path}[{index}]", line, column, place.file)


class KeyReader:
    """Checks the keys of mappings.

    Parameters
    ----------
    findings : Findings
        Takes what is wrong with them.
    """

    def __init__(self, findings: Findings) -> None:
        self.findings = findings

    def fault(
        self,
        place: Place,
        message: str,
        *,
        code: str = "wrong-value",
        found: object = _UNSAID,
        advice: str | None,
    ) -> None:
        """Take down that something at a place is wrong; `found` None says that nothing is there."""
        text = None
        if found is not _UNSAID:
            text = "nothing" if found is None else show(found)
        self.findings.problems.append(Problem(code, message, place, found=text, advice=advice))

    def check_mapping(
        self, raw: object, place: Place, known: frozenset[str]
    ) -> TypeGuard[Mapping[str, object]]:
        """Tell whether `raw` is a mapping, and check its keys if it is."""
        if not is_mapping(raw):
            message, advice = "a mapping of keys to values is needed here", "write `key: value`"
            if isinstance(raw, str) and "model" in known:
                advice = f"write `model: {shorten(raw)}`"
            elif raw is None and "model" in known:
                advice = "write `model: path` behind the dash, or take it out"
            self.fault(place, message, found=raw, advice=advice)
            return False
        self.check_keys(raw, place, known)
        return True

    def check_keys(
        self,
        raw: Mapping[str, object],
        place: Place,
        known: frozenset[str],
    ) -> None:
        """Check each key that is not read."""
        for key in raw:
            if key in known:
                continue
            if not _is_own(key, raw, known):
                self.check_key(key, at_key(place, raw, key), known)
            elif not getattr(raw, "own", {})[key]:
                message = f"no alias refers to what stands under `{show_key(key)}`"
                self.no_effect(at_key(place, raw, key), message, "take it out")

    def check_key(self, key: object, place: Place, known: frozenset[str]) -> None:
        """Sort a key that is not read here: without effect, or unknown."""
        idle = without_effect(key)
        if idle is not None:
            self.no_effect(place, *idle)
        else:
            name = show_key(key)
            correction = _correction(name, known)
            keys = ", ".join(f"`{each}`" for each in sorted(known))
            advice = correction or f"known here: {keys}"
            self.findings.unknown(
                Problem("unknown-key", f"unknown key `{name}`", place, advice=advice),
                is_corrected=correction is not None,
            )

    def is_misspelt(self, raw: Mapping[str, object], key: str, known: frozenset[str]) -> bool:
        """Tell whether a key is not there, but one that is reported was probably meant to be it.

        Then it would be one fault told twice to say that it is missing.
        """
        if self.findings.ignore_unknown or raw.get(key) is not None:
            return False
        others = known | _NEVER_ACTS.keys() | _ACTS_IN.keys()
        unknown = (each for each in raw if isinstance(each, str) and each not in others)
        return any(
            near(each, known, 1) == [key] and not _is_own(each, raw, known) for each in unknown
        )

    def no_effect(self, place: Place, message: str, advice: str) -> None:
        """Take down that something at a place has no effect."""
        self.findings.warnings.append(Problem("no-effect", message, place, advice=advice))


def without_effect(key: object) -> tuple[str, str] | None:
    """Return that a known key has no effect where it is not read, and why; None for others."""
    if key in _NEVER_ACTS:
        return f"`{key}` has no effect", _NEVER_ACTS[str(key)]
    if key in _ACTS_IN:
        return f"`{key}` has no effect here", f"it acts {_ACTS_IN[str(key)]}"
    return None


def _is_own(key: object, raw: Mapping[str, object], known: frozenset[str]) -> bool:
    """Tell whether a key is the recipe's own: what stands there is for aliases to refer to.

    It is not if it looks like a slip for one that is missing. What begins with `x-` is none.
    """
    if key not in getattr(raw, "own", {}):
        return False
    if str(key).startswith("x-"):
        return True
    from difflib import get_close_matches  # noqa: PLC0415 - few recipes need it

    word = str(key).casefold()
    return not get_close_matches(word, known - raw.keys(), n=1, cutoff=_SLIP)


def _correction(key: str, known: frozenset[str]) -> str | None:
    """Return what the key was probably meant to be; None if nothing is like it."""
    slip = explain_slip(key)
    if slip is not None:
        return f"it has {slip[0]}: {slip[1]}"
    if key in DIALECT_PARAMETERS and "parameters" in known:
        return "put it under `parameters`"
    if key in EXTENSION_KEYS:
        return "put it under `oxmerge` at the top level"
    if key in _BELONGS and "model" in known:
        return _BELONGS[key]
    return did_you_mean(key, known)


def is_mapping(value: object) -> TypeGuard[Mapping[str, object]]:
    """Tell whether a value is a mapping."""
    return isinstance(value, Mapping)


def show(value: object) -> str:
    """Return a value as messages show it, cut to a line's worth, however much it holds."""
    if isinstance(value, str):
        return repr(shorten(value, _SHOWN))
    if isinstance(value, Mapping):
        return "a mapping"
    text = _Shown().repr(value)
    return text if len(text) <= _SHOWN else text[: _SHOWN - 3] + "..."


def show_key(key: object) -> str:
    """Return a key as places and messages show it."""
    return shorten(key, _SHOWN) if isinstance(key, str) else show(key)


class _Shown(Repr):
    """The beginning of a value, of which no more is looked at than is shown."""

    def __init__(self) -> None:
        super().__init__()
        self.maxlevel = 3
        self.maxstring = self.maxother = _SHOWN

    def repr1(self, x: Any, level: int) -> str:  # noqa: ANN401 - any value at all
        return "{...}" if isinstance(x, Mapping) else super().repr1(x, level)

    def repr_int(self, x: int, level: int) -> str:  # noqa: ARG002 - of the base class
        many = x.bit_length() > 4 * _SHOWN
        return f"a number of {int(x.bit_length() * 0.30103)} digits" if many else repr(x)
