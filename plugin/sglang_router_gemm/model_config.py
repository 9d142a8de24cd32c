"""The gate that a model's config.json describes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

_NUM_EXPERTS = ("n_routed_experts", "num_experts", "num_local_experts")


class ConfigError(Exception):
    """Why a config.json says nothing of a gate, in one line."""


class GateConfig(NamedTuple):
    """The shape of a model's gates, and how many layers have one."""

    num_experts: int
    hidden_size: int
    layers: int | None
    """None where the config does not say."""

    @property
    def shape(self) -> tuple[int, int]:
        """N and K."""
        return self.num_experts, self.hidden_size


def read_gate(path: Path) -> GateConfig:
    """The gate of the model whose config.json, or its folder, this is.

    Raises:
        ConfigError: there is no such file, or it does not say.
    """
    file = path / "config.json" if path.is_dir() else path
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{file} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise ConfigError(f"{file} is not JSON: {error}") from error
    whole = config if isinstance(config, dict) else {}
    for part in (whole, whole.get("text_config")):
        if isinstance(part, dict):
            num_experts = next((part[name] for name in _NUM_EXPERTS if part.get(name)), None)
            hidden_size, layers = part.get("hidden_size"), part.get("num_hidden_layers")
            if isinstance(num_experts, int) and isinstance(hidden_size, int):
                if isinstance(layers, int):
                    layers -= part.get("first_k_dense_replace") or 0  # these have no experts
                return GateConfig(num_experts, hidden_size, layers)
    raise ConfigError(
        f"{file} has no {', '.join(_NUM_EXPERTS[:-1])} or {_NUM_EXPERTS[-1]} beside "
        "hidden_size: must be the config.json of an MoE model"
    )
