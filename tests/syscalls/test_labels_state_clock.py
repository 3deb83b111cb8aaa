from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from llmos.kernel.core.labels import refusal
from llmos.kernel.dispatch import FAMILIES
from llmos.kernel.manifest import SYSCALLS
from llmos.syscalls.base import HANDLERS, Request, Response
from llmos.syscalls.clock import Now, Random, Sleep
from llmos.syscalls.labels import Labels, Provenance, Sensitivity, join
from llmos.syscalls.state import ReadState
from tests.syscalls.fakes import CALLER, FakeServices

LABELS = st.builds(
    Labels,
    tenants=st.frozensets(st.sampled_from(["acme", "globex", "initech"])),
    sensitivity=st.sampled_from(Sensitivity),
    trusted=st.booleans(),
)


@given(LABELS, LABELS, LABELS)
def test_joining_is_a_semilattice(a: Labels, b: Labels, c: Labels) -> None:
    assert a.join(b) == b.join(a)
    assert a.join(b).join(c) == a.join(b.join(c)) == a.join(b, c) == join([c, b, a])
    assert a.join(a) == a
    assert a.join(Labels()) == a == a.join() == Labels().join(a)


@given(LABELS, LABELS)
def test_a_join_is_no_less_secret_and_no_more_trusted(a: Labels, b: Labels) -> None:
    both = a.join(b)
    assert both.tenants >= a.tenants
    assert both.sensitivity >= a.sensitivity
    assert both.trusted <= a.trusted


@given(LABELS, LABELS)
def test_a_flow_that_is_refused_stays_refused_with_more_labels(a: Labels, b: Labels) -> None:
    if refusal(a, "acme", "globex") is not None:
        assert refusal(a.join(b), "acme", "globex") is not None
    assert refusal(a, "acme", "acme") is None


def test_nothing_joined_is_the_bottom() -> None:
    assert join([]) == Labels()


def test_provenance_reads_like_a_citation() -> None:
    assert str(Provenance(kind="model", source="chat", version="0123456789")) == "chat@01234567"
    assert str(Provenance(kind="agent", source="a/b/c")) == "a/b/c"


# ------------------------------------------------------------------ state and clock


async def call(request: Request[Any], services: FakeServices) -> Any:
    response = await HANDLERS[type(request)](request, CALLER, services)
    assert isinstance(response, Response)
    return response


async def test_the_state_of_another_agent_is_its_tenants_and_internal() -> None:
    services = FakeServices()
    services.states["globex/desk/main"] = {"total": 3}
    read = await call(ReadState(agent="globex/desk/main"), services)
    assert read.state == {"total": 3}
    assert read.labels == Labels(tenants=frozenset({"globex"}), sensitivity=Sensitivity.INTERNAL)
    assert read.provenance == (Provenance(kind="agent", source="globex/desk/main"),)


async def test_time_and_chance_come_from_the_services() -> None:
    services = FakeServices()
    assert (await call(Now(), services)).time_s == 1_700_000_000.5
    assert (await call(Random(), services)).value == 0.25
    await call(Sleep(seconds=2.5), services)
    assert services.slept == [2.5]


@pytest.mark.parametrize("seconds", [-1, 3601, float("nan"), float("inf")])
def test_a_sleep_has_bounds(seconds: float) -> None:
    with pytest.raises(ValidationError):
        Sleep(seconds=seconds)


# ------------------------------------------------------------------ the families


def every_request() -> list[type[Request[Any]]]:
    return [
        c
        for family in FAMILIES
        for c in vars(family).values()
        if isinstance(c, type)
        and issubclass(c, Request)
        and c.__module__ == family.__name__
        and "[" not in c.__name__
    ]


@pytest.mark.parametrize("request_class", every_request(), ids=lambda c: c.__name__)
def test_every_request_has_a_handler_and_a_name_for_capabilities(
    request_class: type[Request[Any]],
) -> None:
    assert request_class in HANDLERS
    assert request_class.syscall in SYSCALLS
    assert request_class.__doc__


def test_every_name_of_a_capability_has_a_request() -> None:
    assert {r.syscall for r in every_request()} == SYSCALLS


def test_requests_are_frozen() -> None:
    request = ReadState(agent="a/b/c")
    with pytest.raises(ValidationError):
        request.agent = "x/y/z"  # type: ignore[misc]
