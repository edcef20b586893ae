"""Channel Access server on caproto's asyncio layer, from start to a clean stop."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
from collections.abc import Mapping, Sequence

from caproto import ChannelData
from caproto.asyncio.server import Context

PARENT_POLL_S = 0.5


class Server(Context):
    """caproto's server with Nagle's algorithm off, which costs 40 ms a round trip otherwise."""

    async def server_accept_loop(self, sock: socket.socket) -> None:
        """Accept clients; the sockets accepted inherit the option."""
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        await super().server_accept_loop(sock)


async def _outlive(parent: int, server: asyncio.Task[None]) -> None:
    """Stop the server once its parent process is gone."""
    while os.getppid() == parent:
        await asyncio.sleep(PARENT_POLL_S)
    server.cancel()


async def serve(
    pvdb: Mapping[str, ChannelData], interfaces: Sequence[str] | None = None, parent: int | None = None
) -> None:
    """Serve until SIGINT, SIGTERM or, where `parent` is given, until that parent process is gone."""
    server = asyncio.create_task(Server(pvdb, interfaces).run())
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, server.cancel)
    watch = None if parent is None else asyncio.create_task(_outlive(parent, server))
    try:
        await server
    except asyncio.CancelledError:
        pass
    finally:
        if watch is not None:
            watch.cancel()
