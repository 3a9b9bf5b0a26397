"""``sample=f``: a rotating slice of the mini-batch instead of all of it."""

import pytest
import torch
import torch._dynamo
import torch.nn.functional as F
from models import PlainCNN, seeded, twice_used
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from localsgd_ext import HebbianUpdater, LocalizedLearning, StaticModeSelection, ops, reference
from localsgd_ext.sampling import sampled, sampled_range

IMAGES = 8


def batch(images: int = IMAGES) -> Tensor:
    return torch.randn(images, 3, 8, 8, generator=torch.Generator().manual_seed(2))


def expected_part(images: int, sample: float, turn: int) -> slice:
    """Written out once more: evenly spread windows from the first image to the last."""
    count = max(1, round(sample * images))
    windows = 1
    while windows * count < images:
        windows += 1
    start = 0 if windows == 1 else int((turn % windows) * (images - count) / (windows - 1))
    return slice(start, start + count)


# ---- which images


@pytest.mark.parametrize("sample", [1.0, 0.75, 0.5, 0.3, 0.25, 0.125, 1 / 3, 1e-9])
@pytest.mark.parametrize("images", [1, 2, 3, 7, 8, 31, 64])
def test_every_image_has_its_turn_and_parts_have_the_asked_size(images: int, sample: float) -> None:
    count = max(1, round(sample * images))
    turns = -(-images // count)
    seen = set()
    for turn in range(turns):
        start, length = sampled_range(images, sample, turn)
        assert length == count
        assert slice(start, start + length) == expected_part(images, sample, turn)
        seen |= set(range(start, start + length))
        assert (start, length) == sampled_range(images, sample, turn + turns)
    assert seen == set(range(images))


def test_an_empty_batch_stays_empty() -> None:
    assert sampled_range(0, 0.5, 3) == (0, 0)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_no_copy_is_made(memory_format: torch.memory_format) -> None:
    x, z = batch().to(memory_format=memory_format), torch.randn(IMAGES, 4, 6, 6).to(memory_format=memory_format)
    for turn in range(4):
        a, b = sampled(torch.empty(4, 3, 3, 3), x, z, 0.25, turn)
        for part, whole in ((a, x), (b, z)):
            assert part.untyped_storage().data_ptr() == whole.untyped_storage().data_ptr()
            assert part.stride() == whole.stride()
            assert torch.equal(part, whole[2 * turn : 2 * turn + 2])


def test_the_kernels_get_views_of_the_layers_own_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    conv, seen = nn.Conv2d(3, 4, 3), []
    original = ops.hebbian_update_
    monkeypatch.setattr(ops, "hebbian_update_", lambda w, x, z, *a, **k: (seen.append((x, z)), original(w, x, z, *a, **k)))
    updater = HebbianUpdater(conv, sample=0.5)
    updater.enable([""])
    conv.weight.requires_grad_(False)
    conv.bias.requires_grad_(False)
    x = batch()
    z = conv(x)
    ((x_part, z_part),) = seen
    assert x_part.data_ptr() == x.data_ptr()
    assert z_part.data_ptr() == z.data_ptr()
    assert (len(x_part), len(z_part)) == (4, 4)


def test_linear_layers_slice_the_first_dimension_and_unbatched_input_is_used_whole() -> None:
    linear, conv = torch.empty(5, 6), torch.empty(4, 3, 3, 3)
    x, z = torch.randn(4, 7, 6), torch.randn(4, 7, 5)
    assert [t.shape for t in sampled(linear, x, z, 0.5, 0)] == [(2, 7, 6), (2, 7, 5)]
    assert [t.shape for t in sampled(linear, x[0, 0], z[0, 0], 0.5, 0)] == [(6,), (5,)]
    assert [t.shape for t in sampled(conv, torch.empty(3, 8, 8), torch.empty(4, 6, 6), 0.5, 0)] == [(3, 8, 8), (4, 6, 6)]


# ---- training


def straight_line(x: Tensor, steps: int, sample: float, lr: float, momentum: float = 0.0, calls: int = 1) -> Tensor:
    """``F.conv2d`` and equation 4 on the sampled images, step by step; ``calls``: the layer is used so often in a forward."""
    conv = seeded(lambda: nn.Conv2d(3, 3, 3, padding=1)).double()
    weight, bias = conv.weight.detach().clone(), conv.bias.detach()
    velocity = torch.zeros_like(weight)
    for turn in range(steps):
        part, d, y = expected_part(len(x), sample, turn), torch.zeros_like(weight), x
        for _ in range(calls):
            z = F.conv2d(y, weight, bias, padding=1)
            patches = F.unfold(y[part], 3, padding=1)
            d += torch.einsum("nkp,ncp->kc", z[part].flatten(2), patches).view_as(weight)
            y = F.relu(z)
        velocity = momentum * velocity + d / d.norm()
        weight = weight + lr * velocity
    return weight


class Repeated(nn.Module):
    """One convolution, called once or more, perhaps in a checkpointed segment."""

    def __init__(self, calls: int = 1, checkpointed: bool = False) -> None:
        super().__init__()
        self.conv = seeded(lambda: nn.Conv2d(3, 3, 3, padding=1))
        self.calls, self.checkpointed = calls, checkpointed

    def body(self, x: Tensor) -> Tensor:
        for _ in range(self.calls):
            x = F.relu(self.conv(x))
        return x

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.body, x, use_reentrant=False) if self.checkpointed else self.body(x)


