"""One model under many methods: the weights stay, the layout of the cache changes."""

from collections.abc import Iterator
from contextlib import contextmanager

from kvfold.layout import KVLayout
from kvfold.models.decoder import FoldForCausalLM


@contextmanager
def folded(model: FoldForCausalLM, layout: KVLayout) -> Iterator[None]:
    """Inside, the model's new caches have this layout; afterwards its own is back."""
    own = model.config.layout
    model.config.layout = layout
    try:
        yield
    finally:
        model.config.layout = own


def reads_steps(layout: KVLayout) -> bool:
    """Whether what is kept depends on where calls are cut, so that text must be read one token a call."""
    return any(layout.time_of(owner).state_of == "steps" for owner in layout.owners)


def method_about(layout: KVLayout) -> dict[str, object]:
    """A method's text form, what people call it, and whether it was trained."""
    specs = [layout.time_of(owner) for owner in layout.owners]
    asked = [spec for spec, owner in zip(layout.time, layout.owners, strict=True) if layout.layers[owner].window is None]
    titles = list(dict.fromkeys(spec.title for spec in asked or layout.time))
    return {
        "method": layout.time_text(),
        "title": titles[0] if len(titles) == 1 else "mixed",
        "trained": any(spec.trained for spec in specs),
    }
