"""What is answered in time over a grid, and who stays silent."""

import time
from collections.abc import Callable, Mapping
from collections.abc import Set as AbstractSet

from flwr.app import Message
from flwr.serverapp import Grid


def answered(
    grid: Grid, pushed: AbstractSet[str], nodes: Mapping[str, int], seconds: float, pause: Callable[[], None]
) -> tuple[list[Message], dict[str, str]]:
    """The replies within ``seconds``, and message id -> why there is none.

    ``nodes``: message id -> its node, of all messages; ``pushed``: the ids of those that went out.
    """
    waiting, found = pushed & nodes.keys(), []
    silent = dict.fromkeys(nodes.keys() - pushed, "its node cannot be reached")
    end = time.monotonic() + seconds
    while waiting and time.monotonic() < end:
        for reply in grid.pull_messages(list(waiting)):
            key = reply.metadata.reply_to_message_id
            if key in waiting:
                waiting.discard(key)
                found.append(reply)
        # A node that is not connected any more: started again, it will know nothing of what it was asked.
        there = set(grid.get_node_ids())
        silent |= {key: "its node was gone while it was asked" for key in waiting if nodes[key] not in there}
        waiting -= silent.keys()
        if waiting:
            pause()
    return found, silent | dict.fromkeys(waiting, f"no answer within {seconds:g} seconds")
