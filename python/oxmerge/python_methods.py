"""Merge methods written in Python.

A method is a function that says what an element of the output is, in the language of
`oxmerge.formula`. It runs wherever a built-in one does, on files and on arrays: in blocks, on every
core, within the memory budget, to the bit.

>>> from oxmerge import method, per_model, shared
>>> from oxmerge.formula import norm, weighted_sum
>>> @method(base="required")
... def damped(base, models, *, weight=per_model(1.0), damping=shared(0.1, min=0)):
...     '''Task vectors, each shortened by how long it is.'''
...     vectors = [model - base for model in models]
...     factors = [w / (1 + damping * norm(v)) for w, v in zip(weight, vectors, strict=True)]
...     return base + weighted_sum(factors, vectors)
>>> import numpy as np, oxmerge
>>> oxmerge.merge_tensors(damped, [np.float32([1, 2])], np.float32([1, 1]))
array([1.      , 1.909091], dtype=float32)

A recipe names it: ``merge_method: damped`` where this process has made it or an installed package
offers it (entry point group ``oxmerge.methods``), else ``merge_method: package.module:damped``, if
the caller allows that module. A recipe alone runs no code.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import re
from array import array
from copy import copy
from dataclasses import dataclass, replace
from functools import cached_property
from importlib import import_module
from math import prod
from typing import overload

from oxmerge.errors import PlanError
from oxmerge.formula import Value, as_nodes
from oxmerge.methods import built_in_methods, modifiers, plain_name, read_method
from oxmerge.problems import Problem, did_you_mean

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping, Sequence
    from typing import Any, Literal, TypeAlias

    from oxmerge import _core
    from oxmerge.methods import Method

    Function: TypeAlias = Callable[..., Any]
    Base: TypeAlias = Literal["required", "optional", "ignored"]
    Kind: TypeAlias = type[bool | int | float]
    Sees: TypeAlias = Literal["elements", "rows", "tensor"]
    Framework: TypeAlias = Literal["np", "pt"]
    #: Nodes as JSON, what they call; what makes the output instead, and whether of whole tensors.
    Written: TypeAlias = tuple[
        str,
        list[Callable[..., list[float]]],
        tuple[Callable[..., bytes], bool] | None,
    ]

__all__ = [
    "ENTRY_POINTS",
    "PythonMethod",
    "TensorInfo",
    "find_written",
    "installed",
    "method",
    "names",
    "per_model",
    "shared",
]

#: The group of entry points in which packages offer methods.
ENTRY_POINTS = "oxmerge.methods"

_REQUIRED = object()
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_ADDRESS = re.compile(r"https?://[^\s<>\"'`)\]]+")
_COSTS = {
    "elements": "as many reads of every input as its formula needs",
    "rows": "one read of every input, and arrays of some rows",
    "tensor": "one read of every input, and arrays of whole tensors",
}
#: Kinds of NumPy's types that are no numbers of an output: complex ones, texts, times, objects.
_NO_NUMBERS = "cSUMmO"
#: The argument that asks for a `TensorInfo`.
_TENSOR = "tensor"
#: What those who merge arrays take besides the parameters of a method.
_TAKEN = frozenset((
    "base", "dtype", "integers", "method", "name", "out", "seed", "state_dicts", "tensors",
    "threads",
))  # fmt: skip
#: The methods of this process, by module and name: two modules may use one name.
_METHODS: dict[tuple[str, str], PythonMethod] = {}


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """What a method is told of a tensor if it has an argument ``tensor``.

    Attributes
    ----------
    name : str
        Its name in the output.
    shape : tuple of int
        Its shape.
    dtype : str
        The element type of the output, by its safetensors name.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def elements(self) -> int:
        """Number of elements."""
        return prod(self.shape)


@dataclass(frozen=True, slots=True)
class ParameterSpec:
    """A parameter as `shared` or `per_model` declares it: its kind, its default, its range."""

    per: str
    kind: str = "float"
    default: Any = None
    required: bool = True
    least: float | None = None
    most: float | None = None
    help: str = ""

    def row(self, name: str) -> dict[str, Any]:
        """Return the parameter as the engine describes those of its own methods."""
        return {
            "name": plain_name(name),
            "kind": self.kind,
            "default": self.default,
            "required": self.required,
            "per": self.per,
            "limits": (self.least, self.most),
            "usual": (None, None),
            "acts": True,
            "help": self.help,
        }


