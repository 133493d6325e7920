"""Mappings from names to tensors that are read or computed when they are looked up."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Generic, TypeVar

from oxmerge.problems import no_such_key

__all__ = ["TensorMapping"]

Known = TypeVar("Known")


class TensorMapping(Mapping[str, Any], Generic[Known]):
    """Tensors by name, in file order; what only asks for names looks none up.

    What makes one sets `_tensors`: what is known of each tensor beforehand.
    """

    _tensors: Mapping[str, Known]

    def _known(self, name: str) -> Known:
        """Return what is known of a tensor; raise KeyError, with what was meant, if it is none."""
        if name not in self._tensors:
            raise no_such_key("tensor", name, self._tensors)
        return self._tensors[name]

    def get(self, name: str, default: Any = None) -> Any:  # noqa: ANN401 - as in a mapping
        """Return a tensor, or `default` if there is none of that name."""
        return self[name] if name in self else default  # noqa: SIM401 - this is it

    def __contains__(self, name: object) -> bool:
        """Tell whether there is a tensor of that name, without looking it up."""
        return name in self._tensors

    def __iter__(self) -> Iterator[str]:
        """Iterate over the names in file order."""
        return iter(self._tensors)

    def __len__(self) -> int:
        """Return the number of tensors."""
        return len(self._tensors)

    def __eq__(self, other: object) -> bool:
        """Tell whether it is the same object: comparing tensors would look all of them up."""
        return self is other

    def __hash__(self) -> int:
        """Return a number for this object."""
        return id(self)
