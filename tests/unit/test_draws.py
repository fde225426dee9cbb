"""Random numbers as a pure function: the same wherever, whenever and in whatever order they are drawn."""

import math
from collections import Counter
from itertools import islice, pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from swinv2_scale.draws import Draw, key_of, mix, normal, permuted, uniform

# The machines that run this are shared: no example may fail for being slow.
thorough = settings(deadline=None, max_examples=100, database=None)
int64s = st.integers(-(2**63), 2**63 - 1)


class SplitMix64:
    """The reference generator, written from its paper (Steele, Lea, Flood 2014) with a state that moves on."""

    def __init__(self, seed: int) -> None:
        self.state = seed % 2**64

    def next(self) -> int:
        self.state = (self.state + 0x9E3779B97F4A7C15) % 2**64
        z = self.state
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
        return z ^ (z >> 31)


def test_the_reference_of_these_tests_gives_the_published_numbers():
    # The usual test vector of SplitMix64: seed 1234567.
    generator = SplitMix64(1234567)
    assert [generator.next() for _ in range(5)] == [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]


@given(seed=st.integers(0, 2**64 - 1))
@thorough
def test_mix_is_the_first_output_of_splitmix64(seed):
    assert mix(seed) == SplitMix64(seed).next()


# uniform


@given(keys=st.lists(int64s, min_size=1, max_size=20), stream=st.integers(0, 300))
@thorough
def test_uniform_is_the_top_24_bits_of_the_streams_splitmix64_output(keys, stream):
    expected = []
    for key in keys:
        generator = SplitMix64(key)
        outputs = [generator.next() for _ in range(stream + 1)]
        expected.append((outputs[-1] >> 40) / 2**24)
    got = uniform(torch.tensor(keys, dtype=torch.int64), stream)
    assert got.dtype == torch.float32
    assert got.tolist() == expected  # 24 bits fit a float32 exactly: no tolerance


@pytest.mark.parametrize("key", [0, 1, -1, 2**63 - 1, -(2**63), -(2**62)])
def test_uniform_stays_below_one_for_extreme_keys(key):
    values = torch.stack([uniform(torch.tensor([key]), stream) for stream in range(200)])
    assert values.min() >= 0
    assert values.max() < 1


def test_uniform_of_a_key_does_not_depend_on_its_neighbours():
    keys = torch.arange(-50, 50)
    together = uniform(keys, 3)
    alone = torch.cat([uniform(key[None], 3) for key in keys])
    assert torch.equal(together, alone)


def test_uniform_numbers_are_spread_evenly():
    # 65536 consecutive keys, the hardest input for a hash; nothing here is random, so the test can't flicker.
    values = uniform(torch.arange(2**16), 0).double()
    count = len(values)
    # Of honest uniform numbers, 5 standard errors would be exceeded once in two million trials.
    assert abs(values.mean().item() - 1 / 2) < 5 * math.sqrt(1 / 12 / count)
    assert abs(values.var().item() - 1 / 12) < 5 * math.sqrt(1 / 180 / count)
    bins = torch.histc(values, 64, 0, 1)
    chi_square = ((bins - count / 64) ** 2 / (count / 64)).sum().item()
    # 63 degrees of freedom: mean 63, standard deviation sqrt(126); both tails, for too even is not random either.
    assert abs(chi_square - 63) < 5 * math.sqrt(126)


def test_uniform_numbers_of_neighbouring_keys_and_streams_are_unrelated():
    keys = torch.arange(2**16)
    streams = torch.stack([uniform(keys, stream).double() for stream in range(4)])
    by_key = torch.stack([streams[0, :-1], streams[0, 1:]])
    # The correlation of n independent pairs has standard deviation 1 / sqrt(n); 5 of them, as above.
    bound = 5 / math.sqrt(2**16)
    correlations = torch.corrcoef(streams) - torch.eye(4, dtype=torch.float64)
    assert correlations.abs().max() < bound
    assert torch.corrcoef(by_key)[0, 1].abs() < bound


# permuted


@pytest.mark.parametrize("key", [0, 1, 2**63, 2**64 - 1, 0x123456789ABCDEF])
@pytest.mark.parametrize(
    "sizes",
    [range(1, 130), [255, 256, 257], [1000, 1023, 1024, 1025], [4095, 4096, 4097]],
    ids=["up to 129", "about 2**8", "about 2**10", "about 2**12"],
)
def test_permuted_is_a_bijection(sizes, key):
    for size in sizes:
        assert sorted(permuted(index, size, key) for index in range(size)) == list(range(size))


