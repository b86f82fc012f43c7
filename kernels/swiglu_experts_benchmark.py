"""Which shapes, routings and rivals is the fused expert layer measured with?

`python -m kernels.bench swiglu_experts`. The first shapes fit a CPU; the others are those of
published models, for a GPU. Routing is near uniform, or skewed as Zipf's law with exponent 1.5.
"""

import importlib.util
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.bench import Case, CaseBuilder, Contestant, leaf
from kernels.dispatch import permute, plan_dispatch, unpermute
from kernels.launch import has_compiler
from kernels.matmul import goes_to_onednn, linear
from kernels.swiglu_experts import swiglu_experts


class Shape(NamedTuple):
    """Tokens T, hidden D, intermediate F, experts E, top-k K."""

    tokens: int
    hidden: int
    inner: int
    experts: int
    top_k: int

    def __str__(self) -> str:
        return f"T{self.tokens} D{self.hidden} F{self.inner} E{self.experts} K{self.top_k}"


CPU_SHAPES = {
    "": (
        Shape(2048, 256, 512, 8, 2),
        Shape(4096, 256, 512, 16, 4),
        Shape(4096, 512, 1024, 8, 2),
        Shape(4096, 512, 512, 64, 8),
        Shape(8192, 256, 256, 64, 8),
    )
}
GPU_SHAPES = {
    "Qwen3-30B-A3B": tuple(Shape(t, 2048, 768, 128, 8) for t in (32768, 8192, 1024)),
    "OLMoE-1B-7B": (Shape(32768, 2048, 1024, 64, 8),),
    "SonicMoE-7B": (
        Shape(24576, 1536, 256, 128, 8),
        Shape(24576, 1536, 512, 64, 4),
        Shape(24576, 1536, 1024, 32, 2),
    ),
    "SonicMoE-30B": (
        Shape(32768, 4096, 256, 256, 16),
        Shape(32768, 4096, 512, 128, 8),
        Shape(32768, 4096, 1024, 64, 4),
    ),
    "Mixtral-8x7B": (Shape(8192, 4096, 14336, 8, 2),),
    "gpt-oss-20b": (Shape(16384, 2880, 2880, 32, 4),),
    "DeepSeek-V3": (Shape(8192, 7168, 2048, 256, 8),),
    "research": (Shape(16384, 512, 256, 64, 8),),
}
# Exponent of the skewed routing.
ZIPF = 1.5


def choose_experts(shape: Shape, routing: str, device: str) -> Tensor:
    """(T, K) distinct experts of each token; `uniform`, or `zipf` with p_i ~ i^-1.5."""
    rank = torch.arange(1, shape.experts + 1, device=device).float()
    log_p = -ZIPF * rank.log() if routing == "zipf" else torch.zeros_like(rank)
    # The K largest of log p plus Gumbel noise are K draws without replacement.
    noise = torch.rand(shape.tokens, shape.experts, device=device).clamp(min=1e-20)
    return (log_p - (-noise.log()).log()).topk(shape.top_k, dim=-1).indices


def benchmark_cases(dtype: torch.dtype, device: str) -> list[CaseBuilder]:
    """Every shape in both routings, named `MODEL SHAPE ROUTING`."""
    grid = GPU_SHAPES if device == "cuda" else CPU_SHAPES
    builders = []
    for model, shapes in grid.items():
        for shape in shapes:
            for routing in ("uniform", "zipf"):
                name = f"{model} {shape} {routing}".strip()
                build = partial(_case, name, shape, routing, dtype, device)
                builders.append(CaseBuilder(name, build))
    return builders


def _case(name: str, shape: Shape, routing: str, dtype: torch.dtype, device: str) -> Case:
    torch.manual_seed(0)
    weight = partial(leaf, std=shape.hidden**-0.5, dtype=dtype, device=device)
    x = leaf(shape.tokens, shape.hidden, dtype=dtype, device=device)
    w1, w3 = (weight(shape.experts, shape.inner, shape.hidden) for _ in range(2))
    w2 = weight(shape.experts, shape.hidden, shape.inner)
    combine = leaf(shape.tokens, shape.top_k, dtype=torch.float32, device=device)
    indices = choose_experts(shape, routing, device)
    leaves = x, w1, w2, w3, combine
    rivals = {
        "dense layer of equal FLOPs": _dense(x, shape, weight, dense_layer),
        "F.grouped_mm": Contestant(partial(_grouped, indices), leaves),
        "loop of matmuls": Contestant(partial(expert_by_expert, indices), leaves),
    }
    if goes_to_onednn(x):
        layer = partial(dense_layer, linear=linear)
        rivals["dense layer, our matmuls"] = _dense(x, shape, weight, layer)
    if has_compiler() and not x.is_cuda:
        compiled = torch.compile(dense_layer, dynamic=True)
        rivals["dense layer, torch.compile"] = _dense(x, shape, weight, compiled)
    libraries = {
        library.name: partial(library.build, leaves, indices, shape, dtype)
        for library in LIBRARIES
        if importlib.util.find_spec(library.module) and (x.is_cuda or library.runs_on_cpu)
    }

    def ours(x, w1, w2, w3, combine, backend):
        plan = plan_dispatch(indices, shape.experts, backend=backend)
        return swiglu_experts(x, w1, w2, w3, plan, combine, backend=backend)

    return Case(
        name=name,
        ours=ours,
        leaves=leaves,
        reference=partial(expert_by_expert, indices),
        rivals=rivals,
        large_rivals=libraries,
        grad=torch.randn(shape.tokens, shape.hidden, device=device).to(dtype),
        tokens=shape.tokens,
        flops=6 * shape.tokens * shape.top_k * shape.hidden * shape.inner,
        compiles=True,
    )


