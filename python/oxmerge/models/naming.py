"""Naming: the tensors of a model under the names that they have in the donor.

The recipe may say how they are called (`rename`). Besides, a model that was saved by another class
or release of a library has other names for the same tensors: transformers 5 puts `model.` before
some that transformers 4 has without. Each row of the table is such a difference, tried in both
directions where two models call their tensors differently. It is taken only if it explains all of
the difference: one of the two models then has every tensor of the other. What is nearly alike is
left to the recipe.
"""

from __future__ import annotations

from oxmerge.errors import OxmergeError
from oxmerge.models.names import is_head
from oxmerge.problems import Problem
from oxmerge.recipe.patterns import Rename, renamed

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from oxmerge._core import Checkpoint
    from oxmerge.problems import Findings
    from oxmerge.recipe.recipe import Renames

__all__ = ["known_rules", "named_as"]

#: What a tensor is called here, and what there. The first pair of a row that is for a name counts.
_CONVERSIONS = (
    # Models of LLaVA's kind, of images or sound and text: transformers 4, and 5.
    (
        ("language_model.model.*", "model.language_model.*"),
        ("language_model.lm_head.*", "lm_head.*"),
        ("vision_tower.*", "model.vision_tower.*"),
        ("vision_model.*", "model.vision_model.*"),
        ("vision_embed_tokens.*", "model.vision_embed_tokens.*"),
        ("image_tower.*", "model.image_tower.*"),
        ("video_tower.*", "model.video_tower.*"),
        ("audio_tower.*", "model.audio_tower.*"),
        ("encoder.*", "model.encoder.*"),
        ("projector.*", "model.projector.*"),
        ("multi_modal_projector.*", "model.multi_modal_projector.*"),
        ("image_newline", "model.image_newline"),
    ),
    # Qwen2-VL and its kind: transformers 4, and 5.
    (
        ("visual.*", "model.visual.*"),
        ("audio_tower.*", "model.audio_tower.*"),
        ("model.*", "model.language_model.*"),
    ),
    # The text model of a vision-language model: alone, and within, in transformers 5 and 4.
    (("model.*", "model.language_model.*"),),
    (("model.*", "language_model.model.*"), ("lm_head.*", "language_model.lm_head.*")),
    # A model without its head: alone, and in a class that has one.
    (("lm_head.*", "lm_head.*"), ("*", "model.*")),
    # GraniteMoE: modules, and files.
    (
        ("*.experts.gate_up_proj", "*.input_linear.weight"),
        ("*.experts.down_proj", "*.output_linear.weight"),
        ("*.router.weight", "*.router.layer.weight"),
    ),
    # Phi-3.5-MoE, and GPT-NeoX: files and transformers 4, and modules in transformers 5.
    (
        ("*.block_sparse_moe.gate.weight", "*.mlp.router.weight"),
        ("*.block_sparse_moe.*", "*.mlp.*"),
    ),
    (("embed_out.*", "lm_head.*"),),
    # ViT and its kind, and DINOv2: files and transformers 4, and modules in transformers 5.
    (
        ("*encoder.layer.*.attention.attention.query.*", "*layers.*.attention.q_proj.*"),
        ("*encoder.layer.*.attention.attention.key.*", "*layers.*.attention.k_proj.*"),
        ("*encoder.layer.*.attention.attention.value.*", "*layers.*.attention.v_proj.*"),
        ("*encoder.layer.*.attention.output.dense.*", "*layers.*.attention.o_proj.*"),
        ("*encoder.layer.*.intermediate.dense.*", "*layers.*.mlp.fc1.*"),
        ("*encoder.layer.*.output.dense.*", "*layers.*.mlp.fc2.*"),
        ("*encoder.layer.*", "*layers.*"),
    ),
    (
        ("*.attention.attention.query.*", "*.attention.q_proj.*"),
        ("*.attention.attention.key.*", "*.attention.k_proj.*"),
        ("*.attention.attention.value.*", "*.attention.v_proj.*"),
        ("*.attention.output.dense.*", "*.attention.o_proj.*"),
    ),
    # Normalisation in BERT's first releases, and since.
    (("*LayerNorm.gamma", "*LayerNorm.weight"), ("*LayerNorm.beta", "*LayerNorm.bias")),
)


def named_as(
    donor: Checkpoint | None,
    checkpoint: Checkpoint,
    renames: Iterable[Renames],
    findings: Findings,
) -> tuple[Checkpoint, list[Rename]]:
    """Return a checkpoint whose tensors are called as in the donor, as far as that is known.

    Parameters
    ----------
    donor : Checkpoint, optional
        The headers of the donor, if they can be read.
    checkpoint : Checkpoint
        The headers of another model.
    renames : iterable of Renames
        How the recipe says that its tensors are called.
    findings : Findings
        Takes rules that are for no name, and names that two tensors would have.

    Returns
    -------
    (Checkpoint, list of Rename)
        The same tensors, and the rules that changed a name.
    """
    acted: list[Rename] = []
    for asked in renames:
        checkpoint, rules = _renamed(checkpoint, asked, findings)
        acted += rules
    known = None if donor is None else _converted(checkpoint, donor)
    return (checkpoint, acted) if known is None else (known[0], acted + known[1])


def _renamed(
    checkpoint: Checkpoint, asked: Renames, findings: Findings
) -> tuple[Checkpoint, list[Rename]]:
    names, acted = renamed(checkpoint.names(), asked.rules)
    for rule in asked.rules:
        if rule not in acted and rule.pattern != rule.name:
            message = f"no tensor of `{asked.model}` is called `{rule.pattern}`"
            advice = "`*` stands for any part of a name; `oxmerge inspect` lists the names"
            problem = Problem("no-effect", message, asked.where, advice=advice)
            findings.warnings.append(problem)
    try:
        return checkpoint.renamed(names), acted
    except OxmergeError as error:
        message = f"two tensors of `{asked.model}` would have one name"
        problem = Problem(
            "duplicate-tensor",
            message,
            asked.where,
            file=checkpoint.path,
            tensor=error.tensor,
            advice="give each a name of its own",
        )
        findings.problems.append(problem)
        return checkpoint, []


def _converted(checkpoint: Checkpoint, donor: Checkpoint) -> tuple[Checkpoint, list[Rename]] | None:
    """Return a checkpoint under the donor's names, if a conversion is all of the difference."""
    shared = checkpoint.shared_names(donor)
    if shared in (len(checkpoint), len(donor)):
        return None
    names, donor_names = checkpoint.names(), set(donor.names())
    for rules in known_rules():
        found, acted = renamed(names, rules)
        if acted and _explains(set(found), donor_names, len(found), shared):
            return checkpoint.renamed(found), acted
    return None


def known_rules() -> Iterator[list[Rename]]:
    """Yield the rules of each known conversion, in both directions."""
    for conversion in _CONVERSIONS:
        pairs = [Rename(*pair) for pair in conversion]
        yield pairs
        yield [pair.reverse for pair in pairs]


def _explains(names: set[str], donor_names: set[str], tensors: int, shared: int) -> bool:
    """Tell whether one of two models has all of the other, but for a head that may be tied.

    `names` are those of so many tensors; so many had the donor's name before.
    """
    if len(names) < tensors or len(names & donor_names) <= shared:
        return False
    lacking, lacked = donor_names - names, names - donor_names
    return all(map(is_head, lacking)) or all(map(is_head, lacked))
