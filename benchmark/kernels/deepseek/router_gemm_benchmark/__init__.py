"""The parts of the router-GEMM benchmark.

    providers   who can be measured, and through which public function
    accuracy    whether its logits are right, before it is timed
    timing      microseconds, from CUDA graphs
    report      JSON and tables; on request CSV
    plots       how a diagram looks

`results` is one plain dictionary that goes through them; `report.py` describes it.
"""

import sys
from pathlib import Path


def how_to_call(error: ModuleNotFoundError) -> str:
    """One line for a script that was called with a Python that lacks a module."""
    return (
        f"{Path(sys.argv[0]).name}: {error}; call it with a Python that has SGLang and this "
        "project, such as .venv/bin/python"
    )
