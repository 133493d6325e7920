"""A small process that starts another one and tells its time and its peak memory.

The kernel counts what a process had resident before it became another program, so a program started
from a large process seems to be large itself. This one is small. It is run as a file, imports none
of the package, and prints a line of JSON.

    python -I -S launch.py REPORT COMMAND ...
"""

import json
import os
import sys
import time


def main() -> None:
    """Run the command and write how it went to the file REPORT."""
    report, *command = sys.argv[1:]
    started = time.perf_counter()
    process = os.posix_spawnp(command[0], command, os.environ)
    _, status, usage = os.wait4(process, 0)
    seconds = time.perf_counter() - started
    with open(report, "w", encoding="utf-8") as file:
        json.dump(
            {
                "code": os.waitstatus_to_exitcode(status),
                "seconds": seconds,
                "peak_memory": usage.ru_maxrss << 10,
            },
            file,
        )


if __name__ == "__main__":
    main()
