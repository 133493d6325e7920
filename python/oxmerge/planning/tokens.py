"""Tokens: which tokenizer the output has, and which row of each model stands for which token.

A row of an embedding means the token whose id it has, so that models with different tokenizers are
merged by token. The engine takes the rows (`_core.TokenRows`); what is decided here is of which
files, and what recipes say of single tokens.
"""

from __future__ import annotations

import os
import tempfile
from collections import Counter
from dataclasses import dataclass

from oxmerge import _core
from oxmerge.errors import OxmergeError
from oxmerge.json_files import read_object
from oxmerge.models.names import is_vocabulary
from oxmerge.models.vocabularies import OPAQUE, folder_beside, present, same_files, token_files
from oxmerge.output.side_files import folder_of
from oxmerge.output.token_ids import COUNTS, GENERATION_CONFIG, ids_in
from oxmerge.output.tokenizers import OutputTokenizer, build_tokenizer
from oxmerge.problems import UNSUPPORTED, Problem
from oxmerge.recipe.recipe import MOST_ROWS

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any

    from oxmerge.models.inputs import InputModel, Inputs
    from oxmerge.planning.sections import Section
    from oxmerge.problems import Findings
    from oxmerge.recipe.recipe import Recipe, Tokenizer, TokenRow

__all__ = ["Alignment", "TokenPlanner"]

_TABLE = 2


@dataclass(frozen=True, slots=True)
class Given:
    """A row that models are given.

    Attributes
    ----------
    asked : TokenRow
        What the recipe says.
    giver : int
        The number of the model that gives it.
    takers : frozenset of int
        Those of the models that are given it.
    """

    asked: TokenRow
    giver: int
    takers: frozenset[int]


@dataclass(frozen=True, slots=True)
class Alignment:
    """How the rows of vocabularies are taken.

    Attributes
    ----------
    rows : _core.TokenRows
        Which row of each model stands for which token.
    names : frozenset of str
        The tensors that have a row for each token.
    rows_of : tuple of int
        How many rows those of each model have.
    total : int
        How many they have in the output.
    tokenizer : OutputTokenizer
        The tokenizer that the output has.
    ids : dict of int to (int or None), optional
        What becomes of the ids that the donor's configs name; None if all stay what they are.
    given : tuple of Given
        The rows that the recipe has models take from each other.
    """

    rows: _core.TokenRows
    names: frozenset[str]
    rows_of: tuple[int, ...]
    total: int
    tokenizer: OutputTokenizer
    ids: dict[int, int | None] | None
    given: tuple[Given, ...] = ()

    @property
    def memory(self) -> int | None:
        """Bytes that the process took which built the tokenizer; None if none was built."""
        return None if self.tokenizer.built is None else self.tokenizer.built.memory


