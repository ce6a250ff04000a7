"""Convolutional networks of the usual shapes, small enough to train in a test."""

from __future__ import annotations

import torch
from torch import nn


def conv_bn(channels, out, kernel=3, stride=1, groups=1):
    pad = kernel // 2
    return nn.Sequential(
        nn.Conv2d(channels, out, kernel, stride, pad, groups=groups, bias=False), nn.BatchNorm2d(out), nn.ReLU()
    )


class Residual(nn.Module):
    def __init__(self, channels, out, stride):
        super().__init__()
        self.path = nn.Sequential(conv_bn(channels, out, 3, stride), conv_bn(out, out)[:2])
        self.skip = conv_bn(channels, out, 1, stride)[:2] if stride > 1 or channels != out else nn.Identity()

    def forward(self, x):
        return (self.path(x) + self.skip(x)).relu()


def resnet18(width=64, classes=1000, stem=(7, 2), channels=3):
    """ResNet-18, with 64 channels in its first stage unless another width is given."""
    kernel, stride = stem
    blocks, last = [], width
    for stage in range(4):
        out = width * 2**stage
        blocks += [Residual(last, out, 1 if stage == 0 else 2), Residual(out, out, 1)]
        last = out
    pool = [nn.MaxPool2d(3, 2, 1)] if stride > 1 else []
    ends = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(last, classes)]
    return nn.Sequential(conv_bn(channels, width, kernel, stride), *pool, *blocks, *ends)


class UNet(nn.Module):
    """Two levels down and up, with transposed convolutions and skips."""

    def __init__(self, width=16, channels=1):
        super().__init__()
        self.first, self.second = conv_bn(channels, width), conv_bn(width, 2 * width)
        self.bottom = nn.Sequential(conv_bn(2 * width, 4 * width), conv_bn(4 * width, 4 * width))
        self.up_second = nn.ConvTranspose2d(4 * width, 2 * width, 2, 2)
        self.join_second = conv_bn(4 * width, 2 * width)
        self.up_first = nn.ConvTranspose2d(2 * width, width, 2, 2)
        self.join_first = conv_bn(2 * width, width)
        self.head = nn.Conv2d(width, 1, 1)

    def forward(self, x):
        first = self.first(x)
        second = self.second(nn.functional.max_pool2d(first, 2))
        x = self.bottom(nn.functional.max_pool2d(second, 2))
        x = self.join_second(torch.cat([self.up_second(x), second], 1))
        x = self.join_first(torch.cat([self.up_first(x), first], 1))
        return self.head(x)


def mobilenet(width=16, classes=10, channels=1):
    """Inverted residuals in a row: pointwise, depthwise, pointwise."""
    layers, last = [conv_bn(channels, width, 3, 2)], width
    for out, stride in ((width, 1), (2 * width, 2), (2 * width, 1), (4 * width, 1)):
        wide = 4 * last
        layers += [conv_bn(last, wide, 1), conv_bn(wide, wide, 3, stride, groups=wide), conv_bn(wide, out, 1)[:2]]
        last = out
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(last, classes))


class Causal(nn.Module):
    """Dilated convolutions of a sequence that see the past alone."""

    def __init__(self, width=48, classes=10, channels=1):
        super().__init__()
        self.stem = nn.Conv1d(channels, width, 1)
        self.layers = nn.ModuleList(nn.Conv1d(width, width, 3, dilation=2**depth) for depth in range(5))
        self.head = nn.Linear(width, classes)

    def forward(self, x):
        x = self.stem(x.flatten(1)[:, None])
        for layer in self.layers:
            x = x + layer(nn.functional.pad(x, (2 * layer.dilation[0], 0))).relu()
        return self.head(x[..., -1])
