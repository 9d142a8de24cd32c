"""The parts of the router-GEMM benchmark.

    providers   who can be measured, and through which public function
    accuracy    whether its logits are right, before it is timed
    timing      microseconds, from CUDA graphs
    report      JSON, CSV, plots and tables

`results` is one plain dictionary that goes through them; `report.py` describes it.
"""