@given(size=st.integers(1, 2**48), key=st.integers(0, 2**64 - 1), data=st.data())
@thorough
def test_permuted_sends_different_indices_of_any_size_to_different_places_inside(size, key, data):
    indices = data.draw(st.lists(st.integers(0, size - 1), unique=True, max_size=20))
    places = [permuted(index, size, key) for index in indices]
    assert all(0 <= place < size for place in places)
    assert len(set(places)) == len(indices)


def test_another_key_gives_another_permutation():
    orders = {tuple(permuted(i, 50, key_of(seed)) for i in range(50)) for seed in range(100)}
    assert len(orders) == 100


@pytest.mark.parametrize("size", [2, 3, 4])
def test_every_order_of_a_few_things_is_possible(size):
    orders = {tuple(permuted(i, size, key_of(seed)) for i in range(size)) for seed in range(1000)}
    assert len(orders) == math.factorial(size)


def test_an_index_lands_anywhere_equally_often():
    size, trials = 64, 8192
    counts = Counter(permuted(5, size, key_of("trial", trial)) for trial in range(trials))
    expected = trials / size
    chi_square = sum((counts[place] - expected) ** 2 / expected for place in range(size))
    # 63 degrees of freedom: mean 63, standard deviation sqrt(126); 5 of them. The keys are fixed: no flicker.
    assert abs(chi_square - 63) < 5 * math.sqrt(126)


def test_neighbours_are_scattered():
    size = 10_000
    places = [permuted(index, size, key_of("scatter")) for index in range(size)]
    distance = sum(abs(a - b) for a, b in pairwise(places)) / (size - 1)
    # Two random places lie a third of the size apart, +- 0.236 size / sqrt(n) on average; 5 of those, and the
    # neighbours' distances share places, for which another factor 2 is more than enough.
    assert abs(distance / size - 1 / 3) < 2 * 5 * 0.236 / math.sqrt(size)


# Draw


def test_a_draw_does_not_depend_on_what_was_drawn_before():
    first = Draw(1, 2, "a")
    crop, mask = first.generator("crop").random(5), first.generator("mask").random(5)
    second = Draw(1, 2, "a")
    np.testing.assert_array_equal(second.generator("mask").random(5), mask)
    Draw(9, 9, "other").generator("crop").random(100)
    np.testing.assert_array_equal(second.generator("crop").random(5), crop)


def test_every_generator_starts_afresh():
    draw = Draw(0, 0, "a")
    assert draw.generator("crop").random() == draw.generator("crop").random()


@pytest.mark.parametrize(
    "other",
    [Draw(1, 0, "a"), Draw(0, 1, "a"), Draw(0, 0, "b"), Draw(0, "0", "a"), Draw(0, "validation", "a")],
)
def test_seed_epoch_and_sample_all_count(other):
    this = Draw(0, 0, "a")
    assert this.key("crop") != other.key("crop")
    assert this.generator("crop").random() != other.generator("crop").random()


def test_purposes_have_unrelated_numbers():
    draws = [Draw(0, 0, str(sample)) for sample in range(4000)]
    crop = [draw.generator("crop").random() for draw in draws]
    mask = [draw.generator("mask").random() for draw in draws]
    # The correlation of n independent pairs has standard deviation 1 / sqrt(n); 5 of them.
    assert abs(np.corrcoef(crop, mask)[0, 1]) < 5 / math.sqrt(len(draws))


@given(seed=st.integers(0, 2**32), sample=st.integers(0, 10**9))
@thorough
def test_the_key_for_tensors_is_the_same_64_bits_with_a_sign(seed, sample):
    draw = Draw(seed, 0, str(sample))
    signed = draw.tensor_key("drop_path")
    assert signed % 2**64 == draw.key("drop_path")
    assert torch.tensor(signed, dtype=torch.int64).item() == signed


def test_a_sample_whose_name_is_not_utf8_has_numbers_too():
    # What tarfile and os.listdir make of a name with the Latin-1 byte E9.
    name = b"caf\xe9".decode("utf-8", "surrogateescape")
    assert Draw(0, 0, name).key("mask") != Draw(0, 0, "caf").key("mask")


# key_of


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ((1, 23), (12, 3)),
        ((1, 2), (12,)),
        (("a", "bc"), ("ab", "c")),
        (("a", ""), ("a",)),
        (("", "a"), ("a", "")),
        ((), ("",)),
        ((1,), ("1",)),
        (("1", 2), (1, "2")),
        ((-1, 1), (-11,)),
        (("a", "b"), ("b", "a")),
        (("a:b",), ("a", "b")),
        (("int:1",), (1,)),
        (("a,str:b",), ("a", "b")),
        (("a\0b",), ("a", "b")),
        (("a\0str:b",), ("a", "b")),
        (("a\0int:1",), ("a", 1)),
    ],
)
def test_keys_do_not_collide_by_concatenation(one, other):
    assert key_of(*one) != key_of(*other)


