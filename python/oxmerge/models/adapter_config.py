"""The `adapter_config.json` of PEFT: what an adapter is, and the scale of each of its modules."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field
from glob import escape, iglob
from itertools import islice
from math import sqrt

from oxmerge.file_state import FileState
from oxmerge.json_files import read_json
from oxmerge.problems import UNSUPPORTED, Problem, shorten

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from typing import Any

    from oxmerge.problems import Findings

__all__ = ["AdapterConfig", "endings", "read_adapter_config"]

FILE_NAME = "adapter_config.json"

#: Types of adapters: products, and rows of embeddings alone.
_KINDS = ("LORA", "TRAINABLE_TOKENS")
#: Ways of starting that change the base: the adapter is the difference from what it became.
_CHANGED_BASE = ("pissa", "olora", "corda", "lora_ga", "loftq")
#: Ways that do not.
_KEPT_BASE = ("true", "false", "gaussian", "eva", "orthogonal", "mica")
#: Variants that are no sum of products over the base, by the key that turns them on.
_VARIANTS = {
    "use_bdlora": "BD-LoRA",
    "kasa_config": "KaSA",
    "alora_invocation_tokens": "activated LoRA",
    "arrow_config": "Arrow",
    "use_qalora": "QALoRA",
    "monteclora_config": "MonteCLoRA",
    "megatron_config": "LoRA that Megatron has split",
    "layer_replication": "replicated layers",
}
#: Keys that say how to train, or are read here.
_KNOWN = frozenset((
    "alpha_pattern", "auto_mapping", "base_model_name_or_path", "bias", "corda_config",
    "ensure_weight_tying", "eva_config", "exclude_modules", "fan_in_fan_out", "inference_mode",
    "init_lora_weights", "layers_pattern", "layers_to_transform", "loftq_config", "lora_alpha",
    "lora_bias", "lora_dropout", "lora_ga_config", "megatron_core", "modules_to_save",
    "nvfp4_merge_aware", "peft_type", "peft_version", "qalora_group_size", "r", "rank_pattern",
    "revision", "runtime_config", "target_modules", "target_parameters", "task_type",
    "trainable_token_indices", "use_dora", "use_rslora", "velora_config", "lora_B_layout",
    "token_indices", "init_weights", "unsloth_fused_expert_lora", "enable_lora",
    "enable_conv_lora", "merge_weights", *_VARIANTS,
))  # fmt: skip
#: Adapters within a folder that a message shows.
_SHOWN = 8
#: More letters than any pattern of a module has, and more repetitions in one: matching takes time
#: that grows with the length of a name to the power of their number.
_LONGEST_PATTERN = 1000
_MOST_REPEATS = 2
_MOST_GROUPS = 3
#: More parts than the name of any module has.
_MOST_PARTS = 32
#: Beyond that a scale makes every number infinite.
_LARGEST = 1e30
#: Escaped ones too. A question mark behind another repetition is none of its own.
_REPEATS = re.compile(r"[*+{]|(?<![(*+}])\?")
#: A repeated group that has a repetition or branches in it takes exponential time. The flag `x` is
#: refused as it lets blanks stand between a group and its repetition.
_REPEATED_GROUP = re.compile(r"\)[*+{]|\(\?[A-Za-z-]*x")


@dataclass(frozen=True)
class AdapterConfig:
    """What an adapter says of itself.

    Attributes
    ----------
    path : str
        Its file.
    raw : dict
        All of it.
    file : dict
        The file as it was when it was read.
    rank : int
        Of modules for which no pattern says another.
    alpha : float
        Likewise.
    rank_pattern, alpha_pattern : mapping of re.Pattern to float
        What modules whose whole path matches have instead; the first that matches counts.
    rs : bool
        Whether the scale is alpha over the root of the rank.
    """

    path: str
    raw: dict[str, Any]
    file: dict[str, Any]
    rank: int
    alpha: float
    rank_pattern: Mapping[re.Pattern[str], float] = field(default_factory=dict)
    alpha_pattern: Mapping[re.Pattern[str], float] = field(default_factory=dict)
    rs: bool = False

    def rank_of(self, module: str) -> int:
        """Return the rank that a module has to have."""
        return int(_first(self.rank_pattern, module, self.rank))

    def scale_of(self, module: str) -> float:
        """Return what the product of a module's factors is multiplied by."""
        rank = self.rank_of(module)
        return _first(self.alpha_pattern, module, self.alpha) / (sqrt(rank) if self.rs else rank)

    def is_on(self, key: str) -> bool:
        """Tell whether a switch is on."""
        return self.raw.get(key) is True

    @property
    def targets(self) -> list[str]:
        """The parameters that are adapted themselves, not by their modules."""
        listed = self.raw.get("target_parameters")
        return (
            [each for each in listed if isinstance(each, str)] if isinstance(listed, list) else []
        )

    @property
    def version(self) -> tuple[int, int]:
        """The release of PEFT that wrote it; it says so from 0.18 on."""
        found = re.match(r"(\d{1,4})\.(\d{1,4})", str(self.raw.get("peft_version") or ""))
        return (int(found[1]), int(found[2])) if found else (0, 17)

    def token_indices(self, module: str) -> object:
        """Return the rows of an embedding that are trained, as they stand there."""
        said = self.raw.get("trainable_token_indices", self.raw.get("token_indices"))
        if not isinstance(said, dict):
            return said
        return next((said[name] for name in endings(module) if name in said), None)

    def steps_at_most(self, letters: int) -> int:
        """Return how many steps all patterns may take for a name of so many letters."""
        patterns = (*self.rank_pattern, *self.alpha_pattern)
        return sum(letters ** len(_REPEATS.findall(each.pattern)) for each in patterns)


