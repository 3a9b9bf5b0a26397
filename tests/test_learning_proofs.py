"""What makes the method cheap and safe, shown rather than believed: no gradient, no saved activation, nothing in eval mode."""

import copy
import itertools

import pytest
import torch
import torch.nn.functional as F
from models import (
    PlainCNN,
    Separable,
    TwoBlockResNet,
    ViTLike,
    batches,
    changed,
    circular,
    run_epoch,
    seeded,
    snapshot,
    with_boundary,
)

from localsgd_ext import HebbianUpdater, LocalizedLearning, reference


def sgd(model, lr=0.05):
    return torch.optim.SGD(model.parameters(), lr=lr)


class Saved:
    """Tensors that a forward keeps for its backward, counted once per storage, the model's own parameters apart."""

    def __init__(self, model):
        self.own = {t.untyped_storage().data_ptr() for t in model.state_dict().values()}
        self.tensors = {}

    def __enter__(self):
        def pack(tensor):
            pointer = tensor.untyped_storage().data_ptr()
            if pointer not in self.own:
                self.tensors[pointer] = tensor
            return tensor

        self.hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
        self.hooks.__enter__()
        return self

    def __exit__(self, *exc):
        self.hooks.__exit__(*exc)

    @property
    def bytes(self):
        return sum(t.untyped_storage().nbytes() for t in self.tensors.values())


def record_layers(model, names):
    """Storage pointers of every listed layer's input and output in the next forward (the tensors are kept alive)."""
    seen, handles = {}, []
    for name in names:
        module = model.get_submodule(name)

        def hook(module, args, output, name=name):
            seen[name] = (args[0], output)

        handles.append(module.register_forward_hook(hook))
    return seen, handles


@pytest.mark.parametrize("build", [TwoBlockResNet, PlainCNN, Separable, ViTLike])
def test_saved_bytes_fall_strictly_with_the_boundary(build):
    layers, sizes = build.LAYERS, []
    (x, y), *_ = batches(1)
    for boundary in range(len(layers)):
        model = seeded(build)
        if boundary:
            with_boundary(model, sgd(model), boundary)
        with Saved(model) as saved:
            loss = F.cross_entropy(model(x), y)
        sizes.append(saved.bytes)
    assert all(later < earlier for earlier, later in itertools.pairwise(sizes)), sizes
    assert loss.requires_grad


@pytest.mark.parametrize("boundary", range(1, 6))
def test_no_activation_inside_the_prefix_is_saved(boundary):
    model = seeded(TwoBlockResNet)
    local = with_boundary(model, sgd(model), boundary)
    seen, handles = record_layers(model, local.layers)
    (x, y), *_ = batches(1)
    with Saved(model) as saved:
        F.cross_entropy(model(x), y)
    for handle in handles:
        handle.remove()
    for name in local.layers[:boundary]:
        activation, output = seen[name]
        assert not activation.requires_grad, name
        assert not output.requires_grad, name
        assert output.grad_fn is None, name
        assert output.untyped_storage().data_ptr() not in saved.tensors, name
        # Inputs of the transition layer and of the shortcut that is not local yet are rightly kept.
        if not any(seen[later][0] is activation for later in local.layers[boundary:]):
            assert activation.untyped_storage().data_ptr() not in saved.tensors, name
    transition = local.layers[boundary]
    assert seen[transition][1].requires_grad
    assert seen[transition][0].untyped_storage().data_ptr() in saved.tensors  # the measurement does see saved activations


@pytest.mark.parametrize("build", [TwoBlockResNet, PlainCNN, ViTLike])
@pytest.mark.parametrize("boundary", [1, 3])
def test_nothing_in_the_prefix_gets_a_gradient(build, boundary):
    model = seeded(build)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=0.1)
    with_boundary(model, optimizer, boundary)
    expected = {  # first used before the transition layer runs
        (TwoBlockResNet, 1): ["stem", "bn"],
        (TwoBlockResNet, 3): ["stem", "bn", "block1"],
        (PlainCNN, 1): ["features.0", "features.1"],
        (PlainCNN, 3): [f"features.{i}" for i in range(9)],
        (ViTLike, 1): ["patch", "position", "norm1"],
        (ViTLike, 3): ["patch", "position", "norm1", "up1", "down1", "scale1", "norm2"],
    }[build, boundary]
    prefix = {n for n, _ in model.named_parameters() if any(n == e or n.startswith(e + ".") for e in expected)}
    assert {n for n, p in model.named_parameters() if not p.requires_grad} == prefix
    assert all(p.grad is None for n, p in model.named_parameters() if n in prefix)
    run_epoch(model, optimizer, batches())
    for name, parameter in model.named_parameters():
        assert (parameter.grad is None) == (name in prefix), name
        assert (parameter in optimizer.state and bool(optimizer.state[parameter])) == (name not in prefix), name


def suffix_gradients(model, prefix, suffix, x, y):
    """Plain PyTorch: the prefix under no_grad, the suffix trained as ever."""
    with torch.no_grad():
        hidden = prefix(x)
    F.cross_entropy(suffix(hidden), y).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("boundary", [1, 2, 3, 4])
