"""HebbianUpdater alone: momentum and the learning rate."""

import pytest
import torch
from models import PlainCNN, seeded

from localsgd_ext import HebbianUpdater


def test_momentum_begins_anew_where_a_layer_learns_locally_again():
    changes = []
    for stops in (True, False):
        model = seeded(PlainCNN).requires_grad_(False)  # so that no write is deferred
        name = PlainCNN.LAYERS[0]
        updater = HebbianUpdater(model, [name], lr=0.01, momentum=0.9)
        updater.enable([name])
        model(torch.ones(2, 3, 8, 8))
        if stops:
            updater.enable([])
            assert updater.state_dict()["momentum"] == {}
            updater.enable([name])
        before = model.get_submodule(name).weight.clone()
        model(torch.ones(2, 3, 8, 8))
        changes.append(float((model.get_submodule(name).weight - before).detach().norm()))
    assert changes[0] == pytest.approx(0.01, rel=1e-3)  # a first step has the length of the learning rate
    assert changes[1] == pytest.approx(0.019, rel=0.05)


@pytest.mark.parametrize("lr", [True, "0.1", None])
def test_a_learning_rate_of_the_updater_is_a_number(lr):
    with pytest.raises(TypeError, match=f"lr must be a number, got {lr!r}"):
        HebbianUpdater(seeded(PlainCNN), PlainCNN.LAYERS[:1], lr=lr)
