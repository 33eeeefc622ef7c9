"""Everything stays."""

from kvfold.policies.base import Policy


class FullPolicy(Policy):
    """Plain attention over all tokens.

    Source: arXiv 1706.03762, section 3.2.1, equation 1.
    Differs: none.
    """
