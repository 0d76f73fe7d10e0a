"""Products of small batches in Triton, near the speed of reading the weights once.

Two kernels. ``_vector_kernel``, for one row: a program holds some rows of the weights whole, in registers, and
multiplies on the ordinary cores; the norm fits in. ``_matrix_kernel``, for more: a program runs along a stretch of its
rows of the weights with the matrix units, up to 128 rows of x at once, and a second kernel adds the stretches up. Both
ask for their first weights before they wait for the kernel in front of them.

Weights of 8 bits become numbers in registers (``numbers_of``), and sums take the scale of their output. For more rows
than ``MOST_PACKED_ROWS`` the matrix is unpacked first, for the library's product.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from mixtralkit.moe.weights import PackedWeight
from mixtralkit.ops.linear.library import MOST_PACKED_ROWS, linear_library
from mixtralkit.ops.norm import rms_norm
from mixtralkit.ops.norm.triton import normalised
from mixtralkit.ops.runtime import overlaps_launches, tuned

WIDEST = 16384  # columns of a row that one program of the vector kernel holds
SMALL = 1 << 24  # bytes of weights that are under way at once, all of them, in the registers of a large GPU
TILE = 128  # rows of x, and outputs, that a program of the matrix kernel has at most
PROGRAMS = 132  # that a large GPU runs at a time, one on each multiprocessor


def linear_small(
    x_TI: torch.Tensor,
    w_OI: torch.Tensor | PackedWeight,
    norm: tuple[torch.Tensor, float] | None = None,
    residual_TO: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    settings: dict[str, int] | None = None,
) -> torch.Tensor:
    """``linear.linear`` on a GPU for at most ``linear.MOST_ROWS`` rows, or any number beside packed weights.

    Args:
        w_OI: packed, of 8 bits with a scale for each output.
        settings: {"library": 1}; or those of the matrix kernel, which have "columns"; or those of the vector kernel.
            None takes what was tuned for this GPU, else what is sane on any.
    """
    (rows, inputs), outputs = x_TI.shape, w_OI.shape[0]
    dtype = (out_dtype or x_TI.dtype) if out is None else out.dtype
    packed, scales_O = isinstance(w_OI, PackedWeight), None
    if settings is None:
        settings = _choose(x_TI, outputs, 1 if packed else 2)
    if settings.get("library"):
        w_OI = _unpacked(w_OI, x_TI.dtype) if packed else w_OI
        return linear_library(x_TI, w_OI, norm, residual_TO, out, dtype)
    if packed:
        w_OI, scales_O = _bytes(w_OI)
    if out is None:
        out = torch.empty((rows, outputs), dtype=dtype, device=x_TI.device)
    assert out.shape == (rows, outputs)
    assert out.stride(1) == 1
    x_TI, w_OI, residual_TO = (_rows(tensor) for tensor in (x_TI, w_OI, residual_TO))
    if "columns" in settings:
        _launch_matrix(x_TI if norm is None else rms_norm(x_TI, *norm), w_OI, scales_O, residual_TO, out, settings)
    else:
        assert _fits_vector(rows, inputs)
        _launch_vector(x_TI, w_OI, scales_O, norm, residual_TO, out, settings)
    return out


def default_settings(rows: int, outputs: int, inputs: int, size: int = 2) -> dict[str, int]:
    """Settings that are sane on any GPU: what few programs share is cut finer, and 99 KB of shared memory suffice.

    ``size`` is the bytes of a weight.
    """
    small = outputs * inputs * size <= SMALL
    if _fits_vector(rows, inputs):
        elements = (16384 if inputs >= 4096 else 8192) * 2 // size
        return {"block_o": max(elements // triton.next_power_of_2(inputs), 1), "num_warps": 4, "early": int(small)}
    if rows > (16 if size > 1 else MOST_PACKED_ROWS):
        return {"library": 1}
    if rows > 16:
        tiles = triton.cdiv(outputs, TILE) * triton.cdiv(rows, TILE)
        columns = max(triton.cdiv(inputs, max(PROGRAMS // tiles, 1) * 512) * 512, 512)
        return {"block_o": TILE, "block_i": 64, "columns": columns, "num_warps": 8, "num_stages": 3}
    if small:
        return {"block_o": 64, "block_i": 256, "columns": 256, "num_warps": 4, "num_stages": 1}
    columns = 4096 if outputs >= 6000 else 1024
    return {"block_o": 64, "block_i": 256 // size, "columns": columns, "num_warps": 4, "num_stages": 3}


def candidates(rows: int, outputs: int, inputs: int, size: int = 2) -> list[dict[str, int]]:
    """Settings worth trying for a shape; some may want more shared memory than a GPU has, which its driver says.

    ``size`` is the bytes of a weight.
    """
    found = [{"library": 1}]
    if _fits_vector(rows, inputs):
        block_i, early = triton.next_power_of_2(inputs), int(size * outputs * inputs <= SMALL)
        for elements, num_warps in ((8192, 2), (8192, 4), (16384, 4), (16384, 8), (32768, 8)):
            if elements * 2 // size >= block_i:
                found.append({"block_o": elements * 2 // size // block_i, "num_warps": num_warps, "early": early})
        return found
    names = ("block_o", "block_i", "columns", "num_warps", "num_stages")
    large = [(o, i, c, 8, s) for o in (64, TILE) for i, s in ((64, 3), (64, 5), (128, 3)) for c in (1024, 2048, 4096)]
    for values in (
        (64, 256, 256, 4, 1),
        (128, 256, 256, 4, 1),
        (64, 512, 512, 8, 1),
        (32, 128, 1024, 4, 5),
        (64, 64, 1024, 4, 6),
        (64, 128, 1024, 4, 3),
        (64, 128, 1024, 4, 5),
        (64, 128, 4096, 4, 3),
        (64, 256, 2048, 4, 4),
        (64, 128, 4096, 4, 5),
        (64, 256, 4096, 4, 4),
        *(large if rows > 16 and size == 1 else ()),
    ):
        settings = dict(zip(names, values, strict=True))
        if settings["columns"] <= max(inputs, 256) and (rows <= 16 or settings["block_i"] <= 128):
            found.append(settings)
    return found


def _choose(x_TI: torch.Tensor, outputs: int, size: int) -> dict[str, int]:
    rows, inputs = x_TI.shape
    if x_TI.element_size() > 2 and not _fits_vector(rows, inputs):
        return {"library": 1}  # exact float32 products are none of the matrix units' work
    shape = {"outputs": outputs, "inputs": inputs} | ({"size": 1} if size == 1 else {})
    settings = tuned("linear_packed" if size == 1 else "linear", x_TI.device, rows, **shape)
    suits = settings is not None and ("block_i" in settings or "library" in settings or _fits_vector(rows, inputs))
    return settings if suits else default_settings(rows, **{"size": size, **shape})


def _fits_vector(rows: int, inputs: int) -> bool:
    return rows == 1 and inputs <= WIDEST


def _rows(tensor: torch.Tensor | None) -> torch.Tensor | None:
    return tensor if tensor is None or tensor.stride(1) == 1 else tensor.contiguous()


def _bytes(packed: PackedWeight) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights as kernels take them, e4m3 as uint8, [O, I], and the scale of each output."""
    data, scales = packed.tensors
    data = data if data.dtype == torch.int8 else data.view(torch.uint8)
    return data[:, : packed.columns], scales.view(-1)


