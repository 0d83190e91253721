"""Log records that say which request, and which node, they belong to."""

from __future__ import annotations

import json
import logging
import time
from typing import Literal

from fastapi_graph.context import current_call
from fastapi_graph.request import current_request

__all__ = ["JsonFormatter", "RequestLogFilter", "log_to_stderr"]

_TEXT = "%(asctime)s %(levelname)s %(name)s [%(request_id)s %(node)s] %(message)s"


class RequestLogFilter(logging.Filter):
    """Gives every record a `request_id`, a `node` and a `replica`; empty where there is none.

    Add it to a handler, so that it sees the records of every logger:

    ```
    handler.addFilter(RequestLogFilter())
    handler.setFormatter(logging.Formatter("%(levelname)s [%(request_id)s %(node)s] %(message)s"))
    ```
    """

    def filter(self, record: logging.LogRecord) -> bool:
        """Add the attributes; let every record pass."""
        request, call = current_request(), current_call.get()
        host = call.host if call is not None else None
        record.request_id = request.request_id if request is not None else ""
        record.node = host.name if host is not None else ""
        record.replica = host.replica_id if host is not None else ""
        return True


class JsonFormatter(logging.Formatter):
    """One JSON object a line: time, level, logger, message, request_id, node, replica, exception.

    Records have to pass a `RequestLogFilter` first.
    """

    converter = staticmethod(time.gmtime)

    def format(self, record: logging.LogRecord) -> str:
        """Return the record as a line of JSON."""
        said = {
            "time": f"{self.formatTime(record, '%Y-%m-%dT%H:%M:%S')}.{int(record.msecs):03d}Z",
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
        }
        for name in ("request_id", "node", "replica"):
            if value := getattr(record, name, ""):
                said[name] = value
        if record.exc_info:
            said["exception"] = self.formatException(record.exc_info)
        return json.dumps(said, ensure_ascii=False, default=str)


class _Handler(logging.StreamHandler):  # type: ignore[type-arg]
    """The one that `log_to_stderr` adds."""


def log_to_stderr(form: Literal["text", "json"]) -> None:
    """Write the records of every logger of this process to stderr, once, from level INFO on.

    Args:
        form: Lines of text, or of JSON.
    """
    root = logging.getLogger()
    if any(isinstance(handler, _Handler) for handler in root.handlers):
        return
    handler = _Handler()
    handler.addFilter(RequestLogFilter())
    handler.setFormatter(JsonFormatter() if form == "json" else logging.Formatter(_TEXT))
    root.addHandler(handler)
    if root.level > logging.INFO:
        root.setLevel(logging.INFO)
