"""Limits of a server: parsing them from the environment, and counting queries."""

import pytest

from llama_index_genret.errors import ServerError
from llama_index_genret.serving.endpoint.limits import Admission, Limits, TooBusy


def test_limits_override_the_defaults():
    assert Limits.from_text("") == Limits()
    assert Limits.from_text(" queries=7\nrecall_s=3 ") == Limits(queries=7, recall_s=3)


@pytest.mark.parametrize(
    "text", ["queris=7", "queries", "queries=", "queries=0", "queries=-1", "body_mib=1.5", "=3", "stop_s=3"]
)
def test_invalid_limit_is_refused(text):
    with pytest.raises(ServerError, match=r"positive whole numbers.*recall_s"):
        Limits.from_text(f"body_mib=2 {text}")


def test_queries_beyond_the_limit_are_refused_until_others_end():
    admission = Admission(Limits(queries=10))
    with admission.of(6):
        with admission.of(4), pytest.raises(TooBusy, match=r"10 queries .* 10 at once"), admission.of(1):
            pass
        with pytest.raises(KeyError), admission.of(4):
            raise KeyError
        with admission.of(4):
            pass
    with admission.of(256):  # a single request may exceed the limit
        pass
