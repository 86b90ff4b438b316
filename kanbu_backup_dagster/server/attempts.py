"""Failed logins, counted per client, so that guessing is slow.

What belongs here: how long a client waits after failures. What does not: what a login is (`access`, `trigger`).
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from ipaddress import IPv6Address, ip_address


@dataclass
class _Record:
    failures: int
    last: float
    closed_until: float


class FailedAttempts:
    """Counts failures; after a few free ones, each closes the door to that client for twice as long as the one before.

    Memory is bounded: the clients that failed longest ago are forgotten first.

    Args:
        free: Failures without consequence: people mistype.
        longest_wait: Seconds the door stays closed at most.
        forget_after: Seconds without a failure after which a client starts anew.
        capacity: Clients remembered.
        clock: Monotonic seconds.
    """

    def __init__(
        self,
        *,
        free: int = 5,
        longest_wait: float = 60,
        forget_after: float = 900,
        capacity: int = 4096,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._free, self._longest, self._forget, self._capacity = free, longest_wait, forget_after, capacity
        self._clock = clock
        self._records: OrderedDict[str, _Record] = OrderedDict()

    def __len__(self) -> int:
        return len(self._records)

    def wait(self, client: str) -> float:
        """Seconds until `client` may try again; 0 when it may now."""
        record = self._records.get(_network(client))
        return max(0.0, record.closed_until - self._clock()) if record else 0.0

    def failed(self, client: str) -> None:
        """`client` has tried and failed."""
        key, now = _network(client), self._clock()
        record = self._records.pop(key, None)
        failures = record.failures + 1 if record and now - record.last < self._forget else 1
        # The exponent is bounded before it is used: the count is not.
        beyond = min(failures - self._free, 30)
        closed = min(self._longest, 2.0 ** (beyond - 1)) if beyond > 0 else 0.0
        self._records[key] = _Record(failures, now, now + closed)
        if len(self._records) > self._capacity:
            self._records.popitem(last=False)

    def succeeded(self, client: str) -> None:
        """`client` has logged in."""
        self._records.pop(_network(client), None)


def _network(client: str) -> str:
    """What one party can be taken to hold: an IPv4 address, or an IPv6 network of 64 bits."""
    try:
        address = ip_address(client.partition("%")[0])
    except ValueError:
        return client
    if not isinstance(address, IPv6Address):
        return str(address)
    return str(address.ipv4_mapped or int(address) >> 64)