def shared(
    default: Any = _REQUIRED,
    *,
    kind: Kind | None = None,
    min: float | None = None,  # noqa: A002 - reads as what it is in a signature
    max: float | None = None,  # noqa: A002
    help: str = "",  # noqa: A002
) -> Any:
    """Declare a parameter that has one value for a tensor.

    Parameters
    ----------
    default : float, int or bool, optional
        Without it, recipes must give a value.
    kind : type, optional
        `float`, `int` or `bool`. Unless it is given, a parameter is any number, also where the
        default is a whole one; it is a truth value where the default is one.
    min, max : float, optional
        The least and the greatest value it may have.
    help : str
        A line about what it does.

    Raises
    ------
    TypeError, ValueError
        If the default is not of the kind, or not within the range; if there is no such kind.
    """
    return _spec("shared", default, kind, min, max, help)


def per_model(
    default: Any = _REQUIRED,
    *,
    kind: Kind | None = None,
    min: float | None = None,  # noqa: A002
    max: float | None = None,  # noqa: A002
    help: str = "",  # noqa: A002
) -> Any:
    """Declare a parameter that has one value for each model but the base; see `shared`."""
    return _spec("other", default, kind, min, max, help)


def _spec(
    per: str,
    default: Any,
    kind: Kind | None,
    least: float | None,
    most: float | None,
    text: str,
) -> ParameterSpec:
    if kind is None:
        kind = bool if isinstance(default, bool) else float
    if kind not in (bool, int, float):
        raise TypeError(f"the kind of a parameter is `float`, `int` or `bool`, not {kind!r}")
    name = kind.__name__
    if default is _REQUIRED:
        return ParameterSpec(per, name, None, required=True, least=least, most=most, help=text)
    if isinstance(default, bool) != (kind is bool) or not isinstance(default, (kind, int)):
        raise TypeError(
            f"the default of a parameter is of its kind, which is `{name}`, not {default!r}"
        )
    default = kind(default)
    below = least is not None and not least <= default
    if below or (most is not None and not default <= most):
        raise ValueError(f"the default {default!r} is not from {least} to {most}")
    return ParameterSpec(per, name, default, required=False, least=least, most=most, help=text)


