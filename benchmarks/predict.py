"""What the roofline model expects of a device that nobody has measured on yet. Nothing here is a measurement."""

from __future__ import annotations

from typing import Any

from cases import Case

from benchmarks.baselines import DTYPES, LAYOUTS, algorithms
from benchmarks.networks import geometry
from localsgd_ext.roofline import Cost, Device, cost


def costs(case: Case, dtype: str, layout: str, device: Device) -> dict[str, Cost]:
    """Of each eligible algorithm, and of the normalised write alone."""
    given = {"x": DTYPES[dtype], "tf32": dtype == "tf32", "layout": LAYOUTS[layout]}
    return {
        algorithm: cost(algorithm, geometry(case), **given)
        for algorithm in (*algorithms(case, "cpu" if device.compute_capability is None else "cuda"), "apply")
    }


def rooflines(case: Case, dtype: str, layout: str, device: Device, launch_us: float | None = None) -> dict[str, float]:
    """Microseconds of each algorithm; ``library`` is two launches, its weight gradient and the write; ``wgrad`` the first alone."""
    us = {name: c.roofline_us(device, launch_us) for name, c in costs(case, dtype, layout, device).items()}
    return {**us, "wgrad": us["library"], "library": us["library"] + us["apply"]}


def predicted_row(case: Case, dtype: str, layout: str, device: Device) -> dict[str, Any]:
    """As :func:`kernels.measured_row` gives it. The user's own code is a weight gradient, a norm (reads D), a product (D in and
    out) and an addition (D, W in, W out), each a launch; compiled, the last two are one; D in fp32."""
    us = rooflines(case, dtype, layout, device)
    elements = 4 * geometry(case).wgrad_flops // (2 * geometry(case).positions)
    passes = [elements, 2 * elements, 3 * elements]
    user = us["wgrad"] + sum(Cost(n, 0, "fp32").roofline_us(device) for n in passes)
    compiled = us["wgrad"] + sum(Cost(n, 0, "fp32").roofline_us(device) for n in (elements, 3 * elements))
    eligible = {algorithm: us[algorithm] for algorithm in case.algorithms}
    pick = min(eligible, key=eligible.__getitem__)
    return {
        "us": {"auto": us[pick], **eligible, "wgrad": us["wgrad"], "user": user, "compiled": compiled},
        "pick": pick,
        "roofline_us": {algorithm: us[algorithm] for algorithm in case.algorithms},
        "status": "ok",
    }
