"""The router of MoE models for SGLang, as a plugin. See README.md.

Importing this package makes the in-tree modules importable under their SGLang names.
The file `sglang_router_gemm.pth` does so at interpreter start.
"""

from sglang_router_gemm._in_tree import install

__version__ = "0.2.0"

install()
