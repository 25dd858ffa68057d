"""Why `loraplex up` cannot do its work. One line for people each; exit code 1."""

from __future__ import annotations


class LauncherError(Exception):
    """Root of the launcher's errors; its text is one line for people."""


class CannotStart(LauncherError):
    """Raised when something that `loraplex up` needs is missing, taken or malformed."""


class GaveUp(LauncherError):
    """Raised when a service keeps dying."""


class IllegalTransition(LauncherError):
    """Raised when a service is told something that cannot happen in its state; nothing has changed."""
