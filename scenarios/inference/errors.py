"""How a request to the service can end badly."""


class InferenceError(RuntimeError):
    """A request or command that failed; ``kind`` is how it is called in messages."""

    kind = "error"


class Refused(InferenceError):
    """The caller's mistake: a bad message or request, or a command that the state forbids."""

    kind = "refused"


class RequestFailed(InferenceError):
    """The model gave values that are not finite."""

    kind = "failed"


class ReplicaLost(InferenceError):
    """The replica that worked on it was lost, and so was the one that tried again, or none is."""

    kind = "replica lost"


class Stopped(InferenceError):
    """The service was stopped before the request was done."""

    kind = "stopped"


class CoordinatorLost(InferenceError):
    """The coordinator has gone, or nobody listens there."""

    kind = "coordinator lost"


class RequestTimeout(InferenceError):
    """The deadline has passed; the service was told to forget the request."""

    kind = "timeout"


BY_KIND: dict[str, type[InferenceError]] = {
    error.kind: error for error in (Refused, RequestFailed, ReplicaLost, Stopped)
}
"""What the coordinator can answer."""
