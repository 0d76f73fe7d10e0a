"""Rows sorted by expert, two products at the speed of the memory or of the matrix units, and the weighted sum.

The rows are copied to the places of their choices, block by block of an expert, with zeros where an expert leaves a
block unfilled: what the matrix units multiply there costs less power, and power is what limits them.

Both products are one kernel. Its programs take tiles of (block of rows) × (block of weight rows) one after the other
and read them through tensor descriptors. It has two forms:

``stream``, for small batches an expert, where reading the weights takes the time: the weights stand on the M side of
the matrix units (multiples of 64), the rows on the N side (multiples of 8), and only as many quarters of a block are
multiplied as have rows.

Else, for many rows an expert: the rows stand on the M side and the loop over tiles is one with the loop over k, so that
the next tile's loads run while this one is stored.

Weights in fp8 with a scale for an output or a matrix are multiplied as they are: rows in front of either product are
rounded to fp8 too, with a scale of their own, and the scales multiply the sums.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from mixtralkit.moe.weights import PackedWeight
from mixtralkit.ops.experts.triton_sorting import SortedRows, sort_rows
from mixtralkit.ops.runtime import multiprocessors, overlaps_launches, tuned

STREAMED = 104  # mean rows an expert up to which nearly all fit one block, so that weights are read once (H200)
SHORT = 320  # mean rows an expert up to which blocks of 64 rows leave enough less padding to beat those of 128
SHARED_SLACK = 2048  # bytes of shared memory for barriers beside the tiles
FEW = 512  # rows below which one program a row would leave multiprocessors idle


def expert_sum_grouped(
    x_RD: torch.Tensor,
    slots_RK: torch.Tensor,
    weights_RK: torch.Tensor,
    w13_SGD: torch.Tensor | PackedWeight,
    w2_SDF: torch.Tensor | PackedWeight,
    residual_RD: torch.Tensor | None = None,
    out_RD: torch.Tensor | None = None,
    storage_S: torch.Tensor | None = None,
    settings: dict[str, int] | None = None,
    likely_rows: int | None = None,
    likely_slots: int | None = None,
) -> torch.Tensor:
    """``experts.expert_sum`` for large batches, with any skew; D and F must be multiples of 8.

    The results of w1, w3 and w2 are summed in float32; silu(w1 · x) * (w3 · x) and each expert's result are rounded to
    the dtype of ``x_RD`` once. ``PackedWeight``: fp8 without blocks.
    """
    (rows, width), top_k, hidden = x_RD.shape, slots_RK.shape[1], w2_SDF.shape[2]
    fp8 = isinstance(w2_SDF, PackedWeight)
    slots = len(w2_SDF if storage_S is None else storage_S)
    assert width % 8 == hidden % 8 == 0, "tensor descriptors want rows of whole 16 bytes"
    if settings is None:
        shape = {"slots": likely_slots or slots, "top_k": top_k, "width": width, "hidden": hidden}
        likely = rows if likely_rows is None else likely_rows
        settings = None if fp8 else tuned("experts_grouped", x_RD.device, likely, **shape)
        settings = settings or default_settings(likely, **shape, processors=multiprocessors(x_RD.device), fp8=fp8)
    # With the matrix units busy, kernels that started early and waited cost more than they saved (H200, Triton 3.6).
    overlap = bool(settings["stream"]) and overlaps_launches(x_RD.device)
    order = sort_rows(slots_RK, slots, settings["block_r"], overlap, storage_S)
    quarters = _quarters(order.block_r) if settings["stream"] else 1
    x_PD = _spread_rows(x_RD.contiguous(), order, top_k, quarters, overlap)
    h_PF, y_PD = x_RD.new_empty(order.places, hidden), x_RD.new_empty(order.places, width)
    for rows_PI, w_SOI, out_PO in ((x_PD, w13_SGD, h_PF), (h_PF, w2_SDF, y_PD)):
        scales_P = None
        if fp8:
            rows_PI, scales_P = _rounded(rows_PI, order, quarters, overlap)
        grouped_product(rows_PI, order, w_SOI, out_PO, settings, swiglu=out_PO is h_PF, scales_P=scales_P)
    out_RD = torch.empty_like(x_RD, memory_format=torch.contiguous_format) if out_RD is None else out_RD
    assert out_RD.is_contiguous()
    residual_RD = None if residual_RD is None else residual_RD.contiguous()
    block_d = min(triton.next_power_of_2(width), 1024 if rows < FEW else 4096)
    _weighted_sum[rows, triton.cdiv(width, block_d)](
        y_PD, order.place_N, weights_RK.contiguous(), residual_RD, out_RD, width,
        TOP_K=top_k, BLOCK_D=block_d, RESIDUAL=residual_RD is not None, PDL=overlap,
        num_warps=4, **({"launch_pdl": True} if overlap else {}),
    )  # fmt: skip
    return out_RD


def default_settings(
    rows: int, *, slots: int, top_k: int, width: int, hidden: int, processors: int = 132, fp8: bool = False
) -> dict[str, int]:
    """Settings measured on an H200 for Mixtral-8x7B, whole and a quarter of its hidden width; the launcher makes
    pipelines shallower where memory is short.

    Few experts, as on one rank of several, have too few of the wide tiles of w2 to keep all multiprocessors reading:
    two experts of 16 rows took 260 us with these and take 175 with narrow ones.
    """
    if fp8:  # the same bytes
        plain = default_settings(rows, slots=slots, top_k=top_k, width=width, hidden=hidden, processors=processors)
        return plain | {key: 2 * value for key, value in plain.items() if key.endswith("block_k")}
    mean = rows * top_k / slots
    if mean > SHORT:
        return _settings(0, 128, (128, 64, 16, 8, 4, 1), (256, 64, 16, 8, 4, 1))
    if mean > STREAMED:
        return _settings(0, 64, (128, 64, 64, 4, 5, 1), (256, 64, 64, 4, 5, 1))
    few_tiles, narrow = slots * width < 128 * processors, (64, 128, 64, 4, 6, 1)
    if mean <= 24:
        return _settings(1, 32, (128, 128, 64, 8, 3, 1), narrow if few_tiles else (64, 128, 64, 4, 4, 2))
    if mean <= 48:
        return _settings(1, 64, (64, 128, 64, 4, 3, 2), narrow if few_tiles else (64, 128, 64, 4, 4, 2))
    return _settings(1, 128, (64, 64, 64, 4, 4, 2), narrow if few_tiles else (128, 64, 64, 4, 3, 2))


def candidates(rows: int, *, slots: int, top_k: int, width: int, hidden: int) -> list[dict[str, int]]:
    """The settings worth measuring: the default's neighbours, of both forms where the number of rows is in between."""
    mean = rows * top_k / slots
    found = []
    if mean <= 2 * STREAMED:
        blocks = [r for r in (32, 64, 128) if mean / 2 <= r <= max(4 * mean, 32)] or [128]
        ups = [(128, 128, 64, 8, 3, 1), (128, 64, 64, 8, 6, 1), (64, 128, 64, 4, 3, 2), (64, 64, 64, 4, 4, 2)]
        downs = [(64, 128, 64, 4, 4, 2), (128, 64, 64, 4, 4, 2), (128, 64, 64, 4, 3, 2), (256, 64, 64, 8, 4, 1),
                 (64, 128, 64, 4, 6, 1)]  # fmt: skip
        found += [_settings(1, r, up, down) for r in blocks for up in ups for down in downs]
    if mean > STREAMED / 2:
        for group in (8, 16, 64):
            for stages in (3, 4):
                found.append(_settings(0, 128, (128, 64, group, 8, stages, 1), (256, 64, group, 8, stages, 1)))
            found.append(_settings(0, 64, (128, 64, group, 4, 5, 1), (256, 64, group, 4, 5, 1)))
    return found


