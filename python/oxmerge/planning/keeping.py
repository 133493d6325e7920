"""Keeping: tensors that are left to one model, as they are there.

The recipe names them (`keep`), or it says that the base's are taken where another model lacks them
or has them in another shape (`on_mismatch: base`). The plan tells which these are, and why.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from oxmerge.planning.accounting import compact_names
from oxmerge.problems import Problem
from oxmerge.recipe.patterns import compile_pattern

TYPE_CHECKING = False
if TYPE_CHECKING:
    import re
    from collections.abc import Iterator

    from oxmerge import _core
    from oxmerge.models.inputs import InputModel, Inputs
    from oxmerge.planning.targets import Run
    from oxmerge.problems import Findings, Place
    from oxmerge.recipe.recipe import Extensions

    Column = tuple[InputModel, str]

__all__ = ["Keeping", "KeptOfRun"]

#: Names that a note shows; `Plan.explain` tells of each tensor.
_SHOWN = 8


@dataclass(eq=False, slots=True)
class _Rule:
    """Which tensors are left to a model: the donor of their run, unless another is given."""

    where: Place
    pattern: re.Pattern[str]
    model: InputModel | None
    is_used: bool = False


@dataclass(slots=True)
class KeptOfRun:
    """The tensors of a run that are left to one model.

    Attributes
    ----------
    inputs : int
        How many inputs the method has; the columns follow theirs.
    columns : list of (InputModel, str)
        The models that tensors are kept from, and what their names begin with there.
    places : list of Place
        For each column, the place in the recipe that says so.
    kept : dict of int to int
        The column of tensors that the recipe names, by their positions in the run.
    otherwise : int, optional
        The column of tensors that do not match.
    """

    inputs: int
    columns: list[Column] = field(default_factory=list)
    places: list[Place] = field(default_factory=list)
    kept: dict[int, int] = field(default_factory=dict)
    otherwise: int | None = None

    def add(self, column: Column, where: Place) -> int:
        """Add a column, and return its number."""
        self.columns.append(column)
        self.places.append(where)
        return self.inputs + len(self.columns) - 1

    def place(self, column: int) -> Place:
        """Return the place in the recipe that says so."""
        return self.places[column - self.inputs]


class Keeping:
    """Decides which tensors are left to one model, and takes down what becomes of the others.

    Parameters
    ----------
    extensions : Extensions
        What the recipe says.
    inputs : Inputs
        Opens the models that tensors are kept from.
    findings : Findings
        Takes models that cannot be opened, and layers of a model that no slice lists.

    Attributes
    ----------
    passed_over : dict of (int, str) to str
        Why a tensor of a model is not in the output, by the model's number and the name.
    """

    def __init__(self, extensions: Extensions, inputs: Inputs, findings: Findings) -> None:
        self.passed_over: dict[tuple[int, str], str] = {}
        self._problems = findings.problems
        self._mismatch = extensions.on_mismatch
        self._notes: dict[str, list[str]] = {}
        self._rules: list[_Rule] = []
        for keep in extensions.keep:
            pattern = compile_pattern(keep.pattern)
            model = None if keep.model is None else inputs.open(keep.model, keep.where)
            if model is not None or keep.model is None:
                self._rules.append(_Rule(keep.where, pattern, model))

    def of(self, run: Run) -> KeptOfRun:
        """Return which tensors of a run are left to one model, before the others are compared."""
        found = KeptOfRun(len(run.section.sources))
        if run.section.is_carried:
            whole = found.add((run.donor, run.donor_lead), run.section.where)
            found.kept.update(dict.fromkeys(range(sum(n for _, n in run.tensors)), whole))
        columns: dict[int, int] = {}
        for at, name in enumerate(_names(run) if self._rules else ()):
            rule = self._rule_for(name)
            column = None if rule is None else self._column(run, rule)
            if rule is not None and column is not None:
                if id(rule) not in columns:
                    columns[id(rule)] = found.add(column, rule.where)
                found.kept[at] = columns[id(rule)]
        if self._mismatch is not None:
            found.otherwise = found.add((run.donor, run.donor_lead), self._mismatch)
        return found

    def _rule_for(self, name: str) -> _Rule | None:
        rule = next((rule for rule in self._rules if rule.pattern.fullmatch(name)), None)
        if rule is not None:
            rule.is_used = True
        return rule

    def _column(self, run: Run, rule: _Rule) -> Column | None:
        """Return where a run's tensors are in the model that they are kept from."""
        if rule.model is None or rule.model is run.donor:
            return run.donor, run.donor_lead
        for source, lead in zip(run.section.sources, run.leads, strict=True):
            if source.model is rule.model:
                return source.model, lead
        if not run.donor_lead:  # where tensors are called alike everywhere
            return rule.model, ""
        reference = rule.model.reference
        message = f"the slice of a layer does not list `{reference}`, which the layer is kept from"
        advice = "list the model in the slice, or keep tensors outside of the layers only"
        problem = Problem("wrong-value", message, rule.where, advice=advice)
        if problem not in self._problems:
            self._problems.append(problem)
        return None

    # What is told.

    def take_down(self, kept: KeptOfRun, run: Run, table: _core.Assembly, found: _core.Run) -> None:
        """Take down what is kept of a run, and what is passed over for it."""
        sources = run.section.sources
        for at, column in sorted(found.kept().items()):
            name, names = table.names(found, at)
            model, _ = kept.columns[column - kept.inputs]
            place, is_mismatch = kept.place(column).path, column == kept.otherwise
            if not is_mismatch:
                self._note(f"kept from `{model.reference}` ({place})", name)
            shape = run.donor.checkpoint.tensor(found.tensor(at)).shape
            for source, own in zip(sources, names, strict=False):
                tensor = None if own is None else source.model.checkpoint.get(own)
                if is_mismatch and (tensor is None or tensor.shape != shape):
                    what = "lacks them" if tensor is None else "has them in another shape"
                    other = source.model.reference
                    why = f"from `{model.reference}` alone, since `{other}` {what} ({place})"
                    self._note(why, name)
                if own is not None and source.model is not model:
                    reason = f"that of `{model.reference}` is taken ({place})"
                    self.passed_over[source.model.index, own] = reason

    def _note(self, what: str, name: str) -> None:
        self._notes.setdefault(what, []).append(name)

    def notes(self) -> Iterator[str]:
        """Yield which tensors are left to one model, and why."""
        for what, names in self._notes.items():
            count = "1 tensor" if len(names) == 1 else f"{len(names)} tensors"
            listed = compact_names(names)
            more = ", ..." if len(listed) > _SHOWN else ""
            yield f"{count} {what}: {', '.join(listed[:_SHOWN])}{more}"

    def unused(self) -> list[Problem]:
        """Return a warning for each pattern that is for no tensor."""
        return [
            Problem(
                "no-effect",
                "no tensor of the output is called so",
                rule.where,
                advice="`*` stands for any part of a name; `oxmerge inspect` lists the names",
            )
            for rule in self._rules
            if not rule.is_used
        ]


def _names(run: Run) -> Iterator[str]:
    """Yield the names that the tensors of a run have in the output."""
    tensor, skipped = run.donor.checkpoint.tensor, len(run.donor_lead)
    for first, count in run.tensors:
        for at in range(first, first + count):
            yield run.lead + tensor(at).name[skipped:]
