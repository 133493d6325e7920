"""What a merge would do, told before it is done."""

from __future__ import annotations

from dataclasses import dataclass

from oxmerge.outcome import method_description
from oxmerge.problems import printable
from oxmerge.sizes import format_duration, format_size

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Any

    from oxmerge.devices import Choice
    from oxmerge.schema import Plan
    from oxmerge.problems import Problem

__all__ = ["Outlook"]

#: What a common disk moves in a second, and a fast one.
_RATES = (1e9, 3e9)


@dataclass(frozen=True, slots=True, repr=False)
class Outlook:
    """What a merge would do; as text, a summary with the accounting of every input tensor.

    Attributes
    ----------
    merge_plan : Plan
        The plan itself, with the accounting of every tensor.
    disk : int
        Bytes that the output needs on the disk.
    memory : int
        Predicted high-water mark of the process's resident set, bytes.
    threads : int
        Threads that will work.
    left_out : tuple of str
        The donor's files that are not copied, with the reason.
    reread_bytes : int, optional
        Bytes of tensors that are read several times and do not fit the memory that is free now: the
        disk gives them again each time. None if nothing is read several times.
    device : str
        Where it would compute.
    fastest : Choice
        The device that is expected to be the fastest, and why.
    """

    merge_plan: Plan
    disk: int
    memory: int
    threads: int
    left_out: tuple[str, ...]
    reread_bytes: int | None
    device: str
    fastest: Choice

    @property
    def cost(self) -> str:
        """How often the inputs are read, and from where again."""
        cost: str = method_description(self.method)["cost"]
        if self.reread_bytes is None:
            return cost
        if self.reread_bytes == 0:
            return f"{cost}, again from the page cache"
        size = format_size(self.reread_bytes)
        return f"{cost}, {size} again from the disk each time: more than the free memory"

    @property
    def method(self) -> str:
        """The merge method."""
        return self.merge_plan.method

    @property
    def tensors(self) -> int:
        """How many tensors the output has."""
        return len(self.merge_plan.tensors)

    @property
    def files(self) -> int:
        """How many weight files the output has."""
        return len(self.merge_plan.shards)

    @property
    def bytes_read(self) -> int:
        """Bytes of input tensors that are used."""
        return self.merge_plan.bytes_read

    @property
    def bytes_written(self) -> int:
        """Bytes of output tensors."""
        return self.merge_plan.bytes_written

    @property
    def bytes_moved(self) -> int:
        """Bytes that the disk moves at the least, if no input is in the page cache before."""
        return self.bytes_read + (self.reread_bytes or 0) + self.bytes_written

    @property
    def warnings(self) -> tuple[Problem, ...]:
        """What has no effect, and what is left out."""
        return self.merge_plan.warnings

    @property
    def accounting(self) -> dict[str, int]:
        """How many input tensors are merged, copied, dropped."""
        models = self.merge_plan.accounting
        return {
            "merged": sum(len(model.merged) for model in models),
            "copied": sum(len(model.copied) for model in models),
            "dropped": sum(model.dropped_count for model in models),
        }

    def as_dict(self) -> dict[str, Any]:
        """Return everything as data; ``inputs`` has every tensor of every model."""
        names = (
            "method",
            "cost",
            "tensors",
            "files",
            "bytes_read",
            "reread_bytes",
            "bytes_written",
            "disk",
            "memory",
            "threads",
            "device",
        )
        return {
            **{name: getattr(self, name) for name in names},
            "fastest": {"device": self.fastest.device, "reason": self.fastest.reason},
            "accounting": self.accounting,
            "inputs": [account.as_dict() for account in self.merge_plan.accounting],
            "left_out": list(self.left_out),
            "warnings": [str(warning) for warning in self.warnings],
        }

    def __str__(self) -> str:
        """Return it as people read it: a line for each thing, and what becomes of the inputs."""
        return "\n".join(map(printable, self._lines()))

    # A notebook shows this; that of the fields would have every tensor.
    __repr__ = __str__

    def _lines(self) -> Iterator[str]:
        files = "1 file" if self.files == 1 else f"{self.files} files"
        fastest = f"{self.fastest.device}: {self.fastest.reason}"
        yield f"method    {self.method}"
        yield f"tensors   {self.tensors} in {files}"
        yield f"reads     {format_size(self.bytes_read)}: {self.cost}"
        yield f"writes    {format_size(self.bytes_written)}"
        yield f"memory    {format_size(self.memory, binary=True)} at the peak"
        yield f"threads   {self.threads}"
        yield f"device    {self.device}; the fastest should be {fastest}"
        yield f"disk      {format_size(self.disk)} needed"
        yield f"time      {self._time()}"
        yield from (f"not copied  {name}" for name in self.left_out)
        accounts = self.merge_plan.accounting
        lines = (line for account in accounts for line in account.summary())
        yield from (f"{' ' if at else 'inputs':<10}{line}" for at, line in enumerate(lines))

    def _time(self) -> str:
        """Say how long the bytes take, on a common disk and on a fast one."""
        slow, fast = (format_duration(self.bytes_moved / rate) for rate in _RATES)
        least = "at least " if self.reread_bytes else ""
        return f"{least}{slow} where the disk moves 1 GB/s, {fast} at 3 GB/s"
