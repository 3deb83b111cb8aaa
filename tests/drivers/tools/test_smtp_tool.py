from __future__ import annotations

import asyncio
import email
import time
from collections.abc import Callable, Iterator
from email.policy import default
from typing import Any

import pytest

from llmos.drivers.errors import ToolRefused, ToolUnavailable, ToolUncertain
from llmos.drivers.protocols import Tool
from llmos.drivers.tools.smtp import SmtpTool
from tests.drivers.tools.mail import Mailhost, mailhost
from tests.drivers.tools.tools_suite import KEY, ToolsSuite

MAIL = {"to": "ann@example.org", "subject": "Your seat", "text": "It is 7A."}


@pytest.fixture
def host() -> Iterator[Mailhost]:
    with mailhost() as made:
        yield made


def tool_of(host: Mailhost, **options: Any) -> SmtpTool:
    given = {"from": "desk@example.com", "host": "127.0.0.1", "port": host.port, "timeout_s": 5}
    return SmtpTool("booking", {**given, **options})


class TestSmtpTool(ToolsSuite):
    arguments = MAIL
    refused = {**MAIL, "to": "nobody@example.org"}  # noqa: RUF012

    @pytest.fixture
    def tool(self, host: Mailhost) -> Tool:
        return tool_of(host)

    @pytest.fixture
    def acted(self, host: Mailhost) -> Callable[[], int]:
        return lambda: len(host.mails)

    @pytest.fixture
    def away(self) -> Tool:
        with mailhost() as gone:
            return tool_of(gone)


async def test_a_mail_arrives_whole(host: Mailhost) -> None:
    text = ".hidden dot\nÜber ›alles‹\r\n.\nend"
    outcome = await tool_of(host).call({**MAIL, "subject": "Platz für Sie", "text": text}, KEY)
    ((sender, receivers, content),) = host.mails
    assert (sender, receivers) == ("desk@example.com", ["ann@example.org"])
    assert content.isascii()
    mail = email.message_from_bytes(content, policy=default)
    assert mail["Subject"] == "Platz für Sie"
    assert (mail["From"], mail["To"]) == ("desk@example.com", "ann@example.org")
    assert mail["Message-ID"] == outcome.reference == "<0f3c9a.7@example.com>"
    assert mail["Date"]
    assert mail.get_content().replace("\r\n", "\n") == text.replace("\r\n", "\n") + "\n"
    assert outcome.output == {"message_id": outcome.reference}


async def test_all_receivers_get_it_or_none(host: Mailhost) -> None:
    await tool_of(host).call({**MAIL, "to": ["a@example.org", "b@example.org"]}, "t/1")
    with pytest.raises(ToolRefused, match=r"550 to RCPT TO nobody@example.org"):
        await tool_of(host).call({**MAIL, "to": ["a@example.org", "nobody@example.org"]}, "t/2")
    assert [to for _, to, _ in host.mails] == [["a@example.org", "b@example.org"]]


def test_the_message_id_is_made_of_the_key(host: Mailhost) -> None:
    tool = tool_of(host)
    assert tool.message_id("a/1") == tool.message_id("a/1") != tool.message_id("a/2")
    odd = ["a b/1", "x" * 300, "<>\r\nBcc: x", "ä/1", "", "a//1", "\ud800"]
    made = [tool.message_id(key) for key in odd]
    assert len(set(made)) == len(odd)
    assert all(len(m) < 100 and m.isascii() and m.isprintable() for m in made)


@pytest.mark.parametrize(
    "change",
    [
        {"to": "ann"},
        {"to": ""},
        {"to": []},
        {"to": ["a@example.org"] * 101},
        {"to": "a@example.org\nBcc: b@example.org"},
        {"to": "a@example.org, b@example.org"},
        {"to": "Ann <ann@example.org>"},
        {"subject": "x\nBcc: b@example.org"},
        {"subject": "x\r\n\r\nbody"},
        {"subject": "x" * 501},
        {"text": 3},
        {"text": "\ud800"},
        {"bcc": "b@example.org"},
        {"from": "boss@example.com"},
    ],
    ids=lambda c: repr(c)[:30],
)
async def test_what_is_no_mail_is_refused_before_the_server_is_asked(
    host: Mailhost, change: dict[str, Any]
) -> None:
    with pytest.raises(ToolRefused):
        await tool_of(host).call({**MAIL, **change}, KEY)
    with pytest.raises(ToolRefused):
        await tool_of(host).call({}, KEY)
    assert host.commands == []


