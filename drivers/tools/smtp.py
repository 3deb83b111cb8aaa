"""``smtp``: mail, through a mail server."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import hashlib
import re
import smtplib
import socket
import ssl
import threading
from collections.abc import Mapping
from email.headerregistry import Address
from email.message import EmailMessage
from email.policy import SMTP as SMTP_POLICY
from email.utils import formatdate
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from llmos.drivers.errors import ToolError, ToolRefused, ToolUnavailable, ToolUncertain
from llmos.drivers.protocols import ToolOutcome
from llmos.drivers.tools.options import Options, Secret, read_options
from llmos.drivers.tools.threads import Threads


def _address(value: str) -> str:
    try:
        address = Address(addr_spec=value)
    except Exception as error:
        # The parser of the standard library raises IndexError and others for some texts.
        raise ValueError(f"no mail address: {error!r}") from error
    if not address.domain or not value.isascii() or re.search(r"[\s<>]", value):
        raise ValueError("no mail address of the form name@domain in ASCII")
    return value


# 7bit: a server need not take bytes beyond ASCII.
_POLICY = SMTP_POLICY.clone(cte_type="7bit")

MailAddress = Annotated[str, Field(max_length=254), AfterValidator(_address)]


class SmtpOptions(Options):
    """``[tools.NAME.options]``."""

    model_config = ConfigDict(populate_by_name=False)

    sender: MailAddress = Field(alias="from")
    """Who all mail comes from; agents cannot choose it."""
    host: str = Field(min_length=1)
    port: int = Field(default=25, ge=1, le=65535)
    starttls: bool = False
    """Go on encrypted, and refuse a server that cannot or whose certificate is wrong."""
    username: str = ""
    """Log in; needs ``password``."""
    password: Secret = ""


class _Mail(BaseModel):
    model_config = ConfigDict(extra="forbid")

    to: MailAddress | Annotated[tuple[MailAddress, ...], Field(min_length=1, max_length=100)]
    subject: Annotated[str, Field(max_length=500, pattern=r"^[^\r\n\x00]*$")]
    text: Annotated[str, Field(max_length=1 << 20)]

    @property
    def receivers(self) -> tuple[str, ...]:
        return (self.to,) if isinstance(self.to, str) else self.to


class _Abandoned(Exception):
    """Nobody waits any more, and nothing has left."""


class _Attempt:
    """Settles between the thread that sends and the one that gives up: has the mail left?"""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._leaving = self._abandoned = False
        self.server: smtplib.SMTP | None = None

    def leave(self) -> None:
        """The next byte is the mail's."""
        with self._lock:
            if self._abandoned:
                raise _Abandoned
            self._leaving = True

    def abandon(self) -> bool:
        """Send no more than has left; returns whether the mail may have."""
        with self._lock:
            self._abandoned = True
            server = self.server
            sock = None if server is None else server.sock
            if sock is not None:
                # Wakes the thread, which would wait for the server until its timeout; closing
                # the socket would not.
                with contextlib.suppress(OSError):
                    sock.shutdown(socket.SHUT_RDWR)
            return self._leaving

    @property
    def leaving(self) -> bool:
        """Whether the mail may have left."""
        return self._leaving


