"""Products of small batches in Triton, near the speed of reading the weights once.

Two kernels. ``_vector_kernel``, for one row: a program holds some rows of the weights whole, in registers, and
multiplies on the ordinary cores; the norm fits in. ``_matrix_kernel``, for more: a program runs along a stretch of its
rows of the weights with the matrix units, all rows of x at once, and a second kernel adds the stretches up. Both ask
for their first weights before they wait for the kernel in front of them.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from mixtralkit.ops.linear.library import linear_library
from mixtralkit.ops.norm import rms_norm
from mixtralkit.ops.norm.triton import normalised
from mixtralkit.ops.runtime import overlaps_launches, tuned

WIDEST = 16384  # columns of a row that one program of the vector kernel holds
SMALL = 1 << 23  # weights that are under way at once, all of them, in the registers of a large GPU


def linear_small(
    x_TI: torch.Tensor,
    w_OI: torch.Tensor,
    norm: tuple[torch.Tensor, float] | None = None,
    residual_TO: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    settings: dict[str, int] | None = None,
) -> torch.Tensor:
    """``linear.linear`` on a GPU for at most ``linear.MOST_ROWS`` rows.

    Args:
        settings: {"library": 1}; or those of the matrix kernel, which have "columns"; or those of the vector kernel.
            None takes what was tuned for this GPU, else what is sane on any.
    """
    (rows, inputs), outputs = x_TI.shape, w_OI.shape[0]
    dtype = (out_dtype or x_TI.dtype) if out is None else out.dtype
    if settings is None:
        settings = _choose(x_TI, outputs)
    if settings.get("library"):
        return linear_library(x_TI, w_OI, norm, residual_TO, out, dtype)
    if out is None:
        out = torch.empty((rows, outputs), dtype=dtype, device=x_TI.device)
    assert out.shape == (rows, outputs)
    assert out.stride(1) == 1
    x_TI, w_OI, residual_TO = (_rows(tensor) for tensor in (x_TI, w_OI, residual_TO))
    if "columns" in settings:
        _launch_matrix(x_TI if norm is None else rms_norm(x_TI, *norm), w_OI, residual_TO, out, settings)
    else:
        assert _fits_vector(rows, inputs)
        _launch_vector(x_TI, w_OI, norm, residual_TO, out, settings)
    return out


def default_settings(rows: int, outputs: int, inputs: int) -> dict[str, int]:
    """Settings that are sane on any GPU: what few programs share is cut finer, and 99 KB of shared memory suffice."""
    small = outputs * inputs <= SMALL
    if _fits_vector(rows, inputs):
        elements = 16384 if inputs >= 4096 else 8192
        return {"block_o": max(elements // triton.next_power_of_2(inputs), 1), "num_warps": 4, "early": int(small)}
    if rows > 16:
        return {"library": 1}
    if small:
        return {"block_o": 64, "block_i": 256, "columns": 256, "num_warps": 4, "num_stages": 1}
    columns = 4096 if outputs >= 6000 else 1024
    return {"block_o": 64, "block_i": 128, "columns": columns, "num_warps": 4, "num_stages": 3}


def candidates(rows: int, outputs: int, inputs: int) -> list[dict[str, int]]:
    """Settings worth trying for a shape; some may want more shared memory than a GPU has, which its driver says."""
    found = [{"library": 1}]
    if _fits_vector(rows, inputs):
        block_i, early = triton.next_power_of_2(inputs), int(outputs * inputs <= SMALL)
        for elements, num_warps in ((8192, 2), (8192, 4), (16384, 4), (16384, 8), (32768, 8)):
            if elements >= block_i:
                found.append({"block_o": elements // block_i, "num_warps": num_warps, "early": early})
        return found
    names = ("block_o", "block_i", "columns", "num_warps", "num_stages")
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
    ):
        settings = dict(zip(names, values, strict=True))
        if settings["columns"] <= max(inputs, 256) and (rows <= 16 or settings["block_i"] <= 128):
            found.append(settings)
    return found


def _choose(x_TI: torch.Tensor, outputs: int) -> dict[str, int]:
    rows, inputs = x_TI.shape
    if x_TI.element_size() > 2 and not _fits_vector(rows, inputs):
        return {"library": 1}  # exact float32 products are none of the matrix units' work
    settings = tuned("linear", x_TI.device, rows, outputs=outputs, inputs=inputs)
    suits = settings is not None and ("block_i" in settings or "library" in settings or _fits_vector(rows, inputs))
    return settings if suits else default_settings(rows, outputs, inputs)


def _fits_vector(rows: int, inputs: int) -> bool:
    return rows == 1 and inputs <= WIDEST


def _rows(tensor: torch.Tensor | None) -> torch.Tensor | None:
    return tensor if tensor is None or tensor.stride(1) == 1 else tensor.contiguous()


def _launch_vector(x_TI, w_OI, norm, residual_TO, out_TO, settings: dict[str, int]) -> None:
    outputs, inputs = w_OI.shape
    norm_weight_I, eps = (None, 0.0) if norm is None else norm
    overlaps = overlaps_launches(x_TI.device)
    _vector_kernel[(triton.cdiv(outputs, settings["block_o"]),)](
        x_TI,
        norm_weight_I,
        w_OI,
        residual_TO,
        out_TO,
        outputs,
        inputs,
        w_OI.stride(0),
        eps,
        BLOCK_O=settings["block_o"],
        BLOCK_I=triton.next_power_of_2(inputs),
        EARLY=bool(settings["early"]),
        PDL=overlaps,
        num_warps=settings["num_warps"],
        **({"launch_pdl": True} if overlaps else {}),
    )


def _launch_matrix(x_TI, w_OI, residual_TO, out_TO, settings: dict[str, int]) -> None:
    (rows, inputs), outputs = x_TI.shape, w_OI.shape[0]
    block_i, overlaps = settings["block_i"], overlaps_launches(x_TI.device)
    columns = min(settings["columns"], triton.cdiv(inputs, block_i) * block_i)
    stretches = triton.cdiv(inputs, columns)
    sums_STO, added_TO = out_TO.unsqueeze(0), residual_TO
    if stretches > 1:
        sums_STO, added_TO = torch.empty((stretches, rows, outputs), dtype=torch.float32, device=x_TI.device), None
    options = {"num_warps": settings["num_warps"], **({"launch_pdl": True} if overlaps else {})}
    _matrix_kernel[(triton.cdiv(outputs, settings["block_o"]), stretches)](
        x_TI,
        w_OI,
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
        BLOCK_T=max(triton.next_power_of_2(rows), 16),
        BLOCK_O=settings["block_o"],
        BLOCK_I=block_i,
        COLUMNS=columns,
        WHOLE=inputs % columns == 0,
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
    x, norm_weight, w, residual, out, outputs, inputs, w_stride, eps,
    BLOCK_O: tl.constexpr, BLOCK_I: tl.constexpr, EARLY: tl.constexpr, PDL: tl.constexpr,
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
    y_O = tl.sum(w_OI.to(tl.float32) * x_I.to(tl.float32)[None, :], 1)
    if PDL and not EARLY:
        # Where not all programs run at once, the next kernel's would take the registers that this one's still need.
        tl.extra.cuda.gdc_launch_dependents()
    if residual is not None:
        y_O += tl.load(residual + o_O, inside_O, 0.0).to(tl.float32)
    tl.store(out + o_O, y_O.to(out.dtype.element_ty), inside_O)


@triton.jit(do_not_specialize=["rows"])
def _matrix_kernel(
    x, w, residual, out, rows, outputs, inputs, x_stride, w_stride, residual_stride, stretch_stride, out_stride,
    BLOCK_T: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_I: tl.constexpr, COLUMNS: tl.constexpr, WHOLE: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    stretch = tl.program_id(1)
    first = stretch * COLUMNS
    o_O = tl.program_id(0) * BLOCK_O + tl.arange(0, BLOCK_O)
    t_T = tl.arange(0, BLOCK_T)
    inside_O, inside_T = o_O < outputs, t_T < rows
    rows_O = w + tl.where(inside_O, o_O, 0).to(tl.int64) * w_stride  # past the end: the first row, not stored
    rows_T = x + t_T * x_stride
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    w_OI = _weights(rows_O, first, inputs, BLOCK_I, WHOLE)
    if PDL:
        tl.extra.cuda.gdc_wait()
    x_IT = _inputs(rows_T, inside_T, first, inputs, BLOCK_I, WHOLE)
    sum_OT = tl.dot(w_OI, x_IT, input_precision="ieee")
    for start in range(BLOCK_I, COLUMNS, BLOCK_I):
        w_OI = _weights(rows_O, first + start, inputs, BLOCK_I, WHOLE)
        x_IT = _inputs(rows_T, inside_T, first + start, inputs, BLOCK_I, WHOLE)
        sum_OT = tl.dot(w_OI, x_IT, sum_OT, input_precision="ieee")
    inside_OT = inside_O[:, None] & inside_T[None, :]
    if residual is not None:
        residual_OT = tl.load(residual + t_T[None, :] * residual_stride + o_O[:, None], inside_OT, 0.0)
        sum_OT += residual_OT.to(tl.float32)
    place_OT = stretch.to(tl.int64) * stretch_stride + t_T[None, :] * out_stride + o_O[:, None]
    tl.store(out + place_OT, sum_OT.to(out.dtype.element_ty), inside_OT)


@triton.jit
def _weights(rows_O, start, inputs, BLOCK_I: tl.constexpr, WHOLE: tl.constexpr):
    i_I = start + tl.arange(0, BLOCK_I)
    if WHOLE:
        return tl.load(rows_O[:, None] + i_I[None, :], eviction_policy="evict_first")
    else:
        return tl.load(rows_O[:, None] + i_I[None, :], (i_I < inputs)[None, :], 0.0, eviction_policy="evict_first")


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
