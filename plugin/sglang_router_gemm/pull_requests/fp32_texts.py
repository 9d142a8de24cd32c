"""What `--pr fp32` writes for what `--pr gate` wrote: an old text, and the new one."""

from __future__ import annotations

UTILS = (
    (
        "    if not _is_cuda or _device_sm != 90 or weight_dtype != torch.bfloat16:\n",
        "    if not _is_cuda or _device_sm != 90:\n",
    ),
    (
        "    return NUM_TOKENS.get((num_experts, hidden_size), (1, 0))\n",
        "    return NUM_TOKENS.get((num_experts, hidden_size, weight_dtype), (1, 0))\n",
    ),
)

HELPER = '''\
def try_cluster_router_gemm(
    hidden_states: torch.Tensor, gate: torch.nn.Module
) -> Optional[torch.Tensor]:
    """The fp32 logits of a gate with an fp32 weight, by the cluster GEMM, which reads
    hidden_states in bf16. None where it does not serve the call: the gate must.
    """
    weight = getattr(gate, "weight", None)
    if (
        weight is None
        or weight.dtype != torch.float32
        or hidden_states.dtype != torch.bfloat16
        or not hidden_states.is_cuda
        or hidden_states.dim() != 2
        or not hidden_states.is_contiguous()
        # LoRA's layers and a bias add to the product.
        or hasattr(gate, "base_layer")
        or getattr(gate, "bias", None) is not None
    ):
        return None
    fewest, most = cluster_router_gemm_tokens(
        num_experts=weight.shape[0],
        hidden_size=weight.shape[1],
        weight_dtype=weight.dtype,
    )
    if not fewest <= hidden_states.shape[0] <= most:
        return None
    if get_exec().deterministic.enable_deterministic_inference:
        return None

    from sglang.kernels.ops.gemm.cluster_router_gemm import cluster_router_gemm

    return cluster_router_gemm(hidden_states, weight)
'''

OP = (
    (
        """\
Router GEMM of an MoE gate on Hopper: bf16 ``x[m, k] @ w[n, k].T`` in fp32.
""",
        """\
Router GEMM of an MoE gate on Hopper: ``x[m, k] @ w[n, k].T`` in fp32, of bf16
``x`` and bf16 or fp32 ``w``.
""",
    ),
    (
        """\
# num_experts and hidden_size of a gate: the fewest and the most num_tokens for which
# the kernel was measured to be faster than what the gate ran before, on SM90.
NUM_TOKENS: dict[tuple[int, int], tuple[int, int]] = {
""",
        """\
# num_experts, hidden_size and the weight's dtype of a gate: the fewest and the most
# num_tokens for which the kernel was measured to be faster than what the gate ran
# before, on SM90.
NUM_TOKENS: dict[tuple[int, int, torch.dtype], tuple[int, int]] = {
""",
    ),
    (
        """\
def _jit_cluster_router_gemm_module(num_experts: int, hidden_size: int) -> Module:
    args = make_cpp_args(num_experts, hidden_size, is_arch_support_pdl())
""",
        """\
def _jit_cluster_router_gemm_module(
    num_experts: int, hidden_size: int, weight_dtype: torch.dtype
) -> Module:
    if weight_dtype not in (torch.bfloat16, torch.float32):
        raise ValueError(f"weight is {weight_dtype}, must be bf16 or fp32")
    args = make_cpp_args(num_experts, hidden_size, is_arch_support_pdl(), weight_dtype)
""",
    ),
    (
        """\
    _jit_cluster_router_gemm_module(*weight.shape).run(hidden_states, weight, logits)
""",
        """\
    module = _jit_cluster_router_gemm_module(*weight.shape, weight.dtype)
    module.run(hidden_states, weight, logits)
""",
    ),
    (
        """\
    :param weight: Shape [num_experts, hidden_size], bf16, contiguous. num_experts must
        be a multiple of 16, hidden_size of 64.
""",
        """\
    :param weight: Shape [num_experts, hidden_size], bf16 or fp32, contiguous.
        num_experts must be a multiple of 16, hidden_size of 64. All 24 bits of an fp32
        weight count.
""",
    ),
)

