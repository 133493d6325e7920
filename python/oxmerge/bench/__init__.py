"""Measures this machine and the engine on it, for `oxmerge bench`.

- `run`: one go, every part that is asked for; `measure`: jobs, run in interleaved rounds; `record`:
  what came out, as data with a schema;
- `memory`, `storage`, `kernels`, `merges`: the jobs; `floor` and `others` are what a merge is held
  against, `cases` which merge of each method is run;
- `crew`: the threads of the yardsticks; `process`, and `launch` in it: programs that are watched;
- `machine`, `cache`: what the machine is, and what lies in its page cache;
- `compare`, `table`, and `panels` as `bars` or as a `chart`: what people look at.

None of the yardsticks (the copy, storage, the floor) runs any of the engine's code.
"""

PARTS = ("memory", "storage", "kernels", "threads", "simd", "merge")
"""What is measured, in the order that people see."""
