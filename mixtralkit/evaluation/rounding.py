"""What experts lose by rounding: of their weights, or of what they make of the rows of a run."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from mixtralkit.checkpoint import CheckpointReader
from mixtralkit.config import ModelConfig
from mixtralkit.engine.requests import Request
from mixtralkit.layout import expert_of
from mixtralkit.mixtral import Mixtral
from mixtralkit.moe.dispatch.base import RoutedRows
from mixtralkit.moe.weights import FORMATS, ExpertWeights
from mixtralkit.planning.precision import ErrorTable, Loads

PLAIN_BYTES = 2  # of a number in 16 bits, against which bits count


def bits_of(config: ModelConfig, weights: ExpertWeights) -> float:
    """Bits of a weight of an expert, with its share of scales."""
    size = weights.expert_bytes(config.dim, config.hidden_dim, PLAIN_BYTES)
    return 8 * size / (3 * config.dim * config.hidden_dim)


def measure_weights(
    reader: CheckpointReader, formats: Sequence[str], loads: Loads, device: torch.device | str = "cpu",
    progress: bool = False,
) -> ErrorTable:  # fmt: skip
    """Rounds every expert's matrices to every format, one matrix in memory at a time.

    Raises:
        ValueError: a checkpoint whose experts are rounded already.
    """
    config = reader.config
    _check_plain(reader)
    off_LEF = np.zeros((config.n_layers, config.num_experts, len(formats)))
    size_LE1 = np.zeros((*off_LEF.shape[:2], 1))
    names = [name for name in reader.shapes() if ".experts." in name]
    for name in tqdm(names, desc="rounding", unit="matrix", disable=not progress):
        w_OK, (layer, expert) = reader.read(name).to(device).float(), expert_of(name)
        size_LE1[layer, expert] += float(w_OK.square().sum())
        for number, of in enumerate(formats):
            off_LEF[layer, expert, number] += float((FORMATS[of].quantize(w_OK).float() - w_OK).square().sum())
    error_LEF = np.sqrt(off_LEF / np.where(size_LE1 > 0, size_LE1, 1))
    bits = [bits_of(config, FORMATS[name]) for name in formats]
    return ErrorTable.of_weights(formats, bits, error_LEF, *loads, model=reader.folder.name)


class _Kept:
    """Rows that came to one expert, ``most`` drawn of them; how many came, and the sum of their squared weights."""

    def __init__(self, most: int) -> None:
        self.most, self.count, self.squares = most, 0, 0.0
        self.drawn = torch.Generator().manual_seed(0)
        self.rows: tuple[torch.Tensor, ...] = ()  # lots of those kept, the rows, and what their output counts

    def add(self, x_ND: torch.Tensor, weights_N: torch.Tensor, counts_N: torch.Tensor) -> None:
        self.count += len(x_ND)
        self.squares += float(weights_N.square().sum())
        more = torch.rand(len(x_ND), generator=self.drawn).to(x_ND.device), x_ND, counts_N
        rows = tuple(map(torch.cat, zip(self.rows, more, strict=True))) if self.rows else more
        kept_N = rows[0].topk(min(self.most, len(rows[0]))).indices
        self.rows = tuple(part[kept_N] for part in rows)


@torch.no_grad()
def measure_outputs(
    mixtral: Mixtral, requests: Iterable[Request], formats: Sequence[str], most_rows: int = 256, progress: bool = False
) -> ErrorTable:
    """Runs the requests with the model as it is, and sends each expert's rows through it in every format.

    Args:
        most_rows: of an expert that are tried, drawn from all; loads and gate weights are of all.
    """
    model, config = mixtral.model, mixtral.model.params
    store = model.store.experts
    kept = [[_Kept(most_rows) for _ in range(config.num_experts)] for _ in store]
    tokens_L = np.zeros(len(store))

    def keep(layer: int, rows: RoutedRows, sum_RD: torch.Tensor) -> None:
        tokens_L[layer] += len(rows.x_RD)
        assert rows.residual_RD is not None  # one rank adds the sums to the stream, and the next norm divides by that
        count_RK = rows.weights_RK / sum_RD.float().norm(dim=1, keepdim=True)
        for expert in range(config.num_experts):
            row_N, choice_N = (rows.slots_RK == expert).nonzero(as_tuple=True)
            if len(row_N):
                weights_N, count_N = (of[row_N, choice_N] for of in (rows.weights_RK, count_RK))
                kept[layer][expert].add(rows.x_RD[row_N].float(), weights_N, count_N)

    hooks = [
        store[layer].register_forward_hook(lambda _, rows, sums, layer=layer: keep(layer, *rows, sums))
        for layer in store
    ]
    mixtral.engine.observe = lambda *_: None  # whoever observes gets all rows of the last layer, too
    try:
        for _ in tqdm(mixtral.generate_many(requests), unit="prompt", disable=not progress):
            pass
    finally:
        mixtral.engine.observe = None
        for hook in hooks:
            hook.remove()
    shape = (config.n_layers, config.num_experts)
    error, harm = np.zeros((2, *shape, len(formats)))
    for layer in tqdm(range(config.n_layers), desc="rounding", unit="layer", disable=not progress):
        w13_EGD, w2_EDF = store[layer].matrices
        for expert, of in enumerate(kept[layer]):
            if not of.rows:
                continue
            _, x_ND, count_N = of.rows
            matrices = [*w13_EGD[expert].float().chunk(2), w2_EDF[expert].float()]
            y_ND = _swiglu(x_ND, *matrices)
            for number, name in enumerate(formats):
                off_ND = _swiglu(x_ND, *(FORMATS[name].quantize(w).float() for w in matrices)) - y_ND
                error[layer, expert, number] = float((off_ND.square().sum() / y_ND.square().sum()).sqrt())
                square = float((off_ND * count_N[:, None]).square().sum()) * of.count / len(x_ND)
                harm[layer, expert, number] = square / tokens_L[layer]
    counts = np.array([[of.count for of in row] for row in kept])
    squares = np.array([[of.squares for of in row] for row in kept])
    load, gate = counts / np.maximum(counts.sum(1, keepdims=True), 1), np.sqrt(squares / np.maximum(counts, 1))
    bits = np.array([bits_of(config, FORMATS[name]) for name in formats])
    return ErrorTable(tuple(formats), bits, error, load, gate, harm, "outputs", {"rows": most_rows})


def _swiglu(x_ND: torch.Tensor, w1: torch.Tensor, w3: torch.Tensor, w2: torch.Tensor) -> torch.Tensor:
    return F.linear(F.silu(F.linear(x_ND, w1)) * F.linear(x_ND, w3), w2)


def _check_plain(reader: CheckpointReader) -> None:
    held = {weights.name for name, weights in reader.formats.items() if ".experts." in name and not weights.is_plain}
    if held:
        raise ValueError(
            f"{reader.folder}: experts are rounded already ({', '.join(sorted(held))}); take plain weights"
        )
