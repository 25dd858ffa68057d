"""`loraplex up`: every service on one machine, as children of one process."""
