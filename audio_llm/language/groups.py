"""The nine groups of semantic elements of AudSemThinker (Wijngaard et al. 2025), in the order of the paper."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

# Who, what, how, when and where sounds, on which surfaces; what the signal is like, how it is heard, what else is felt.
ELEMENT_GROUPS = (
    *("sound generating agents", "physical sound sources", "sound generation mechanisms", "temporal context"),
    *("spatial context", "acoustic surfaces", "signal descriptors", "auditory attributes", "non auditory sensation"),
)


def in_order(elements: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """Groups and their words: the nine in their order, however they are spelt, others behind them as they come."""
    return sorted(elements.items(), key=lambda group: _place(group[0]))


def _place(group: str) -> int:
    name = re.sub(r"[\W_]+", " ", group.lower()).strip(" 0123456789")
    return ELEMENT_GROUPS.index(name) if name in ELEMENT_GROUPS else len(ELEMENT_GROUPS)
