"""Targets: which tensors the output has, and which tensors of the inputs each is made of.

The output has the donor's tensors, in the donor's order. With slices, the loose tensors of the
input side come from the first slice, the layers of each slice from that slice, renumbered, and the
loose tensors of the output side from the last.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from oxmerge.models.names import Place, join, position, side_of
from oxmerge.problems import Problem, shorten

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from oxmerge.models.inputs import InputModel
    from oxmerge.models.modules import Modules
    from oxmerge.models.names import Stack
    from oxmerge.planning.sections import Section, SectionSource
    from oxmerge.problems import Findings

__all__ = ["ModuleTargets", "Run", "SlicedTargets", "Target", "loose_side", "whole_targets"]

#: Candidates for a module that a message shows.
_SHOWN = 8


@dataclass(frozen=True, slots=True)
class Target:
    """An output tensor that needs a look, before its sources are compared.

    Attributes
    ----------
    name : str
        Its name in the output.
    run : Run
        The run it belongs to.
    rest : str
        What follows the run's lead in it, in the output and in every model.
    """

    name: str
    run: Run
    rest: str


@dataclass(frozen=True, slots=True)
class Run:
    """Output tensors that differ in nothing but their names: a layer, or loose ones.

    Attributes
    ----------
    section : Section
        The section they belong to.
    position : float
        Where their layer is in the section, from 0 to 1; mostly 0 for loose tensors.
    depth : float
        Where it is in the output, likewise; 0 for loose tensors.
    donor : InputModel
        The model that they are like.
    tensors : tuple of (int, int)
        Which of its tensors: the first and how many, in stretches.
    place : Place, optional
        Where they are in the donor.
    donor_lead, lead : str
        What their names begin with in the donor, and what in the output instead.
    leads : tuple of str
        The same in each source of the section.
    """

    section: Section
    position: float
    depth: float
    donor: InputModel
    tensors: tuple[tuple[int, int], ...]
    place: Place | None
    donor_lead: str
    lead: str
    leads: tuple[str, ...]

    def target(self, donor_name: str) -> Target:
        """Return the tensor that has that name in the donor."""
        rest = donor_name[len(self.donor_lead) :]
        return Target(self.lead + rest, self, rest)


def loose_side(name: str, place: Place | None) -> str | None:
    """Return the side of a loose tensor; extra layers follow the stack, on the output side."""
    return side_of(name) if place is None else "output"


def whole_targets(section: Section, donor: InputModel) -> Iterator[Run]:
    """Yield the tensors of a recipe of whole models, which are called alike everywhere."""
    leads = ("",) * len(section.sources)
    for lead, first, count in donor.runs:
        place = donor.layout.place(lead)
        where = donor.layout.position(lead)
        depth = 0.0 if place is None else where
        yield Run(section, where, depth, donor, ((first, count),), place, "", "", leads)


class ModuleTargets:
    """The targets of a recipe whose modules are merged apart.

    Parameters
    ----------
    sections : list of Section
        What the modules are made of: of each one section of whole models, or its slices.
    carried : Section
        For the tensors that are of none of them.
    modules : Modules
        Which tensors are of which module.
    donor : InputModel
        The model that gives the names.
    findings : Findings
        Takes modules that it does not have, or that are the same, and those without a tensor.
    """

    def __init__(
        self,
        sections: list[Section],
        carried: Section,
        modules: Modules,
        donor: InputModel,
        findings: Findings,
    ) -> None:
        self._sections: dict[str | None, list[Section]] = {None: [carried]}
        for section in sections:
            self._sections.setdefault(section.module, []).append(section)
        self._donor = donor
        self._findings = findings
        self._names = donor.checkpoint.names()
        self._modules = modules
        self._found = self._check_roots()
        self._sliced = {
            module: SlicedTargets(self._sections[module], donor, findings, modules)
            for module in self._found
            if self._sections[module][0].is_run
        }

    @property
    def sliced(self) -> list[SlicedTargets]:
        """The modules whose slices are listed."""
        return list(self._sliced.values())

    def sections_of(self, name: str) -> list[Section]:
        """Return the sections that decide a tensor of this name."""
        return self._sections.get(self._modules.of(name)) or self._sections[None]

    def __iter__(self) -> Iterator[Run]:
        idle = set(self._found)
        for run in whole_targets(self._sections[None][0], self._donor):
            for first, count in run.tensors:
                for of, at, length in _stretches(self._names, self._modules.of, first, count):
                    if of in self._sliced:
                        if of in idle:  # all that it makes stands where its first tensor was
                            yield from self._sliced[of]
                    else:
                        section = (self._sections.get(of) or self._sections[None])[0]
                        leads = ("",) * len(section.sources)
                        yield replace(run, section=section, tensors=((at, length),), leads=leads)
                    idle.discard(of or "")
        for module in self._found:
            if module in idle:
                message = f"the module `{shorten(module)}` gets no tensor"
                advice = "other modules, named more closely, have all of it: take it or them out"
                where = self._sections[module][0].where
                problem = Problem("no-effect", message, where, advice=advice)
                self._findings.warnings.append(problem)

    def _check_roots(self) -> dict[str, str]:
        """Return the root of each module that has one of its own; report the others."""
        found: dict[str, str] = {}
        for module, candidates in self._modules.roots.items():
            if module in self._sections:
                self._check_root(module, candidates, found)
        return found

    def _check_root(self, module: str, candidates: list[str], found: dict[str, str]) -> None:
        """Take down the root of a module, or report why it has none of its own."""
        donor, where = self._donor, self._sections[module][0].where
        called = f"module `{shorten(module)}`"
        if not candidates:
            message = f"`{donor.reference}` has no {called}"
            known = ", ".join(f"`{prefix}`" for prefix in donor.layout.stacks) or "none"
            advice = (
                "name what its tensors begin with, such as the part of a stack's before the layers"
            )
            problem = Problem("no-layers", message, where, donor.path, found=known, advice=advice)
        elif len(candidates) > 1:
            message = f"`{donor.reference}` has more than one {called}"
            listed = ", ".join(f"`{shorten(root)}`" for root in candidates[:_SHOWN])
            listed += ", ..." if len(candidates) > _SHOWN else ""
            advice = "name the one that is meant in full"
            problem = Problem("no-layers", message, where, donor.path, found=listed, advice=advice)
        elif candidates[0] in found.values():
            root = candidates[0]
            other = next(each for each, known in found.items() if known == root)
            message = f"the {called} is `{shorten(other)}` too"
            same = f"the tensors of `{shorten(root)}`" if root else "all tensors"
            advice = "list its models under one of the two names"
            problem = Problem("wrong-value", message, where, found=same, advice=advice)
        else:
            found[module] = candidates[0]
            return
        self._findings.problems.append(problem)


def _stretches(
    names: Sequence[str], module_of: Callable[[str], str | None], first: int, count: int
) -> Iterator[tuple[str | None, int, int]]:
    """Yield stretches of neighbours of one module: which, the first, and how many."""
    of = [module_of(name) for name in names[first : first + count]]
    begun = 0
    for at in range(1, count + 1):
        if at == count or of[at] != of[begun]:
            yield of[begun], first + begun, at - begun
            begun = at


class SlicedTargets:
    """The targets of a recipe of slices.

    Parameters
    ----------
    sections : list of Section
        The slices, in order; at least one.
    donor : InputModel
        The model that gives the config.
    findings : Findings
        Takes loose tensors that could be on either side, and stacks that are called differently.
    modules : Modules, optional
        Which tensors are of the module that the slices are of; all are unless given.

    Attributes
    ----------
    stack : Stack, optional
        The donor's layers; None if it does not have exactly one stack here, which is reported.
    depth : int
        How many layers the output has.
    layer_map : tuple of (int, int)
        The donor's index and its layer, for each layer of the output.
    """

    def __init__(
        self,
        sections: list[Section],
        donor: InputModel,
        findings: Findings,
        modules: Modules | None = None,
    ) -> None:
        self._problems = findings.problems
        self._modules = modules
        self.stack = donor.stack
        if modules is not None:
            prefixes = modules.stacks_of(sections[0].module or "")
            self.stack = donor.layout.stacks[prefixes[0]] if len(prefixes) == 1 else None
        self.depth = sum(section.length for section in sections)
        self.layer_map = tuple(
            (section.donor.model.index, section.donor.start + offset)
            for section in sections
            for offset in range(section.length)
        )
        self._sections = sections
        self._donor = donor
        self._stretches: dict[int, dict[int, list[tuple[int, int]]]] = {}

    def __iter__(self) -> Iterator[Run]:
        first, last = self._sections[0], self._sections[-1]
        stack = self.stack
        if stack is None or self._has_inner_modules(first, stack):
            return
        self._check_prefixes(stack)
        yield from self._loose(first, "input", stack)
        yield from self._layers(stack)
        yield from self._loose(last, "output", stack)

    def _has_inner_modules(self, section: Section, stack: Stack) -> bool:
        """Report other modules in the layers, which their slices have all of."""
        inner = [
            (module, root)
            for module, roots in ({} if self._modules is None else self._modules.roots).items()
            for root in roots
            if module != section.module and root.startswith(f"{stack.prefix}.")
        ]
        for module, root in inner:
            message = f"the module `{shorten(module)}` lies in layers whose slices are listed"
            advice = "leave it out, or list whole models under `models` of the other"
            found = f"`{shorten(root)}`"
            problem = Problem("wrong-value", message, section.where, found=found, advice=advice)
            self._problems.append(problem)
        return bool(inner)

    def _check_prefixes(self, stack: Stack) -> None:
        """Check that the output's layers have one name, whichever slice they come from."""
        for section in self._sections:
            other = section.donor.stack
            if other is not None and other.prefix != stack.prefix:
                message = f"the layers of `{section.donor.model.reference}` have another name"
                expected = f"`{stack.prefix}`, as in `{self._donor.reference}`"
                found = f"`{other.prefix}`"
                self._problems.append(
                    Problem(
                        "other-architecture",
                        message,
                        section.where,
                        file=section.donor.model.path,
                        expected=expected,
                        found=found,
                        advice="stack models that were saved by the same class",
                    )
                )

    def _loose(self, section: Section, side: str, stack: Stack) -> Iterator[Run]:
        donor = section.donor.model
        for lead, first, count in donor.runs:
            place = donor.layout.place(lead)
            if place is None:
                same = ("",) * len(section.sources)
                for at in range(first, first + count):
                    name = donor.checkpoint.tensor(at).name
                    if self._is_here(name) and self._side(name, None) == side:
                        yield Run(section, 0.0, 0.0, donor, ((at, 1),), None, "", "", same)
            elif place.is_extra and self._is_here(lead) and self._side(lead, place) == side:
                leads = tuple(_loose_lead(lead, place, each) for each in section.sources)
                output, stretch = self._extra_lead(place, stack), ((first, count),)
                yield Run(section, 0.0, 0.0, donor, stretch, place, lead, output, leads)

    def _is_here(self, name: str) -> bool:
        """Tell whether a tensor is of the module that the slices are of."""
        return self._modules is None or self._modules.of(name) == self._sections[0].module

    def _side(self, name: str, place: Place | None) -> str:
        side = loose_side(name, place)
        if side is None and not self._ends_agree():
            message = "cannot tell whether it comes before the layers or after them"
            advice = "make the first and the last slice list the same models and parameters"
            self._problems.append(Problem("loose-tensor", message, tensor=name, advice=advice))
        return side or "input"

    def _ends_agree(self) -> bool:
        return self._sections[0].settings == self._sections[-1].settings

    def _extra_lead(self, place: Place, stack: Stack) -> str:
        """Return an extra layer's name in the output, where it follows the last layer again."""
        return join(stack.prefix, place.layer - place.stack.depth + self.depth)

    def _layers(self, stack: Stack) -> Iterator[Run]:
        number = 0
        for section in self._sections:
            stretches = self._stretches_of(section.donor)
            for offset in range(section.length):
                found = stretches.get(section.donor.start + offset)
                if found:
                    depth = position(number, self.depth)
                    lead = join(stack.prefix, number)
                    yield _layer(section, offset, depth, tuple(found), lead)
                number += 1

    def _stretches_of(self, donor: SectionSource) -> dict[int, list[tuple[int, int]]]:
        index = donor.model.index
        if index not in self._stretches:
            self._stretches[index] = _stretches_by_layer(donor)
        return self._stretches[index]


def _layer(
    section: Section, offset: int, depth: float, tensors: tuple[tuple[int, int], ...], lead: str
) -> Run:
    leads = tuple(_layer_lead(each, offset) for each in section.sources)
    donor = section.donor
    donor_lead = _layer_lead(donor, offset)
    place = donor.model.layout.place(donor_lead)
    where = position(offset, section.length)
    return Run(section, where, depth, donor.model, tensors, place, donor_lead, lead, leads)


def _layer_lead(source: SectionSource, offset: int) -> str:
    stack = source.stack
    return "" if stack is None else join(stack.prefix, source.start + offset)


def _loose_lead(lead: str, place: Place, source: SectionSource) -> str:
    """Return an extra layer's name in another model: it follows that model's stack."""
    stack = source.stack
    if stack is None:
        return lead
    return join(stack.prefix, place.layer - place.stack.depth + stack.depth)


def _stretches_by_layer(source: SectionSource) -> dict[int, list[tuple[int, int]]]:
    stretches: dict[int, list[tuple[int, int]]] = {}
    for lead, first, count in source.model.runs:
        place = source.model.layout.place(lead)
        if place is not None and place.stack == source.stack and not place.is_extra:
            stretches.setdefault(place.layer, []).append((first, count))
    return stretches
