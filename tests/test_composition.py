"""With what people train today: averages of weights, torch.func, compilation block by block; each beside a plain loop."""

import pytest
import torch
import torch._dynamo
import torch.nn.functional as F
from models import PlainCNN, TwoBlockResNet, at, batches, changed, run_epoch, seeded, snapshot, with_boundary
from torch import nn
from torch.optim.swa_utils import SWALR, AveragedModel, get_ema_multi_avg_fn, update_bn

from localsgd_ext import LocalizedLearning, StaticModeSelection, correlation, hebbian_update_, stale_graphs


def sgd(model):
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=0.1)


# ---------------------------------------------------------------------------------------------- averages of weights


@pytest.mark.parametrize("kind", ["swa", "ema", "ema with buffers"])
def test_averaged_weights(kind):
    """The average is that of the weights seen after every step, local ones included, and taking it changes no training."""
    decay = 0.75
    model, alone = seeded(TwoBlockResNet), seeded(TwoBlockResNet)
    optimizers = [sgd(model), sgd(alone)]
    locals_ = [
        LocalizedLearning(net, optimizer, epochs=6, preset="paper", t_shift=2, alpha=100.0, lr=0.05)
        for net, optimizer in zip((model, alone), optimizers, strict=True)
    ]
    average = AveragedModel(
        model, multi_avg_fn=get_ema_multi_avg_fn(decay) if "ema" in kind else None, use_buffers=kind == "ema with buffers"
    )
    expected, count = {}, 0
    for _ in range(6):
        for batch in batches(2):
            for net, optimizer in zip((model, alone), optimizers, strict=True):
                run_epoch(net, optimizer, [batch])
            average.update_parameters(model)
            for name, value in alone.state_dict().items():
                if value.is_floating_point():
                    old = expected.get(name, value.clone())
                    expected[name] = decay * old + (1 - decay) * value if "ema" in kind else old + (value - old) / (count + 1)
            count += 1
        for local in locals_:
            local.step(1.0)
    assert locals_[0].boundary == locals_[1].boundary >= 4
    assert changed(model, snapshot(alone)) == set()
    averaged = average.module.state_dict()
    parameters = {name for name, _ in model.named_parameters()}
    compared = expected.keys() if kind == "ema with buffers" else expected.keys() & parameters
    for name in compared:
        torch.testing.assert_close(averaged[name], expected[name], rtol=1e-5, atol=1e-6)


def test_batch_norm_statistics_for_the_average_leave_the_model_alone():
    model = seeded(TwoBlockResNet)
    optimizer = sgd(model)
    with_boundary(model, optimizer, 3, lr=0.05)
    average = AveragedModel(model)
    scheduler = SWALR(optimizer, swa_lr=0.01, anneal_epochs=2)
    for _ in range(2):
        run_epoch(model, optimizer, batches(2))
        average.update_parameters(model)
        scheduler.step()
    before, weights = snapshot(model), {n: p.detach().clone() for n, p in average.module.named_parameters()}
    update_bn([x for x, _ in batches(3)], average)
    assert changed(model, before) == set()
    assert all(torch.equal(p, weights[n]) for n, p in average.module.named_parameters()), "the average does not learn locally"
    plain = TwoBlockResNet()
    plain.load_state_dict(average.module.state_dict())
    update_bn([x for x, _ in batches(3)], plain)
    assert all(torch.equal(t, plain.state_dict()[n]) for n, t in average.module.state_dict().items())
    model.load_state_dict(average.module.state_dict())  # swapped in, training goes on
    run_epoch(model, optimizer, batches(1))


# ---------------------------------------------------------------------------------------------- mixed precision


def test_a_step_that_the_scaler_leaves_out():
    """A scale at which gradients overflow: the optimizer's step is left out, as in a plain loop; the local layers have learnt."""
    model, plain = seeded(PlainCNN), PlainCNN()
    optimizer = sgd(model)
    local = with_boundary(model, optimizer, 2, lr=0.05)
    plain.load_state_dict(model.state_dict())
    for name, p in plain.named_parameters():
        p.requires_grad_(not name.startswith(("features.0.", "features.1.", "features.3.", "features.4.")))
    plain_optimizer = sgd(plain)
    plain_optimizer.load_state_dict(optimizer.state_dict())
    scales = []
    for net, its_optimizer in ((model, optimizer), (plain, plain_optimizer)):
        before = snapshot(net)
        scaler = torch.amp.GradScaler("cpu", init_scale=3e38)
        x, y = batches(1)[0]
        with torch.autocast("cpu", torch.float16):
            loss = F.cross_entropy(net(x), y)
        scaler.scale(loss).backward()
        scaler.step(its_optimizer)
        scaler.update()
        scales.append(scaler.get_scale())
        moved = changed(net, before) & {name for name, _ in net.named_parameters()}
        assert moved == ({f"{name}.weight" for name in local.local_layers} if net is model else set())
    assert scales[0] == scales[1] < 3e38
    assert not local.skipped
    assert all(torch.isfinite(t).all() for t in model.state_dict().values())


