"""WRN-28-10 for small images (Zagoruyko and Komodakis, "Wide Residual Networks", 2016)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from oat_dist.models.heads import Fp32Linear

__all__ = ["WideResNet"]


class _Block(nn.Module):
    """Two 3x3 convolutions, each after BatchNorm and ReLU; where the shape changes, a 1x1 shortcut of the activated
    input."""

    def __init__(self, channels_in: int, channels: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(channels_in)
        self.conv1 = nn.Conv2d(channels_in, channels, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.shortcut = None if channels_in == channels else nn.Conv2d(channels_in, channels, 1, stride, bias=False)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        active_BCHW = F.relu(self.bn1(x_BCHW))
        skip_BCHW = x_BCHW if self.shortcut is None else self.shortcut(active_BCHW)
        return skip_BCHW + self.conv2(F.relu(self.bn2(self.conv1(active_BCHW))))


class WideResNet(nn.Module):
    """Depth 6n + 4 and width k without dropout: three groups of n blocks of 16k, 32k and 64k channels, the second and
    third with stride 2. WRN-28-10, the default, has 36,479,194 parameters at C = 10."""

    def __init__(self, num_classes: int, depth: int = 28, width: int = 10) -> None:
        super().__init__()
        assert depth % 6 == 4
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        groups, channels_in = [], 16
        for channels, first_stride in ((16 * width, 1), (32 * width, 2), (64 * width, 2)):
            blocks = []
            for number in range((depth - 4) // 6):
                blocks.append(_Block(channels_in, channels, first_stride if number == 0 else 1))
                channels_in = channels
            groups.append(nn.Sequential(*blocks))
        self.groups = nn.Sequential(*groups)
        self.bn = nn.BatchNorm2d(channels_in)
        self.fc = Fp32Linear(channels_in, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        nn.init.zeros_(self.fc.bias)

    def forward(self, images_BCHW: Tensor) -> Tensor:
        features_BCHW = F.relu(self.bn(self.groups(self.conv1(images_BCHW))))
        return self.fc(features_BCHW.mean((2, 3)))
