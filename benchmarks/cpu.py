"""The CPU path beside PyTorch's, forward + backward in training mode.

    python benchmarks/cpu.py [--threads 1] [--repeat 20] [--dtype float32]

Repetitions of both are interleaved; the table shows medians and their ratio (below 1: cupybn is
faster). The last columns are relative L2 errors against float64. Without PyTorch its columns stay
empty. It measures, and asserts nothing.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import sys
import time

SHAPES = [
    (32, 64, 56, 56), (64, 256, 14, 14), (32, 512, 7, 7), (256, 512), (4096, 1024),
    (32, 64, 112, 112), (8, 16),
]  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeat", type=int, default=20)
    parser.add_argument("--dtype", default="float32", choices=["float32", "float64"])
    args = parser.parse_args()
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        os.environ[name] = str(args.threads)  # read when NumPy and PyTorch are imported
    import numpy as np

    import cupybn

    try:
        import torch

        torch.set_num_threads(args.threads)
        against = f"PyTorch {torch.__version__}"
    except ImportError:
        torch, against = None, "no PyTorch here"
    print(f"$ python {' '.join(sys.argv)}")
    print(
        f"cupybn {cupybn.__version__}, NumPy {np.__version__}, {against}, {args.dtype}, "
        f"{args.threads} thread(s), {os.cpu_count()} cores, {platform.machine()}"
    )
    print(f"{'shape':>20} {'cupybn ms':>10} {'torch ms':>10} {'ratio':>6} "
          f"{'y err':>9} {'torch':>9} {'dx err':>9} {'torch':>9}")  # fmt: skip
    for shape in SHAPES:
        print(row(np, cupybn, torch, shape, args), flush=True)


def row(np, cupybn, torch, shape, args):
    rng = np.random.default_rng(0)
    x, dy = (rng.standard_normal(shape).astype(args.dtype) for _ in range(2))
    layer = (cupybn.BatchNorm2d if len(shape) == 4 else cupybn.BatchNorm1d)(
        shape[1], dtype=args.dtype
    )
    theirs = module = None
    if torch is not None:
        cls = torch.nn.BatchNorm2d if len(shape) == 4 else torch.nn.BatchNorm1d
        module = cls(shape[1], dtype=getattr(torch, args.dtype))
        tx, tdy = torch.from_numpy(x).requires_grad_(), torch.from_numpy(dy)

        def theirs():
            tx.grad = None
            y = module(tx)
            y.backward(tdy)
            return y.detach().numpy(), tx.grad.numpy()

    def ours():
        y = layer.forward(x)
        return y, layer.backward(dy)

    times = {ours: [], theirs: []}
    results = {}
    inner = max(1, 20_000 // x.size)
    for repetition in range(args.repeat + 3):
        for run in filter(None, times):
            began = time.perf_counter()
            for _ in range(inner):
                results[run] = run()
            if repetition >= 3:
                times[run].append((time.perf_counter() - began) / inner)
    y64, dx64 = exact(np, x, dy)
    mine = statistics.median(times[ours]) * 1e3
    line = f"{shape!s:>20} {mine:10.3f}"
    errors = [relative(np, results[ours][i], v) for i, v in enumerate((y64, dx64))]
    if theirs is None:
        return f"{line} {'':>10} {'':>6} {errors[0]:9.1e} {'':>9} {errors[1]:9.1e}"
    other = statistics.median(times[theirs]) * 1e3
    others = [relative(np, results[theirs][i], v) for i, v in enumerate((y64, dx64))]
    return (
        f"{line} {other:10.3f} {mine / other:6.2f} "
        f"{errors[0]:9.1e} {others[0]:9.1e} {errors[1]:9.1e} {others[1]:9.1e}"
    )


def exact(np, x, dy):
    x, dy = x.astype(np.float64), dy.astype(np.float64)
    axes = (0, *range(2, x.ndim))
    xmu = x - x.mean(axes, keepdims=True)
    invstd = 1 / np.sqrt((xmu**2).mean(axes, keepdims=True) + 1e-5)
    xhat = xmu * invstd
    centred = dy - dy.mean(axes, keepdims=True)
    return xhat, (centred - xhat * (dy * xhat).mean(axes, keepdims=True)) * invstd


def relative(np, actual, expected):
    return float(np.linalg.norm((actual - expected).ravel()) / np.linalg.norm(expected.ravel()))


if __name__ == "__main__":
    main()
