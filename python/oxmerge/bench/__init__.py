"""Measures this machine and the engine on it, for `oxmerge bench`.

- `run`: one go, every part that is asked for; `measure`: jobs, run in interleaved rounds; `record`:
  what came out, as data with a schema;
- `arrays`, `storage`, `merges`: the jobs; `cases` is which merges are run;
- `transfer`: the floor of a merge, which is a copy of files; `crew`: the threads of the yardsticks;
- `programs`, and `launch` in it: processes that are watched, mergekit and PEFT among them;
- `machine`, `cache`: what the machine is, and what lies in its page cache;
- `compare`, `table`, and `panels` as `bars` or as a `chart`: what people look at.

None of the yardsticks (the copies in memory, storage, the floor) runs any of the engine's code.
"""

PARTS = (
    *("memory", "storage", "kernels", "threads", "simd", "merge", "sweep"),
    *("digests", "tensors", "fuse"),
)
"""What can be measured, in the order that people see."""
USUAL = PARTS[: PARTS.index("sweep")]
"""What is measured unless other parts are named; the rest takes longer."""
