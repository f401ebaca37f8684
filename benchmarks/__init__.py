"""Side-by-side measurements of cupybn, run from the checkout: ``python -m benchmarks --help``.

Importing this imports nothing: the number of threads is set before NumPy is there, and the process
of another version imports its own cupybn.
"""

SECTIONS = {
    "cpu": "the CPU backends beside PyTorch, PyTorch compiled and JAX on the CPU",
    "gpu": "CuPy arrays beside PyTorch native, cuDNN and the copy rate",
    "comm": "messages between ranks beside a bare Allreduce; under mpiexec",
    "overhead": "what a call on a tiny tensor costs: Python functions, and microseconds",
    "memory": "peak memory of forward and backward",
}
DTYPES = ("float32", "float16", "bfloat16", "float64")
LAYOUTS = ("rows", "columns")
