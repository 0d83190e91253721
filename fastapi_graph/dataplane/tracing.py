"""Trace context, so that a span in a replica has the span of its caller as parent.

It is OpenTelemetry's, in the form of its configured propagators, W3C Trace Context by default:
https://www.w3.org/TR/trace-context/. Nothing is imported where the program does not trace.
"""

from __future__ import annotations

import sys

__all__ = ["attach_trace", "current_trace"]


def current_trace() -> str:
    """Return what another process needs to go on with the current trace; empty without one."""
    trace = sys.modules.get("opentelemetry.trace")
    if trace is None or not trace.get_current_span().get_span_context().is_valid:
        return ""
    from opentelemetry import propagate

    carrier: dict[str, str] = {}
    propagate.inject(carrier)
    return "\n".join(f"{key}: {value}" for key, value in carrier.items())


def attach_trace(text: str) -> None:
    """Go on with the trace of another process, in the current context."""
    try:
        from opentelemetry import context, propagate
    except ImportError:
        return
    carrier = dict(line.split(": ", 1) for line in text.splitlines() if ": " in line)
    context.attach(propagate.extract(carrier))
