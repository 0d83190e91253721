"""Exceptions that cross Ray between the processes of a graph; no user sees them.

Ray rebuilds an exception from its `args`, so all that one of these carries is in there.
"""

from __future__ import annotations

__all__ = ["ControllerExitingError", "StartFailed"]


class StartFailed(Exception):
    """A replica could not construct the user's object.

    Args:
        reason: What failed, in words that name the deployment and where it was bound.
        error: The user's exception, encoded where it was raised; empty if there is none.
    """

    def __init__(self, reason: str, error: bytes = b"") -> None:
        super().__init__(reason, error)
        self.reason = reason
        self.error = error

    def __str__(self) -> str:
        return self.reason


class ControllerExitingError(Exception):
    """The controller has nothing left to do and exits: attach to a new one."""
