"""Dynamic memory compression: a token is merged into the newest entry, or opens one of its own."""

from kvfold.policies.base import Policy
from kvfold.specs.dmc import DMCSpec


class DMCPolicy(Policy):
    """An entry is the mean of the newest `window` tokens merged into it, weighted by their importance.

    Source: arXiv 2403.09636, section 3.
    Differs: none (who merges is the model's gate, models/gates.py; the arithmetic is ops/pooling.py).
    """

    spec: DMCSpec
    gate = "merge"

    @property
    def reach(self) -> int:
        """Weighted tokens held beside the pages; 1 = a running sum of all."""
        return self.spec.window or 1

    @property
    def sums_all(self) -> bool:
        """Whether an entry averages all of its tokens."""
        return self.spec.window is None
