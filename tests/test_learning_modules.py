"""Unusual modules: supported, or left out with one message that names them."""

import re
import warnings

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from models import (
    Attention,
    NamedConv,
    NeverCalled,
    PlainCNN,
    Separable,
    ThreeConvs,
    at,
    batches,
    changed,
    circular,
    conv4,
    frozen_by_user,
    lazy,
    overridden,
    parametrized,
    patched,
    run_epoch,
    seeded,
    snapshot,
    tied,
    twice_used,
    with_boundary,
)
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.utils import prune

from localsgd_ext import HebbianUpdater, LocalizedLearning, reference
from localsgd_ext.distributed import ReplicatedModel


def sgd(model):
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=0.01)


def trained_names(model, before):
    return changed(model, before) & {name for name, _ in model.named_parameters()}


def pruned():
    model = ThreeConvs(conv4())
    prune.l1_unstructured(model.middle, "weight", amount=0.5)
    return model


LEFT_OUT = {  # build -> names that the warning must hold
    "tied": (tied, ["middle.first", "middle.second"]),
    "parametrized": (parametrized, ["middle"]),
    "pruned": (pruned, ["middle"]),
    "changed forward": (overridden, ["middle"]),
    "patched forward": (patched, ["middle"]),
    "frozen by the user": (frozen_by_user, ["middle"]),
    "never called": (NeverCalled, ["spare"]),
    "MultiheadAttention": (Attention, ["attention.out_proj"]),
}


@pytest.mark.parametrize("case", LEFT_OUT)
def test_left_out_with_one_warning_that_names_it(case):
    build, names = LEFT_OUT[case]
    model = seeded(build)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        local = LocalizedLearning(model, sgd(model), epochs=20, preset="paper", schedule=at(1))
        for _ in range(3):
            local.step(run_epoch(model, sgd(model), batches(2)))
    ours = [w for w in caught if issubclass(w.category, UserWarning) and any(name in str(w.message) for name in names)]
    assert len(ours) == 1, [str(w.message) for w in caught]
    listed = re.findall(r"^\s+([\w.]+):", str(ours[0].message), flags=re.MULTILINE)
    assert listed == names
    assert not set(local.layers) & set(names)


@pytest.mark.parametrize("build", [PlainCNN, Separable, twice_used, circular, lambda: ThreeConvs(conv4(NamedConv))])
def test_supported_without_a_warning(build):
    model = seeded(build)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        local = LocalizedLearning(model, sgd(model), epochs=20, preset="paper", schedule=at(2), lr=0.01)
        optimizer = sgd(model)
        local.step(run_epoch(model, optimizer, batches(2)))
    before = snapshot(model)
    model(batches(1)[0][0])
    assert local.local_layers == local.layers[:2]
    local.state_dict()  # applies deferred writes
    assert trained_names(model, before) == {f"{name}.weight" for name in local.layers[:2]}


@pytest.mark.parametrize("case", ["tied", "parametrized", "pruned", "changed forward", "patched forward"])
def test_what_is_left_out_learns_by_sgd_and_freezes_when_the_boundary_passes(case):
    model = seeded(LEFT_OUT[case][0])
    optimizer = sgd(model)
    local = LocalizedLearning(model, optimizer, epochs=20, preset="paper", schedule=at(1), lr=0.01)
    inside = {name for name, _ in model.named_parameters() if name.startswith("middle")}
    before = snapshot(model)
    with pytest.warns(UserWarning, match="middle"):
        local.step(run_epoch(model, optimizer, batches()))
    assert inside <= trained_names(model, before)
    assert list(local.layers) == ["a", "b", "fc"]
    before = snapshot(model)
    run_epoch(model, optimizer, batches())
    assert trained_names(model, before) == {"a.weight", "b.weight", "b.bias", "fc.weight", "fc.bias"}
    assert all(not p.requires_grad and p.grad is None for name, p in model.named_parameters() if name in inside)


def test_a_layer_frozen_by_the_user_is_never_touched_and_stays_frozen():
    model = seeded(frozen_by_user)
    optimizer = sgd(model)
    weight = model.middle.weight.detach().clone()
    with pytest.warns(UserWarning, match=r"middle.*frozen"):
        local = with_boundary(model, optimizer, 1, lr=0.1)
    run_epoch(model, optimizer, batches())
    assert torch.equal(model.middle.weight, weight)
    local.remove()
    assert not model.middle.weight.requires_grad
    assert {name for name, p in model.named_parameters() if not p.requires_grad} == {"middle.weight"}
    run_epoch(model, optimizer, batches())
    assert torch.equal(model.middle.weight, weight)


