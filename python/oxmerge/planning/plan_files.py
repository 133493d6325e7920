"""Plans as files: what is read is checked, since anyone may have written it."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

from oxmerge import _core
from oxmerge.errors import PlanError
from oxmerge.file_state import FileState
from oxmerge.json_files import read_start
from oxmerge.methods import find_method, modifiers
from oxmerge.options import PlanOptions, check_allowed
from oxmerge.output.card import RECIPE_NAME, REPORT_NAME
from oxmerge.output.manifest import MANIFEST_NAME
from oxmerge.output.publish import CONFIG_NAME, INDEX_NAME
from oxmerge.output.side_files import LeftOut, SideFile, SideFiles
from oxmerge.planning.accounting import ModelAccount, Share
from oxmerge.planning.effects import effect_of
from oxmerge.planning.parameters import KINDS
from oxmerge.problems import Place, Problem, group_problems
from oxmerge.recipe.recipe import Recipe

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from typing import Any

    from oxmerge.methods import Method, Parameter
    from oxmerge.planning.plans import Plan

__all__ = ["is_saved_plan", "load_plan", "save_plan"]

#: What a saved plan begins with.
_BEGINNING = '{"oxmerge_plan":'
#: What one of several merges begins with.
_OF_MERGES = re.compile(r'\{"oxmerge_plan":\d{1,9},\n"merges":')
_MAKE_ANEW = "make the plan anew from its recipe"
#: Letters of what the file says that a message shows.
_SHOWN = 40
#: One of 100,000 tensors of three models each has 25 MB.
_MOST_BYTES = 200_000_000


def is_saved_plan(path: str | os.PathLike[str]) -> bool:
    """Tell whether a file is a plan that was saved."""
    try:
        # Only of a file: what is read of a pipe is gone for who reads the recipe.
        if not os.path.isfile(path):
            return False
        start, _ = read_start(path, len(_BEGINNING))
    except (OSError, ValueError):
        return False
    return start == _BEGINNING.encode()


def save_plan(plan: Plan, path: str | os.PathLike[str]) -> None:
    """Write a plan to a file; see `Plan.save`."""
    path = Path(path)
    partial = path.with_name(_core.partial_name(f"{path.name}.{os.getpid()}"))
    key, said = ("merges", _merges(plan)) if plan.stages else ("output", _output(plan))
    output = json.dumps(said, ensure_ascii=True)
    file = open(partial, "xb")  # noqa: SIM115 - what is not ours is not ours to remove
    try:
        with file:
            file.write(f'{_BEGINNING}{_version()},\n"{key}":{output}'.encode())
            if not plan.stages:
                file.write(b',\n"table":')
                plan.table.write(file.write)
            file.write(b"}\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def _merges(plan: Plan) -> dict[str, Any]:
    """Return what is kept of a plan of several merges.

    What later ones read is not there yet, so that they are planned anew; digests tell whether they
    are what they were.
    """
    return {
        "recipe_text": plan.recipe_text,
        "recipe_folder": plan.recipe_folder,
        "seed": plan.seed,
        "shard_size": plan.shard_size,
        "effect": effect_of(plan),
    }


def _load_merges(text: str, allow_methods: tuple[str, ...]) -> Plan:
    """Return a plan of several merges, made anew."""
    from oxmerge.merging import prepare  # noqa: PLC0415 - it needs this module

    raw = json.loads(text)
    if raw.get("oxmerge_plan") != _version():
        raise PlanError(
            "the plan was saved by another version of oxmerge",
            expected=f"plan version {_version()}",
            found=str(raw.get("oxmerge_plan"))[:_SHOWN],
            advice=_MAKE_ANEW,
        )
    reader = _Reader(_Reader(raw).get("merges", dict))
    seed, size = reader.get("seed", int), reader.get("shard_size", int)
    if not (0 <= seed < 1 << 64 and 0 < size < 1 << 63):
        raise _wrong("a seed or a size in the plan is out of range", (seed, size))
    folder = reader.get("recipe_folder", str, optional=True)
    recipe = Recipe.from_text(reader.get("recipe_text", str), folder=folder)
    # Which models may differ was settled when it was made.
    options = PlanOptions(seed, size, allow_mismatch=True, allow_methods=allow_methods)
    plan = prepare(recipe, options)
    if not plan.stages or effect_of(plan) != reader.get("effect", str):
        message = "the merges of the plan, or the files that they read, are not what they were"
        raise PlanError(message, advice=_MAKE_ANEW)
    return plan


def _version() -> int:
    version: int = _core.build_info()["plan_version"]
    return version


def _output(plan: Plan) -> dict[str, Any]:
    files = plan.side_files
    return {
        "recipe_text": plan.recipe_text,
        "recipe_folder": plan.recipe_folder,
        "shard_size": plan.shard_size,
        "models": plan.models,
        "pinned": plan.pinned,
        "donor": plan.donor,
        "base": plan.base,
        "layer_map": plan.layer_map,
        "dtype": plan.dtype,
        "tokenizer_memory": plan.tokenizer_memory,
        "accounting": [_account(account) for account in plan.accounting],
        "warnings": [warning.as_dict() for warning in plan.warnings],
        "notes": plan.notes,
        "changes": plan.changes,
        "config": plan.config,
        "card": plan.card,
        "side_files": [
            {"name": file.name, "source": os.fspath(file.source), **file.state._asdict()}
            for file in files.copied
        ],
        "left_out": [{"name": entry.name, "reason": entry.reason} for entry in files.left_out],
        "texts": {name: data.decode(errors="replace") for name, data in files.texts.items()},
    }


def _account(account: ModelAccount) -> dict[str, Any]:
    share = {"merged": account.merged, "copied": account.copied}
    return {
        "model": account.model,
        **{fate: {"count": len(each), "names": each.names} for fate, each in share.items()},
        "dropped": {
            reason: {"count": len(each), "names": each.names}
            for reason, each in account.dropped.items()
        },
    }


def load_plan(
    path: str | os.PathLike[str],
    *,
    memory: int | str | None = None,
    threads: int | None = None,
    device: str = "cpu",
    vram: int | str | None = None,
    allow_methods: Iterable[str] = (),
) -> Plan:
    """Return the plan in a file that `Plan.save` wrote.

    Nothing in the file is believed: what it refers to must be there, inputs must lie within their
    files, outputs must fill theirs without overlap or hole, and parameters must be the method's.
    The input files themselves are looked at when the plan is merged, or its summary is asked for;
    a plan of several merges is made anew from their headers, and refused if they have changed.

    Parameters
    ----------
    path : path
        The file.
    memory, threads, device, vram
        As in `plan`: what the summary is for.
    allow_methods : iterable of str
        Modules that a method written in Python may come from, as in `merge`.

    Raises
    ------
    PlanError
        If it is no plan, one of another version of oxmerge, or wrong in any way; or if its method
        is written in Python, and is not allowed or has changed.
    OSError
        If the file cannot be read.

    Examples
    --------
    >>> import oxmerge
    >>> oxmerge.plan("recipe.yml").save("plan.json")
    >>> report = oxmerge.merge(oxmerge.load_plan("plan.json"), "out-of-plan/")
    """
    from oxmerge.planning.plans import Plan  # noqa: PLC0415 - it needs this module

    options = {"memory": memory, "threads": threads, "device": device, "vram": vram}
    try:
        text = _read_text(path)
        if _OF_MERGES.match(text):
            return _load_merges(text, check_allowed(allow_methods)).with_options(options)
        table, rest = _core.Plan.load(text)
        about = _method_of(table, check_allowed(allow_methods))
        _check_parameters(table, about)
        if about.written is not None:
            table = about.written.write_formulas(table)
        _check_method(table)
        fields = _read_output(json.loads(rest), table)
    except PlanError as error:
        error.file = error.file or os.fspath(path)
        raise
    except ValueError as error:
        raise PlanError(
            "this is no plan that oxmerge saved", file=os.fspath(path), found=str(error)
        ) from error
    return Plan(about=about, table=table, options=options, **fields)


def _read_text(path: str | os.PathLike[str]) -> str:
    text, _ = read_start(path, _MOST_BYTES + 1)
    if len(text) > _MOST_BYTES:
        most = f"at most {_MOST_BYTES} bytes"
        raise PlanError("the plan is too long", expected=most, advice=_MAKE_ANEW)
    return text.decode()


def _check_method(table: _core.Plan) -> None:
    """Raise PlanError if the method cannot make one of the tensors."""
    problems = group_problems(Problem("unfit-formula", **found) for found in table.problems())
    if problems:
        raise PlanError("cannot merge by the plan", problems=problems)


def _method_of(table: _core.Plan, allowed: tuple[str, ...]) -> Method:
    """Return the method of a table; raise PlanError unless it is the one that it was made by."""
    found = find_method(table.method, Place(), allowed)
    if isinstance(found, Problem):
        raise PlanError.of("cannot merge by the plan", [found])
    source = None if found.written is None else found.written.source
    if source != table.source:
        raise PlanError(
            f"the merge method `{table.method}` is not what it was when the plan was made",
            expected=_shown_source(table.source),
            found=_shown_source(source),
            advice=_MAKE_ANEW,
        )
    return found


def _shown_source(source: tuple[str, str, str] | None) -> str:
    if source is None:
        return "one of oxmerge's own"
    module, function, digest = source
    return f"`{module}:{function}` with the digest {digest[:16]}"


def _check_parameters(table: _core.Plan, about: Method) -> None:
    """Raise PlanError unless every parameter is one of the method's, and of its kind."""
    known = modifiers() | {each.name: each for each in about.parameters}
    for shared, own in table.settings():
        for values, is_shared in ((shared, True), *((each, False) for each in own)):
            for name, value in values.items():
                parameter = known.get(name)
                if parameter is None or (parameter.per == "shared") is not is_shared:
                    message = f"`{name}` is no such parameter of method `{table.method}`"
                    raise PlanError(message, advice=_MAKE_ANEW)
                if not _is_of_kind(value, parameter):
                    raise PlanError(
                        f"`{name}` is {KINDS[parameter.kind]}",
                        found=repr(value),
                        advice=_MAKE_ANEW,
                    )


