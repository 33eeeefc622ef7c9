"""Heavy hitters: the newest tokens and those that have received most attention."""

from torch import Tensor

from kvfold.policies.base import Entries, Policy
from kvfold.policies.select import budget_tokens, drop_lowest
from kvfold.specs.h2o import H2OSpec


class H2OPolicy(Policy):
    """After each call keep the `recent` newest entries and, of the rest, the `heavy` ones that received most attention.

    Source: arXiv 2306.14048, section 4, algorithm 1.
    Differs: per kv head, scores summed over its query heads and over all layers that read it (published for one head a
    kv head); of equal scores the older entry stays (left open); any batch.
    """

    spec: H2OSpec
    weights = "sum"

    def keep(self, entries: Entries) -> Tensor:
        """See `Policy.keep`. The newest tokens can't have been dropped yet, so their age tells which they are."""
        seen, position = entries.seen_B, entries.position_BKE
        edge = seen - budget_tokens(self.spec.recent, seen)
        candidates = (position >= 0) & (position < edge[:, None, None])
        return ~drop_lowest(entries.score_BKE, position, candidates, budget_tokens(self.spec.heavy, seen))