def _unpacked(packed: PackedWeight, dtype: torch.dtype) -> torch.Tensor:
    """The weights as numbers, for many rows."""
    data_OI, scales_O = _bytes(packed)
    out_OI = torch.empty(data_OI.shape, dtype=dtype, device=data_OI.device)
    (outputs, inputs), block = data_OI.shape, min(triton.next_power_of_2(data_OI.shape[1]), 4096)
    _unpack_kernel[(outputs, triton.cdiv(inputs, block))](
        data_OI, scales_O, out_OI, inputs, data_OI.stride(0), BLOCK_I=block, ASM=is_compiled(), num_warps=4
    )
    return out_OI


def is_compiled() -> bool:
    """Whether kernels are compiled, not interpreted."""
    return isinstance(numbers_of, triton.runtime.JITFunction)


def _launch_vector(x_TI, w_OI, scales_O, norm, residual_TO, out_TO, settings: dict[str, int]) -> None:
    outputs, inputs = w_OI.shape
    norm_weight_I, eps = (None, 0.0) if norm is None else norm
    overlaps = overlaps_launches(x_TI.device)
    _vector_kernel[(triton.cdiv(outputs, settings["block_o"]),)](
        x_TI,
        norm_weight_I,
        w_OI,
        scales_O,
        residual_TO,
        out_TO,
        outputs,
        inputs,
        w_OI.stride(0),
        eps,
        BLOCK_O=settings["block_o"],
        BLOCK_I=triton.next_power_of_2(inputs),
        EARLY=bool(settings["early"]),
        ASM=is_compiled(),
        PDL=overlaps,
        num_warps=settings["num_warps"],
        **({"launch_pdl": True} if overlaps else {}),
    )


