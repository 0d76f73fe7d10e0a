"""Every reader of files from outside: a right answer or one sentence, in bounded time, whatever the file holds."""

from __future__ import annotations

import io
import json
import os
import pickle
import shutil
import time
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from mixtralkit.checkpoint import open_checkpoint, save_checkpoint
from mixtralkit.config import ModelConfig
from mixtralkit.distributed import RankContext
from mixtralkit.engine.tokenizer import Tokenizer
from mixtralkit.evaluation.compare import compare
from mixtralkit.evaluation.prompt_sets import read_prompts
from mixtralkit.evaluation.run import read_rows
from mixtralkit.evaluation.run_record import RunRecord
from mixtralkit.evaluation.summary import Row, as_json, summarise
from mixtralkit.planning.cost import ModelShape
from mixtralkit.planning.formats import load_plan, save_plan
from mixtralkit.planning.hardware import Hardware
from mixtralkit.planning.plan import contiguous
from mixtralkit.planning.popularity import PathPopularity
from mixtralkit.planning.precision import ErrorTable
from mixtralkit.planning.replay import Execution
from mixtralkit.planning.simulate import simulate
from mixtralkit.planning.trace import RoutingTrace, load_routing
from mixtralkit.planning.trace_parts import PartWriter
from mixtralkit.training.corpus import Document, load_corpus, write_documents
from mixtralkit.training.state import load_state
from mixtralkit.training.tokens import TokenSet
from tests.checkpoint.gguf_files import write_gguf
from tests.checkpoint.models import CONFIGS, random_tensors, write_one_file, write_params
from tests.engine.parts import VOCAB_SIZE, make_tokenizer
from tests.engine.side_files import CHATML, write_folder
from tests.planning.machines import machine

CONFIG = CONFIGS["grouped"]
SMALL = ModelConfig(
    dim=64, n_layers=1, head_dim=16, hidden_dim=64, n_heads=4, n_kv_heads=2, vocab_size=VOCAB_SIZE, num_experts=2
)
ROOT = Path(__file__).resolve().parent.parent
SHAPE = ModelShape(dim=64, hidden=128, num_experts=4, top_k=2, heads=4, kv_heads=2, head_dim=16, vocab=100)
LIMIT_S = 10.0
ODD = st.one_of(
    st.sampled_from([
        None, True, -1, 0, 2**31, 2**63, 10**400, -(10**400), 1e300, 0.5, "", "x", "1" * 31, [], {}, [[]], [None],
        {"a": {}}, [1] * 50, {str(i): i for i in range(50)},
    ]),
    st.recursive(st.none() | st.integers() | st.text(max_size=5), lambda inner: st.lists(inner, max_size=3)),
)  # fmt: skip


def checkpoint_hf(folder: Path) -> None:
    save_checkpoint(folder, CONFIG, random_tensors(CONFIG), "hf", 2)


def checkpoint_pth(folder: Path) -> None:
    write_one_file(folder, CONFIG, random_tensors(CONFIG))


def checkpoint_ours(folder: Path) -> None:
    save_checkpoint(folder, CONFIG, random_tensors(CONFIG), "mixtralkit")