class PythonMethod:
    """A merge method that a Python function is; `oxmerge.method` makes it.

    To call it is to call the function, on values of `oxmerge.formula`, with the defaults of its
    parameters: so one method may use another.

    Parameters
    ----------
    function : callable
        Returns the formula, from values and parameters.
    name : str
        What recipes call it.
    base : str
        ``required``, ``optional`` or ``ignored``.
    models : tuple of int
        Fewest and most models besides the base; None for no limit.
    sees : str
        ``elements`` for formulas; ``rows`` or ``tensor`` for arrays.
    framework : str
        ``np`` or ``pt``: what the arrays are.

    Attributes
    ----------
    parameters : dict of str to ParameterSpec
        By the name of the function's argument.
    wants_tensor : bool
        Whether it is called for each tensor, with a `TensorInfo`.
    """

    def __init__(
        self,
        function: Function,
        name: str,
        *,
        base: Base,
        models: tuple[int, int | None],
        sees: Sees,
        framework: Framework,
    ) -> None:
        functools.update_wrapper(self, function)
        self.function = function
        self.name = name
        self.base = base
        self.models = models
        self.sees = sees
        self.framework = framework
        arguments = _arguments(function, has_base=base != "ignored")
        self.wants_tensor = _TENSOR in arguments
        self.parameters = {
            name: _declared(each) for name, each in arguments.items() if name != _TENSOR
        }

    def __call__(self, *inputs: Any, **parameters: Any) -> Any:
        """Return the formula for values of `oxmerge.formula`, as the function would.

        Parameters
        ----------
        *inputs : Value or sequence of Value
            The base, unless it is ignored, and the list of the models; arrays if it sees those.
        **parameters
            As the function takes them; one number does for a parameter of each model.
        """
        models = inputs[-1] if inputs else None
        if len(inputs) != 1 + (self.base != "ignored") or not isinstance(models, list | tuple):
            signature = "models" if self.base == "ignored" else "base, models"
            raise TypeError(f"the merge method `{self.name}` is called with ({signature}, ...)")
        given = [each for each in (*inputs[:-1], *models) if each is not None]
        if self.sees == "elements" and not all(isinstance(each, Value) for each in given):
            raise TypeError(
                f"the merge method `{self.name}` is called with values of `oxmerge.formula`; "
                f"of arrays, `oxmerge.merge_tensors({self.name}, ...)` merges"
            )
        for name, spec in self.parameters.items():
            value = parameters.get(name, _REQUIRED if spec.required else spec.default)
            if value is _REQUIRED:
                raise TypeError(f"the merge method `{self.name}` needs the parameter `{name}`")
            is_list = isinstance(value, list | tuple)
            spread = spec.per != "shared" and not is_list
            parameters[name] = [value] * len(models) if spread else value
        return self.function(*inputs, **parameters)

    def __repr__(self) -> str:
        """Tell what it is."""
        return f"<merge method {self.name!r}: {self._path()}>"

    # What it is.

    def named(self, name: str) -> PythonMethod:
        """Return the same method under another name."""
        renamed = copy(self)
        renamed.name = name
        return renamed

    def row(self) -> dict[str, Any]:
        """Return the method as the engine describes its own."""
        least, most = self.models
        has_base = int(self.base == "required")
        inputs = (least + has_base, None if most is None else most + (self.base != "ignored"))
        text = inspect.getdoc(self.function) or self.function.__name__
        title, _, rest = text.partition("\n")
        address = _ADDRESS.search(text)
        return {
            "name": self.name,
            "title": title.rstrip("."),
            "formula": " ".join(rest.split()) or title,
            "class": "python",
            "cost": _COSTS[self.sees],
            "paper": address[0].rstrip(".,;") if address else self._path(),
            "contract": {
                "base": self.base,
                "inputs": inputs,
                "others": (0, None) if self.base == "ignored" else self.models,
            },
            "parameters": [spec.row(name) for name, spec in self.parameters.items()],
        }

    def described(self) -> Method:
        """Return the method as planning knows all of them."""
        return replace(read_method(self.row()), written=self)

    @property
    def module(self) -> str:
        """The module that it is written in."""
        return self.function.__module__ or "__main__"  # code that is run from text may have none

    def _path(self) -> str:
        return f"{self.module}:{self.function.__qualname__}"

    @cached_property
    def source(self) -> tuple[str, str, str]:
        """Its module, its name there, and a digest of the module's source.

        Of the whole module, since the function may call others; of a function in a notebook, its
        own source; of one without any, its code.
        """
        text = repr(self.function.__code__.co_code)
        for part in (inspect.getmodule(self.function), self.function):
            try:
                text = inspect.getsource(part) if part is not None else text
                break
            except (OSError, TypeError):
                continue
        digest = hashlib.sha256(text.encode()).hexdigest()
        return self.module, self.function.__qualname__, digest

    # What it computes.

    def write_formulas(self, table: _core.Plan) -> _core.Plan:
        """Return a plan's table with the formulas of its tensors.

        Raises
        ------
        PlanError
            If the function fails, or returns what is no formula or cannot be computed.
        """
        try:
            return table.with_formulas(self.source, self.formula, self.wants_tensor)
        except PlanError as error:
            if error.file is None:  # the engine cannot know whose formula it is
                where = f"the merge method `{self.name}` (line {self._line()})"
                error.message = f"{where} returned what cannot be computed: {error.message}"
                error.file = self._file()
            raise

    def formula(
        self,
        inputs: int,
        base: int | None,
        shared: Mapping[str, Any],
        own: Sequence[Mapping[str, Any]],
        tensor: tuple[str, Sequence[int], str] | None = None,
    ) -> Written:
        """Return the formula for these parameters, as the engine reads it.

        Parameters
        ----------
        inputs : int
            How many there are.
        base : int, optional
            Which of them is the base.
        shared : mapping
            The shared parameters, by the name that recipes use.
        own : sequence of mapping
            Those of each input.
        tensor : tuple, optional
            Name, shape and element type of the output, for a method that asks for them.

        Returns
        -------
        tuple
            The nodes as JSON, the functions that they call; and for a method of arrays, what makes
            the output, and whether of the whole tensor.

        Raises
        ------
        PlanError
            If the function fails, or returns no formula.
        """
        others = [at for at in range(inputs) if at != base]
        arguments: dict[str, Any] = {}
        for name, spec in self.parameters.items():
            key = plain_name(name)
            if spec.per == "shared":
                arguments[name] = shared.get(key)
            else:
                arguments[name] = [own[at].get(key) for at in others]
        if self.wants_tensor and tensor is not None:
            name, shape, dtype = tensor
            arguments[_TENSOR] = TensorInfo(name, tuple(shape), dtype)

        def call(inputs: Sequence[Any]) -> Any:
            given: list[Any] = [[inputs[at] for at in others]]
            if self.base != "ignored":
                given.insert(0, None if base is None else inputs[base])
            try:
                return self.function(*given, **arguments)
            except Exception as error:
                raise self._failure(error, self.function) from error

        if self.sees != "elements":
            return repr(arguments), [], (self._of_arrays(call), self.sees == "tensor")
        returned = call([Value("input", index=index) for index in range(inputs)])
        try:
            nodes, functions = as_nodes(returned)
        except TypeError:
            wanted, found = "a value of `oxmerge.formula`", f"{returned!r:.80}"
            raise self._no_result("formula", wanted, found) from None
        return nodes, [self._guarded(function, results) for function, results in functions], None

    def _no_result(self, what: str, expected: str, found: str) -> PlanError:
        return PlanError(
            f"the merge method `{self.name}` (line {self._line()}) returned no {what}",
            file=self._file(),
            expected=expected,
            found=found,
            advice="return what the output is",
        )

    def _of_arrays(self, call: Callable[[Sequence[Any]], Any]) -> Callable[..., bytes]:
        """Return a method of arrays as the engine calls it, with bytes of the working type."""
        from oxmerge.arrays.views import kind_of  # noqa: PLC0415 - it loads NumPy

        kind_of(self.framework)  # that torch is not installed is told now
        from_bytes = _torch_of if self.framework == "pt" else _numpy_of

        def of_bytes(inputs: list[bytearray], shape: tuple[int, ...], dtype: str) -> bytes:
            import numpy as np  # noqa: PLC0415 - heavy

            returned = call([from_bytes(each, shape, dtype) for each in inputs])
            if hasattr(returned, "detach"):  # as torch's are
                returned = returned.detach()
                returned = returned.double() if dtype == "F64" else returned.float()
            try:
                found = np.asarray(returned)
                if found.shape == shape and found.dtype.kind not in _NO_NUMBERS:
                    return found.astype("f8" if dtype == "F64" else "f4", copy=False).tobytes()
            except (TypeError, ValueError) as error:  # lists of several lengths, say
                raise self._failure(error, self.function) from error
            wanted, shown = f"{shape} of numbers", f"{found.shape} of {found.dtype}"
            raise self._no_result("array of the shape that it got", wanted, shown)

        return of_bytes

    def _guarded(
        self, function: Callable[..., Any], results: int | None
    ) -> Callable[..., list[float]]:
        """Return a function of a `compute` node as the engine calls it."""

        def call(*numbers: float) -> list[float]:
            try:
                returned = function(*numbers)
                found = array("d", [returned] if results is None else returned).tolist()
            except Exception as error:
                raise self._failure(error, function) from error
            if results is not None and len(found) != results:
                raise PlanError(
                    f"a function of the merge method `{self.name}` (line {_line_of(function)}) "
                    "returned another number of results than `compute` was told",
                    file=self._file(),
                    expected=str(results),
                    found=str(len(found)),
                    advice="return as many, or mend `results=`",
                )
            return found

        return call

    def _failure(self, error: Exception, function: Callable[..., Any]) -> PlanError:
        """Return the error that tells that a function of the method raised one."""
        line, traceback = _line_of(function) or self._line(), error.__traceback__
        while traceback is not None:
            if traceback.tb_frame.f_code.co_filename == self._file():
                line = traceback.tb_lineno
            traceback = traceback.tb_next
        return PlanError(
            f"the merge method `{self.name}` failed in line {line}: "
            f"{type(error).__name__}: {error}",
            file=self._file(),
            advice="mend the function, or the parameters that it cannot take",
        )

    def _file(self) -> str:
        return self.function.__code__.co_filename

    def _line(self) -> int:
        return self.function.__code__.co_firstlineno