class TokenPlanner:
    """Finds the output's tokenizer and the rows of its tokens, and collects what stands against it.

    Parameters
    ----------
    recipe : Recipe
        What is asked for.
    inputs : Inputs
        The models.
    donor : InputModel
        The model that the output is like.
    sections : sequence of Section
        The slices.
    findings : Findings
        Takes tokenizers that cannot be read or matched, tokens that are not there.
    """

    def __init__(
        self,
        recipe: Recipe,
        inputs: Inputs,
        donor: InputModel,
        sections: Sequence[Section],
        findings: Findings,
    ) -> None:
        self._problems = findings.problems
        self._warnings = findings.warnings
        self._before = len(self._problems)
        self._base = None if recipe.base_model is None else donor.index
        self._inputs = inputs
        self._donor = donor
        self._sections = sections
        self._given: list[Given] = []

    @property
    def found_problems(self) -> bool:
        """Whether something was reported."""
        return len(self._problems) > self._before

    def align(self, asked: Tokenizer) -> Alignment | None:
        """Return how rows are taken; None if they are as they are, or something was reported."""
        if not folder_of(self._donor.path).is_dir():
            message = f"the donor `{self._donor.reference}` is a file, and none beside it is copied"
            advice = "name its folder, whose tokenizer the output then has"
            self._report(asked, message, advice)
            return None
        try:
            return self._align(asked)
        except OxmergeError as error:
            self._problems.append(error.as_problem("unreadable-config"))
        except OSError as error:
            message, found = "a tokenizer cannot be read", os.strerror(error.errno or 0)
            self._problems.append(
                Problem("unreadable-config", message, file=error.filename, found=found)
            )
        return None

    def _report(
        self, asked: Tokenizer | TokenRow, message: str, advice: str, *, code: str = "wrong-value"
    ) -> None:
        self._problems.append(Problem(code, message, asked.where, advice=advice))

    def _align(self, asked: Tokenizer) -> Alignment | None:
        source = self._source(asked)
        if source is None:
            return None
        files = self._files(asked, source)
        if files is None:
            return None
        of_models, of_source = files
        names, rows_of = self._vocabulary_tensors()
        models = list(zip(of_models, rows_of, strict=True))
        # A token of the base that has no row is none of the output's.
        limit = rows_of[self._donor.index] if self._is_donor(source) else MOST_ROWS
        rows = _core.TokenRows(of_source, limit, models, self._base)
        tokenizer = source
        if asked.source == "union" or any(rows.find(each.token) is None for each in asked.tokens):
            found = self._built(asked, source, rows, models)
            if found is None:
                return None
            tokenizer, rows = found
        before = len(self._problems)
        for token in asked.tokens:
            self._fill(token, rows, of_models, rows_of)
        if len(self._problems) > before:
            return None
        total = self._resize(asked, rows, source, rows_of)
        self._warn(asked, tokenizer)
        self._check_others(asked, names, rows_of, total)
        ids = None
        if not self._is_donor(source):
            ids = self._moved_ids(of_models[self._donor.index], rows)
        return Alignment(rows, names, rows_of, total, tokenizer, ids, tuple(self._given))

    # Whose tokenizer.

    def _source(self, asked: Tokenizer) -> OutputTokenizer | None:
        """Return the tokenizer that the output has, or that its own is built on."""
        own = self._donor.tokenizer_folder
        if asked.source in ("base", "union"):
            return OutputTokenizer(self._donor.reference, own)
        path = self._inputs.locate(asked.source)
        if isinstance(path, Problem):
            advice = f"{path.advice}; or write `base` for the tokenizer of the donor"
            self._report(asked, path.message, advice, code=path.code)
            return None
        folder = folder_beside(path)
        if same_files(own, folder):
            folder = own
        return OutputTokenizer(asked.source, folder)

    def _is_donor(self, source: OutputTokenizer) -> bool:
        own = self._donor.tokenizer_folder
        return os.path.realpath(source.folder) == os.path.realpath(own)

    def _files(
        self, asked: Tokenizer, source: OutputTokenizer
    ) -> tuple[list[list[str]], list[str]] | None:
        """Return the files that tell the tokens of each model, and those of the output.

        A model without a tokenizer has that of the donor.
        """
        own = self._donor.tokenizer_folder
        folders = [model.tokenizer_folder for model in self._inputs.models]
        references = [model.reference for model in self._inputs.models]
        folders.append(source.folder)
        references.append(source.reference)
        before = len(self._problems)
        found: list[list[str]] = []
        for at, (reference, folder) in enumerate(zip(references, folders, strict=True)):
            files, opaque = token_files(folder), present(folder, OPAQUE)
            if not files and not same_files(own, folder, only_tokens=True):
                if opaque or at == len(self._inputs.models):
                    self._report_opaque(asked, reference, opaque[0] if opaque else None)
                files = token_files(own)
            found.append(files)
        if len(self._problems) > before:
            return None
        if not token_files(own):
            # All have the donor's, in a file that only its own program reads; or none has any.
            if any(found) or asked.tokens or asked.multiple is not None:
                opaque = present(own, OPAQUE)
                self._report_opaque(asked, self._donor.reference, opaque[0] if opaque else None)
            return None
        return found[:-1], found[-1]

    def _report_opaque(self, asked: Tokenizer, reference: str, file: str | None) -> None:
        has = "no tokenizer" if file is None else f"its tokens in a `{file}` only"
        message = f"the tokens of `{reference}` cannot be matched: it has {has}"
        advice = (
            "put a `tokenizer.json` beside it: in Python with transformers, "
            f'`AutoTokenizer.from_pretrained("{reference}").save_pretrained("{reference}")`'
        )
        if file == "tekken.json":
            advice = "take the repository of the same model that has a `tokenizer.json`"
        self._report(asked, message, advice, code=UNSUPPORTED)

    def _moved_ids(self, files: list[str], rows: _core.TokenRows) -> dict[int, int | None]:
        """Return what becomes of the ids in the donor's configs."""
        folder = folder_beside(self._donor.path)
        configs = (self._donor.config, read_object(os.path.join(folder, GENERATION_CONFIG)))
        named = sorted({number for config in configs for number in ids_in(config)})
        found = _core.tokens_of(files, named)
        return {number: rows.find(found[number]) if number in found else None for number in named}

    # Rows.

    def _vocabulary_tensors(self) -> tuple[frozenset[str], tuple[int, ...]]:
        """Return the tensors that have a row for each token, and how many rows each model has."""
        names: set[str] = set()
        rows_of: list[int] = []
        for model in self._inputs.models:
            loose = filter(is_vocabulary, _loose(model))
            shapes = {name: _shape(model, name) for name in loose}
            counts = Counter(shape[0] for shape in shapes.values() if len(shape) == _TABLE)
            stated = model.config.get("vocab_size")
            rows = max(counts, default=0)
            if isinstance(stated, int) and stated in counts:
                rows = stated
            rows_of.append(rows)
            names |= {name for name, shape in shapes.items() if shape and shape[0] == rows}
        return frozenset(names), tuple(rows_of)

    def _resize(
        self,
        asked: Tokenizer,
        rows: _core.TokenRows,
        source: OutputTokenizer,
        rows_of: tuple[int, ...],
    ) -> int:
        """Give the output its number of rows: padded as the model is whose tokenizer it has."""
        if asked.multiple is not None:
            padded = -(-rows.rows // asked.multiple) * asked.multiple
            rows.resize(padded, with_mean=True)
        else:
            at = self._inputs.by_folder(source.folder)
            rows.resize(max(rows.rows, 0 if at is None else rows_of[at.index]), with_mean=False)
        return rows.rows

    # Building.

    def _built(
        self,
        asked: Tokenizer,
        source: OutputTokenizer,
        rows: _core.TokenRows,
        models: list[tuple[list[str], int]],
    ) -> tuple[OutputTokenizer, _core.TokenRows] | None:
        """Return a tokenizer that has all tokens, built if need be, and the rows of these."""
        new = [each.token for each in asked.tokens if rows.find(each.token) is None]
        more = []
        if asked.source == "union":
            ordered = sorted(self._inputs.models, key=lambda model: model is not self._donor)
            more = [model for model in ordered if rows.foreign(model.index)]
        if not new and not more:
            return source, rows
        base = token_files(source.folder)
        for reference, files in [
            (source.reference, base),
            *((model.reference, models[model.index][0]) for model in more),
        ]:
            if os.path.basename(files[0]) != "tokenizer.json":
                self._report_opaque(asked, reference, os.path.basename(files[0]))
                return None
        limit = models[self._donor.index][1] if self._is_donor(source) else MOST_ROWS
        others = [(models[model.index][0][0], models[model.index][1]) for model in more]
        built = build_tokenizer(base[0], limit, others, new)
        with tempfile.TemporaryDirectory(prefix="oxmerge-") as folder:
            file = os.path.join(folder, "tokenizer.json")
            with open(file, "wb") as out:
                out.write(built.data)
            rows = _core.TokenRows([file], MOST_ROWS, models, self._base)
        return OutputTokenizer(source.reference, source.folder, built), rows

    def _warn(self, asked: Tokenizer, tokenizer: OutputTokenizer) -> None:
        """Tell of tokens that change how text is cut."""
        if tokenizer.built is None:
            return
        for file, count in tokenizer.built.ordinary.items():
            if count:
                message = (
                    f"{count} tokens are added to those of `{tokenizer.reference}`, and text is "
                    "cut at them first: merges and scores of two tokenizers do not mix"
                )
                advice = "write `tokenizer_source: base` to leave them out"
                self._warnings.append(
                    Problem("tokenizer-differs", message, asked.where, file=file, advice=advice)
                )

    def _check_others(
        self, asked: Tokenizer, names: frozenset[str], rows_of: tuple[int, ...], total: int
    ) -> None:
        """Report a tensor that seems to have a place for each token along another dimension."""
        rows = rows_of[self._donor.index]
        if total == rows or rows in _other_numbers(self._donor.config):
            return
        for name in _loose(self._donor):
            if name not in names and rows in _shape(self._donor, name):
                message = (
                    f"not supported yet: another number of tokens, where `{name}` of "
                    f"`{self._donor.reference}` has {rows} numbers that may belong to tokens"
                )
                advice = "write `tokenizer_source: base`"
                self._report(asked, message, advice, code=UNSUPPORTED)

    # Single tokens.

    def _fill(
        self,
        asked: TokenRow,
        rows: _core.TokenRows,
        files: list[list[str]],
        rows_of: tuple[int, ...],
    ) -> None:
        """Take down what a recipe says of the row of one token."""
        row = rows.find(asked.token)
        if row is None:
            message = f"the output's tokenizer does not take the token `{asked.token}`"
            self._report(asked, message, "leave it out")
            return
        if asked.kind in (None, "zero"):
            rows.fill(row, asked.kind, force=asked.force)
            return
        model = self._merged(asked)
        if model is None:
            return
        if asked.kind == "model":
            if not rows.has(model.index, row):
                message = f"`{model.reference}` has no row for the token `{asked.token}`"
                self._report(asked, message, "name a model that has it, or `{kind: zero}`")
                return
            rows.fill(row, "model", model.index, force=asked.force)
            self._give(asked, rows, row, model)
            return
        of = asked.of
        if isinstance(of, str):
            found = _core.find_token(files[model.index], of)
            of = rows_of[model.index] if found is None else found
        if of >= rows_of[model.index]:
            message = f"`{model.reference}` has no row for `{asked.of}`"
            advice = f"name one of its tokens, or a row below {rows_of[model.index]}"
            self._report(asked, message, advice)
            return
        rows.fill(row, "row", model.index, of, force=asked.force)
        self._give(asked, rows, row, model)

    def _give(self, asked: TokenRow, rows: _core.TokenRows, row: int, giver: InputModel) -> None:
        indices = (model.index for model in self._inputs.models)
        takers = (at for at in indices if asked.force or not rows.has(at, row))
        self._given.append(Given(asked, giver.index, frozenset(takers)))

    def _merged(self, asked: TokenRow) -> InputModel | None:
        """Return the model that gives a token its row; it must be part of the merge there."""
        path = self._inputs.path_of(asked.model)
        ends = (self._sections[0], self._sections[-1]) if self._sections else ()
        each = [
            next((s.model for s in part.sources if os.path.realpath(s.model.path) == path), None)
            for part in ends
        ]
        if not each or None in each:
            message = f"`{asked.model}` is not merged where the rows of tokens are"
            advice = "name a model of the recipe; with slices, one of the first and of the last"
            self._report(asked, message, advice)
            return None
        return each[0]


def _loose(model: InputModel) -> list[str]:
    """Return the names of the tensors that are in no layer."""
    return [
        model.checkpoint.tensor(at).name
        for lead, first, count in model.runs
        if model.layout.place(lead) is None
        for at in range(first, first + count)
    ]


def _other_numbers(config: dict[str, Any]) -> set[int]:
    """Return the whole numbers in a config that are no counts of tokens."""
    found: set[int] = set()
    for key, value in config.items():
        if isinstance(value, dict):
            found |= _other_numbers(value)
        elif isinstance(value, int) and key not in COUNTS:
            found.add(value)
    return found


def _shape(model: InputModel, name: str) -> tuple[int, ...]:
    tensor = model.checkpoint.get(name)
    return () if tensor is None else tuple(tensor.shape)
