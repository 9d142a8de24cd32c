"""The router of MoE models: from the gate's hidden_states to the ids and weights of its experts.

    models.py    the table of models, and what `auto` takes for each
    environ.py   the two environment variables
    kernel.py    what a kernel is loaded for, and how it is called
    backends.py  the backends, a record each: rule, load, run, what to install
    plan.py      the decision, once a gate; what a call still has to ask
    ops.py       the custom ops, safe under torch.compile
    ranks.py     the ranks of a model take the same backend, or none
    twin.py      a kernel against the forward that it replaces
    isolation.py a load meets nothing of its caller's
    jit.py       nvcc: finding it, compiling, the cache
    packages.py  what is installed, in which version
    route.py     the routing behind the gate: its decision, plan and calls

A call goes one way: gate (sglang/srt/models/deepseek_v2_gate.py), plan, op or kernel; then
SGLang's top-k, the layer's route plan, kernel. Our own kernels are
`csrc/cluster_router_gemm.cuh` and `csrc/cluster_route.cuh`; files of their names here are their
Python.
"""