def _numpy_of(data: bytearray, shape: tuple[int, ...], dtype: str) -> Any:
    import numpy as np  # noqa: PLC0415 - heavy

    return np.frombuffer(data, "f8" if dtype == "F64" else "f4").reshape(shape)


def _torch_of(data: bytearray, shape: tuple[int, ...], dtype: str) -> Any:
    import torch  # noqa: PLC0415 - heavy

    return torch.frombuffer(data, dtype=torch.float64 if dtype == "F64" else torch.float32).reshape(
        shape
    )


def _line_of(function: Callable[..., Any]) -> int | None:
    code = getattr(function, "__code__", None)
    return None if code is None else code.co_firstlineno


def _arguments(function: Function, *, has_base: bool) -> dict[str, inspect.Parameter]:
    """Return the keyword arguments of a method; raise TypeError if it has not those of one."""
    if not inspect.isfunction(function):
        raise TypeError(f"a merge method is a function, not {function!r}")
    arguments = list(inspect.signature(function).parameters.values())
    positional = [each for each in arguments if each.kind is each.POSITIONAL_OR_KEYWORD]
    keyword = {each.name: each for each in arguments if each.kind is each.KEYWORD_ONLY}
    wanted = ["base", "models"] if has_base else ["models"]
    if [each.name for each in positional] != wanted or len(keyword) + len(wanted) < len(arguments):
        takes_base = any(each.name == "base" for each in positional)
        advice = '; for a base write `@method(base="required")`' if takes_base > has_base else ""
        raise TypeError(
            f"the method `{function.__name__}` takes ({', '.join(wanted)}, *, parameters), not "
            f"{inspect.signature(function)}{advice}"
        )
    for taken, who in ((_TAKEN, "`oxmerge.merge_tensors`"), (modifiers(), "every method")):
        if found := keyword.keys() & taken:
            raise TypeError(
                f"the method `{function.__name__}` cannot have a parameter `{min(found)}`: "
                f"{who} has one; choose another name"
            )
    return keyword


