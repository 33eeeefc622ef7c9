"""Token omission via attention: what the newest token looks at stays."""

from torch import Tensor

from kvfold.policies.base import Entries, Policy
from kvfold.policies.select import budget_tokens, drop_lowest
from kvfold.specs.tova import TOVASpec


class TOVAPolicy(Policy):
    """After each call keep the entries that the newest query attends to most, by the mean over all heads of the layer.
    Nothing is protected: even the newest token may go.

    Source: arXiv 2401.06104, section 3.2.
    Differs: in a group of layers that share keys and values, the mean is over the heads of all of them; of equal
    scores the older entry stays (left open).
    """

    spec: TOVASpec
    weights = "last"

    def keep(self, entries: Entries) -> Tensor:
        """See `Policy.keep`. The heads of a layer always hold the same tokens, in the same order."""
        position = entries.position_BKE[:, :1]
        score = entries.score_BKE.sum(dim=1, keepdim=True)
        room = budget_tokens(self.spec.tokens, entries.seen_B)
        return (~drop_lowest(score, position, position >= 0, room)).expand_as(entries.position_BKE)
