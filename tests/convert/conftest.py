"""The fixtures of tiny_pairs.py, for the tests of this folder."""

from tiny_pairs import _small, both, ids, ours, pair

__all__ = ["_small", "both", "ids", "ours", "pair"]