@pytest.mark.parametrize(
    ("command", "answer", "error"),
    [
        ("CONNECT", b"554 not you", ToolUnavailable),
        ("CONNECT", b"421 later", ToolUnavailable),
        ("CONNECT", b"", ToolUnavailable),
        ("CONNECT", b"HTTP/1.1 400 Bad Request", ToolUnavailable),
        ("MAIL", b"550 not from there", ToolRefused),
        ("MAIL", b"451 later", ToolUnavailable),
        ("RCPT", b"450 greylisted", ToolUnavailable),
        ("DATA", b"554 no mail today", ToolRefused),
        ("DATA", b"421 closing", ToolUnavailable),
        ("DATA", b"", ToolUnavailable),
        (".", b"554 looks like spam", ToolRefused),
        (".", b"452 disk full", ToolUnavailable),
        (".", b"", ToolUncertain),
        (".", b"garbage", ToolUncertain),
        (".", b"354 again", ToolUncertain),
    ],
)
async def test_what_came_of_a_mail_that_was_not_taken_well(
    host: Mailhost, command: str, answer: bytes, error: type[Exception]
) -> None:
    host.answers[command] = answer
    with pytest.raises(error) as caught:
        await tool_of(host).call(MAIL, KEY)
    if error is ToolUncertain:
        assert "<0f3c9a.7@example.com>" in str(caught.value)
    elif command != ".":
        assert host.mails == []


@pytest.mark.parametrize(
    ("command", "error"),
    [
        ("CONNECT", ToolUnavailable),
        ("EHLO", ToolUnavailable),
        ("DATA", ToolUnavailable),
        (".", ToolUncertain),
    ],
)
async def test_a_server_that_stalls_is_not_waited_for(
    host: Mailhost, command: str, error: type[Exception]
) -> None:
    host.stalls.add(command)
    tool = tool_of(host, timeout_s=0.3)
    started = time.monotonic()
    with pytest.raises(error):
        await tool.call(MAIL, KEY)
    assert time.monotonic() - started < 5
    await gone(tool)
    assert len(host.mails) == (1 if command == "." else 0)


async def gone(tool: SmtpTool) -> None:
    """Wait until no thread of the tool is left."""
    for _ in range(200):
        if tool._threads.running == 0:
            return
        await asyncio.sleep(0.02)
    raise AssertionError("a thread stays")


async def test_a_call_that_is_cancelled_sends_nothing_any_more(host: Mailhost) -> None:
    host.stalls.add("RCPT")
    tool = tool_of(host)
    task = asyncio.create_task(tool.call(MAIL, KEY))
    assert await asyncio.to_thread(host.stalled.wait, 5)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    # Its thread is woken: it would wait for the server for 5 s.
    await asyncio.wait_for(gone(tool), 3)
    assert host.mails == []


async def test_a_server_without_starttls_gets_no_mail(host: Mailhost) -> None:
    with pytest.raises(ToolRefused, match="STARTTLS"):
        await tool_of(host, starttls=True).call(MAIL, KEY)
    assert host.mails == []


async def test_a_server_that_only_says_starttls_gets_no_mail(host: Mailhost) -> None:
    host.features = ["STARTTLS"]
    host.answers["STARTTLS"] = b"220 go on"
    with pytest.raises((ToolUnavailable, ToolRefused)):
        await tool_of(host, starttls=True, timeout_s=1).call(MAIL, KEY)
    assert host.mails == []


async def test_logging_in(host: Mailhost, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMOS_TEST_PASSWORD", "s3cret")
    tool = tool_of(host, username="desk", password="env:LLMOS_TEST_PASSWORD")
    with pytest.raises(ToolRefused, match="AUTH"):
        await tool.call(MAIL, KEY)
    host.features = ["AUTH PLAIN"]
    host.answers["AUTH"] = b"535 no"
    with pytest.raises(ToolRefused, match="535") as caught:
        await tool.call(MAIL, KEY)
    assert "s3cret" not in str(caught.value)
    host.answers["AUTH"] = b"454 later"
    with pytest.raises(ToolUnavailable):
        await tool.call(MAIL, KEY)
    assert host.mails == []
    host.answers["AUTH"] = b"235 welcome"
    await tool.call(MAIL, KEY)
    assert len(host.mails) == 1
