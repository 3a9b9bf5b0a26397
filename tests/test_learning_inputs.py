"""Layouts, dtypes, dimensions and ways of calling a layer that networks in the wild use."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from models import Attention, PlainCNN, at, batches, changed, run_epoch, seeded, snapshot, with_boundary
from torch import Tensor, nn

from localsgd_ext import HebbianUpdater, LocalizedLearning, reference


def sgd(model):
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)


class Pooled(nn.Module):
    """Two convolutions of any dimension in front of a linear head; how the first is called is the subject of a test."""

    def __init__(self, dims: int, call: str = "positional") -> None:
        super().__init__()
        conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1]
        self.a = conv(3, 5, 3, stride=2, padding=1, dilation=1)
        self.b = conv(5, 6, 2, dilation=2, bias=False)
        self.fc = nn.Linear(6, 4)
        self.call = call

    def forward(self, x: Tensor) -> Tensor:
        if self.call == "no_grad":
            with torch.no_grad():
                x = self.a(x)
        else:
            x = self.a(input=x) if self.call == "keyword" else self.a(x)
        x = self.b(F.relu(x, inplace=self.call == "in place"))
        return self.fc(F.relu(x).flatten(2).mean(2))


def example(dims, dtype=torch.float64):
    generator = torch.Generator().manual_seed(dims)
    return torch.randn(4, 3, *(7, 8, 9)[:dims], generator=generator, dtype=dtype), torch.arange(4)


@pytest.mark.parametrize("call", ["positional", "keyword", "in place"])
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_dimensions_and_calls(dims, call):
    model = seeded(lambda: Pooled(dims, call)).double()
    x, y = example(dims)
    with_boundary(model, sgd(model), 2, [(x, y)], lr=0.1)
    a, b = model.a.weight.detach().clone(), model.b.weight.detach().clone()
    model(x)
    before_relu = F.conv1d if dims == 1 else F.conv2d if dims == 2 else F.conv3d
    z = before_relu(x, a, model.a.bias, 2, 1)
    hidden = F.relu(z)
    reference.hebbian_update_(a, x, z, 0.1, stride=2, padding=1)
    reference.hebbian_update_(b, hidden, before_relu(hidden, b, dilation=2), 0.1, dilation=2)
    torch.testing.assert_close(model.a.weight.detach(), a, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(model.b.weight.detach(), b, rtol=1e-11, atol=1e-12)


def test_a_layer_that_runs_without_gradients_is_left_out():
    model = seeded(lambda: Pooled(2, "no_grad"))
    with pytest.warns(UserWarning, match=r"a: .*without gradients"):
        local = with_boundary(model, sgd(model), 1, [example(2, torch.float32)], lr=0.1)
    assert list(local.layers) == ["b", "fc"]
    before = snapshot(model)
    model(example(2, torch.float32)[0])
    assert changed(model, before) == {"b.weight"}


def test_local_layers_that_stay_silent_are_reported():
    model = seeded(PlainCNN)
    local = with_boundary(model, sgd(model), 2)
    model.features[3].eval()
    model(batches(1)[0][0])
    with pytest.warns(UserWarning, match=r"never ran.*features\.3$"):
        local.step(1.0)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_training_forwards_never_wait_for_the_device(momentum):
    """Tensors without data stand for a device: whatever would wait for a value of theirs raises."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3)).to("meta")
    updater = HebbianUpdater(model, lr=0.1, momentum=momentum)
    updater.enable(["0", "2"], deferred=["2"])
    before = [layer.weight._version for layer in (model[0], model[2])]
    for _ in range(3):
        model(torch.empty(2, 3, 8, 8, device="meta"))
    updater.flush()
    assert all(layer.weight._version > version for layer, version in zip((model[0], model[2]), before, strict=True))
    with pytest.raises((RuntimeError, NotImplementedError)):
        updater.skipped()  # which does wait


def test_a_model_of_which_only_parts_are_called_is_reported():
    model = seeded(PlainCNN)
    local = with_boundary(model, sgd(model), 2)
    for x, _ in batches(3):
        model.features(x)
    with pytest.warns(UserWarning, match=r"the model itself was never called.*features\.0, features\.3$"):
        local.step(1.0)
    model(batches(1)[0][0])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        local.step(1.0)


def test_channels_last_gives_the_same_training():
    models = []
    for memory_format in (torch.contiguous_format, torch.channels_last):
        model = seeded(PlainCNN).to(memory_format=memory_format).double()
        optimizer = sgd(model)
        with_boundary(model, optimizer, 2, [(x.double(), y) for x, y in batches(1)], lr=0.05)
        data = [(x.double().to(memory_format=memory_format), y) for x, y in batches(3)]
        run_epoch(model, optimizer, data)
        assert model.features[3].weight.is_contiguous(memory_format=memory_format)
        models.append(model.state_dict())
    for name, tensor in models[0].items():
        torch.testing.assert_close(tensor, models[1][name], rtol=1e-9, atol=1e-10)


def test_low_precision_weights():
    model = seeded(PlainCNN).bfloat16()
    optimizer = sgd(model)
    data = [(x.bfloat16(), y) for x, y in batches(2)]
    local = LocalizedLearning(model, optimizer, epochs=10, preset="paper", schedule=at(2), lr=0.5)
    local.step(run_epoch(model, optimizer, data))
    before = snapshot(model)
    run_epoch(model, optimizer, data[:1])
    for name in local.local_layers:
        weight = model.get_submodule(name).weight
        assert weight.dtype == torch.bfloat16
        step = weight.detach().double() - before[f"{name}.weight"].double()
        assert torch.linalg.vector_norm(step).item() == pytest.approx(0.5, rel=0.02), name
    assert not local.skipped


def test_attention_inside_the_prefix_is_frozen():
    model = seeded(Attention)
    optimizer = sgd(model)
    with pytest.warns(UserWarning, match=r"attention\.out_proj"):
        local = with_boundary(model, optimizer, 1, lr=0.1)
    assert list(local.layers) == ["embed", "mix", "fc"]
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    assert frozen == {name for name, _ in model.named_parameters() if name.startswith(("embed", "attention"))}
    before = snapshot(model)
    run_epoch(model, optimizer, batches(1))
    assert changed(model, before) == {"embed.weight", "mix.weight", "mix.bias", "fc.weight", "fc.bias"}


def test_a_model_moved_to_another_dtype_between_epochs():
    """What a device move does, on one device: parameters are re-typed in place under the hooks."""
    model = seeded(PlainCNN)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    local = LocalizedLearning(model, optimizer, epochs=6, preset="paper", t_shift=1, alpha=100.0, lr=0.1)
    local.step(run_epoch(model, optimizer, batches(1)))
    model.double()
    data = [(x.double(), y) for x, y in batches(1)]
    for _ in range(3):
        local.step(run_epoch(model, optimizer, data))
    assert local.boundary == 2
    before = snapshot(model)
    model(data[0][0])
    assert changed(model, before) >= {"features.0.weight", "features.3.weight"}
