"""Every format onto one, two and four ranks under every layout, against slices of the whole tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch

from mixtralkit.checkpoint import FORMATS, CheckpointReader, RankFiles, load_into, open_checkpoint, save_checkpoint
from mixtralkit.checkpoint import loader as loader_module
from mixtralkit.config import ModelConfig, ParallelConfig
from mixtralkit.distributed import RankContext, RankFailed
from mixtralkit.layout import RankLayout
from mixtralkit.planning.plan import ExpertPlan, contiguous, everywhere
from tests.checkpoint.models import CONFIGS, random_tensors, write_one_file
from tests.ranks import run_ranks


def _layouts(config: ModelConfig, world_size: int) -> Iterator[tuple[ParallelConfig, ExpertPlan]]:
    plain = contiguous(config.n_layers, config.num_experts, world_size)
    for attention, experts in product(("tp", "dp"), ("tp", "ep")):
        yield ParallelConfig(attention, experts), plain
    yield ParallelConfig("dp", "ep"), everywhere(config.n_layers, config.num_experts, world_size)
    yield ParallelConfig("tp", "ep"), _with_replicas(config, world_size)


def _with_replicas(config: ModelConfig, world_size: int) -> ExpertPlan:
    """Expert 0 everywhere, expert 1 on ranks 0 and 1, the last rank's experts in falling order."""
    plan = contiguous(config.n_layers, config.num_experts, world_size)
    slots = np.full((config.n_layers, world_size, config.num_experts + 1), -1)
    for layer, rank in product(range(config.n_layers), range(world_size)):
        held = [*plan.experts_of(layer, rank), 0, *([1] if rank < 2 else [])]
        held = sorted(set(held), reverse=rank == world_size - 1)
        slots[layer, rank, : len(held)] = held
    return ExpertPlan(slots, config.num_experts)


def _check_loads(
    context: RankContext, reader: CheckpointReader, layout: RankLayout, whole: dict[str, torch.Tensor], dtype
) -> None:
    parameters = {
        name: torch.full(shape, torch.nan, dtype=dtype, device=context.device)
        for name, shape in layout.shapes().items()
    }
    load_into(parameters, layout, reader, context)
    for name, parameter in parameters.items():
        assert not parameter.isnan().any(), f"{reader.folder.name}, {layout.parallel}: {name} is not filled"
    for piece in layout.pieces():
        wanted = whole[piece.source][slice(*piece.rows)]
        wanted = wanted if piece.columns is None else wanted[:, slice(*piece.columns)]
        got = parameters[piece.target][piece.at]
        assert torch.equal(got, wanted.to(dtype)), f"{reader.folder.name}, {layout.parallel}: {piece}"


def _rank_loads_all(context: RankContext, root: Path, config: ModelConfig, reread_share: float) -> int:
    loader_module.REREAD_SHARE = reread_share
    whole, checked = random_tensors(config), 0
    for folder in sorted(root.iterdir()):
        with open_checkpoint(folder) as reader:
            for parallel, plan in _layouts(config, context.world_size):
                try:
                    layout = RankLayout(config, parallel, plan, context.rank)
                except ValueError:
                    continue
                _check_loads(context, reader, layout, whole, torch.float32 if checked % 2 else torch.bfloat16)
                checked += 1
    return checked


def _write_all(root: Path, config: ModelConfig) -> None:
    tensors = random_tensors(config)
    for format in FORMATS:
        if format == "mistral-shards" and config.hidden_dim % 2:
            continue
        save_checkpoint(root / format, config, tensors, format)
    for world_size, parallel in ((2, ParallelConfig("dp", "ep")), (3, ParallelConfig("dp", "tp"))):
        ranks = RankFiles(world_size, parallel, _with_replicas(config, world_size))
        save_checkpoint(root / f"ours-{world_size}", config, tensors, "mixtralkit", ranks=ranks)


@pytest.mark.parametrize("name", ["grouped", "one_kv_head", "odd_heads"])
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_every_format_loads_under_every_layout(tmp_path: Path, name: str, world_size: int) -> None:
    config = CONFIGS[name]
    _write_all(tmp_path, config)
    checked = run_ranks(_rank_loads_all, world_size, tmp_path, config, 0.0)
    least = 3 if name == "odd_heads" else 6  # five heads divide over one rank only
    assert min(checked) == max(checked) >= least * len(list(tmp_path.iterdir()))


def test_wide_rows_are_read_column_by_column(tmp_path: Path) -> None:
    """Cut rows of more than ``NARROW_BYTES`` take the path without amplification."""
    config = CONFIGS["wide"]
    tensors = random_tensors(config)
    for format in ("mistral", "mistral-split", "mistral-shards", "mistral-stacked", "hf"):
        save_checkpoint(tmp_path / format, config, tensors, format)
    assert min(run_ranks(_rank_loads_all, 2, tmp_path, config, 0.0)) == 30


