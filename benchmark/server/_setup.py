"""Imported first by every script here: what they need besides, or one line where it is missing."""

import sys
from pathlib import Path

BENCHMARK = Path(__file__).resolve().parents[1] / "kernels" / "deepseek"
sys.path.insert(0, str(BENCHMARK))

from router_gemm_benchmark import how_to_call  # noqa: E402

try:
    import requests  # noqa: F401
    import tabulate  # noqa: F401
    import torch  # noqa: F401

    import sglang  # noqa: F401
    import sglang_router_gemm  # noqa: F401  makes the in-tree modules importable
except ModuleNotFoundError as error:
    sys.exit(how_to_call(error))