def expert_by_expert(
    indices: Tensor, x: Tensor, w1: Tensor, w2: Tensor, w3: Tensor, combine: Tensor
) -> Tensor:
    """The layer as the formula reads; the matrices are unbound, as indexing them under autograd
    would fill a gradient of all experts for each."""
    out = torch.zeros_like(x)
    for e, (gate, down, up) in enumerate(
        zip(w1.unbind(0), w2.unbind(0), w3.unbind(0), strict=True)
    ):
        token, slot = (indices == e).nonzero(as_tuple=True)
        rows = x[token]
        y = (F.silu(rows @ gate.T) * (rows @ up.T)) @ down.T
        out = out.index_add(0, token, y * combine[token, slot].unsqueeze(-1).to(y.dtype))
    return out


def _grouped(
    indices: Tensor, x: Tensor, w1: Tensor, w2: Tensor, w3: Tensor, combine: Tensor
) -> Tensor:
    plan = plan_dispatch(indices, w1.shape[0])
    ends = plan.expert_offsets[1:].to(torch.int32)
    rows = permute(x, plan)
    gate, up = (F.grouped_mm(rows, w.transpose(1, 2), offs=ends) for w in (w1, w3))
    y = F.grouped_mm(F.silu(gate) * up, w2.transpose(1, 2), offs=ends)
    return unpermute(y, plan, combine)


def dense_layer(
    x: Tensor,
    gate: Tensor,
    up: Tensor,
    down: Tensor,
    linear: Callable[[Tensor, Tensor], Tensor] = F.linear,
) -> Tensor:
    """A SwiGLU layer without experts."""
    return linear(F.silu(linear(x, gate)) * linear(x, up), down)


def _dense(
    x: Tensor, shape: Shape, weight: Callable[..., Tensor], layer: Callable[..., Tensor]
) -> Contestant:
    wide = shape.top_k * shape.inner
    gate, up = weight(wide, shape.hidden), weight(wide, shape.hidden)
    down = weight(shape.hidden, wide)
    return Contestant(layer, (x, gate, up, down), same=False)


def _hugging_face(
    leaves: tuple[Tensor, ...], indices: Tensor, shape: Shape, dtype: torch.dtype
) -> Contestant:
    """The experts of Hugging Face's OLMoE in its default implementation."""
    from transformers import OlmoeConfig, OlmoeForCausalLM
    from transformers.models.olmoe.modeling_olmoe import OlmoeExperts

    x, w1, w2, w3, combine = leaves

    def settings(**sizes: Any) -> Any:
        return OlmoeConfig(
            num_attention_heads=4,
            pad_token_id=None,
            bos_token_id=None,
            eos_token_id=None,
            **sizes,
        )

    tiny = settings(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_experts=2,
        num_experts_per_tok=1,
    )
    config = settings(
        hidden_size=shape.hidden,
        intermediate_size=shape.inner,
        num_experts=shape.experts,
        num_experts_per_tok=shape.top_k,
    )
    # What a whole model of this library version takes by default.
    config._experts_implementation = OlmoeForCausalLM(tiny).config._experts_implementation
    experts = OlmoeExperts(config).to(x.device)
    with torch.no_grad():
        experts.gate_up_proj.copy_(torch.cat([w1, w3], 1))
        experts.down_proj.copy_(w2)
    experts = experts.to(dtype)

    def layer(x: Tensor, gate_up: Tensor, down: Tensor, combine: Tensor) -> Tensor:
        return experts(x, indices, combine.to(dtype))

    return Contestant(layer, (x, experts.gate_up_proj, experts.down_proj, combine))


def _scattermoe(
    leaves: tuple[Tensor, ...], indices: Tensor, shape: Shape, dtype: torch.dtype
) -> Contestant:
    """ScatterMoE (arXiv 2403.08245), whose up-projection holds up, then gate."""
    from scattermoe.mlp import GLUMLP

    x, w1, w2, w3, combine = leaves
    experts = GLUMLP(shape.hidden, shape.inner, shape.experts, shape.top_k).to(x.device, dtype)
    with torch.no_grad():
        experts.experts.weight.copy_(torch.cat([w3, w1], 1))
        experts.output_experts.weight.copy_(w2)

    def layer(x: Tensor, up_gate: Tensor, down: Tensor, combine: Tensor) -> Tensor:
        return experts(x, combine.to(dtype), indices)

    return Contestant(layer, (x, experts.experts.weight, experts.output_experts.weight, combine))


def _liger(
    leaves: tuple[Tensor, ...], indices: Tensor, shape: Shape, dtype: torch.dtype
) -> Contestant:
    """Liger-Kernel's fused expert layer."""
    from liger_kernel.ops import LigerFusedMoEFunction

    x, w1, w2, w3, combine = leaves
    gate_up = torch.cat([w1, w3], 1).detach().requires_grad_()
    narrow = indices.to(torch.int32)

    def layer(x: Tensor, gate_up: Tensor, down: Tensor, combine: Tensor) -> Tensor:
        return LigerFusedMoEFunction.apply(x, gate_up, down, narrow, combine)

    return Contestant(layer, (x, gate_up, w2, combine))


class Library(NamedTuple):
    """The expert layer of another library, which takes part where it is installed."""

    name: str
    module: str
    build: Callable[[tuple[Tensor, ...], Tensor, Shape, torch.dtype], Contestant]
    runs_on_cpu: bool


LIBRARIES = (
    Library("Hugging Face", "transformers", _hugging_face, True),
    Library("ScatterMoE", "scattermoe", _scattermoe, False),
    Library("Liger-Kernel", "liger_kernel", _liger, False),
)