@pytest.mark.parametrize("sample", [0.5, 0.3, 0.125, 1.0])
@pytest.mark.parametrize(
    "options",
    [{}, {"momentum": 0.9}, {"calls": 2}, {"checkpointed": True}, {"calls": 2, "checkpointed": True, "momentum": 0.5}],
    ids=str,
)
@pytest.mark.parametrize("flowing", [False, True], ids=["prefix", "gradients flow"])
def test_agrees_with_a_straight_line_re_implementation(options: dict, sample: float, flowing: bool) -> None:
    options = {"momentum": 0.0, "calls": 1, "checkpointed": False, **options}
    momentum = options.pop("momentum")
    model = Repeated(**options).double().requires_grad_(flowing)
    updater = HebbianUpdater(model, lr=0.01, sample=sample, momentum=momentum)
    updater.enable(["conv"], deferred=["conv"] if options["calls"] > 1 else [])
    x = batch().double()
    for _ in range(5):
        y = model(x)
        if y.requires_grad:
            y.sum().backward()
    updater.flush()
    expected = straight_line(x, 5, sample, 0.01, momentum, options["calls"])
    torch.testing.assert_close(model.conv.weight.detach(), expected, rtol=1e-10, atol=1e-12)


def test_the_norm_is_that_of_the_sampled_correlation() -> None:
    model = Repeated().requires_grad_(False)
    updater = HebbianUpdater(model, lr=0.25, sample=0.25)
    updater.enable(["conv"])
    before = model.conv.weight.clone()
    model(batch())
    assert (model.conv.weight - before).norm().item() == pytest.approx(0.25, rel=1e-5)


def test_a_bad_image_matters_only_in_its_turn() -> None:
    model = Repeated().requires_grad_(False)
    updater = HebbianUpdater(model, lr=0.01, sample=0.5)
    updater.enable(["conv"])
    x = batch()
    x[-1] = float("nan")
    skipped = []
    for _ in range(4):
        model(x)
        skipped.append(updater.skipped().get("conv", 0))
    assert skipped == [0, 1, 1, 2]


def test_evaluation_does_not_take_a_turn() -> None:
    model = Repeated().requires_grad_(False)
    updater = HebbianUpdater(model, sample=0.5)
    updater.enable(["conv"])
    model.train()(batch())
    turn = updater.state_dict()["turn"]
    model.eval()(batch())
    with torch.no_grad():
        model.train()(batch())
    assert updater.state_dict()["turn"] == turn == 0


def test_activation_sees_the_sampled_images() -> None:
    shapes = []
    model = Repeated().requires_grad_(False)
    updater = HebbianUpdater(model, sample=0.25, activation=lambda z: (shapes.append(z.shape), torch.relu(z))[1])
    updater.enable(["conv"])
    model(batch())
    assert shapes == [(2, 3, 8, 8)]