# ---------------------------------------------------------------------------------------------- torch.func


def loss_of(model):
    x, y = batches(1)[0]
    return lambda parameters: F.cross_entropy(torch.func.functional_call(model, parameters, (x,)), y)


TRANSFORMS = {
    "grad": lambda model: torch.func.grad(loss_of(model))(dict(model.named_parameters())),
    "vjp": lambda model: torch.func.vjp(loss_of(model), dict(model.named_parameters())),
    "vmap": lambda model: torch.func.vmap(model, randomness="different")(batches(1)[0][0][:, None]),
    "grad of the input": lambda model: torch.func.grad(lambda x: model(x).sum())(batches(1)[0][0]),
}


def without_batch_norm():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.Flatten(), nn.Linear(64, 4))


@pytest.mark.parametrize("name", TRANSFORMS)
def test_transforms_are_refused_by_name(name):
    model = seeded(without_batch_norm)
    with_boundary(model, sgd(model), 1)
    before = snapshot(model)
    with pytest.raises(RuntimeError, match=r"layer '0' learns locally, which torch.func cannot express"):
        TRANSFORMS[name](model)
    assert changed(model, before) == set()
    model(batches(1)[0][0])
    assert changed(model, before) == {"0.weight"}, "what was refused leaves nothing behind"


@pytest.mark.parametrize("name", TRANSFORMS)
def test_a_first_forward_under_a_transform_is_refused(name):
    model = seeded(without_batch_norm)
    local = LocalizedLearning(model, sgd(model), epochs=20, preset="paper")
    with pytest.raises(RuntimeError, match=r"the first training forward .* which torch.func cannot express"):
        TRANSFORMS[name](model)
    run_epoch(model, sgd(model), batches(1))
    assert local.num_layers == 3


def test_a_functional_call_with_other_weights_is_refused():
    model = seeded(without_batch_norm)
    with_boundary(model, sgd(model), 1)
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    with pytest.raises(RuntimeError, match=r"layer '0' learns locally and its weight was replaced \(functional_call\)"):
        torch.func.functional_call(model, weights, (batches(1)[0][0],))
    assert changed(model, weights) == set()
    fresh = seeded(without_batch_norm)
    LocalizedLearning(fresh, sgd(fresh), epochs=20, preset="paper")
    with pytest.raises(RuntimeError, match=r"which torch\.func cannot express"):
        torch.func.functional_call(fresh, weights, (batches(1)[0][0],))


@pytest.mark.parametrize("removed", [False, True])
def test_transforms_in_evaluation_mode_and_after_removal(removed):
    model = seeded(without_batch_norm)
    local = with_boundary(model, sgd(model), 1)
    if removed:
        local.remove()
    else:
        model.eval()
    plain = without_batch_norm()
    plain.load_state_dict(model.state_dict())
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    found, expected = (torch.func.grad(loss_of(net))(parameters) for net in (model, plain))
    assert all(torch.equal(found[name], expected[name]) for name in parameters)


def test_operations_under_a_transform_are_refused():
    x, weight = torch.randn(3, 5, 4), torch.randn(6, 4)
    z = x @ weight.t()
    before = weight.clone()
    with pytest.raises(RuntimeError, match=r"cannot run under a torch\.func transform"):
        torch.func.vmap(lambda x, z: correlation(x, z, weight))(x, z)
    with pytest.raises(RuntimeError, match=r"cannot run under a torch\.func transform"):
        torch.func.vmap(lambda x, z: hebbian_update_(weight, x, z, 0.1))(x, z)
    assert torch.equal(weight, before)


# ---------------------------------------------------------------------------------------------- torch.compile


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 1)

    def forward(self, x):
        return F.relu(self.conv2(F.relu(self.bn(self.conv1(x)))) + x)


class Blocks(nn.Module):
    def __init__(self, count: int, width: int = 6) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        self.blocks = nn.Sequential(*(Block(width) for _ in range(count)))
        self.fc = nn.Linear(width, 4)

    def forward(self, x):
        return self.fc(self.blocks(F.relu(self.stem(x))).mean((2, 3)))


# PyTorch's own, of any compiled block whose input comes from another.
quiet = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")


@pytest.fixture
def counters():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield torch._dynamo.utils.counters
    torch._dynamo.reset()


def compile_blocks(model):
    for block in model.blocks:
        block.compile(backend="aot_eager")
    return model


COMPILED = {
    "whole": (2, lambda model: torch.compile(model, backend="aot_eager")),
    "blocks": (10, compile_blocks),  # more of them than torch.compile makes variants of one function (8)
}


