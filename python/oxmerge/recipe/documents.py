"""Documents: a recipe of several merges, of which later ones read what earlier ones make."""

from __future__ import annotations

from dataclasses import replace

from oxmerge.problems import Findings, Place, Problem, shorten
from oxmerge.recipe.dialect import read_recipe

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from oxmerge.recipe.recipe import Recipe

__all__ = ["read_documents", "reads"]


def read_documents(
    documents: Sequence[Mapping[str, object]],
    findings: Findings,
    *,
    text: str = "",
    folder: str | None = None,
    file: str | None = None,
) -> Recipe:
    """Return the recipe that some documents are, as `read_recipe` does.

    One of them has no name, or is used by no other: that is the recipe. Those that it uses,
    directly or not, are its stages.
    """
    in_stages = len(documents) > 1
    recipes = [
        read_recipe(each, findings, text=text, folder=folder, file=file, in_stages=in_stages)
        for each in documents
    ]
    return _Stages(recipes, findings).recipe() if in_stages else recipes[0]


class _Stages:
    """Puts the merges of one file in order."""

    def __init__(self, recipes: Sequence[Recipe], findings: Findings) -> None:
        self.findings = findings
        self.named: dict[str, Recipe] = {}
        self.unnamed: list[Recipe] = []
        for recipe in recipes:
            self.add(recipe)
        self.done: list[Recipe] = []
        self.begun: list[str] = []

    def add(self, recipe: Recipe) -> None:
        if recipe.name is None:
            self.unnamed.append(recipe)
            if len(self.unnamed) > 1:
                message, advice = "a second merge without a name", "give all but the last a `name`"
                self.fault(recipe.place("merge_method"), message, advice)
        elif recipe.name in self.named:
            message = f"a second merge with the name `{shorten(recipe.name)}`"
            self.fault(recipe.place("name"), message, "give each a name of its own")
        else:
            self.named[recipe.name] = recipe

    def fault(self, place: Place, message: str, advice: str) -> None:
        self.findings.problems.append(Problem("stages", message, place, advice=advice))

    def recipe(self) -> Recipe:
        last = self.last()
        self.visit(last)
        stages = tuple(each for each in self.done if each is not last)
        needed = {stage.name for stage in stages}
        idle = [name for name in self.named if name not in needed and name != last.name]
        unused = [
            Problem(
                "no-effect",
                f"the output of the merge `{shorten(name)}` is read by no other",
                self.named[name].place("name"),
                advice="take it out, or merge it by a recipe of its own",
            )
            for name in idle
        ]
        return replace(last, stages=stages, warnings=(*last.warnings, *unused))

    def last(self) -> Recipe:
        """Return the merge whose output is that of the recipe."""
        if self.unnamed:
            return self.unnamed[0]
        used = {name for each in self.named.values() for name in reads(each)}
        candidates = [each for name, each in self.named.items() if name not in used]
        if len(candidates) != 1:
            several = ", ".join(f"`{shorten(each.name or '')}`" for each in candidates) or "none"
            message = f"several merges, of which one should be the output: found {several}"
            place = next(iter(self.named.values())).place("name")
            self.fault(place, message, "leave the `name` of the last one out")
        return candidates[0] if candidates else next(iter(self.named.values()))

    def visit(self, recipe: Recipe) -> None:
        """Add a merge after those whose outputs it reads."""
        name = recipe.name or ""
        if name in self.begun:
            if recipe not in self.done:
                begun = [each for each in self.begun[self.begun.index(name) :] if each]
                circle = " -> ".join(f"`{shorten(each)}`" for each in (*begun, name))
                message = f"these merges read each other's outputs: {circle}"
                self.fault(recipe.place("name"), message, "let each read earlier ones only")
            return
        self.begun.append(name)
        for read in reads(recipe):
            if read in self.named:
                self.visit(self.named[read])
        self.done.append(recipe)


def reads(recipe: Recipe) -> list[str]:
    """Return every model that a recipe names."""
    parts = (*recipe.slices, *recipe.modules)
    bases = (recipe.base_model, *(part.base_model for part in parts))
    tokenizer = () if recipe.tokenizer is None else (recipe.tokenizer.source,)
    kept = (each.model for each in recipe.extensions.keep)
    named = (*(each.model for each in recipe.sources), *bases, *tokenizer, *kept)
    # With adapters, too, which stand behind the model.
    return [part for name in named if name for part in (name, name.partition("+")[0])]
