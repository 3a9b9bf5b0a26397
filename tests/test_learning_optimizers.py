"""The user's optimizer, its schedulers and the tricks around it keep working across boundary moves."""

import copy

import pytest
import torch
import torch.nn.functional as F
from models import PlainCNN, TwoBlockResNet, at, batches, changed, run_epoch, seeded, snapshot, with_boundary

from localsgd_ext import HebbianUpdater, LocalizedLearning, StaticModeSelection, reference

OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05),
    "sgd momentum": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=0.1, nesterov=True),
    "sgd loop": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=0.1, foreach=False),
    "sgd foreach": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=0.1, foreach=True),
    "sgd fused": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=0.1, fused=True),
    "adam": lambda p: torch.optim.Adam(p, lr=1e-2, weight_decay=0.1),
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1),
    "adamw foreach": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1, foreach=True),
    "adamw fused": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1, fused=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=1e-3, momentum=0.9, weight_decay=0.1),
}
CANCELLED = {"features.9.bias"}  # in front of a BatchNorm: its gradient is zero but for rounding


def sgd(model):
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=0.1)


def steps(*boundaries):
    """A schedule that runs through ``boundaries``, one an epoch."""
    return StaticModeSelection(kind=lambda epoch: boundaries[min(epoch, len(boundaries) - 1)], l_max=1.0)


def parameters_of(model):
    return {name for name, _ in model.named_parameters()}


@pytest.mark.parametrize("zero", ["set to none", "zero"])
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_only_the_local_rule_moves_the_prefix(kind, zero):
    """Momentum and weight decay move a parameter whose gradient is zero: the prefix's must be None."""
    model = seeded(PlainCNN)
    optimizer = OPTIMIZERS[kind](model.parameters())
    local = with_boundary(model, optimizer, 3, lr=0.01)  # one epoch of SGD before: momentum buffers exist by then
    prefix = {name for name, p in model.named_parameters() if not p.requires_grad}
    for x, y in batches(2):
        F.cross_entropy(model(x), y).backward()
        after_forward = snapshot(model)
        optimizer.step()
        assert changed(model, after_forward) | CANCELLED == parameters_of(model) - prefix
        optimizer.zero_grad(set_to_none=zero == "set to none")
    assert {f"{name}.weight" for name in local.local_layers} < prefix


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_boundary_moves_to_the_right_and_to_the_left(kind):
    model = seeded(TwoBlockResNet)
    optimizer = OPTIMIZERS[kind](model.parameters())
    path = (0, 2, 5, 3, 0, 1)
    local = LocalizedLearning(model, optimizer, epochs=6, preset="paper", schedule=steps(*path), lr=0.01)
    groups = [[id(p) for p in group["params"]] for group in optimizer.param_groups]
    for boundary in path[:-1]:
        assert local.boundary == boundary
        before = snapshot(model)
        run_epoch(model, optimizer, batches(2))
        trained = {name for name, p in model.named_parameters() if p.requires_grad}
        moved = changed(model, before) & parameters_of(model)
        assert moved >= {name for name in trained if name != "stem.bias"}  # BatchNorm cancels the stem's bias
        assert moved - trained == {f"{name}.weight" for name in local.layers[:boundary]}
        local.step(1.0)
    assert [[id(p) for p in group["params"]] for group in optimizer.param_groups] == groups
    for parameter in model.parameters():
        assert parameter.requires_grad or parameter not in optimizer.state


def test_local_first_goes_on_as_plain_sgd_with_fresh_state_for_the_thawed_layers():
    model = seeded(TwoBlockResNet)
    optimizer = sgd(model)
    local = LocalizedLearning(model, optimizer, epochs=4, preset="paper", schedule=steps(3, 3, 0), lr=0.01)
    local.trace(batches(1)[0][0])
    assert local.boundary == 3, "a static schedule holds from the first epoch on"
    for _ in range(2):
        local.step(run_epoch(model, optimizer, batches(2)))
    assert local.boundary == 0
    thawed = [name for name, p in model.named_parameters() if p not in optimizer.state]
    assert {name.split(".")[0] for name in thawed} == {"stem", "bn", "block1"}
    plain = TwoBlockResNet()
    plain.load_state_dict(model.state_dict())
    plain_optimizer = sgd(plain)
    plain_optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for net, its_optimizer in ((model, optimizer), (plain, plain_optimizer)):
        run_epoch(net, its_optimizer, batches(3))
    assert changed(plain, snapshot(model)) == set()


