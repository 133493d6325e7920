"""Adapters: what the tensors of a LoRA do to the tensors of a model.

PEFT's file names modules as the trainer's class called them, and a model's file names tensors; the
names of one are found among those of the other by a rule that is for all of them or for none. Then
each tensor of the adapter has to be of use: a pair of factors with shapes that fit, a magnitude, a
bias, a tensor that stands in for the model's. What is of no use is told: a file of which a part is
left out gives a model that looks sound and is not what was trained.

How a tensor is changed is told as factors by rows and columns; `rust/plan/adapted.rs` says how.
"""

from __future__ import annotations

import os
import re
from collections import defaultdict
from dataclasses import dataclass, field, replace
from math import prod

from oxmerge.errors import OxmergeError
from oxmerge.models.adapter_config import FILE_NAME, endings, read_adapter_config
from oxmerge.models.names import find_embedding, is_head, is_vocabulary
from oxmerge.models.naming import known_rules
from oxmerge.models.references import open_located
from oxmerge.problems import UNSUPPORTED, Problem, near
from oxmerge.recipe.patterns import renamed
from oxmerge.schema import is_float

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from typing import Any

    from oxmerge._core import Checkpoint, TensorInfo
    from oxmerge.models.adapter_config import AdapterConfig
    from oxmerge.models.references import Located
    from oxmerge.problems import Findings

    Factor = tuple[tuple[int, str], int, int, int]
    Term = tuple[tuple[int, int], int, float, Factor, Factor | None]

__all__ = [
    "WEIGHTS", "Adapted", "Adapter", "adapt", "is_adapter", "kind_of", "open_adapter", "untied",
]  # fmt: skip

#: What the weights of an adapter are called: the first that is there counts.
WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")

#: Weights of a model: a folder that has them is no adapter's.
_OF_MODELS = tuple(
    f"{name}{end}"
    for name in ("model.safetensors", "pytorch_model.bin")
    for end in ("", ".index.json")
)
#: What a module's name begins with in PEFT's files, and what wrappers put into it.
_LEADS = ("base_model.model.", "module.")
_NOISE = ("_fsdp_wrapped_module.", "_orig_mod.", "_checkpoint_wrapped_module.")
#: Kinds of tensors by how their names end; some tools put the adapter's name in.
_ENDINGS = (
    ("A", re.compile(r"(.*)\.lora_A(?:\.[^.]+)?\.weight")),
    ("B", re.compile(r"(.*)\.lora_B(?:\.[^.]+)?\.weight")),
    ("bias", re.compile(r"(.*)\.lora_B(?:\.[^.]+)?\.bias")),
    ("embedding A", re.compile(r"(.*)\.lora_embedding_A(?:\.[^.]+)?")),
    ("embedding B", re.compile(r"(.*)\.lora_embedding_B(?:\.[^.]+)?")),
    ("magnitude", re.compile(r"(.*)\.lora_magnitude_vector(?:\.[^.]+)*")),
    ("rows", re.compile(r"(.*?)(?:\.token_adapter)?\.trainable_tokens_delta")),
)
#: Parts of names of other programs' LoRAs.
_FOREIGN = {
    ".lora_down.": "kohya's", ".lora_up.": "kohya's", ".lora.down.": "diffusers'",
    ".lora.up.": "diffusers'",
}  # fmt: skip
_LORA_WORD = re.compile(r"lora_|\.lora\.|trainable_tokens|\.hada_|\.lokr_|\.ia3_|\.oft_|\.vera_")
_SAVED = re.compile(r"\.modules_to_save(?:\.default)?(?=\.)")
#: Parameters of experts in the order in which modules declare them: PEFT wraps the first first.
_DECLARED = ("gate_up_proj", "up_proj", "down_proj")
#: Experts of their own: the module that has them, the number, and what of it this is.
_EXPERT = re.compile(r"(.*\.?experts)\.(0|[1-9]\d{0,5})\.(w[123]|(?:gate|up|down)_proj)")
#: The part of a stacked parameter, and which of its halves.
_PARTS = {
    "w1": ("gate_up_proj", 0),
    "w3": ("gate_up_proj", 1),
    "w2": ("down_proj", None),
    "gate_proj": ("gate_up_proj", 0),
    "up_proj": ("gate_up_proj", 1),
    "down_proj": ("down_proj", None),
}
#: Dimensions of a table, and of stacked tables.
_TABLE, _STACK = 2, 3
#: Types of models whose linear layers store what others store transposed, and whose experts do.
_TRANSPOSED = frozenset(("gpt2", "openai-gpt", "imagegpt", "decision_transformer", "clvp"))
_TRANSPOSED_EXPERTS = frozenset(("gpt_oss", "aria", "aria_text", "openai_privacy_filter"))
#: What PEFT calls the output of torch's own attention.
_IN_ATTENTION = ".base_layer.out_proj"
#: Heads that no other model's are called like: of Whisper, and of DistilBERT.
_WHISPER_HEAD = "proj_out.weight"
_OTHER_HEADS = (_WHISPER_HEAD, "vocab_projector.weight")
#: How architectures end that have the head of a language model.
_WITH_HEAD = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")
#: What modules of experts are called in transformers 4, and 5.
_EXPERT_NAMES = (".block_sparse_moe.", ".mlp.")
#: Names without a tensor of which those alike are looked for; steps of matching patterns.
_COMPARED, _MOST_STEPS = 5, 5_000_000_000
_ANEW = "save the adapter anew"
_WITH_PEFT = "merge it with PEFT (`merge_and_unload`), and name the result"
_APART = "merge one, and put the other on the result"
_SAME_BASE = "name the model that the adapter was trained on"


