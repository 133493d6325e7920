"""Targets: which tensors the output has, and which tensors of the inputs each is made of.

The output has the donor's tensors, in the donor's order. With slices, the loose tensors of the
input side come from the first slice, the layers of each slice from that slice, renumbered, and the
loose tensors of the output side from the last.
"""

from __future__ import annotations

from dataclasses import dataclass

from oxmerge.names import Place, join, position, side_of
from oxmerge.problems import Problem

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from oxmerge.inputs import InputModel
    from oxmerge.names import Stack
    from oxmerge.sections import Section

__all__ = ["SlicedTargets", "Target", "loose_side", "whole_targets"]


@dataclass(frozen=True, slots=True)
class Target:
    """An output tensor before its sources are looked up.

    Attributes
    ----------
    name : str
        Its name in the output.
    section : Section
        The section it belongs to.
    position : float
        Where its layer is in the section, from 0 to 1; 0 for a loose tensor.
    donor_name : str
        Its name in the donor.
    names : tuple of str
        Its name in each source of the section.
    place : Place, optional
        Where it is in the donor.
    """

    name: str
    section: Section
    position: float
    donor_name: str
    names: tuple[str, ...]
    place: Place | None = None


def loose_side(name: str, place: Place | None) -> str | None:
    """Return the side of a loose tensor; extra layers follow the stack, on the output side."""
    return side_of(name) if place is None else "output"


def whole_targets(section: Section, donor: InputModel) -> Iterator[Target]:
    """Yield the targets of a recipe of whole models."""
    count = len(section.sources)
    for name in donor.tensors:
        place = donor.layout.place(name)
        in_stack = place is not None and not place.is_extra
        where = position(place.layer, place.stack.depth) if place and in_stack else 0.0
        yield Target(name, section, where, name, (name,) * count, place)


class SlicedTargets:
    """The targets of a recipe of slices.

    Parameters
    ----------
    sections : list of Section
        The slices, in order; at least one.
    donor : InputModel
        The model that gives the config.

    Attributes
    ----------
    problems : list of Problem
        Loose tensors that could be on either side, stacks that are called differently.
    depth : int
        How many layers the output has.
    layer_map : tuple of (int, int)
        The donor's index and its layer, for each layer of the output.
    """

    def __init__(self, sections: list[Section], donor: InputModel) -> None:
        self.problems: list[Problem] = []
        self.depth = sum(section.length for section in sections)
        self.layer_map = tuple(
            (section.donor.model.index, section.donor.start + offset)
            for section in sections
            for offset in range(section.length)
        )
        self._sections = sections
        self._donor = donor
        self._rests: dict[int, dict[int, list[str]]] = {}

    def __iter__(self) -> Iterator[Target]:
        first, last = self._sections[0], self._sections[-1]
        stack = self._donor.stack
        if stack is None:
            return
        self._check_prefixes(stack)
        yield from self._loose(first, "input", stack)
        yield from self._layers(stack)
        yield from self._loose(last, "output", stack)

    def _check_prefixes(self, stack: Stack) -> None:
        """Check that the output's layers have one name, whichever slice they come from."""
        for section in self._sections:
            other = section.donor.model.stack
            if other is not None and other.prefix != stack.prefix:
                message = f"the layers of `{section.donor.model.reference}` have another name"
                expected = f"`{stack.prefix}`, as in `{self._donor.reference}`"
                found = f"`{other.prefix}`"
                self.problems.append(
                    Problem(
                        "layers",
                        message,
                        section.where,
                        file=section.donor.model.path,
                        expected=expected,
                        found=found,
                        advice="stack models that were saved by the same class",
                    )
                )

    def _loose(self, section: Section, side: str, stack: Stack) -> Iterator[Target]:
        for name in section.donor.model.tensors:
            place = section.donor.model.layout.place(name)
            if (place is None or place.is_extra) and self._side(name, place) == side:
                output = name if place is None else self._extra_name(place, stack)
                sources = tuple(_loose_name(name, place, each.model) for each in section.sources)
                yield Target(output, section, 0.0, name, sources, place)

    def _side(self, name: str, place: Place | None) -> str:
        side = loose_side(name, place)
        if side is None and not self._ends_agree():
            message = "cannot tell whether it comes before the layers or after them"
            advice = "make the first and the last slice list the same models and parameters"
            self.problems.append(Problem("names", message, tensor=name, advice=advice))
        return side or "input"

    def _ends_agree(self) -> bool:
        return self._sections[0].settings == self._sections[-1].settings

    def _extra_name(self, place: Place, stack: Stack) -> str:
        """Return an extra layer's name in the output, where it follows the last layer again."""
        return join(stack.prefix, place.layer - place.stack.depth + self.depth, place.rest)

    def _layers(self, stack: Stack) -> Iterator[Target]:
        number = 0
        for section in self._sections:
            rests = self._rests_of(section.donor.model)
            for offset in range(section.length):
                where = position(offset, section.length)
                for rest in rests.get(section.donor.start + offset, ()):
                    yield _layer_target(
                        section, offset, rest, where, join(stack.prefix, number, rest)
                    )
                number += 1

    def _rests_of(self, model: InputModel) -> dict[int, list[str]]:
        if model.index not in self._rests:
            self._rests[model.index] = _rests_by_layer(model)
        return self._rests[model.index]


def _layer_target(section: Section, offset: int, rest: str, where: float, name: str) -> Target:
    names = tuple(_layer_name(each.model, each.start + offset, rest) for each in section.sources)
    donor = section.donor
    donor_name = _layer_name(donor.model, donor.start + offset, rest)
    stack = donor.model.stack
    place = None if stack is None else Place(stack, donor.start + offset, rest)
    return Target(name, section, where, donor_name, names, place)


def _layer_name(model: InputModel, layer: int, rest: str) -> str:
    stack = model.stack
    return "" if stack is None else join(stack.prefix, layer, rest)


def _loose_name(name: str, place: Place | None, model: InputModel) -> str:
    """Return a loose tensor's name in another model: an extra layer follows that model's stack."""
    stack = model.stack
    if place is None or stack is None:
        return name
    return join(stack.prefix, place.layer - place.stack.depth + stack.depth, place.rest)


def _rests_by_layer(model: InputModel) -> dict[int, list[str]]:
    rests: dict[int, list[str]] = {}
    for place in _places(model.layout.place(name) for name in model.tensors):
        rests.setdefault(place.layer, []).append(place.rest)
    return rests


def _places(places: Iterable[Place | None]) -> Iterator[Place]:
    return (place for place in places if place is not None and not place.is_extra)
