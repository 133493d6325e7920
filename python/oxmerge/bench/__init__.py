"""Measures this machine and the engine on it, for `oxmerge bench`.

- `measure`: jobs, run in interleaved rounds; `record`: what came out, as data with a schema;
- `memory`, `storage`, `kernels`, `merges`: the jobs; `floor` and `others` are what a merge is held
  against, `cases` which merge of each method is run, `launch` how a process is watched;
- `machine`, `cache`: what the machine is, and what lies in its page cache;
- `compare`, `table`, `chart`: what people look at.

None of the yardsticks (the copy, storage, the floor) runs any of the engine's code.
"""

PARTS = ("memory", "storage", "kernels", "threads", "simd", "merge")
"""What is measured, in the order that people see."""