@dataclass
class Adapter:
    """An adapter that was opened from its headers.

    Attributes
    ----------
    path : str
        Its folder.
    config : AdapterConfig
        What it says of itself.
    checkpoint : Checkpoint
        Its tensors.
    """

    path: str
    config: AdapterConfig
    checkpoint: Checkpoint


@dataclass
class Adapted:
    """A model with adapters on it.

    Attributes
    ----------
    checkpoint : Checkpoint
        Its tensors.
    config : dict
        Its config, with what the adapters change of it.
    tokens : int, optional
        The number of the adapter whose rows its vocabulary has: its tokens are those of the model.
    """

    checkpoint: Checkpoint
    config: dict[str, Any]
    tokens: int | None = None

    def has_other_rows(self, base: Checkpoint) -> bool:
        """Tell whether its vocabulary has more or fewer rows than the model's without adapters."""
        pairs = ((base.get(name), self.checkpoint.get(name)) for name in base.names())
        return any(
            is_vocabulary(one.name) and tuple(one.shape) != tuple(other.shape)
            for one, other in pairs
            if one is not None and other is not None
        )


@dataclass
class _Module:
    """The tensors of an adapter for one module, by kind."""

    path: str
    tensors: dict[str, TensorInfo] = field(default_factory=dict)


@dataclass
class _Change:
    """What becomes of one tensor."""

    columns: int = 0
    terms: list[Term] = field(default_factory=list)
    magnitude: tuple[tuple[int, str], bool] | None = None
    rows: tuple[tuple[int, str], list[tuple[int, int]]] | None = None


def is_adapter(located: Located) -> bool:
    """Tell whether a folder holds an adapter, and no model."""

    def has(name: str) -> bool:
        return name in located.absent or os.path.isfile(os.path.join(located.path, name))

    return has(FILE_NAME) and any(map(has, WEIGHTS)) and not any(map(has, _OF_MODELS))


def open_adapter(located: Located, findings: Findings) -> Adapter | None:
    """Return the adapter in a folder, or None after reporting why it cannot be used."""
    config = read_adapter_config(located.path, findings)
    if config is None:
        return None
    files = [os.path.join(located.path, name) for name in WEIGHTS]
    there = (
        file
        for name, file in zip(WEIGHTS, files, strict=True)
        if name in located.absent or os.path.exists(file)
    )
    file = next(there, files[0])
    try:
        checkpoint = open_located(replace(located, path=file))
        longest = max(map(len, checkpoint.names()), default=0)
        if len(checkpoint) * config.steps_at_most(longest) <= _MOST_STEPS:
            return Adapter(located.path, config, checkpoint)
        message = "the adapter's patterns take too long to match with its modules"
        advice = f"write fewer, or with fewer repetitions; or {_WITH_PEFT}"
        findings.problems.append(Problem("adapter", message, file=config.path, advice=advice))
    except OxmergeError as error:
        findings.problems.append(error.as_problem())
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        message, advice = f"cannot be opened: {reason}", "download the adapter again"
        findings.problems.append(Problem("adapter", message, file=file, advice=advice))
    return None


def kind_of(name: str) -> tuple[str | None, str]:
    """Return what a tensor of an adapter is, and its module; None and its name if it is whole.

    Examples
    --------
    >>> kind_of("base_model.model.model.layers.0.mlp.up_proj.lora_A.weight")
    ('A', 'model.layers.0.mlp.up_proj')
    >>> kind_of("base_model.model.model.norm.weight")
    (None, 'model.norm.weight')
    """
    name = _SAVED.sub("", _without_leads(name))
    for kind, ending in _ENDINGS:
        if found := ending.fullmatch(name):
            return kind, found[1]
    return None, name


def adapt(
    base: Checkpoint,
    config: dict[str, Any],
    adapters: Sequence[tuple[Adapter, float]],
    findings: Findings,
) -> Adapted | None:
    """Return a model with adapters on it, or None after reporting what does not fit.

    Parameters
    ----------
    base : Checkpoint
        The model's tensors.
    config : dict
        Its config.
    adapters : sequence of (Adapter, float)
        In order, each with what it is multiplied by.
    findings : Findings
        Takes what does not fit, and modules that an adapter names and does not have.
    """
    before = len(findings.problems)
    job = _Adapting(base, config, findings)
    for number, (adapter, weight) in enumerate(adapters):
        _OneAdapter(job, adapter, number, weight).run()
    job.check_vocabulary(adapters)
    if len(findings.problems) > before:
        return None
    changed = [
        (name, (change.columns, change.terms, change.magnitude, change.rows))
        for name, change in job.changes.items()
    ]
    opened = [adapter.checkpoint for adapter, _ in adapters]
    replaced = [(name, (number, of)) for name, (number, of) in job.replaced.items()]
    try:
        checkpoint = base.adapted(opened, list(job.copied.items()), replaced, changed)
    except OxmergeError as error:
        findings.problems.append(error.as_problem("adapter"))
        return None
    return Adapted(checkpoint, job.new_config(), job.tokens)


