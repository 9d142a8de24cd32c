"""SGLang's real server on models of a given shape, for the run_dsv3_*.py beside this."""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from datetime import datetime, timezone
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import _setup  # noqa: F401
import requests
import torch
from router_gemm_benchmark.report import driver_version, versions
from router_gemm_benchmark.timing import DEEPSEEK_V3_DENSE_LAYERS, DEEPSEEK_V3_LAYERS

from sglang.srt.layers.moe_router.backends import BACKENDS
from sglang.srt.layers.moe_router.models import DEEPSEEK_V3

SPREAD = Path(__file__).with_name("serve_spread.py")
"""What starts a server whose tokens go to all experts."""

VOCAB_SIZE = 8192
TP_SIZE = 8
STARTUP_TIMEOUT_S = 420
REQUEST_TIMEOUT_S = 120


def argument_parser(
    description: str, backend: str, num_layers: int | None
) -> argparse.ArgumentParser:
    """The options that every script has, with its own defaults.

    Args:
        description: the script's docstring, of which the first line is shown.
        num_layers: None for as many as fit.
    """
    parser = argparse.ArgumentParser(description=description.split("\n", 1)[0])
    parser.add_argument("--output-dir", type=Path, default=Path("results"))
    parser.add_argument("--backend", default=backend, help="compared with off")
    parser.add_argument(
        "--num-layers",
        type=int,
        default=num_layers,
        help=f"dense ones come first (default: {num_layers or 'as many as fit'})",
    )
    parser.add_argument("--port", type=int, default=30000)
    parser.add_argument("server_options", nargs="*", help="for SGLang's server, after --")
    return parser


