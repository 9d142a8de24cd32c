"""The pull requests that `export` makes, a module each."""

NAMES = ("gate", "flashinfer", "fp32", "routing")
