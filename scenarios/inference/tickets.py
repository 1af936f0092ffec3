"""What the coordinator remembers of requests and replicas."""

from dataclasses import dataclass, field
from typing import Any

from scenarios.inference.request import Request


@dataclass(eq=False)
class Replica:
    """One replica that has registered."""

    index: int
    identity: bytes
    heard_s: float
    status: dict[str, Any] = field(default_factory=lambda: {"state": ""})
    pending: dict[str, "Ticket"] = field(default_factory=dict)
    num_done: int = 0
    dropped: set[str] = field(default_factory=set)
    """Tickets that it was told to forget and may still tell about."""


@dataclass(eq=False)
class Ticket:
    """One request of one client."""

    number: str
    client: bytes
    request: Request
    stream: bool
    replica: Replica | None = None
    retried: bool = False
    num_sent: int = 0
    """Tokens that the client has been told."""
    tokens: list[int] = field(default_factory=list)
    log_probs: list[float] = field(default_factory=list)
    prompt_log_probs: list[float] = field(default_factory=list)
    digests: list[str] = field(default_factory=list)

    def forget_results(self) -> None:
        """Before another replica begins anew."""
        for results in (self.tokens, self.log_probs, self.prompt_log_probs, self.digests):
            results.clear()
