"""Assembly: finding the sources of each output tensor, and checking that they agree.

Shapes must be equal exactly. Nothing broadcasts, nothing is cut, nothing is skipped.
"""

from __future__ import annotations

from functools import reduce

from oxmerge.names import is_head, is_vocabulary
from oxmerge.problems import UNSUPPORTED, Problem
from oxmerge.schema import OutputTensor, SourceTensor, is_float, promote

TYPE_CHECKING = False
if TYPE_CHECKING:
    from oxmerge._core import TensorInfo
    from oxmerge.inputs import InputModel
    from oxmerge.ledger import Ledger
    from oxmerge.recipe import Recipe, Scalar
    from oxmerge.sections import Section, SectionSource
    from oxmerge.targets import Target

    Found = list[tuple[SectionSource, TensorInfo]]

__all__ = ["Assembler"]

_SAME_SIZE = "use models of one architecture and size"


class Assembler:
    """Makes output tensors of targets, and collects what does not agree.

    Parameters
    ----------
    recipe : Recipe
        What the user asked for.
    donor : InputModel
        The model that the output is like.
    models : list of InputModel
        Every model.
    ledger : Ledger
        Where the use of a tensor is entered.

    Attributes
    ----------
    problems : list of Problem
        Missing tensors, differences of shape and type, missing parameters.
    """

    def __init__(
        self, recipe: Recipe, donor: InputModel, models: list[InputModel], ledger: Ledger
    ) -> None:
        self.problems: list[Problem] = []
        self._dtype = recipe.out_dtype or recipe.dtype
        self._donor = donor
        self._ledger = ledger
        self._first_files = _first_files(models)
        self._unequal: dict[tuple[int, str], int] = {}
        self._is_sliced = bool(recipe.slices)
        self._layer_shapes = _layer_shapes(donor) if recipe.slices else {}
        self._names: set[str] = set()

    def compare_depths(self, section: Section) -> None:
        """Report stacks that are not as deep as the donor's; their layers are not compared."""
        for source in section.sources:
            for prefix, stack in self._donor.layout.stacks.items():
                other = source.model.layout.stacks.get(prefix)
                if other is not None and other.depth != stack.depth:
                    self._unequal[source.model.index, prefix] = min(other.depth, stack.depth)
                    self._report_depths(source.model, prefix, stack.depth, other.depth)

    def _report_depths(self, model: InputModel, prefix: str, expected: int, found: int) -> None:
        message = f"layer counts differ: `{prefix}` of `{model.reference}`"
        donor = f"{expected}, as in `{self._donor.reference}`"
        advice = "choose layers with `slices`"
        self.problems.append(
            Problem(
                "layers",
                message,
                file=model.path,
                expected=donor,
                found=str(found),
                advice=advice,
            )
        )

    def assemble(self, target: Target) -> OutputTensor | None:
        """Return the output tensor, or None after reporting why there is none."""
        like = self._donor_of(target).tensors[target.donor_name]
        found = self._find(target)
        if found is None or not self._agree(target, like, found):
            return None
        return self._make(target, like, found)

    # Finding.

    def _find(self, target: Target) -> Found | None:
        found: Found = []
        complete = True
        for source, name in zip(target.section.sources, target.names, strict=True):
            tensor = source.model.tensors.get(name)
            if tensor is None:
                complete = False
                self._report_missing(target, source.model, name)
            else:
                found.append((source, tensor))
        return found if complete else None

    def _report_missing(self, target: Target, model: InputModel, name: str) -> None:
        place = target.place
        if not name or (place and self._is_beyond(model, place.stack.prefix, place.layer)):
            return  # reported with the layers
        donor = self._donor_of(target).reference
        if is_head(name) and (model.is_tied or not any(map(is_head, model.tensors))):
            self._report_tied(target, model, name)
            return
        message = f"`{model.reference}` lacks a tensor"
        expected = f"what the donor `{donor}` has"
        advice = "use models of one architecture; or download it again, if it is not complete"
        self.problems.append(
            Problem(
                "missing",
                message,
                file=model.path,
                tensor=name,
                expected=expected,
                found="nothing",
                advice=advice,
            )
        )

    def _is_beyond(self, model: InputModel, prefix: str, layer: int) -> bool:
        least = self._unequal.get((model.index, prefix))
        return least is not None and layer >= least

    def _report_tied(self, target: Target, model: InputModel, name: str) -> None:
        donor = self._donor_of(target).reference
        reason = " (`tie_word_embeddings` is true)" if model.is_tied else ""
        message = f"`{model.reference}` has no head of its own, the donor `{donor}` has one{reason}"
        advice = (
            f"write the head of `{model.reference}` out as a copy of its embedding, or make it the "
            "base, so that the output is tied as well"
        )
        self.problems.append(Problem("tied", message, file=model.path, tensor=name, advice=advice))

    # Comparing.

    def _agree(self, target: Target, like: TensorInfo, found: Found) -> bool:
        before = len(self.problems)
        expected = tuple(like.shape)
        for source, tensor in found:
            if tuple(tensor.shape) != expected:
                self._report_shape(target, source.model, tensor, expected)
            elif tensor.dtype != like.dtype:
                self._check_types(target, source.model, tensor, like)
            if not is_float(tensor.dtype):
                self._check_quantised(source.model, tensor, len(found))
        self._check_like_layers(target, like)
        self._check_name(target)
        return len(self.problems) == before

    def _report_shape(
        self, target: Target, model: InputModel, tensor: TensorInfo, expected: tuple[int, ...]
    ) -> None:
        donor = self._donor_of(target).reference
        message = f"`{model.reference}` has a tensor of another shape than the donor `{donor}`"
        self.problems.append(
            Problem(
                "shape",
                message,
                file=model.file_of(tensor),
                tensor=tensor.name,
                expected=str(list(expected)),
                found=str(list(tensor.shape)),
                advice=_shape_advice(tensor, expected),
            )
        )

    def _donor_of(self, target: Target) -> InputModel:
        """Return the model whose tensor the target is like: with slices, the slice's donor."""
        return target.section.donor.model if self._is_sliced else self._donor

    def _check_types(
        self, target: Target, model: InputModel, tensor: TensorInfo, like: TensorInfo
    ) -> None:
        if is_float(tensor.dtype) and is_float(like.dtype):
            return
        donor = self._donor_of(target).reference
        message = (
            f"`{model.reference}` has a tensor of another type than the donor `{donor}`, "
            "and only floats can be converted"
        )
        self.problems.append(
            Problem(
                "dtype",
                message,
                file=model.file_of(tensor),
                tensor=tensor.name,
                expected=like.dtype,
                found=tensor.dtype,
                advice="use models that were saved in one way",
            )
        )

    def _check_quantised(self, model: InputModel, tensor: TensorInfo, inputs: int) -> None:
        if inputs == 1 or len(tensor.shape) < 2 or not model.is_quantised:  # noqa: PLR2004
            return
        message = f"not supported yet: merging the quantised weights of `{model.reference}`"
        advice = "use the model's 16-bit weights"
        file = model.file_of(tensor)
        self.problems.append(
            Problem(UNSUPPORTED, message, file=file, tensor=tensor.name, advice=advice)
        )

    def _check_like_layers(self, target: Target, like: TensorInfo) -> None:
        """Check that a slice's own donor fits the model that gives the config."""
        model = target.section.donor.model
        if model is self._donor or not self._is_sliced:
            return
        shapes = self._layer_shapes.get(_shape_key(target))
        if shapes and tuple(like.shape) not in shapes:
            message = f"`{model.reference}` does not fit the donor `{self._donor.reference}`"
            self.problems.append(
                Problem(
                    "shape",
                    message,
                    file=model.file_of(like),
                    tensor=like.name,
                    expected=" or ".join(sorted(str(list(shape)) for shape in shapes)),
                    found=str(list(like.shape)),
                    advice=_SAME_SIZE,
                )
            )

    def _check_name(self, target: Target) -> None:
        if target.name in self._names:
            message = "two tensors of the output would have this name"
            advice = "take the first and the last slice from models that name their tensors alike"
            self.problems.append(Problem("names", message, tensor=target.name, advice=advice))
        self._names.add(target.name)

    # Making.

    def _make(self, target: Target, like: TensorInfo, found: Found) -> OutputTensor | None:
        shared: dict[str, Scalar] | None = {}
        own: list[dict[str, Scalar] | None] = [{} for _ in found]
        dtype = like.dtype
        if is_float(dtype):
            dtype = self._dtype or reduce(promote, (tensor.dtype for _, tensor in found))
            shared = target.section.shared.resolve(target.name, target.position)
            own = [
                source.resolver.resolve(tensor.name, target.position) for source, tensor in found
            ]
        if shared is None or not target.section.is_sound:
            return None
        sources = [
            self._source(source, tensor, values)
            for (source, tensor), values in zip(found, own, strict=True)
            if values is not None
        ]
        if len(sources) < len(found):
            return None
        self._enter(found, is_copy=_is_copy(sources, dtype))
        base = target.section.base
        return OutputTensor(target.name, tuple(like.shape), dtype, tuple(sources), base, shared)

    def _source(
        self, source: SectionSource, tensor: TensorInfo, values: dict[str, Scalar]
    ) -> SourceTensor:
        model = source.model
        file = self._first_files[model.index] + tensor.file
        return SourceTensor(model.reference, tensor.name, tensor.dtype, file, tensor.start, values)

    def _enter(self, found: Found, *, is_copy: bool) -> None:
        for source, tensor in found:
            self._ledger.use(source.model.index, tensor.name, is_copy=is_copy)


