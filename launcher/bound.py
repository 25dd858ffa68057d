"""Becomes another program that ends with its parent:  python bound.py PARENT_PID SIGNAL PROGRAM ARGUMENT...

A process cannot ask this for its child, and code between fork and exec of a process with threads is a gamble; so the
child runs this first. The kernel keeps the wish over the exec. Only Linux knows it; elsewhere nothing is asked.
"""

from __future__ import annotations

import ctypes
import os
import sys

PR_SET_PDEATHSIG = 1


def main(parent: int, signal_number: int, command: list[str]) -> None:
    """Does not return."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal_number, 0, 0, 0)
        # A parent that died before the wish was made will not be noticed any more.
        if os.getppid() != parent:
            sys.exit(1)
    os.execv(command[0], command)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3:])