def _launch_matrix(x_TI, w_OI, scales_O, residual_TO, out_TO, settings: dict[str, int]) -> None:
    (rows, inputs), outputs = x_TI.shape, w_OI.shape[0]
    block_i, overlaps = settings["block_i"], overlaps_launches(x_TI.device)
    columns = min(settings["columns"], triton.cdiv(inputs, block_i) * block_i)
    stretches = triton.cdiv(inputs, columns)
    sums_STO, added_TO = out_TO.unsqueeze(0), residual_TO
    if stretches > 1:
        sums_STO, added_TO = torch.empty((stretches, rows, outputs), dtype=torch.float32, device=x_TI.device), None
    options = {"num_warps": settings["num_warps"], **({"launch_pdl": True} if overlaps else {})}
    block_t = min(max(triton.next_power_of_2(rows), 16), TILE)
    _matrix_kernel[(triton.cdiv(outputs, settings["block_o"]), stretches, triton.cdiv(rows, block_t))](
        x_TI,
        w_OI,
        scales_O,
        added_TO,
        sums_STO,
        rows,
        outputs,
        inputs,
        x_TI.stride(0),
        w_OI.stride(0),
        0 if added_TO is None else added_TO.stride(0),
        sums_STO.stride(0),
        sums_STO.stride(1),
        BLOCK_T=block_t,
        BLOCK_O=settings["block_o"],
        BLOCK_I=block_i,
        COLUMNS=columns,
        WHOLE=inputs % columns == 0,
        EVICT="evict_first" if rows <= block_t else "",
        ASM=is_compiled(),
        PDL=overlaps,
        num_stages=settings["num_stages"],
        **options,
    )
    if stretches > 1:
        _sum_kernel[(rows, triton.cdiv(outputs, 512))](
            sums_STO,
            residual_TO,
            out_TO,
            rows,
            outputs,
            0 if residual_TO is None else residual_TO.stride(0),
            out_TO.stride(0),
            STRETCHES=stretches,
            BLOCK_O=512,
            PDL=overlaps,
            **options,
        )


