"""The Python API of a kernel: :class:`Kernel`. For asyncio see :mod:`llmos.kernel.aio`."""

from __future__ import annotations

import asyncio
import concurrent.futures
import functools
import threading
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, Protocol, TypeVar, overload

from llmos.kernel.aio import ASK_S
from llmos.kernel.aio import AsyncKernel as AsyncKernel
from llmos.kernel.aio import InvalidLaunch as InvalidLaunch
from llmos.kernel.operating import Operator
from llmos.kernel.settings import Settings
from llmos.kernel.system import SystemConfig
from llmos.syscalls.messages import Message, MessageT, Reply

P = ParamSpec("P")
T = TypeVar("T")
AsyncT = TypeVar("AsyncT")
AsyncT_co = TypeVar("AsyncT_co", covariant=True)

CLEAN_UP_S = 30.0
"""How long an interrupt waits for what it has cancelled to be cleaned up: a Ray that is just
starting can only be stopped once it has started."""


class _Sync(Protocol[AsyncT_co]):
    """An object with an asynchronous twin."""

    @property
    def aio(self) -> AsyncT_co:
        """The twin."""
        ...

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine of the twin to its end."""
        ...


def _sync(
    method: Callable[Concatenate[AsyncT, P], Coroutine[Any, Any, T]],
) -> Callable[Concatenate[_Sync[AsyncT], P], T]:
    """The same method for callers without a loop. It is run in the loop of the object."""

    @functools.wraps(method)
    def run(self: _Sync[AsyncT], /, *args: P.args, **kwargs: P.kwargs) -> T:
        # By name: the twin may carry its methods out elsewhere.
        work: Coroutine[Any, Any, T] = getattr(self.aio, method.__name__)(*args, **kwargs)
        return self.run(work)

    return run


class SyncOperator:
    """What a person does with a system's records. See :class:`llmos.kernel.operating.Operator`."""

    def __init__(self, operator: Operator, run: Callable[[Coroutine[Any, Any, Any]], Any]) -> None:
        self.aio = operator
        self._run = run

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine that uses :attr:`aio`."""
        found: T = self._run(work)
        return found

    agents = _sync(Operator.agents)
    backup = _sync(Operator.backup)
    chain = _sync(Operator.chain)
    chain_end = _sync(Operator.chain_end)
    dead_letter = _sync(Operator.dead_letter)
    dead_letters = _sync(Operator.dead_letters)
    drain = _sync(Operator.drain)
    drop_dead = _sync(Operator.drop_dead)
    full_id = _sync(Operator.full_id)
    held = _sync(Operator.held)
    mail = _sync(Operator.mail)
    rebalance = _sync(Operator.rebalance)
    recording = _sync(Operator.recording)
    release = _sync(Operator.release)
    resolve = _sync(Operator.resolve)
    retry_dead = _sync(Operator.retry_dead)
    timers = _sync(Operator.timers)
    turn = _sync(Operator.turn)
    turns = _sync(Operator.turns)
    unknown_effects = _sync(Operator.unknown_effects)


class Kernel:
    """A kernel. Make one with :meth:`boot` or :meth:`connect`; leave it as a context manager.

    All methods are those of :class:`AsyncKernel`, and may be called from any thread.
    """

    def __init__(self, kernel: AsyncKernel, runner: _Runner) -> None:
        self.aio = kernel
        """The same kernel for asyncio, bound to a loop in another thread."""
        self._runner = runner

    @property
    def system(self) -> str:
        """Name of the system."""
        return self.aio.system

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine that uses :attr:`aio` to its end."""
        return self._runner.run(work)

    @property
    def operator(self) -> SyncOperator:
        """What a person does with the records: dead letters, unknown effects, held agents, …"""
        return SyncOperator(self.aio.operator, self.run)

    def start(self, work: Coroutine[Any, Any, T]) -> concurrent.futures.Future[T]:
        """Run a coroutine that uses :attr:`aio`, beside others; cancel it by its future."""
        return self._runner.start(work)

    @classmethod
    def boot(
        cls,
        system: SystemConfig | Path | str | None = None,
        *,
        address: str | None = None,
        settings: Settings | None = None,
        detached: bool = False,
        launch: bool = True,
        progress: Callable[[str], None] | None = None,
    ) -> Kernel:
        """See :meth:`AsyncKernel.boot`."""
        return cls._make(
            AsyncKernel.boot(
                system,
                address=address,
                settings=settings,
                detached=detached,
                launch=launch,
                progress=progress,
            )
        )

    @classmethod
    def connect(
        cls,
        system: str | None = None,
        *,
        address: str | None = None,
        settings: Settings | None = None,
    ) -> Kernel:
        """See :meth:`AsyncKernel.connect`."""
        return cls._make(AsyncKernel.connect(system, address=address, settings=settings))

    @classmethod
    def _make(cls, making: Coroutine[Any, Any, AsyncKernel]) -> Kernel:
        runner = _Runner()
        made: list[AsyncKernel] = []

        async def keep() -> AsyncKernel:
            made.append(await making)
            return made[0]

        try:
            return cls(runner.run(keep()), runner)
        except BaseException:
            try:
                # An interrupt may come when it is made already and nobody has it yet.
                for kernel in made:
                    runner.run(kernel.shutdown() if kernel._owner else kernel.close())
            finally:
                runner.close()
            raise

    def close(self) -> None:
        """See :meth:`AsyncKernel.close`."""
        try:
            self._runner.run(self.aio.close())
        finally:
            self._runner.close()

    def shutdown(self, grace_s: float = 5.0) -> None:
        """See :meth:`AsyncKernel.shutdown`."""
        try:
            self._runner.run(self.aio.shutdown(grace_s))
        finally:
            self._runner.close()

    def __enter__(self) -> Kernel:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    launch = _sync(AsyncKernel.launch)
    ask_reply = _sync(AsyncKernel.ask_reply)
    tell = _sync(AsyncKernel.tell)
    kill = _sync(AsyncKernel.kill)
    load_adapter = _sync(AsyncKernel.load_adapter)
    unload_adapter = _sync(AsyncKernel.unload_adapter)
    adapters = _sync(AsyncKernel.adapters)
    ps = _sync(AsyncKernel.ps)
    status = _sync(AsyncKernel.status)
    metrics = _sync(AsyncKernel.metrics)
    top = _sync(AsyncKernel.top)
    why = _sync(AsyncKernel.why)
    turns = _sync(AsyncKernel.turns)
    turn = _sync(AsyncKernel.turn)

    def stream(
        self, agent: str, message: Message, *, deadline_s: float = ASK_S
    ) -> Iterator[str | Reply]:
        """See :meth:`AsyncKernel.stream`."""
        pieces = self.aio.stream(agent, message, deadline_s=deadline_s)

        async def following() -> str | Reply | None:
            return await anext(pieces, None)

        async def leave() -> None:
            await pieces.aclose()

        try:
            while (piece := self._runner.run(following())) is not None:
                yield piece
        finally:
            self._runner.run(leave())

    @overload
    def ask(self, agent: str, message: Message, *, deadline_s: float = ASK_S) -> Message | None: ...

    @overload
    def ask(
        self, agent: str, message: Message, reply: type[MessageT], *, deadline_s: float = ASK_S
    ) -> MessageT: ...

    def ask(
        self,
        agent: str,
        message: Message,
        reply: type[MessageT] | None = None,
        *,
        deadline_s: float = ASK_S,
    ) -> Message | None:
        """See :meth:`AsyncKernel.ask`."""
        if reply is None:
            return self._runner.run(self.aio.ask(agent, message, deadline_s=deadline_s))
        return self._runner.run(self.aio.ask(agent, message, reply, deadline_s=deadline_s))


class _Runner:
    """An event loop in a thread, for the synchronous API."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(
            target=self._loop.run_forever, name="llmos-client", daemon=True
        )
        self._thread.start()

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Run to the end; an interrupt of the calling thread cancels it first.

        The interrupt goes on when the cancelled work has cleaned up, or after ``CLEAN_UP_S``
        seconds, or at a second interrupt.
        """
        future = self.start(work)
        try:
            return future.result()
        except KeyboardInterrupt:
            future.cancel()
            # To return at once would let the caller stop the loop in the middle of it.
            concurrent.futures.wait([future], timeout=CLEAN_UP_S)
            raise

    def start(self, work: Coroutine[Any, Any, T]) -> concurrent.futures.Future[T]:
        """Run in the loop's thread; cancelling the future cancels the work."""
        if self._loop.is_closed():
            work.close()
            raise RuntimeError("this kernel was closed")
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    def close(self) -> None:
        """Stop the loop. Idempotent."""
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join(timeout=5.0)
            self._loop.close()
