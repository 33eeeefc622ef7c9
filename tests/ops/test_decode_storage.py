"""The compiled decode attention against the plain form: every storage of pages, instruction set, head dim and group."""

import ctypes
import dataclasses
import itertools
from pathlib import Path

import pytest
import torch

from kvfold.ops import native, paged
from kvfold.ops.paged import decode_attention, decode_reference
from paged_pools import Streams

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
CLOSE = {
    torch.float32: {"atol": 3e-5, "rtol": 1e-4},
    torch.bfloat16: {"atol": 1e-2, "rtol": 1e-2},
    torch.float16: {"atol": 2e-3, "rtol": 2e-3},
}


@pytest.fixture(params=native.instruction_sets())
def isa(request, monkeypatch):
    """Compiles for one instruction set, and checks that the compiled form really ran."""
    monkeypatch.setenv("KVFOLD_ISA", request.param)
    monkeypatch.delenv("KVFOLD_NATIVE", raising=False)
    native.library.cache_clear()
    if native.library() is None:
        pytest.skip("no C compiler here: the compiled form can't be tested")
    assert native.library().isa == request.param
    monkeypatch.setattr(paged, "decode_reference", lambda *args, **kwargs: pytest.fail("the plain form ran"))
    yield request.param
    native.library.cache_clear()


def both(pool, *, new="apart", biased=False, oldest=None, live=None, softcap=None, scale=0.2):
    """Runs both forms and compares the output and everything that they write."""
    slots = pool.new_slots() if new == "written" else None
    given = (None, None) if new == "none" else (pool.k_new, pool.v_new)
    results = []
    for attend in (decode_attention, decode_reference):
        received = torch.zeros(pool.batch, pool.kv_heads, int(pool.length.max()) + 2)
        batch = pool.decode_batch(
            slots_BK=slots, score_PN=pool.score.clone(), received_BKE=received, received_old=True,
            bias_PN=pool.bias if biased else None, oldest_B=oldest, live_B=live,
        )  # fmt: skip
        out = attend(batch, pool.q, *given, scale=scale, softcap=softcap)
        assert out.dtype == pool.q.dtype
        results.append((out, batch.score_PN, received, batch))
    ours, theirs = results
    torch.testing.assert_close(ours[0], theirs[0], **CLOSE[pool.dtype])
    for mine, other in zip(ours[1:3], theirs[1:3], strict=True):
        torch.testing.assert_close(mine, other, atol=3e-4, rtol=1e-4, equal_nan=True)
    for name in ("k_PND", "v_PND", "k_scale_PNS", "v_scale_PNS"):
        mine, other = getattr(ours[3], name), getattr(theirs[3], name)
        assert mine is None or torch.equal(mine.view(torch.uint8), other.view(torch.uint8)), (
            f"{name} was written otherwise"
        )
    assert not ours[0].isnan().any() and ours[2].sum() > 0


def pool_of(lengths, k_kind, v_kind, **given):
    """Streams whose pages have two of `native.KINDS`; q has the keys' dtype where that is a model's."""
    storage = tuple("model" if kind in DTYPES else kind for kind in (k_kind, v_kind))
    dtype = DTYPES.get(k_kind) or DTYPES.get(v_kind) or torch.float32
    return Streams(lengths, storage=storage, dtype=dtype, **given)


@pytest.mark.parametrize("k_kind", native.KINDS)
def test_every_pair_of_storages(isa, k_kind):
    for v_kind in native.KINDS:
        if {k_kind, v_kind} <= set(DTYPES) and k_kind != v_kind:
            continue  # keys and values in two dtypes of a model: there is no such cache
        pool = pool_of([[75, 3], [1, 300]], k_kind, v_kind, kv_heads=2, group=3, head_dim=46, seed=len(v_kind))
        both(pool, new="written", biased=True)


HEAD_DIMS, GROUPS, SLOTS = (16, 46, 64, 80, 96, 128, 256, 1), (1, 2, 3, 4, 5, 8, 7, 16), (1, 7, 16, 32, 64)
FEATURES = (
    {"new": "apart"},
    {"new": "written", "biased": True},
    {"new": "none", "softcap": 3.0},
    {"new": "apart", "biased": True, "softcap": 3.0, "live": torch.tensor([True, False, True])},
    {"new": "written", "oldest": torch.tensor([60, 0, 900], dtype=torch.int32)},
    {"new": "written", "biased": True, "live": torch.tensor([True, True, False]), "softcap": 20.0},
    {"new": "none", "oldest": torch.tensor([5, 70, 990], dtype=torch.int32), "biased": True},
)