def _is_of_kind(value: object, parameter: Parameter) -> bool:
    if parameter.kind == "bool":
        return isinstance(value, bool)
    whole = isinstance(value, int) and not isinstance(value, bool)
    return whole or (parameter.kind == "float" and isinstance(value, float))


def _read_output(raw: object, table: _core.Plan) -> dict[str, Any]:
    """Return what belongs to a plan besides its table."""
    reader = _Reader(raw if isinstance(raw, dict) else {})
    models = tuple(reader.get("models", list, str))
    donor, base = reader.get("donor", int), reader.get("base", int, optional=True)
    for index in (donor, 0 if base is None else base):
        if not 0 <= index < len(models):
            raise _wrong("there is no model of that number", index)
    pinned = tuple(reader.get("pinned", list))
    if len(pinned) != len(models) or not all(isinstance(each, str | None) for each in pinned):
        raise _wrong("`pinned` in the plan is not as it should be", pinned)
    copied = [_side_file(_Reader(each)) for each in reader.get("side_files", list, dict)]
    written = (CONFIG_NAME, INDEX_NAME, RECIPE_NAME, MANIFEST_NAME, REPORT_NAME)
    taken = {*written, *(name for name, _ in table.shards)}
    for file in copied:
        if file.name in taken or file.name.lower() == "readme.md":
            raise _wrong("two files of the output have one name", file.name)
        taken.add(file.name)
    texts = {}
    for name, text in reader.get("texts", dict).items():
        if not isinstance(text, str):
            raise _wrong("a file of the output must be text", text)
        _check_name(name)
        texts[name] = text.encode(errors="backslashreplace")
        if name in taken or name.lower() == "readme.md":
            raise _wrong("two files of the output have one name", name)
        taken.add(name)
    left_out = [
        LeftOut(_Reader(each).get("name", str), _Reader(each).get("reason", str))
        for each in reader.get("left_out", list, dict)
    ]
    return {
        "recipe_text": reader.get("recipe_text", str),
        "recipe_folder": reader.get("recipe_folder", str, optional=True),
        "shard_size": reader.count("shard_size"),
        "models": models,
        "pinned": pinned,
        "donor": donor,
        "base": base,
        "layer_map": {
            prefix: _pairs(pairs) for prefix, pairs in reader.get("layer_map", dict).items()
        },
        "dtype": reader.get("dtype", str, optional=True),
        "tokenizer_memory": reader.count("tokenizer_memory", optional=True),
        "accounting": tuple(
            _read_account(_Reader(each)) for each in reader.get("accounting", list, dict)
        ),
        "warnings": tuple(_read_warning(each) for each in reader.get("warnings", list, dict)),
        "notes": tuple(reader.get("notes", list, str)),
        "changes": tuple(reader.get("changes", list, str)),
        "config": reader.get("config", str, optional=True),
        "card": reader.get("card", str),
        "side_files": SideFiles(tuple(copied), tuple(left_out), texts=texts),
    }


