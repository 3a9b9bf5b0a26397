"""Localized learning in a plain training loop: torchvision's ResNet-18 on striped images whose class is their direction.

    python examples/resnet18_plain_loop.py --epochs 12

Two lines differ from the loop without it; they are marked. The images are made up so that nothing has to be downloaded:
put your own ``DataLoader`` in the place of ``stripes``.
"""

from __future__ import annotations

import argparse
import math
import time

import torch
import torch.nn.functional as F
import torchvision
from torch.utils.data import DataLoader, TensorDataset

from localsgd_ext import LocalizedLearning


def stripes(images: int, size: int, classes: int = 8, batch_size: int = 32) -> DataLoader:
    """Noisy gratings ``[3, size, size]`` of random wavelength and phase in one of ``classes`` directions."""
    labels = torch.randint(classes, (images,))
    angle = (labels + 0.3 * (torch.rand(images) - 0.5)) * math.pi / classes
    u, v = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    across = u * angle.cos()[:, None, None] + v * angle.sin()[:, None, None]
    wavelength, phase = 4 + 8 * torch.rand(images, 1, 1), 6.28 * torch.rand(images, 1, 1)
    waves = torch.sin(6.28 * across / wavelength + phase).unsqueeze(1).expand(-1, 3, -1, -1)
    return DataLoader(TensorDataset(waves + torch.randn(images, 3, size, size), labels), batch_size, shuffle=True)


def main(epochs: int, images: int, size: int) -> None:
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    loader = stripes(images, size)
    model = torchvision.models.resnet18(num_classes=8).to(device).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)

    local = LocalizedLearning(model, optimizer, epochs=epochs)  # <- the first line
    for epoch in range(epochs):
        start, losses = time.perf_counter(), []
        for x, y in loader:
            loss = F.cross_entropy(model(x.to(device)), y.to(device))
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        epoch_loss = torch.stack(losses).mean()
        print(
            f"epoch {epoch:2}  loss {epoch_loss:.3f}  local layers {local.boundary:2} of {local.num_layers}  "
            f"{time.perf_counter() - start:.1f} s"
        )
        scheduler.step()
        local.step(epoch_loss)  # <- the second line


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--size", type=int, default=32, help="height and width of the images")
    main(**vars(parser.parse_args()))