BENCHMARK = (
    (
        '"""The cluster router GEMM against what MoEGate runs without it, in CUDA graphs."""\n',
        '"""The cluster router GEMM against what the gates run without it, in CUDA graphs."""\n',
    ),
    (
        "from sglang.kernels.ops.gemm.tiny_gemm import tiny_gemm_bf16\n",
        "from sglang.kernels.ops.gemm.tiny_gemm import can_use_tiny_gemm, tiny_gemm_bf16\n",
    ),
    (
        """\
KERNELS = {
    "cluster": cluster_router_gemm,
    "tiny_gemm": tiny_gemm,
    "cublas": linear_bf16_fp32,
}
""",
        """\
def cublas_tf32(hidden_states: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    \"\"\"What enable_tf32_matmul makes of fp32 weights: GLM-4.5 and MiniMax-M2 set it.\"\"\"
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        return linear_bf16_fp32(hidden_states, weight)
    finally:
        torch.set_float32_matmul_precision(before)


# No gate calls tiny_gemm with an fp32 weight, though it takes one.
KERNELS = {
    "cluster": cluster_router_gemm,
    "tiny_gemm": tiny_gemm,
    "cublas": linear_bf16_fp32,
    "cublas_tf32": cublas_tf32,
}
""",
    ),
    (
        """\
@marker.parametrize(
    "num_experts,hidden_size", sorted(NUM_TOKENS), ci_vals=[(256, 7168)]
)
""",
        """\
@marker.parametrize(
    "num_experts,hidden_size,weight_dtype",
    sorted(NUM_TOKENS, key=str),
    ci_vals=[(256, 7168, torch.bfloat16), (160, 5120, torch.float32)],
)
""",
    ),
    (
        """\
def benchmark(
    num_experts: int, hidden_size: int, num_tokens: int, kernel: str
) -> marker.BenchResult:
""",
        """\
def benchmark(
    num_experts: int,
    hidden_size: int,
    weight_dtype: torch.dtype,
    num_tokens: int,
    kernel: str,
) -> marker.BenchResult:
""",
    ),
    (
        """\
    if kernel == "tiny_gemm" and num_tokens > MAX_M_TINY:
        marker.skip(f"at most {MAX_M_TINY} tokens")
""",
        """\
    if kernel == "tiny_gemm" and num_tokens > MAX_M_TINY:
        marker.skip(f"at most {MAX_M_TINY} tokens")
    if kernel == "tiny_gemm" and not can_use_tiny_gemm(num_experts, hidden_size):
        marker.skip("a shape that tiny_gemm does not take")
    if kernel == "cublas_tf32" and weight_dtype != torch.float32:
        marker.skip("fp32 weights alone")
""",
    ),
    (
        """\
            create_random(num_experts, hidden_size),
""",
        """\
            create_random(num_experts, hidden_size, dtype=weight_dtype),
""",
    ),
)

