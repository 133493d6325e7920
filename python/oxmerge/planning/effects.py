"""Effects: whether two plans come to the same output."""

from __future__ import annotations

import hashlib
import os
import re

TYPE_CHECKING = False
if TYPE_CHECKING:
    from oxmerge.planning.plans import Plan

__all__ = ["effect_of"]

#: A number in a formula that is found on the way.
_COMPUTED = re.compile(r"f\d+\(")


def effect_of(plan: Plan) -> str:
    """Return a digest of what decides the output: of its merges, and of what these read.

    What earlier merges make is not there yet; it is known by how it is made.
    """
    made = None if plan.stand_ins is None else f"{plan.stand_ins.folder}{os.sep}"
    files = [file for file in plan.input_files if made is None or not file["path"].startswith(made)]
    idle = {parameter.name for parameter in plan.about.parameters if not parameter.acts}
    beside = [str(file.source).removeprefix(made or "") for file in plan.side_files.copied]
    texts = {n: hashlib.sha256(data).digest() for n, data in plan.side_files.texts.items()}
    first = [effect_of(stage) for stage in plan.stages]
    whole = (plan.config, beside, texts, files, plan.table.in_f64, first)
    digest = hashlib.sha256(repr(whole).encode())
    kinds = []
    for formula, shared, own in plan.table.kinds():
        acting = [{k: v for k, v in each.items() if k not in idle} for each in (shared, *own)]
        # Where a number is found on the way, the formula does not tell by which function.
        kinds.append(repr((formula, acting if _COMPUTED.search(formula) else None)))
    plan.table.write_effects(kinds, digest.update)
    return digest.hexdigest()
