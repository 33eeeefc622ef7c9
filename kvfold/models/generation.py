"""What `generate` needs of a kvfold model beyond a plain forward."""


class FoldGeneration:
    """Mixed into the language model before transformers' own generation."""
