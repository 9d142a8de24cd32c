"""The router GEMM of DeepSeek-V3-class models: logits = hidden_states @ weight.T.

The data goes one way:

    gate    sglang/srt/models/deepseek_v2_gate.py   describes a call, asks the policy
    policy  policy.py                               one pure function over plain values
    op      ops.py                                  custom ops, safe under torch.compile
    kernel  kernels.py                              ours, FlashInfer's, sgl-kernel's, cuBLAS

`call.py` holds the plain values of one call and `environ.py` the two environment
variables. Our own kernel is `csrc/cluster_router_gemm.cuh`; `cluster_router_gemm.py` calls
it and `jit.py` compiles it.
"""
