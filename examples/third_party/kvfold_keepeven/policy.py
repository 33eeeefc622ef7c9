"""What keepeven does: which entries stay, and which a query sees."""

from torch import Tensor

from kvfold.policies.base import Entries, Policy
from kvfold_keepeven.spec import KeepEvenSpec


class KeepEvenPolicy(Policy):
    """A whole block is thinned in one step, so that several entries of a head go at once.

    Source: none, an example.
    Differs: none.
    """

    spec: KeepEvenSpec

    def keep(self, entries: Entries) -> Tensor:
        """See `Policy.keep`."""
        return self._stays(entries.position_BKE, entries.seen_B[:, None, None])

    def sees(self, query_BT: Tensor, position_BKE: Tensor) -> Tensor:
        """See `Policy.sees`."""
        return self._stays(position_BKE.unsqueeze(2), query_BT[:, None, :, None] + 1)

    def _stays(self, position: Tensor, seen: Tensor) -> Tensor:
        block = self.spec.block
        thinned = (seen // block - 1).clamp(min=0) * block
        return (position >= thinned) | (position % 2 == 0)
