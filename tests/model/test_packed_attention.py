"""Attention and output in 8 bits: the model is the one of the numbers that the weights stand for, on any ranks."""

from __future__ import annotations

import itertools

import pytest
import torch

from mixtralkit.config import ModelConfig, ParallelConfig
from mixtralkit.distributed import RankContext
from mixtralkit.layout import RankLayout
from mixtralkit.model.transformer import Transformer
from mixtralkit.moe.weights import FORMATS, PackedWeight
from mixtralkit.planning.plan import contiguous
from tests.configs import TOLERANCE, small_config
from tests.ranks import run_ranks

CONFIG = small_config(dim=72, head_dim=32, n_layers=2)  # two heads a rank are 64 columns
TOKENS_BT = torch.tensor([[1, 17, 4, 33, 8], [1, 9, 60, 2, 5]])


def build(config: ModelConfig, parallel: ParallelConfig, context: RankContext, name: str | None) -> Transformer:
    plan = contiguous(config.n_layers, config.num_experts, context.world_size)
    formats = {} if name is None else {"attention_weights": FORMATS[name]}
    model = Transformer(RankLayout(config, parallel, plan, context.rank, **formats), context)
    model.initialize(0, std=0.15)
    return model


def rounded_logits(name: str) -> torch.Tensor:
    """Of the plain model whose projections are rounded to the format, each by itself."""
    model = build(CONFIG, ParallelConfig(), RankContext(), None)
    size, weights = CONFIG.head_dim, FORMATS[name]
    cuts = [CONFIG.n_heads * size, CONFIG.n_kv_heads * size, CONFIG.n_kv_heads * size]
    with torch.no_grad():
        for block in model.layers:
            for part in (*block.attention.wqkv.weight.split(cuts), block.attention.wo.weight):
                part.copy_(weights.quantize(part).float())
        model.output.weight.copy_(weights.quantize(model.output.weight).float())
    return model.forward(TOKENS_BT)


def compare(context: RankContext, *attentions: str) -> None:
    for attention, name in itertools.product(attentions, ("int8", "fp8")):
        model = build(CONFIG, ParallelConfig(attention, "ep"), context, name)
        for projection in (model.output, *(block.attention.wo for block in model.layers)):
            assert isinstance(projection.matrix, PackedWeight)
        shapes = {key: tuple(tensor.shape) for key, tensor in model.named_tensors().items()}
        assert shapes == model.layout.shapes()
        logits = model.forward(TOKENS_BT)
        tolerance = 3e-3 if name == "int8" else TOLERANCE[torch.float32]  # compiled int8 kernels round rows to 16 bits
        torch.testing.assert_close(logits, rounded_logits(name), rtol=tolerance, atol=tolerance)


def test_logits_are_those_of_the_rounded_weights():
    compare(RankContext(), "tp")


def test_two_ranks():
    run_ranks(compare, 2, "tp", "dp")


def test_heads_that_cut_a_unit_are_refused():
    layout = contiguous(3, 8, 2)
    with pytest.raises(
        ValueError, match=r"n_heads \* head_dim \(64\) must be cut into multiples of 64 with quantize_a"
    ):
        RankLayout(small_config(), ParallelConfig("tp", "ep"), layout, 1, attention_weights=FORMATS["int8"])
