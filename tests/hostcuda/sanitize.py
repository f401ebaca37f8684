"""Run Python with the kernels under AddressSanitizer and UndefinedBehaviorSanitizer.

python tests/hostcuda/sanitize.py -m pytest tests/test_kernels.py
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    from hostcuda.build import missing, sanitized

    if missing():
        sys.exit(f"no sanitized kernels: {missing()}")
    os.execve(sys.executable, [sys.executable, *sys.argv[1:]], sanitized())
