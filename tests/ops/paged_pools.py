"""Pools of pages with shuffled tables, poisoned wherever nothing is stored, and decoding by plain loops over them."""

import torch

from kvfold.ops.paged import DecodeBatch
from kvfold.ops.quantised import dequantise, page_width, quantise, scale_groups, storage_dtype

SOFTCAP = None, 3.0


class Pages:
    """Keys or values of a pool in one storage, NaN (or a code with a NaN scale) where nothing was written."""

    def __init__(self, storage, pages, slots, head_dim, dtype):
        self.storage, self.head_dim, self.dtype = storage, head_dim, dtype
        codes = storage_dtype(storage, dtype)
        self.codes = torch.full((pages, slots, page_width(storage, head_dim)), 77.0).to(codes)
        self.scales = None
        if storage in ("int8", "int4"):
            self.scales = torch.full((pages, slots, scale_groups(head_dim)), torch.nan, dtype=torch.float16)
        else:
            self.bytes().fill_(255)  # NaN in every float

    def bytes(self):
        return self.codes.view(-1).view(torch.uint8).view(self.codes.shape[0] * self.codes.shape[1], -1)

    def write(self, slots, vectors):
        """Write vectors [..., D] to as many slots."""
        vectors = vectors.reshape(-1, self.head_dim)
        slots = torch.as_tensor(slots, dtype=torch.int64).reshape(-1)
        codes, scales = quantise(vectors.to(self.dtype), self.storage)
        self.bytes()[slots] = codes.contiguous().view(torch.uint8)
        if scales is not None:
            self.scales.view(-1, scales.shape[-1])[slots] = scales

    def read(self):
        """All slots, flat, in fp64."""
        scales = None if self.scales is None else self.scales.flatten(0, 1)
        return dequantise(self.codes.flatten(0, 1), scales, self.storage, self.head_dim, torch.float32).double()

    def poison(self, slots):
        """NaN in one whole vector."""
        if self.scales is None:
            self.bytes()[slots] = 255
        else:
            self.scales.view(-1, self.scales.shape[-1])[slots] = torch.nan

    def copies(self):
        return self.codes.clone(), None if self.scales is None else self.scales.clone()


