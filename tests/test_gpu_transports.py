"""Messages of CuPy arrays through pinned memory and by their pointer, against slow streams."""

from __future__ import annotations

import numpy as np
import pytest
from test_gpu import ON_GPU, cp
from test_gpu_layers import SPIN

from cupybn.communicators import staging

pytestmark = ON_GPU


def spin(cycles=50_000_000):
    """Keeps the current stream busy for some tens of milliseconds."""
    cp.RawKernel(SPIN, "spin")((1,), (1,), (np.int64(cycles),))


def times_two(array):
    array *= 2


@pytest.mark.parametrize("own_stream", [True, False])
@pytest.mark.parametrize("size", [256, 1 << 20])
def test_a_message_that_is_still_being_written(own_stream, size):
    stream = cp.cuda.Stream(non_blocking=True) if own_stream else cp.cuda.Stream.null
    with stream:
        for i in range(5):
            message = cp.full(size, -1.0)
            spin()
            message[...] = cp.arange(size) + i
            host = staging.sum_through_pinned(message, times_two)
            np.testing.assert_array_equal(host[:16], 2.0 * (np.arange(16) + i))
            np.testing.assert_array_equal(message.get(), 2.0 * (np.arange(size) + i))


def test_a_sum_that_is_still_on_its_way_back():
    """The second message, on a stream that has nothing to do, takes the memory of the first."""
    for _ in range(20):
        first, second = cp.zeros(1 << 20), cp.zeros(1 << 20)
        streams = [cp.cuda.Stream(non_blocking=True) for _ in range(2)]
        cp.cuda.Device().synchronize()
        for i, (stream, message) in enumerate(zip(streams, (first, second), strict=True)):
            with stream:

                def summed(host, value=i + 1.0):
                    host[...] = value

                staging.sum_through_pinned(message, summed)
        cp.cuda.Device().synchronize()
        assert (first.get() == 1).all()
        assert (second.get() == 2).all()


def test_a_pointer_is_handed_on_when_it_is_written():
    other = cp.cuda.Stream(non_blocking=True)
    with cp.cuda.Stream(non_blocking=True) as stream:
        message = cp.zeros(4096)
        spin()
        message += 1
        seen = []

        def summed(array):
            seen.append(stream.done)
            with other:  # ordered after nothing of the first stream
                seen.append(array.get(stream=other))

        staging.sum_on_device(message, summed)
    assert seen[0]
    assert (seen[1] == 1).all()
