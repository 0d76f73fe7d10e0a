"""Products with weights of 8 bits in bfloat16, which the interpreter cannot do, on a GPU."""

from __future__ import annotations

import pytest
import torch

from mixtralkit.moe.weights import FORMATS, PackedWeight
from mixtralkit.ops.linear import linear
from mixtralkit.ops.linear.reference import linear_reference

pytestmark = pytest.mark.gpu


def test_every_number_of_eight_bits():
    from mixtralkit.ops.linear.triton import _unpacked

    numbers = torch.arange(256, dtype=torch.uint8).where(torch.arange(256) % 128 != 127, 0).view(4, 64).cuda()
    for name, data in (("int8", numbers.view(torch.int8)), ("fp8", numbers.view(torch.float8_e4m3fn))):
        packed = PackedWeight(FORMATS[name], 64, (data, torch.ones(4, 1, device="cuda")))
        assert _unpacked(packed, torch.bfloat16).float().equal(data.float())


@pytest.mark.parametrize("name", ["int8", "fp8"])
@pytest.mark.parametrize(("outputs", "inputs"), [(6144, 4096), (4096, 4096), (32000, 4096), (1000, 384)])
def test_products(name, outputs, inputs):
    generator = torch.Generator("cuda").manual_seed(0)
    w_OI = torch.randn(outputs, inputs, device="cuda", generator=generator) * 0.02
    packed = FORMATS[name].quantize(w_OI)
    norm = torch.ones(inputs, device="cuda", dtype=torch.bfloat16), 1e-5
    for rows in (1, 2, 16, 33, 100, 300, 700):
        x_TI = torch.randn(rows, inputs, device="cuda", generator=generator).bfloat16()
        expected = linear_reference(x_TI.float(), packed, (norm[0].float(), norm[1]))
        found = linear(x_TI, packed, norm)
        assert (found.float() - expected).norm() <= 5e-3 * expected.norm()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            again = linear(x_TI, packed, norm)
        graph.replay()
        assert again.equal(found)
