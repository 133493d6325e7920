"""Merge methods in Python: three that there are in Rust too, and some of arrays."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from oxmerge import formula, method, per_model, shared
from oxmerge.formula import (
    compute,
    dot,
    largest,
    maximum,
    reduce_sum,
    sign,
    vote,
    weighted_sum,
    where,
)


@method(base="required", models=(2, None))
def stock(base: Any, models: Any) -> Any:
    """Model stock, once more."""
    vectors = [model - base for model in models]
    count = len(vectors)
    cosines = 0
    for first in range(count):
        for second in range(first + 1, count):
            a, b = vectors[first], vectors[second]
            product = maximum(formula.norm(a) * formula.norm(b), 1e-6)
            cosine = formula.minimum(maximum(dot(a, b) / product, -1), 1)
            cosines = cosines + cosine
    cosine = cosines / (count * (count - 1) // 2)
    divisor = 1 + (count - 1) * cosine
    share = where(abs(divisor) < 1e-6, 0, cosine / divisor)
    return base + weighted_sum([share] * count, vectors)


@method(base="required")
def crumbs(
    base: Any,
    models: Any,
    *,
    weight: Any = per_model(),
    density: Any = per_model(1.0, min=0, max=1),
    lambda_: Any = shared(1.0),
    tensor: Any,
) -> Any:
    """Breadcrumbs with votes, once more."""
    vectors = []
    for model, share in zip(models, density, strict=True):
        vector = model - base
        kept, dropped = int(share * tensor.elements), int(0.01 * tensor.elements)
        outer = largest(abs(vector), kept + dropped)
        inner = largest(abs(vector), dropped)
        vectors.append(where(where(inner, 0, outer), vector, 0))
    return base + weighted_sum([lambda_], [vote(weight, vectors)])


@method(base="required")
def selected(base: Any, models: Any, *, share: Any = shared(0.3)) -> Any:
    """SCE, once more."""
    vectors = [model - base for model in models]
    part = 1 / len(vectors)
    mean = weighted_sum([part] * len(vectors), vectors)
    squares = [(vector - mean) * (vector - mean) for vector in vectors]
    variance = weighted_sum([part] * len(vectors), squares)
    count = compute(lambda n: math.trunc(n * share), reduce_sum(variance > 0))
    mask = largest(variance, count)
    vectors = [where(mask, vector, 0) for vector in vectors]
    elements = formula.count()
    means = [dot(vector, vector) / elements for vector in vectors]
    total = 0.0
    for each in means:
        total = total + each
    weights = [where(abs(total) < 1e-6, part, each / total) for each in means]
    elected = where(weighted_sum([1] * len(vectors), vectors) >= 0, 1, -1)
    agree = [sign(vector) == elected for vector in vectors]
    kept = [where(yes, vector, 0) for yes, vector in zip(agree, vectors, strict=True)]
    divisor = maximum(weighted_sum(weights, agree), 1e-6)
    return base + weighted_sum(weights, kept) / divisor


@method(base="required")
def sharpened(base: Any, models: Any, *, weight: Any = per_model(0.5)) -> Any:
    """Every kind of number: over the model, the tensor, rows, columns; ranks and random masks."""
    vectors = [model - base for model in models]
    by_row = [vector / (1 + formula.norm(vector, over="row")) for vector in vectors]
    by_column = [one * formula.reduce_max(abs(base), over="column") for one in by_row]
    whole = formula.norm(base, over="model")
    middle = formula.order_statistic(abs(vectors[0]), 1)
    mask = formula.random_mask(0.5, 3)
    share = compute(lambda a, b: (a / (a + b + 1), b / (a + b + 1)), whole, middle, results=2)
    return base + where(mask, share[0] * weighted_sum(weight, by_column), share[1] * vectors[0])


@method(base="required", sees="rows")
def by_row(base: Any, models: Any, *, weight: Any = per_model(0.5)) -> Any:
    """Task vectors, each row sorted: what no formula can say."""
    return base + sum(
        np.float32(w) * np.sort(model - base, axis=-1)
        for w, model in zip(weight, models, strict=True)
    )


@method(base="required", sees="tensor")
def turned(base: Any, models: Any, *, weight: Any = per_model(0.5)) -> Any:
    """The same, sorted across the first dimension."""
    return base + sum(
        np.float32(w) * np.sort(np.atleast_1d(model - base), axis=0).reshape(base.shape)
        for w, model in zip(weight, models, strict=True)
    )


@method(base="required", sees="rows", framework="pt")
def in_torch(base: Any, models: Any, *, weight: Any = per_model(0.5)) -> Any:
    """As `by_row`, of torch tensors."""
    return base + sum(
        float(np.float32(w)) * (model - base).sort(dim=-1).values
        for w, model in zip(weight, models, strict=True)
    )