class SmtpTool:
    """Sends a mail of plain text: ``to`` (an address or up to 100), ``subject``, ``text``.

    All receivers get it or none. Mail servers do not tell repetitions by the ``Message-ID``,
    which is made of the idempotency key, but people and logs find the mail by it; it is the
    reference.
    """

    def __init__(self, name: str, options: Mapping[str, Any]) -> None:
        self._name = name
        self._options = read_options(name, SmtpOptions, options)
        self._threads = Threads(name, self._options.max_calls)

    @property
    def name(self) -> str:
        """Its name."""
        return self._name

    @property
    def idempotent(self) -> bool:
        """No mail server is."""
        return False

    @property
    def queryable(self) -> bool:
        """No mail server is."""
        return False

    async def call(self, arguments: Mapping[str, Any], idem_key: str) -> ToolOutcome:
        """Send it."""
        try:
            mail = _Mail.model_validate(dict(arguments))
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"])) or "arguments"
            raise ToolRefused(self._name, f"{where}: {first['msg']}") from None
        message_id = self.message_id(idem_key)
        try:
            content = self._write(mail, message_id)
        except (ValueError, LookupError) as error:
            raise ToolRefused(self._name, f"the mail cannot be written: {error}") from None
        attempt = _Attempt()
        send = functools.partial(self._send, mail.receivers, content, attempt)
        try:
            async with asyncio.timeout(self._options.timeout_s):
                await self._threads.run(send)
        except (TimeoutError, asyncio.CancelledError) as error:
            left = attempt.abandon()
            if isinstance(error, asyncio.CancelledError):
                raise
            raise self._failed(
                f"{self._where} was not done after {self._options.timeout_s:.3g} s",
                left,
                message_id,
            ) from None
        except (smtplib.SMTPException, OSError, EOFError, ValueError, AttributeError) as error:
            # AttributeError: smtplib, when its socket is closed under it.
            raise self._failed(f"{self._where}: {error!r}", attempt.leaving, message_id) from error
        return ToolOutcome({"message_id": message_id}, message_id)

    @property
    def _where(self) -> str:
        return f"{self._options.host}:{self._options.port}"

    def _failed(self, reason: str, left: bool, message_id: str) -> ToolError:
        if left:
            return ToolUncertain(
                self._name, reason, remedy=f"Look for {message_id} in the mail server's log"
            )
        return ToolUnavailable(self._name, reason)

    def message_id(self, idem_key: str) -> str:
        """The ``Message-ID`` of the call with that key."""
        local = idem_key.replace("/", ".")
        if not re.fullmatch(r"[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*", local) or len(local) > 64:
            local = hashlib.sha256(idem_key.encode("utf-8", "surrogatepass")).hexdigest()
        return f"<{local}@{self._options.sender.rpartition('@')[2]}>"

    def _write(self, mail: _Mail, message_id: str) -> bytes:
        message = EmailMessage(policy=_POLICY)
        message["From"] = self._options.sender
        message["To"] = ", ".join(mail.receivers)
        message["Subject"] = mail.subject
        message["Date"] = formatdate()
        message["Message-ID"] = message_id
        message.set_content(mail.text)
        return message.as_bytes()

    def _send(self, receivers: tuple[str, ...], content: bytes, attempt: _Attempt) -> None:
        """The whole conversation, in a thread."""
        options = self._options
        # gethostname: smtplib's own choice asks the network, which may take many seconds.
        server = smtplib.SMTP(
            options.host, options.port, socket.gethostname(), timeout=options.timeout_s
        )
        attempt.server = server
        try:
            if options.starttls:
                server.ehlo_or_helo_if_needed()
                if not server.has_extn("starttls"):
                    raise ToolRefused(self._name, f"{self._where} does not offer STARTTLS")
                # smtplib's own default checks no certificate.
                self._check(server.starttls(context=ssl.create_default_context()), "STARTTLS")
            server.ehlo_or_helo_if_needed()
            if options.username:
                self._login(server)
            self._check(server.mail(options.sender), "MAIL FROM")
            for receiver in receivers:
                self._check(server.rcpt(receiver), f"RCPT TO {receiver}")
            self._check(server.docmd("DATA"), "DATA", wanted=3)
            attempt.leave()
            dotted = re.sub(rb"(?m)^\.", b"..", content)
            server.send(dotted + (b"" if dotted.endswith(b"\r\n") else b"\r\n") + b".\r\n")
            self._check(server.getreply(), "the mail")
        finally:
            # Not quit(): the mail is taken or not, and a server that stalls now says nothing.
            server.close()

    def _login(self, server: smtplib.SMTP) -> None:
        try:
            server.login(self._options.username, self._options.password)
        except smtplib.SMTPAuthenticationError as error:
            self._check((error.smtp_code, b"the login"), "AUTH")
            raise ToolRefused(self._name, f"{self._where} refused the login") from None
        except smtplib.SMTPNotSupportedError as error:
            raise ToolRefused(self._name, f"{self._where}: {error}") from None

    def _check(self, reply: tuple[int, bytes], step: str, wanted: int = 2) -> None:
        """What a server says no to was not done: for now (4xx) or for good (5xx)."""
        code, text = reply
        if code // 100 == wanted:
            return
        said = text[:200].decode(errors="replace")
        reason = f"{self._where} answered {code} to {step}: {said}"
        if code // 100 == 5:
            raise ToolRefused(self._name, reason)
        if code // 100 == 4:
            raise ToolUnavailable(self._name, reason)
        raise smtplib.SMTPServerDisconnected(reason)

    async def lookup(self, idem_key: str) -> ToolOutcome | None:
        """A mail server cannot be asked what it did."""
        raise ToolUnavailable(
            self._name,
            "a mail server cannot be asked what it did",
            remedy=f"Look for {self.message_id(idem_key)} in its log",
        )

    async def close(self) -> None:
        """Nothing to release."""