def checkpoint_gptq(folder: Path) -> None:
    """Small, of zeros: only shapes and scales are looked at."""
    save_checkpoint(folder, SMALL, random_tensors(SMALL), "hf", 1)
    tensors = load_file(folder / "model.safetensors")
    for name in [name for name in tensors if ".experts." in name]:
        module = name.removesuffix("weight")
        outputs, inputs = tensors.pop(name).shape
        tensors[f"{module}qweight"] = torch.zeros(inputs // 8, outputs, dtype=torch.int32)
        tensors[f"{module}qzeros"] = torch.zeros(inputs // 32, outputs // 8, dtype=torch.int32)
        tensors[f"{module}scales"] = torch.ones(inputs // 32, outputs, dtype=torch.float16)
    save_file(tensors, folder / "model.safetensors")
    stated = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": False, "checkpoint_format": "gptq"}
    content = json.loads((folder / "config.json").read_text()) | {"quantization_config": stated}
    (folder / "config.json").write_text(json.dumps(content))


def checkpoint_gguf(folder: Path) -> None:
    words = make_tokenizer(folder)
    (folder / "tokenizer.model").unlink()
    write_gguf(folder / "model.gguf", "stacked", "Q4_0", model=(SMALL, None), tokenizer=words)


def read_gguf(folder: Path, path: Path) -> None:
    Tokenizer.beside(path).encode("a text")
    open_checkpoint(folder).close()


def tokenizer(folder: Path) -> None:
    write_folder(
        folder, generation_config={"eos_token_id": [2, 384]}, added_tokens={"<|im_end|>": 384, "<|im_start|>": 385},
        tokenizer_config={"chat_template": CHATML, "eos_token": "<|im_end|>", "legacy": False, "added_tokens_decoder": {
            "384": {"content": "<|im_end|>", "special": True, "lstrip": True}}},
        special_tokens_map={"bos_token": "<s>", "additional_special_tokens": ["<|im_start|>"]},
    )  # fmt: skip


def plans(folder: Path) -> None:
    for name in ("plan", "sglang", "vllm-ascend", "tensorrt"):
        save_plan(contiguous(2, 4, 2), folder / f"{name}.{'yaml' if name == 'tensorrt' else 'json'}", name)
    words = {"precision": [["int8", None, "plain", "int4"]] * 2, "tier": [["gpu", "host", None, "host"]] * 2}
    replace(contiguous(2, 4, 2), **words).save(folder / "formats.json")


def errors(folder: Path) -> None:
    load, error = np.full((2, 3), 0.5), np.full((2, 3, 2), 0.1)
    ErrorTable.of_weights(("int8", "int4:32"), (8, 4.5), error, load, load, model="m").save(folder / "errors.json")


def traces(folder: Path) -> None:
    experts = np.array([[[0, 1], [2, 3]], [[1, 0], [3, 1]]], np.int16)
    RoutingTrace(experts, 4, weights=np.full(experts.shape, 0.5, np.float16)).save(folder / "trace.npz")
    np.save(folder / "trace.npy", experts)
    part = PartWriter(folder / "part.npz.rank0.part", 4, 2, 2, {})
    part.add((0, 0, 2), experts.swapaxes(0, 1).copy(), np.full((2, 2, 2), 0.5, np.float16))
    part.close()
    torch.save({"logical_count": torch.ones(2, 4)}, folder / "loads.pt")
    (folder / "loads.json").write_text(json.dumps({"logical_count": [[1, 2, 3, 4], [4, 3, 2, 1]]}))


def sets(folder: Path) -> None:
    record = {"id": 1, "prompt": "a", "choices": ["b", "c"], "answer": 0, "max_gen_len": 3, "stop": "x"}
    (folder / "set.jsonl").write_text(json.dumps(record) + "\n")
    (folder / "results.jsonl").write_text(json.dumps({"id": 1, "scores": {"perplexity": 1.0}, "logprob": -1.0,
                                                      "num_tokens": 3, "num_bytes": 9}) + "\n")  # fmt: skip


def machines(folder: Path) -> None:
    machine(across=True).save(folder / "wires.json")
    shutil.copy(ROOT / "configs" / "hardware" / "h200x4.json", folder / "fused.json")


def runs(folder: Path) -> None:
    """A finished evaluation, and the same beside it to be compared with."""
    rows = [{"id": i, "scores": {"accuracy": i % 2}, "domain": "a"} for i in range(4)]
    facts = {"format": 2, "model": {"config": {}, "files": [], "weights": "x"}, "prompts": "p", "options": {"seed": 1}}
    measures = summarise([Row.of(row) for row in rows])
    (folder / "run.json").write_text(json.dumps(facts))
    (folder / "results.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "summary.json").write_text(json.dumps({"records": 4, **as_json(measures)}))


def training(folder: Path) -> None:
    for part in ("train", "heldout"):
        lines = [Document("a", b"some text"), Document("b", turns=("who?", "me"))]
        write_documents(folder / part / "prose.jsonl", lines)


def read_machines(folder: Path, path: Path) -> None:
    hardware = Hardware.load(path)
    trace = RoutingTrace(np.array([[[0, 1]], [[2, 3]], [[1, 3]], [[0, 2]]], np.int16), 4)
    for plan, dispatcher in ((contiguous(1, 4, 2), "exact"), (contiguous(1, 4, 2), "symmetric")):
        simulate(plan, trace, SHAPE, hardware, Execution(dispatcher, chunks=1 + (dispatcher == "exact")))


def read_runs(folder: Path, path: Path) -> None:
    facts = json.loads('{"format": 2, "model": {"config": {}, "files": []}, "prompts": "p", "options": {"seed": 1}}')
    RunRecord(folder / "run.json", facts, folder, "advice")
    compare(folder, folder)


def read_training(folder: Path, path: Path) -> None:
    load_corpus([folder])


def read_plans(folder: Path, path: Path) -> None:
    load_plan(path, num_experts=4, world_size=2)


def read_errors(folder: Path, path: Path) -> None:
    ErrorTable.load_from(path)


def read_traces(folder: Path, path: Path) -> None:
    load_routing(folder / "part.npz" if path.suffix == ".part" else path, 4)


def read_sets(folder: Path, path: Path) -> None:
    read_prompts(path) if path.name == "set.jsonl" else read_rows(path)


KINDS: dict[Callable[[Path], None], Callable[[Path, Path], Any]] = {
    checkpoint_hf: lambda folder, _: open_checkpoint(folder).close(),
    checkpoint_pth: lambda folder, _: open_checkpoint(folder).close(),
    checkpoint_ours: lambda folder, _: open_checkpoint(folder).close(),
    checkpoint_gptq: lambda folder, _: open_checkpoint(folder).close(),
    checkpoint_gguf: read_gguf,
    tokenizer: lambda folder, _: Tokenizer.beside(folder, vocab_size=448).encode("a <|im_end|>"),
    plans: read_plans,
    errors: read_errors,
    traces: read_traces,
    sets: read_sets,
    machines: read_machines,
    runs: read_runs,
    training: read_training,
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict:
    made = {make: tmp_path_factory.mktemp(make.__name__) for make in KINDS}
    for make, folder in made.items():
        make(folder)
    return made


def holds(read: Callable[[], Any]) -> None:
    """Reads, or says in one sentence why not, in time."""
    start, said = time.process_time(), ""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            read()
        except ValueError as error:
            said = str(error)
    assert "\n" not in said
    assert len(said) < 5000
    assert time.process_time() - start < LIMIT_S


def changed_json(draw: Callable[[Any], Any], content: Any) -> Any:
    """The content with one value at some place replaced, or a key taken away or added."""
    if isinstance(content, dict | list) and content and draw(st.integers(0, 3)):
        keys = list(content) if isinstance(content, dict) else list(range(len(content)))
        key = draw(st.sampled_from(keys))
        copy = content.copy()
        if draw(st.integers(0, 9)) == 0:
            del copy[key]
        else:
            copy[key] = changed_json(draw, content[key])
        return copy
    return draw(ODD)


@settings(deadline=None, max_examples=400, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_change_of_any_file_is_a_right_answer_or_one_sentence(folders, data):
    make = data.draw(st.sampled_from(list(KINDS)))
    folder = folders[make]
    path = data.draw(st.sampled_from(sorted(path for path in folder.rglob("*") if path.is_file())))
    whole = path.read_bytes()
    try:
        if path.suffix in (".json", ".jsonl") and data.draw(st.integers(0, 4)):
            parts = whole.splitlines() if path.suffix == ".jsonl" else [whole]
            line = data.draw(st.integers(0, len(parts) - 1))
            parts[line] = json.dumps(changed_json(data.draw, json.loads(parts[line]))).encode()
            path.write_bytes(b"\n".join(parts) + b"\n")
        else:
            place = data.draw(st.integers(0, min(len(whole) - 1, 3000)))
            kind = data.draw(st.sampled_from(["flip", "cut", "insert", "end"]))
            piece = data.draw(st.binary(min_size=1, max_size=8))
            path.write_bytes({
                "flip": whole[:place] + bytes([whole[place] ^ piece[0]]) + whole[place + 1 :],
                "cut": whole[:place], "insert": whole[:place] + piece + whole[place:],
                "end": whole[: len(whole) - 1 - place % 200] + piece,
            }[kind])  # fmt: skip
        holds(lambda: KINDS[make](folder, path))
    finally:
        path.write_bytes(whole)


def doubled(depth: int) -> bytes:
    """A pickle of a mapping whose key is a tuple that holds the tuple below twice, and so on."""
    out = b"\x80\x02}(K\x01K\x02\x86" + b"q\x00h\x00\x86" * depth + b"K\x01u."
    return out


def zipped(**records: bytes) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for name, content in records.items():
            archive.writestr(f"archive/{name.replace('_', '.', 1)}", content)
    return out.getvalue()


def params(**changes: Any) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        checkpoint_pth(folder)
        content = {**CONFIG.to_mistral(), **changes}
        (folder / "params.json").write_text(json.dumps(content))

    return write


def pth(content: bytes) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        write_params(folder, CONFIG)
        (folder / "consolidated.00.pth").write_bytes(content)

    return write


def lying_zip(folder: Path) -> None:
    checkpoint_pth(folder)
    path = folder / "consolidated.00.pth"
    content = path.read_bytes()
    at = content.index(b"PK\x01\x02")
    path.write_bytes(content[: at + 20] + (0xFFFFFFF0).to_bytes(4, "little") * 2 + content[at + 28 :])


def strided(strides: tuple[int, int]) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        write_params(folder, CONFIG)
        tensors = random_tensors(CONFIG)
        name = "output.weight"
        shape = tuple(tensors[name].shape)
        tensors[name] = torch.as_strided(torch.zeros(4096), shape, strides)
        torch.save(OrderedDict(tensors), folder / "consolidated.00.pth")

    return write


def many_shards(folder: Path) -> None:
    (folder / "config.json").write_text("{}")
    (folder / "model-00001-of-9999999999.safetensors").touch()


BOMBS = {
    "layers": (params(n_layers=10**5), r"n_layers \(100000\) must be at most"),
    "experts": (params(moe={"num_experts": 10**9, "num_experts_per_tok": 2}), r"num_experts \(1000000000\)"),
    "both": (params(n_layers=1000, moe={"num_experts": 30_000, "num_experts_per_tok": 2}), "times num_experts"),
    "digits": (params(dim=10**400), "dim .a whole number of 401 digits|dim .*must be at most"),
    "under moe": (params(moe={"num_experts": 4, "num_experts_per_tok": 10**400, "x": 1}), "num_experts_per_tok"),
    "infinite base": (params(rope_theta=float("inf")), "not finite"),
    "shards": (many_shards, "lacks model-00002-of-9999999999"),
    "doubled tuples": (pth(zipped(data_pkl=doubled(60))), "keys are no texts"),
    "a deep pickle": (pth(zipped(data_pkl=pickle.dumps({}, 2)[:-1] + b"(" * 10**6 + b".")), "holds|damaged"),
    "a storage that is none": (pth(zipped(data_pkl=pickle.dumps({"a": 1}, 2))), "not a tensor"),
    "zip claims": (lying_zip, "claims 4,294,967,280 bytes"),
    "zero strides": (strided((0, 1)), "not stored row by row"),
}  # fmt: skip


@pytest.mark.parametrize("name", BOMBS)
@pytest.mark.filterwarnings("ignore:unknown keys")
def test_bombs_are_refused_before_anything_is_built(tmp_path, name):
    """They hung, or ate the memory; their claims are held against bounds and the file's size."""
    write, says = BOMBS[name]
    write(tmp_path)
    start = time.process_time()
    with pytest.raises(ValueError, match=says) as caught:
        open_checkpoint(tmp_path)
    assert time.process_time() - start < LIMIT_S
    assert len(str(caught.value)) < 3000


@pytest.mark.parametrize(
    "header", [{"num_layers": 10**9}, {"num_layers": [1]}, {"top_k": 10**30}, {"num_experts": None}]
)
def test_headers_of_trace_parts_that_lie(tmp_path, header):
    whole = {"num_experts": 4, "num_layers": 2, "top_k": 2, "meta": {}, **header}
    (tmp_path / "t.npz.rank0.part").write_bytes(json.dumps(whole).encode() + b"\n")
    with pytest.raises(ValueError, match="does not begin as a part"):
        RoutingTrace.load(tmp_path / "t.npz")


@pytest.mark.parametrize("words", [(-1,), (1, 0, 0, -5), (2**31 - 1,)])
def test_steps_of_trace_parts_that_lie(tmp_path, words):
    header = {"num_experts": 4, "num_layers": 2, "top_k": 2, "meta": {}}
    body = np.array(words, np.int32).tobytes()
    (tmp_path / "t.npz.rank0.part").write_bytes(json.dumps(header).encode() + b"\n" + body)
    holds(lambda: RoutingTrace.load(tmp_path / "t.npz"))


def test_an_archive_that_unpacks_to_far_more(tmp_path):
    with (
        zipfile.ZipFile(tmp_path / "t.npz", "w", zipfile.ZIP_DEFLATED) as archive,
        archive.open("experts.npy", "w") as file,
    ):
        file.write(bytes(50 << 20))
    with pytest.raises(ValueError, match=r"t\.npz: unpacks to far more than it holds|is not a whole"):
        RoutingTrace.load(tmp_path / "t.npz")


def test_arrays_of_elements_without_bytes(tmp_path):
    """A file of 128 bytes said that it had 2·10¹⁰ of them, and each was looked at."""
    header = b"{'descr': '|S0', 'fortran_order': False, 'shape': (10000000000, 2), }".ljust(117) + b"\n"
    (tmp_path / "t.npy").write_bytes(b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header)
    holds(lambda: RoutingTrace.load(tmp_path / "t.npy"))


@pytest.mark.parametrize("read", [load_plan, RoutingTrace.load, load_routing])
@pytest.mark.parametrize("suffix", ["json", "npz", "pt"])
def test_pipes_are_never_waited_for(tmp_path, read, suffix):
    os.mkfifo(tmp_path / f"a.{suffix}")
    with pytest.raises(ValueError, match="is a pipe, not an ordinary file"):
        read(tmp_path / f"a.{suffix}")


def profile(path: Path) -> None:
    experts = np.random.default_rng(0).permuted(np.tile(np.arange(4), (40, 3, 1)), axis=2)[:, :, :2]
    PathPopularity.fit(RoutingTrace(experts, 4), 2).save(path)


def tokens(path: Path) -> None:
    ids = np.arange(40, dtype=np.uint16)
    TokenSet({"a": ids}, {"a": ids}, {"a": 9}, b"model").save(path)


@pytest.mark.parametrize(("make", "load"), [(profile, PathPopularity.load), (tokens, TokenSet.load)])
def test_archives_of_profiles_and_tokens(tmp_path, make, load):
    """Empty, text, garbage, other keys, other types: tracebacks before."""
    path = tmp_path / "a.npz"
    make(path)
    load(path)
    with np.load(path) as file:
        arrays = dict(file)
    for key, array in arrays.items():
        others = [np.array([1.5]), np.array("text"), np.array(10**12), np.zeros((2, 2), np.int64), np.array([-1]), None]
        for other in others:
            changed = {**arrays, key: other}
            np.savez(path, **{name: value for name, value in changed.items() if value is not None})
            if array.dtype != np.uint8:  # the tokenizer is any bytes
                with pytest.raises(ValueError, match=r"a\.npz: (is not a popularity profile|not a file of tokens)"):
                    load(path)
    for content in (b"", b"text", pickle.dumps({}), b"PK\x03\x04" + bytes(200)):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"a\.npz: "):
            load(path)


@pytest.mark.parametrize("content", [b"", b"text", pickle.dumps({"step": 3}), {"step": 3}, [1]])
def test_resume_states_that_are_none(tmp_path, content):
    folder = tmp_path / "step-0000001"
    folder.mkdir()
    path = folder / "rank-0.pt"
    path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
    with pytest.raises(ValueError, match=r"rank-0\.pt: is no saved state"):
        load_state(tmp_path, RankContext())