def test_a_module_used_twice_takes_one_normalised_step_of_the_summed_correlation():
    model = seeded(twice_used).double()
    data = [(x.double(), y) for x, y in batches(1)]
    local = with_boundary(model, sgd(model), 2, data, lr=0.01)
    assert list(local.local_layers) == ["a", "middle.conv"]
    conv, seen = model.middle.conv, []
    handle = conv.register_forward_hook(lambda module, args, output: seen.append((args[0], output)))
    weight = conv.weight.detach().clone()
    for _ in range(2):
        seen.clear()
        F.cross_entropy(model(data[0][0]), data[0][1]).backward()
        assert len(seen) == 2
        assert torch.equal(seen[1][1], F.conv2d(seen[1][0], weight, conv.bias, padding=1)), "both calls see one weight"
        d = sum(reference.correlation(x, z, weight, padding=1) for x, z in seen)
        weight = weight + 0.01 * d / torch.linalg.vector_norm(d)
        local.state_dict()  # a deferred write is applied at the latest here
        torch.testing.assert_close(conv.weight.detach(), weight, rtol=1e-12, atol=1e-13)
        weight = conv.weight.detach().clone()
    handle.remove()


@pytest.mark.parametrize("moment", ["next forward", "step"])
def test_a_deferred_write_is_applied_at_the_next_forward_or_step(moment):
    model = seeded(twice_used)
    local = with_boundary(model, sgd(model), 2, lr=0.01)
    conv = model.middle.conv
    before = conv.weight.detach().clone()
    model(batches(1)[0][0])
    if moment == "next forward":
        model.eval()
        with torch.no_grad():
            model(batches(1)[0][0])  # evaluation right after the last training step must see the update
    else:
        local.step(1.0)
    assert torch.linalg.vector_norm(conv.weight.detach() - before).item() == pytest.approx(0.01, rel=1e-4)


def test_lazy_modules_become_layers():
    model = seeded(lazy)
    with torch.no_grad():
        model(batches(1)[0][0])  # torch wants lazy parameters materialised before the optimizer sees them
    local = with_boundary(model, sgd(model), 2, lr=0.01)
    assert list(local.layers) == ["a", "middle", "b", "fc"]
    before = snapshot(model)
    model(batches(1)[0][0])
    assert trained_names(model, before) == {"a.weight", "middle.weight"}


def test_lazy_modules_may_still_be_empty_when_localized_learning_is_attached():
    model = seeded(lazy)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    local = with_boundary(model, optimizer, 2, lr=0.01)
    assert list(local.layers) == ["a", "middle", "b", "fc"]


@pytest.mark.parametrize(
    ("kwargs", "expected"),
    [
        ({"skip": "features.3"}, ["features.0", "features.6", "features.9", "fc"]),
        ({"skip": [r"features\.[36]", "fc"]}, ["features.0", "features.9"]),
        ({"skip": re.compile(r"f.*\.0")}, ["features.3", "features.6", "features.9", "fc"]),
        ({"include": r"features\..*"}, ["features.0", "features.3", "features.6", "features.9"]),
        ({"include": r"features\..*", "skip": ["features.0"]}, ["features.3", "features.6", "features.9"]),
        ({"include": ["fc", "features.6"]}, ["features.6", "fc"]),
    ],
)
def test_include_and_skip(kwargs, expected):
    model = seeded(PlainCNN)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # what the user left out needs no warning
        local = LocalizedLearning(model, sgd(model), epochs=20, preset="paper", t_shift=1, **kwargs)
        run_epoch(model, sgd(model), batches(1))
    assert list(local.layers) == expected
    assert local.num_layers == len(expected)


@pytest.mark.parametrize("option", ["include", "skip"])
@pytest.mark.parametrize("pattern", ["nothing", ["fc", "features.1"], re.compile("x+")])
def test_a_pattern_that_matches_nothing_is_named(option, pattern):
    model = seeded(PlainCNN)
    with pytest.raises(ValueError, match=rf"{option}.*(nothing|features\.1|x\+)"):
        LocalizedLearning(model, sgd(model), epochs=20, preset="paper", **{option: pattern})


