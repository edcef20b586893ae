"""Channel Access server on caproto's asyncio layer, from start to a clean stop."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
from collections.abc import Mapping, Sequence

from caproto import ChannelData, RepeaterConfirmResponse, get_environment_variables
from caproto.asyncio.server import Context, VirtualCircuit
from caproto.server.common import DisconnectedCircuit

PARENT_POLL_S = 0.5


class Circuit(VirtualCircuit):
    """A client's connection that sends monitors at once, as an IOC does.

    caproto's own collects them for a while, and for longer the more there are: late to everyone who waits for
    DMOV.
    """

    async def subscription_queue_loop(self) -> None:
        """Send what is queued, in one packet, whenever something is."""
        self.events_on.set()
        with contextlib.suppress(asyncio.CancelledError, DisconnectedCircuit):  # its reader says goodbye
            while True:
                queued = [await self.subscription_queue.get()]
                while not self.subscription_queue.empty():
                    queued.append(self.subscription_queue.get_nowait())
                updates = [update for latest in queued if (update := latest()) is not None]
                wanted = {sub.subscriptionid for subs in self.subscriptions.values() for sub in subs}
                await self.send(*(update for update in updates if update.subscriptionid in wanted))


class Server(Context):
    """caproto's server with Nagle's algorithm off, which costs 40 ms a round trip otherwise."""

    CircuitClass = Circuit

    async def server_accept_loop(self, sock: socket.socket) -> None:
        """Accept clients, and say where; the sockets accepted inherit the option."""
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        address, port = sock.getsockname()[:2]
        taken = "" if port == self.ca_server_port else f" (port {self.ca_server_port} is taken)"
        print(f"serving {len(self.pvdb)} process variables on {address}:{port}{taken}", flush=True)
        await super().server_accept_loop(sock)


class Repeater(asyncio.DatagramProtocol):
    """Confirms the clients that register for beacons, of which there are none.

    Without it each client would start a ``caRepeater`` that outlives everything.
    """

    def connection_made(self, transport: asyncio.DatagramTransport) -> None:
        """Keep the way back."""
        self._transport = transport

    def datagram_received(self, data: bytes, addr: tuple[str, int]) -> None:
        """Any datagram registers its sender."""
        self._transport.sendto(bytes(RepeaterConfirmResponse("127.0.0.1")), addr)


async def _outlive(parent: int | None, server: asyncio.Task[None]) -> None:
    """Stop the server once its parent process, if it has one, is gone."""
    while parent is None or os.getppid() == parent:
        await asyncio.sleep(PARENT_POLL_S)
    server.cancel()


async def serve(
    pvdb: Mapping[str, ChannelData], interfaces: Sequence[str] | None = None, parent: int | None = None
) -> None:
    """Serve until SIGINT or SIGTERM.

    Parameters
    ----------
    pvdb : mapping
        Process variables by name.
    interfaces : sequence of str, optional
        Addresses to answer on; those of the environment where absent.
    parent : int, optional
        Process that has claimed all ports for this server alone: serve no longer than it lives, and stand in
        for the repeater.
    """
    loop = asyncio.get_running_loop()
    if parent is not None:
        port = int(get_environment_variables()["EPICS_CA_REPEATER_PORT"])
        await loop.create_datagram_endpoint(Repeater, local_addr=("127.0.0.1", port))
    server = loop.create_task(Server(pvdb, interfaces).run())
    watch = loop.create_task(_outlive(parent, server))
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, server.cancel)
    with contextlib.suppress(asyncio.CancelledError):
        await server
    watch.cancel()
