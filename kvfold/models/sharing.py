"""Layers that share for a while: a model that has keys and values in every layer, read as if some layers had none."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from kvfold.layout.kvlayout import KVLayout


class SharingDecoder:
    """Mixed into the bare decoder."""

    _sharing: KVLayout | None = None

    @property
    def dense_layout(self) -> KVLayout:
        """Who reads whom in a call without a cache."""
        return self.config.layout if self._sharing is None else self._sharing

    def refuse_cache(self, given: Any) -> None:
        """Raises `ValueError` for a cache: what it holds is laid out as the weights are."""
        if given is not None:
            raise ValueError(
                "past_key_values while layers share for a while: convert the model, or leave the cache out"
            )


class SharingModel:
    """Mixed into the language model."""

    @contextmanager
    def sharing(self, layout: KVLayout) -> Iterator[None]:
        """Inside, calls read keys and values as `layout` says and take no cache. Its owners are owners in the model, too; what
        its readers would store is worked out and not used. The result is that of the model converted with `drop`.
        """
        was, self.model._sharing = (
            self.model._sharing,
            self.config.layout.with_owners([one.owner for one in layout.layers]),
        )
        try:
            yield
        finally:
            self.model._sharing = was