def _settings(stream: int, block_r: int, up: tuple[int, ...], down: tuple[int, ...]) -> dict[str, int]:
    """Of each product: weight rows and k of a tile, row blocks a group, warps, stages, programs a multiprocessor."""
    names = ("block_o", "block_k", "group", "num_warps", "num_stages", "programs")
    parts = {
        f"{part}_{n}": v for part, values in (("up", up), ("down", down)) for n, v in zip(names, values, strict=True)
    }
    return {"stream": stream, "block_r": block_r, **parts}


def grouped_product(
    x_PI: torch.Tensor,
    order: SortedRows,
    w_SOI: torch.Tensor | PackedWeight,
    out_PO: torch.Tensor,
    settings: dict[str, int],
    swiglu: bool,
    scales_P: torch.Tensor | None = None,
) -> None:
    """Every sorted row times the weights of its slot into ``out_PO``.

    Padding rows of ``out_PO`` are zero as far as they are written, if those of ``x_PI`` are: in the streamed form a
    block's quarters without a row are not. ``swiglu`` says that ``w_SOI`` is w1 above w3, to be combined. ``scales_P``
    (float32) are the rows' where ``w_SOI`` is packed.
    """
    scales_SO, height = None, 0
    if isinstance(w_SOI, PackedWeight):
        (w_SOI, scales_SO), height = w_SOI.tensors, w_SOI.weights.parts[1].rows or 0
    stream, (slots, _, inner), outer = bool(settings["stream"]), w_SOI.shape, out_PO.shape[1]
    part = "up_" if swiglu else "down_"
    own = {key.removeprefix(part): value for key, value in settings.items() if key.startswith(part)}
    block_r, block_o = order.block_r, own["block_o"]
    columns = block_o if stream else min(block_o, 128)  # stored at once
    hopper = x_PI.is_cuda and torch.cuda.get_device_capability(x_PI.device)[0] == 9
    staged = block_r * (columns if hopper else block_o)  # only there both halves take one buffer
    staged = 0 if stream else staged * out_PO.element_size()
    loaded = block_r + block_o * (2 if swiglu else 1)
    block_k, stages = _depth(x_PI.device, loaded * x_PI.element_size(), staged, own)
    quarters = _quarters(block_r) if stream else 1
    parts = [block_r // min(part, quarters) for part in (1, 2, 4)]
    x_blocks = [TensorDescriptor.from_tensor(x_PI, [rows, block_k]) for rows in parts]
    if swiglu and not stream:  # 8 rows of w1, then 8 of w3: one thread holds both products of a hidden value
        pairs = w_SOI.view(slots, 2, outer // 8, 8, inner).transpose(1, 2)
        w = TensorDescriptor.from_tensor(pairs, [1, block_o // 8, 2, 8, block_k])
    else:
        w = TensorDescriptor.from_tensor(w_SOI.flatten(0, 1), [block_o, block_k])
    out = out_PO if stream else TensorDescriptor.from_tensor(out_PO, [block_r, columns])
    tiles = triton.cdiv(outer, block_o)
    overlap = stream and overlaps_launches(x_PI.device)
    programs = min(len(order.slot_B) * tiles, own["programs"] * multiprocessors(x_PI.device))
    _product[programs,](
        *x_blocks, w, out, scales_P, scales_SO, order.slot_B, order.rows_B, order.span_B2, order.blocks, inner, outer,
        tiles,
        STREAM=stream, QUARTERS=quarters, SWIGLU=swiglu, BLOCK_R=block_r, BLOCK_O=block_o, COLUMNS=columns,
        BLOCK_K=block_k, GROUP=own["group"], HEIGHT=height, PDL=overlap,
        PRECISION="ieee" if x_PI.dtype == torch.float32 else "tf32",
        num_warps=own["num_warps"], num_stages=stages, **({"launch_pdl": True} if overlap else {}),
    )  # fmt: skip


def _quarters(block_r: int) -> int:
    """In how many parts a streamed block is multiplied, of 16 rows at least."""
    return 4 if block_r >= 64 else 2


def _depth(device: torch.device, loaded: int, staged: int, own: dict[str, int]) -> tuple[int, int]:
    """(block_k, stages) that fit into shared memory: as set, else fewer stages, else shorter ones.

    ``loaded`` bytes a stage takes per k, ``staged`` bytes a program holds for its results.
    """
    block_k, stages = own["block_k"], own["num_stages"]
    if device.type != "cuda":
        return block_k, stages
    memory = torch.cuda.get_device_properties(device).shared_memory_per_block_optin // own["programs"]
    memory -= staged + SHARED_SLACK
    while memory < 2 * loaded * block_k and block_k > 16:
        block_k //= 2
    return block_k, max(min(stages, memory // (loaded * block_k)), 1)


def _spread_rows(
    x_RD: torch.Tensor, order: SortedRows, top_k: int, quarters: int = 1, overlap: bool = False
) -> torch.Tensor:
    """Rows copied to the places of their choices: [P, D]. A block's last of ``quarters`` with rows ends in zeros."""
    rows, width = x_RD.shape
    x_PD = x_RD.new_empty(order.places, width)
    block_d = min(triton.next_power_of_2(width), 1024 if rows < FEW else 4096)
    cut = order.block_r // quarters
    _spread[rows + len(order.slot_B), triton.cdiv(width, block_d)](
        x_RD, order.place_N, order.rows_B, x_PD, rows, width,
        TOP_K=top_k, BLOCK_R=order.block_r, CUT=cut, BLOCK_D=block_d,
        PDL=overlap, num_warps=4, **({"launch_pdl": True} if overlap else {}),
    )  # fmt: skip
    return x_PD


def _rounded(x_PI: torch.Tensor, order: SortedRows, quarters: int, overlap: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Sorted rows in fp8, and what multiplies each; of a block only those that ``_spread_rows`` filled."""
    places, columns = x_PI.shape
    out_PI = torch.empty_like(x_PI, dtype=torch.float8_e4m3fn)
    scales_P = torch.empty(places, dtype=torch.float32, device=x_PI.device)
    _round[places,](
        x_PI, order.rows_B, out_PI, scales_P, columns,
        BLOCK_R=order.block_r, CUT=order.block_r // quarters, BLOCK=triton.next_power_of_2(columns), PDL=overlap,
        num_warps=8, **({"launch_pdl": True} if overlap else {}),
    )  # fmt: skip
    return out_PI, scales_P


@triton.jit
def _product(
    x, x_half, x_quarter, w, out_PO, x_scales, w_scales, slot_B, rows_B, span_B2, blocks, inner, outer, tiles,
    STREAM: tl.constexpr, QUARTERS: tl.constexpr, SWIGLU: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_O: tl.constexpr,
    COLUMNS: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr, HEIGHT: tl.constexpr, PRECISION: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """A program takes every n-th tile. Up to GROUP row blocks of a slot, cut evenly, take a block of its weight rows
    one after the other, so that it is read from memory once and from the L2 cache after that."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    num_blocks = tl.load(blocks)
    for tile in tl.range(tl.program_id(0), num_blocks * tiles, tl.num_programs(0), flatten=not STREAM):
        span = span_B2 + 2 * (tile // tiles)
        begin, count = tl.load(span), tl.load(span + 1)
        size = tl.cdiv(count, tl.cdiv(count, GROUP))
        start = begin + (tile // tiles - begin) // size * size
        size = tl.minimum(size, begin + count - start)
        within = tile - start * tiles
        block = start + within % size
        o = within // size * BLOCK_O
        first = block * BLOCK_R
        slot = tl.load(slot_B + block)
        if STREAM:
            rows = tl.load(rows_B + block)
            if QUARTERS == 4 and rows <= BLOCK_R // 4:
                _stream_tile(
                    x_quarter, x_quarter, w, out_PO, x_scales, w_scales, first, o, slot, inner, outer,
                    SWIGLU, BLOCK_R // 4, 0, BLOCK_O, BLOCK_K, HEIGHT, PRECISION,
                )  # fmt: skip
            elif rows <= BLOCK_R // 2:
                _stream_tile(
                    x_half, x_half, w, out_PO, x_scales, w_scales, first, o, slot, inner, outer,
                    SWIGLU, BLOCK_R // 2, 0, BLOCK_O, BLOCK_K, HEIGHT, PRECISION,
                )  # fmt: skip
            elif QUARTERS == 4 and rows <= 3 * BLOCK_R // 4:
                _stream_tile(
                    x_half, x_quarter, w, out_PO, x_scales, w_scales, first, o, slot, inner, outer,
                    SWIGLU, BLOCK_R // 2, BLOCK_R // 4, BLOCK_O, BLOCK_K, HEIGHT, PRECISION,
                )  # fmt: skip
            else:
                _stream_tile(
                    x, x, w, out_PO, x_scales, w_scales, first, o, slot, inner, outer,
                    SWIGLU, BLOCK_R, 0, BLOCK_O, BLOCK_K, HEIGHT, PRECISION,
                )  # fmt: skip
        else:
            _matrix_tile(
                x, w, out_PO, x_scales, w_scales, first, o, slot, inner, outer,
                SWIGLU, BLOCK_R, BLOCK_O, COLUMNS, BLOCK_K, HEIGHT, PRECISION,
            )  # fmt: skip


@triton.jit
def _stream_tile(
    x, x_more, w, out_PO, x_scales, w_scales, first, o, slot, inner, outer,
    SWIGLU: tl.constexpr, ROWS: tl.constexpr, MORE: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_K: tl.constexpr,
    HEIGHT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """out[first : first + ROWS + MORE, o : o + BLOCK_O], the weights on the M side; MORE rows are a second product."""
    w_row = (2 * slot if SWIGLU else slot) * outer + o
    out_OR = tl.zeros((BLOCK_O, ROWS), tl.float32)
    if SWIGLU:
        up_OR = tl.zeros((BLOCK_O, ROWS), tl.float32)
    if MORE > 0:
        out_OM = tl.zeros((BLOCK_O, MORE), tl.float32)
        if SWIGLU:
            up_OM = tl.zeros((BLOCK_O, MORE), tl.float32)
    for step in tl.range(0, tl.cdiv(inner, BLOCK_K)):
        k = step * BLOCK_K
        x_RI = x.load([first, k])
        w_OI = w.load([w_row, k])
        out_OR = tl.dot(w_OI, x_RI.T, out_OR, input_precision=PRECISION)
        if MORE > 0:
            x_MI = x_more.load([first + ROWS, k])
            out_OM = tl.dot(w_OI, x_MI.T, out_OM, input_precision=PRECISION)
        if SWIGLU:
            w3_OI = w.load([w_row + outer, k])
            up_OR = tl.dot(w3_OI, x_RI.T, up_OR, input_precision=PRECISION)
            if MORE > 0:
                up_OM = tl.dot(w3_OI, x_MI.T, up_OM, input_precision=PRECISION)
    if x_scales is not None:
        matrix = 2 * slot if SWIGLU else slot
        scale_O, x_scale = _scales_at(w_scales, matrix, o, outer, BLOCK_O, HEIGHT), x_scales + first
        scale_1R = tl.load(x_scale + tl.arange(0, ROWS))[None, :]
        out_OR *= scale_O[:, None] * scale_1R
        if MORE > 0:
            scale_1M = tl.load(x_scale + ROWS + tl.arange(0, MORE))[None, :]
            out_OM *= scale_O[:, None] * scale_1M
        if SWIGLU:
            up_scale_O = _scales_at(w_scales, matrix + 1, o, outer, BLOCK_O, HEIGHT)
            up_OR *= up_scale_O[:, None] * scale_1R
            if MORE > 0:
                up_OM *= up_scale_O[:, None] * scale_1M
    if SWIGLU:
        out_OR = out_OR / (1.0 + tl.exp(-out_OR)) * up_OR
    _store_turned(out_PO, out_OR, first, o, outer, ROWS, BLOCK_O)
    if MORE > 0:
        if SWIGLU:
            out_OM = out_OM / (1.0 + tl.exp(-out_OM)) * up_OM
        _store_turned(out_PO, out_OM, first + ROWS, o, outer, MORE, BLOCK_O)


@triton.jit
def _scales_at(w_scales, matrix, o, outer, BLOCK_O: tl.constexpr, HEIGHT: tl.constexpr):
    """Scales of some outputs of a matrix, or the matrix's own: [BLOCK_O]."""
    o_O = o + tl.arange(0, BLOCK_O)
    if HEIGHT:
        return tl.load(w_scales + matrix.to(tl.int64) * outer + o_O, o_O < outer, 0.0)
    else:
        return tl.load(w_scales + matrix + o_O * 0)


@triton.jit
def _store_turned(out_PO, out_OR, first, o, outer, ROWS: tl.constexpr, BLOCK_O: tl.constexpr):
    o_O = o + tl.arange(0, BLOCK_O)
    place_RO = (first + tl.arange(0, ROWS)).to(tl.int64)[:, None] * outer + o_O[None, :]
    tl.store(out_PO + place_RO, out_OR.T.to(out_PO.dtype.element_ty), (o_O < outer)[None, :])


@triton.jit
def _matrix_tile(
    x_PI, w, out_PO, x_scales, w_scales, first, o, slot, inner, outer,
    SWIGLU: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_O: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_K: tl.constexpr,
    HEIGHT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """out[first : first + BLOCK_R, o : o + BLOCK_O], the rows on the M side."""
    acc = tl.zeros((BLOCK_R, (2 if SWIGLU else 1) * BLOCK_O), tl.float32)
    for step in tl.range(0, tl.cdiv(inner, BLOCK_K)):
        k = step * BLOCK_K
        x_RI = x_PI.load([first, k])
        if SWIGLU:
            w_OI = w.load([slot, o // 8, 0, 0, k]).reshape(2 * BLOCK_O, BLOCK_K)
        else:
            w_OI = w.load([slot * outer + o, k])
        acc = tl.dot(x_RI, w_OI.T, acc, input_precision=PRECISION)
    if x_scales is not None:
        acc *= tl.load(x_scales + first + tl.arange(0, BLOCK_R))[:, None]
    if SWIGLU:
        gate, up = acc.reshape(BLOCK_R, BLOCK_O // 8, 2, 8).permute(0, 1, 3, 2).split()
        if x_scales is not None:
            gate *= _scales_at(w_scales, 2 * slot, o, outer, BLOCK_O, HEIGHT).reshape(BLOCK_O // 8, 8)[None, :, :]
            up *= _scales_at(w_scales, 2 * slot + 1, o, outer, BLOCK_O, HEIGHT).reshape(BLOCK_O // 8, 8)[None, :, :]
        acc = (gate / (1.0 + tl.exp(-gate)) * up).reshape(BLOCK_R, BLOCK_O)
    elif x_scales is not None:
        acc *= _scales_at(w_scales, slot, o, outer, BLOCK_O, HEIGHT)[None, :]
    out_RO = acc.to(out_PO.dtype)
    if COLUMNS == BLOCK_O:
        out_PO.store([first, o], out_RO)
    else:  # in halves, which take half the shared memory
        left, right = out_RO.reshape(BLOCK_R, 2, COLUMNS).permute(0, 2, 1).split()
        out_PO.store([first, o], left)
        out_PO.store([first, o + COLUMNS], right)


@triton.jit(do_not_specialize=["rows"])
def _spread(
    x_RD, place_RK, rows_B, out_PD, rows, D,
    TOP_K: tl.constexpr, BLOCK_R: tl.constexpr, CUT: tl.constexpr, BLOCK_D: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Copies one block of one row to the places of its choices; programs after those write a block's zeros."""
    program, d = tl.program_id(0), tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    if program < rows:
        last = -1
        for k in tl.static_range(TOP_K):
            last = tl.maximum(last, tl.load(place_RK + program * TOP_K + k))
        x_D = tl.load(x_RD + program.to(tl.int64) * D + d, d < tl.where(last >= 0, D, 0))  # else for other ranks
        for k in tl.static_range(TOP_K):
            place = tl.load(place_RK + program * TOP_K + k)
            if place >= 0:
                tl.store(out_PD + place.to(tl.int64) * D + d, x_D, d < D)
    else:
        block = program - rows
        filled = tl.load(rows_B + block)
        rest_D = out_PD + (block * BLOCK_R + filled).to(tl.int64) * D + d
        for _ in range(filled, tl.cdiv(filled, CUT) * CUT):
            tl.store(rest_D, tl.zeros((BLOCK_D,), out_PD.dtype.element_ty), d < D)
            rest_D += D


@triton.jit
def _round(
    x_PI, rows_B, out_PI, scales_P, columns,
    BLOCK_R: tl.constexpr, CUT: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One row in e4m3, whose largest is 448."""
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    place, column = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    if place % BLOCK_R < tl.cdiv(tl.load(rows_B + place // BLOCK_R), CUT) * CUT:
        x = tl.load(x_PI + place * columns + column, column < columns, 0.0).to(tl.float32)
        most = tl.max(tl.abs(x))
        tl.store(scales_P + place, most / 448.0)
        out = x * tl.where(most > 0.0, 448.0 / most, 0.0)
        tl.store(out_PI + place * columns + column, out.to(out_PI.dtype.element_ty), column < columns)


@triton.jit
def _weighted_sum(
    y_PD, place_RK, weights_RK, residual_RD, out_RD, D,
    TOP_K: tl.constexpr, BLOCK_D: tl.constexpr, RESIDUAL: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """out = Σ_k weight · y [+ residual], one block of one row a program."""
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    row = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    sum_D = tl.zeros((BLOCK_D,), tl.float32)
    for k in tl.static_range(TOP_K):
        place = tl.load(place_RK + row * TOP_K + k)
        weight = tl.load(weights_RK + row * TOP_K + k)
        if place >= 0:
            sum_D += weight * tl.load(y_PD + place.to(tl.int64) * D + d, d < D, other=0.0).to(tl.float32)
    if RESIDUAL:
        sum_D += tl.load(residual_RD + row * D + d, d < D, other=0.0).to(tl.float32)
    tl.store(out_RD + row * D + d, sum_D.to(out_RD.dtype.element_ty), d < D)
