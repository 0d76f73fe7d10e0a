"""Whether the engine that is timed computes the model: its answers against a float32 forward written out plainly."""

from __future__ import annotations

import gc
from dataclasses import dataclass, replace
from statistics import median

import torch
import torch.nn.functional as F

from mixtralkit.engine.generation import Engine
from mixtralkit.engine.requests import Request
from mixtralkit.engine.sampler import SamplingOptions
from mixtralkit.layout import RankLayout
from mixtralkit.model.batch import ForwardBatch
from mixtralkit.model.rope import rotations
from mixtralkit.model.transformer import Transformer

# Of the middle row. A single row may be far off in half precision: a rounding tips a choice of experts that is a tie.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 1e-2}
GREEDY = SamplingOptions(temperature=0)
PROMPT, NEW = 24, 8


@dataclass(frozen=True)
class Check:
    """Differences from float32; a row is one token's logits.

    ``logits`` is ‖row - reference‖ / ‖reference‖ of the decode step, the middle row's, and ``rows_off`` the share of
    rows where it is above 0.1. ``answers`` is the difference in the log-probabilities that the engine gives, and
    ``shortfall`` how far its tokens are from the reference's likeliest, both over the logits' standard deviation, the
    middle row's.
    """

    check_layers: int
    logits: float
    rows_off: float
    answers: float
    shortfall: float

    def passes(self, dtype: torch.dtype) -> bool:
        return all(error < TOLERANCE[dtype] for error in (self.logits, self.answers, self.shortfall))  # not for NaN


def check(model: Transformer, tokenizer, layers: int, batch: int, seed: int) -> Check:
    """Runs the first layers of ``model``, on the same weights, through an engine and through the reference. Collective.

    ``batch`` sequences decode together, since which kernels run depends on their number.
    Every rank computes its part of the reference for all sequences, so this also checks how the model is cut.
    """
    small = first_layers(model, min(layers, model.params.n_layers), batch)
    generator = torch.Generator().manual_seed(seed)
    prompts = torch.randint(model.params.vocab_size, (batch, PROMPT), generator=generator).tolist()
    requests = [Request(i, tuple(ids), NEW, GREEDY) for i, ids in enumerate(prompts)]
    done = Engine(small, tokenizer, prefill_budget=batch * PROMPT).complete(requests)
    tokens_BN = torch.tensor([completion.tokens for completion in done], device=model.context.device)
    logprobs_BN = torch.tensor([completion.logprobs for completion in done], device=model.context.device)
    sequences_BT = torch.cat([torch.tensor(prompts, device=tokens_BN.device), tokens_BN[:, :-1]], dim=1)
    reference_BNV = reference_logits(small, sequences_BT)[:, PROMPT - 1 :]
    answers_BN, shortfall_BN = _answers(small, reference_BNV, tokens_BN, logprobs_BN)
    rows = _decoded_rows(small, sequences_BT, reference_BNV)
    small.cache = None
    gc.collect()
    return Check(
        check_layers=small.params.n_layers,
        logits=float(rows.median()),
        rows_off=float((rows > 0.1).float().mean()),
        answers=median(answers_BN.flatten().tolist()),
        shortfall=median(shortfall_BN.flatten().tolist()),
    )


def first_layers(model: Transformer, layers: int, batch: int) -> Transformer:
    """A model of the first layers with the weights of ``model`` and room for ``batch`` short sequences. Collective."""
    config = replace(model.params, n_layers=layers).with_limits(PROMPT + NEW, batch)
    plan = replace(model.layout.plan, slots_LWS=model.layout.plan.slots_LWS[:layers])
    layout = RankLayout(config, model.layout.parallel, plan, model.context.rank)
    small = Transformer(layout, model.context, model.dtype, model.options)
    weights = dict(model.named_parameters())
    for name, parameter in small.named_parameters():
        if small.store.room and ".experts." in name:  # in one memory with places for copies
            parameter.data.copy_(weights[name].data)
        else:
            parameter.data = weights[name].data
    return small