@quiet
@pytest.mark.parametrize("how", COMPILED)
def test_compiled(how, counters):
    """The same numbers as without, no graph break, no warning, and few compilations.

    For the whole model one for each place of the boundary. Block by block: two at most, for the block whose layers become local and
    the next one, whose input needs no gradient any more; all others share what is there.
    """
    count, compiled = COMPILED[how]
    path = (0, 2, 3, 4)
    outcomes = []
    for compile_it in (compiled, lambda model: model):
        model = seeded(lambda: Blocks(count))
        optimizer = sgd(model)
        schedule = StaticModeSelection(kind=lambda epoch: path[min(epoch, 3)])
        local = LocalizedLearning(model, optimizer, epochs=5, preset="paper", schedule=schedule, lr=0.05, supervision=None)
        data = batches(2)
        local.trace(data[0][0])
        forward, graphs = compile_it(model), []
        for boundary in path:
            assert local.boundary == boundary
            for x, y in data:
                loss = F.cross_entropy(forward(x), y)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            graphs.append(counters["stats"]["unique_graphs"])
            local.step()
        outcomes.append(({name: p.detach().clone() for name, p in model.named_parameters()}, graphs))
    (found, graphs), (expected, _) = outcomes
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)
    assert not counters["graph_break"]
    steps = [after - before for before, after in zip([0, *graphs], graphs, strict=False)]
    assert steps[0] == 1
    assert all(step <= (1 if how == "whole" else 2) for step in steps), graphs
    assert graphs[-1] >= 3


@quiet
def test_many_places_of_the_boundary_need_a_higher_limit(counters):
    """torch.compile keeps so many variants of one function (8), then runs new ones uncompiled. A place is one in training and one in
    evaluation, which does not know that it asks for no gradients anyway."""
    path = tuple(range(11))
    for limit, expected in ((64, 2 * len(path)), (4, 4)):
        torch._dynamo.reset()
        counters.clear()
        model = seeded(lambda: Blocks(10))
        optimizer = sgd(model)
        schedule = StaticModeSelection(kind=lambda epoch: path[min(epoch, len(path) - 1)], l_max=1.0)
        local = LocalizedLearning(model, optimizer, epochs=len(path), rule="frozen", schedule=schedule)
        ((x, y),) = batches(1)
        local.trace(x)
        with torch._dynamo.config.patch(recompile_limit=limit):
            compiled = torch.compile(model, backend="eager")
            for boundary in path:
                assert local.boundary == boundary
                model.train()
                F.cross_entropy(compiled(x), y).backward()
                model.eval()
                with torch.no_grad():
                    compiled(x)
                local.step()
        local.remove()
        assert counters["stats"]["unique_graphs"] == expected


@quiet
def test_older_graphs_are_dropped_where_they_do_not_notice(counters, monkeypatch):
    """As with PyTorch before 2.13: after each move and at both ends of a refresh, not in between, and not before anything was compiled."""
    resets = []
    monkeypatch.setattr(stale_graphs, "NOTICED", False)
    monkeypatch.setattr(torch._dynamo, "reset", lambda: resets.append(local.boundary))
    stale_graphs._say_once.cache_clear()
    path = (0, 2, 2, 3)
    model = seeded(lambda: Blocks(2))
    optimizer = sgd(model)
    schedule = StaticModeSelection(kind=lambda epoch: path[min(epoch, 3)])
    local = LocalizedLearning(model, optimizer, epochs=4, schedule=schedule)
    local.trace(batches(1)[0][0])
    local.step()
    assert not resets
    torch.compile(model, backend="eager")(batches(1)[0][0])
    local.step()
    with pytest.warns(UserWarning, match=r"torch\.compile of PyTorch .* takes no notice of what is frozen") as said:
        local.step()
    assert resets == [3]
    local._freeze.set_open(True)
    local._freeze.set_open(True)
    local._freeze.set_open(False)
    assert len(resets) == 3
    assert len(said) == 1
    local.remove()
    assert len(resets) == 4


@quiet
def test_a_layer_that_stays_silent_is_told_apart_from_one_in_a_compiled_block(counters):
    model = seeded(lambda: Blocks(2))
    optimizer = sgd(model)
    local = LocalizedLearning(model, optimizer, epochs=5, preset="paper", schedule=at(3), lr=0.05, supervision=None)
    run_epoch(model, optimizer, batches(1))
    local.step()
    compile_blocks(model)
    model.stem.eval()
    run_epoch_keeping_modes(model, optimizer)
    with pytest.warns(UserWarning, match=r"never ran.*: stem$"):
        local.step()


def run_epoch_keeping_modes(model, optimizer):
    x, y = batches(1)[0]
    loss = F.cross_entropy(model(x), y)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