class _Reader:
    """Reads values of known types from a mapping that may hold anything."""

    def __init__(self, raw: Mapping[str, Any]) -> None:
        self._raw = raw

    def get(
        self, name: str, kind: type, item: type | None = None, *, optional: bool = False
    ) -> Any:  # noqa: ANN401
        """Return a value of that type, whose items are of type `item`."""
        value = self._raw.get(name)
        if value is None and optional:
            return None
        is_right = isinstance(value, kind) and not (kind is int and isinstance(value, bool))
        if is_right and item is not None:
            is_right = all(isinstance(each, item) for each in value or ())
        if not is_right:
            raise _wrong(f"`{name}` in the plan is not as it should be", value)
        return value

    def count(self, name: str, *, optional: bool = False) -> Any:  # noqa: ANN401
        """Return a whole number that counts something."""
        value = self.get(name, int, optional=optional)
        if value is not None and not 0 <= value < 1 << 63:
            raise _wrong(f"`{name}` in the plan is out of range", value)
        return value


def _side_file(reader: _Reader) -> SideFile:
    name = reader.get("name", str)
    _check_name(name)
    state = FileState(*(reader.get(each, int) for each in FileState._fields))
    source = reader.get("source", str)
    if not source or "\0" in source:
        raise _wrong("a file beside the weights must have a path", source)
    return SideFile(name, Path(source), state)


