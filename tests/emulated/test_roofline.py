"""The roofline counts what the kernels do: its units and pairs of parts against the configurations that are chosen."""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import product

import pytest
import torch

from emulated import gpu
from localsgd_ext import ops
from localsgd_ext._precision import tf32
from localsgd_ext.roofline import DEVICES, Device, Geometry, cost

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CORES = {"fp32": "ffma", "tf32": "mma_tf32", "bf16": "mma_bf16", "fp16": "mma_f16"}
GPUS = {61: DEVICES["GTX 1080 Ti"], 75: DEVICES["T4"], 80: DEVICES["A100 40GB"], 90: DEVICES["H200"]}
LAYERS = {  # as operands of linear and of pointwise convolution
    "linear": ((2048, 128), (2048, 256), (256, 128)),
    "pointwise": ((8, 128, 16, 16), (8, 256, 16, 16), (256, 128, 1, 1)),
}


@pytest.fixture(autouse=True)
def _same_gpu() -> Iterator[None]:
    yield
    gpu.emulate()


def core(unit: str, device: Device) -> str:
    return CORES[unit if unit in device.flops_per_s else "fp32"]


@pytest.mark.parametrize("compute", GPUS)
@pytest.mark.parametrize("layer", LAYERS)
def test_units_and_parts_are_the_kernels(layer: str, compute: int) -> None:
    gpu.emulate(compute=compute, multiprocessors=GPUS[compute].multiprocessors)
    device = GPUS[compute]
    for x_dtype, z_dtype, w_dtype, rounded in product(DTYPES, DTYPES, DTYPES, (False, True)):
        x, z, weight = (
            torch.empty(shape, dtype=dtype) for shape, dtype in zip(LAYERS[layer], (x_dtype, z_dtype, w_dtype), strict=True)
        )
        with tf32(rounded):
            plan = ops.plan(x, z, weight, z_is_output=True)
        chosen = {c.algorithm: c.configuration for c in plan.candidates}
        case = f"x {x_dtype}, z {z_dtype}, weight {w_dtype}, tf32 {rounded}"
        given = {"x": x_dtype, "z": z_dtype, "weight": w_dtype, "tf32": rounded}
        gram, direct = (cost(a, Geometry(*LAYERS[layer]), **given) for a in ("gram", "direct"))  # type: ignore[arg-type]
        found = re.match(r"gram (\w+) .*; product (\w+) .*?, (\d+) pairs of parts", chosen["gram"])
        assert found is not None, chosen["gram"]
        assert gram.product is not None
        expected = core(gram.unit, device), core(gram.product.unit, device), gram.product.pairs_on(device)
        assert (found[1], found[2], int(found[3])) == expected, case
        assert chosen["direct"].startswith(core(direct.unit, device) + " "), f"{case}: {chosen['direct']}"