TESTS = (
    (
        '"""The cluster router GEMM against fp64, and MoEGate, which calls it."""\n',
        '"""The cluster router GEMM against fp64, and the gates that call it."""\n',
    ),
    ("register_cuda_ci(est_time=180,", "register_cuda_ci(est_time=400,"),
    ("SHAPES = sorted(NUM_TOKENS)\n", "GATES = sorted(NUM_TOKENS, key=str)\n"),
    (
        """\
def operands(
    num_tokens: int, num_experts: int = 256, hidden_size: int = 7168, seed: int = 0
) -> Operands:
    generator = torch.Generator("cuda").manual_seed(seed)
    weight, hidden_states = (
        torch.randn(rows, hidden_size, device="cuda", generator=generator).bfloat16()
        for rows in (num_experts, num_tokens)
    )
    return hidden_states, weight
""",
        """\
def operands(
    num_tokens: int,
    num_experts: int = 256,
    hidden_size: int = 7168,
    weight_dtype: torch.dtype = torch.bfloat16,
    seed: int = 0,
) -> Operands:
    generator = torch.Generator("cuda").manual_seed(seed)
    weight, hidden_states = (
        torch.randn(rows, hidden_size, device="cuda", generator=generator)
        for rows in (num_experts, num_tokens)
    )
    return hidden_states.bfloat16(), weight.to(weight_dtype)
""",
    ),
    (
        """\
@pytest.mark.parametrize("num_experts,hidden_size", SHAPES)
def test_like_fp64_and_batch_invariant(num_experts: int, hidden_size: int) -> None:
    hidden_states, weight = operands(128, num_experts, hidden_size)
""",
        """\
@pytest.mark.parametrize("num_experts,hidden_size,weight_dtype", GATES)
def test_like_fp64_and_batch_invariant(
    num_experts: int, hidden_size: int, weight_dtype: torch.dtype
) -> None:
    hidden_states, weight = operands(128, num_experts, hidden_size, weight_dtype)
""",
    ),
    (
        """\
@pytest.mark.parametrize("num_experts,hidden_size", [(16, 64), (48, 192), (288, 1088)])
def test_shapes_with_few_or_uneven_chunks(num_experts: int, hidden_size: int) -> None:
    for num_tokens in EDGES:
        hidden_states, weight = operands(num_tokens, num_experts, hidden_size)
""",
        """\
@pytest.mark.parametrize("weight_dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("num_experts,hidden_size", [(16, 64), (48, 192), (288, 1088)])
def test_shapes_with_few_or_uneven_chunks(
    num_experts: int, hidden_size: int, weight_dtype: torch.dtype
) -> None:
    for num_tokens in EDGES:
        hidden_states, weight = operands(
            num_tokens, num_experts, hidden_size, weight_dtype
        )
""",
    ),
    (
        """\
@pytest.mark.parametrize("special", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_in_its_row(special: float) -> None:
    hidden_states, weight = operands(16)
""",
        """\
@pytest.mark.parametrize("num_tokens", EDGES)
def test_all_bits_of_an_fp32_weight_count(num_tokens: int) -> None:
    \"\"\"A one among zeros picks a weight, which is a logit as it is.\"\"\"
    weight = operands(0, 160, 5120, torch.float32)[1]
    column = torch.arange(num_tokens, device="cuda") * 39 + 1
    hidden_states = torch.zeros(num_tokens, 5120, device="cuda", dtype=torch.bfloat16)
    hidden_states[torch.arange(num_tokens, device="cuda"), column] = 1
    logits = cluster_router_gemm(hidden_states, weight)
    assert torch.equal(logits, weight[:, column].t())


def test_an_infinite_fp32_weight_is_an_infinite_logit() -> None:
    hidden_states, weight = operands(8, 160, 5120, torch.float32)
    clean = cluster_router_gemm(hidden_states, weight)
    weight[3, 100] = float("inf")
    logits = cluster_router_gemm(hidden_states, weight)
    sign = hidden_states[:, 100].float().sign()
    assert torch.equal(logits[:, 3], sign * float("inf"))
    others = [expert for expert in range(160) if expert != 3]
    assert torch.equal(logits[:, others], clean[:, others])


@pytest.mark.parametrize("special", [float("nan"), float("inf")])
@pytest.mark.parametrize("weight_dtype", [torch.bfloat16, torch.float32])
def test_what_is_not_finite_stays_in_its_row(
    special: float, weight_dtype: torch.dtype
) -> None:
    hidden_states, weight = operands(16, weight_dtype=weight_dtype)
""",
    ),
    ("        lambda x, w: (x, w.float()),\n", "        lambda x, w: (x, w.half()),\n"),
    ('"fp32 weight", "K",', '"fp16 weight", "K",'),
    (
        """\
def test_in_a_cuda_graph_behind_the_kernel_that_writes_its_operand() -> None:
    \"\"\"Each link waits for the one before it, also where PDL lets it start early.\"\"\"
    sources = [operands(16, seed=seed)[0] for seed in range(8)]
    weight = operands(0)[1]
""",
        """\
@pytest.mark.parametrize("weight_dtype", [torch.bfloat16, torch.float32])
def test_in_a_cuda_graph_behind_the_kernel_that_writes_its_operand(
    weight_dtype: torch.dtype,
) -> None:
    \"\"\"Each link waits for the one before it, also where PDL lets it start early.\"\"\"
    sources = [operands(16, seed=seed)[0] for seed in range(8)]
    weight = operands(0, weight_dtype=weight_dtype)[1]
""",
    ),
    (
        """\
@torch.no_grad()
def test_under_torch_compile() -> None:
    weight = operands(0)[1]
""",
        """\
@torch.no_grad()
@pytest.mark.parametrize("weight_dtype", [torch.bfloat16, torch.float32])
def test_under_torch_compile(weight_dtype: torch.dtype) -> None:
    weight = operands(0, weight_dtype=weight_dtype)[1]
""",
    ),
    (
        """\
    @pytest.mark.parametrize("num_experts,hidden_size", SHAPES)
    def test_it_takes_it_where_it_was_measured(
        self, num_experts: int, hidden_size: int
    ) -> None:
        gate = self.gate(num_experts, hidden_size)
        fewest, most = NUM_TOKENS[num_experts, hidden_size]
""",
        """\
    @pytest.mark.parametrize(
        "num_experts,hidden_size",
        [gate[:2] for gate in GATES if gate[2] == torch.bfloat16],
    )
    def test_it_takes_it_where_it_was_measured(
        self, num_experts: int, hidden_size: int
    ) -> None:
        gate = self.gate(num_experts, hidden_size)
        fewest, most = NUM_TOKENS[num_experts, hidden_size, torch.bfloat16]
""",
    ),
    (
        """\


if __name__ == "__main__":
""",
        """\


def hy4():
    return TestMoEGate.gate(256, 2816, router_fp32=True)


def glm4():
    from sglang.srt.models.glm4_moe import Glm4MoeGate

    return Glm4MoeGate(SimpleNamespace(n_routed_experts=160, hidden_size=5120))


def mimo():
    from sglang.srt.models.mimo_v2 import MoEGate

    config = SimpleNamespace(
        n_routed_experts=256, hidden_size=4096, topk_method="greedy"
    )
    return MoEGate(config, quant_config=None)


def longcat():
    from sglang.srt.models.longcat_flash import LongcatFlashRouter

    config = SimpleNamespace(n_routed_experts=512, hidden_size=6144, router_bias=False)
    return LongcatFlashRouter(config, zero_expert_num=256)


def minimax():
    \"\"\"The block, without its experts.\"\"\"
    from sglang.srt.layers.linear import ReplicatedLinear
    from sglang.srt.models.minimax_m2 import MiniMaxM2MoE

    block = MiniMaxM2MoE.__new__(MiniMaxM2MoE)
    torch.nn.Module.__init__(block)
    block.gate = ReplicatedLinear(3072, 256, bias=False, params_dtype=torch.float32)
    block.topk = None
    block.experts = lambda hidden_states, topk_output: hidden_states
    return block


class LoRALayer(torch.nn.Module):
    \"\"\"A gate as LoRA wraps it.\"\"\"

    def __init__(self, base_layer: torch.nn.Module):
        super().__init__()
        self.base_layer, self.weight = base_layer, base_layer.weight

    def forward(self, x: torch.Tensor):
        return self.base_layer(x)


class TestFp32Gates:
    \"\"\"Which calls they leave to the kernel.\"\"\"

    BUILD = [hy4, glm4, mimo, longcat, minimax]

    @staticmethod
    @torch.no_grad()
    def build(build):
        with torch.device("cuda"):
            gate = build()
        (weight,) = [each for each in gate.parameters() if each.dim() == 2]
        weight.copy_(operands(0, *weight.shape, torch.float32)[1])
        return gate, weight

    @staticmethod
    @torch.no_grad()
    def takes_it(gate, weight, hidden_states, deterministic: bool = False) -> bool:
        from sglang.kernels.ops.gemm import cluster_router_gemm as module
        from sglang.srt.models.deepseek_common import utils

        execution = SimpleNamespace(
            deterministic=SimpleNamespace(enable_deterministic_inference=deterministic)
        )
        with (
            patch.object(utils, "get_exec", lambda: execution),
            patch.object(
                module, "cluster_router_gemm", wraps=cluster_router_gemm
            ) as called,
        ):
            if not hasattr(gate, "topk"):
                logits = gate(hidden_states)
            else:
                seen = []
                gate.topk = lambda hidden_states, router_logits: seen.append(
                    router_logits
                )
                gate.forward_normal(hidden_states)
                gate.forward_deepep(hidden_states, None)
                assert torch.equal(*seen)
                logits = seen[0]
        if called.called:
            assert_like_fp64(logits, hidden_states, weight)
        return called.called

    @pytest.mark.parametrize("build", BUILD)
    def test_they_leave_it_what_was_measured(self, build) -> None:
        gate, weight = self.build(build)
        fewest, most = NUM_TOKENS[(*weight.shape, torch.float32)]
        for num_tokens in (fewest, most, most + 1):
            hidden_states = operands(num_tokens, *weight.shape)[0]
            taken = self.takes_it(gate, weight, hidden_states)
            assert taken == (num_tokens <= most), num_tokens

    @pytest.mark.parametrize("build", BUILD)
    def test_they_keep_the_rest(self, build) -> None:
        gate, weight = self.build(build)
        num_experts, hidden_size = weight.shape
        hidden_states = operands(8, num_experts, hidden_size)[0]
        assert self.takes_it(gate, weight, hidden_states)
        assert not self.takes_it(gate, weight, hidden_states, deterministic=True)
        assert not self.takes_it(gate, weight, hidden_states.float())
        wide = operands(8, num_experts, 2 * hidden_size)[0]
        assert not self.takes_it(gate, weight, wide[:, :hidden_size])

    @pytest.mark.parametrize(
        "build,layer", [(longcat, "classifier"), (minimax, "gate")]
    )
    def test_a_gate_that_lora_wraps_computes_itself(self, build, layer: str) -> None:
        gate, weight = self.build(build)
        setattr(gate, layer, LoRALayer(getattr(gate, layer)))
        hidden_states = operands(8, *weight.shape)[0]
        assert not self.takes_it(gate, weight, hidden_states)


if __name__ == "__main__":
""",
    ),
)
