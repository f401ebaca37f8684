"""A ResNet of torchvision's shape, and its training in one process and over ranks."""

from __future__ import annotations

import numpy as np
import torch
from rank_checks import shard
from torch.nn.functional import cross_entropy

from cupybn.interop import torch as interop

STEPS = 20
CLASSES = 10


class BasicBlock(torch.nn.Module):
    expansion = 1

    def __init__(self, channels, width, stride):
        super().__init__()
        self.body = torch.nn.Sequential(
            *conv_norm(channels, width, 3, stride),
            torch.nn.ReLU(inplace=True),
            *conv_norm(width, width, 3),
        )
        self.relu = torch.nn.ReLU(inplace=True)
        self.downsample = shortcut(channels, width * self.expansion, stride)

    def forward(self, x):
        out = self.body(x)
        out += x if self.downsample is None else self.downsample(x)
        return self.relu(out)


class Bottleneck(BasicBlock):
    expansion = 4

    def __init__(self, channels, width, stride):
        super().__init__(channels, width, stride)
        self.body = torch.nn.Sequential(
            *conv_norm(channels, width, 1),
            torch.nn.ReLU(inplace=True),
            *conv_norm(width, width, 3, stride),
            torch.nn.ReLU(inplace=True),
            *conv_norm(width, width * self.expansion, 1),
        )


def conv_norm(channels, width, size, stride=1):
    conv = torch.nn.Conv2d(channels, width, size, stride, size // 2, bias=False)
    return conv, torch.nn.BatchNorm2d(width)


def shortcut(channels, width, stride):
    if (channels, stride) == (width, 1):
        return None
    return torch.nn.Sequential(*conv_norm(channels, width, 1, stride))


class ResNet(torch.nn.Module):
    """torchvision's ResNet with narrower layers: [2, 2, 2, 2] basic blocks are a ResNet-18."""

    def __init__(self, block, blocks=(2, 2, 2, 2), width=4, zero_init_residual=True):
        super().__init__()
        self.conv1, self.bn1 = conv_norm(3, width, 7, 2)
        self.relu = torch.nn.ReLU(inplace=True)
        self.maxpool = torch.nn.MaxPool2d(3, 2, 1)
        stages, channels = [], width
        for i, number in enumerate(blocks):
            stage = []
            for j in range(number):
                stage.append(block(channels, width << i, 2 if i and not j else 1))
                channels = (width << i) * block.expansion
            stages.append(torch.nn.Sequential(*stage))
        self.layer1, self.layer2, self.layer3, self.layer4 = stages
        self.avgpool = torch.nn.AdaptiveAvgPool2d(1)
        self.fc = torch.nn.Linear(channels, CLASSES)
        for module in self.modules():
            if isinstance(module, torch.nn.Conv2d):
                torch.nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        if zero_init_residual:
            for module in self.modules():
                if isinstance(module, BasicBlock):
                    torch.nn.init.zeros_(module.body[-1].weight)

    def forward(self, x):
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(torch.flatten(self.avgpool(x), 1))


def build(kind, dtype, memory_format=torch.channels_last):
    """The model, with the same parameters each time."""
    torch.manual_seed(0)
    model = ResNet({"basic": BasicBlock, "bottleneck": Bottleneck}[kind])
    return model.to(dtype=dtype, memory_format=memory_format)


def batches(total, dtype, steps):
    """(images, labels) of each step, of all ranks together."""
    rng = np.random.default_rng(1)
    for _ in range(steps):
        images = torch.from_numpy(rng.standard_normal((total, 3, 40, 40))).to(dtype)
        yield images, torch.from_numpy(rng.integers(0, CLASSES, total))


def state_of(model):
    """Parameters and statistics, one vector."""
    tensors = [getattr(t, "full_tensor", lambda t=t: t)() for t in model.state_dict().values()]
    return torch.cat([t.detach().double().reshape(-1) for t in tensors])


def train(
    model,
    sizes,
    *,
    comm=None,
    dtype=torch.float64,
    autocast=False,
    averaged=None,
    order=0,
    parts=None,
    steps=STEPS,
):
    """Steps of SGD on this rank's share of each batch; the state afterwards.

    Args:
        sizes: of the ranks' shares.
        comm: of the ranks; gradients are summed over it, unless they are `averaged` by somebody
            else, over so many ranks. None is one process, with the whole batch.
        order: 0, or the seed of a permutation of each batch.
        parts: how many samples of a batch have a backward of their own, one part after the other.
    """
    optimizer = torch.optim.SGD(model.parameters(), 0.02, momentum=0.9)
    total = sum(sizes)
    for images, labels in batches(total, dtype, steps):
        if order:
            permutation = torch.from_numpy(np.random.default_rng(order).permutation(total))
            images, labels = images[permutation], labels[permutation]
        if comm is not None:
            images, labels = (shard(each, comm, sizes) for each in (images, labels))
        images = images.contiguous(memory_format=torch.channels_last)
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            logits = model(images)
        lengths = [size for size in parts if size] if parts else [len(labels)]
        pieces = (tensor.split(lengths) for tensor in (logits, labels))
        for logit, label in zip(*pieces, strict=True):
            loss = cross_entropy(logit.to(dtype), label, reduction="sum") / total
            (loss * (averaged or 1)).backward(retain_graph=parts is not None)
        if comm is not None and averaged is None:
            interop.allreduce_gradients(model, comm, op="sum")
        optimizer.step()
    return state_of(model)


def difference(state, expected):
    """The largest, relative to the larger of 1 and the number."""
    return float(((state - expected).abs() / expected.abs().clamp(min=1)).max())