parts = st.lists(st.one_of(st.integers(), st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]))))


@given(one=parts, other=parts)
@thorough
def test_keys_are_alike_exactly_where_all_parts_are(one, other):
    # Two different texts share a 64-bit hash once in 2**64.
    assert (key_of(*one) == key_of(*other)) == (one == other)


def test_keys_are_64_bits_without_a_sign():
    keys = [key_of(number) for number in range(1000)]
    assert all(0 <= key < 2**64 for key in keys)
    # Every bit is set about half of the time: 500 +- 5 standard deviations of sqrt(1000 / 4).
    for bit in range(64):
        assert abs(sum(key >> bit & 1 for key in keys) - 500) < 5 * math.sqrt(250)


def test_uniform_numbers_are_the_purposes_own_spread_evenly_and_alike_every_time() -> None:
    found = np.array(list(islice(Draw(1, 2, "a").uniforms("crop"), 20_000)))
    assert list(found[:5]) == list(islice(Draw(1, 2, "a").uniforms("crop"), 5))
    assert found.min() >= 0
    assert found.max() < 1
    assert (found * 2**53 % 1 == 0).all()
    # 100 bins of 200 on average: chi-square of 99 degrees of freedom is below 149 with probability 0.999.
    counts = np.histogram(found, 100, (0, 1))[0]
    assert ((counts - 200) ** 2 / 200).sum() < 149
    assert abs(np.corrcoef(found[:-1], found[1:])[0, 1]) < 0.03  # four standard deviations
    firsts = [next(Draw(1, 2, f"{i}").uniforms("crop")) for i in range(2000)]
    assert len(set(firsts)) == 2000
    assert abs(np.mean(firsts) - 0.5) < 0.03
    assert next(Draw(1, 2, "a").uniforms("flip")) != found[0]


# normal


@pytest.mark.parametrize("count", [1, 2, 7, 100])
def test_normal_numbers_are_standard_normal_whatever_their_count(count: int) -> None:
    keys = torch.tensor([key_of("normal", n) - 2**63 for n in range(20_000 // count)])
    found = normal(keys, count)
    assert found.shape == (len(keys), count)
    assert found.dtype == torch.float32
    values = found.double().flatten().numpy()
    size = len(values)
    # 5 standard errors of the first four moments, 0, 1, 0 and 3: the variances of x, x^2, x^3, x^4 are 1, 2, 15, 96.
    for power, (moment, variance) in enumerate(((0, 1), (1, 2), (0, 15), (3, 96)), 1):
        assert abs((values**power).mean() - moment) < 5 * math.sqrt(variance / size)
    # The keys are fixed: no flicker. Honest numbers are below this once in a thousand.
    assert stats.kstest(values, stats.norm.cdf).pvalue > 1e-3


def test_normal_numbers_of_one_key_and_of_neighbouring_keys_are_unrelated() -> None:
    found = normal(torch.arange(2**15), 6).double()
    # The correlation of n independent pairs has standard deviation 1 / sqrt(n); 5 of them. Squares too: the two
    # numbers of a pair share a radius.
    for values in (found, found**2):
        related = torch.corrcoef(values.T) - torch.eye(6, dtype=torch.float64)
        assert related.abs().max() < 5 / math.sqrt(2**15)
        neighbours = torch.corrcoef(torch.stack((values[:-1, 0], values[1:, 0])))[0, 1]
        assert abs(neighbours) < 5 / math.sqrt(2**15)


def test_a_long_row_of_normal_numbers_has_no_period() -> None:
    values = normal(torch.tensor([7]), 30_001)[0].double()
    assert len(values.unique()) > 0.99 * len(values)  # float32 from 24 bits: some are there twice
    for lag in (1, 2, 15_000, 15_001):  # the halves of a pair lie 15,001 apart
        related = torch.corrcoef(torch.stack((values[:-lag], values[lag:])))[0, 1]
        assert abs(related) < 5 / math.sqrt(len(values) - lag)


@pytest.mark.parametrize("count", [1, 3, 8, 1001])
def test_normal_numbers_of_a_key_do_not_depend_on_its_neighbours(count: int) -> None:
    keys = torch.tensor([0, 1, -1, 2**63 - 1, -(2**63), 12345, 2**40])
    together = normal(keys, count)
    assert torch.equal(torch.cat([normal(key[None], count) for key in keys]), together)
    assert torch.equal(normal(keys.flip(0), count), together.flip(0))


def test_normal_numbers_are_finite_for_every_key() -> None:
    # The farthest that 24 bits reach: sqrt(-2 log(2**-24)) = 5.77.
    found = normal(torch.tensor([0, -1, 2**63 - 1, -(2**63)]), 100_000)
    assert found.abs().max() < 5.78
