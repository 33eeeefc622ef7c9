"""DMC and DMS by their definitions: one text, one token, one head at a time, over the weights of a small Llama-shaped model.

Nothing of kvfold's gates, views, pooling or store is used here: only weights, the layout and the gates' settings.
"""

import torch

from kvfold.models.decoder import FoldForCausalLM


def rms(x: torch.Tensor, norm: torch.nn.Module, eps: float) -> torch.Tensor:
    return x / torch.sqrt((x * x).mean(dim=-1, keepdim=True) + eps) * norm.weight


def turned(x: torch.Tensor, position: int) -> torch.Tensor:
    """One head [D] turned to its position, pair by pair."""
    out, half = x.clone(), x.shape[0] // 2
    for i in range(half):
        angle = torch.tensor(position / 10000.0 ** (i / half))
        out[i] = x[i] * angle.cos() - x[i + half] * angle.sin()
        out[i + half] = x[i + half] * angle.cos() + x[i] * angle.sin()
    return out


def freed(x: torch.Tensor, position: int, channel: int | None) -> torch.Tensor:
    """Turned, with a channel zeroed before and after."""
    if channel is None:
        return turned(x, position)
    x = x.clone()
    x[channel] = 0
    x = turned(x, position)
    x[channel] = 0
    return x


def dmc_sets(k, v, logit, weight, window, channel, alone) -> list[list[tuple]]:
    """Of one head: the (k, v, position) that each query sees. k [T, D] before rotary positions."""
    seen, entries, segment = [], [], []
    for t in range(k.shape[0]):
        if t > alone and logit[t] > 0:
            entries.pop()
        else:
            segment = []
        segment.append(t)
        if window is not None:
            segment = segment[-window:]
        total = sum(weight[i] for i in segment)
        mean_k, mean_v = (sum(weight[i] * x[i] for i in segment) / total for x in (k, v))
        entries.append((freed(mean_k, t, channel), mean_v, t))
        seen.append(list(entries))
    return seen


def dms_sets(k, v, logit, delay, reads_next) -> list[list[tuple]]:
    """Of one head: the (k, v, position) that each query sees."""
    tokens, seen = k.shape[0], []
    keys = [turned(k[i], i) for i in range(tokens)]
    for t in range(tokens):
        visible = []
        for i in range(t + 1):
            judge = i + 1 if reads_next else i
            flagged = judge <= t and bool(logit[judge] > 0)
            if t - i <= delay or not flagged:
                visible.append((keys[i], v[i], i))
        seen.append(visible)
    return seen


def owner_sets(layer, model, normed, hidden, q) -> tuple[list, list[list[list[tuple]]]]:
    """The raw decision logits [K][T] and what each head's queries see, [K][T]."""
    config, attention = model.config, layer.self_attn
    gates, spec = config.gates, config.layout.time_of(attention.layer)
    dim, tokens = config.head_dim, normed.shape[0]
    k, v = (proj(normed).view(tokens, -1, dim) for proj in (attention.k_proj, attention.v_proj))
    heads, group = k.shape[1], q.shape[1] // k.shape[1]
    if spec.name == "full":
        return [], [dms_sets(k[:, h], v[:, h], torch.full((tokens,), -1.0), 1, False) for h in range(heads)]
    if gates["source"] == "adapter":
        raw = attention.fold_proj(rms(hidden, attention.fold_norm, config.rms_norm_eps))
    elif spec.name == "dmc":
        raw = k[:, :, gates["channel"]]
    else:
        raw = torch.stack([q[:, h * group, gates["channel"]] for h in range(heads)], dim=1)
    logit = raw * gates["scale"] - gates["offset"]
    if gates["per"] == "layer":
        logit = logit[:, :1].expand(-1, heads)
    sets = []
    for h in range(heads):
        if spec.name == "dms":
            sets.append(dms_sets(k[:, h], v[:, h], logit[:, h], spec.delay, gates["reads"] == "next"))
            continue
        mean = sum(q[:, h * group + g, gates["channel"]] for g in range(group)) / group
        weight = torch.sigmoid(mean * gates["scale"] + 5.0) + 2.0**-7
        sets.append(dmc_sets(k[:, h], v[:, h], logit[:, h], weight, spec.window, gates["channel"], spec.alone))
    return [logit[:, h] for h in range(heads)], sets


def slow_gated(model: FoldForCausalLM, ids: torch.Tensor) -> tuple[torch.Tensor, list, float]:
    """Logits [T, V] of one text, the positions that are held in the end [owner][kv head], and the least |decision logit|."""
    config, eps = model.config, model.config.rms_norm_eps
    hidden, sets, held, least = model.model.embed_tokens.weight[ids], {}, [], float("inf")
    for index, layer in enumerate(model.model.layers):
        attention, owner = layer.self_attn, config.layout.owner_of(index)
        normed = rms(hidden, layer.input_layernorm, eps)
        q = attention.q_proj(normed).view(len(ids), -1, config.head_dim)
        if owner == index:
            logits, sets[owner] = owner_sets(layer, model, normed, hidden, q)
            least = min([least, *(float(x.abs().min()) for x in logits)])
            held.append([[p for _, _, p in head[-1]] for head in sets[owner]])
        spec, group = config.layout.time_of(owner), q.shape[1] // len(sets[owner])
        attended = torch.zeros_like(q)
        for head in range(q.shape[1]):
            channel = None
            if spec.name == "dmc" or (
                spec.name == "dms" and config.gates["source"] == "channel" and owner == index and head % group == 0
            ):
                channel = config.gates["channel"]
            for t, visible in enumerate(sets[owner][head // group]):
                keys, values = (torch.stack([entry[i] for entry in visible]) for i in (0, 1))
                weights = (keys @ freed(q[t, head], t, channel) / config.head_dim**0.5).softmax(dim=0)
                attended[t, head] = weights @ values
        hidden = hidden + attention.o_proj(attended.flatten(1))
        normed, mlp = rms(hidden, layer.post_attention_layernorm, eps), layer.mlp
        hidden = hidden + mlp.down_proj(torch.nn.functional.silu(mlp.gate_proj(normed)) * mlp.up_proj(normed))
    return model.lm_head(rms(hidden, model.model.norm, eps)), held, least