def _declared(argument: inspect.Parameter) -> ParameterSpec:
    default = argument.default
    if not isinstance(default, ParameterSpec):
        default = shared() if default is argument.empty else shared(default)
    assert isinstance(default, ParameterSpec)
    return default


@overload
def method(function: Function, /) -> PythonMethod: ...
@overload
def method(
    *,
    base: Base = ...,
    models: tuple[int, int | None] = ...,
    name: str | None = ...,
    sees: Sees = ...,
    framework: Framework = ...,
) -> Callable[[Function], PythonMethod]: ...
def method(
    function: Function | None = None,
    /,
    *,
    base: Base = "ignored",
    models: tuple[int, int | None] = (1, None),
    name: str | None = None,
    sees: Sees = "elements",
    framework: Framework = "np",
) -> PythonMethod | Callable[[Function], PythonMethod]:
    """Make a merge method of a function.

    The function gets the base (None if there is none; no such argument with ``base="ignored"``),
    the list of models, which never has the base in it, and its parameters by keyword; it returns
    the formula of an output element. Its docstring documents it: the first line is the title, and
    an address in it is that of the paper.

    It is called once for each distinct setting of its parameters. With a keyword argument
    ``tensor`` it is called for each tensor, and gets name, shape and type (`TensorInfo`).

    Parameters
    ----------
    base : str
        Whether a base model is required, optional, or ignored (then there is none).
    models : tuple of int
        Fewest and most models besides the base; None for no limit.
    name : str, optional
        What callers name it by, if not by the function's name.
    sees : str
        What the function gets. ``elements``: values of `oxmerge.formula`. For what that language
        cannot say, arrays: ``rows``, some whole rows at a time, so that a row of the output may
        depend on that row of the inputs alone; or ``tensor``, of the tensor's shape. They are
        float32 (float64 where an input or the output is), and it returns one of their shape. They
        count in the memory budget, and as much again for what the function makes on the way.
    framework : {"np", "pt"}
        Whether arrays are of NumPy or torch.

    Returns
    -------
    PythonMethod
        The method; `merge_tensors` and `merge_state_dicts` take it as they take a name.

    Raises
    ------
    TypeError, ValueError
        If the function cannot be a method, or the name is taken by a built-in one.
    """
    if base not in {"required", "optional", "ignored"}:
        raise ValueError(f'base must be "required", "optional" or "ignored", not {base!r}')
    if sees not in _COSTS or framework not in {"np", "pt"}:
        raise ValueError(
            'sees must be "elements", "rows" or "tensor", and framework "np" or "pt", not '
            f"{sees!r} and {framework!r}"
        )

    def register(function: Function) -> PythonMethod:
        chosen = getattr(function, "__name__", repr(function)) if name is None else name
        if not _NAME.fullmatch(chosen):
            raise ValueError(f"a method's name is a word, not {chosen!r}")
        if chosen in built_in_methods():
            raise ValueError(f"there is a merge method `{chosen}` already; choose another name")
        made = PythonMethod(
            function, chosen, base=base, models=models, sees=sees, framework=framework
        )
        _METHODS[made.module, chosen] = made
        return made

    return register if function is None else register(function)


