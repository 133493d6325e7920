"""What came of a merge: elements that are no numbers, and a merge that changes nothing."""

from __future__ import annotations

from dataclasses import replace

from oxmerge.problems import Problem, group_problems

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    from oxmerge import _core
    from oxmerge.planning.plans import Plan

__all__ = ["outcome_of"]


def outcome_of(
    plan: Plan, digests: _core.Digests | None, *, allow_nonfinite: bool, strict: bool
) -> tuple[list[Problem], list[Problem]]:
    """Return what stands against an output, and what is odd about it.

    Inputs of tensors that have elements which are no numbers are read again, if they are here.

    Parameters
    ----------
    plan : Plan
        What was merged.
    digests : _core.Digests, optional
        What is known of the output tensors; nothing is found without.
    allow_nonfinite : bool
        Whether an output may have NaN or infinity where its inputs have none.
    strict : bool
        Whether warnings count as problems.
    """
    if digests is None:
        return [], []
    problems: list[Problem] = []
    warnings: list[Problem] = []
    found = digests.nonfinite()
    is_odd = digests.have_odd_inputs([index for index, *_ in found]) if found else []
    made = [each for each, odd in zip(found, is_odd, strict=True) if odd is False]
    unknown = [each for each, odd in zip(found, is_odd, strict=True) if odd is None]
    inherited = [each for each, odd in zip(found, is_odd, strict=True) if odd]
    too_large = [each for each in made if _is_too_large(plan, each)]
    made = [each for each in made if each not in too_large]
    finite_before = "elements of the output are not finite, and all of the inputs are"
    gone = "elements of the output are not finite, and the inputs are gone, as streamed"
    for each, what, how in (
        (made, finite_before, "look at the parameters of these tensors"),
        (too_large, finite_before, "float16 ends at 65504: take `dtype: bfloat16`"),
        (unknown, gone, "look at the parameters of these tensors"),
    ):
        if not each:
            continue
        advice = f"{how}, or keep them so: `--allow-nonfinite`, `allow_nonfinite=True` in Python"
        (warnings if allow_nonfinite else problems).append(_nonfinite(plan, each, what, advice))
    if inherited:
        what = "elements of the output are not finite, as some of the inputs are not"
        warnings.append(_nonfinite(plan, inherited, what, None))
    compared, changed = digests.changes()
    if compared and not changed:
        warnings.append(_unchanged(compared))
    if strict:
        problems, warnings = problems + warnings, []
    return problems, warnings


def _is_too_large(plan: Plan, counts: tuple[int, int, int]) -> bool:
    """Tell whether a tensor has infinity, and nothing worse, for want of range."""
    index, nan, _ = counts
    return nan == 0 and plan.tensors[index].dtype == "F16"


def _nonfinite(
    plan: Plan, tensors: Sequence[tuple[int, int, int]], message: str, advice: str | None
) -> Problem:
    names = [plan.table.row(index)[0] for index, *_ in tensors]
    each = (Problem("non-finite", message, tensor=name, advice=advice) for name in names)
    (problem,) = group_problems(each)
    nan, infinite = (sum(counts) for counts in list(zip(*tensors, strict=True))[1:])
    return replace(problem, found=f"{nan} NaN, {infinite} infinite")


def _unchanged(count: int) -> Problem:
    tensors = "the tensor" if count == 1 else f"each of the {count} tensors"
    return Problem(
        "no-change",
        f"the merge changes nothing: {tensors} made of several models is that of one of them",
        advice="see whether the models differ, and whether the weights are zero",
    )
