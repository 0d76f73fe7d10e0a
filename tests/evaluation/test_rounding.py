"""What experts lose by rounding, against their layer run with the rounded weights in place."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch

from mixtralkit import Mixtral
from mixtralkit.checkpoint import RankFiles, open_checkpoint, save_checkpoint
from mixtralkit.distributed import RankContext
from mixtralkit.evaluation.rounding import bits_of, measure_outputs, measure_weights
from mixtralkit.moe.dispatch.base import RoutedRows
from mixtralkit.moe.weights import FORMATS
from mixtralkit.planning.precision import ErrorTable, loads_of
from mixtralkit.planning.trace import RoutingTrace
from tests.engine.parts import engine_config, make_checkpoint

CONFIG = engine_config(hidden_dim=64, dim=48)
NAMES = ("int8", "int4:32:zeros", "fp8:channel")
PROMPTS = ["In the beginning", "def add(a, b):", "The command prints what it found"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("plain"), CONFIG)


def test_outputs_are_off_by_what_the_rounded_expert_changes(folder: Path) -> None:
    mixtral = Mixtral.build(folder, max_seq_len=64, max_batch_size=4, context=RankContext(), prefix_reuse=False)
    store, seen = mixtral.model.store.experts, {}

    def see(layer: int, rows: RoutedRows, sums: torch.Tensor) -> None:  # copies: the stream is added to in place
        parts = {f.name: getattr(rows, f.name) for f in fields(rows)}
        rows = RoutedRows(**{n: p.clone() if isinstance(p, torch.Tensor) else p for n, p in parts.items()})
        seen.setdefault(layer, []).append((rows, sums.clone()))

    for layer, experts in store.items():
        experts.register_forward_hook(lambda _, rows, sums, layer=layer: see(layer, *rows, sums))
    requests = [mixtral.request(i, prompt, 0) for i, prompt in enumerate(PROMPTS)]
    table = measure_outputs(mixtral, requests, NAMES, most_rows=10_000)
    tokens = sum(len(request.prompt) for request in requests)
    for layer, experts in store.items():
        calls = list(seen[layer])
        assert sum(len(rows.x_RD) for rows, _ in calls) == tokens, "all rows, of the last layer too"
        w13_EGD, w2_EDF = experts.matrices
        for expert in range(CONFIG.num_experts):
            chosen = torch.cat([rows.slots_RK == expert for rows, _ in calls])
            weights = torch.cat([rows.weights_RK for rows, _ in calls])[chosen]
            assert table.load[layer, expert] == pytest.approx(float(chosen.sum()) / (2 * tokens))
            if not len(weights):
                assert not table.harm[layer, expert].any()
                continue
            assert table.gate[layer, expert] == pytest.approx(float(weights.square().mean().sqrt()), rel=1e-5)
            plain = w13_EGD[expert].clone(), w2_EDF[expert].clone()
            for number, name in enumerate(NAMES):
                w1, w3 = (FORMATS[name].quantize(w).float() for w in plain[0].chunk(2))
                w13_EGD.data[expert], w2_EDF.data[expert] = (
                    torch.cat([w1, w3]),
                    FORMATS[name].quantize(plain[1]).float(),
                )
                off = sum(
                    float(((experts.forward(rows) - sums).norm(dim=1) / sums.norm(dim=1)).square().sum())
                    for rows, sums in calls
                )
                w13_EGD.data[expert], w2_EDF.data[expert] = plain
                assert table.harm[layer, expert, number] == pytest.approx(off / tokens, rel=1e-3)
    few = measure_outputs(mixtral, requests, NAMES, most_rows=8)
    np.testing.assert_array_equal(few.load, table.load)
    assert few.harm.sum() == pytest.approx(table.harm.sum(), rel=0.5)


def test_weights_and_loads_by_hand(folder: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    experts = np.stack([rng.permutation(8)[:2] for _ in range(60)]).reshape(20, 3, 2).astype(np.int16)
    weights = rng.uniform(0.2, 0.9, experts.shape).astype(np.float16)
    load, gate = loads_of(RoutingTrace(experts, 8, weights), CONFIG)
    here = experts[:, 1] == 5
    assert load[1, 5] == pytest.approx(here.sum() / 40)
    assert gate[1, 5] == pytest.approx(np.sqrt((weights[:, 1][here].astype(float) ** 2).mean()))
    assert loads_of(RoutingTrace(experts, 8), CONFIG)[1][1, 5] == pytest.approx(0.5)
    with open_checkpoint(folder) as reader:
        table = measure_weights(reader, NAMES, (load, gate))
        off = size = 0.0
        for matrix in ("w1", "w2", "w3"):
            w_OK = reader.read(f"layers.1.feed_forward.experts.5.{matrix}.weight").float()
            off += float((FORMATS["int8"].quantize(w_OK).float() - w_OK).square().sum())
            size += float(w_OK.square().sum())
        save_checkpoint(tmp_path / "p", CONFIG, reader, "mixtralkit", ranks=RankFiles(weights=FORMATS["int8"]))
    assert table.error[1, 5, 0] == pytest.approx((off / size) ** 0.5)
    assert table.harm[1, 5, 0] == pytest.approx(off / size * load[1, 5] * gate[1, 5] ** 2)
    assert table.bits[1] == bits_of(CONFIG, FORMATS["int4:32:zeros"])
    with open_checkpoint(tmp_path / "p") as packed, pytest.raises(ValueError, match=r"rounded already \(int8\)"):
        measure_weights(packed, NAMES, (load, gate))
    with pytest.raises(ValueError, match=r"trace: layers and experts \(2, 8\) must be \(3, 8\), the model's"):
        loads_of(RoutingTrace(experts[:, :2], 8), CONFIG)


def test_the_command_writes_table_and_picture(folder: Path, tmp_path: Path, command_line) -> None:
    common = ("quantise-report", "-m", folder, "--formats", "int8", "int4:64")
    done = command_line(*common, "--output", tmp_path / "t.json", "--plot", tmp_path / "t.png")
    assert done.returncode == 0, done.stderr
    assert "errors of weights" in done.stdout
    assert "most harm in int4:64" in done.stdout
    assert ErrorTable.load_from(tmp_path / "t.json").error.shape == (3, 8, 2)
    assert (tmp_path / "t.png").read_bytes().startswith(b"\x89PNG")
    (tmp_path / "p.jsonl").write_text(json.dumps({"prompt": PROMPTS[0]}) + "\n")
    assert "errors of outputs" in command_line(*common, "--prompts", tmp_path / "p.jsonl").stdout
    for words, sentence in (
        (("--output", tmp_path / "t.json"), "t.json: is there already"),
        (("--formats", "int3"), "formats ('int3') must be of int4"),
        (("--prompts", tmp_path / "p.jsonl", "--trace", "x.npz"), "trace (x.npz) cannot be given with prompts"),
    ):
        done = command_line(*common, *words)
        assert (done.returncode, len(done.stderr.splitlines())) == (1, 1)
        assert sentence in done.stderr
