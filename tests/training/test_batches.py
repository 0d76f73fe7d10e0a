import math

import numpy as np
import pytest
import torch

from mixtralkit.training.batches import BatchSampler, windows
from mixtralkit.training.optimizer import learning_rate
from mixtralkit.training.settings import TrainSettings
from mixtralkit.training.tokens import BOS_ID

STREAMS = {"a": np.arange(100, 400, dtype=np.uint16), "b": np.arange(1000, 1040, dtype=np.uint16)}


def sampler(seed: int = 1, sequences: int = 7, mix_power: float = 0.6) -> BatchSampler:
    return BatchSampler(STREAMS, 8, sequences, seed, torch.device("cpu"), mix_power)


@pytest.mark.parametrize("world_size", [2, 3, 4, 8])
def test_ranks_batches_make_up_the_whole(world_size):
    whole = sampler().batch(5)
    parts = [sampler().batch(5, rank, world_size) for rank in range(world_size)]
    assert torch.equal(torch.cat(parts), whole)
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_batches_depend_on_seed_and_step_and_stay_inside_a_domain():
    assert torch.equal(sampler().batch(3), sampler().batch(3))
    assert not torch.equal(sampler().batch(3), sampler().batch(4))
    assert not torch.equal(sampler().batch(3), sampler(seed=2).batch(3))
    batch = torch.cat([sampler().batch(step) for step in range(300)])
    assert bool((batch[:, 0] == BOS_ID).all())
    assert bool((batch[:, 1:].diff(dim=1) == 1).all())
    assert int(batch[:, 1:].min()) == 101
    assert int(batch.max()) == 1039


@pytest.mark.parametrize("mix_power", [0.0, 0.5, 1.0])
def test_domains_are_drawn_by_their_power(mix_power):
    batch = sampler(sequences=4000, mix_power=mix_power).batch(0)
    wanted = 40**mix_power / (40**mix_power + 300**mix_power)
    assert abs(float((batch[:, 1] >= 1000).float().mean()) - wanted) < 0.03


@pytest.mark.parametrize("length", [1, 2, 8, 9, 10, 16, 17, 100])
def test_windows_score_each_token_but_the_first_once(length):
    ids = np.arange(100, 100 + length, dtype=np.uint16)
    batches = windows(ids, 8, 3)
    targets = torch.cat([batch[:, 1:].flatten() for batch in batches])
    assert targets[targets >= 0].tolist() == list(range(101, 100 + length))
    inputs = torch.cat([batch[:, :-1].flatten() for batch in batches])
    scored = (targets >= 0) & (inputs != BOS_ID)
    assert torch.equal(inputs[scored], targets[scored] - 1)
    assert all(bool((batch[:, 0] == BOS_ID).all()) for batch in batches)


def test_learning_rate_warms_up_and_falls():
    rates = [learning_rate(step, 100, 2.0, 10) for step in range(100)]
    assert rates[0] == pytest.approx(0.2)
    assert max(rates) == pytest.approx(2.0)
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[55] == pytest.approx(0.04 + 1.96 * (1 + math.cos(math.pi / 2)) / 2)


def test_bad_settings_are_named():
    with pytest.raises(ValueError, match="seq_len \\(40\\) must be less than the 40 tokens of domain 'b'"):
        BatchSampler(STREAMS, 40, 1, 0, torch.device("cpu"))
    with pytest.raises(ValueError, match="multiple of seq_len"):
        TrainSettings(batch_tokens=100, seq_len=64)
    with pytest.raises(ValueError, match="minutes"):
        TrainSettings(steps=10, minutes=1.0)
    with pytest.raises(ValueError, match="lr"):
        TrainSettings(lr=float("nan"))
