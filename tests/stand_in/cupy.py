"""``import cupy`` where this folder is on the path: the stand-in, its streams putting off all work.

    PYTHONPATH=tests/stand_in:tests tests/on_gpu.sh correct FOLDER

goes through the steps of a GPU session without a GPU.
"""

import fake_cupy

fake_cupy.install()
fake_cupy.put_off()