@pytest.mark.parametrize("kind", native.KINDS)
def test_sizes_and_features(isa, kind):
    """Every head dim with every kind of page; groups, page sizes and what is switched on take turns."""
    turns = zip(itertools.cycle(GROUPS), itertools.cycle(SLOTS), itertools.cycle(FEATURES), strict=False)
    shift = native.KINDS.index(kind)
    turns = itertools.islice(turns, shift, None)
    for head_dim, (group, slots, features) in zip(HEAD_DIMS, turns, strict=False):
        lengths = [[63, 0], [1, 64], [1001, 17]]
        pool = pool_of(lengths, kind, kind, kv_heads=2, group=group, head_dim=head_dim, slots=slots, seed=head_dim)
        both(pool, **features, scale=head_dim**-0.5)


def test_every_group_and_page_size(isa):
    for group, slots in itertools.product(range(1, 10), (1, 16)):
        pool = pool_of([[5, 290]], "fp32", "fp32", kv_heads=2, group=group, head_dim=32, slots=slots, seed=group)
        both(pool)


@pytest.mark.parametrize("kind", native.KINDS)
def test_poison_in_a_stored_key_or_value_shows(isa, kind):
    for name, place in itertools.product("kv", (0, 2, 16, 20)):
        pool = pool_of([21], kind, kind, kv_heads=1, group=3, head_dim=40)
        getattr(pool, name).poison(pool.slot_of[0, 0, place])
        out = decode_attention(pool.decode_batch(), pool.q, pool.k_new, pool.v_new, scale=0.02, softcap=None)
        assert out.isnan().any(dim=-1).all(), (name, place)


@pytest.mark.parametrize("kind", native.KINDS)
def test_hidden_poison_does_not(isa, kind):
    """Values that are too old are never read, not even for a weight of zero."""
    pool = pool_of([300], kind, kind, kv_heads=1, group=2, head_dim=40)
    old = [pool.slot_of[0, 0, i] for i in range(300) if pool.position.view(-1)[pool.slot_of[0, 0, i]] < 290]
    pool.k.poison(old), pool.v.poison(old)
    both(pool, oldest=torch.tensor([290], dtype=torch.int32))


def test_streams_of_no_length_beside_long_ones(isa):
    pool = pool_of([[0, 5000], [3000, 1]], "fp32", "fp32", kv_heads=2, group=3, head_dim=64, room=0)
    both(pool, new="none")
    out = decode_attention(pool.decode_batch(), pool.q, None, None, scale=0.1, softcap=None)
    assert not out[0, :3].any() and out[0, 3:].any(), "a stream without entries gives zeros"


def test_no_sequences():
    pool = Streams([], kv_heads=2, group=3, head_dim=64)
    for attend in (decode_attention, decode_reference):
        assert attend(pool.decode_batch(), pool.q, None, None, scale=0.1, softcap=None).shape == (0, 6, 64)


def test_it_makes_no_difference_how_many_threads_there_are(isa):
    pool = pool_of([[0, 5000], [3000, 1]], "int8", "bf16", kv_heads=2, group=2, head_dim=64, room=0)
    before, outs = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            outs.append(decode_attention(pool.decode_batch(), pool.q, None, None, scale=0.1, softcap=None))
    finally:
        torch.set_num_threads(before)
    for out in outs[1:]:
        torch.testing.assert_close(out, outs[0], **CLOSE[pool.dtype])


@pytest.fixture
def three_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


def test_torch_decides_how_many_threads_there_are(three_threads, monkeypatch):
    library = native.library()
    if library is None or not library.parallel:
        pytest.skip("no compiled form here, or none with OpenMP")
    asked = []
    work = ctypes.CFUNCTYPE(None, ctypes.c_void_p)

    @ctypes.CFUNCTYPE(None, work, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)
    def parallel(function, argument, threads, flags):
        asked.append(threads)
        function(argument)

    address = ctypes.cast(parallel, ctypes.c_void_p).value
    monkeypatch.setattr(native, "library", lambda *kinds: dataclasses.replace(library, parallel=address))
    for lengths in ([[3000, 4000]], [[3, 4]]):
        both(pool_of(lengths, "fp32", "fp32", kv_heads=2, group=2, head_dim=64))
    assert asked == [3], "a small call is not worth waking threads for"


def test_torch_and_the_kernel_share_one_pool_of_threads(three_threads):
    tasks = Path("/proc/self/task")
    library = native.library()
    if library is None or not library.parallel or not tasks.exists():
        pytest.skip("no compiled form here, none with OpenMP, or no /proc")
    torch.ones(1 << 22).add_(1)
    before = len(list(tasks.iterdir()))
    pool = pool_of([[3000, 4000]], "fp32", "fp32", kv_heads=2, group=2, head_dim=64)
    decode_attention(pool.decode_batch(), pool.q, None, None, scale=0.1, softcap=None)
    assert len(list(tasks.iterdir())) == before
