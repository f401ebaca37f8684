"""Side-by-side measurements of cupybn, run from the checkout: ``python -m benchmarks --help``.

Importing this imports nothing else: the number of threads is set before NumPy is imported.
"""

SECTIONS = {"cpu": "cpu", "gpu": "gpu", "kernels": "kernels", "comm": "comm"}
SECTIONS |= {"overhead": "costs", "memory": "costs"}
"""By name, the modules that have their ``measure_name``."""
DTYPES = ("float32", "float16", "bfloat16", "float64")
LAYOUTS = ("rows", "columns")