@triton.jit
def _vector_kernel(
    x, norm_weight, w, scales, residual, out, outputs, inputs, w_stride, eps,
    BLOCK_O: tl.constexpr, BLOCK_I: tl.constexpr, EARLY: tl.constexpr, ASM: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    o_O = tl.program_id(0) * BLOCK_O + tl.arange(0, BLOCK_O)
    i_I = tl.arange(0, BLOCK_I)
    inside_O, inside_I = o_O < outputs, i_I < inputs
    rows_O = w + o_O.to(tl.int64) * w_stride
    w_OI = tl.load(
        rows_O[:, None] + i_I[None, :], inside_O[:, None] & inside_I[None, :], 0.0, eviction_policy="evict_first"
    )
    if norm_weight is not None:
        norm_weight_I = tl.load(norm_weight + i_I, inside_I, 0.0)
    if PDL:
        if EARLY:
            tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    x_I = tl.load(x + i_I, inside_I, 0.0)
    if norm_weight is not None:
        x_I = normalised(x_I, norm_weight_I, inputs, eps)
    w_OI = numbers_of(w_OI, x.dtype.element_ty, ASM).to(tl.float32)
    y_O = tl.sum(w_OI * x_I.to(tl.float32)[None, :], 1)
    if PDL and not EARLY:
        # Where not all programs run at once, the next kernel's would take the registers that this one's still need.
        tl.extra.cuda.gdc_launch_dependents()
    if scales is not None:
        y_O *= tl.load(scales + o_O, inside_O, 0.0)
    if residual is not None:
        y_O += tl.load(residual + o_O, inside_O, 0.0).to(tl.float32)
    tl.store(out + o_O, y_O.to(out.dtype.element_ty), inside_O)


@triton.jit(do_not_specialize=["rows"])
def _matrix_kernel(
    x, w, scales, residual, out, rows, outputs, inputs, x_stride, w_stride, residual_stride, stretch_stride, out_stride,
    BLOCK_T: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_I: tl.constexpr, COLUMNS: tl.constexpr, WHOLE: tl.constexpr,
    EVICT: tl.constexpr, ASM: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    stretch = tl.program_id(1)
    first = stretch * COLUMNS
    o_O = tl.program_id(0) * BLOCK_O + tl.arange(0, BLOCK_O)
    t_T = tl.program_id(2) * BLOCK_T + tl.arange(0, BLOCK_T)
    DTYPE: tl.constexpr = x.dtype.element_ty
    inside_O, inside_T = o_O < outputs, t_T < rows
    rows_O = w + tl.where(inside_O, o_O, 0).to(tl.int64) * w_stride  # past the end: the first row, not stored
    rows_T = x + t_T * x_stride
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    w_OI = _weights(rows_O, first, inputs, BLOCK_I, WHOLE, EVICT)
    if PDL:
        tl.extra.cuda.gdc_wait()
    x_IT = _inputs(rows_T, inside_T, first, inputs, BLOCK_I, WHOLE)
    sum_OT = tl.dot(numbers_of(w_OI, DTYPE, ASM), x_IT, input_precision="ieee")
    for start in range(BLOCK_I, COLUMNS, BLOCK_I):
        w_OI = _weights(rows_O, first + start, inputs, BLOCK_I, WHOLE, EVICT)
        x_IT = _inputs(rows_T, inside_T, first + start, inputs, BLOCK_I, WHOLE)
        sum_OT = tl.dot(numbers_of(w_OI, DTYPE, ASM), x_IT, sum_OT, input_precision="ieee")
    if scales is not None:
        sum_OT *= tl.load(scales + o_O, inside_O, 0.0)[:, None]
    inside_OT = inside_O[:, None] & inside_T[None, :]
    if residual is not None:
        residual_OT = tl.load(residual + t_T[None, :] * residual_stride + o_O[:, None], inside_OT, 0.0)
        sum_OT += residual_OT.to(tl.float32)
    place_OT = stretch.to(tl.int64) * stretch_stride + t_T[None, :] * out_stride + o_O[:, None]
    tl.store(out + place_OT, sum_OT.to(out.dtype.element_ty), inside_OT)


@triton.jit
def numbers_of(w, DTYPE: tl.constexpr, ASM: tl.constexpr):
    """Weights as they are stored as numbers, exact: int8, uint8 for e4m3, or plain ones, which have ``DTYPE``.

    The bits of e4m3 in the place of a wider number's are 2^-8 (float16) or 2^-120 (bfloat16) of it, also below its
    least normal one. Of int8, the last seven bits in the mantissa of 128 are 128 more, and the sign makes 128 to 256.
    """
    if w.dtype == tl.uint8:
        if ASM and DTYPE.is_bf16():
            w = tl.inline_asm_elementwise(
                """{
                .reg .b32 a, b, s, none, up, rest;
                mov.b32 none, 0;
                mov.b32 up, 0x7b807b80;
                mov.b32 rest, 0x80008000;
                prmt.b32 a, $2, none, 0x1404;
                prmt.b32 b, $2, none, 0x3424;
                and.b32 s, a, rest;
                and.b32 a, a, 0x7f007f00;
                shr.u32 a, a, 4;
                or.b32 a, a, s;
                and.b32 s, b, rest;
                and.b32 b, b, 0x7f007f00;
                shr.u32 b, b, 4;
                or.b32 b, b, s;
                fma.rn.bf16x2 $0, a, up, rest;
                fma.rn.bf16x2 $1, b, up, rest;
                }""",
                "=r,=r,r", [w], dtype=tl.bfloat16, is_pure=True, pack=4,
            )  # fmt: skip
        else:
            bits = ((w & 0x80).to(tl.uint16) << 8) | ((w & 0x7F).to(tl.uint16) << 7)
            w = (bits.to(tl.float16, bitcast=True).to(tl.float32) * 256.0).to(DTYPE)
    elif w.dtype == tl.int8:
        if ASM and DTYPE.is_bf16():
            w = tl.inline_asm_elementwise(
                """{
                .reg .b32 l, s, a, b, ones, less;
                mov.b32 ones, 0x43434343;
                mov.b32 less, 0xbf80bf80;
                and.b32 l, $2, 0x7f7f7f7f;
                and.b32 s, $2, 0x80808080;
                prmt.b32 a, l, ones, 0x4140;
                prmt.b32 b, s, ones, 0x4140;
                fma.rn.bf16x2 $0, b, less, a;
                prmt.b32 a, l, ones, 0x4342;
                prmt.b32 b, s, ones, 0x4342;
                fma.rn.bf16x2 $1, b, less, a;
                }""",
                "=r,=r,r", [w], dtype=tl.bfloat16, is_pure=True, pack=4,
            )  # fmt: skip
        else:
            w = w.to(DTYPE)
    return w


@triton.jit
def _unpack_kernel(data, scales, out, inputs, stride, BLOCK_I: tl.constexpr, ASM: tl.constexpr):
    """Some weights of one output."""
    o, i_I = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK_I + tl.arange(0, BLOCK_I)
    w_I = numbers_of(tl.load(data + o * stride + i_I, i_I < inputs, 0), out.dtype.element_ty, ASM)
    w_I = w_I.to(tl.float32) * tl.load(scales + o)
    tl.store(out + o * inputs + i_I, w_I.to(out.dtype.element_ty), i_I < inputs)


@triton.jit
def _weights(rows_O, start, inputs, BLOCK_I: tl.constexpr, WHOLE: tl.constexpr, EVICT: tl.constexpr):
    i_I = start + tl.arange(0, BLOCK_I)
    if WHOLE:
        return tl.load(rows_O[:, None] + i_I[None, :], eviction_policy=EVICT)
    else:
        return tl.load(rows_O[:, None] + i_I[None, :], (i_I < inputs)[None, :], 0.0, eviction_policy=EVICT)


@triton.jit
def _inputs(rows_T, inside_T, start, inputs, BLOCK_I: tl.constexpr, WHOLE: tl.constexpr):
    i_I = start + tl.arange(0, BLOCK_I)
    if WHOLE:
        return tl.load(rows_T[None, :] + i_I[:, None], inside_T[None, :], 0.0)
    else:
        return tl.load(rows_T[None, :] + i_I[:, None], inside_T[None, :] & (i_I < inputs)[:, None], 0.0)


@triton.jit(do_not_specialize=["rows"])
def _sum_kernel(
    stretches, residual, out, rows, outputs, residual_stride, out_stride,
    STRETCHES: tl.constexpr, BLOCK_O: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    o_O = tl.program_id(1) * BLOCK_O + tl.arange(0, BLOCK_O)
    inside_O = o_O < outputs
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    sum_O = tl.zeros((BLOCK_O,), tl.float32)
    for stretch in tl.static_range(STRETCHES):
        sum_O += tl.load(stretches + (stretch * rows + row).to(tl.int64) * outputs + o_O, inside_O, 0.0)
    if residual is not None:
        sum_O += tl.load(residual + row * residual_stride + o_O, inside_O, 0.0).to(tl.float32)
    tl.store(out + row * out_stride + o_O, sum_O.to(out.dtype.element_ty), inside_O)
