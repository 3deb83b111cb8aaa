"""timer, publish, subscribe and monitor: what is left to the commit."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from pydantic import ValidationError

from llmos.syscalls.base import HANDLERS, Request, Response
from llmos.syscalls.deferred import NoTimer, Post, Subscription, Timer, Watch
from llmos.syscalls.errors import InvalidRequest, UnknownAgent
from llmos.syscalls.exits import Demonitor, Exited, Link, Monitor
from llmos.syscalls.messages import Message, Wire
from llmos.syscalls.timers import MAX_AHEAD_S, CancelTimer, SetTimer
from llmos.syscalls.topics import MAX_SUBSCRIBERS, Publish, Subscribe, Unsubscribe
from tests.syscalls.fakes import CALLER, SECRET, FakeServices

NOW = 1_700_000_000.5
SEEN = replace(CALLER, labels=SECRET)


class Nudge(Message):
    text: str = ""


NUDGE = Wire.of(Nudge(text="now"))


@pytest.fixture
def services() -> FakeServices:
    return FakeServices()


async def call(request: Request[Any], services: FakeServices, caller: Any = CALLER) -> Any:
    assert request.reach == "deferred"
    response = await HANDLERS[type(request)](request, caller, services)
    assert isinstance(response, Response)
    return response


# ------------------------------------------------------------------ timers


@pytest.mark.parametrize(
    ("when", "due", "cron"),
    [
        ({"after_s": 90.0}, NOW + 90, ""),
        ({"after_s": 0}, NOW, ""),
        ({"at": NOW + 5}, NOW + 5, ""),
        ({"at": 3.0}, 3.0, ""),
        ({"cron": "* * * * *", "tz": "Europe/Berlin"}, 1_700_000_040.0, "* * * * *"),
    ],
)
async def test_a_timer_has_an_absolute_time(
    services: FakeServices, when: dict[str, Any], due: float, cron: str
) -> None:
    made = await call(SetTimer(name="wake up", message=NUDGE, **when), services, SEEN)
    assert made.due == due
    zone = when.get("tz", "UTC")
    assert services.deferred == [Timer("wake up", due, NUDGE, SECRET, cron, zone)]


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"after_s": 1, "at": 2},
        {"after_s": 1, "at": 2, "cron": "* * * * *"},
        {"after_s": -1},
        {"after_s": MAX_AHEAD_S + 1},
        {"after_s": float("nan")},
        {"at": float("inf")},
        {"cron": ""},
        {"cron": "*" * 201},
        {"cron": "* * * * *", "tz": ""},
        {"after_s": 1, "name": ""},
        {"after_s": 1, "name": "x" * 101},
        {"after_s": 1, "name": "nul\0"},
        {"after_s": 1, "name": "\ud800"},
    ],
)
def test_what_is_no_time_or_name_is_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        SetTimer(**{"name": "n", "message": NUDGE, **fields})


def test_the_mistake_says_what_was_given() -> None:
    with pytest.raises(ValidationError, match=r"exactly one of .* given: after_s, at"):
        SetTimer(name="n", message=NUDGE, after_s=1, at=2)
    with pytest.raises(ValidationError, match="given: none"):
        SetTimer(name="n", message=NUDGE)


@pytest.mark.parametrize(
    ("when", "field"),
    [
        ({"at": NOW + MAX_AHEAD_S + 1}, "at"),
        ({"cron": "0 0 29 2 *"}, "cron"),
        ({"cron": "every day"}, "cron"),
        ({"cron": "* * * * *", "tz": "Mars/Olympus"}, "cron"),
    ],
)
async def test_what_is_never_due_leaves_nothing(
    services: FakeServices, when: dict[str, Any], field: str
) -> None:
    with pytest.raises(InvalidRequest) as caught:
        await call(SetTimer(name="n", message=NUDGE, **when), services)
    assert (caught.value.syscall, caught.value.field) == ("timer", field)
    assert services.deferred == []


async def test_a_timer_is_cancelled_by_its_name(services: FakeServices) -> None:
    await call(CancelTimer(name="n"), services)
    assert services.deferred == [NoTimer("n")]


# ------------------------------------------------------------------ topics


async def test_subscriptions_are_of_the_tenants_topic(services: FakeServices) -> None:
    await call(Subscribe(topic="news"), services)
    await call(Unsubscribe(topic="news"), services)
    assert services.deferred == [Subscription("acme/news", True), Subscription("acme/news", False)]
    assert Subscribe(topic="news").resource == Unsubscribe(topic="news").resource == "news"


async def test_a_publication_reaches_all_but_the_publisher(services: FakeServices) -> None:
    services.topics = {
        "acme/news": ["acme/a/1", CALLER.agent, "acme/b/2"],
        "globex/news": ["globex/c/3"],
    }
    made = await call(Publish(topic="news", message=NUDGE, priority=7), services, SEEN)
    assert made.receivers == 2
    assert services.deferred == [
        Post(agent, NUDGE, "turn-1/3", 7, SECRET) for agent in ("acme/a/1", "acme/b/2")
    ]
    assert (await call(Publish(topic="silence", message=NUDGE), services)).receivers == 0


async def test_a_publication_has_a_bound_and_is_sent_to_all_or_none(services: FakeServices) -> None:
    services.topics["acme/news"] = [f"acme/a/{n}" for n in range(MAX_SUBSCRIBERS + 1)]
    with pytest.raises(InvalidRequest, match="10001 subscribers"):
        await call(Publish(topic="news", message=NUDGE), services)
    assert services.deferred == []
    # The publisher itself is not one of them.
    services.topics["acme/news"][0] = CALLER.agent
    made = await call(Publish(topic="news", message=NUDGE), services)
    assert made.receivers == len(services.deferred) == MAX_SUBSCRIBERS


@pytest.mark.parametrize("topic", ["", "News", "a/b", "-x", "x" * 64, "a\n", "ä", "a\0"])
def test_a_topic_is_a_name(topic: str) -> None:
    for request in (Subscribe, Unsubscribe):
        with pytest.raises(ValidationError):
            request(topic=topic)
    with pytest.raises(ValidationError):
        Publish(topic=topic, message=NUDGE)


# ------------------------------------------------------------------ exits


async def test_watches_are_left_to_the_commit(services: FakeServices) -> None:
    for request in (Monitor, Link, Demonitor):
        await call(request(agent="acme/clerk/7"), services)
        assert request(agent="acme/clerk/7").resource == "acme/clerk/7"
    assert services.deferred == [
        Watch("acme/clerk/7", True),
        Watch("acme/clerk/7", True, linked=True),
        Watch("acme/clerk/7", False),
    ]


@pytest.mark.parametrize(
    "agent", ["globex/clerk/7", "acme/clerk", "clerk", "acme//7", "acme/clerk/7/8", "", "acme/x/"]
)
@pytest.mark.parametrize("request_class", [Monitor, Link, Demonitor])
async def test_agents_of_others_are_not_there(
    services: FakeServices, request_class: Any, agent: str
) -> None:
    with pytest.raises(UnknownAgent):
        await call(request_class(agent=agent), services)
    assert services.deferred == []


async def test_nobody_watches_itself(services: FakeServices) -> None:
    with pytest.raises(InvalidRequest, match="itself"):
        await call(Link(agent=CALLER.agent), services)
    assert services.deferred == []


def test_what_watchers_are_told_is_a_message() -> None:
    told = Exited(agent="acme/clerk/7", reason="killed")
    assert Wire.of(told).message() == told
    assert Exited.kind() == "Exited"
