"""What the HTTP side is told: where it listens, whom it lets in, and how much it takes."""

from __future__ import annotations

from dataclasses import dataclass

from moeless_opt.problems.arrays import number, whole
from moeless_opt.problems.errors import ProblemError

__all__ = ["HttpOptions"]


TIMES = ("head_timeout", "body_timeout", "write_timeout", "request_timeout", "drain_timeout")
LONGEST = 1e6
"""Seconds that the clocks of operating systems and event loops can count."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HttpOptions:
    """Options of the HTTP side.

    Parameters
    ----------
    host, port : str, int
        Where to listen; port 0: any that is free.
    api_keys : tuple of str
        Keys that open ``/v1``, by ``Authorization: Bearer``; none: open to all who reach it.
    admin_keys : tuple of str
        Keys that plans and settings can be changed with; none: those of `api_keys`.
    allowed_hosts : tuple of str
        Names by which the server may be called besides its own; ``"*"``: any. On a loopback address without
        keys other names are refused, so that no page of another site can reach it through a browser.
    max_body : int
        Most bytes of a request's body.
    max_choices : int
        Most answers that one request may ask for (prompts times ``n``).
    max_connections : int
        Most connections; beyond, requests get a 503, and beyond twice that they are closed.
    head_timeout, body_timeout, write_timeout, request_timeout : float
        Seconds for a request's head to arrive, for its body, for a client to read on that reads nothing, and
        for the whole of it.
    idle_connection : float
        Seconds for which an idle connection is kept.
    drain_timeout : float
        Seconds that accepted requests have after SIGTERM.
    access_log : bool
        A line for every request on standard error.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    api_keys: tuple[str, ...] = ()
    admin_keys: tuple[str, ...] = ()
    allowed_hosts: tuple[str, ...] = ()
    max_body: int = 1 << 20
    max_choices: int = 64
    max_connections: int = 1024
    head_timeout: float = 10.0
    body_timeout: float = 30.0
    write_timeout: float = 30.0
    request_timeout: float = 600.0
    idle_connection: float = 15.0
    drain_timeout: float = 60.0
    access_log: bool = False

    def __post_init__(self) -> None:
        put = object.__setattr__
        if not self.host or not self.host.isprintable() or " " in self.host:
            raise ProblemError("host", f"is {self.host!r}, must be an address or a name")
        put(self, "port", whole("port", self.port, high=65535))
        for name in ("api_keys", "admin_keys"):
            keys = tuple(getattr(self, name))
            if not all(isinstance(key, str) and key and key.isascii() and key.isprintable() for key in keys):
                raise ProblemError(name, "must be printable ASCII texts of at least one character")
            if any(key != key.strip() for key in keys):
                raise ProblemError(name, "must not begin or end with a space, which headers do not carry")
            put(self, name, keys)
        put(self, "allowed_hosts", tuple(self.allowed_hosts))
        if not all(name and name.isprintable() and " " not in name for name in self.allowed_hosts):
            raise ProblemError("allowed_hosts", "must be names of hosts, or *")
        for name in ("max_body", "max_choices", "max_connections"):
            put(self, name, whole(name, getattr(self, name), low=1, high=2**40))
        for name in TIMES:
            seconds = number(name, getattr(self, name))
            if seconds == 0:
                raise ProblemError(name, "is 0, must be above 0 seconds")
            put(self, name, seconds)
        put(self, "idle_connection", number("idle_connection", self.idle_connection))
        for name in (*TIMES, "idle_connection"):
            if getattr(self, name) > LONGEST:
                raise ProblemError(name, f"is {getattr(self, name):g}, must be at most {LONGEST:g} seconds")

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine can reach the address."""
        return self.host in ("localhost", "::1") or self.host.startswith("127.")
