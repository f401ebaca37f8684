"""convert_sync_batchnorm and revert_sync_batchnorm over trees of layers."""

from __future__ import annotations

import numpy as np
import pytest

import cupybn
from cupybn import (
    BatchNorm1d,
    BatchNorm2d,
    BatchNorm3d,
    Layer,
    SelfCommunicator,
    Sequential,
    SyncBatchNorm,
    convert_sync_batchnorm,
    revert_sync_batchnorm,
)

ALONE = SelfCommunicator()


class Block(Layer):
    """A container that is not a Sequential."""

    def __init__(self):
        super().__init__()
        self.first = BatchNorm2d(3, eps=1e-3, momentum=None, activation="relu")
        self.second = Sequential({"bn": BatchNorm1d(4, affine=False), "again": self.first})

    def compute_forward(self, x):
        return self.first.run_forward(x, True)

    def compute_backward(self, dy, context):
        return self.first.compute_backward(dy, context)


class Custom(BatchNorm2d):
    pass


def arrays(layer):
    dicts = (layer.params, layer.grads, layer.buffers)
    return [(name, id(array)) for kind in dicts for name, array in kind.items()]


def test_the_root_itself():
    layer = BatchNorm3d(5, eps=0.25, check_finite=True, bias=False, channel_axis=-1)
    layer.eval()
    sync = convert_sync_batchnorm(layer, ALONE)
    assert type(sync) is SyncBatchNorm
    assert sync.comm is ALONE
    assert arrays(sync) == arrays(layer)
    assert not sync.training
    assert sync.params is not layer.params  # the arrays are shared, the dicts are not
    assert repr(sync).replace("SyncBatchNorm", "BatchNorm3d").startswith(repr(layer)[:-1])
    back = revert_sync_batchnorm(sync)
    assert type(back) is BatchNorm3d
    assert arrays(back) == arrays(layer)
    assert back.__dict__.keys() == layer.__dict__.keys()
    assert repr(back) == repr(layer)
    with pytest.raises(cupybn.ShapeError, match="expected 5D input"):
        back(np.zeros((2, 3, 5), np.float32))
    assert type(SyncBatchNorm.convert_sync_batchnorm(layer)) is SyncBatchNorm


def test_a_tree_in_place_with_shared_layers():
    block = Block()
    before = {path: arrays(layer) for path, layer in block.named_layers()}
    order = list(block.children), list(block.second.children)
    assert convert_sync_batchnorm(block, ALONE) is block
    assert type(block.first) is SyncBatchNorm
    assert block.first is block.second.again
    assert block.first.activation == "relu"
    assert block.first.momentum is None
    assert block.second.bn.weight is None
    assert {path: arrays(layer) for path, layer in block.named_layers()} == before
    assert (list(block.children), list(block.second.children)) == order
    assert block.second.bn.path == "second.bn"
    x = np.random.default_rng(0).standard_normal((4, 3, 2, 2)).astype(np.float32)
    block.backward(block(x))
    revert_sync_batchnorm(block)
    assert type(block.first) is BatchNorm2d
    assert type(block.second.bn) is BatchNorm1d
    assert block.first is block.second.again
    assert {path: arrays(layer) for path, layer in block.named_layers()} == before


def test_converting_twice_moves_to_the_new_communicator():
    block, other = Block(), SelfCommunicator()
    convert_sync_batchnorm(block, ALONE)
    first = block.first
    convert_sync_batchnorm(block, other)
    assert block.first is first
    assert first.comm is other
    assert type(revert_sync_batchnorm(block).first) is BatchNorm2d


def test_reverting_one_that_was_made_directly():
    layer = SyncBatchNorm(3)
    assert revert_sync_batchnorm(layer) is layer
    assert isinstance(layer.comm, SelfCommunicator)
    layer(np.random.default_rng(0).standard_normal((4, 3)).astype(np.float32))


def test_subclasses_are_refused_by_path_before_anything_changes():
    net = Sequential({"a": BatchNorm2d(3), "b": Sequential({"c": Custom(3)})})
    with pytest.raises(TypeError, match=r"'b\.c' is a Custom"):
        convert_sync_batchnorm(net, ALONE)
    assert type(net.a) is BatchNorm2d
    convert_sync_batchnorm(net, ALONE, skip=["b.c"])
    assert type(net.a) is SyncBatchNorm
    assert type(net.b.c) is Custom
    with pytest.raises(TypeError, match=r"'b\.c' is a Custom"):
        revert_sync_batchnorm(net)
    revert_sync_batchnorm(net, skip="b.c")
    assert type(net.a) is BatchNorm2d
    with pytest.raises(TypeError, match="'the root' is a Custom"):
        convert_sync_batchnorm(Custom(3))
    with pytest.raises(ValueError, match="skip names no layer of the tree: 'x'"):
        convert_sync_batchnorm(net, skip=("x",))
    with pytest.raises(TypeError, match="expected a Layer, got int"):
        convert_sync_batchnorm(3)
    with pytest.raises(TypeError, match="comm must be"):
        convert_sync_batchnorm(net, comm="world")


def test_a_plain_layer_may_be_skipped_too():
    net = Sequential(BatchNorm2d(3), BatchNorm2d(3))
    convert_sync_batchnorm(net, ALONE, skip=("1",))
    assert [type(layer) for layer in net] == [SyncBatchNorm, BatchNorm2d]
