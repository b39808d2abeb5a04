"""What `mfm rewards --serve` does: a reward for other processes, until a signal ends it."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from rich.text import Text

from mfm_lightning.utils.console import console
from mfm_lightning.utils.stopping import stoppable
from mfm_rewards import Reward
from mfm_rewards.protocol import device_of
from mfm_rewards.serving import RewardServer

log = logging.getLogger(__name__)
LAST_REQUEST = 3.0  # seconds that the request in progress may take when the server ends


def serve(reward: Reward, options: Mapping[str, Any], host: str, port: int, max_request: int) -> None:
    """Answer requests until Ctrl-C or SIGTERM.

    Args:
        options: of the reward, by which clients know it again.
        max_request: largest request in MB.

    Raises:
        RewardError: if host and port cannot be listened at.
        ValueError: for a port or a size out of range.
    """
    with RewardServer(reward, host, port, max_request * 10**6, options) as server:
        needs = ", ".join(reward.needs)
        gradients = "with" if reward.differentiable else "without"
        line = f"{{name: remote, url: '{server.url}'{', gradients: true' if reward.differentiable else ''}}}"
        lines = [
            f"serving {reward.name} at {server.url}, on {device_of(reward)}: from {needs}, {gradients} gradients",
            f"in a config: reward: {line}",
        ]
        console().print(Text("\n".join(lines)), soft_wrap=True)
        if not server.only_this_machine:
            log.warning("whoever reaches %s may ask: there is no password", server.url)
        with stoppable("the same command serves again; clients wait for it, and go on"):
            try:
                server.serve_forever()
            finally:
                if not server.wait_for_the_last(LAST_REQUEST):
                    log.warning("a request was cut off")
