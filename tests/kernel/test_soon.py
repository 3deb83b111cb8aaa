"""One timer for many callbacks."""

from __future__ import annotations

import asyncio

from llmos.kernel.soon import Soon
from tests.kernel.local import until


async def test_they_come_in_order_and_none_that_was_called_off() -> None:
    soon, came = Soon(lambda: 0.01), list[int]()
    calls = [soon.call(lambda n=n: came.append(n)) for n in range(5)]  # type: ignore[misc]
    calls[1].cancel()
    calls[4].cancel()
    await until(lambda: len(came) == 3)
    assert came == [0, 2, 3]
    calls[2].cancel()  # It was called already.


async def test_one_that_is_called_off_does_not_hold_up_the_next() -> None:
    soon, came = Soon(lambda: 0.01), list[str]()
    soon.call(lambda: None).cancel()
    await asyncio.sleep(0.005)
    soon.call(lambda: came.append("late"))
    await until(lambda: came)


async def test_one_that_fails_does_not_lose_the_others() -> None:
    soon, came = Soon(lambda: 0.001), list[str]()
    loop = asyncio.get_running_loop()
    errors: list[object] = []
    loop.set_exception_handler(lambda _, context: errors.append(context["exception"]))

    def fail() -> None:
        raise ValueError("once")

    soon.call(fail)
    soon.call(lambda: came.append("next"))
    await until(lambda: came)
    assert [type(e) for e in errors] == [ValueError]
    loop.set_exception_handler(None)
