"""Attention on a GPU in bfloat16 against float32 references, and what a CUDA graph of it replays."""

from __future__ import annotations

import pytest
import torch

from mixtralkit.model.attention import CachedAttention
from mixtralkit.model.batch import ForwardBatch
from mixtralkit.model.kv_cache import KVCache
from mixtralkit.model.rope import rope_table
from mixtralkit.ops.attention import decode_attention, decode_attention_reference
from mixtralkit.ops.runtime import runs_triton

pytestmark = pytest.mark.gpu
CUDA = torch.device("cuda", 0)
PAGE = 64
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 8e-3, torch.float16: 2e-3}  # of the norm


def assert_near(got: torch.Tensor, wanted: torch.Tensor, dtype: torch.dtype) -> None:
    error = (got.double() - wanted.double()).norm() / wanted.double().norm()
    assert error < TOLERANCE[dtype], f"relative error {error:.1e}"


def random_cache(slots: int, kv_heads: int, length: int, width: int, dtype: torch.dtype) -> KVCache:
    """Pages in any order; none is shared."""
    each = -(-length // PAGE)
    keys, values = (torch.randn(1, slots * each, kv_heads, PAGE, width, device=CUDA).to(dtype) for _ in range(2))
    tables = torch.randperm(slots * each, device=CUDA).int().view(slots, each)
    return KVCache(keys, values, tables, rope_table(length, width, 1e6, CUDA))


def float_copy(cache: KVCache) -> KVCache:
    return KVCache(cache.keys.float(), cache.values.float(), cache.tables_SM, cache.rope_SC)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("window", [None, 300])
@pytest.mark.parametrize(
    ("rows", "heads", "kv_heads", "width", "length"),
    [(1, 32, 8, 128, 256), (5, 32, 8, 128, 3000), (3, 6, 2, 48, 700), (4, 8, 2, 16, 500), (70, 8, 2, 64, 300)],
)
def test_decode_is_the_reference_and_repeats_itself(rows, heads, kv_heads, width, length, window, dtype):
    cache = random_cache(rows + 2, kv_heads, length, width, dtype)
    wide = float_copy(cache)
    slots = torch.randperm(rows + 2, device=CUDA)[:rows]
    slots[rows // 2] = -1 if rows > 1 else slots[0]
    positions = torch.randint(0, length, (rows,), device=CUDA)
    qkv = torch.randn(rows, (heads + 2 * kv_heads) * width, device=CUDA).to(dtype)
    step = (slots, positions, cache.rope_SC, heads, window)
    wanted = decode_attention_reference(qkv.float(), wide.keys[0], wide.values[0], wide.tables_SM, *step)
    outs = [torch.full((rows, heads * width), float("nan"), device=CUDA, dtype=dtype) for _ in range(3)]
    for out in outs:
        decode_attention(qkv, cache.keys[0], cache.values[0], cache.tables_SM, *step, out)
    assert_near(outs[0], wanted, dtype)
    assert_near(cache.keys, wide.keys, dtype)
    assert torch.equal(outs[0], outs[1])
    assert torch.equal(outs[0], outs[2])


def test_a_graph_follows_what_the_tensors_say():
    """One graph of a few layers serves other sequences at other positions, and rows that only fill the shape."""
    rows, heads, layers, length = 4, 32, 3, 2000
    caches = [random_cache(6, 8, length, 128, torch.bfloat16) for _ in range(layers)]
    slots, positions = torch.arange(rows, device=CUDA), torch.full((rows,), 10, device=CUDA)
    qkv = torch.randn(rows, 48 * 128, device=CUDA).bfloat16()

    def run() -> list[torch.Tensor]:
        return [
            decode_attention(qkv, c.keys[0], c.values[0], c.tables_SM, slots, positions, c.rope_SC, heads)
            for c in caches
        ]

    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outs = run()
    for seed in range(4):
        torch.manual_seed(seed)
        slots.copy_(torch.randperm(6)[:rows])
        slots[seed] = -1
        for cache in caches:
            order = torch.randperm(cache.pages)[: cache.tables_SM.numel()].tolist()
            at = [(slot, i) for slot in range(cache.slots) for i in range(cache.tables_SM.shape[1])]
            cache.place([(*place, page) for place, page in zip(at, order, strict=True)])
        positions.copy_(torch.randint(0, length, (rows,)))
        qkv.normal_()
        wides = [float_copy(cache) for cache in caches]
        graph.replay()
        for out, wide in zip(outs, wides, strict=True):
            wanted = decode_attention_reference(
                qkv.float(), wide.keys[0], wide.values[0], wide.tables_SM, slots, positions, wide.rope_SC, heads
            )
            assert_near(out, wanted, torch.bfloat16)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("window", [None, 64])
@pytest.mark.parametrize(("heads", "kv_heads", "width"), [(32, 8, 128), (6, 2, 48), (8, 2, 16)])
def test_a_step_of_any_sequences_is_the_cpus(heads, kv_heads, width, window, dtype):
    pieces = [(3, 0, 130), (1, 77, 1), (0, 200, 70), (5, 0, 1), (2, 130, 2), (4, 0, 65)]
    cache = random_cache(6, kv_heads, 300, width, dtype)
    on_cpu = KVCache(*(x.cpu() for x in (cache.keys.float(), cache.values.float(), cache.tables_SM, cache.rope_SC)))
    qkv = torch.randn(sum(tokens for *_, tokens in pieces), (heads + 2 * kv_heads) * width, device=CUDA).to(dtype)
    assert runs_triton(qkv)
    for some in (pieces, [p for p in pieces if p[1] == 0], [(0, 0, 80), (2, 0, 80), (5, 0, 80)]):
        outs = []
        for device, kept in ((CUDA, cache), (torch.device("cpu"), on_cpu)):
            batch = ForwardBatch.build([(slot, at, [0] * tokens) for slot, at, tokens in some], device)
            rows = qkv[: len(batch.tokens_T)].to(device, kept.keys.dtype)
            outs.append(CachedAttention(kept, window, batch.spans, device)(0, rows, batch, (heads, kv_heads)))
        assert_near(outs[0].cpu(), outs[1], dtype)
        assert_near(cache.keys.cpu(), on_cpu.keys, dtype)
