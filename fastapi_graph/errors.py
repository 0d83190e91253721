"""Every public exception of fastapi_graph.

```
GraphError
├── GraphDefinitionError (ValueError)  the graph is wrong; raised before anything runs
│   ├── OptionError                    a deployment option has a bad value
│   └── UnknownMethodError (AttributeError)  a bound class lacks the method
├── SettingsError (ValueError)         a setting or an environment variable has a bad value
├── MissingExtraError (ImportError)    an optional dependency is not installed
├── BackendError                       the backend cannot do what was asked
│   ├── GraphNotStartedError           used before start or after stop
│   ├── GraphStoppingError             a new request while the graph drains
│   ├── DeploymentStartError           a constructor, reconfigure or health check failed
│   ├── GraphNameTakenError            the name belongs to another owner's running graph
│   └── VersionSupersededError         a newer version of the graph has taken its place
├── WireError                          the data plane between processes
│   ├── LocalProtocolError             we would have broken the protocol
│   └── RemoteProtocolError            the peer broke the protocol
└── ExecutionError                     one request failed, and not by the user's own exception
    ├── InputError (ValueError)        the caller's input lacks what the graph reads
    ├── OutputError                    a node's output lacks what the graph or a batch reads
    ├── BackPressureError              over max_ongoing_requests and max_queued_requests
    │   └── NoReplicaError             no replica was there to take the call
    ├── ReplicaLostError               the replica was lost, and no retry was left
    ├── DeadlineExceededError (TimeoutError)  past the request's deadline
    ├── ResponseTimeoutError (TimeoutError)   ``result(timeout_s)`` waited long enough
    ├── DeadlockError (RuntimeError)   waiting here would block the loop that computes
    ├── SerializationError (TypeError) an argument or a result cannot be serialised
    └── NodeError                      what a node raised and cannot be passed on
```

An exception that user code raises is not in this tree: it reaches the caller as it is,
with a note that names the node. `asyncio.CancelledError` is never wrapped.
"""

from __future__ import annotations

__all__ = [
    "BackPressureError",
    "BackendError",
    "DeadlineExceededError",
    "DeadlockError",
    "DeploymentStartError",
    "ExecutionError",
    "GraphDefinitionError",
    "GraphError",
    "GraphNameTakenError",
    "GraphNotStartedError",
    "GraphStoppingError",
    "InputError",
    "LocalProtocolError",
    "MissingExtraError",
    "NoReplicaError",
    "NodeError",
    "OptionError",
    "OutputError",
    "RemoteProtocolError",
    "ReplicaLostError",
    "ResponseTimeoutError",
    "SerializationError",
    "SettingsError",
    "UnknownMethodError",
    "VersionSupersededError",
    "WireError",
]


class GraphError(Exception):
    """The root of every exception that fastapi_graph raises itself."""


class GraphDefinitionError(GraphError, ValueError):
    """The graph is wrong: raised while it is bound or built, before anything runs."""


class OptionError(GraphDefinitionError):
    """A deployment option is unknown or has a value that cannot work."""


class UnknownMethodError(GraphDefinitionError, AttributeError):
    """A bound class lacks the method; also an AttributeError, so that `hasattr` works."""


class SettingsError(GraphError, ValueError):
    """A setting, given by keyword or by environment variable, cannot work."""


class MissingExtraError(GraphError, ImportError):
    """An optional dependency is not installed; the message has the command that installs it."""


class BackendError(GraphError):
    """The backend cannot do what was asked of it."""


class GraphNotStartedError(BackendError):
    """The graph was used before it was started, or after it was stopped."""


class GraphStoppingError(BackendError):
    """A new request came while the graph drains the requests in flight (503 over HTTP)."""


class DeploymentStartError(BackendError):
    """A deployment could not start; the user's own exception is the cause."""


class GraphNameTakenError(BackendError):
    """A graph of this name runs already, and it belongs to another owner."""


class VersionSupersededError(BackendError):
    """A newer version of the graph has taken the place of this one, which is stopped."""


class WireError(GraphError):
    """Something went wrong between two processes, and not in the user's code."""


class LocalProtocolError(WireError):
    """This side would have broken the protocol, for example with a message that is too long."""


class RemoteProtocolError(WireError):
    """The peer broke the protocol; the connection to it is closed."""


class ExecutionError(GraphError):
    """One request failed for a reason other than an exception of user code."""


class InputError(ExecutionError, ValueError):
    """The input lacks an index, key or attribute that the graph reads (422 over HTTP).

    Args:
        message: What is missing, and where it was bound.
        path: The way from the whole input to what is missing, outermost first.
        reason: What is missing, in words for the caller, who does not know the code.
        input: The input that lacks it.
    """

    def __init__(
        self,
        message: str,
        path: tuple[str | int, ...] = (),
        reason: str | None = None,
        input: object = None,  # noqa: A002 - the word of the whole interface
    ) -> None:
        super().__init__(message)
        self.input = input
        self.path = path
        self.reason = reason or message


class OutputError(ExecutionError):
    """A node's output lacks an index, key or attribute that the graph reads (500 over HTTP).

    Also: a batch did not give one result for each of its inputs.
    """


class BackPressureError(ExecutionError):
    """A deployment is over its limits (503 over HTTP). The name is Ray Serve's.

    Args:
        message: Which deployment, and which limit.
        retry_after_s: Seconds after which a retry makes sense.
    """

    def __init__(self, message: str, retry_after_s: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class NoReplicaError(BackPressureError):
    """No replica was there within `replica_wait_s` to take the call (503 over HTTP)."""


class ReplicaLostError(ExecutionError):
    """The replica was lost while it worked on the call, and `max_retries` was used up."""


class DeadlineExceededError(ExecutionError, TimeoutError):
    """The request did not finish before its deadline (504 over HTTP)."""


class ResponseTimeoutError(ExecutionError, TimeoutError):
    """``response.result(timeout_s=...)`` waited that long; the call itself goes on."""


class DeadlockError(ExecutionError, RuntimeError):
    """A synchronous wait would block the very event loop that computes the result."""


class SerializationError(ExecutionError, TypeError):
    """An argument or a result cannot be pickled or unpickled; the message names the node."""


class NodeError(ExecutionError):
    """Stands for what a node raised and its caller cannot get.

    The type cannot be rebuilt on this side, or it is no `Exception`: `SystemExit`, for example.
    """