SCHEDULERS = {
    "step": lambda o: torch.optim.lr_scheduler.StepLR(o, step_size=2, gamma=0.1),
    "cosine": lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, T_max=6),
    "plateau": lambda o: torch.optim.lr_scheduler.ReduceLROnPlateau(o, patience=0, factor=0.5),
    "one cycle": lambda o: torch.optim.lr_scheduler.OneCycleLR(o, max_lr=0.1, total_steps=12),
}


@pytest.mark.parametrize("scheduler_first", [True, False])
@pytest.mark.parametrize("kind", SCHEDULERS)
def test_learning_rate_schedulers(kind, scheduler_first):
    """The learning rates are those of the same loop without localized learning, and the suffix uses them."""
    histories = []
    for attach in (True, False):
        model = seeded(PlainCNN)
        optimizer = sgd(model)
        scheduler = SCHEDULERS[kind](optimizer)
        if attach:
            local = LocalizedLearning(model, optimizer, epochs=6, preset="paper", schedule=steps(0, 1, 2, 2, 1, 3, 3))
        history = []
        for loss in (1.0, 0.9, 1.1, 1.0, 1.2, 0.8):
            weight = model.fc.weight.detach().clone()
            run_epoch(model, optimizer, batches(1))
            assert not torch.equal(model.fc.weight, weight)
            for owner in ("scheduler", "local") if scheduler_first else ("local", "scheduler"):
                if owner == "scheduler":
                    scheduler.step(loss) if kind == "plateau" else scheduler.step()
                elif attach:
                    local.step(loss)
            history.append([group["lr"] for group in optimizer.param_groups])
        histories.append(history)
    assert histories[0] == histories[1]
    assert len({tuple(rates) for rates in histories[0]}) > 1
    assert local.boundary == 3


def test_gradient_clipping_counts_the_suffix_only():
    model = seeded(PlainCNN)
    with_boundary(model, sgd(model), 2)
    model.zero_grad()
    x, y = batches(1)[0]
    F.cross_entropy(model(x), y).backward()
    own = [p.grad for p in model.parameters() if p.requires_grad]
    expected = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(g) for g in own]))
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
    torch.testing.assert_close(norm, expected)
    clipped = torch.linalg.vector_norm(torch.cat([g.flatten() for g in own]))
    assert clipped.item() == pytest.approx(1e-3, rel=1e-2)


def test_gradient_accumulation():
    """Every micro-batch makes a local step of its own; the suffix gets the summed gradients of the micro-batches."""
    model = seeded(PlainCNN)
    optimizer = sgd(model)
    with_boundary(model, optimizer, 2, lr=0.01)
    data = batches(3)
    plain, expected = PlainCNN(), {}
    optimizer.zero_grad()
    for i, (x, y) in enumerate(data):
        plain.load_state_dict(model.state_dict())
        plain.zero_grad()
        before = snapshot(model)
        (F.cross_entropy(model(x), y) / len(data)).backward()
        (F.cross_entropy(plain(x), y) / len(data)).backward()
        for name, p in plain.named_parameters():
            expected[name] = p.grad.clone() if i == 0 else expected[name] + p.grad
        assert changed(model, before) & parameters_of(model) == {"features.0.weight", "features.3.weight"}
    for name, p in model.named_parameters():
        assert p.grad is None or torch.equal(p.grad, expected[name]), name
        assert (p.grad is None) == (not p.requires_grad), name
    optimizer.step()