def _rank_counts_bytes(context: RankContext, folder: Path, config: ModelConfig) -> list[int]:
    counts = []
    for attention, experts in product(("tp", "dp"), ("tp", "ep")):
        parallel = ParallelConfig(attention, experts)
        layout = RankLayout(config, parallel, contiguous(1, 4, context.world_size), context.rank)
        parameters = {name: torch.empty(shape, dtype=torch.bfloat16) for name, shape in layout.shapes().items()}
        with open_checkpoint(folder) as reader:
            before = _rchar()
            load_into(parameters, layout, reader, context)
            counts.append(_rchar() - before)
    return counts


def _rchar() -> int:
    return int(Path("/proc/self/io").read_text().split()[1])


def test_ranks_together_read_the_file_once(tmp_path: Path) -> None:
    config = CONFIGS["wide"]
    path = write_one_file(tmp_path, config, random_tensors(config))
    read = run_ranks(_rank_counts_bytes, 4, tmp_path, config)
    for attempt in zip(*read, strict=True):
        assert path.stat().st_size < sum(attempt) <= 1.1 * path.stat().st_size


def _rank_sends_by_way_of_the_device(context: RankContext, root: Path, config: ModelConfig) -> tuple[int, int]:
    """All parameters lie elsewhere than on the context's device, which is the same memory by another name."""
    context, sent = replace(context, device=torch.device("cpu", 0)), []
    assert context.device != torch.empty(0).device
    layout = RankLayout(config, ParallelConfig("dp", "ep"), _with_replicas(config, context.world_size), context.rank)
    parameters = {name: torch.full(shape, torch.nan) for name, shape in layout.shapes().items()}
    held = [(p.data_ptr(), p.data_ptr() + p.nbytes) for p in parameters.values()]

    def watched(call: Callable[..., object]) -> Callable[..., object]:
        def noted(tensor: torch.Tensor, *given: object, **more: object) -> object:
            sent.append(any(first <= tensor.data_ptr() < end for first, end in held))
            return call(tensor, *given, **more)

        return noted

    with open_checkpoint(root) as reader, pytest.MonkeyPatch.context() as patch:
        patch.setattr(loader_module, "REREAD_SHARE", 0.0)
        for name in ("broadcast", "send", "recv"):
            patch.setattr(loader_module.dist, name, watched(getattr(loader_module.dist, name)))
        load_into(parameters, layout, reader, context)
    whole = random_tensors(config)
    for piece in layout.pieces():
        wanted = whole[piece.source][slice(*piece.rows)]
        wanted = wanted if piece.columns is None else wanted[:, slice(*piece.columns)]
        assert torch.equal(parameters[piece.target][piece.at], wanted.float()), piece
    return len(sent), sum(sent)


def test_weights_in_host_memory_are_sent_by_way_of_the_device(tmp_path: Path) -> None:
    """NCCL refused experts that several ranks with GPUs keep in host memory."""
    config = CONFIGS["grouped"]
    save_checkpoint(tmp_path / "ours", config, random_tensors(config), "mixtralkit")
    for count, of_parameters in run_ranks(_rank_sends_by_way_of_the_device, 3, tmp_path / "ours", config):
        assert count > 5
        assert of_parameters == 0


def _rank_of_failing(context: RankContext, folder: Path, config: ModelConfig) -> tuple[str, bool]:
    layout = RankLayout(config, ParallelConfig("dp", "ep"), contiguous(2, 4, context.world_size), context.rank)
    parameters = {name: torch.full(shape, torch.nan) for name, shape in layout.shapes().items()}
    if context.rank == 1:
        parameters["norm.weight"] = torch.zeros(3)
    with open_checkpoint(folder) as reader, pytest.raises((ValueError, RankFailed)) as caught:
        load_into(parameters, layout, reader, context)
    return str(caught.value), all(p.isnan().all() for name, p in parameters.items() if name != "norm.weight")


def test_ranks_agree_on_failure_before_anything_is_loaded(tmp_path: Path) -> None:
    config = CONFIGS["grouped"]
    write_one_file(tmp_path, config, random_tensors(config))
    for said, untouched in run_ranks(_rank_of_failing, 2, tmp_path, config):
        assert "norm.weight: found (3,), wanted (24,)" in said
        assert untouched


def test_another_model_is_refused(tmp_path: Path) -> None:
    config = CONFIGS["grouped"]
    write_one_file(tmp_path, config, random_tensors(config))
    layout = RankLayout.single(replace(config, hidden_dim=24))
    parameters = {name: torch.empty(shape) for name, shape in layout.shapes().items()}
    with (
        open_checkpoint(tmp_path) as reader,
        pytest.raises(ValueError, match=r"w13: found .*40.*, the model wants .*48"),
    ):
        load_into(parameters, layout, reader, RankContext())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("name", ["one_kv_head", "wide"])
def test_every_format_loads_onto_a_gpu(tmp_path: Path, name: str) -> None:
    config = CONFIGS[name]
    for format in FORMATS:
        if format != "mistral-expert-shards":
            save_checkpoint(tmp_path / format, config, random_tensors(config), format)
    whole = {name: tensor.cuda() for name, tensor in random_tensors(config).items()}
    for folder, dtype in product(tmp_path.iterdir(), (torch.float16, torch.bfloat16)):
        with open_checkpoint(folder) as reader:
            _check_loads(RankContext(device=torch.device("cuda")), reader, RankLayout.single(config), whole, dtype)