class _Adapting:
    """A model while adapters are put on it."""

    def __init__(self, base: Checkpoint, config: dict[str, Any], findings: Findings) -> None:
        self.base = base
        self.config = config
        self.findings = findings
        self.names = base.names()
        self.known = set(self.names)
        self.changes: dict[str, _Change] = {}
        self.copied: dict[str, str] = {}
        self.replaced: dict[str, tuple[int, str]] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.tokens: int | None = None
        self.is_tied = any(
            part.get("tie_word_embeddings") is True for part in (config, *_parts_of(config))
        )
        self.table = find_embedding(self.names)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor, as far as adapters have come."""
        if name not in self.shapes:
            tensor = self.base.get(self.copied.get(name, name))
            self.shapes[name] = () if tensor is None else tuple(tensor.shape)
        return self.shapes[name]

    def is_known(self, name: str) -> bool:
        """Tell whether the model has a tensor, or a head that is tied."""
        return name in self.known or (self.tied_to(name) is not None)

    def tied_to(self, name: str) -> str | None:
        """Return what a head's weight or bias of this name is tied to, if the model has no head."""
        if not self.is_tied or name in self.known or not (is_head(name) or name in _OTHER_HEADS):
            return None
        if name.endswith(".bias"):  # in BERT and its kind, that of the module around
            around = name.rsplit(".", 2)[0] + ".bias"
            return around if around in self.known else None
        return self.table

    def untie(self, name: str) -> None:
        """Give the model a head of its own, if it has none of this name."""
        module = name.rpartition(".")[0]
        for each in (f"{module}.weight", f"{module}.bias"):
            if (tied := self.tied_to(each)) is not None:
                self.copied.setdefault(each, tied)

    def head_of(self, table: str) -> str | None:
        """Return what the head of a language model is called that is tied to a table."""
        architectures = self.config.get("architectures")
        first = architectures[0] if isinstance(architectures, list) and architectures else None
        if not (isinstance(first, str) and first.endswith(_WITH_HEAD)):
            return None
        lead = "language_model." if table.startswith("language_model.model.") else ""
        name = f"{lead}lm_head.weight" if first[:7] != "Whisper" else _WHISPER_HEAD
        return name if self.tied_to(name) == table else None

    def part_from_head(self, table: str) -> None:
        """Give the model a head of its own, if it has one that is tied to a table."""
        if (head := self.head_of(table)) is not None:
            self.untie(head)

    def change(self, name: str, columns: int) -> _Change | None:
        """Return what becomes of a tensor, to add to; None if adapters see it in other rows."""
        change = self.changes.setdefault(name, _Change(columns))
        return change if change.columns == columns else None

    def check_vocabulary(self, adapters: Sequence[tuple[Adapter, float]]) -> None:
        """Report an adapter that has rows for new tokens in one of two tensors."""
        tables = [name for name in self.names if is_vocabulary(name) and name.endswith("weight")]
        tables += [name for name in self.replaced if name not in self.known]
        rows = {name: self.shape(name)[0] for name in tables if len(self.shape(name)) == _TABLE}
        was = {each.shape[0] for name in tables if (each := self.base.get(name)) is not None}
        grown = [name for name in rows if name in self.replaced and rows[name] not in was]
        if grown and len({*rows.values()}) > 1:
            number, tensor = self.replaced[grown[0]]
            self.findings.problems.append(
                Problem(
                    "adapter",
                    "an adapter has rows for new tokens, and another vocabulary tensor has none",
                    file=adapters[number][0].path,
                    tensor=tensor,
                    expected=f"{rows[grown[0]]} rows in all of them",
                    found=", ".join(f"{count} in `{name}`" for name, count in rows.items()),
                    advice=_ANEW + " with `save_embedding_layers=True`",
                )
            )

    def new_config(self) -> dict[str, Any]:
        """Return the config for the tokens that embeddings have a row for, and for their head."""
        is_untied = bool(self.copied)
        rows = {
            self.shapes[name][0]
            for name in self.replaced
            if name in self.known
            and (was := self.base.get(name)) is not None
            and len(was.shape) == _TABLE
            and tuple(was.shape) != self.shapes[name]
        }

        def edited(part: dict[str, Any]) -> dict[str, Any]:
            new = {
                key: edited(each) if key in _NESTED and isinstance(each, dict) else each
                for key, each in part.items()
            }
            if len(rows) == 1 and "vocab_size" in new:
                new["vocab_size"] = max(rows)
            return new

        config = untied(self.config) if is_untied else self.config
        return edited(config) if rows else config


_NESTED = ("text_config", "llm_config")


def untied(config: dict[str, Any]) -> dict[str, Any]:
    """Return a config that does not tie the head to the embedding."""
    new = {
        key: untied(each) if key in _NESTED and isinstance(each, dict) else each
        for key, each in config.items()
    }
    if new.get("tie_word_embeddings") is True:
        new["tie_word_embeddings"] = False
    return new


