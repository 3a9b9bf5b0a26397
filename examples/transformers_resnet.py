"""Localized learning in a plain training loop: a ResNet of Hugging Face ``transformers``, made from a configuration.

    python examples/transformers_resnet.py --epochs 12

The model computes its own loss; localized learning neither knows nor cares. Nothing is downloaded: to fine-tune a trained
model instead, use ``ResNetForImageClassification.from_pretrained(...)``.
"""

from __future__ import annotations

import argparse
import time

import torch
from resnet18_plain_loop import stripes
from transformers import ResNetConfig, ResNetForImageClassification

from localsgd_ext import LocalizedLearning


def main(epochs: int, images: int, size: int) -> None:
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    loader = stripes(images, size)
    config = ResNetConfig(
        embedding_size=32, hidden_sizes=[64, 128, 256], depths=[2, 3, 2], layer_type="bottleneck", num_labels=8
    )
    model = ResNetForImageClassification(config).to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.05)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)

    with LocalizedLearning(model, optimizer, epochs=epochs) as local:
        for epoch in range(epochs):
            start, losses = time.perf_counter(), []
            for x, y in loader:
                loss = model(pixel_values=x.to(device), labels=y.to(device)).loss
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
            local.step(epoch_loss)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--size", type=int, default=32, help="height and width of the images")
    main(**vars(parser.parse_args()))
