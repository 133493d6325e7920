"""Each method against a plain reading of its formula in f64, and against what must hold of it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeAlias

import ml_dtypes
import numpy as np
import oxmerge
import pytest
from method_stub import stub
from oxmerge import _core
from oxmerge.arrays import method_functions

if TYPE_CHECKING:
    from collections.abc import Callable

Array: TypeAlias = Any

SHAPES = [(), (1,), (7,), (1, 5), (5, 1), (3, 4, 5), (0,), (0, 3), (300, 301), (2, 70_000)]
DTYPES = {"float64": np.float64, "float32": np.float32, "bfloat16": ml_dtypes.bfloat16,
          "float16": np.float16}  # fmt: skip
#: How far from the oracle an element may be, of the largest around it.
TOLERANCE = {"float64": 1e-9, "float32": 2e-6, "bfloat16": 9e-3, "float16": 1.2e-3}
METHODS = {row["name"]: row for row in _core.methods()}
#: Methods with numbers over the model are tested elsewhere.
ELSEWHERE = {"metagpt", "nan"}

# The formulas. Inputs are in f64; `base` comes first, then the others, then the parameters.


def norm(x: Array) -> float:
    return float(np.sqrt(np.sum(np.square(x))))


def dot(x: Array, y: Array) -> float:
    return float(np.sum(x * y))


def linear(_: Array, xs: list[Array], weight: list[float], normalize: bool = True) -> Array:
    total = sum(w * x for w, x in zip(weight, xs, strict=True))
    return total / sum(weight) if normalize else total


def soup(base: Array, xs: list[Array], weight: list[float] | None = None) -> Array:
    return linear(base, xs, weight or [1.0] * len(xs))


def ema(_: Array, xs: list[Array], decay: float = 0.9) -> Array:
    average = xs[0]
    for x in xs[1:]:
        average = decay * average + (1 - decay) * x
    return average


def passthrough(_: Array, xs: list[Array], scale: float = 1.0) -> Array:
    return scale * xs[0]


def between(t: float, a: Array, b: Array, straight: Callable[[float], bool]) -> Array:
    size = norm(a) * norm(b)
    cosine = np.clip(dot(a, b) / size, -1, 1) if size else 0.0
    angle = np.arccos(cosine)
    if straight(cosine):
        return (1 - t) * a + t * b
    return (np.sin((1 - t) * angle) * a + np.sin(t * angle) * b) / np.sin(angle)


def slerp(base: Array, xs: list[Array], t: float) -> Array:
    return between(t, base, xs[0], lambda cosine: abs(cosine) > 0.9995)


def nuslerp(base: Array, xs: list[Array], weight: list[float]) -> Array:
    t = weight[1] / sum(weight)
    a, b = (x - base for x in xs)
    return base + between(t, a, b, lambda cosine: 1 - cosine**2 < 1e-12)


def multislerp(base: Array, xs: list[Array], weight: list[float], eps: float = 1e-8) -> Array:
    if len(xs) == 1:
        return xs[0]
    w = np.array(weight) / sum(weight)
    vs = [x - base for x in xs]
    units = [v / (norm(v) + eps) for v in vs]
    mean = sum(a * u for a, u in zip(w, units, strict=True))
    if norm(mean) < max(eps, 1e-6):
        return base + sum(a * v for a, v in zip(w, vs, strict=True))
    mean = mean / norm(mean)
    tangent = sum(a * (u - dot(u, mean) * mean) for a, u in zip(w, units, strict=True))
    r = norm(tangent) + eps
    point = mean * np.cos(r) + tangent * np.sin(r) / r
    return base + point * sum(a * norm(v) for a, v in zip(w, vs, strict=True))


def karcher(_: Array, xs: list[Array], max_iter: int = 10, tol: float = 1e-5) -> Array:
    if len(xs) == 1:
        return xs[0]
    lengths = [norm(x) for x in xs]
    units = [x / n for x, n in zip(xs, lengths, strict=True) if n > tol]
    if not units:
        return np.zeros_like(xs[0])
    point = sum(units) / len(units)
    point = point / norm(point) if norm(point) >= tol else units[0]
    for _ in range(max_iter):
        step = np.zeros_like(point)
        for unit in units:
            cosine = np.clip(dot(point, unit), -1, 1)
            angle = np.arccos(cosine)
            if angle >= tol and np.sin(angle) > 1e-6:
                step += angle / np.sin(angle) * (unit - cosine * point) / len(units)
        size = norm(step)
        if size < tol:
            break
        point = np.cos(size) * point + np.sin(size) * step / size
        point = point / norm(point)
    return point * sum(lengths) / len(lengths)


def model_stock(base: Array, xs: list[Array], filter_wise: bool = False) -> Array:
    if filter_wise and base.ndim:
        rows = base.reshape(-1, base.shape[-1]).shape[0] if base.size else 0
        flat = base.reshape(rows, -1) if rows else base
        others = [x.reshape(flat.shape) for x in xs]
        merged = [model_stock(flat[i], [x[i] for x in others]) for i in range(rows)]
        return np.array(merged).reshape(base.shape)
    vs = [x - base for x in xs]
    pairs = [(i, j) for i in range(len(vs)) for j in range(i)]
    cosine = np.mean(
        [np.clip(dot(vs[i], vs[j]) / max(norm(vs[i]) * norm(vs[j]), 1e-6), -1, 1) for i, j in pairs]
    )
    divisor = 1 + (len(vs) - 1) * cosine
    t = 0 if abs(divisor) < 1e-6 else len(vs) * cosine / divisor
    return t * sum(xs) / len(xs) + (1 - t) * base


def geometric_median(base: Array, xs: list[Array]) -> Array:
    shares = np.ones(len(xs)) / len(xs)
    for _ in range(100):
        point = sum(s * x for s, x in zip(shares, xs, strict=True))
        distances = np.array([norm(x - point) for x in xs])
        if not distances.any():
            break
        inverse = 1 / np.maximum(distances, 1e-9 * distances.max())
        new = inverse / inverse.sum()
        done = np.abs(new - shares).max() <= 1e-9
        shares = new
        if done:
            break
    return base + sum(s * (x - base) for s, x in zip(shares, xs, strict=True))


def largest(values: Array, count: float) -> Array:
    mask = np.zeros(values.size, bool)
    mask[np.argsort(-values.ravel(), kind="stable")[: int(count)]] = True
    return mask.reshape(values.shape)


def arithmetic(
    base: Array,
    vs: list[Array],
    weight: list[float],
    *,
    votes: bool,
    normalize: bool,
    lambda_: float = 1.0,
) -> Array:
    parts = np.array([w * v for w, v in zip(weight, vs, strict=True)])
    weights = np.array(weight).reshape(-1, *[1] * base.ndim)
    agree = np.ones(parts.shape, bool)
    if votes:
        agree = np.sign(parts) == np.where(parts.sum(0) >= 0, 1, -1)
    total, divisor = (parts * agree).sum(0), (weights * agree).sum(0)
    if normalize:
        total = total / np.where(np.abs(divisor) < 1e-8, 1, divisor)
    return base + lambda_ * total


def task_arithmetic(base: Array, xs: list[Array], weight: list[float]) -> Array:
    return arithmetic(base, [x - base for x in xs], weight, votes=False, normalize=False)


def ties(base: Array, xs: list[Array], weight: list[float], density: float) -> Array:
    vs = [x - base for x in xs]
    vs = [v * largest(np.abs(v), max(1, int(density * v.size))) for v in vs]
    return arithmetic(base, vs, weight, votes=True, normalize=True)


def crumbs(v: Array, density: float, gamma: float) -> Array:
    kept, dropped = int(density * v.size), int(gamma * v.size)
    dropped = min(dropped, v.size - kept)
    magnitude = np.abs(v)
    return v * (largest(magnitude, kept + dropped) & ~largest(magnitude, dropped))


def breadcrumbs(
    base: Array, xs: list[Array], weight: list[float], density: float, gamma: float
) -> Array:
    vs = [crumbs(x - base, density, gamma) for x in xs]
    return arithmetic(base, vs, weight, votes=False, normalize=False)


def breadcrumbs_ties(
    base: Array, xs: list[Array], weight: list[float], density: float, gamma: float
) -> Array:
    vs = [crumbs(x - base, density, gamma) for x in xs]
    return arithmetic(base, vs, weight, votes=True, normalize=False)


def philox(key: list[int], counter: list[Array]) -> list[Array]:
    """Philox4x32-10, for many counters: words of 32 bits in 64."""
    low = np.uint64(0xFFFF_FFFF)
    for _ in range(10):
        first = np.uint64(0xD251_1F53) * counter[0]
        second = np.uint64(0xCD9E_8D57) * counter[2]
        counter = [
            second >> np.uint64(32) ^ counter[1] ^ np.uint64(key[0]),
            second & low,
            first >> np.uint64(32) ^ counter[3] ^ np.uint64(key[1]),
            first & low,
        ]
        key = [(key[0] + 0x9E37_79B9) % 2**32, (key[1] + 0xBB67_AE85) % 2**32]
    return counter


def draws(shape: tuple[int, ...], position: int) -> Array:
    """The draws of 32 bits of a tensor without a name, under seed 0, as NUMERICS.md has them."""
    name = 0xCBF2_9CE4_8422_2325
    for byte in b"\xff" + position.to_bytes(4, "little"):
        name = (name ^ byte) * 0x0000_0100_0000_01B3 % 2**64
    index: Array = np.arange(np.prod(shape, dtype=int)).astype(np.uint64)
    group, within = np.divmod(index, np.uint64(512))
    counter = group * np.uint64(64) + within % np.uint64(64)
    place = within // np.uint64(64)

    def halves(counter: Array) -> Array:
        low, high = counter & np.uint64(0xFFFF_FFFF), counter >> np.uint64(32)
        stream = [np.full_like(counter, name % 2**32), np.full_like(counter, name >> 32)]
        words = np.array(philox([0, 0], [low, high, *stream]))
        word = np.take_along_axis(words, (place % np.uint64(4)).astype(int)[None], 0)[0]
        return np.where(place < 4, word & np.uint64(0xFFFF), word >> np.uint64(16))

    drawn = halves(counter) << np.uint64(16) | halves(counter | np.uint64(1 << 63))
    return drawn.astype(np.float64).reshape(shape)


def rescaled(v: Array, kept: Array) -> Array:
    before, after = np.abs(v).sum(), np.abs(v * kept).sum()
    return v * kept * (before / after if min(before, after) >= 1e-7 else 1)


def dare_linear(base: Array, xs: list[Array], weight: list[float], density: float) -> Array:
    vs = [dropped(x - base, density, position) for position, x in enumerate(xs)]
    return arithmetic(base, vs, weight, votes=False, normalize=False)


def dare_ties(base: Array, xs: list[Array], weight: list[float], density: float) -> Array:
    vs = [dropped(x - base, density, position) for position, x in enumerate(xs)]
    return arithmetic(base, vs, weight, votes=True, normalize=False)


def dropped(v: Array, density: float, position: int) -> Array:
    return rescaled(v, draws(v.shape, position) < round(density * 2**32))


def dropped_by_rank(v: Array, density: float, epsilon: float, position: int) -> Array:
    magnitudes = -np.abs(np.atleast_1d(v))
    axis = min(magnitudes.ndim - 1, 1)
    length = magnitudes.shape[axis]
    # Of equal ones the first is the largest, which has the last rank.
    place = magnitudes.argsort(axis, kind="stable").argsort(axis, kind="stable")
    rank = (length - 1 - place) / (length - 1) if length > 1 else 0.5
    probability = density - epsilon + 2 * epsilon * rank
    bound = np.floor(probability * 2**32 + 0.5) + np.zeros_like(magnitudes)
    return rescaled(v, draws(v.shape, position) < bound.reshape(v.shape))


def della_linear(
    base: Array, xs: list[Array], weight: list[float], density: float, epsilon: float = 0.15
) -> Array:
    vs = [dropped_by_rank(x - base, density, epsilon, position) for position, x in enumerate(xs)]
    return arithmetic(base, vs, weight, votes=False, normalize=False)


def della(
    base: Array, xs: list[Array], weight: list[float], density: float, epsilon: float = 0.15
) -> Array:
    vs = [dropped_by_rank(x - base, density, epsilon, position) for position, x in enumerate(xs)]
    return arithmetic(base, vs, weight, votes=True, normalize=True)


def cabs(base: Array, xs: list[Array], weight: list[float], n: int = 64, m: int = 256) -> Array:
    if not base.size:
        return base
    merged = base.copy()
    taken = np.zeros(base.shape, bool)
    for w, x in zip(weight, xs, strict=True):
        free = np.atleast_1d((x - base) * ~taken)
        kept = np.zeros(free.shape, bool)
        for row, marks in zip(
            free.reshape(-1, free.shape[-1]), kept.reshape(-1, free.shape[-1]), strict=True
        ):
            for start in range(0, row.size, m):
                marks[start : start + m] = largest(np.abs(row[start : start + m]), n)
        part = (free * kept).reshape(base.shape)
        taken |= part != 0
        merged = merged + w * part
    return merged


def sce(base: Array, xs: list[Array], select_topk: float = 1.0) -> Array:
    vs = np.array([x - base for x in xs])
    if not base.size:
        return base
    if select_topk < 1:
        variance = vs.var(0)
        vs = vs * largest(variance, int(np.count_nonzero(variance) * select_topk))
    agree = np.sign(vs) == np.where(vs.sum(0) >= 0, 1, -1)
    squares = np.array([np.mean(np.square(v)) for v in vs])
    shares = squares / squares.sum() if squares.sum() >= 1e-6 else np.ones(len(xs)) / len(xs)
    shares = shares.reshape(-1, *[1] * base.ndim)
    return base + (shares * agree * vs).sum(0) / np.maximum((shares * agree).sum(0), 1e-6)


def nearswap(base: Array, xs: list[Array], t: float) -> Array:
    weight = np.clip(t / np.maximum(np.abs(base - xs[0]), 1e-6), 0, 1)
    return weight * xs[0] + (1 - weight) * base


def softmax(x: Array) -> Array:
    exponential = np.exp(x - x.max(-1, keepdims=True))
    return exponential / exponential.sum(-1, keepdims=True) + 1e-8


def arcee_fusion(base: Array, xs: list[Array]) -> Array:
    if not base.size:
        return base
    a, b = np.atleast_1d(base), np.atleast_1d(xs[0])
    p, q = softmax(b), softmax(a)
    importance = np.abs(b - a) * (p * np.log(p / q)).sum(-1, keepdims=True)
    ordered = np.sort(importance, axis=None)
    low, middle, high = (ordered[int(share * (ordered.size - 1))] for share in (0.25, 0.5, 0.75))
    return np.where(importance >= middle + 1.5 * (high - low), b, a).reshape(base.shape)


def ram(base: Array, xs: list[Array], epsilon: float = 1e-5) -> Array:
    vs = np.array([x - base for x in xs])
    active = np.abs(vs) > epsilon
    return base + (vs * active).sum(0) / np.maximum(active.sum(0), 1)


def ramplus_tl(
    base: Array, xs: list[Array], epsilon: float = 1e-5, r: float = 0.1, alpha: float = 0.2
) -> Array:
    vs = np.array([x - base for x in xs])
    active = np.abs(vs) > epsilon
    count = active.sum(0)
    merged = base + np.where(count >= 2, (vs * active).sum(0) / np.maximum(count, 1), 0)
    for v, is_active in zip(vs, active, strict=True):
        shared, own = np.sum(is_active & (count >= 2)), np.sum(is_active & (count == 1))
        factor = 1 + r * np.clip(shared / max(own, epsilon), 0, alpha) if own else 1
        merged = merged + factor * np.where(is_active & (count == 1), v, 0)
    return merged


def consensus_ta(
    base: Array, xs: list[Array], weight: list[float], tall: float = 0.4, k: int = 2
) -> Array:
    vs = [w * (x - base) for w, x in zip(weight, xs, strict=True)]
    total = sum(vs)
    uses = sum(np.abs(v) >= tall * np.abs(total - v) for v in vs)
    return base + np.where(uses >= k, total, 0)


def magmax(base: Array, xs: list[Array]) -> Array:
    vs = np.array([x - base for x in xs])
    chosen = np.abs(vs).argmax(0)
    return base + np.take_along_axis(vs, chosen[None], 0)[0]


def emr(base: Array, xs: list[Array]) -> Array:
    vs = np.array([x - base for x in xs])
    sign = np.sign(vs.sum(0))
    return base + sign * np.max(np.where(np.sign(vs) == sign, np.abs(vs), 0), axis=0)


def expo(base: Array, xs: list[Array], alpha: float = 0.3) -> Array:
    return xs[0] + alpha * (xs[0] - base)


def pcb(base: Array, xs: list[Array], density: float) -> Array:
    vs = [x - base for x in xs]
    if not base.size:
        return base
    total = sum(vs)
    top, bottom = np.zeros_like(base), np.zeros_like(base)
    for v in vs:
        share = np.abs(v) / np.abs(v).max() if np.abs(v).max() else np.zeros_like(v)
        score = np.exp(len(vs) * share**2) * np.tanh(v * total)
        threshold = np.sort(score, axis=None)[min(int(v.size * (1 - density)), v.size - 1)]
        width = score.max() - threshold
        scale = np.maximum(score - threshold, 0) / width if width > 0 else np.zeros_like(v)
        top, bottom = top + scale * v, bottom + scale
    return base + top / np.maximum(bottom, 1e-12)


#: How many models besides the base, and the parameters.
CASES: dict[str, list[tuple[int, dict[str, Any]]]] = {
    "linear": [(1, {"weight": [2.0]}), (3, {"weight": [0.2, 0.5, -0.1]}),
               (2, {"weight": [0.3, 0.3], "normalize": False})],
    "soup": [(1, {}), (4, {}), (2, {"weight": [1.0, 3.0]})],
    "ema": [(1, {}), (4, {"decay": 0.6})],
    "passthrough": [(1, {}), (1, {"scale": -0.5})],
    "slerp": [(1, {"t": 0.3}), (1, {"t": 1.4})],
    "nuslerp": [(2, {"weight": [0.7, 0.4]})],
    "multislerp": [(1, {"weight": [0.4]}), (2, {"weight": [0.7, 0.4]}), (4, {"weight": [1.0] * 4})],
    "karcher": [(1, {}), (2, {}), (4, {"max_iter": 30})],
    "model_stock": [(2, {}), (4, {}), (3, {"filter_wise": True})],
    "geometric_median": [(1, {}), (3, {}), (5, {})],
    "task_arithmetic": [(1, {"weight": [0.5]}), (3, {"weight": [0.5, -0.2, 1.5]})],
    "ties": [(1, {"weight": [0.5], "density": 0.3}),
             (3, {"weight": [0.5, 0.2, 1], "density": 0.6})],
    "breadcrumbs": [(2, {"weight": [0.5, 0.2], "density": 0.5, "gamma": 0.1}),
                    (1, {"weight": [0.5], "density": 0.95, "gamma": 0.3})],
    "breadcrumbs_ties": [(3, {"weight": [0.5, 0.2, 0.7], "density": 0.5, "gamma": 0.1})],
    "dare_linear": [(2, {"weight": [0.5, -0.2], "density": 0.3})],
    "dare_ties": [(3, {"weight": [0.5, 0.2, 0.7], "density": 0.6})],
    "della": [(1, {"weight": [0.5], "density": 0.5}),
              (3, {"weight": [0.5, 0.2, 0.7], "density": 0.4, "epsilon": 0.3})],
    "della_linear": [(2, {"weight": [0.5, -0.2], "density": 0.7, "epsilon": 0.25})],
    "cabs": [(1, {"weight": [0.5]}), (3, {"weight": [1.0, 0.5, -0.4], "n": 3, "m": 8})],
    "sce": [(1, {}), (3, {}), (3, {"select_topk": 0.4}), (2, {"select_topk": 0.1})],
    "nearswap": [(1, {"t": 0.01})],
    "arcee_fusion": [(1, {})],
    "ram": [(1, {}), (3, {"epsilon": 0.02})],
    "ramplus_tl": [(1, {}), (3, {"epsilon": 0.02, "r": 0.3, "alpha": 0.5}), (2, {"epsilon": 0})],
    "consensus_ta": [(1, {"weight": [1.0], "k": 1}), (3, {"weight": [1.0, 0.5, 2.0]})],
    "magmax": [(1, {}), (3, {})],
    "emr": [(1, {}), (3, {})],
    "expo": [(1, {}), (1, {"alpha": -0.2})],
    "pcb": [(1, {"density": 0.3}), (3, {"density": 0.4})],
}  # fmt: skip
#: Methods that keep or drop elements by what is computed in f32: where the oracle decides otherwise
#: about an element at the threshold, it is another number altogether.
CUTS = {"ties", "della", "della_linear", "cabs", "breadcrumbs", "breadcrumbs_ties", "sce",
        "arcee_fusion", "pcb", "ram", "ramplus_tl", "consensus_ta", "emr", "magmax"}  # fmt: skip
PARAMETERS = [(name, count, options) for name in CASES for count, options in CASES[name]]


def models(shape: tuple[int, ...], count: int, dtype: str) -> list[Any]:
    """Return a base and others around it."""
    random = np.random.default_rng(len(shape) + count)
    base = random.normal(0, 0.5, shape)
    others = [base + random.normal(0, 0.1, shape) for _ in range(count)]
    return [np.asarray(array, dtype=DTYPES[dtype]) for array in [base, *others]]


def merge(name: str, base: Any, others: list[Any], options: dict[str, Any]) -> Any:
    has_base = METHODS[name]["contract"]["base"] != "ignored"
    return oxmerge.merge_tensors(name, others, base if has_base else None, **options)


def test_every_method_has_an_oracle() -> None:
    assert CASES.keys() | ELSEWHERE == METHODS.keys()
    assert METHODS.keys() == set(method_functions.__all__)


def test_the_stub_is_what_the_engine_says() -> None:
    path = method_functions.__file__.removesuffix(".py") + ".pyi"
    with open(path, encoding="utf-8") as file:
        assert file.read() == stub(), "run `python tests/method_stub.py > FILE` and look at it"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("name", "count", "options"), PARAMETERS)
def test_oracle(name: str, count: int, options: dict[str, Any], dtype: str) -> None:
    for shape in SHAPES:
        base, *others = models(shape, count, dtype)
        merged = merge(name, base, others, options)
        assert merged.dtype == base.dtype
        assert merged.shape == base.shape
        inputs = [np.asarray(array, np.float64) for array in (base, *others)]
        with np.errstate(all="ignore"):
            expected = globals()[name](inputs[0], inputs[1:], **options)
        scale = max(np.abs(expected).max(initial=0), np.abs(inputs).max(initial=0))
        far = np.abs(np.asarray(merged, np.float64) - expected) > TOLERANCE[dtype] * scale
        allowed = base.size // 200 + 2 if name in CUTS and dtype != "float64" else 0
        assert np.count_nonzero(far) <= allowed, (shape, merged, expected)


@pytest.mark.parametrize(("name", "count", "options"), PARAMETERS)
def test_equal_models_stay(name: str, count: int, options: dict[str, Any]) -> None:
    base, *_ = models((40, 50), 1, "float32")
    if "scale" in options or not options.get("normalize", True):
        options = (
            {**options, "weight": [1 / count] * count} if "weight" in options else {"scale": 1}
        )
    merged = merge(name, base, [base] * count, options)
    assert np.allclose(merged, base, rtol=3e-7, atol=0)


@pytest.mark.parametrize("name", ["slerp", "ema"])
def test_ends_return_an_input(name: str) -> None:
    base, other = models((40, 50), 1, "float32")
    if name == "slerp":
        ends = [merge("slerp", base, [other], {"t": t}) for t in (0, 1)]
    else:
        ends = [merge("ema", None, [base, other], {"decay": decay}) for decay in (1, 0)]
    assert np.array_equal(ends[0], base)
    assert np.array_equal(ends[1], other)


@pytest.mark.parametrize(
    ("sparse", "dense"),
    [
        ("ties", {"normalize": True}),
        ("breadcrumbs_ties", {}),
        ("dare_ties", {}),
        ("della", {"normalize": True}),
    ],
)
def test_density_one_is_the_method_without_its_sparsifier(
    sparse: str, dense: dict[str, Any]
) -> None:
    base, *others = models((40, 50), 3, "float32")
    options = {"weight": [0.5, 0.2, 0.7], "density": 1.0}
    merged = merge(sparse, base, others, options)
    voted = merge("ties", base, others, options | {"normalize": dense.get("normalize", False)})
    assert np.array_equal(merged, voted)
    linears = {"dare_ties": "dare_linear", "della": "della_linear"}
    linear = linears.get(sparse, "breadcrumbs")
    plain = merge("task_arithmetic", base, others, {"weight": [0.5, 0.2, 0.7]})
    assert np.array_equal(merge(linear, base, others, options), plain)


@pytest.mark.parametrize("name", sorted(CASES))
def test_zeros_and_opposites_give_finite_numbers(name: str) -> None:
    count, options = CASES[name][-1]
    _, first, *_ = models((30, 20), 1, "float32")
    zero = np.zeros_like(first)
    for others in ([zero] * count, [first, -first, zero, first, zero][:count]):
        merged = merge(name, zero, others, options)
        assert np.isfinite(merged).all()


def test_probabilities_beyond_0_and_1_are_refused() -> None:
    base, other = models((4, 5), 1, "float32")
    for density, epsilon in ((0.1, 0.15), (0.9, 0.15)):
        options = {"weight": 1.0, "density": density, "epsilon": epsilon}
        with pytest.raises(oxmerge.OxmergeError, match="choose a smaller `epsilon`"):
            merge("della", base, [other], options)
    merge("della", base, [other], {"weight": 1.0, "density": 0.25, "epsilon": 0.25})


def test_a_model_takes_no_more_than_there_is() -> None:
    base, other = models((4, 5), 1, "float32")
    with pytest.raises(oxmerge.OxmergeError, match="choose a smaller `n`"):
        merge("cabs", base, [other], {"n": 5, "m": 4})