def test_several_parameter_groups():
    model = seeded(PlainCNN)
    decay = [p for p in model.parameters() if p.dim() > 1]
    rest = [p for p in model.parameters() if p.dim() <= 1]
    stem = [model.features[0].weight]
    decay = [p for p in decay if p is not stem[0]]
    optimizer = torch.optim.SGD(
        [{"params": stem, "lr": 0.5}, {"params": decay, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}],
        lr=0.05,
        momentum=0.9,
    )
    local = LocalizedLearning(model, optimizer, epochs=6, preset="paper", schedule=steps(0, 2, 3), lr=0.01)
    for _ in range(3):
        local.step(run_epoch(model, optimizer, batches(2)))
        assert [len(group["params"]) for group in optimizer.param_groups] == [1, len(decay), len(rest)]
        assert [group["lr"] for group in optimizer.param_groups] == [0.5, 0.05, 0.05]
    assert model.features[0].weight not in optimizer.state  # a group all of whose parameters are local is no problem
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    run_epoch(model, optimizer, batches(1))


def by_hand(model, lr):
    """Localized learning of ``features`` as a loop of one's own would have it: frozen, and each layer updated after its forward."""
    model.features.requires_grad_(False)

    @torch.no_grad()
    def update(module, args, output):
        d = torch.nn.grad.conv2d_weight(args[0], module.weight.shape, output, padding=1)
        module.weight += lr * d / d.norm()

    for name in PlainCNN.LAYERS[:4]:
        model.get_submodule(name).register_forward_hook(update)


def test_several_optimizers():
    """Beside a loop that does the same without the library: the prefix by hand, the head by its own optimizer."""
    model, plain = seeded(PlainCNN).double(), seeded(PlainCNN).double()
    pairs = []
    for each in (model, plain):
        convs = torch.optim.SGD(each.features.parameters(), lr=0.05, momentum=0.9, weight_decay=0.1)
        pairs.append((each, convs, torch.optim.AdamW(each.fc.parameters(), lr=1e-2)))
    local = LocalizedLearning(model, pairs[0][1:], epochs=6, preset="paper", schedule=at(4), lr=0.01)
    for epoch in range(3):
        before = snapshot(model)
        for network, *optimizers in pairs:
            for x, y in batches(2, dtype=torch.float64):
                loss = F.cross_entropy(network(x), y)
                for optimizer in optimizers:
                    optimizer.zero_grad()
                loss.backward()
                for optimizer in optimizers:
                    optimizer.step()
        moved = changed(model, before) & parameters_of(model)
        if epoch:
            assert moved == {f"{name}.weight" for name in PlainCNN.LAYERS} | {"fc.bias"}
            assert not pairs[0][1].state
        for name, tensor in model.state_dict().items():
            torch.testing.assert_close(tensor, plain.state_dict()[name], rtol=1e-10, atol=1e-12)
        local.step(1.0)
        if epoch == 0:
            by_hand(plain, 0.01)


