"""The ledger: what becomes of every tensor of every model, and why."""

from __future__ import annotations

from oxmerge.models.names import is_head
from oxmerge.planning.accounting import ModelAccount, Share
from oxmerge.planning.targets import loose_side
from oxmerge.problems import Problem, shorten

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping

    from oxmerge._core import Fates
    from oxmerge.models.inputs import InputModel
    from oxmerge.planning.sections import Section
    from oxmerge.planning.targets import ModuleTargets

__all__ = ["Ledger"]


class Ledger:
    """Accounts for every tensor of every model.

    Parameters
    ----------
    models : list of InputModel
        Every model.
    fates : list of Fates
        What becomes of the tensors of each.
    passed_over : mapping of (int, str) to str
        Why a tensor is not taken though it is there, by its model's number and its name.

    Attributes
    ----------
    warnings : list of Problem
        Tensors that are dropped though nothing in the recipe says so.
    """

    def __init__(
        self,
        models: list[InputModel],
        fates: list[Fates],
        passed_over: Mapping[tuple[int, str], str],
    ) -> None:
        self._passed_over = passed_over
        self.warnings: list[Problem] = []
        self._models = models
        self._fates = fates

    def close(
        self,
        sections: list[Section],
        donor: InputModel,
        modules: ModuleTargets | None = None,
    ) -> tuple[ModelAccount, ...]:
        """Return the account of every model."""
        reasons = _Reasons(sections, donor, modules)
        each = zip(self._models, self._fates, strict=True)
        return tuple(self._account(model, fates, reasons) for model, fates in each)

    def _account(self, model: InputModel, fates: Fates, reasons: _Reasons) -> ModelAccount:
        dropped: dict[str, list[str]] = {}
        for name in fates.names("dropped"):
            passed_over = self._passed_over.get((model.index, name))
            reason, is_expected = (
                reasons.of(model, name) if passed_over is None else (passed_over, True)
            )
            dropped.setdefault(reason, []).append(name)
            if not is_expected:
                self._warn(model, name, reason)
        return ModelAccount(
            model.reference,
            merged=_share(fates, "merged"),
            copied=_share(fates, "copied"),
            dropped={reason: Share(len(names), names.copy) for reason, names in dropped.items()},
        )

    def _warn(self, model: InputModel, name: str, reason: str) -> None:
        message = f"a tensor of `{model.reference}` is dropped: {reason}"
        self.warnings.append(Problem("dropped-tensor", message, file=model.path, tensor=name))


def _share(fates: Fates, fate: str) -> Share:
    return Share(fates.count(fate), lambda: fates.names(fate))


class _Reasons:
    """Tells why a tensor does not get into the output, and whether the recipe says so."""

    def __init__(
        self,
        sections: list[Section],
        donor: InputModel,
        modules: ModuleTargets | None,
    ) -> None:
        self._donor = donor
        self._modules = modules
        self._sections = sections
        self._members = {each.model.index for section in sections for each in section.sources}
        #: The layers of each model that are taken, by the module that they are of.
        self._layers: dict[tuple[str | None, int], set[int]] = {}
        for section in sections:
            for each in section.sources:
                layers = self._layers.setdefault((section.module, each.model.index), set())
                layers.update(range(each.start, each.start + section.length))

    def of(self, model: InputModel, name: str) -> tuple[str, bool]:
        """Return the reason, and whether it was to be expected."""
        sections = self._sections
        if self._modules is not None:
            sections = self._modules.sections_of(name)
            module = shorten(sections[0].module or "")
            if sections[0].is_carried:
                return "it is in no module that the recipe names", True
            if all(each.model is not model for part in sections for each in part.sources):
                return f"the module `{module}` does not list the model", True
        if model.index not in self._members:
            what = "names and config" if model is self._donor else "what is kept from it"
            return f"the model is no input, it gives {what}", True
        if sections[0].is_run:
            return self._in_slices(sections, model, name)
        return self._in_whole(name)

    def _in_whole(self, name: str) -> tuple[str, bool]:
        donor = self._donor
        if donor.is_tied and is_head(name):
            return f"the donor `{donor.reference}` ties its head to its embedding", False
        return f"the donor `{donor.reference}` does not have it", False

    def _in_slices(self, sections: list[Section], model: InputModel, name: str) -> tuple[str, bool]:
        place = model.layout.place(name)
        if place is None or place.is_extra:
            return self._loose(sections, model, loose_side(name, place))
        if place.layer not in self._layers[sections[0].module, model.index]:
            return "outside layer_range", True
        return "the slice's donor does not have it", False

    def _loose(
        self, sections: list[Section], model: InputModel, side: str | None
    ) -> tuple[str, bool]:
        end, word = (sections[-1], "last") if side == "output" else (sections[0], "first")
        if all(each.model is not model for each in end.sources):
            return f"tensors on the {side or 'input'} side come from the {word} slice", True
        return f"the donor `{end.donor.model.reference}` does not have it", False
