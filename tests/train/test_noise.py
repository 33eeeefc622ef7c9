from itertools import product

from kvfold.train.data import noise_key

FROZEN = [-3540555429304049131, 8388215379306925573, -2066904632073763065]


def test_keys_are_the_same_for_ever():
    """Runs of today must go on tomorrow: these numbers never change."""
    assert [noise_key(0, 0, 0), noise_key(1, 2, 3), noise_key(2**40, 10**6, 4095)] == FROZEN


def test_keys_are_signed_64_bit_and_differ():
    keys = [noise_key(*place) for place in product(range(5), range(40), range(40))]
    assert len(set(keys)) == len(keys)
    assert all(-(2**63) <= key < 2**63 for key in keys)
    assert noise_key(0, 1, 2) != noise_key(0, 2, 1) != noise_key(1, 0, 2)


def test_every_bit_is_set_half_the_time():
    keys = [noise_key(0, step, index) % 2**64 for step in range(50) for index in range(50)]
    for bit in range(64):
        assert 0.45 < sum(key >> bit & 1 for key in keys) / len(keys) < 0.55