def test_a_model_without_layers_is_refused():
    model = nn.Sequential(nn.BatchNorm2d(3), nn.Flatten())
    with pytest.raises(ValueError, match="model must have a convolution or linear"):
        LocalizedLearning(model, torch.optim.SGD(model.parameters(), lr=0.1), epochs=20, preset="paper")


def test_a_model_whose_layers_are_all_left_out_is_refused():
    model = nn.Sequential(parametrized().middle, nn.Flatten())
    LocalizedLearning(model, torch.optim.SGD(model.parameters(), lr=0.1), epochs=20, preset="paper")
    with pytest.raises(ValueError, match="'0'"):
        model(torch.randn(2, 4, 4, 4))


def test_data_parallel_is_refused():
    model = nn.DataParallel(seeded(PlainCNN))
    with pytest.raises(TypeError, match="DataParallel"):
        LocalizedLearning(model, sgd(model), epochs=20, preset="paper")
    with pytest.raises(TypeError, match="DataParallel"):
        HebbianUpdater(model)


@pytest.fixture
def process_group(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("wrapper", ["fully_shard", "DistributedDataParallel"])
def test_distributed_wrappers_are_refused(wrapper):
    """FSDP throws the updates away; DistributedDataParallel lets ranks drift: nothing sums the correlations."""
    model = seeded(PlainCNN)
    if wrapper == "fully_shard":
        fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
    else:
        model = nn.parallel.DistributedDataParallel(model)
    for attach in (lambda: LocalizedLearning(model, sgd(model), epochs=20, preset="paper"), lambda: HebbianUpdater(model)):
        with pytest.raises(TypeError, match="FSDP" if wrapper == "fully_shard" else wrapper):
            attach()


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("part", ["", "features.3", "features"])
@pytest.mark.parametrize("attach", ["hebbian", "frozen", "updater alone", "ReplicatedModel"])
def test_sharding_after_the_hooks_is_refused(attach, part):
    """The hooks would write to the gathered copies of the weights, which FSDP throws away."""
    model = seeded(PlainCNN)
    if attach == "updater alone":
        HebbianUpdater(model, lr=0.01).enable(PlainCNN.LAYERS)
    elif attach == "ReplicatedModel":
        LocalizedLearning(ReplicatedModel(model), sgd(model), epochs=20)
    else:
        LocalizedLearning(model, sgd(model), epochs=20, rule=attach)
    fully_shard(model.get_submodule(part), mesh=init_device_mesh("cpu", (1,)))
    with pytest.raises(TypeError, match=r"model must hold whole parameters, .* thrown away after the forward"):
        model(torch.randn(2, 3, 8, 8))


@pytest.mark.usefixtures("process_group")
def test_several_processes_are_warned_about(monkeypatch):
    HebbianUpdater(seeded(PlainCNN))  # a group of one process is no reason for it
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    with pytest.warns(UserWarning, match="2 processes"):
        HebbianUpdater(seeded(PlainCNN))


def torchvision_model(name):
    import torchvision

    return getattr(torchvision.models, name)(num_classes=4)


def transformers_model(layer_type):
    from transformers import ResNetConfig, ResNetForImageClassification

    config = ResNetConfig(
        embedding_size=8, hidden_sizes=[16, 16, 32, 32], depths=[2, 2, 2, 2], layer_type=layer_type, num_labels=4
    )
    return ResNetForImageClassification(config)


@pytest.mark.parametrize(
    ("name", "build", "size", "layers"),
    [
        ("resnet18", torchvision_model, 2, 21),  # 1 + 16 + 3 shortcuts + fc
        ("resnet34", torchvision_model, 2, 37),
        ("resnet50", torchvision_model, 3, 54),
        ("mobilenet_v2", torchvision_model, 3, 53),
        ("vgg13_bn", torchvision_model, 1, 13),
        ("bottleneck", transformers_model, 3, 30),  # 1 + 8 * 3 + 4 shortcuts + classifier
        ("basic", transformers_model, 2, None),
    ],
)
def test_t_shift_auto_is_the_recurring_block(name, build, size, layers):
    torch.manual_seed(0)
    model = build(name)
    local = LocalizedLearning(model, torch.optim.SGD(model.parameters(), lr=0.1), epochs=1000, preset="paper")
    local.trace(torch.randn(2, 3, 32, 32))
    assert local.schedule.shift == size
    if layers is not None:
        assert local.num_layers == layers
