"""The models of a recipe, opened: their headers, configs and layers."""

from __future__ import annotations

import os
from dataclasses import dataclass

from oxmerge import _core
from oxmerge.errors import OxmergeError
from oxmerge.file_state import FileState
from oxmerge.json_files import read_json
from oxmerge.models.names import find_layer_counts, find_layout
from oxmerge.models.references import resolve_reference
from oxmerge.models.vocabularies import folder_beside
from oxmerge.problems import Problem

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from oxmerge._core import Checkpoint, TensorInfo
    from oxmerge.models.names import Layout, Stack

__all__ = ["InputModel", "Inputs"]


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
    """

    index: int
    reference: str
    path: str
    config: dict[str, Any]
    config_file: dict[str, Any] | None
    checkpoint: Checkpoint
    paths: tuple[str, ...]
    runs: list[tuple[str, int, int]]
    layout: Layout

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
        return _find_key(self.config, "tie_word_embeddings") is True

    @property
    def is_quantised(self) -> bool:
        """Whether its config says that its weights are quantised."""
        return bool(_find_key(self.config, "quantization_config"))

    @property
    def stack(self) -> Stack | None:
        """Its stack, if it has exactly one."""
        return self.layout.only_stack


def _find_key(config: dict[str, Any], key: str) -> object:
    """Return the value of a key at the top of a config, or in its text part."""
    for part in (config, config.get("text_config"), config.get("llm_config")):
        if isinstance(part, dict) and key in part:
            return part[key]
    return None


class Inputs:
    """Finds and opens models, each once, and collects what goes wrong.

    Parameters
    ----------
    folders : tuple of str
        Where relative paths may start.

    Attributes
    ----------
    problems, warnings : list of Problem
        Models that are not there or broken, and what is odd about the others.
    models : list of InputModel
        Those that could be opened, in order of first mention.
    """

    def __init__(self, folders: tuple[str, ...]) -> None:
        self.problems: list[Problem] = []
        self.warnings: list[Problem] = []
        self.models: list[InputModel] = []
        self._folders = folders
        self._paths: dict[str, str | None] = {}
        self._by_path: dict[str, InputModel | None] = {}

    def path_of(self, reference: str) -> str:
        """Return what identifies a model: its real path, or its reference if it is not found."""
        path = self._resolve(reference)
        return reference if path is None else os.path.realpath(path)

    def by_folder(self, folder: str) -> InputModel | None:
        """Return the opened model whose files lie in a folder, if there is one."""
        path = os.path.realpath(folder)
        each = (m for m in self.models if os.path.realpath(folder_beside(m.path)) == path)
        return next(each, None)

    def open(self, reference: str) -> InputModel | None:
        """Return the model, or None after reporting that it cannot be opened."""
        path = self._resolve(reference)
        if path is None:
            return None
        key = os.path.realpath(path)
        if key not in self._by_path:
            self._by_path[key] = self._open(reference, path)
        return self._by_path[key]

    def _resolve(self, reference: str) -> str | None:
        if reference not in self._paths:
            found = resolve_reference(reference, self._folders)
            if isinstance(found, Problem):
                self.problems.append(found)
            self._paths[reference] = found if isinstance(found, str) else None
        return self._paths[reference]

    def _open(self, reference: str, path: str) -> InputModel | None:
        try:
            checkpoint = _core.open_checkpoint(path)
        except OxmergeError as error:
            self.problems.append(error.as_problem())
            return None
        except OSError as error:
            file = path if error.filename is None else os.fspath(error.filename)
            advice = "download the model again, or check the permissions of its files"
            self.problems.append(
                Problem("checkpoint", _os_message(error), file=file, advice=advice)
            )
            return None
        model = self._model(reference, path, checkpoint)
        self.models.append(model)
        self.warnings += [Problem("checkpoint", text, file=path) for text in checkpoint.warnings]
        return model

    def _model(self, reference: str, path: str, checkpoint: Checkpoint) -> InputModel:
        runs = checkpoint.runs()
        config, config_file = self._read_config(path)
        counts = find_layer_counts(config)
        if not config and self.models:
            counts = find_layer_counts(self.models[0].config)  # its siblings' config will do
        layout = find_layout(dict.fromkeys(lead for lead, _, _ in runs), counts)
        return InputModel(
            index=len(self.models),
            reference=reference,
            path=path,
            config=config,
            config_file=config_file,
            checkpoint=checkpoint,
            paths=tuple(str(file["path"]) for file in checkpoint.files),
            runs=runs,
            layout=layout,
        )

    def _read_config(self, path: str) -> tuple[dict[str, Any], dict[str, Any] | None]:
        """Return the config beside the weights, and the file it is in as it was then."""
        file_name = os.path.join(folder_beside(path), "config.json")
        try:
            config, status = read_json(file_name)
        except FileNotFoundError:
            return {}, None
        except (OSError, ValueError) as error:
            message, advice = f"cannot be read: {error}", "download it again, or mend it"
            self.problems.append(Problem("config", message, file=file_name, advice=advice))
            return {}, None
        return config if isinstance(config, dict) else {}, FileState.of(status).as_input(file_name)


def _os_message(error: OSError) -> str:
    text = os.strerror(error.errno) if error.errno else str(error)
    return f"cannot be opened: {text.lower()}"
