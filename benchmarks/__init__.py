"""Side-by-side measurements of cupybn, run from the checkout: ``python -m benchmarks --help``.

Importing this imports nothing: the number of threads is set before NumPy is there.
"""

SECTIONS = {
    "cpu": "cpu.measure",
    "gpu": "gpu.measure",
    "comm": "comm.measure",
    "overhead": "costs.overhead",
    "memory": "costs.memory",
}
DTYPES = ("float32", "float16", "bfloat16", "float64")
LAYOUTS = ("rows", "columns")
