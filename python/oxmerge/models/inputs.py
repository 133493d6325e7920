"""The models of a recipe, opened: their headers, configs and layers."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from functools import cached_property

from oxmerge.errors import OxmergeError, PlanError
from oxmerge.file_state import FileState
from oxmerge.json_files import NO_FILE, read_json, read_object
from oxmerge.models.adapters import adapt, open_adapter, untied
from oxmerge.models.names import find_embedding, find_layer_counts, find_layout, is_head
from oxmerge.models.naming import named_as
from oxmerge.models.references import Located, open_located, resolve_reference, split_adapters
from oxmerge.models.stores import is_address
from oxmerge.models.vocabularies import OPAQUE, folder_beside, present, same_files, token_files
from oxmerge.problems import Findings, Problem, did_you_mean
from oxmerge.recipe.recipe import UNREAD

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from typing import Any

    from oxmerge._core import Checkpoint, TensorInfo
    from oxmerge.models.adapters import Adapted, Adapter
    from oxmerge.models.names import Layout, Stack
    from oxmerge.problems import Place
    from oxmerge.recipe.patterns import Rename
    from oxmerge.recipe.recipe import Renames

__all__ = ["InputModel", "Inputs", "open_model"]


@dataclass(frozen=True, slots=True)
class InputModel:
    """A model that takes part in a merge.

    Attributes
    ----------
    index : int
        Its position in the order of first mention.
    reference : str
        As the recipe writes it.
    path : str
        Where it lies.
    located : Located
        The same, with its commit and with what is not here.
    pinned : str, optional
        Its reference with the commits of what is on the Hub; None if nothing is.
    config : dict
        Its config.json; empty if it has none.
    config_file : dict, optional
        The file it was read from, as it was then; None if there is none.
    checkpoint : Checkpoint
        Its headers.
    runs : list of (str, int, int)
        Its tensors in file order, in runs whose names begin alike up to the layer's number: that
        beginning, the first of them, and how many.
    layout : Layout
        Its stacks.
    renamed : tuple of Rename
        How its tensors are called here, where the files call them otherwise.
    tied : tuple of str
        Its heads that are left out: its config ties them, and its files have no bytes of their own
        for them.
    untied : tuple of str
        Its heads that are its embedding: its config ties them, and other models have heads of their
        own to merge them with.
    adapter_files : tuple of dict
        The configs of its adapters, as they were then.
    tokens : str, optional
        The folder of the adapter whose tokenizer it has, unless that is its own.
    """

    index: int
    reference: str
    path: str
    located: Located
    pinned: str | None
    config: dict[str, Any]
    config_file: dict[str, Any] | None
    checkpoint: Checkpoint
    paths: tuple[str, ...]
    runs: list[tuple[str, int, int]]
    layout: Layout
    renamed: tuple[Rename, ...] = ()
    tied: tuple[str, ...] = ()
    untied: tuple[str, ...] = ()
    adapter_files: tuple[dict[str, Any], ...] = ()
    tokens: str | None = None

    @property
    def tokenizer_folder(self) -> str:
        """Where its tokenizer lies: beside its weights, or beside an adapter with new tokens."""
        return folder_beside(self.path) if self.tokens is None else self.tokens

    def file_of(self, tensor: TensorInfo) -> str:
        """Return the path of the file that a tensor lies in."""
        return self.paths[tensor.file]

    @property
    def file_names(self) -> frozenset[str]:
        """The names of the files that its tensors are in, and of their index."""
        files = [*self.checkpoint.files, *filter(None, [self.checkpoint.index])]
        return frozenset(os.path.basename(file["path"]) for file in files)

    @property
    def is_tied(self) -> bool:
        """Whether its config ties the head to the embedding."""
        return _is_tied(self.config)

    @property
    def is_quantised(self) -> bool:
        """Whether its config says that its weights are quantised."""
        return bool(_find_key(self.config, "quantization_config"))

    @property
    def stack(self) -> Stack | None:
        """Its stack, if it has exactly one."""
        return self.layout.only_stack


def _config_beside(path: str) -> str:
    return os.path.join(folder_beside(path), "config.json")


def _find_key(config: dict[str, Any], key: str) -> object:
    """Return the value of a key at the top of a config, or in its text part."""
    for part in (config, config.get("text_config"), config.get("llm_config")):
        if isinstance(part, dict) and key in part:
            return part[key]
    return None


def _is_tied(config: dict[str, Any]) -> bool:
    return _find_key(config, "tie_word_embeddings") is True


def _tied_heads(checkpoint: Checkpoint, config: dict[str, Any]) -> tuple[str, ...]:
    """Return the heads that are other tensors once more, as torch writes those of tied models.

    Files of safetensors do not have them, and what is tied need not be merged twice.
    """
    if not _is_tied(config):
        return ()
    heads = filter(is_head, checkpoint.names())
    return tuple(name for name in heads if not all(map(is_head, checkpoint.twins(name))))


class Inputs:
    """Finds and opens models, each once, and collects what goes wrong.

    Parameters
    ----------
    folders : tuple of str
        Where relative paths may start.
    stages : mapping of str to str or None
        Where the outputs of earlier merges lie, by their names; None for one that failed.
    findings : Findings
        Takes models that are not there or broken, and what is odd about the others.
    donor : str, optional
        The model whose names the tensors of the others are to have.
    renames : tuple of Renames
        How the recipe says that they are called.
    listed : tuple of str
        The models that are merged. If one has a head of its own, those that tie theirs get one.

    Attributes
    ----------
    models : list of InputModel
        Those that could be opened, in order of first mention.
    lacks_reported : bool
        Whether a model is not there for a reason that is reported elsewhere.
    """

    def __init__(
        self,
        folders: tuple[str, ...],
        stages: Mapping[str, str | None],
        findings: Findings,
        donor: str | None = None,
        renames: tuple[Renames, ...] = (),
        listed: tuple[str, ...] = (),
    ) -> None:
        self._findings = findings
        self._stages = stages
        self._donor = donor
        self._renames = renames
        self._listed = listed
        self._checkpoints: dict[str, Checkpoint] = {}
        self.models: list[InputModel] = []
        self.lacks_reported = False
        self._folders = folders
        self._located: dict[str, Located | Problem] = {}
        self._adapters: dict[str, tuple[tuple[Located, float], ...]] = {}
        self._missing: set[str] = set()
        self._by_identity: dict[str, InputModel | None] = {}

    def path_of(self, reference: str) -> str:
        """Return what identifies a model: its real path, or its reference if it is not found."""
        found = self._resolve(reference)
        if isinstance(found, Problem):
            return reference
        adapters = (f"+{each.identity}={weight!r}" for each, weight in self._adapters[reference])
        return found.identity + "".join(adapters)

    def locate(self, reference: str) -> str | Problem:
        """Return where a model lies, or why that is not known."""
        found = self._resolve(reference)
        return found if isinstance(found, Problem) else found.path

    def by_folder(self, folder: str) -> InputModel | None:
        """Return the opened model whose files lie in a folder, if there is one."""
        path = os.path.realpath(folder)
        each = (m for m in self.models if os.path.realpath(m.tokenizer_folder) == path)
        return next(each, None)

    def open(self, reference: str, where: Place | None = None) -> InputModel | None:
        """Return the model, or None after reporting that it cannot be opened, and where."""
        model, _ = split_adapters(reference, self._folders)
        if reference == UNREAD or self._stages.get(model, "") is None:
            self.lacks_reported = True
            return None
        found = self._resolve(reference)
        if isinstance(found, Problem):
            if reference not in self._missing:
                self._missing.add(reference)
                self._findings.problems.append(replace(found, where=where))
            return None
        key = self.path_of(reference)
        if key not in self._by_identity:
            self._by_identity[key] = self._open(reference, found, where)
        return self._by_identity[key]

    def _resolve(self, reference: str) -> Located | Problem:
        if reference not in self._located:
            model, adapters = split_adapters(reference, self._folders)
            stage = self._stages.get(model)
            if stage is not None and not is_address(stage):
                base: Located | Problem = Located(stage)
            else:
                base = resolve_reference(stage or model, self._folders)
            found = [(resolve_reference(each, self._folders), weight) for each, weight in adapters]
            each_located = (base, *(each for each, _ in found))
            missing = next((each for each in each_located if isinstance(each, Problem)), None)
            self._located[reference] = missing or base
            self._adapters[reference] = tuple(
                (each, weight) for each, weight in found if isinstance(each, Located)
            )
        return self._located[reference]

    def check_renames(self) -> None:
        """Report models whose tensors the recipe renames, but which it does not merge."""
        opened = {model.path: model.reference for model in self.models}
        for renames in self._renames:
            is_asked_for = (
                renames.model in self._missing or self.path_of(renames.model) in self._by_identity
            )
            if not is_asked_for:
                message = f"`{renames.model}` is no model of this recipe"
                known = ", ".join(f"`{each}`" for each in opened.values())
                advice = did_you_mean(renames.model, opened.values()) or f"its models: {known}"
                self._findings.problems.append(
                    Problem("wrong-value", message, renames.where, advice=advice)
                )

    def _open(self, reference: str, located: Located, where: Place | None) -> InputModel | None:
        path = located.path
        try:
            checkpoint = self._checkpoint(located)
        except OxmergeError as error:
            self._findings.problems.append(error.as_problem())
            return None
        except OSError as error:
            file = path if error.filename is None else os.fspath(error.filename)
            advice = "download the model again, or check the permissions of its files"
            code = _code_of(error, "unreadable-checkpoint")
            problem = Problem(code, _os_message(error), file=file, advice=advice)
            self._findings.problems.append(problem)
            return None
        model = self._model(reference, located, checkpoint)
        if model is None:
            return None
        self.models.append(model)
        parts = (located, *(each for each, _ in self._adapters[reference]))
        odd = [each for part in parts for each in part.warnings]
        self._findings.warnings += [replace(each, where=where) for each in odd]
        self._findings.warnings += [
            Problem("odd-checkpoint", text, file=path) for text in checkpoint.warnings
        ]
        return model

    def _checkpoint(self, located: Located) -> Checkpoint:
        key = os.path.realpath(located.path)
        if key not in self._checkpoints:
            self._checkpoints[key] = open_located(located)
        return self._checkpoints[key]

    # Names.

    def _named(self, reference: str, checkpoint: Checkpoint) -> tuple[Checkpoint, list[Rename]]:
        """Return a model's tensors under the names that they have in the donor."""
        key = self.path_of(reference)
        own = [each for each in self._renames if self.path_of(each.model) == key]
        if self._donor is None or self.path_of(self._donor) != key:
            donor = None if self._donor is None else self._headers_of(self._donor)
            return named_as(donor, checkpoint, own, self._findings)
        for renames in own:
            message = f"the output has the names of `{reference}`, which stay as they are"
            advice = "rename the tensors of the other models to its names"
            problem = Problem("wrong-value", message, renames.where, advice=advice)
            self._findings.problems.append(problem)
        return checkpoint, []

    @cached_property
    def _own_heads(self) -> tuple[str, ...]:
        """The heads that models need, of which one has a head that is not its embedding.

        Of a model that ties its head, that is so only if it is the donor: the output is like it.
        """
        for reference in self._listed:
            checkpoint = None if reference == UNREAD else self._headers_of(reference)
            if checkpoint is None or not any(map(is_head, checkpoint.names())):
                continue
            config = read_object(_config_beside(str(self.locate(reference))))
            heads = set(filter(is_head, checkpoint.names())) - {*_tied_heads(checkpoint, config)}
            if heads and (reference == self._donor or not _is_tied(config)):
                return tuple(sorted(heads))
        return ()

    def _headers_of(self, reference: str) -> Checkpoint | None:
        """Return a model's headers; None if they cannot be read, which is told later."""
        found = self._resolve(reference)
        try:
            return self._checkpoint(found) if isinstance(found, Located) else None
        except OxmergeError:
            return None
        except OSError as error:
            if error.errno in NO_FILE or isinstance(error, PermissionError):
                return None
            raise  # the next time it may be read, and names would be others than this model's

    def _model(self, reference: str, located: Located, checkpoint: Checkpoint) -> InputModel | None:
        path = located.path
        config, config_file = self._read_config(path)
        heads = self._own_heads if _is_tied(config) else ()
        tied = () if heads else _tied_heads(checkpoint, config)
        if tied:
            checkpoint = checkpoint.without(tied)
        opened = [
            (open_adapter(each, self._findings), weight)
            for each, weight in self._adapters[reference]
        ]
        adapters = [(each, weight) for each, weight in opened if each is not None]
        if len(adapters) < len(opened):
            return None
        tokens = None
        if adapters:
            adapted = adapt(checkpoint, config, adapters, self._findings)
            if adapted is None:
                return None
            tokens = self._tokens_of(adapters, adapted.tokens, located, checkpoint, adapted)
            checkpoint, config = adapted.checkpoint, adapted.config
        embedding = find_embedding(checkpoint.names())
        if embedding is None or any(map(is_head, checkpoint.names())):
            heads = ()
        elif heads:
            checkpoint = checkpoint.adapted([], [(head, embedding) for head in heads], [], [])
            config = untied(config)
        checkpoint, rules = self._named(reference, checkpoint)
        runs = checkpoint.runs()
        counts = find_layer_counts(config)
        if not config and self.models:
            counts = find_layer_counts(self.models[0].config)  # its siblings' config will do
        layout = find_layout(dict.fromkeys(lead for lead, _, _ in runs), counts)
        return InputModel(
            index=len(self.models),
            reference=reference,
            path=path,
            located=located,
            pinned=self._pinned(reference, located),
            config=config,
            config_file=config_file,
            checkpoint=checkpoint,
            paths=tuple(str(file["path"]) for file in checkpoint.files),
            runs=runs,
            layout=layout,
            renamed=tuple(rules),
            tied=tied,
            untied=heads,
            adapter_files=tuple(adapter.config.file for adapter, _ in adapters),
            tokens=tokens,
        )

    def _tokens_of(
        self,
        adapters: Sequence[tuple[Adapter, float]],
        changed: int | None,
        located: Located,
        checkpoint: Checkpoint,
        adapted: Adapted,
    ) -> str | None:
        """Return where the tokenizer of an adapter lies that has changed what tokens there are."""
        own = folder_beside(located.path)
        for number, (adapter, _) in enumerate(adapters):
            has_one = token_files(adapter.path) or present(adapter.path, OPAQUE)
            is_same = not token_files(own) or same_files(own, adapter.path, only_tokens=True)
            if number == changed and has_one:
                return None if same_files(own, adapter.path) else adapter.path
            if number == changed and adapted.has_other_rows(checkpoint):
                message = "an adapter has rows for other tokens, and no tokenizer beside it"
                advice = "put the tokenizer that it was trained with into its folder"
            elif has_one and not is_same:
                message = "an adapter comes with other tokens than the model, and no rows for them"
                advice = "the model keeps its tokenizer: check that the adapter is for this model"
            else:
                continue
            problem = Problem("tokenizer-differs", message, file=adapter.path, advice=advice)
            self._findings.warnings.append(problem)
        return None

    def _pinned(self, reference: str, located: Located) -> str | None:
        """Return a reference with the commits of what it names on the Hub, if it names such."""
        model, adapters = split_adapters(reference, self._folders)
        parts = [(model, located, 1.0)]
        parts += (
            (name, found, weight)
            for (name, weight), (found, _) in zip(adapters, self._adapters[reference], strict=True)
        )
        if not any(found.pinned for _, found, _ in parts):
            return None
        pins = (
            f"{found.pinned or name}" + ("" if weight == 1 else f"={weight!r}")
            for name, found, weight in parts
        )
        return "+".join(pins)

    def _read_config(self, path: str) -> tuple[dict[str, Any], dict[str, Any] | None]:
        """Return the config beside the weights, and the file it is in as it was then."""
        file_name = _config_beside(path)
        try:
            config, status = read_json(file_name)
        except FileNotFoundError:
            return {}, None
        except (OSError, ValueError) as error:
            message, advice = f"cannot be read: {error}", "download it again, or mend it"
            code = _code_of(error, "unreadable-config")
            problem = Problem(code, message, file=file_name, advice=advice)
            self._findings.problems.append(problem)
            return {}, None
        return config if isinstance(config, dict) else {}, FileState.of(status).as_input(file_name)


def open_model(reference: str) -> InputModel:
    """Return one model by itself, with its adapters.

    Raises
    ------
    PlanError
        With every problem that it has.
    """
    findings = Findings()
    model = Inputs((os.getcwd(),), {}, findings).open(reference)
    if model is None or findings.problems:
        raise PlanError.of("cannot open the model", findings.problems, findings.warnings)
    return model


def _code_of(error: Exception, code: str) -> str:
    """Return `code`, unless the system is to blame and not the model."""
    is_of_system = isinstance(error, OSError) and error.errno not in NO_FILE
    return "unread-file" if is_of_system else code


def _os_message(error: OSError) -> str:
    text = os.strerror(error.errno) if error.errno else str(error)
    return f"cannot be opened: {text.lower()}"
