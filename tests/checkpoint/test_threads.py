"""How threads read at a time, and how many of them."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from mixtralkit.checkpoint.files import ByteFile
from mixtralkit.checkpoint.loader import CPU_THREADS, MOST_GPU_THREADS, reading_threads
from mixtralkit.distributed import RankContext


def test_threads_pick_rows_of_one_file_together(tmp_path: Path) -> None:
    content = np.random.default_rng(0).integers(0, 256, (256, 40), dtype=np.uint8)
    border = 7018  # inside a row's wanted columns, so that one read goes over it
    (tmp_path / "part0").write_bytes(content.tobytes()[:border])
    (tmp_path / "part1").write_bytes(content.tobytes()[border:])
    file = ByteFile([tmp_path / "part0", tmp_path / "part1"])
    out = np.zeros((256, 16), dtype=np.uint8)

    def read(first: int) -> None:
        for row in range(first, 256, 64):
            file.read_rows_into(out[row : row + 8], row * 40 + 12, pitch=40)

    threads = [threading.Thread(target=read, args=(first,)) for first in range(0, 64, 8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    file.close()
    assert (out == content[:, 12:28]).all()


@pytest.mark.parametrize(("cores", "ranks", "threads"), [(16, 1, MOST_GPU_THREADS), (64, 8, 8), (16, 4, 4), (2, 4, 2)])
def test_ranks_of_gpus_divide_the_cores(monkeypatch: pytest.MonkeyPatch, cores: int, ranks: int, threads: int) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(cores)), raising=False)
    assert reading_threads(RankContext(0, ranks, torch.device("cuda", 0))) == threads
    assert reading_threads(RankContext(0, ranks)) == CPU_THREADS
