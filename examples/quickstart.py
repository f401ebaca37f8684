"""Batch norm in one process: ``python examples/quickstart.py``."""

import numpy as np

from cupybn import BatchNorm2d

rng = np.random.default_rng(0)
x = rng.normal(loc=5.0, scale=3.0, size=(8, 4, 16, 16)).astype(np.float32)  # (N, C, H, W)

bn = BatchNorm2d(4)
print(bn)

# Training mode, which a new layer is in: normalises each channel over N, H and W.
y = bn(x)
print(f"a channel of x: mean {x[:, 0].mean():.3f}, standard deviation {x[:, 0].std():.3f}")
print(f"the same of y:  mean {abs(y[:, 0].mean()):.3f}, standard deviation {y[:, 0].std():.3f}")

# Backward takes the gradient of the loss by y, here random, and returns the one by x.
dx = bn.backward(rng.standard_normal(y.shape, dtype=np.float32))
print("dx:", dx.shape, dx.dtype)
print("gradient of weight:", bn.grads["weight"])
bn.weight -= 1e-3 * bn.grads["weight"]
bn.zero_grad()

# Each batch in training mode moves the running statistics a tenth of the way to its own.
for _ in range(99):
    bn(x)
print("running mean after 100 batches:", bn.running_mean)

# Evaluation mode normalises with the running statistics, however small the batch.
bn.eval()
y = bn(x[:1])
print("evaluation of one sample:", y.shape)

# The state: parameters and running statistics by name, NumPy arrays that numpy.savez takes.
state = bn.state_dict()
print("state:", ", ".join(state))
print("loaded into another layer:", BatchNorm2d(4).load_state_dict(state))