def _parts_of(config: dict[str, Any]) -> Iterator[dict[str, Any]]:
    return (config[key] for key in _NESTED if isinstance(config.get(key), dict))


class _OneAdapter:
    """Puts one adapter on a model."""

    def __init__(self, job: _Adapting, adapter: Adapter, number: int, weight: float) -> None:
        self.job = job
        self.findings = job.findings
        self.adapter = adapter
        self.config = adapter.config
        self.number = number
        self.weight = weight
        self.modules: dict[str, _Module] = {}
        self.whole: dict[str, TensorInfo] = {}
        self.name_of: Callable[[str], str] = lambda name: name
        self.there: set[str] = set()
        # A table and its head were trained as one, but for magnitudes, which are each their own.
        self.is_tying = self.config.is_on("ensure_weight_tying")
        self.is_tying &= not self.config.is_on("use_dora")

    def run(self) -> None:
        """Sort the tensors, find what they are for, and add what they do."""
        for tensor in self.adapter.checkpoint.tensors:
            self._sort(tensor)
        stacked = self._stacked()
        wanted = [*self.whole, *(self._weight_of(module) for module in self.modules.values())]
        wanted += [f"{path}.{target}" for path, target, _ in stacked]
        self._find_names(wanted)
        # PEFT ties what it calls `embed_tokens`, and writes the head too; others it leaves apart.
        self.is_tying &= any(self.job.tied_to(self.name_of(name)) for name in wanted)
        self.there = {self.name_of(name) for name in self.whole}
        for name, tensor in self.whole.items():
            if not self._is_alias(self.name_of(name)):
                self._replace(name, tensor)
        for module in self.modules.values():
            self._module(module)
        for path, target, module in stacked:
            self._experts(path, target, module)
        self._check_complete()

    # Sorting.

    def _sort(self, tensor: TensorInfo) -> None:
        kind, name = kind_of(tensor.name)
        if ".original_module." in name or name.endswith(".lora_velora_embed"):
            return  # a copy of the base, which trainers leave, or what VeLoRA trains with
        if not is_float(tensor.dtype):
            expected, found = "a float type", tensor.dtype
            self._fault("an adapter's tensor has another type", tensor, expected, found)
            return
        if 0 in tensor.shape:
            advice = "it was saved while its parts lay on several devices: gather it, and save anew"
            self._fault("an adapter's tensor holds no numbers", tensor, advice=advice)
            return
        if kind is not None:
            if name.endswith(_IN_ATTENTION):
                message = "not supported yet: a LoRA on torch's own attention, whose output counts"
                message = f"{message} twice in PEFT"
                self._fault(message, tensor, advice=_WITH_PEFT, code=UNSUPPORTED)
                return
            module = self.modules.setdefault(name, _Module(name))
            if kind in module.tensors:
                self._fault("two tensors of the adapter are for the same", tensor)
            module.tensors[kind] = tensor
        elif _LORA_WORD.search(name):
            whose = next((_FOREIGN[part] for part in _FOREIGN if part in name), None)
            message = "a tensor of the adapter is of a kind that is not known"
            seen = None if whose is None else f"a name of {whose} format"
            self._fault(message, tensor, "one that PEFT saves", seen, _WITH_PEFT)
        else:
            name = name.replace(".base_layer.", ".")
            # PEFT writes a saved module's bias by both of its names, with `bias="all"`.
            pair = (tensor, self.whole.get(name, tensor))
            if pair[1] is not tensor and not any(_SAVED.search(each.name) for each in pair):
                self._fault("two tensors of the adapter are for the same", tensor)
            self.whole[name] = tensor

    def _stacked(self) -> list[tuple[str, str, _Module]]:
        """Take out modules whose parameters are adapted themselves: path, parameter, tensors."""
        targets: dict[str, list[str]] = defaultdict(list)
        for target in self.config.targets:
            inside, _, name = target.rpartition(".")
            targets[inside].append(name)
        nested: dict[str, dict[int, _Module]] = defaultdict(dict)
        for path in [*self.modules]:
            bare = path
            while bare.endswith(".base_layer"):
                bare = bare.removesuffix(".base_layer")
            if bare != path or not targets.keys().isdisjoint(_modules_of(bare)):
                depth = (len(path) - len(bare)) // len(".base_layer")
                nested[bare][depth] = self.modules.pop(path)
        found = []
        for bare, by_depth in nested.items():
            names = [name for inside in _modules_of(bare) for name in targets.get(inside, ())]
            if sorted(by_depth) != list(range(len(names))):
                first = next(iter(by_depth[min(by_depth)].tensors.values()))
                message = "the adapter does not say which parameter of the module this is for"
                found_names = ", ".join(f"`{name}`" for name in names) or "none"
                self._fault(message, first, "a pair for each of `target_parameters`", found_names)
                continue
            known = {name: at for at, name in enumerate(_DECLARED)}
            ordered = sorted(names, key=lambda name: known.get(name, len(known)))
            if len(names) > 1 and any(name not in known for name in names):
                first = next(iter(by_depth[0].tensors.values()))
                message = "it cannot be told which of several parameters this is for"
                self._fault(message, first, f"some of {', '.join(_DECLARED)}", ", ".join(names))
                continue
            found += [
                (bare, name, by_depth[len(names) - 1 - at]) for at, name in enumerate(ordered)
            ]
        return found

    def _weight_of(self, module: _Module) -> str:
        """Return what the tensor that a module's factors are for is called."""
        return f"{module.path}.weight"

    # Names.

    def _find_names(self, wanted: list[str]) -> None:
        """Find the rule by which the model has all names that are wanted."""
        best: tuple[int, list[str]] = (-1, [])
        for rule in self._rules(wanted):
            found = [rule(name) for name in wanted]
            lacking = [name for name, new in zip(wanted, found, strict=True) if not self._has(new)]
            if not lacking and len(set(found)) == len(found):
                self.name_of = rule
                return
            if len(wanted) - len(lacking) > best[0]:
                best = (len(wanted) - len(lacking), lacking)
                self.name_of = rule
        for at, name in enumerate(best[1]):
            # Of many, the others will be alike.
            alike = near(name, self.job.names, 2) if at < _COMPARED else ()
            close = ", ".join(f"`{each}`" for each in alike) or "nothing alike"
            if self.job.is_tied and is_vocabulary(name):
                message = "not supported yet: an adapter on a tensor that is tied to others"
                code, advice = UNSUPPORTED, _WITH_PEFT
            else:
                message = "the model has no tensor that the adapter"
                message = f"{message} `{self.adapter.path}` could change"
                code, advice = "adapter", _SAME_BASE
            self.findings.problems.append(
                Problem(
                    code,
                    message,
                    file=self.adapter.path,
                    tensor=name,
                    found=close,
                    advice=advice,
                )
            )

    def _has(self, name: str) -> bool:
        return self.job.is_known(name) or bool(self._pieces(name))

    def _rules(self, wanted: list[str]) -> Iterator[Callable[[str], str]]:
        yield lambda name: name
        old, new = _EXPERT_NAMES
        yield lambda name: name.replace(new, old)
        yield lambda name: name.replace(old, new)
        for rules in known_rules():
            table = dict(zip(wanted, renamed(wanted, rules)[0], strict=True))
            yield lambda name, table=table: table.get(name, name)  # type: ignore[misc]
            yield lambda name, table=table: table.get(name, name).replace(new, old)  # type: ignore[misc]
        # Other beginnings: those of the first name that is there but for its beginning.
        for name in wanted[:1]:
            parts = name.split(".")
            for skip in range(len(parts) - 1):
                rest = ".".join(parts[skip:])
                leads = {
                    each.removesuffix(rest)
                    for each in self.job.names
                    if f".{each}".endswith(f".{rest}")
                }
                lead, was = min(leads, default=None), name.removesuffix(rest)
                if lead is not None and len(leads) == 1:
                    yield lambda name, lead=lead, was=was: (  # type: ignore[misc]
                        lead + name.removeprefix(was) if name.startswith(was) else name
                    )
                    return

    def _pieces(self, name: str) -> list[tuple[str, tuple[int, int]]]:
        """Return the tensors that a parameter of experts is in, where it is stored otherwise.

        Of an expert's own weight, the stacked one and which rows of it; of a stacked one, those of
        the experts, each with the rows of an expert.
        """
        path = name.removesuffix(".weight")
        known, shape = self.job.known, self.job.shape
        if found := _EXPERT.fullmatch(path):
            stacked, half = _PARTS[found[3]]
            whole, number = f"{found[1]}.{stacked}", int(found[2])
            if whole not in known or len(shape(whole)) != _STACK:
                return []
            experts, rows, _ = shape(whole)
            height = rows if half is None else rows // 2
            first = number * rows + (half or 0) * height
            return [(whole, (first, first + height))] if number < experts else []
        module, _, target = path.rpartition(".")
        if not module.endswith("experts") or target not in {"gate_up_proj", "down_proj"}:
            return []
        ways = (("w1", "w3", "w2"), ("gate_proj", "up_proj", "down_proj"))
        for gate, up, down in ways:
            parts = (gate, up) if target == "gate_up_proj" else (down,)
            if f"{module}.0.{parts[0]}.weight" not in known:
                continue
            pieces = []
            for expert in range(len(self.job.names)):
                names = [f"{module}.{expert}.{part}.weight" for part in parts]
                if names[0] not in known:
                    break
                first = 0
                for each in names:
                    rows = shape(each)[0] if len(shape(each)) == _TABLE else 0
                    pieces.append((each, (first, first + rows)))
                    first += rows
            return pieces
        return []

    # What tensors do.

    def _replace(self, name: str, tensor: TensorInfo) -> None:
        name = self.name_of(name)
        job, shape = self.job, tuple(tensor.shape)
        if not job.is_known(name):
            if self._pieces(name):  # else it is reported
                message = (
                    "not supported yet: experts that are saved, and that the model has otherwise"
                )
                self._fault(message, tensor, advice=_WITH_PEFT, code=UNSUPPORTED)
            return
        # What is beside a pair is the model's own, of which PEFT keeps a copy: it has no weight.
        is_copy = ".base_layer." in tensor.name
        if self.weight != 1 and not is_copy:
            message = "an adapter that replaces tensors cannot be taken in part"
            self._fault(message, tensor, "weight 1", f"{self.weight:g}", "give it the weight 1")
            return
        if name in job.replaced or name in job.changes:
            if is_copy and shape == job.shape(name):
                message = "a second adapter has a copy of a tensor of the model, which is not used"
                self.findings.warnings.append(
                    Problem("adapter", message, file=self.adapter.path, tensor=tensor.name)
                )
                return
            self._fault(
                "two adapters change a tensor, and one of them replaces it", tensor, advice=_APART
            )
            return
        was = job.shape(job.tied_to(name) or name)
        may_grow = len(shape) == _TABLE and is_vocabulary(name)
        if shape != was and not (may_grow and shape[1:] == was[1:]):
            self._fault(
                "the adapter's tensor does not fit the model's",
                tensor,
                str(list(was)),
                str(list(shape)),
                _SAME_BASE,
            )
            return
        job.untie(name)
        # A table that is saved alone was trained apart from its head, which stayed as it was.
        if shape == was and not is_copy and not self.is_tying:
            job.part_from_head(name)
        if is_vocabulary(name) and (shape != was or not is_copy):
            job.tokens = self.number
        job.replaced[name] = (self.number, tensor.name)
        job.shapes[name] = shape

    def _is_alias(self, name: str) -> bool:
        """Tell whether a tensor of the adapter is another's that it has too, by a second name."""
        tied = self.job.tied_to(name)
        if tied is None or tied not in self.there:
            return False
        module, _, kind = name.rpartition(".")
        return self.is_tying if kind == "weight" else f"{module}.weight" not in self.there

    def _module(self, module: _Module) -> None:
        kinds = module.tensors
        pairs = [("A", "B"), ("embedding A", "embedding B")]
        for pair in pairs:
            alone = [kinds[kind] for kind in pair if kind in kinds]
            if len(alone) == 1:
                other = pair[1] if pair[0] in kinds else pair[0]
                message, advice = "a factor of the adapter stands alone", "download it again"
                self._fault(message, alone[0], f"its `lora_{other[-1]}` too", advice=advice)
                return
        has_pair = [pair for pair in pairs if pair[0] in kinds]
        if len(has_pair) == _TABLE or (not has_pair and "rows" not in kinds):
            first = next(iter(kinds.values()))
            self._fault("a tensor of the adapter goes with no pair of factors", first)
            return
        if self.config.is_on("use_dora") and has_pair and "magnitude" not in kinds:
            first = kinds[has_pair[0][0]]
            self._fault("a module of a DoRA adapter has no magnitude", first, advice=_ANEW)
            return
        name = self.name_of(self._weight_of(module))
        if has_pair:
            a, b = (kinds[kind] for kind in has_pair[0])
            scale = self._scale(module.path, a, a.shape[0] if len(a.shape) > 1 else 0)
            if scale is not None:
                self._pair(module, name, a, b, scale)
                if "bias" in kinds:
                    self._bias(name, kinds["bias"], scale)
        if "rows" in kinds:
            self._rows(module.path, name, kinds["rows"])

    def _scale(self, path: str, a: TensorInfo, rank: int) -> float | None:
        """Return the scale of a module whose factors have this rank."""
        said = self.config.rank_of(path)
        if rank != said:
            message = (
                "an adapter's factor has another rank than its config says, so its scale is unknown"
            )
            matching = sum(bool(each.match(path)) for each in self.config.rank_pattern)
            first = "PEFT sorts patterns when it saves: put the one that counts first"
            advice = first if matching > 1 else _ANEW
            self._fault(message, a, f"rank {said}", f"{rank} in {list(a.shape)}", advice)
            return None
        return self.config.scale_of(path) * self.weight

    def _place(self, name: str) -> tuple[str, tuple[int, ...], tuple[int, int]] | None:
        """Return the tensor that a module's weight is in, the weight's shape, its rows there."""
        job = self.job
        job.untie(name)
        if job.is_known(name):
            shape = job.shape(name)
            return name, shape, (0, shape[0] if shape else 0)
        for whole, rows in self._pieces(name):  # the only one
            return whole, (rows[1] - rows[0], *job.shape(whole)[2:]), rows
        return None  # which is reported

    def _pair(self, module: _Module, name: str, a: TensorInfo, b: TensorInfo, scale: float) -> None:
        """Add the product of a pair of factors to the weight of their module."""
        if self.job.tied_to(name) is not None and self.is_tying:
            return  # the transposed factors of the embedding, which changes with it
        place = self._place(name)
        if place is None:
            return
        whole, shape, rows = place
        rank, *inner = a.shape
        height, width = (shape[0], prod(shape[1:])) if len(shape) > 1 else (0, 0)
        is_pair = len(b.shape) > 1 and b.shape[1] == rank and prod(b.shape[2:]) == 1
        straight = is_pair and b.shape[0] == height and inner == [*shape[1:]]
        crossed = is_pair and len(shape) == _TABLE and (b.shape[0], inner) == (width, [height])
        if not straight and not crossed:
            expected = f"factors of {[*shape]}"
            found = f"`lora_A` {[*a.shape]}, `lora_B` {[*b.shape]}"
            message = "a pair of factors does not fit the model's tensor"
            self._fault(message, a, expected, found, _SAME_BASE)
            return
        if len(shape) > _TABLE and shape[1] == 1 < shape[0]:
            message = "not supported yet: a LoRA on a convolution of one channel, or in groups"
            self._fault(message, a, advice=_WITH_PEFT, code=UNSUPPORTED)
            return
        is_embedding = "embedding A" in module.tensors
        is_crossed = crossed and (not straight or is_embedding or self._is_transposed(name))
        change = self._change(whole, width, a)
        if change is None:
            return
        if is_embedding and not self.is_tying:
            # The head sees the embedding as it was, in training.
            self.job.part_from_head(whole)
        given_a, given_b = (self.number, a.name), (self.number, b.name)
        left, right = (given_b, 0, rank, 1), (given_a, 0, 1, width)
        if is_crossed:
            left, right = (given_a, 0, 1, height), (given_b, 0, rank, 1)
        change.terms.append((rows, rank, scale, left, right))
        if (magnitude := module.tensors.get("magnitude")) is not None:
            count = width if is_crossed else height
            if whole != name:
                self._fault("DoRA on one of several stacked experts", a, advice=_WITH_PEFT)
            self._magnitude(change, magnitude, count, of_rows=not is_crossed)

    def _is_transposed(self, name: str, types: frozenset[str] = _TRANSPOSED) -> bool:
        """Tell whether square weights are stored transposed: shapes do not say it.

        Where a model is an encoder and a decoder of other types, each has a config of its own.
        """
        config = self.job.config
        part = config.get(name.partition(".")[0])
        return (part if isinstance(part, dict) else config).get("model_type") in types

    def _change(self, name: str, columns: int, tensor: TensorInfo) -> _Change | None:
        shape = self.job.shape(name)
        was = self.job.base.get(self.job.copied.get(name, name))
        if was is not None and not is_float(was.dtype):
            self._fault(
                "only floats can be adapted",
                tensor,
                "a float type",
                was.dtype,
                "name the model's 16-bit weights",
            )
            return None
        change = self.job.change(name, columns)
        if change is None or 0 in shape:
            self._fault("two adapters see a tensor in rows of other lengths", tensor)
        elif change.magnitude is not None or change.rows is not None:
            self._fault(
                "an adapter on a tensor that a DoRA has scaled before, or whose rows another "
                "replaces",
                tensor,
                advice=_APART,
            )
            return None
        return change

    def _magnitude(self, change: _Change, tensor: TensorInfo, count: int, *, of_rows: bool) -> None:
        if prod(tensor.shape) != count:
            self._fault(
                "a magnitude does not fit the model's tensor",
                tensor,
                f"{count} numbers",
                str(list(tensor.shape)),
                _SAME_BASE,
            )
        elif len(change.terms) > 1 or self.weight != 1:
            message = "a DoRA adapter is the only one on its tensors, with weight 1"
            self._fault(message, tensor, advice=_APART)
        else:
            change.magnitude = ((self.number, tensor.name), of_rows)

    def _bias(self, weight: str, tensor: TensorInfo, scale: float) -> None:
        name = weight.removesuffix("weight") + "bias"
        if not self.job.is_known(name) or self.job.shape(name) != tuple(tensor.shape):
            found = str(list(tensor.shape))
            self._fault(
                "the bias of a factor needs a bias of the model that it is added to",
                tensor,
                f"a tensor `{name}` of that shape",
                found,
                _SAME_BASE,
            )
            return
        change = self._change(name, 1, tensor)
        if change is not None:
            left = ((self.number, tensor.name), 0, 1, 1)
            change.terms.append(((0, tensor.shape[0]), 1, scale, left, None))

    def _rows(self, path: str, name: str, tensor: TensorInfo) -> None:
        indices = self.config.token_indices(path)
        shape = self.job.shape(name)
        if not isinstance(indices, list) or not all(type(each) is int for each in indices):
            self._fault(
                "the config does not say which rows are trained",
                tensor,
                "`trainable_token_indices`",
                str(type(indices).__name__),
                _ANEW,
            )
            return
        if not self.job.is_known(name):
            return  # which is reported
        if len(shape) != _TABLE or tuple(tensor.shape) != (len(indices), shape[1]):
            expected = f"{[len(indices), *shape[1:]]}"
            self._fault(
                "trained rows do not fit the model's",
                tensor,
                expected,
                str(list(tensor.shape)),
                _SAME_BASE,
            )
            return
        if len(set(indices)) < len(indices) or not all(0 <= each < shape[0] for each in indices):
            self._fault(
                "trained rows are there once each",
                tensor,
                f"different ones below {shape[0]}",
                str(indices),
                _ANEW,
            )
            return
        if self.weight != 1:
            message = "an adapter that replaces rows cannot be taken in part"
            self._fault(message, tensor, "weight 1", f"{self.weight:g}", "give it the weight 1")
            return
        self.job.tokens = self.number
        rows = sorted(zip(indices, range(len(indices)), strict=True))
        # A head that was tied when the rows were trained has them too.
        heads = [head for head in self.job.copied if head == self.job.head_of(name)]
        for each in (name, *heads):
            change = self._change(each, shape[1], tensor)
            if change is not None:
                change.rows = ((self.number, tensor.name), rows)

    # Stacked experts.

    def _experts(self, path: str, target: str, module: _Module) -> None:
        kinds, job = module.tensors, self.job
        first = next(iter(kinds.values()))
        if set(kinds) != {"A", "B"}:
            self._fault(
                "a parameter that is adapted itself has a pair of factors", first, advice=_ANEW
            )
            return
        a, b = kinds["A"], kinds["B"]
        name = self.name_of(f"{path}.{target}")
        pieces: list[tuple[str, int, tuple[int, int]]]
        if job.is_known(name):
            shape = job.shape(name)
            shape = shape if len(shape) == _STACK else (1, *shape)
            rows = shape[1]
            pieces = [(name, e, (0, rows)) for e in range(shape[0])]
        else:
            apart = self._pieces(name)
            if not apart:
                return  # which is reported
            pieces, expert = [], -1
            for each, of in apart:
                expert += of[0] == 0
                pieces.append((each, expert, of))
            rows = max(of[1] for _, _, of in pieces)
            shape = (expert + 1, rows, job.shape(pieces[0][0])[1])
        experts, height, width = shape if len(shape) == _STACK else (0, 0, 0)
        rank = self.config.rank_of(f"{path}.{target}")
        sound = (
            len(a.shape) == len(b.shape) == _TABLE and a.shape[0] == b.shape[1] == rank * experts
        )
        # The factor that is multiplied last has what comes out of the module.
        swapped = sound and (b.shape[0], a.shape[1]) == (height, width)
        plain = sound and (a.shape[1], b.shape[0]) == (height, width)
        if not (swapped or plain):
            expected = f"rank {rank} for each of {list(shape)}"
            found = f"`lora_A` {list(a.shape)}, `lora_B` {list(b.shape)}"
            self._fault(
                "a pair of factors does not fit the model's tensor", a, expected, found, _SAME_BASE
            )
            return
        if swapped and plain and experts > 1:
            # Releases of PEFT take it otherwise: the first ones never, one the wrong way round.
            is_transposed = self._is_transposed(name, _TRANSPOSED_EXPERTS)
            version = self.config.version
            swapped = version >= (0, 19) and is_transposed == (version < (0, 20))
        scale = self.config.scale_of(f"{path}.{target}") * self.weight
        grouped = self._is_grouped(target)
        given_a, given_b = (self.number, a.name), (self.number, b.name)
        for each, e, (start, end) in pieces:
            # A has the steps of the rank of each expert together; B those of all, unless grouped.
            offset, step = (e * rank, 1) if grouped else (e, experts)
            whole = (e * height, (e + 1) * height) if each == name else (0, end - start)
            if swapped:
                left = (given_b, start * rank * experts + offset, rank * experts, step)
                right = (given_a, e * rank * width, 1, width)
            else:
                left = (given_a, e * rank * height + start, 1, height)
                right = (given_b, offset, rank * experts, step)
            change = self._change(each, width, a)
            if change is None:
                return
            change.terms.append((whole, rank, scale, left, right))

    def _is_grouped(self, target: str) -> bool:
        said = self.config.raw.get("unsloth_fused_expert_lora")
        layout = said.get(target) if isinstance(said, dict) else None
        return (layout or self.config.raw.get("lora_B_layout")) == "grouped_by_expert"

    # Telling.

    def _check_complete(self) -> None:
        """Warn of modules that the config names and the file does not have."""
        listed = self.config.raw.get("target_modules")
        others = ("exclude_modules", "layers_to_transform", "target_parameters")
        if not isinstance(listed, list) or any(self.config.raw.get(key) for key in others):
            return
        there = {self.name_of(self._weight_of(module)) for module in self.modules.values()}
        there |= self.job.replaced.keys()
        names = {f"{each}.weight" for each in listed if isinstance(each, str)}
        for name in self.job.names:
            if name not in there and not names.isdisjoint(endings(name)):
                self.findings.warnings.append(
                    Problem(
                        "adapter",
                        "the adapter names modules that it does not have",
                        file=self.adapter.path,
                        tensor=name,
                        advice="check that it was downloaded whole",
                    )
                )

    def _fault(
        self,
        message: str,
        tensor: TensorInfo,
        expected: str | None = None,
        found: str | None = None,
        advice: str = _ANEW,
        *,
        code: str = "adapter",
    ) -> None:
        file = self.adapter.path
        self.findings.problems.append(
            Problem(code, message, None, file, tensor.name, expected, found, advice)
        )


def _modules_of(module: str) -> Iterator[str]:
    """Yield what a target parameter may call a module; nothing is enough for one of experts."""
    yield from endings(module)
    if module.endswith("experts"):
        yield ""


def _without_leads(name: str) -> str:
    for lead in _LEADS:
        name = name.removeprefix(lead)
    for noise in _NOISE:
        name = name.replace(noise, "")
    return name
