"""Test the states of the circuit breaker on a fake clock; `tests/guarantees/test_fault_table.py` tests its use."""

import asyncio
import threading

import pytest

from llama_index_genret.errors import ServerError, ServerUnreachable
from llama_index_genret.scorers.circuit_breaker import Circuit


class Clock:
    now = 100.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def circuit(clock):
    return Circuit(failed_requests=3, open_s=5.0, clock=clock)


def fail(circuit):
    with pytest.raises(ServerUnreachable, match="no answer"), circuit.request("here"):
        raise ServerUnreachable("no answer")


def is_refused(circuit):
    """Return True if a request is refused without being sent."""
    try:
        with circuit.request("here"):
            return False
    except ServerUnreachable as error:
        return "no request was sent to here" in str(error)


def open_circuit(circuit):
    for _ in range(3):
        fail(circuit)


def test_failures_in_a_row_open_it_and_the_error_shows_the_last(circuit):
    fail(circuit)
    fail(circuit)
    assert not is_refused(circuit)  # a success between the failures resets the count
    open_circuit(circuit)
    with (
        pytest.raises(ServerUnreachable, match=r"3 requests failed.*in 5\.0 s.*no answer"),
        circuit.request("here"),
    ):
        raise AssertionError("it was sent")


def test_error_responses_and_cancelled_requests_do_not_open_it(circuit):
    fail(circuit)
    fail(circuit)
    with pytest.raises(asyncio.CancelledError), circuit.request("here"):
        raise asyncio.CancelledError
    fail(circuit)
    assert is_refused(circuit)
    other = Circuit(failed_requests=1)
    with pytest.raises(ServerError), other.request("here"):
        raise ServerError("400")
    assert not is_refused(other)


def test_successful_probe_after_the_pause_closes_it(circuit, clock):
    open_circuit(circuit)
    clock.now += 4.9
    assert is_refused(circuit)
    clock.now += 0.2
    with circuit.request("here"):
        assert is_refused(circuit)  # other requests fail while the probe runs
    assert not is_refused(circuit)


def test_failed_probe_opens_it_again(circuit, clock):
    open_circuit(circuit)
    clock.now += 6
    fail(circuit)
    assert is_refused(circuit)
    clock.now += 6
    assert not is_refused(circuit)


def test_cancelled_probe_allows_another_probe(circuit, clock):
    open_circuit(circuit)
    clock.now += 6
    with pytest.raises(KeyboardInterrupt), circuit.request("here"):
        raise KeyboardInterrupt
    assert not is_refused(circuit)


def test_response_that_reports_unavailability_is_a_failure(circuit):
    for _ in range(3):
        with circuit.request("here") as request:
            request.failure = "it answered 503."
    assert is_refused(circuit)


def test_one_of_many_threads_sends_the_probe(circuit, clock):
    open_circuit(circuit)
    clock.now += 6
    start, sent, refusals = threading.Barrier(16), [], []

    def send():
        start.wait()
        try:
            with circuit.request("here"):
                sent.append(1)
                until.wait(5)
        except ServerUnreachable:
            refusals.append(1)
            if len(refusals) == 15:
                until.set()

    until = threading.Event()
    threads = [threading.Thread(target=send) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(sent), len(refusals)) == (1, 15)
    assert not is_refused(circuit)
