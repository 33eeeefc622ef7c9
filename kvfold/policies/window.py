"""The newest tokens and the first few."""

from torch import Tensor

from kvfold.policies.base import Entries, Policy
from kvfold.policies.select import budget_tokens
from kvfold.specs.window import WindowSpec


class WindowPolicy(Policy):
    """Sliding window with attention sinks: a query sees the `recent` newest tokens, itself included, and the `sinks` first.

    Source: arXiv 2309.17453, section 3.2.
    Differs: keys keep the rotation of their original position instead of being numbered anew within the cache.
    """

    spec: WindowSpec

    def keep(self, entries: Entries) -> Tensor:
        """What the newest query sees."""
        position = entries.position_BKE
        edge = entries.seen_B - budget_tokens(self.spec.recent, entries.seen_B)
        return (position >= edge[:, None, None]) | (position < self.spec.sinks)

    def sees(self, query_BT: Tensor, position_BKE: Tensor) -> Tensor:
        """See `Policy.sees`."""
        edge_BT = query_BT + 1 - budget_tokens(self.spec.recent, query_BT + 1)
        position = position_BKE.unsqueeze(2)
        return (position >= edge_BT[:, None, :, None]) | (position < self.spec.sinks)
