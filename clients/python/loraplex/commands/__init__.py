"""The subcommands of `loraplex`, one module each: `add_parser` declares it, `run` does it and returns the exit code."""
