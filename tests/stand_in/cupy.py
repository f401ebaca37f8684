"""``import cupy`` where this folder is on the path: the stand-in, its streams putting off all work.

    PYTHONPATH=tests/stand_in:tests python -m cupybn info

With STAND_IN_KERNELS=none kernels do nothing: for what only times them.
"""

import os

import fake_cupy

fake_cupy.install()
fake_cupy.put_off()
if os.environ.get("STAND_IN_KERNELS") == "none":
    fake_cupy.do_nothing()
