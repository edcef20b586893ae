"""Plans that wait their turn: bluesky-queueserver around one beamline, and a client for it.

`QueueService` brings up what a queue needs; `QueueClient` talks to it. Any other client of
bluesky-queueserver does as well: the addresses are in ``queue/service.json`` of the session's folder.
"""

from bcmi_beamline.queue.client import QueueClient, QueueError
from bcmi_beamline.queue.service import QueueService

__all__ = ["QueueClient", "QueueError", "QueueService"]
