"""python -m launcher: the same as `loraplex up`."""

import sys

from launcher.up import main

sys.exit(main(sys.argv[1:]))