@pytest.mark.parametrize("rule", ["hebbian", "frozen"])
def test_sgd_layers_get_the_gradients_of_plain_training_to_the_bit(boundary, rule):
    model = seeded(PlainCNN)
    with_boundary(model, sgd(model), boundary, rule=rule, lr=0.01)
    plain = PlainCNN()
    plain.load_state_dict(model.state_dict())
    # The transition layer's index in `features`, where conv, BatchNorm and ReLU alternate; the last one is `fc`.
    prefix, rest = plain.features[: 3 * boundary], plain.features[3 * boundary :]
    plain.zero_grad()
    (x, y), *_ = batches(1)
    expected = suffix_gradients(plain, prefix, lambda hidden: plain.fc(rest(hidden).mean((2, 3))), x, y)
    model.zero_grad(set_to_none=True)
    F.cross_entropy(model(x), y).backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert gradients.keys() == expected.keys()
    assert all(torch.equal(gradients[name], expected[name]) for name in expected)
    buffers = dict(plain.named_buffers())
    assert all(torch.equal(buffer, buffers[name]) for name, buffer in model.named_buffers())


def test_the_whole_network_trains_as_plain_sgd_until_the_boundary_moves():
    model = seeded(TwoBlockResNet)
    plain = copy.deepcopy(model)
    for net, attach in ((model, True), (plain, False)):
        optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9, weight_decay=0.1)
        if attach:
            LocalizedLearning(net, optimizer, epochs=50, preset="paper")
        run_epoch(net, optimizer, batches(4))
    assert changed(model, snapshot(plain)) == set()


@pytest.mark.parametrize("build", [TwoBlockResNet, ViTLike])
def test_eval_mode_and_no_grad_update_nothing(build):
    model = seeded(build)
    local = with_boundary(model, sgd(model), 3, lr=0.1)
    (x, y), *_ = batches(1)
    weights = {f"{name}.weight" for name in local.local_layers}
    before = snapshot(model)
    model.eval()
    F.cross_entropy(model(x), y).backward()
    with torch.no_grad():
        model(x)
    with torch.inference_mode():
        model(x)
    assert changed(model, before) == set()
    model.train()
    with torch.no_grad():
        model(x)
    assert not changed(model, before) & {name for name, _ in model.named_parameters()}
    model(x)
    assert (
        changed(model, before) & {name for name, _ in model.named_parameters()} == weights
    )  # the guard is all that held it back


def test_a_single_layer_in_eval_mode_is_not_updated():
    model = seeded(PlainCNN)
    local = with_boundary(model, sgd(model), 3, lr=0.1)
    before = snapshot(model)
    model.train()
    model.features[3].eval()
    model(batches(1)[0][0])
    updated = changed(model, before) & {f"{name}.weight" for name in local.layers}
    assert updated == {"features.0.weight", "features.6.weight"}


def geometry(module):
    if isinstance(module, torch.nn.Linear):
        return {}
    return {name: getattr(module, name) for name in ("stride", "padding", "dilation", "groups", "padding_mode")}


@pytest.mark.parametrize("build", [TwoBlockResNet, PlainCNN, Separable, ViTLike, circular])
@pytest.mark.parametrize("sign", [1, -1])
def test_each_update_is_the_reference_update_of_the_layers_own_input_and_output(build, sign):
    model = seeded(build).double()
    data = [(x.double(), y) for x, y in batches(1)]
    optimizer = sgd(model)
    local = with_boundary(model, optimizer, 3, data, lr=0.01, rule="hebbian")
    local.step(-1e9 if sign == 1 else 1e9)  # the loss fell or rose
    assert local.sign == sign
    seen, _ = record_layers(model, local.layers)
    before = snapshot(model)
    F.cross_entropy(model(data[0][0]), data[0][1]).backward()
    for name in local.local_layers:
        x, z = seen[name]
        module = model.get_submodule(name)
        weight = before[f"{name}.weight"].clone()
        old = copy.deepcopy(module)
        old.weight.data.copy_(weight)
        for hooks in (old._forward_hooks, old._forward_pre_hooks):
            hooks.clear()
        assert torch.equal(z, old(x)), f"{name}: the update came before the layer's own forward"
        reference.hebbian_update_(weight, x, z, sign * 0.01, **geometry(module))
        torch.testing.assert_close(module.weight.detach(), weight, rtol=1e-12, atol=1e-13)
        assert torch.linalg.vector_norm(module.weight.detach() - before[f"{name}.weight"]).item() == pytest.approx(
            0.01, rel=1e-9
        )
    assert not any(local.skipped.values())


def test_an_in_place_write_is_seen_by_autograd():
    """A weight changed under a graph that needs it must be an error, never a silently wrong gradient."""
    model = seeded(PlainCNN)
    local = with_boundary(model, sgd(model), 2)
    weight = model.get_submodule(local.local_layers[0]).weight
    version = weight._version
    model(batches(1)[0][0])
    assert weight._version > version


def test_the_updater_alone_updates_the_layers_it_is_given():
    model = seeded(PlainCNN)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    updater = HebbianUpdater(model, [r"features\.[036]"], lr=0.01)
    updater.enable(["features.0", "features.6"])
    before = snapshot(model)
    model.train()
    x = batches(1)[0][0]
    model(x)
    assert changed(model, before) & {n for n, _ in model.named_parameters()} == {"features.0.weight", "features.6.weight"}
    updater.enable(["features.3"])
    before = snapshot(model)
    model(x)
    assert changed(model, before) & {n for n, _ in model.named_parameters()} == {"features.3.weight"}
    updater.set_lr(0.5)
    before = snapshot(model)
    model(x)
    step = model.features[3].weight.detach() - before["features.3.weight"]
    assert torch.linalg.vector_norm(step).item() == pytest.approx(0.5, rel=1e-4)
    updater.remove()
    before = snapshot(model)
    model(x)
    assert not changed(model, before) & {n for n, _ in model.named_parameters()}
