"""TorchGenerator against values written down from torch 2.13 on a CPU."""

import numpy as np
import pytest

from hf_mlx.data import generator
from hf_mlx.data.generator import TorchGenerator


@pytest.mark.parametrize(
    ("seed", "expected"), [(42, [2, 6, 1, 8, 4, 5, 0, 9, 3, 7]), (43, [8, 4, 9, 0, 5, 1, 6, 7, 2, 3])]
)
def test_randperm_is_torchs(seed, expected):
    assert TorchGenerator(seed).randperm(10).tolist() == expected


def test_uniform_is_torchs_to_the_last_bit():
    expected = ["0x1.3927aep-4", "0x1.53f8a4p-4", "-0x1.7fd5p-6", "0x1.784360p-4"]
    drawn = TorchGenerator(42).uniform((2, 2), -0.1, 0.1)
    assert drawn.dtype == np.float32
    assert drawn.ravel().tolist() == [float.fromhex(value) for value in expected]


def test_kaiming_uniform_is_torchs_to_the_last_bit():
    expected = ["-0x1.5af244p-9", "0x1.846d38p-3", "-0x1.29f962p-2"]
    drawn = TorchGenerator(0).kaiming_uniform((2, 8), a=5**0.5)
    assert drawn.ravel()[:3].tolist() == [float.fromhex(value) for value in expected]


def test_normals_are_torchs_in_both_of_its_ways():
    few = TorchGenerator(42).normal(3)
    assert few.tolist() == [0.33669036626815796, 0.12880940735340118, 0.23446236550807953]
    # From 16 values on torch evaluates log and cos in its own vector code.
    assert TorchGenerator(42).normal(16)[:3] == pytest.approx([1.9269153, 1.4872841, 0.90071720], abs=1e-6)


def test_seed_int64_is_torchs():
    assert TorchGenerator(42).seed_int64() == 6909045637428952499


def test_only_the_low_32_bits_of_a_seed_count():
    assert TorchGenerator(2**40 + 3).randperm(50).tolist() == TorchGenerator(3).randperm(50).tolist()
    assert TorchGenerator(-5).initial_seed == 2**64 - 5


@pytest.mark.parametrize("n", [0, 1, 2, 1000])
def test_randperm_permutes(n):
    assert sorted(TorchGenerator(1).randperm(n).tolist()) == list(range(n))


def test_the_path_for_huge_permutations_permutes(monkeypatch):
    monkeypatch.setattr(generator, "_LARGE", 10)
    monkeypatch.setattr(generator, "_BLOCK", 7)
    assert sorted(TorchGenerator(1).randperm(100).tolist()) == list(range(100))


def test_a_state_resumes_in_the_middle_of_a_pair_of_normals():
    first = TorchGenerator(7)
    first.randperm(1000)
    first.normal(1)
    second, third = TorchGenerator(), TorchGenerator()
    second.set_state(first.get_state())
    third.set_torch_state(first.to_torch_state())
    following = [first.normal(2).tolist(), first.random(2000).tolist()]
    assert [second.normal(2).tolist(), second.random(2000).tolist()] == following
    assert [third.normal(2).tolist(), third.random(2000).tolist()] == following


def test_a_state_is_plain_values():
    import json

    state = TorchGenerator(3).get_state()
    assert json.loads(json.dumps(state)) == state


def test_manual_seed_forgets_the_half_pair():
    used = TorchGenerator(1)
    used.normal(1)
    assert used.manual_seed(5).normal(3).tolist() == TorchGenerator(5).normal(3).tolist()
