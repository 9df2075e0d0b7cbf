"""Set up before any test module is imported: a fast BLAS for MLX, and no hub."""

import os

from hf_mlx.blas import load_openblas

os.environ.setdefault("HF_HUB_OFFLINE", "1")
load_openblas()
