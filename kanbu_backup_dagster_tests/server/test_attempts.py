"""Failed logins per client, on a clock of the test's own."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from kanbu_backup_dagster.server.attempts import FailedAttempts


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_the_wait_doubles_after_the_free_failures_up_to_a_limit() -> None:
    clock = Clock()
    attempts = FailedAttempts(free=3, longest_wait=10, clock=clock)
    waits = []
    for _ in range(10):
        attempts.failed("192.0.2.1")
        waits.append(attempts.wait("192.0.2.1"))
    assert waits == [0, 0, 0, 1, 2, 4, 8, 10, 10, 10]
    assert attempts.wait("192.0.2.2") == 0
    clock.now += 10
    assert attempts.wait("192.0.2.1") == 0


def test_success_and_time_forgive() -> None:
    clock = Clock()
    attempts = FailedAttempts(free=1, forget_after=100, clock=clock)
    for _ in range(5):
        attempts.failed("a")
        attempts.failed("b")
    attempts.succeeded("a")
    assert attempts.wait("a") == 0
    clock.now += 101
    attempts.failed("b")
    assert attempts.wait("b") == 0


def test_a_network_of_ipv6_addresses_is_one_client() -> None:
    attempts = FailedAttempts(free=1)
    for number in range(8):
        attempts.failed(f"2001:db8:0:1::{number}")
    assert attempts.wait("2001:db8:0:1:ffff::1") > 0
    assert attempts.wait("2001:db8:0:2::1") == 0
    attempts.failed("::ffff:192.0.2.9")
    attempts.failed("192.0.2.9")
    assert attempts.wait("::ffff:192.0.2.9") > 0


@given(st.lists(st.ip_addresses().map(str) | st.text(max_size=8), max_size=60))
def test_memory_is_bounded_whoever_comes(clients: list[str]) -> None:
    attempts = FailedAttempts(capacity=8)
    for client in clients:
        attempts.failed(client)
        assert attempts.wait(client) >= 0
        assert len(attempts) <= 8


def test_a_million_failures_do_not_overflow() -> None:
    attempts = FailedAttempts(free=0, longest_wait=60, clock=Clock())
    for _ in range(5000):
        attempts.failed("a")
    assert attempts.wait("a") == 60
