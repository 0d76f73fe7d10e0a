"""Rules in front of the sampler on a GPU, as many rows and tokens as a model has, against the reference."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mixtralkit.engine.sampler import Asked, SamplingOptions, SlotRules
from mixtralkit.ops.runtime import runs_triton
from mixtralkit.ops.sampling import adjust_logits, adjust_logits_reference

pytestmark = pytest.mark.gpu
CUDA = torch.device("cuda", 0)


@pytest.mark.parametrize("vocab", [32000, 32768, 4099])
def test_adjusted_logits_are_the_reference_and_a_graph_counts(vocab):
    rng, rows = np.random.default_rng(0), 64
    kept = SlotRules(rows + 3, vocab, CUDA)
    for slot in range(0, rows, 2):
        options = SamplingOptions(
            presence_penalty=0.7, frequency_penalty=-0.3, repetition_penalty=1.3, logit_bias={5: -100, slot: 3.5}
        )
        prompt, answer = (tuple(rng.integers(0, vocab, count).tolist()) for count in (300, 200))
        kept.place(slot, Asked(options, prompt, answer, min_tokens=slot, ends=(2, 9)))
    kept.allow([4, 8], rng.integers(-(2**31), 2**31, (2, -(-vocab // 32)), dtype=np.int32))
    slots_N = torch.randperm(rows + 3, device=CUDA)[:rows]
    slots_N[3] = -1
    positions_N = torch.randint(300, 400, (rows,), device=CUDA)
    logits_NV = torch.randn(rows, vocab, device=CUDA) * 4
    assert runs_triton(logits_NV)

    def step() -> torch.Tensor:
        adjusted_NV = adjust_logits(logits_NV, kept.rules, slots_N, positions_N)
        kept.count(slots_N, adjusted_NV.argmax(-1))
        return adjusted_NV

    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got_NV = step()
    for _ in range(3):
        wanted_NV = adjust_logits_reference(logits_NV, kept.rules, slots_N, positions_N)
        counts_SV = kept.rules.counts_SV.clone()
        graph.replay()
        torch.testing.assert_close(got_NV, wanted_NV, rtol=1e-5, atol=1e-4)
        counts_SV[slots_N, got_NV.argmax(-1)] += 1
        assert torch.equal(kept.rules.counts_SV[:-1], counts_SV[:-1])
