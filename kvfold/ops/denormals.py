"""Numbers too small for their exponent, which a CPU takes many times as long over as others."""

import torch

_SPREAD = 1 << 20
"""Elements that PyTorch shares out to all of its threads."""


def flush_denormals() -> bool:
    """From here on a CPU takes numbers below 1e-38 for zero. True if it does so in all threads.

    Gates that have learned to let go give keys a bias of about -90, and the weight of such a key is such a number: without
    this, much of a retrofit's time goes to them. Threads take the setting over from the one that starts them and keep it, so
    call this before PyTorch has computed anything large; a processor that can't do it gives False.
    """
    torch.set_flush_denormal(True)
    # Every thread multiplies its part.
    return not (torch.full((_SPREAD,), 1e-30) * 1e-10).any().item()
