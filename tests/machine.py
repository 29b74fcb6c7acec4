"""What the tests look for on a machine."""

import os
import shutil
from pathlib import Path


def find_nvcc() -> str | None:
    """The CUDA compiler, on the PATH or where CUDA_HOME or the usual place has it."""
    homes = [os.environ.get("CUDA_HOME"), "/usr/local/cuda"]
    paths = [Path(home) / "bin" / "nvcc" for home in homes if home]
    return next((str(path) for path in paths if path.is_file()), shutil.which("nvcc"))
