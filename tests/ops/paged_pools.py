"""Pools of pages with shuffled tables, poisoned wherever nothing is stored, and decoding by plain loops over them."""

import torch

from kvfold.ops.paged import DecodeLanes

SOFTCAP = None, 3.0


class Lanes:
    """Lanes of chosen lengths over one shuffled pool: [rows in the pool, kv heads], read by `rows` in a shuffled order."""

    def __init__(self, lengths, *, kv_heads, group, head_dim, slots=16, seed=0, room=1, spare_rows=2, spare_pages=3):
        """`lengths`: one a row, or one list a row (a length a head). `room`: entries a lane can take beyond."""
        g = self.g = torch.Generator().manual_seed(seed)
        lengths = [one if isinstance(one, list) else [one] * kv_heads for one in lengths]
        self.batch, self.kv_heads, self.group, self.head_dim, self.slots = (
            len(lengths),
            kv_heads,
            group,
            head_dim,
            slots,
        )
        self.rows = torch.randperm(self.batch + spare_rows, generator=g)[: self.batch]
        self.length = torch.zeros(self.batch + spare_rows, kv_heads, dtype=torch.int32)
        self.length[self.rows] = torch.tensor(lengths, dtype=torch.int32)
        pages_each = [[-(-(one + room) // slots) for one in row] for row in lengths]
        width = max(max(row) for row in pages_each) + 1
        total = sum(map(sum, pages_each)) + spare_pages
        ids = torch.randperm(total, generator=g).int().tolist()
        # Table entries that name no page of the lane point anywhere: to a page that nobody holds.
        self.table = torch.full((self.batch + spare_rows, kv_heads, width), ids[-1], dtype=torch.int32)
        self.k, self.v = (torch.full((total, slots, head_dim), torch.nan) for _ in range(2))
        self.score = torch.full((total, slots), torch.nan)
        self.position = torch.full((total, slots), -7, dtype=torch.int32)
        self.slot_of = {}
        for b, row in enumerate(self.rows.tolist()):
            for h in range(kv_heads):
                pages = [ids.pop(0) for _ in range(pages_each[b][h])]
                self.table[row, h, : len(pages)] = torch.tensor(pages, dtype=torch.int32)
                number = lengths[b][h]
                flat = [pages[i // slots] * slots + i % slots for i in range(number + room)]
                self.slot_of.update({(b, h, i): slot for i, slot in enumerate(flat)})
                stored = flat[:number]
                self.k.view(-1, head_dim)[stored] = self._random(number, head_dim)
                self.v.view(-1, head_dim)[stored] = self._random(number, head_dim)
                self.score.view(-1)[stored] = torch.arange(number, dtype=torch.float32)
                self.position.view(-1)[stored] = torch.randperm(number, generator=g).int()
        self.q = self._random(self.batch, kv_heads * group, head_dim)
        self.k_new, self.v_new = (self._random(self.batch, kv_heads, head_dim) for _ in range(2))

    def _random(self, *shape):
        return torch.randn(*shape, generator=self.g)

    def new_slots(self):
        """Book one more entry in each lane; the flat slots [B, K] it goes to."""
        slots = torch.tensor(
            [[self.slot_of[b, h, int(self.length[row, h])] for h in range(self.kv_heads)]
             for b, row in enumerate(self.rows.tolist())]
        )  # fmt: skip
        self.length[self.rows] += 1
        return slots

    def lanes(self, **changed):
        """A fresh copy of all tensors as `DecodeLanes`."""
        longest = int(self.length[self.rows].max()) if self.batch else 0
        given = {
            "k_PND": self.k.clone(), "v_PND": self.v.clone(), "position_PN": self.position.clone(), "score_PN": None,
            "table_RKM": self.table.clone(), "length_RK": self.length.clone(), "rows_B": self.rows,
            "max_length": longest, "slots_BK": None, "live_B": None,
        }  # fmt: skip
        return DecodeLanes(**(given | changed))

    def by_loops(self, *, scale, softcap=None, apart=True, live=None, oldest=None):
        """Output [B, H, D] and, for each (row, head), its weights summed over the group: those stored, then the new one."""
        out = torch.zeros(self.batch, self.kv_heads * self.group, self.head_dim, dtype=torch.float64)
        received = {}
        k, v = self.k.view(-1, self.head_dim).double(), self.v.view(-1, self.head_dim).double()
        for b, row in enumerate(self.rows.tolist()):
            for h in range(self.kv_heads):
                slots = [self.slot_of[b, h, i] for i in range(int(self.length[row, h]))]
                seen = [oldest is None or int(self.position.view(-1)[slot]) >= int(oldest[b]) for slot in slots]
                keys, values = k[slots], v[slots]
                if apart:
                    keys, values = (
                        torch.cat((keys, self.k_new[b, h][None])),
                        torch.cat((values, self.v_new[b, h][None])),
                    )
                    seen.append(True)
                received[b, h] = torch.zeros(len(seen), dtype=torch.float64)
                places = [i for i, visible in enumerate(seen) if visible]
                if not places or (live is not None and not live[b]):
                    continue
                for head in range(h * self.group, (h + 1) * self.group):
                    weights = _softmax(keys[places] @ self.q[b, head].double() * scale, softcap)
                    out[b, head] = weights @ values[places]
                    received[b, h][places] += weights
        return out, received


def _softmax(logits, softcap):
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    powers = (logits - logits.max()).exp()
    return powers / powers.sum()
