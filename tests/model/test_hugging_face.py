"""The model against its oracle: Hugging Face's MixtralForCausalLM in float32."""

from __future__ import annotations

import pytest
import torch
from transformers import MixtralConfig, MixtralForCausalLM

from mixtralkit.config import ModelConfig, ParallelConfig
from mixtralkit.distributed import RankContext
from mixtralkit.layout import RankLayout
from mixtralkit.model.batch import ForwardBatch
from mixtralkit.model.kv_cache import KVCache
from mixtralkit.model.transformer import Transformer
from mixtralkit.planning.plan import contiguous
from tests.configs import TOLERANCE, random_config, small_config
from tests.ranks import run_ranks

PROMPTS = [[1, 17, 4, 33, 8, 2, 41], [1, 9], [1, 30, 12, 5, 22, 7, 7, 7, 16, 44, 3, 28], [1]]


def hugging_face(model: Transformer) -> MixtralForCausalLM:
    """The oracle with the weights of a whole (one-rank) model."""
    config = model.params
    theirs = MixtralForCausalLM(
        MixtralConfig(**config.to_hugging_face("float32"), attn_implementation="eager", experts_implementation="eager")
    )
    state = theirs.state_dict()
    for name, value in hugging_face_tensors(model).items():
        assert state[name].shape == value.shape, name
        state[name].copy_(value)
    return theirs.float().eval()