@pytest.mark.parametrize("build", [PlainCNN, twice_used])
@pytest.mark.parametrize("cut", [1, 3, 4])
def test_resumes_bit_for_bit(build, cut: int) -> None:
    def start():
        model = seeded(build)
        schedule = StaticModeSelection(kind=lambda epoch: 2, l_max=1.0)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        return model, LocalizedLearning(
            model, optimizer, epochs=2, preset="paper", schedule=schedule, lr=0.01, sample=0.3, momentum=0.5
        )

    def train(model, steps):
        for _ in range(steps):
            model.zero_grad()
            model(batch()).square().mean().backward()

    whole, local = start()
    local.trace(batch())
    train(whole, 7)
    local.state_dict()  # makes the deferred updates
    first, local = start()
    local.trace(batch())
    train(first, cut)
    state, weights = local.state_dict(), first.state_dict()
    second, local = start()
    second.load_state_dict(weights)
    local.load_state_dict(state)
    train(second, 7 - cut)
    assert local.state_dict()["updater"]["turn"] == 6
    assert all(torch.equal(a, b) for a, b in zip(whole.state_dict().values(), second.state_dict().values(), strict=True))


def test_the_traced_forward_takes_no_turn() -> None:
    model = seeded(PlainCNN)
    schedule = StaticModeSelection(kind=lambda epoch: 2)
    local = LocalizedLearning(model, None, epochs=2, preset="paper", schedule=schedule, sample=0.5)
    local.trace(batch())
    assert local.state_dict()["updater"]["turn"] == -1
    model(batch())
    assert local.state_dict()["updater"]["turn"] == 0


# ---- torch.compile


@pytest.fixture
def _fresh_compiler():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("_fresh_compiler")
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_a_compiled_model_rotates_without_compiling_again(momentum: float) -> None:
    outcomes = []
    for compiled in (False, True):
        model = nn.Sequential(seeded(lambda: nn.Conv2d(3, 5, 3, padding="same")), nn.ReLU(), seeded(lambda: nn.Conv2d(5, 4, 1)))
        model.requires_grad_(False)
        updater = HebbianUpdater(model, lr=0.05, sample=0.25, momentum=momentum)
        updater.enable(["0", "2"])
        forward = torch.compile(model, backend="aot_eager") if compiled else model
        history = []
        for _ in range(6):
            forward(batch())
            history.append(model[0].weight.clone())
        assert updater.state_dict()["turn"] == 5
        outcomes.append(history)
    torch.testing.assert_close(outcomes[1], outcomes[0], rtol=1e-5, atol=1e-6)
    counters = torch._dynamo.utils.counters
    assert not counters["graph_break"]
    assert counters["stats"]["unique_graphs"] == (1 if momentum == 0 else 2)  # the first one makes the velocity


def test_the_operator_is_registered_properly() -> None:
    x, weight = batch(), torch.randn(4, 3, 3, 3)
    z = F.conv2d(x, weight)
    arguments = (x, z, weight, torch.tensor(2), 0.25, None, [1], [0], False, [1], 1, "zeros", True, "auto")
    torch.library.opcheck(torch.ops.localsgd_ext.sampled_correlation.default, arguments)
    d = torch.ops.localsgd_ext.sampled_correlation(*arguments)
    torch.testing.assert_close(d, reference.correlation(x[4:6], z[4:6], weight))


# ---- errors


@pytest.mark.parametrize("sample", [0.0, -0.5, 1.5, float("nan"), float("inf")])
def test_a_fraction_out_of_range_is_refused(sample: float) -> None:
    for make in (
        lambda: HebbianUpdater(PlainCNN(), sample=sample),
        lambda: LocalizedLearning(PlainCNN(), None, epochs=1, preset="paper", sample=sample),
    ):
        with pytest.raises(ValueError, match=r"sample must be in \(0, 1\], got"):
            make()


@pytest.mark.parametrize("sample", ["half", None, True])
def test_something_else_than_a_number_is_refused(sample: object) -> None:
    with pytest.raises(TypeError, match="sample must be a number, got"):
        HebbianUpdater(PlainCNN(), sample=sample)  # type: ignore[arg-type]