class Streams:
    """KV streams of chosen lengths over one shuffled pool; their stretches of the table lie in a shuffled order too."""

    def __init__(self, lengths, *, kv_heads, group, head_dim, slots=16, seed=0, room=1, spare_pages=3,
                 storage=("model", "model"), dtype=torch.float32):  # fmt: skip
        """`lengths`: one a sequence, or one list a sequence (a length a head). `room`: entries a stream can take beyond."""
        g = self.g = torch.Generator().manual_seed(seed)
        lengths = [one if isinstance(one, list) else [one] * kv_heads for one in lengths]
        self.batch, self.kv_heads, self.group, self.head_dim, self.slots, self.dtype = (
            len(lengths), kv_heads, group, head_dim, slots, dtype,
        )  # fmt: skip
        self.length = torch.tensor(lengths, dtype=torch.int32).view(self.batch, kv_heads)
        streams = [(b, h) for b in range(self.batch) for h in range(kv_heads)]
        pages_each = [-(-(lengths[b][h] + room) // slots) for b, h in streams]
        total = sum(pages_each) + spare_pages
        ids = torch.randperm(total, generator=g).int().tolist()
        nobodys = ids.pop()
        self.start = torch.zeros(self.batch, kv_heads, dtype=torch.int64)
        table = [nobodys]
        self.k, self.v = (Pages(one, total, slots, head_dim, dtype) for one in storage)
        self.score = torch.full((total, slots), torch.nan)
        self.bias = torch.full((total, slots), torch.nan, dtype=torch.float16)
        self.position = torch.full((total, slots), -7, dtype=torch.int32)
        self.slot_of = {}
        for place in torch.randperm(len(streams), generator=g).tolist():
            b, h = streams[place]
            pages = [ids.pop() for _ in range(pages_each[place])]
            self.start[b, h] = len(table)
            # A table entry that names no page of a stream points to a page that nobody holds.
            table += [*pages, nobodys]
            flat = [pages[i // slots] * slots + i % slots for i in range(lengths[b][h] + room)]
            self.slot_of.update({(b, h, i): slot for i, slot in enumerate(flat)})
            stored = flat[: lengths[b][h]]
            self.k.write(stored, self._random(len(stored), head_dim))
            self.v.write(stored, self._random(len(stored), head_dim))
            self.score.view(-1)[stored] = torch.arange(len(stored), dtype=torch.float32)
            self.bias.view(-1)[stored] = self._random(len(stored)).half()
            self.position.view(-1)[stored] = torch.randperm(len(stored), generator=g).int()
        self.table = torch.tensor(table, dtype=torch.int32)
        self.q = self._random(self.batch, kv_heads * group, head_dim)
        self.k_new, self.v_new = (self._random(self.batch, kv_heads, head_dim) for _ in range(2))

    def _random(self, *shape):
        return torch.randn(*shape, generator=self.g).to(self.dtype)

    def new_slots(self):
        """Book one more entry in each stream; the flat slots [B, K] it goes to."""
        slots = torch.tensor(
            [[self.slot_of[b, h, int(self.length[b, h])] for h in range(self.kv_heads)] for b in range(self.batch)]
        )
        self.bias.view(-1)[slots] = self._random(*slots.shape).half()
        self.position.view(-1)[slots] = self.length
        self.length += 1
        return slots

    def decode_batch(self, **changed):
        """A fresh copy of all tensors as `DecodeBatch`."""
        (k, k_scale), (v, v_scale) = self.k.copies(), self.v.copies()
        given = {
            "k_PND": k, "v_PND": v, "k_scale_PNS": k_scale, "v_scale_PNS": v_scale,
            "position_PN": self.position.clone(), "table_T": self.table.clone(), "start_BK": self.start.clone(),
            "length_BK": self.length.clone(), "max_length": int(self.length.max()) if self.batch else 0,
            "head_dim": self.head_dim, "slots_BK": None,
        }  # fmt: skip
        return DecodeBatch(**(given | changed))

    def by_loops(self, *, scale, softcap=None, apart=True, live=None, oldest=None, biased=False):
        """Output [B, H, D] and, for each (row, head), its weights summed over the group: those stored, then the new one."""
        out = torch.zeros(self.batch, self.kv_heads * self.group, self.head_dim, dtype=torch.float64)
        received = {}
        k, v, bias = self.k.read(), self.v.read(), self.bias.view(-1).double()
        for b in range(self.batch):
            for h in range(self.kv_heads):
                slots = [self.slot_of[b, h, i] for i in range(int(self.length[b, h]))]
                seen = [oldest is None or int(self.position.view(-1)[slot]) >= int(oldest[b]) for slot in slots]
                keys, values = k[slots], v[slots]
                biases = bias[slots] if biased else torch.zeros(len(slots)).double()
                if apart:
                    keys = torch.cat((keys, self.k_new[b, h].double()[None]))
                    values = torch.cat((values, self.v_new[b, h].double()[None]))
                    biases = torch.cat((biases, torch.zeros(1).double()))
                    seen.append(True)
                received[b, h] = torch.zeros(len(seen), dtype=torch.float64)
                places = [i for i, visible in enumerate(seen) if visible]
                if not places or (live is not None and not live[b]):
                    continue
                for head in range(h * self.group, (h + 1) * self.group):
                    logits = keys[places] @ self.q[b, head].double() * scale
                    weights = _softmax(logits, softcap, biases[places])
                    out[b, head] = weights @ values[places]
                    received[b, h][places] += weights
        return out, received


def _softmax(logits, softcap, biases):
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    logits = logits + biases
    powers = (logits - logits.max()).exp()
    return powers / powers.sum()
