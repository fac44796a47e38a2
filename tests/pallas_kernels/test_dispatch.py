"""`implementation=`: which implementation runs, and what is said when one cannot."""

import logging

import pytest

from pallas_kernels import dispatch as dispatch_module
from pallas_kernels.dispatch import dispatch


def refusing(reason):
    def implementation(x):
        raise NotImplementedError(reason)

    return implementation


def broken(x):
    raise ZeroDivisionError("a bug, not a refusal")


IMPLEMENTATIONS = {
    "fast": refusing("needs a newer device"),
    "faster": refusing("needs head_dim 128"),
    "reference": lambda x: ("reference", x),
    "other": lambda x: ("other", x),
}


@pytest.fixture(autouse=True)
def nothing_reported_yet(monkeypatch):
    monkeypatch.setattr(dispatch_module, "_reported", set())


def run(implementation, implementations=IMPLEMENTATIONS, op="op"):
    return dispatch(op, implementations, implementation)(7)


@pytest.mark.fast
def test_none_takes_the_first_that_can():
    assert run(None) == ("reference", 7)
    assert run(None, {"other": IMPLEMENTATIONS["other"]} | IMPLEMENTATIONS) == ("other", 7)


def test_a_name_takes_that_one_or_fails_with_its_reason():
    assert run("other") == ("other", 7)
    with pytest.raises(NotImplementedError, match="needs a newer device"):
        run("fast")


def test_a_sequence_takes_the_first_that_can_in_its_own_order():
    assert run(("other", "reference")) == ("other", 7)
    assert run(["faster", "other", "reference"]) == ("other", 7)
    with pytest.raises(NotImplementedError, match="needs head_dim 128"):
        run(("faster",))


@pytest.mark.parametrize("implementation", [("fast", "faster"), None])
def test_when_all_refuse_every_reason_is_told(implementation):
    refusing_only = {name: IMPLEMENTATIONS[name] for name in ("fast", "faster")}
    with pytest.raises(ExceptionGroup, match="no implementation of op can serve") as group:
        run(implementation, refusing_only)
    told = [(str(e), e.__notes__) for e in group.value.exceptions]
    assert told == [
        ("needs a newer device", ["op: implementation 'fast'"]),
        ("needs head_dim 128", ["op: implementation 'faster'"]),
    ]
    assert all(isinstance(e, NotImplementedError) for e in group.value.exceptions)


@pytest.mark.parametrize("implementation", ["triton", ("reference", "triton"), ()])
def test_an_unknown_name_is_told_the_known_ones(implementation):
    with pytest.raises(ValueError, match="choose from fast, faster, reference, other") as error:
        run(implementation)
    assert str(error.value).startswith("op has no implementation")
    assert ("triton" in str(error.value)) == bool(implementation)


def test_only_a_refusal_falls_back():
    with pytest.raises(ZeroDivisionError):
        run(None, {"broken": broken} | IMPLEMENTATIONS)


def test_what_a_default_call_runs_as_is_logged_once_per_op_and_reasons(caplog):
    caplog.set_level(logging.INFO, "pallas_kernels")
    for _ in range(3):
        run(None)
    choice = "runs as 'reference'; needs a newer device; needs head_dim 128"
    assert caplog.messages == [f"op {choice}"]
    caplog.clear()
    run(None, op="other_op")
    run(None, {"other": IMPLEMENTATIONS["other"]})
    assert caplog.messages == [f"other_op {choice}", "op runs as 'other'"]


def test_what_was_asked_for_is_not_logged(caplog):
    caplog.set_level(logging.INFO, "pallas_kernels")
    run("reference")
    run(("fast", "reference"))
    assert caplog.messages == []
