"""One decoding step of a bank: where the new token of each row goes, booked for all owners at once.

Methods that decide by the tokens alone know the place before attention (`PlacedStep`): the token is written first and
then attended to. Methods that score by attention (`WeighedStep`) attend to the new token from where it lies, and find
its place when the last reader is done. Letters as in bank.py; E = S + 1, the new token last.
"""

import torch
from torch import Tensor

from kvfold.cache.bank import Bank
from kvfold.policies.base import Entries


class PlacedStep:
    """The token goes into the slot of the one it displaces, or behind the others."""

    def __init__(self, bank: Bank, rows_B: Tensor, position_B: Tensor, live_B: Tensor | None, stored: int):
        """Books pages, positions and lengths. `stored`: no lane holds more entries before this step."""
        slots, pool = bank.pool.slots, bank.pool
        lanes_OBK = bank.lanes(rows_B)
        self._bank, self._lanes_OBK, self._live_B, self._position_B = bank, lanes_OBK, live_B, position_B
        place = self._displaced(position_B, stored)
        length = bank.length.view(-1)[lanes_OBK].long()
        grows = place == length
        if live_B is not None:
            grows &= live_B[:, None]
        if bank.has_shared:
            bank.privatise(lanes_OBK, open_only=not bank.spec.lossy)
        border = grows & (length % slots == 0)
        if bool(border.any()):
            bank.extend(lanes_OBK[border], length[border] // slots, torch.ones_like(length[border]))
        self._placed(place)
        if live_B is not None:
            # The place of a dead row may lie past the table; nothing is written there.
            place = place.masked_fill(~live_B[:, None], 0)
        flat = bank.table_flat()[lanes_OBK, place // slots].long() * slots + place % slots
        position = position_B.int()[:, None].expand_as(flat)
        if live_B is None:
            pool.position.view(-1)[flat] = position
        else:
            chosen = live_B[:, None].expand_as(flat)
            pool.position.view(-1)[flat[chosen]] = position[chosen]
            flat = flat.masked_fill(~chosen, -1)
        bank.length.view(-1)[lanes_OBK] = (length + grows).int()
        self.of_owners = flat
        """Where the new token of each lane was put, a flat slot, int64 [O, B, K]; -1 for a dead row."""
        self.longest = stored + 1

    def _placed(self, place_OBK: Tensor) -> None:
        """The places are settled: for methods that take note of them."""

    def _displaced(self, position_B: Tensor, stored: int) -> Tensor:
        """The place of each lane's new token, [O, B, K]: the slot of a dropped entry, else the lane's length."""
        bank, lanes_OBK, live_B = self._bank, self._lanes_OBK, self._live_B
        if not (bank.spec.lossy and stored):
            return bank.length.view(-1)[lanes_OBK].long()
        owners, batch, heads = lanes_OBK.shape
        flat, filled = bank.stored_slots(lanes_OBK, stored)
        position = bank.pool.position.view(-1)[flat].masked_fill(~filled, -1)
        new = position_B.int()[:, None, None].expand(owners, batch, heads, 1)
        entries = Entries(
            position_BKE=torch.cat((position, new), dim=-1).flatten(0, 1),
            score_BKE=None,
            seen_B=(position_B + 1).repeat(owners),
        )
        gone = filled & ~_kept(bank, entries, owners)[..., :-1]
        if live_B is not None:
            gone &= live_B[:, None, None]
        return _place(bank, lanes_OBK, gone)


class WeighedStep:
    """The token waits beside the store; what its attention tells decides what stays."""

    def __init__(
        self, bank: Bank, rows_B: Tensor, position_B: Tensor, live_B: Tensor | None, stored: int, head_dim: int
    ):
        """See `PlacedStep`."""
        self._bank, self._position_B, self._live_B, self._stored = bank, position_B, live_B, stored
        self._lanes_OBK = bank.lanes(rows_B)
        if bank.has_shared:
            bank.privatise(self._lanes_OBK)
        shape, pool = self._lanes_OBK.shape, bank.pool
        self.k_OBKD, self.v_OBKD = (pool.k.new_empty((*shape, head_dim)) for _ in range(2))
        self.wants_old = bank.policy.weights == "last"
        columns = stored + 1 if self.wants_old else 1
        self.of_owners = torch.zeros((*shape, columns), dtype=torch.float32, device=pool.device)
        """Weights that entries receive in this step, fp32 [O, B, K, E or 1]."""
        self.longest = stored

    def close(self) -> None:
        """Ask the policy, then store the new token (or not) and drop what must go."""
        bank, lanes, stored = self._bank, self._lanes_OBK, self._stored
        owners, batch, heads = lanes.shape
        flat, filled = bank.stored_slots(lanes, stored)
        position = bank.pool.position.view(-1)[flat].masked_fill(~filled, -1)
        new = self._position_B.int()[:, None, None].expand(owners, batch, heads, 1)
        if self._live_B is not None:
            new = new.masked_fill(~self._live_B[:, None, None], -1)
        score = self.of_owners
        if not self.wants_old:
            score = torch.cat((bank.pool.score.view(-1)[flat], score), dim=-1)
        entries = Entries(
            position_BKE=torch.cat((position, new), dim=-1).flatten(0, 1),
            score_BKE=score.flatten(0, 1),
            seen_B=(self._position_B + 1).repeat(owners),
        )
        keep = _kept(bank, entries, owners)
        gone = filled & ~keep[..., :-1]
        stays = keep[..., -1] & (new[..., 0] >= 0)
        if self._live_B is not None:
            gone &= self._live_B[:, None, None]
        self._store(_place(bank, lanes, gone, stays), stays)

    def _store(self, place: Tensor, stays: Tensor) -> None:
        bank, lanes, slots = self._bank, self._lanes_OBK, self._bank.pool.slots
        length = bank.length.view(-1)[lanes].long()
        grows = stays & (place == length)
        border = grows & (length % slots == 0)
        bank.extend(lanes[border], length[border] // slots, torch.ones_like(length[border]))
        page = bank.table_flat()[lanes, place.masked_fill(~stays, 0) // slots]
        flat, pool = (page.long() * slots + place % slots).reshape(-1), bank.pool
        stored = slice(None) if bool(stays.all()) else stays.reshape(-1)
        flat = flat[stored]
        for array, new in ((pool.k, self.k_OBKD), (pool.v, self.v_OBKD)):
            array.view(-1, array.shape[-1]).index_copy_(0, flat, new.flatten(0, 2)[stored])
        position = self._position_B.int()[:, None].expand_as(stays).reshape(-1)
        pool.position.view(-1).index_copy_(0, flat, position[stored])
        if pool.score is not None:
            pool.score.view(-1).index_copy_(0, flat, self.of_owners[..., -1].reshape(-1)[stored])
        bank.length.view(-1)[lanes] = (length + grows).int()


def _kept(bank: Bank, entries: Entries, owners: int) -> Tensor:
    """The policy's answer as bool [O, B, K, E]."""
    keep = bank.policy.keep(entries)
    if keep is None:
        keep = torch.ones_like(entries.position_BKE, dtype=torch.bool)
    return keep.view(owners, -1, *keep.shape[1:])


def _place(bank: Bank, lanes_OBK: Tensor, gone_OBKS: Tensor, stays_OBK: Tensor | None = None) -> Tensor:
    """Where the new token of each lane goes. One entry gone and one come: it takes that slot, and nothing else moves.
    Any other number gone: the lane is closed up, and the token goes behind.
    """
    if gone_OBKS.shape[-1] == 0:
        return bank.length.view(-1)[lanes_OBK].long()
    number = gone_OBKS.sum(dim=-1)
    uneven = number > 1 if stays_OBK is None else number > stays_OBK.long()
    if bool(uneven.any()):
        bank.drop(lanes_OBK[uneven], ~gone_OBKS[uneven])
        number = number.masked_fill(uneven, 0)
    length = bank.length.view(-1)[lanes_OBK].long()
    return torch.where(number == 1, gone_OBKS.to(torch.uint8).argmax(dim=-1), length)