# With operands in bfloat16 "auto" may take PyTorch's own weight gradient, which rounds D to bfloat16: 2**-9 for each element.
@pytest.mark.parametrize(("algorithm", "tolerance"), [("direct", 1e-4), ("auto", 2**-9)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scaler", [True, False])
def test_autocast_and_gradient_scaler(scaler, dtype, algorithm, tolerance):
    model = seeded(PlainCNN)
    optimizer = sgd(model)
    local = with_boundary(model, optimizer, 2, lr=0.01, algorithm=algorithm)
    scale = torch.amp.GradScaler("cpu", enabled=scaler, init_scale=128.0)
    captured = {}
    for name in local.local_layers:
        model.get_submodule(name).register_forward_hook(
            lambda module, args, output, name=name: captured.update({name: (args[0], output)})
        )
    for x, y in batches(2):
        before, plain = snapshot(model), copy.deepcopy(model)  # whose hooks are dead
        with torch.autocast("cpu", dtype):
            loss = F.cross_entropy(model(x), y)
            without = F.cross_entropy(plain(x), y)
        for name in local.local_layers:
            module, (layer_input, output) = model.get_submodule(name), captured[name]
            assert output.dtype == dtype
            assert module.weight.dtype == torch.float32
            expected = before[f"{name}.weight"].double()
            reference.hebbian_update_(expected, layer_input.double(), output.double(), 0.01, padding=1)
            step = (module.weight.detach() - before[f"{name}.weight"]).double()
            error = torch.linalg.vector_norm(step - (expected - before[f"{name}.weight"].double()))
            assert error <= tolerance * torch.linalg.vector_norm(step), name
        optimizer.zero_grad()
        scale.scale(loss).backward()
        scale.scale(without).backward()
        for (name, ours), theirs in zip(model.named_parameters(), plain.parameters(), strict=True):  # no hook is in their way
            assert (ours.grad is None) == (theirs.grad is None) == (not ours.requires_grad), name
            assert ours.grad is None or torch.equal(ours.grad, theirs.grad), name
        scale.step(optimizer)
        scale.update()
        weights = {f"{name}.weight" for name in local.local_layers}
        assert changed(model, before) & parameters_of(model) >= weights | {
            "features.6.weight",
            "features.9.weight",
            "fc.weight",
        }
    assert not any(local.skipped.values())


def test_autocast_does_not_serve_a_stale_copy_of_a_local_weight():
    """Autocast caches the casts of weights that require grad; a local weight changes inside the autocast region."""
    model = seeded(PlainCNN)
    with_boundary(model, sgd(model), 2, lr=1.0)
    first = model.features[0]
    x = batches(1)[0][0]
    outputs = []
    first.register_forward_hook(lambda module, args, output: outputs.append(output.clone()))
    with torch.autocast("cpu", torch.bfloat16):
        model(x)
        model(x)
    assert not torch.equal(outputs[0], outputs[1])


def test_gradients_pass_through_a_local_layer_that_is_not_in_a_prefix():
    """Section 2.2's other patterns: features.3 learns locally between layers that learn by SGD."""
    model = seeded(PlainCNN)
    model.features[3].weight.requires_grad_(False)
    updater = HebbianUpdater(model, "features.3", lr=0.5)
    updater.enable(["features.3"])
    plain = copy.deepcopy(model)
    optimizers = [sgd(model), sgd(plain)]
    weight = model.features[3].weight
    seen = []
    model.features[3].register_forward_hook(lambda module, args, output: seen.append((args[0].detach(), output.detach())))
    for x, y in batches(3):
        for net, optimizer in zip((model, plain), optimizers, strict=True):
            optimizer.zero_grad()
            F.cross_entropy(net.train()(x), y).backward()
        for (name, p), q in zip(model.named_parameters(), plain.parameters(), strict=True):
            assert (p.grad is None and q.grad is None) or torch.equal(p.grad, q.grad), name
        assert model.features[0].weight.grad is not None
        for optimizer in optimizers:
            optimizer.step()
        before = weight.detach().clone()
        assert torch.equal(before, plain.features[3].weight), "the write waits for the backward"
        expected = before.clone()
        reference.hebbian_update_(expected, *seen[-1], 0.5, padding=1)
        updater.flush()
        torch.testing.assert_close(weight.detach(), expected, rtol=1e-5, atol=1e-6)
        assert not torch.equal(weight, before)
        plain.load_state_dict(model.state_dict())
    updater.remove()


def test_inputs_that_require_grad():
    """Adversarial training differentiates with respect to the input, through the local prefix."""
    model = seeded(PlainCNN)
    local = with_boundary(model, sgd(model), 3, lr=0.1)
    plain = PlainCNN()
    plain.load_state_dict(model.state_dict())
    x, y = batches(1)[0]
    gradients = []
    before = snapshot(model)
    for net in (model, plain):
        given = x.clone().requires_grad_()
        gradients.append(torch.autograd.grad(F.cross_entropy(net(given), y), given)[0])
    assert torch.equal(*gradients)
    local.state_dict()
    assert changed(model, before) & parameters_of(model) == {f"{name}.weight" for name in local.local_layers}