def _is_copy(sources: list[SourceTensor], dtype: str) -> bool:
    """Tell whether nothing can happen to the bytes: one source as it is, or no floats at all."""
    first = sources[0]
    return not is_float(dtype) or (
        len(sources) == 1 and first.dtype == dtype and not first.parameters
    )


def _first_files(models: list[InputModel]) -> list[int]:
    """Return the index of each model's first file among the files of all."""
    first_files = [0]
    for model in models:
        first_files.append(first_files[-1] + len(model.checkpoint.files))
    return first_files


def _shape_advice(tensor: TensorInfo, expected: tuple[int, ...]) -> str:
    same_rest = tuple(tensor.shape)[1:] == expected[1:] and len(tensor.shape) == len(expected)
    if same_rest and is_vocabulary(tensor.name):
        return (
            "the vocabularies differ; matching tokens by their text (`tokenizer`) is not supported "
            "yet, so the models must have the same tokenizer"
        )
    return _SAME_SIZE


def _shape_key(target: Target) -> str:
    place = target.place
    return target.name if place is None else f"*.{place.rest}"


def _layer_shapes(donor: InputModel) -> dict[str, set[tuple[int, ...]]]:
    """Return the shapes that a tensor has in any layer of the donor, by the rest of its name."""
    shapes: dict[str, set[tuple[int, ...]]] = {}
    for name, tensor in donor.tensors.items():
        place = donor.layout.place(name)
        key = name if place is None else f"*.{place.rest}"
        shapes.setdefault(key, set()).add(tuple(tensor.shape))
    return shapes