def _check_name(name: str) -> None:
    """Raise PlanError for a name that leads elsewhere than into the output directory."""
    parts = name.split("/")
    if "\0" in name or "\\" in name or not all(parts) or {".", ".."} & set(parts):
        raise _wrong("a file of the output must have a name within its directory", name)


def _pairs(raw: Any) -> tuple[tuple[int, int], ...]:  # noqa: ANN401
    is_right = isinstance(raw, list) and all(isinstance(pair, list) for pair in raw)
    if not is_right or not all(list(map(type, pair)) == [int, int] for pair in raw):
        raise _wrong("`layer_map` in the plan is not as it should be", raw)
    return tuple((model, layer) for model, layer in raw)


def _read_account(reader: _Reader) -> ModelAccount:
    return ModelAccount(
        model=reader.get("model", str),
        merged=_share(reader.get("merged", dict)),
        copied=_share(reader.get("copied", dict)),
        dropped={reason: _share(each) for reason, each in reader.get("dropped", dict).items()},
    )


def _share(raw: object) -> Share:
    reader = _Reader(raw if isinstance(raw, dict) else {})
    names = reader.get("names", list, str)
    return Share(reader.count("count"), lambda: names)


def _read_warning(raw: dict[str, Any]) -> Problem:
    texts = ("code", "message", "file", "tensor", "expected", "found", "advice")
    reader = _Reader(raw)
    values = {
        name: reader.get(name, str, optional=name not in {"code", "message"}) for name in texts
    }
    where = Place(
        reader.get("where", str, optional=True) or "",
        reader.get("line", int, optional=True),
        reader.get("column", int, optional=True),
        reader.get("recipe", str, optional=True),
    )
    if values["file"] == where.file:
        values["file"] = None
    names = tuple(reader.get("tensors", list, str, optional=True) or ())
    return Problem(
        **values,
        where=None if where == Place() else where,
        tensors=names,
        count=reader.get("count", int),
    )


def _wrong(message: str, found: object) -> PlanError:
    shown = re.sub(r"\s+", " ", repr(found))[:80]
    return PlanError(message, found=shown, advice=_MAKE_ANEW)