@torch.no_grad()
def reference_logits(model: Transformer, tokens_BT: torch.Tensor) -> torch.Tensor:
    """Float32 logits [B, T, V of this rank] of whole sequences, from the model's weights and plain torch."""
    layout, context, config = model.layout, model.context, model.params
    weights = model.named_tensors()
    positions_T = torch.arange(tokens_BT.shape[1], device=tokens_BT.device)
    cos, sin = (t[None] for t in rotations(positions_T, config.head_dim, config.rope_theta))
    age_TT = positions_T[:, None] - positions_T
    visible_TT = (age_TT >= 0) & (age_TT < (config.sliding_window or len(positions_T)))
    heads = [hi - lo for lo, hi in (layout.heads, layout.kv_heads, layout.kv_heads)]
    x_BTD = weights["tok_embeddings.weight"][tokens_BT].float()

    def weight(name: str) -> torch.Tensor:
        return weights[name].float()

    def norm(x_BTD: torch.Tensor, name: str) -> torch.Tensor:
        return x_BTD * torch.rsqrt(x_BTD.square().mean(-1, keepdim=True) + config.norm_eps) * weight(name)

    def turn(x_BTHC: torch.Tensor) -> torch.Tensor:
        even, odd = x_BTHC[..., ::2], x_BTHC[..., 1::2]
        return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2)

    for layer in range(config.n_layers):
        prefix = f"layers.{layer}."
        qkv = norm(x_BTD, prefix + "attention_norm.weight") @ weight(prefix + "attention.wqkv.weight").T
        q, k, v = qkv.unflatten(-1, (-1, config.head_dim)).split(heads, dim=2)
        q, k, v = (t.transpose(1, 2) for t in (turn(q), turn(k), v))
        k, v = (t.repeat_interleave(heads[0] // heads[1], dim=1) for t in (k, v))
        scores = (q @ k.transpose(2, 3) * config.head_dim**-0.5).masked_fill(~visible_TT, -torch.inf)
        out_BTD = (scores.softmax(-1) @ v).transpose(1, 2).flatten(2) @ weight(prefix + "attention.wo.weight").T
        x_BTD = x_BTD + (context.all_reduce(out_BTD) if layout.parallel.attention == "tp" else out_BTD)
        y_BTD = norm(x_BTD, prefix + "ffn_norm.weight")
        x_BTD = x_BTD + context.all_reduce(_experts(y_BTD, layer, layout, weight))
    return norm(x_BTD, "norm.weight") @ weight("output.weight").T


def _experts(y_BTD: torch.Tensor, layer: int, layout: RankLayout, weight) -> torch.Tensor:
    """This rank's part of the layer, one expert after the other over every row; replicas' first rank has theirs."""
    prefix, config = f"layers.{layer}.feed_forward.", layout.config
    chosen, experts = (y_BTD @ weight(prefix + "gate.weight").T).topk(config.num_experts_per_tok, dim=-1)
    shares = chosen.softmax(-1)
    w13, w2 = weight(prefix + "w13"), weight(prefix + "w2")
    sum_BTD = torch.zeros_like(y_BTD)
    first_E = layout.plan.holds_LWE[layer].argmax(0)
    for slot, expert in enumerate(layout.experts(layer)):
        if layout.parallel.experts == "ep" and first_E[expert] != layout.rank:
            continue
        gate, up = (y_BTD @ w13[slot].T).chunk(2, dim=-1)
        share = (shares * (experts == expert)).sum(-1, keepdim=True)
        sum_BTD += share * ((F.silu(gate) * up) @ w2[slot].T)
    return sum_BTD


def _answers(model: Transformer, reference_BNV, tokens_BN, logprobs_BN) -> tuple[torch.Tensor, torch.Tensor]:
    """Differences in the log-probability of each token, and the tokens' distances from the likeliest, over std."""
    first, end = model.layout.vocab
    here = (tokens_BN >= first) & (tokens_BN < end)
    own = reference_BNV.gather(-1, (tokens_BN - first).clamp(0, end - first - 1)[..., None])[..., 0]
    parts = torch.stack([reference_BNV.logsumexp(-1), reference_BNV.amax(-1), reference_BNV.square().mean(-1)])
    chosen = torch.where(here, own, 0.0)
    if model.layout.parallel.attention == "tp":
        chosen = model.context.all_reduce(chosen)
        parts = model.context.all_gather(parts)
    else:
        parts = parts[None]
    total, best, scale = parts[:, 0].logsumexp(0), parts[:, 1].amax(0), parts[:, 2].mean(0).sqrt()
    return (logprobs_BN - (chosen - total)).abs() / scale, (best - chosen) / scale


@torch.no_grad()
def _decoded_rows(model: Transformer, sequences_BT, reference_BNV) -> torch.Tensor:
    """Relative errors of the decode step's logits [B·N], the earlier tokens given.

    Under attention ``dp`` each rank decodes its share of the sequences, and rows that fill the shape where it has less.
    """
    cache = model.allocate_cache()
    (count, length), owners = sequences_BT.shape, model.ranks_with_own_sequences
    share = -(-count // owners)
    first = share * model.context.rank if owners > 1 else 0
    own_BT, wanted_BNV = sequences_BT[first : first + share], reference_BNV[first : first + share]
    pieces = [(i, 0, ids) for i, ids in enumerate(own_BT[:, :PROMPT].tolist())]
    prompts = ForwardBatch.build(pieces, own_BT.device, rows_per_rank=share * PROMPT)
    model.step(prompts, cache, prompts.last_rows_B)
    slots_B = torch.arange(share, device=own_BT.device)
    slots_B[len(own_BT) :] = -1
    tokens_BT = F.pad(own_BT, (0, 0, 0, share - len(own_BT)))
    errors = []
    for position in range(PROMPT, length):
        positions_B = torch.full_like(slots_B, position)
        step = ForwardBatch.of_rows(tokens_BT[:, position].contiguous(), positions_B, slots_B, share)
        logits_BV = model.logits(model.hidden(model.attend_to(step, cache))[0])
        wanted_BV = wanted_BNV[:, position - PROMPT + 1]
        squares = torch.stack([(logits_BV[: len(own_BT)] - wanted_BV).square().sum(-1), wanted_BV.square().sum(-1)])
        difference_B, size_B = squares if owners > 1 else model.context.all_reduce(squares)
        errors.append((difference_B / size_B).sqrt())
    rows = torch.cat(errors)
    if owners > 1:
        rows = rows.new_tensor([error for own in model.context.all_gather_objects(rows.tolist()) for error in own])
    return rows
