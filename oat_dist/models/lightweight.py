"""The paper's lightweight network."""

from __future__ import annotations

from torch import Tensor, nn

from oat_dist.models.heads import Fp32Linear

__all__ = ["Lightweight"]


class Lightweight(nn.Module):
    """The paper's lightweight net for 32x32 RGB (section 3.2): two convolutions of 6 and 16 kernels of 5x5, each
    with ReLU and 2x2 max-pooling, then fully connected layers of 128, 64 and C outputs. 63,106 parameters at C = 10."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 6, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(6, 16, 5), nn.ReLU(), nn.MaxPool2d(2)
        )
        self.classifier = nn.Sequential(
            nn.Flatten(),
            nn.Linear(16 * 5 * 5, 128),
            nn.ReLU(),
            nn.Linear(128, 64),
            nn.ReLU(),
            Fp32Linear(64, num_classes),
        )

    def forward(self, images_BCHW: Tensor) -> Tensor:
        return self.classifier(self.features(images_BCHW))
