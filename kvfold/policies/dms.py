"""Dynamic memory sparsification: flagged tokens leave a fixed number of tokens later."""

from torch import Tensor

from kvfold.policies.base import Policy
from kvfold.specs.dms import DMSSpec


class DMSPolicy(Policy):
    """A flagged token is seen by the queries of the `delay` tokens after it; the next token then takes its slot.

    Source: arXiv 2506.05345, section 3.
    Differs: none (who flags is the model's gate, models/gates.py).
    """

    spec: DMSSpec
    gate = "flag"

    @property
    def reach(self) -> int:
        """Newest tokens of a head whose flags don't count yet."""
        return self.spec.delay + 1

    def outlives(self, query: Tensor, position: Tensor, flagged: Tensor) -> Tensor:
        """bool: whether an entry is still there for a query at a position; all three broadcast."""
        return ~flagged | (query - position <= self.spec.delay)
