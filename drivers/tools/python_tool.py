"""``python``: a function of a module."""

from __future__ import annotations

import asyncio
import functools
import importlib
import inspect
from collections.abc import Callable, Mapping
from typing import Any

from llmos.drivers.errors import ToolError, ToolRefused, ToolUnavailable, ToolUncertain
from llmos.drivers.protocols import ToolOutcome
from llmos.drivers.tools.options import Options, ToolMisconfigured, read_options
from llmos.drivers.tools.outcome import plain_outcome
from llmos.drivers.tools.threads import Threads


class PythonOptions(Options):
    """``[tools.NAME.options]``."""

    target: str
    """``module:function``; the module is imported when the tool is made."""
    idempotent: bool = False
    """Whether the function, given one ``idem_key`` twice, acts once."""


class PythonTool:
    """Calls a function, sync or async, with the arguments by name.

    If it has a parameter ``idem_key`` it is given that too. What it returns is plain JSON
    data, a pydantic model, or a ToolOutcome where the target has a reference of its own. It
    may raise ToolRefused, ToolUnavailable or ToolUncertain; any other error is uncertain,
    since it may have come after the effect.

    A sync function runs in a thread: one that takes longer than ``timeout_s`` goes on, and
    holds one of ``max_calls`` places until it ends.
    """

    def __init__(self, name: str, options: Mapping[str, Any]) -> None:
        self._name = name
        self._options = read_options(name, PythonOptions, options)
        self._function = self._find()
        try:
            self._signature = inspect.signature(self._function)
        except (TypeError, ValueError):
            raise self._wrong("has no signature that can be read") from None
        parameter = self._signature.parameters.get("idem_key")
        self._keyed = parameter is not None and parameter.kind in (
            inspect.Parameter.POSITIONAL_OR_KEYWORD,
            inspect.Parameter.KEYWORD_ONLY,
        )
        if self._options.idempotent and not self._keyed:
            raise ToolMisconfigured(
                name,
                "idempotent",
                f"{self._options.target} has no parameter idem_key to tell repetitions by",
                PythonOptions.model_fields,
            )
        self._threads = Threads(name, self._options.max_calls)
        self._running = 0

    def _wrong(self, reason: str) -> ToolMisconfigured:
        return ToolMisconfigured(
            self._name, "target", f"{self._options.target} {reason}", PythonOptions.model_fields
        )

    def _find(self) -> Callable[..., Any]:
        module, _, attribute = self._options.target.partition(":")
        if not module or not attribute:
            raise self._wrong("is not module:function")
        try:
            found = getattr(importlib.import_module(module), attribute, None)
        except ModuleNotFoundError as error:
            raise self._wrong(f"cannot be imported: no module {error.name!r}") from None
        except (Exception, SystemExit) as error:
            # SystemExit too: a script that ends itself on import would end the whole host.
            raise self._wrong(f"cannot be imported: its module raised {error!r}") from error
        if not callable(found):
            raise self._wrong("is not there" if found is None else "is no function")
        return found  # type: ignore[no-any-return]

    @property
    def name(self) -> str:
        """Its name."""
        return self._name

    @property
    def idempotent(self) -> bool:
        """As the options say."""
        return self._options.idempotent

    @property
    def queryable(self) -> bool:
        """Never."""
        return False

    async def call(self, arguments: Mapping[str, Any], idem_key: str) -> ToolOutcome:
        """Call the function."""
        if "idem_key" in arguments:
            raise ToolRefused(self._name, "idem_key is given by the kernel, not by the agent")
        given = dict(arguments) | ({"idem_key": idem_key} if self._keyed else {})
        try:
            self._signature.bind(**given)
        except TypeError as error:
            raise ToolRefused(self._name, f"{self._options.target}: {error}") from None
        limit = asyncio.timeout(self._options.timeout_s)
        try:
            async with limit:
                value = await self._run(given)
        except ToolError:
            raise
        except (Exception, SystemExit) as error:
            if limit.expired():
                raise ToolUncertain(
                    self._name, f"no answer after {self._options.timeout_s:.3g} s"
                ) from None
            raise ToolUncertain(
                self._name,
                f"{self._options.target} raised {error!r}",
                remedy="A function that knows it did nothing raises ToolRefused",
            ) from error
        return plain_outcome(self._name, value)

    async def _run(self, given: dict[str, Any]) -> Any:
        if not inspect.iscoroutinefunction(self._function):
            value = await self._threads.run(functools.partial(self._function, **given))
            # A callable object or a partial may hand out a coroutine all the same.
            return await value if inspect.isawaitable(value) else value
        if self._running >= self._options.max_calls:
            raise ToolUnavailable(
                self._name, f"{self._running} calls are under way, which is its limit"
            )
        self._running += 1
        try:
            return await self._function(**given)
        finally:
            self._running -= 1

    async def lookup(self, idem_key: str) -> ToolOutcome | None:
        """A function cannot be asked what it did."""
        raise ToolUnavailable(self._name, "a function cannot be asked what it did")

    async def close(self) -> None:
        """Nothing to release."""
