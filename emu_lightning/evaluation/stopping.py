"""Where tuning should have stopped, from what was judged on the way."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

MAX_FAITHFULNESS_LOSS = 0.03
REASON = "highest appeal win minus lose so far, faithfulness win minus lose not below {}"


def choose_stop(
    judged: Sequence[Mapping[str, Any]], max_faithfulness_loss: float = MAX_FAITHFULNESS_LOSS
) -> Mapping[str, Any] | None:
    """The entry with the most appeal among those that lose no more faithfulness than is allowed.

    The paper (arXiv 2309.15807, section 3.3) stops early although the loss still falls, by looking; the rule
    is our choice.

    Args:
        judged: each with ``appeal_win_minus_lose`` and ``faithfulness_win_minus_lose``, against the start.
        max_faithfulness_loss: how far below 0 faithfulness may be.

    Returns:
        The first of the best; None where every one lost too much.
    """
    faithful = [entry for entry in judged if entry["faithfulness_win_minus_lose"] >= -max_faithfulness_loss]
    return max(faithful, key=lambda entry: entry["appeal_win_minus_lose"], default=None)
