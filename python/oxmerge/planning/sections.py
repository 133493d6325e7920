"""Sections: the slices of a recipe with their models opened and their parameters at hand.

A recipe of whole models is one section. Every model, count and range that does not fit is reported
here, and planning goes on with what is left.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

from oxmerge.methods import modifiers
from oxmerge.models.modules import find_modules
from oxmerge.planning.parameters import Resolver, SettingReader, check_settings
from oxmerge.problems import Problem, shorten
from oxmerge.recipe.recipe import UNREAD, Slice, Source

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

    from oxmerge.methods import Method
    from oxmerge.models.inputs import InputModel, Inputs
    from oxmerge.models.modules import Modules
    from oxmerge.models.names import Stack
    from oxmerge.problems import Findings, Place
    from oxmerge.recipe.recipe import Recipe, Setting, Settings

__all__ = ["Section", "SectionBuilder", "SectionSource"]

#: What makes a section one whose tensors are checked, not planned.
_UNSOUND = frozenset(
    ("base-not-listed", "duplicate-model", "input-count", "layer-range", "no-layers")
)


@dataclass(frozen=True, slots=True)
class SectionSource:
    """A model in a section.

    Attributes
    ----------
    model : InputModel
        The model.
    resolver : Resolver
        Its parameters.
    start : int
        Its first layer here.
    stack : Stack, optional
        The layers that it is numbered in; None where whole models are merged.
    """

    model: InputModel
    resolver: Resolver
    start: int = 0
    stack: Stack | None = None


@dataclass(frozen=True, slots=True)
class Section:
    """A slice made ready.

    Attributes
    ----------
    where : Place
        The place in the recipe.
    sources : tuple of SectionSource
        In listed order, those whose model could be opened.
    base : int, optional
        Which of them is the base.
    donor : SectionSource
        The one whose tensors the output has.
    shared : Resolver
        The parameters that the inputs of a tensor share.
    scale : Resolver
        The factor of what the method adds to the base, if the recipe has one.
    length : int
        How many layers it has; 0 in a recipe of whole models.
    settings : tuple
        What the recipe says here; two sections that agree in it treat a loose tensor alike.
    module : str, optional
        The module that it is for.
    is_run : bool
        Whether it is a run of layers; else it is of whole models.
    is_carried : bool
        Whether its tensors are the donor's as they are.
    is_sound : bool
        Whether nothing about it was reported. What an unsound one makes is checked, not planned.
    """

    where: Place
    sources: tuple[SectionSource, ...]
    base: int | None
    donor: SectionSource
    shared: Resolver
    scale: Resolver
    length: int
    settings: tuple[object, ...]
    module: str | None = None
    is_run: bool = False
    is_carried: bool = False
    is_sound: bool = True


class SectionBuilder:
    """Makes the sections of a recipe, and collects what does not fit.

    Parameters
    ----------
    recipe : Recipe
        What the user asked for.
    method : Method
        The recipe's method.
    methods : iterable of Method
        Every method, for what their parameters are called.
    inputs : Inputs
        Opens the models.
    reader : SettingReader
        Converts the settings.
    findings : Findings
        Takes what does not fit, and what has no effect.
    """

    def __init__(
        self,
        recipe: Recipe,
        method: Method,
        methods: Iterable[Method],
        inputs: Inputs,
        reader: SettingReader,
        findings: Findings,
    ) -> None:
        self._findings = findings
        self._recipe = recipe
        self._levels = (recipe.module_parameters, recipe.parameters)
        self._method = method
        self._known = {each.name for one in methods for each in one.parameters}
        self._inputs = inputs
        self._reader = reader

    def build(self) -> list[Section]:
        """Return the sections that could be made."""
        self._check_base()
        self._check_names(self._recipe.module_parameters, "all")
        self._check_names(self._recipe.parameters, "all")
        recipe = self._recipe
        of_modules = {id(each.module_parameters): each.module_parameters for each in recipe.modules}
        for settings in of_modules.values():
            self._check_names(settings, "all")
        if not recipe.sources:
            return []  # which is reported
        sections = [self._section(self._with_base(part)) for part in self._parts()]
        return [section for section in sections if section is not None]

    def _parts(self) -> tuple[Slice, ...]:
        """Return what the recipe lists: slices, modules or their slices, or whole models."""
        recipe = self._recipe
        whole = Slice(recipe.place("models"), recipe.models)
        return recipe.slices or recipe.modules or (whole,)

    def _with_base(self, part: Slice) -> Slice:
        """Return a part with the base as an input, where it is of whole models."""
        base = self._recipe.base_model if self._takes_base(part) else self._base_reference(None)
        if part.is_run or base is None or not part.sources or self._lists(part.sources, base):
            return part
        source = Source(base, self._recipe.place("base_model"))
        return replace(part, sources=(*part.sources, source))

    def _takes_base(self, part: Slice) -> bool:
        """Tell whether an unlisted base is an input like the others, as in mergekit.

        There it always is, and the merge fails if nothing says its weight; here it then takes no
        part, as people who write so mean it.
        """
        levels = (part.parameters, part.module_parameters, *self._levels)
        has_weight = any("weight" in level for level in levels)
        return self._method.name == "karcher" or (self._method.name == "linear" and has_weight)

    def _base_reference(self, part: Slice | None) -> str | None:
        """Return the base that takes part in the arithmetic."""
        own = None if part is None else part.base_model
        return None if self._method.base == "ignored" else own or self._recipe.base_model

    def _lists(self, sources: tuple[Source, ...], reference: str) -> bool:
        path = self._inputs.path_of(reference)
        return any(self._inputs.path_of(source.model) == path for source in sources)

    # Checks.

    def _check_base(self) -> None:
        recipe, method = self._recipe, self._method
        has_own = all(part.base_model for part in self._parts())
        if method.base == "required" and recipe.base_model is None and not has_own:
            message = f"method `{method.name}` needs a `base_model`"
            advice = "name the model that the others were made from"
            if method.inputs.most == 2:  # noqa: PLR2004 - from one to the other
                advice = "name the one of the two models that it begins with"
            where = recipe.place("merge_method")
            self._findings.problems.append(Problem("missing-base", message, where, advice=advice))
        if not recipe.modules:  # else tensors may be carried from it
            self.check_ignored_base()

    def check_ignored_base(self) -> None:
        """Warn of a base that the output has no numbers of."""
        base = self._recipe.base_model
        if self._method.base != "ignored" or base is None:
            return
        parts = self._parts()
        if self._lists(self._recipe.sources, base) or any(
            self._takes_base(part) for part in parts if not part.is_run
        ):
            return
        message = f"`base_model` is no input of method `{self._method.name}`"
        advice = "it gives the names, the config and the tokenizer; to merge it, list it"
        where = self._recipe.place("base_model")
        self._findings.warnings.append(Problem("no-effect", message, where, advice=advice))

    def _check_names(self, settings: Settings, level: str) -> None:
        check_settings(settings, self._method, self._known, self._findings, level=level)

    def _check_counts(self, part: Slice, *, has_base: bool) -> None:
        method, count = self._method, len(part.sources)
        if not has_base and method.base == "required":
            return  # the missing base is reported, and how many others it needs can be seen then
        if not method.inputs.allows(count):
            words = " (the base included)" if has_base else ""
            self._report_count(part, method.inputs.of("model") + words, count)
        elif not method.others.allows(count - has_base):
            words = " besides the base" if has_base else ""
            self._report_count(part, method.others.of("model") + words, count - has_base)

    def _report_count(self, part: Slice, counts: str, count: int) -> None:
        message, found = f"method `{self._method.name}` takes {counts}", str(count)
        advice = "list so many, or use another method: `oxmerge methods` shows what each takes"
        listed = self._recipe.models
        if listed and count == len(listed) + 1:
            found += f": {len(listed)} are listed, and the base `{part.sources[-1].model}` is not"
            if self._method.inputs.allows(len(listed)):
                advice = "make one of those that are listed the `base_model`, or list the base"
        self._findings.problems.append(
            Problem("input-count", message, part.where, found=found, advice=advice)
        )

    def _check_duplicates(self, part: Slice) -> None:
        """Find models that are listed twice. Other layers of one model may well be merged."""
        seen: dict[tuple[str, object], Place] = {}
        for source in part.sources:
            key = self._inputs.path_of(source.model), source.layer_range
            if key in seen and source.model != UNREAD:
                message = f"model `{source.model}` is listed twice, first at {seen[key]}"
                advice = "list it once, with the weight of both; or name the model that was meant"
                problem = Problem("duplicate-model", message, source.where, advice=advice)
                found = self._findings
                (found.warnings if part.is_run else found.problems).append(problem)
            seen.setdefault(key, source.where)

    # Making.

    def _section(self, part: Slice) -> Section | None:
        if not part.sources:
            return None  # which is reported
        before = len(self._findings.problems)
        base = self._base_reference(part)
        has_base = base is not None and self._lists(part.sources, base)
        self._check_names(part.parameters, "all")
        self._check_duplicates(part)
        self._check_counts(part, has_base=has_base)
        if base is not None and not has_base:
            message = f"the base model `{base}` is not among the sources of this slice"
            advice = "list it there, with its own `layer_range`"
            self._findings.problems.append(
                Problem("base-not-listed", message, part.where, advice=advice)
            )
        base_path = self._inputs.path_of(base) if base is not None and has_base else None
        section = self._open_section(part, base_path)
        found = {problem.code for problem in self._findings.problems[before:]}
        is_sound = found.isdisjoint(_UNSOUND) and not self._lacks_base(base)
        return section if section is None or is_sound else replace(section, is_sound=False)

    def _lacks_base(self, base: str | None) -> bool:
        return base is None and self._method.base == "required"

    def _open_section(self, part: Slice, base_path: str | None) -> Section | None:
        opened = [(each, self._inputs.open(each.model, each.where)) for each in part.sources]
        length = self._length(part, opened)
        sources: list[SectionSource] = []
        base: int | None = None
        shared = self._shared(part)
        bases = [self._inputs.path_of(source.model) == base_path for source, _ in opened]
        for at, (source, model) in enumerate(opened):
            is_base = bases[at] and not any(bases[:at])  # the first, if it is listed twice
            self._check_names(source.parameters, "base" if is_base else "input")
            # Also where there is no model: what is wrong with the values is told with that.
            resolver = self._resolver(part, source, is_base=is_base)
            if model is not None:
                base = len(sources) if is_base else base
                start = source.layer_range[0] if source.layer_range else 0
                sources.append(SectionSource(model, resolver, start, self._stack(part, model)))
        lacks_donor = opened[0][1] is None if base_path is None else base is None
        if lacks_donor or not sources:
            return None
        donor = sources[base or 0]
        settings = _settings(part)
        scale = self._scale(has_base=base_path is not None)
        return Section(
            part.where,
            tuple(sources),
            base,
            donor,
            shared,
            scale,
            length,
            settings,
            part.module,
            part.is_run,
        )

    def carried(self, donor: InputModel) -> Section:
        """Return the section of tensors of no module, which are the donor's as they are."""
        nothing = Resolver((), (), self._reader, "")
        source = SectionSource(donor, nothing)
        where = self._recipe.place("modules")
        return Section(where, (source,), None, source, nothing, nothing, 0, (), is_carried=True)

    def _resolver(self, part: Slice, source: Source, *, is_base: bool) -> Resolver:
        levels = (source.parameters, part.parameters, part.module_parameters, *self._levels)
        parameters = self._method.parameters_of(base=is_base)
        whose = f" for model `{source.model}`"
        return Resolver(parameters, levels, self._reader, whose, source.where)

    def _shared(self, part: Slice) -> Resolver:
        levels = (part.parameters, part.module_parameters, *self._levels)
        whose = f" by method `{self._method.name}`"
        return Resolver(self._method.shared_parameters(), levels, self._reader, whose)

    def _scale(self, *, has_base: bool) -> Resolver:
        """Return what resolves `layer_scale`, for which there has to be a base."""
        setting = self._recipe.extensions.layer_scale
        if setting is None or not has_base:
            if setting is not None and self._method.base != "required":  # else it is missed anyway
                self._report_scale(setting)
            return Resolver((), (), self._reader, "")
        parameter = modifiers()["layer_scale"]
        return Resolver((parameter,), ({"layer_scale": setting},), self._reader, "")

    def _report_scale(self, setting: Setting) -> None:
        name = self._method.name
        message = f"`layer_scale` scales what a method adds to the base, and `{name}` has none here"
        advice = "name a `base_model`, or leave `layer_scale` out"
        if self._method.base == "ignored":
            advice = "use a method that has a base (`oxmerge methods`), or leave `layer_scale` out"
        problem = Problem("unfit-formula", message, setting.where, advice=advice)
        self._findings.problems.append(problem)

    # Layers.

    def _length(self, part: Slice, opened: list[tuple[Source, InputModel | None]]) -> int:
        """Return how many layers every source of a slice has, as far as they agree."""
        ranges = [(source, source.layer_range) for source in part.sources if source.layer_range]
        if not ranges:
            return 0
        lengths = [end - start for _, (start, end) in ranges]
        if len(set(lengths)) > 1:
            found = ", ".join(
                f"{length} (`{source.model}`)"
                for length, (source, _) in zip(lengths, ranges, strict=True)
            )
            message = "the sources of a slice must have equally many layers"
            advice = "give each a `layer_range` of the same length"
            self._findings.problems.append(
                Problem("layer-range", message, part.where, found=found, advice=advice)
            )
        fitting = [
            self._fitting(part, source, model) for source, model in opened if model is not None
        ]
        return max(0, min(lengths + fitting))

    def _fitting(self, part: Slice, source: Source, model: InputModel) -> int:
        """Return how many layers of a range its model has; report a range that goes too far."""
        start, end = source.layer_range or (0, 0)
        stack = self._stack(part, model)
        if stack is None:
            self._report_no_layers(part, model)
            return 0
        if end > stack.depth:
            message = f"`layer_range` goes past the last layer of `{source.model}`"
            layers = f"at most {stack.depth}, the number of its layers"
            advice = f"choose from `[0, {stack.depth}]`, which is all of them"
            self._findings.problems.append(
                Problem(
                    "layer-range",
                    message,
                    source.where,
                    file=model.path,
                    expected=layers,
                    found=str(end),
                    advice=advice,
                )
            )
        return stack.depth - start

    def _stack(self, part: Slice, model: InputModel) -> Stack | None:
        """Return the layers of a model that a part takes runs of, if it has them, and only them."""
        if not part.is_run or part.module is None:
            return model.stack if part.is_run else None
        of = self.modules
        prefixes = [] if of is None else of.stacks_of(part.module)
        return model.layout.stacks.get(prefixes[0]) if len(prefixes) == 1 else None

    @cached_property
    def modules(self) -> Modules | None:
        """The modules of the donor; None if it cannot be opened."""
        recipe = self._recipe
        donor = None if recipe.donor is None else self._inputs.open(recipe.donor)
        if donor is None:
            return None
        wanted = dict.fromkeys(part.module for part in recipe.modules if part.module is not None)
        return find_modules(wanted, donor.checkpoint.names(), donor.layout)

    def _report_no_layers(self, part: Slice, model: InputModel) -> None:
        """Report a model that a part cannot take layers of, or the donor if that is why."""
        if part.module is None:
            self.report_no_stack(model, None)
        elif self.modules is not None and len(self.modules.roots[part.module]) == 1:
            # Else there is no such module, which is reported.
            is_known = len(self.modules.stacks_of(part.module)) == 1
            donor = self._inputs.open(self._recipe.donor or UNREAD)
            self.report_no_stack(model if is_known or donor is None else donor, part.module)

    def report_no_stack(self, model: InputModel, module: str | None) -> None:
        """Report a model that slices cannot be taken of, once."""
        layout, modules = model.layout, self.modules if module is not None else None
        stacks, numbered = (
            [each for each in prefixes if modules is None or modules.has(module or "", each)]
            for prefixes in (layout.stacks, layout.numbered)
        )
        numbered = stacks or numbered
        names = ", ".join(f"`{name}`" for name in numbered[:4]) or "none"
        which = "stacks" if stacks else "numbered prefixes, none of which the config counts"
        of = "" if module is None else f" of the module `{shorten(module)}`"
        message = f"`slices`{of} needs a model with exactly one stack of layers"
        advice = "merge whole models with `models`"
        if module is None and len(layout.stacks) > 1:
            advice += ", or put `slices` of each part under `modules`"
        if not layout.stacks:
            advice += ", or put the config.json that counts the layers beside the weights"
        found = f"{len(numbered)} {which} ({names})"
        problem = Problem("no-layers", message, file=model.path, found=found, advice=advice)
        if problem not in self._findings.problems:
            self._findings.problems.append(problem)


def _settings(part: Slice) -> tuple[object, ...]:
    """Return what decides a loose tensor of a slice: models and settings, not layers."""
    sources = [(source.model, _choices(source.parameters)) for source in part.sources]
    return (part.base_model, sources, _choices(part.parameters))


def _choices(settings: Settings) -> dict[str, object]:
    return {name: setting.choices for name, setting in settings.items()}