def parse_arguments(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """Parses, ends with exit 2 where there is no GPU, and makes the output folder."""
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("no CUDA device: SGLang's server needs a GPU")
    arguments.output_dir.mkdir(parents=True, exist_ok=True)
    return arguments


def graph_options(batch_sizes: Sequence[int]) -> list[str]:
    """Captures these batch sizes, in ascending order, and serves no larger one."""
    from sglang.srt.server_args import ServerArgs

    sizes = list(map(str, batch_sizes))
    options = argparse.ArgumentParser()
    ServerArgs.add_cli_args(options)
    decode = "--cuda-graph-bs-decode"  # of later releases
    captured = decode if decode in options.format_help() else "--cuda-graph-bs"
    return [captured, *sizes, "--max-running-requests", sizes[-1]]


# What every config.json here has.
COMMON: Mapping[str, Any] = MappingProxyType(
    {
        "torch_dtype": "bfloat16",
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": False,
        "bos_token_id": 0,
        "eos_token_id": 1,
    }
)


def deepseek_v3_config(num_layers: int) -> dict[str, Any]:
    """config.json of a model that routes as DeepSeek-V3 does and is small elsewhere."""
    return {
        **COMMON,
        "architectures": ["DeepseekV3ForCausalLM"],
        "model_type": "deepseek_v3",
        "vocab_size": VOCAB_SIZE,
        "hidden_size": DEEPSEEK_V3.hidden_size,
        "n_routed_experts": DEEPSEEK_V3.num_experts,
        "n_group": 8,
        "topk_group": 4,
        "num_experts_per_tok": 8,
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
        "norm_topk_prob": True,
        "routed_scaling_factor": 2.5,
        "n_shared_experts": 1,
        "moe_layer_freq": 1,
        "first_k_dense_replace": 1,
        "num_hidden_layers": num_layers,
        "num_nextn_predict_layers": 0,
        "intermediate_size": 2048,
        "moe_intermediate_size": 256,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "q_lora_rank": 1536,
        "kv_lora_rank": 512,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
        "rope_theta": 10000.0,
    }


def full_width_config(num_layers: int, dtype: str) -> dict[str, Any]:
    """DeepSeek-V3's config.json, but for the number of layers and the vocabulary."""
    widths = {
        "first_k_dense_replace": min(DEEPSEEK_V3_DENSE_LAYERS, num_layers - 1),
        "intermediate_size": 18432,
        "moe_intermediate_size": 2048,
        "num_attention_heads": 128,
        "num_key_value_heads": 128,
    }
    return deepseek_v3_config(num_layers) | widths | quantization(dtype)


def quantization(dtype: str) -> dict[str, Any]:
    """What DeepSeek-V3's config.json says of its FP8 weights; nothing for bf16."""
    if dtype == "bf16":
        return {}
    return {
        "quantization_config": {
            "quant_method": "fp8",
            "fmt": "e4m3",
            "activation_scheme": "dynamic",
            "weight_block_size": [128, 128],
        }
    }


class Rank(NamedTuple):
    """One of eight ranks of a model at TP 8: all its layers and experts, an eighth of each."""

    stem: str
    """What the names of its files start with."""
    config: dict[str, Any]
    """Its config.json."""
    remark: str = ""
    """What is no eighth."""

    @property
    def num_layers(self) -> int:
        return int(self.config["num_hidden_layers"])

    @property
    def num_moe_layers(self) -> int:
        return self.num_layers - int(self.config.get("first_k_dense_replace", 0))


# 1536 / 8 is 192, and with FP8 blocks SGLang refuses experts of no multiple of 128: MiniMax-M2's
# and Qwen3-235B-A22B's own FP8 files as well, at TP 8 without expert parallelism.
EXPERT_WIDTH = 256
WIDER_EXPERTS = f"Experts {EXPERT_WIDTH} wide instead of 192: FP8 blocks are 128 wide."

# The parameters of SGLang 0.5.23's own modules are 85.1, 58.7, 38.3 and 39.2 GB.
TP8_RANKS: Mapping[str, Rank] = MappingProxyType(
    {
        DEEPSEEK_V3.name: Rank(
            "dsv3",
            deepseek_v3_config(DEEPSEEK_V3_LAYERS)
            | {
                "first_k_dense_replace": DEEPSEEK_V3_DENSE_LAYERS,
                "intermediate_size": 18432 // TP_SIZE,
                "moe_intermediate_size": 2048 // TP_SIZE,
                "num_attention_heads": 128 // TP_SIZE,
                "num_key_value_heads": 128 // TP_SIZE,
                "vocab_size": 129280 // TP_SIZE,
            }
            | quantization("fp8"),
        ),
        # zai-org/GLM-4.5, as Megatron-Bridge's docs/models/llm/glm45.md has it; what that leaves
        # out is of transformers' Glm4MoeConfig.
        "GLM-4.5": Rank(
            "glm45",
            {
                **COMMON,
                "architectures": ["Glm4MoeForCausalLM"],
                "model_type": "glm4_moe",
                "vocab_size": 151552 // TP_SIZE,
                "hidden_size": 5120,
                "n_routed_experts": 160,
                "n_group": 1,
                "topk_group": 1,
                "num_experts_per_tok": 8,
                "norm_topk_prob": True,
                "routed_scaling_factor": 2.5,
                "n_shared_experts": 1,
                "first_k_dense_replace": 3,
                "num_hidden_layers": 92,
                "num_nextn_predict_layers": 0,
                "intermediate_size": 12288 // TP_SIZE,
                "moe_intermediate_size": EXPERT_WIDTH,
                "num_attention_heads": 96 // TP_SIZE,
                "num_key_value_heads": 8 // TP_SIZE,
                "head_dim": 128,
                "attention_bias": True,
                "use_qk_norm": True,
                "partial_rotary_factor": 0.5,
                "rope_theta": 1e6,
                "rms_norm_eps": 1e-5,
                **quantization("fp8"),
            },
            WIDER_EXPERTS,
        ),
        # MiniMaxAI/MiniMax-M2: the widths are the defaults of transformers' MiniMaxM2Config;
        # SGLang's minimax_m2.py names the rest.
        "MiniMax-M2": Rank(
            "minimax_m2",
            {
                **COMMON,
                "architectures": ["MiniMaxM2ForCausalLM"],
                "model_type": "minimax_m2",
                "vocab_size": 200064 // TP_SIZE,
                "hidden_size": 3072,
                "num_local_experts": 256,
                "num_experts_per_tok": 8,
                "scoring_func": "sigmoid",
                "use_routing_bias": True,
                "num_hidden_layers": 62,
                "intermediate_size": EXPERT_WIDTH,
                "num_attention_heads": 48 // TP_SIZE,
                "num_key_value_heads": 8 // TP_SIZE,
                "head_dim": 128,
                "use_qk_norm": True,
                "qk_norm_type": "per_layer",
                "rotary_dim": 64,
                "rope_theta": 5e6,
                **quantization("fp8"),
            },
            WIDER_EXPERTS,
        ),
        # Qwen/Qwen3-235B-A22B, as slime's scripts/models/qwen3-235B-A22B.sh has it. At TP 8 two
        # ranks hold the same one of its four KV heads.
        "Qwen3-235B": Rank(
            "qwen3_235b",
            {
                **COMMON,
                "architectures": ["Qwen3MoeForCausalLM"],
                "model_type": "qwen3_moe",
                "vocab_size": 151936 // TP_SIZE,
                "hidden_size": 4096,
                "num_experts": 128,
                "num_experts_per_tok": 8,
                "norm_topk_prob": True,
                "decoder_sparse_step": 1,
                "mlp_only_layers": [],
                "num_hidden_layers": 94,
                "intermediate_size": 12288 // TP_SIZE,
                "moe_intermediate_size": EXPERT_WIDTH,
                "num_attention_heads": 64 // TP_SIZE,
                "num_key_value_heads": 1,
                "head_dim": 128,
                "attention_bias": False,
                "rope_theta": 1e6,
                **quantization("fp8"),
            },
            WIDER_EXPERTS,
        ),
    }
)


def request(prompts: Sequence[list[int]], new_tokens: int) -> dict[str, Any]:
    return {
        "input_ids": list(prompts),
        "sampling_params": {"temperature": 0, "max_new_tokens": new_tokens, "ignore_eos": True},
    }


class Server:
    """One run of `python -m sglang.launch_server`."""

    def __init__(
        self,
        model: Path,
        log: Path,
        port: int,
        backend: str,
        extra: list[str],
        variables: Mapping[str, str] = MappingProxyType({}),
        launcher: Sequence[str] = ("-m", "sglang.launch_server"),
    ) -> None:
        self.url = f"http://127.0.0.1:{port}"
        self.log = log
        self.backend = backend
        command = [sys.executable, *launcher]
        command += ["--model-path", str(model), "--port", str(port), "--load-format", "dummy"]
        if not (model / "tokenizer.json").exists():
            command.append("--skip-tokenizer-init")
        command += ["--attention-backend", "triton"]
        command += ["--sampling-backend", "pytorch", "--grammar-backend", "none"]
        command += ["--mem-fraction-static", "0.5", "--disable-radix-cache", *extra]
        self.command = command
        self._process = subprocess.Popen(
            command,
            env=os.environ | {"SGLANG_ROUTER_GEMM_BACKEND": backend} | dict(variables),
            stdout=log.open("w"),
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    @property
    def shown_command(self) -> str:
        """The command, without the paths of this machine."""
        command = ["python3", *self.command[1:]]
        command[command.index("--model-path") + 1] = "MODEL"
        return " ".join(command).replace(str(SPREAD), f"benchmark/server/{SPREAD.name}")

    def wait(self, timeout_s: float = STARTUP_TIMEOUT_S) -> float:
        """Seconds until it is healthy."""
        started = time.monotonic()
        while time.monotonic() - started < timeout_s:
            if self._process.poll() is not None:
                break
            with suppress(requests.RequestException):
                if requests.get(f"{self.url}/health", timeout=5).ok:
                    return time.monotonic() - started
            time.sleep(1)
        raise RuntimeError(f"the server did not come up:\n{self.log.read_text()[-4000:]}")

    def generate(self, prompts: Sequence[list[int]], new_tokens: int) -> list[list[int]]:
        """The tokens after each prompt, greedily; one request, so they decode in lockstep."""
        response = requests.post(
            f"{self.url}/generate", json=request(prompts, new_tokens), timeout=REQUEST_TIMEOUT_S
        )
        response.raise_for_status()
        tokens = [each["output_ids"] for each in response.json()]
        if [len(each) for each in tokens] != [new_tokens] * len(prompts):
            raise RuntimeError(f"{len(prompts)} prompts came back as {list(map(len, tokens))}")
        return tokens

    def abandon(self, prompt: list[int], new_tokens: int, chunks: int) -> None:
        """Reads `chunks` pieces of a streamed answer and hangs up, which aborts the request."""
        body = request([prompt], new_tokens) | {"stream": True}
        with requests.post(
            f"{self.url}/generate", json=body, stream=True, timeout=REQUEST_TIMEOUT_S
        ) as response:
            response.raise_for_status()
            for number, _ in enumerate(response.iter_lines(), 1):
                if number >= chunks:
                    return

    def stop(self) -> None:
        os.killpg(self._process.pid, signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(30)
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()


@contextmanager
def running(*args: Any, **kwargs: Any) -> Iterator[Server]:
    server = Server(*args, **kwargs)
    try:
        yield server
    finally:
        server.stop()


@contextmanager
def side_by_side(
    config: dict[str, Any], backends: Sequence[str], logs: Path, port: int, extra: list[str]
) -> Iterator[list[Server]]:
    """A server for each backend, all on one GPU at once and up."""
    # Little for the cache, and what is left to the others.
    extra = ["--max-total-tokens", "65536", "--mem-fraction-static", "0.9", *extra]
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        (Path(folder) / "config.json").write_text(json.dumps(config, indent=2))
        servers = []
        for index, backend in enumerate(backends):
            log = logs / f"server_{index}_{backend}.log"
            arguments = (Path(folder), log, port + 1000 * index, backend, extra)
            servers.append(stack.enter_context(running(*arguments)))
        with ThreadPoolExecutor() as pool:
            startup = list(pool.map(Server.wait, servers))
        print(f"up after {max(startup):.0f} s", flush=True)
        yield servers


def patch_taken(log: str) -> bool:
    """Whether a server's log says that a kernel takes the gate's place for some M."""
    return re.search(rf"M [\d+-]+ ({'|'.join(BACKENDS)})\b", log) is not None


def prompts(count: int, seed: int, lengths: range = range(1, 65)) -> list[list[int]]:
    source = random.Random(seed)
    return [
        [source.randrange(2, VOCAB_SIZE) for _ in range(source.choice(lengths))]
        for _ in range(count)
    ]


def environment() -> dict[str, str]:
    """Where and when, with which versions, and the call of this script."""
    found = {"GPU": torch.cuda.get_device_name(0), "driver": driver_version() or "unknown"}
    found |= {name: has or "not installed" for name, has in versions().items()}
    found["torch"] = torch.__version__  # with the CUDA that it was built for
    found["Python"] = platform.python_version()
    found["date"] = datetime.now(timezone.utc).strftime("%Y-%m-%d")
    found["taken with"] = script_call(sys.argv)
    return found


def script_call(argv: Sequence[str]) -> str:
    """How the script was called, as from the root of this repository, but for --output-dir."""
    options = iter(argv[1:])
    kept = []
    for option in options:
        if option == "--output-dir":
            next(options, None)
        elif not option.startswith("--output-dir="):
            kept.append(option)
    return shlex.join(["python3", f"benchmark/server/{Path(argv[0]).name}", *kept])