def hugging_face_tensors(model: Transformer) -> dict[str, torch.Tensor]:
    config, ours, theirs = model.params, model.named_tensors(), {}
    heads = {"q_proj": config.n_heads, "k_proj": config.n_kv_heads, "v_proj": config.n_kv_heads}
    for i in range(config.n_layers):
        mine, other = f"layers.{i}.", f"model.layers.{i}."
        wqkv = ours[mine + "attention.wqkv.weight"].split([n * config.head_dim for n in heads.values()])
        for name, weight in zip(heads, wqkv, strict=True):
            if name != "v_proj":  # Mistral's pairs (0,1)(2,3)… become Hugging Face's halves (0,2,…)(1,3,…)
                pairs = weight.unflatten(0, (heads[name], config.head_dim // 2, 2))
                weight = pairs.transpose(1, 2).flatten(0, 2)
            theirs[f"{other}self_attn.{name}.weight"] = weight
        theirs[other + "self_attn.o_proj.weight"] = ours[mine + "attention.wo.weight"]
        theirs[other + "input_layernorm.weight"] = ours[mine + "attention_norm.weight"]
        theirs[other + "post_attention_layernorm.weight"] = ours[mine + "ffn_norm.weight"]
        theirs[other + "mlp.gate.weight"] = ours[mine + "feed_forward.gate.weight"]
        theirs[other + "mlp.experts.gate_up_proj"] = ours[mine + "feed_forward.w13"]
        theirs[other + "mlp.experts.down_proj"] = ours[mine + "feed_forward.w2"]
    theirs["model.embed_tokens.weight"] = ours["tok_embeddings.weight"]
    theirs["model.norm.weight"] = ours["norm.weight"]
    theirs["lm_head.weight"] = ours["output.weight"]
    return theirs


def whole_model(config: ModelConfig, dtype: torch.dtype = torch.float32, seed: int = 0) -> Transformer:
    model = Transformer(RankLayout.single(config), RankContext(), dtype)
    model.initialize(seed, std=0.15)  # large enough that logits and routing differ clearly between tokens
    return model


@torch.no_grad()
def oracle_greedy(theirs: MixtralForCausalLM, prompts: list[list[int]], new_tokens: int) -> list[list[int]]:
    answers = []
    for prompt in prompts:
        tokens = list(prompt)
        for _ in range(new_tokens):
            tokens.append(int(theirs(torch.tensor([tokens])).logits[0, -1].argmax()))
        answers.append(tokens[len(prompt) :])
    return answers


def greedy(model: Transformer, prompts: list[list[int]], new_tokens: int, own: list[int]) -> list[list[int]]:
    """Prefills the prompts of indices ``own`` in one flattened step, then decodes them together."""
    cache = KVCache.allocate(model.layout, max(len(own), 1), 64, model.dtype, torch.device("cpu"))
    pieces = [(slot, 0, prompts[i]) for slot, i in enumerate(own)]
    answers: list[list[int]] = [[] for _ in own]
    for _ in range(new_tokens):
        batch = ForwardBatch.build(pieces, "cpu")
        tokens = model.step(batch, cache, batch.last_rows_B).argmax(-1).tolist()
        for answer, token in zip(answers, tokens, strict=True):
            answer.append(token)
        pieces = [
            (slot, position + len(ids), [token]) for (slot, position, ids), token in zip(pieces, tokens, strict=True)
        ]
    return answers


@pytest.mark.parametrize("seed", range(12))
def test_logits_equal_hugging_faces(seed):
    model = whole_model(random_config(seed), seed=seed)
    theirs = hugging_face(model)
    for prompt in PROMPTS[:3]:
        tokens = torch.tensor([prompt, prompt[::-1]])
        with torch.no_grad():
            expected = theirs(tokens).logits
        torch.testing.assert_close(model.forward(tokens), expected, rtol=0, atol=TOLERANCE[torch.float32])


@pytest.mark.parametrize("seed", range(12))
def test_greedy_tokens_equal_hugging_faces_for_every_composition_of_the_batch(seed):
    model = whole_model(random_config(seed), seed=seed)
    expected = oracle_greedy(hugging_face(model), PROMPTS, 8)
    together = greedy(model, PROMPTS, 8, [0, 1, 2, 3])
    alone = [greedy(model, PROMPTS, 8, [i])[0] for i in range(4)]
    assert together == expected
    assert alone == expected
    assert greedy(model, PROMPTS, 8, [3, 1]) == [expected[3], expected[1]]


def test_forward_continues_at_a_start_position():
    model = whole_model(small_config())
    tokens = torch.tensor([PROMPTS[2], PROMPTS[2][::-1]])
    whole = model.forward(tokens)
    model.forward(tokens[:, :5], 0)
    torch.testing.assert_close(model.forward(tokens[:, 5:], 5), whole[:, 5:], rtol=0, atol=1e-4)


def test_a_prompt_may_be_prefilled_in_chunks_beside_decoding_sequences():
    model = whole_model(small_config(sliding_window=6))
    expected = [model.forward(torch.tensor([p]))[0, -1] for p in (PROMPTS[2], PROMPTS[0])]
    cache = KVCache.allocate(model.layout, 4, 64, torch.float32, torch.device("cpu"))
    long, short = PROMPTS[2], PROMPTS[0]
    batch = ForwardBatch.build([(3, 0, long[:5]), (1, 0, short[:-1])], "cpu")
    model.step(batch, cache, batch.last_rows_B)
    batch = ForwardBatch.build([(1, len(short) - 1, short[-1:]), (3, 5, long[5:])], "cpu")
    logits = model.step(batch, cache, batch.last_rows_B)
    torch.testing.assert_close(logits[1], expected[0], rtol=0, atol=1e-4)
    torch.testing.assert_close(logits[0], expected[1], rtol=0, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_near_float32(dtype):
    config = small_config(num_experts_per_tok=8)  # every expert: no routing decision that rounding could flip
    exact = whole_model(config, torch.float32)
    half = Transformer(RankLayout.single(config), RankContext(), dtype)
    for name, tensor in half.named_tensors().items():
        tensor.copy_(exact.named_tensors()[name])
        exact.named_tensors()[name].copy_(tensor)  # the same rounded weights on both sides
    tokens = torch.tensor([PROMPTS[2]])
    want, got = exact.forward(tokens), half.forward(tokens)
    assert float((got - want).norm() / want.norm()) < TOLERANCE[dtype]


def _greedy_on_ranks(context: RankContext, cases: list[tuple[ModelConfig, int, ParallelConfig]]):
    results = []
    for config, seed, parallel in cases:
        plan = contiguous(config.n_layers, config.num_experts, context.world_size)
        model = Transformer(RankLayout(config, parallel, plan, context.rank), context)
        model.initialize(seed, std=0.15)
        own = list(range(4))
        if parallel.attention == "dp":
            own = own[context.rank :: context.world_size]
        logits = model.forward(torch.tensor([PROMPTS[0], PROMPTS[0][::-1], PROMPTS[2][:7]]))
        results.append((own, greedy(model, PROMPTS, 6, own), logits))
    return results


def _possible_ways(config: ModelConfig, world_size: int) -> list[ParallelConfig]:
    plan, ways = contiguous(config.n_layers, config.num_experts, world_size), []
    for parallel in [ParallelConfig(a, e) for a in ("tp", "dp") for e in ("tp", "ep")]:
        divides = config.n_heads % world_size == 0
        divides &= config.n_kv_heads % world_size == 0 or world_size % config.n_kv_heads == 0
        if parallel.attention == "dp" or divides:
            ways.append(parallel)
            continue
        with pytest.raises(ValueError, match="world size"):
            RankLayout(config, parallel, plan)
    return ways


@pytest.mark.parametrize("world_size", [2, 4])
def test_every_way_to_spread_models_gives_hugging_faces_tokens(world_size):
    cases, wanted = [], []
    for seed, config in [(0, small_config()), *((seed, random_config(seed)) for seed in range(10))]:
        model = whole_model(config, seed=seed)
        answers = oracle_greedy(hugging_face(model), PROMPTS, 6)
        logits = model.forward(torch.tensor([PROMPTS[0], PROMPTS[0][::-1], PROMPTS[2][:7]]))
        ways = _possible_ways(config, world_size)
        cases += [(config, seed, parallel) for parallel in ways]
        wanted += [(answers, logits)] * len(ways)
    for results in run_ranks(_greedy_on_ranks, world_size, cases):
        for case, (own, answers, logits), (expected, expected_logits) in zip(cases, results, wanted, strict=True):
            assert answers == [expected[i] for i in own], case
            torch.testing.assert_close(logits, expected_logits, rtol=0, atol=1e-4)