def endings(name: str) -> Iterator[str]:
    """Yield a name, and what is left of it without its first parts, of those that any name has.

    Examples
    --------
    >>> list(endings("mlp.experts.down_proj"))
    ['mlp.experts.down_proj', 'experts.down_proj', 'down_proj']
    """
    parts = name.split(".", _MOST_PARTS)
    return (".".join(parts[at:]) for at in range(len(parts)))


def _first(patterns: Mapping[re.Pattern[str], float], module: str, otherwise: float) -> float:
    return next((n for each, n in patterns.items() if each.match(module)), otherwise)


def read_adapter_config(folder: str, findings: Findings) -> AdapterConfig | None:
    """Return the config of an adapter, or None after reporting why it cannot be used.

    Parameters
    ----------
    folder : str
        Where the adapter lies.
    findings : Findings
        Takes what is wrong with it, all at once, and keys that nobody knows.
    """
    path = os.path.join(folder, FILE_NAME)
    try:
        raw, status = read_json(path)
    except (OSError, ValueError) as error:
        reason = os.strerror(error.errno) if isinstance(error, OSError) and error.errno else error
        advice = "an adapter is a folder that PEFT saved; a model of its own is listed by itself"
        if within := sorted(islice(iglob(os.path.join(escape(folder), "*", FILE_NAME)), _SHOWN)):
            names = (shorten(os.path.basename(os.path.dirname(each))) for each in within)
            advice = f"name one of the adapters in it: {', '.join(f'`{name}`' for name in names)}"
        message = f"no adapter can be read here: {str(reason).lower()}"
        findings.problems.append(Problem("adapter", message, file=path, advice=advice))
        return None
    if not isinstance(raw, dict):
        message, advice = "an adapter's config is an object", "save the adapter anew"
        findings.problems.append(Problem("adapter", message, file=path, advice=advice))
        return None
    faults = [*_refused(raw), *_numbers(raw)]
    findings.problems += [
        Problem(code, message, file=path, found=found, advice=advice)
        for code, message, found, advice in faults
    ]
    for key in (key for key, value in raw.items() if key not in _KNOWN and value):
        message = f"the adapter has the key `{shorten(key)}`, which is not known and ignored"
        advice = "check that it changes no weights"
        findings.warnings.append(Problem("unknown-key", message, file=path, advice=advice))
    start = raw.get("init_lora_weights")
    if isinstance(start, str) and not start.lower().startswith((*_CHANGED_BASE, *_KEPT_BASE)):
        message = "nobody here knows whether the adapter's start has changed its base"
        advice = "check that the adapter is the difference from the model that you name"
        found = _shown(start)
        findings.warnings.append(Problem("adapter", message, file=path, found=found, advice=advice))
    patterns = [_patterns(raw, key, path, findings) for key in ("rank_pattern", "alpha_pattern")]
    if faults or None in patterns:
        return None
    ranks, alphas = (each or {} for each in patterns)
    rank, alpha = int(raw.get("r", 8)), float(raw.get("lora_alpha", 8))
    file = FileState.of(status).as_input(path)
    return AdapterConfig(path, raw, file, rank, alpha, ranks, alphas, raw.get("use_rslora") is True)