# Finding one by what a recipe calls it.


def find_written(name: str, allowed: Collection[str] = ()) -> PythonMethod | Problem | None:
    """Return the method that a recipe calls `name`, why it cannot be had, or None.

    Parameters
    ----------
    name : str
        A name of this process, of an entry point, or ``package.module:name``.
    allowed : collection of str
        The modules that may be imported for it.
    """
    here = [each for (_, known), each in _METHODS.items() if known == name]
    if len(here) > 1:
        places = ", ".join(f"`{each.module}:{name}`" for each in here)
        message = f"two modules have a merge method `{name}`"
        advice = f"name one of them: {places}, and allow its module"
        return Problem("unknown-method", message, advice=advice)
    if here:
        return here[0]
    if ":" in name:
        return _of_module(name, allowed)
    return next((_loaded(point) for point in _entry_points() if point.name == name), None)


def names() -> list[str]:
    """Return what the methods that can be used by a plain name are called."""
    return sorted({name for _, name in _METHODS} | {point.name for point in _entry_points()})


def installed() -> list[PythonMethod | Problem]:
    """Return the methods that installed packages offer, or why one cannot be had."""
    return [_loaded(point) for point in _entry_points()]


def _entry_points() -> Sequence[Any]:
    from importlib.metadata import entry_points  # noqa: PLC0415 - slow

    return sorted(entry_points(group=ENTRY_POINTS), key=lambda point: point.name)


def _loaded(point: Any) -> PythonMethod | Problem:
    """Return the method of an entry point, by the name that it has there."""
    package = getattr(point.dist, "name", "a package")
    what = f"the merge method `{point.name}` of `{package}`"
    try:
        found = point.load()
    except (Exception, SystemExit) as error:  # noqa: BLE001 - a package may do anything
        return _unloadable(what, error)
    return _method_or_problem(what, found, point.name)


def _of_module(name: str, allowed: Collection[str]) -> PythonMethod | Problem:
    module, _, attribute = name.partition(":")
    what = f"the merge method `{name}`"
    if module not in allowed:
        message = f"{what} is a Python function, and a recipe runs no code that is not allowed"
        advice = did_you_mean(module, allowed) or (
            f"if you trust the module, allow it: `--allow-methods {module}`; "
            f"in Python, `allow_methods=[{module!r}]`"
        )
        return Problem("unknown-method", message, advice=advice)
    try:
        loaded = import_module(module)
        found = functools.reduce(getattr, attribute.split("."), loaded)
    except (Exception, SystemExit) as error:  # noqa: BLE001 - a module may do anything
        return _unloadable(what, error)
    return _method_or_problem(what, found, name)


def _method_or_problem(what: str, found: object, name: str) -> PythonMethod | Problem:
    if isinstance(found, PythonMethod):
        if found.name == name:
            return found
        return found.named(name)
    advice = "decorate the function: `@oxmerge.method`"
    text = f"{what} is none"
    return Problem("unknown-method", text, found=f"{found!r:.80}", advice=advice)


def _unloadable(what: str, error: BaseException) -> Problem:
    message = f"{what} cannot be loaded: {type(error).__name__}: {error}"
    advice = "see that its module can be imported: `PYTHONPATH` says where else to look"
    return Problem("unknown-method", message, advice=advice)
