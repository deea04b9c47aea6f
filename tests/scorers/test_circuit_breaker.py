"""The states of the circuit breaker, on a fake clock. How clients use it: `tests/guarantees/test_fault_table.py`."""

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


def refused(circuit):
    """Whether a request is refused without being sent."""
    try:
        with circuit.request("here"):
            return False
    except ServerUnreachable as error:
        return "here is not asked" in str(error)


def opened(circuit):
    for _ in range(3):
        fail(circuit)


def test_it_opens_after_failures_in_a_row_and_says_the_last_one(circuit):
    fail(circuit)
    fail(circuit)
    assert not refused(circuit)  # an answer between them: they are no row
    opened(circuit)
    with (
        pytest.raises(ServerUnreachable, match=r"3 requests failed.*in 5\.0 s.*no answer"),
        circuit.request("here"),
    ):
        raise AssertionError("it was sent")


def test_a_refusal_is_an_answer_and_who_gives_up_tells_nothing(circuit):
    fail(circuit)
    fail(circuit)
    with pytest.raises(asyncio.CancelledError), circuit.request("here"):
        raise asyncio.CancelledError
    fail(circuit)
    assert refused(circuit)
    other = Circuit(failed_requests=1)
    with pytest.raises(ServerError), other.request("here"):
        raise ServerError("400")
    assert not refused(other)


def test_one_probe_goes_out_after_the_pause_and_its_answer_closes_the_circuit(circuit, clock):
    opened(circuit)
    clock.now += 4.9
    assert refused(circuit)
    clock.now += 0.2
    with circuit.request("here"):
        assert refused(circuit)  # the others wait for the probe
    assert not refused(circuit)


def test_a_probe_that_fails_opens_it_anew(circuit, clock):
    opened(circuit)
    clock.now += 6
    fail(circuit)
    assert refused(circuit)
    clock.now += 6
    assert not refused(circuit)


def test_a_probe_that_is_given_up_leaves_the_place_to_another(circuit, clock):
    opened(circuit)
    clock.now += 6
    with pytest.raises(KeyboardInterrupt), circuit.request("here"):
        raise KeyboardInterrupt
    assert not refused(circuit)


def test_an_answer_that_says_that_the_server_is_gone_is_a_failure(circuit):
    for _ in range(3):
        with circuit.request("here") as request:
            request.failure = "it answered 503."
    assert refused(circuit)


def test_of_many_threads_one_is_the_probe(circuit, clock):
    opened(circuit)
    clock.now += 6
    start, sent, refusals = threading.Barrier(16), [], []

    def ask():
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
    threads = [threading.Thread(target=ask) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(sent), len(refusals)) == (1, 15)
    assert not refused(circuit)