def _refused(raw: Mapping[str, Any]) -> Iterator[tuple[str, str, str | None, str]]:
    merged = "merge it with PEFT (`merge_and_unload`), and name the result"
    kind = raw.get("peft_type")
    if kind is None and "lora_parameters" in raw:
        yield UNSUPPORTED, "not supported yet: adapters of MLX", None, "fuse it with `mlx_lm.fuse`"
        return
    if not isinstance(kind, str) or kind.upper() not in _KINDS:
        called = f"`{shorten(str(kind))}`"
        yield UNSUPPORTED, f"not supported yet: adapters of type {called}", None, merged
        return
    for key, name in _VARIANTS.items():
        if raw.get(key):
            yield UNSUPPORTED, f"not supported yet: {name} (`{key}`)", None, merged
    start = raw.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(_CHANGED_BASE):
        message = "not supported yet: an adapter whose start has changed its base"
        plain = "convert it to a plain LoRA (PEFT: `path_initial_model_for_weight_conversion`)"
        yield UNSUPPORTED, message, f"`{shorten(start)}`", f"{plain}, or {merged}"
    layouts = raw.get("unsloth_fused_expert_lora")
    said = [raw.get("lora_B_layout"), *(layouts.values() if isinstance(layouts, dict) else ())]
    if "mixed" in said:
        yield UNSUPPORTED, "not supported yet: factors of experts in mixed layouts", None, merged


def _numbers(raw: Mapping[str, Any]) -> Iterator[tuple[str, str, str | None, str]]:
    advice = "save the adapter anew"
    for key in ("use_rslora", "use_dora", "lora_bias", "ensure_weight_tying"):
        if not isinstance(raw.get(key), bool | None):
            yield "adapter", f"`{key}` is true or false", _shown(raw[key]), advice
    if not _is_rank(raw.get("r", 8)):
        yield "adapter", "`r` is a whole number above 0", _shown(raw["r"]), advice
    if not _is_number(raw.get("lora_alpha", 8)):
        yield "adapter", "`lora_alpha` is a finite number", _shown(raw["lora_alpha"]), advice


def _patterns(
    raw: Mapping[str, Any], key: str, path: str, findings: Findings
) -> dict[re.Pattern[str], float] | None:
    """Return compiled patterns in their order, or None after reporting one that cannot be used."""

    def fault(message: str, found: object, advice: str = "save the adapter anew") -> None:
        problem = Problem("adapter", message, file=path, found=_shown(found), advice=advice)
        findings.problems.append(problem)

    said = raw.get(key) or {}
    if not isinstance(said, dict):
        fault(f"`{key}` is an object", said)
        return None
    compiled: dict[re.Pattern[str], float] = {}
    faults = len(findings.problems)
    for pattern, number in said.items():
        is_sound = _is_rank(number) if key == "rank_pattern" else _is_number(number)
        if not is_sound:
            fault(f"`{key}` has a number for each pattern", number)
        elif _takes_long(pattern):
            advice = (
                f"a pattern has at most {_MOST_REPEATS} repetitions and {_MOST_GROUPS} groups, "
                "and repeats none of them: write several"
            )
            fault(f"`{key}` has a pattern that takes too long to match", pattern, advice)
        else:
            try:
                compiled[re.compile(rf"(?:.*\.|)(?:{pattern})$")] = number
            except (re.error, RecursionError, OverflowError):
                fault(f"`{key}` has a pattern that is no regular expression", pattern)
    return None if len(findings.problems) > faults else compiled


def _takes_long(pattern: str) -> bool:
    """Tell whether to match a pattern may take time that grows with its length."""
    return (
        len(pattern) > _LONGEST_PATTERN
        or len(_REPEATS.findall(pattern)) > _MOST_REPEATS
        or pattern.count("(") > _MOST_GROUPS
        or _REPEATED_GROUP.search(pattern) is not None
    )


def _is_rank(value: object) -> bool:
    return type(value) is int and 0 < value < 1 << 31


def _is_number(value: object) -> bool:
    return type(value) in {int, float} and abs(value) < _LARGEST  # type: ignore[arg-type]


def _shown(value: object) -> str:
    return f"`{shorten(str(value))}`"
