"""Both of PyTorch's APIs for TF32."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch

from localsgd_ext import _precision, doctor, explain, roofline
from localsgd_ext._precision import tf32, tf32_allowed

MATMUL, CUDNN = torch.backends.cuda.matmul, torch.backends.cudnn
NEW = hasattr(CUDNN, "conv")
needs_new_api = pytest.mark.skipif(not NEW, reason="this PyTorch has no fp32_precision")


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    yield
    MATMUL.allow_tf32 = CUDNN.allow_tf32 = False
    if NEW:
        MATMUL.fp32_precision = CUDNN.conv.fp32_precision = CUDNN.rnn.fp32_precision = "ieee"
    assert not MATMUL.allow_tf32
    assert not CUDNN.allow_tf32


def state() -> list[object]:
    """Of both APIs; None where reading it raises."""
    values: list[object] = []
    for read in (lambda: MATMUL.allow_tf32, lambda: CUDNN.allow_tf32):
        try:
            values.append(read())
        except RuntimeError:
            values.append(None)
    return values + ([MATMUL.fp32_precision, CUDNN.conv.fp32_precision, CUDNN.rnn.fp32_precision] if NEW else [])


def user_mixes_apis() -> None:
    """As PyTorch's documentation says; reading ``allow_tf32`` raises from here on."""
    MATMUL.fp32_precision = "tf32"
    CUDNN.conv.fp32_precision = "tf32"
    for read in (lambda: MATMUL.allow_tf32, lambda: CUDNN.allow_tf32):
        with pytest.raises(RuntimeError, match="allow_tf32"):
            read()


@pytest.mark.parametrize("on", [False, True])
def test_the_older_api(on: bool) -> None:
    MATMUL.allow_tf32, CUDNN.allow_tf32 = on, not on
    assert tf32_allowed(linear=True) is on
    assert tf32_allowed(linear=False) is not on


@needs_new_api
@pytest.mark.parametrize("on", [False, True])
def test_the_newer_api(on: bool) -> None:
    MATMUL.fp32_precision = "tf32" if on else "ieee"
    CUDNN.conv.fp32_precision = "ieee" if on else "tf32"
    assert tf32_allowed(linear=True) is on
    assert tf32_allowed(linear=False) is not on


def test_a_pytorch_without_the_newer_api(monkeypatch: pytest.MonkeyPatch) -> None:
    matmul, cudnn = SimpleNamespace(allow_tf32=True), SimpleNamespace(allow_tf32=False)
    monkeypatch.setattr(_precision, "_MATMUL", matmul)
    monkeypatch.setattr(_precision, "_CUDNN", cudnn)
    assert (tf32_allowed(linear=True), tf32_allowed(linear=False)) == (True, False)
    with tf32(True):
        assert cudnn.allow_tf32
    assert (matmul.allow_tf32, cudnn.allow_tf32) == (True, False)


@pytest.mark.parametrize("on", [False, True])
@pytest.mark.parametrize("before", ["older on", "older off", pytest.param("newer", marks=needs_new_api)])
def test_the_context_sets_both_and_restores_both(before: str, on: bool) -> None:
    if before == "newer":
        user_mixes_apis()
    else:
        MATMUL.allow_tf32 = CUDNN.allow_tf32 = before == "older on"
    kept = state()
    with tf32(on):
        assert tf32_allowed(linear=True) is tf32_allowed(linear=False) is on
        if before != "newer":
            assert MATMUL.allow_tf32 is CUDNN.allow_tf32 is on
    assert state() == kept


@needs_new_api
def test_nothing_raises_where_a_user_mixed_the_apis(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    user_mixes_apis()
    monkeypatch.setitem(explain.__globals__, "_device_of", lambda _: roofline.DEVICES["H200"])
    layer = torch.nn.Conv2d(8, 16, 3)
    explained = explain(layer, torch.randn(2, 8, 16, 16)).layers[0]
    geometry = roofline.Geometry((2, 8, 16, 16), (2, 16, 14, 14), (16, 8, 3, 3))
    device = roofline.DEVICES["H200"]
    if explained.pick == "direct":
        assert explained.roofline_us == roofline.cost("direct", geometry, tf32=True, layout="contiguous").roofline_us(device)
    kept = state()
    doctor.report_self_test(doctor.Report())
    assert state() == kept
    capsys.readouterr()
