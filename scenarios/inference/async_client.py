"""The client for asyncio."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

from scenarios.inference.client import Client, Completion
from scenarios.inference.request import Request


class AsyncClient:
    """The same for asyncio; made by a plain client, whose connection it uses."""

    def __init__(self, client: Client):
        self._client = client

    async def generate(self, request: Request, *, timeout_s: float = 600.0) -> Completion:
        """Sends a request and waits for its completion; cancelling the task cancels it."""
        return await asyncio.wrap_future(self._client.submit(request, timeout_s=timeout_s))

    async def stream(self, request: Request, *, timeout_s: float = 600.0) -> AsyncIterator[int]:
        """Sends a request and yields its tokens as they come; leaving the loop cancels it."""
        loop = asyncio.get_running_loop()
        tokens: asyncio.Queue[list[int] | None] = asyncio.Queue()

        def put(new: list[int] | None) -> None:
            with contextlib.suppress(RuntimeError):  # the loop has ended
                loop.call_soon_threadsafe(tokens.put_nowait, new)

        future = self._client.submit(request, timeout_s=timeout_s, on_tokens=put)
        future.add_done_callback(lambda _: put(None))
        try:
            while (new := await tokens.get()) is not None:
                for token in new:
                    yield token
            future.result()
        finally:
            future.cancel()

    async def command(self, name: str, timeout_s: float = 600.0) -> dict[str, Any]:
        """As ``Client.command``."""
        return await asyncio.to_thread(self._client.command, name, timeout_s)
