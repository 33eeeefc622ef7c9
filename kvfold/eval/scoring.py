"""What a model says of the next token: loss, and how far its distribution is from another one's.

Logits of all positions at once would be gigabytes, so the states before the head are what is passed about, and the head
is applied slice by slice. Letters: N positions, C model width, V vocabulary.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from kvfold.models.decoder import FoldForCausalLM

_SLICE_BYTES = 2**25
"""Bytes of one slice of fp32 logits, about what a processor's cache holds."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Scores:
    """One value a position, fp32 [N] on the CPU."""

    loss: Tensor
    """Nats: minus the log probability of the token that came."""
    kl: Tensor | None
    """Nats: KL(reference || ours), the reference's distribution being the one expected under."""
    agrees: Tensor | None
    """1 where both have the same likeliest token."""


def next_token_logits(model: FoldForCausalLM, hidden_NC: Tensor) -> Tensor:
    """Logits [N, V], fp32, of states behind the last norm."""
    logits = model.lm_head(hidden_NC)
    scale, softcap = model.config.logit_scale, model.config.final_logit_softcap
    logits = logits if scale == 1.0 else logits * scale
    return (logits if softcap is None else torch.tanh(logits / softcap) * softcap).float()


def score(
    model: FoldForCausalLM,
    hidden_NC: Tensor,
    targets_N: Tensor,
    reference: tuple[FoldForCausalLM, Tensor] | None = None,
) -> Scores:
    """Score states against the tokens that came, and against a reference: a model and its states at the same positions."""
    slice_size = max(1, _SLICE_BYTES // (4 * model.config.vocab_size))
    loss, kl, agrees = [], [], []
    for start in range(0, hidden_NC.shape[0], slice_size):
        part = slice(start, start + slice_size)
        logits = next_token_logits(model, hidden_NC[part])
        log_p = torch.log_softmax(logits, dim=-1)
        loss.append(-log_p.gather(1, targets_N[part, None])[:, 0])
        if reference is not None:
            judge, states_NC = reference
            log_r = torch.log_softmax(next_token_logits(judge, states_NC[part]), dim=-1)
            agrees.append((log_p.argmax(dim=-1) == log_r.argmax(dim=-1)).float())
            # In place: these two arrays are as large as the logits.
            log_p.neg_().add_(log_r)
            kl.append(torch.einsum("nv,nv->n", log_r.exp_(), log_p))
    return Scores(
        loss=torch.cat(loss).cpu(),
        kl=torch.cat(kl).cpu() if kl else None,
        agrees=torch.cat(agrees).cpu() if agrees else None,
    )


def likelihoods(model: FoldForCausalLM, hidden_NC: Tensor, targets_N: Tensor) -> tuple[Tensor, Tensor]:
    """Of the tokens that came: their log probability, fp32 [N], nats, and whether each was the likeliest, bool [N]."""
    slice_size = max(1, _SLICE_BYTES // (4 * model.config.vocab_size))
    log_p, likeliest = [], []
    for start in range(0, hidden_NC.shape[0], slice_size):
        logits = next_token_logits(model, hidden_NC[start : start + slice_size])
        targets = targets_N[start : start + slice_size]
        log_p.append(torch.log_softmax(logits, dim=-1).gather(1, targets[:, None])[:, 0])
        likeliest.append(logits.argmax(dim=-1) == targets)
    return torch.cat(log_p), torch.cat(likeliest)
