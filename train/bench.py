"""How fast is a training step, and an expert layer, beside Hugging Face's on this machine?

    python -m train.bench step [--config configs/quickstart.yaml]
    python -m train.bench experts

`step`: our model against `OlmoeForCausalLM` of the same shape (float32 weights, bfloat16 by
`torch.autocast` or float32, fused AdamW, clipping at 1, no balancing loss, the same batch), in one
process and in turns. Hugging Face runs with its default experts and attention, with our allocator
setting and, in a process of its own, without; its faster time counts. Beside it stands the
arithmetic limit: 6 * active parameters * tokens over the measured matmul rate.
`experts`: one layer, forward and backward, against a dense layer of equal FLOPs and Hugging Face's.
Needs the `evaluation` extra (transformers).
"""

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from kernels.bench import matmul_rate, seconds_of
from kernels.dispatch import plan_dispatch
from kernels.launch import tune_allocator
from kernels.swiglu_experts import swiglu_experts
from kernels.swiglu_experts_benchmark import CPU_SHAPES
from moe.config import ModelConfig
from moe.model import MoETransformer, init_weights, num_parameters
from train.config import RunConfig, load_config
from train.errors import ConfigError
from train.pretrain import with_vocab_size
from train.program import guarded

Step = Callable[[], object]
WARM_UP = 5


def main(argv: list[str] | None = None) -> int:
    """Run one of the two benchmarks; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m train.bench", description=__doc__)
    parser.add_argument("what", choices=("step", "experts"))
    parser.add_argument("--config", default="configs/quickstart.yaml")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--default-allocator", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)

    def program() -> int:
        for name in ("repeats", "threads"):
            if getattr(options, name) < 1:
                raise ConfigError(f"--{name} ({getattr(options, name)}) must be at least 1")
        torch.set_num_threads(options.threads)
        transformers()
        if options.what == "experts":
            tune_allocator()
            print(experts_report(options.repeats))
            return 0
        config = load_config(options.config)
        if options.default_allocator:
            seconds = {}
            for precision in ("bfloat16", "float32"):
                times = time_steps(config, precision, options.repeats, ours=False)
                seconds[precision] = statistics.median(times["hf"])
            print(json.dumps(seconds))
            return 0
        tune_allocator()
        print(step_report(config, options))
        return 0

    return guarded(program)


def transformers() -> Any:
    """The library, or a line that says how to get it."""
    try:
        import transformers as library
    except ImportError as error:
        raise ConfigError(
            "this benchmark needs Hugging Face's transformers: pip install -e '.[evaluation]'"
        ) from error
    library.logging.set_verbosity_error()
    return library


# ---- the training step


def bench_model(config: RunConfig) -> ModelConfig:
    """The config's model with what OLMoE also has: projection norms, plain softmax weights."""
    model = with_vocab_size(config.model, config.tokenizer.vocab_size)
    attention = model.attention.model_copy(update={"qk_norm": "projection"})
    router = model.moe.router.model_copy(update={"normalize": False})
    moe = model.moe.model_copy(update={"losses": (), "router": router})
    return model.model_copy(update={"attention": attention, "moe": moe})


def hf_model(model: ModelConfig, seq_len: int) -> Any:
    """OlmoeForCausalLM of the same shape, with its default experts and attention."""
    library = transformers()
    torch.manual_seed(0)
    return library.OlmoeForCausalLM(
        library.OlmoeConfig(
            vocab_size=model.vocab_size,
            hidden_size=model.hidden_size,
            intermediate_size=model.moe.intermediate_size,
            num_hidden_layers=model.num_layers,
            num_attention_heads=model.attention.num_heads,
            num_key_value_heads=model.num_kv_heads,
            num_experts=model.moe.num_experts,
            num_experts_per_tok=model.top_k,
            norm_topk_prob=False,
            rms_norm_eps=model.norm_eps,
            max_position_embeddings=seq_len,
            tie_word_embeddings=model.tie_embeddings,
            use_cache=False,
            pad_token_id=None,
            bos_token_id=None,
            eos_token_id=None,
        )
    )


def training_step(model: torch.nn.Module, loss: Callable[[], Tensor], precision: str) -> Step:
    """One whole step: forward, backward, clipping at 1, fused AdamW."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16"):
            value = loss()
        value.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def time_steps(
    config: RunConfig, precision: str, repeats: int, *, ours: bool = True
) -> dict[str, list[float]]:
    """Seconds of alternating steps, after WARM_UP of each."""
    shape = bench_model(config)
    assert shape.vocab_size is not None
    size = (config.micro_batch_size, config.training.seq_len + 1)
    tokens = torch.randint(0, shape.vocab_size, size, generator=torch.Generator().manual_seed(0))
    inputs, labels = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
    contestants: dict[str, Step] = {}
    if ours:
        model = MoETransformer(shape)
        init_weights(model, 0)
        contestants["ours"] = training_step(model, lambda: model(inputs, labels).loss, precision)
    theirs = hf_model(shape, config.training.seq_len)
    # Hugging Face shifts the labels itself, so it is given the inputs twice.
    contestants["hf"] = training_step(
        theirs, lambda: theirs(input_ids=inputs, labels=inputs).loss, precision
    )
    for step in contestants.values():
        for _ in range(WARM_UP):
            step()
    return seconds_of(contestants, repeats)


def step_report(config: RunConfig, options: argparse.Namespace) -> str:
    """A Markdown table of both precisions."""
    shape = bench_model(config)
    with torch.device("meta"):
        active = num_parameters(MoETransformer(shape)).active
    tokens = config.micro_batch_size * config.training.seq_len
    command = [sys.executable, "-m", "train.bench", "step", "--default-allocator"]
    command += ["--config", options.config, "--repeats", str(options.repeats)]
    command += ["--threads", str(options.threads)]
    plain = subprocess.run(command, capture_output=True, text=True, check=True)
    default_allocator = json.loads(plain.stdout.splitlines()[-1])
    lines = [
        f"One training step of {tokens:,} tokens: {shape.num_layers} layers, "
        f"D {shape.hidden_size}, F {shape.moe.intermediate_size}, {shape.moe.num_experts} experts, "
        f"top-{shape.top_k}, vocabulary {shape.vocab_size:,}. {options.threads} threads, medians "
        f"of {options.repeats} alternating steps, torch {torch.__version__}, transformers "
        f"{transformers().__version__}.",
        "",
        "| precision | ours | Hugging Face | HF, default allocator | ours / faster HF | "
        "arithmetic limit | share of it reached |",
        "|---|---|---|---|---|---|---|",
    ]
    for precision in ("bfloat16", "float32"):
        times = time_steps(config, precision, options.repeats)
        ours, hf = (statistics.median(times[name]) for name in ("ours", "hf"))
        plain_hf = default_allocator[precision]
        limit = 6 * active * tokens / matmul_rate(getattr(torch, precision), "cpu")
        lines.append(
            f"| {precision} | {ours * 1e3:.0f} ms | {hf * 1e3:.0f} ms | {plain_hf * 1e3:.0f} ms | "
            f"**{ours / min(hf, plain_hf):.2f}** | {limit * 1e3:.0f} ms | {limit / ours:.0%} |"
        )
    return "\n".join(lines)


# ---- the expert layer


def experts_report(repeats: int) -> str:
    """A Markdown table over the shapes of `kernels.swiglu_experts` in both precisions."""
    lines = [
        "Expert layer, forward and backward with all weight gradients, ms (times the dense layer "
        f"of equal FLOPs); {torch.get_num_threads()} threads, medians of {repeats} in turns",
        "",
        "| T, D, F, E, K | precision | dense | ours | Hugging Face (default) | ours / HF |",
        "|---|---|---|---|---|---|",
    ]
    for shape in CPU_SHAPES[""]:
        for precision in ("float32", "bfloat16"):
            times = seconds_of(layer_contestants(shape, precision), repeats)
            dense, ours, hf = (
                statistics.median(times[name]) * 1e3 for name in ("dense", "ours", "hf")
            )
            lines.append(
                f"| {', '.join(str(size) for size in shape)} | {precision} | {dense:.0f} | "
                f"{ours:.0f} ({ours / dense:.2f}) | {hf:.0f} ({hf / dense:.2f}) | {ours / hf:.2f} |"
            )
    return "\n".join(lines)


def layer_contestants(shape: tuple[int, int, int, int, int], precision: str) -> dict[str, Step]:
    """Ours, Hugging Face's default experts, and the dense layer, on the same tokens and routing."""
    num_tokens, hidden, inner, num_experts, top_k = shape
    library = transformers()
    from transformers.models.olmoe.modeling_olmoe import OlmoeExperts

    dtype = getattr(torch, precision)
    torch.manual_seed(0)

    def weight(*size: int) -> Tensor:
        return (torch.randn(*size) * hidden**-0.5).to(dtype).requires_grad_()

    x, grad = torch.randn(2, num_tokens, hidden).to(dtype)
    x.requires_grad_()
    indices = torch.rand(num_tokens, num_experts).argsort(1)[:, :top_k]
    combine = torch.rand(num_tokens, top_k).requires_grad_()
    w1, w3 = weight(num_experts, inner, hidden), weight(num_experts, inner, hidden)
    w2 = weight(num_experts, hidden, inner)
    d1, d3 = weight(top_k * inner, hidden), weight(top_k * inner, hidden)
    d2 = weight(hidden, top_k * inner)
    settings = library.OlmoeConfig(
        hidden_size=hidden,
        intermediate_size=inner,
        num_experts=num_experts,
        num_experts_per_tok=top_k,
        num_attention_heads=4,
    )
    # What `from_config` sets: the implementation that this version takes by default.
    settings._experts_implementation = default_experts_implementation(settings)
    hf = OlmoeExperts(settings)
    with torch.no_grad():
        hf.gate_up_proj.copy_(torch.cat([w1, w3], 1))
        hf.down_proj.copy_(w2)
    hf = hf.to(dtype)
    hf_leaves = (x, hf.gate_up_proj, hf.down_proj, combine)

    def ours() -> None:
        out = swiglu_experts(x, w1, w2, w3, plan_dispatch(indices, num_experts), combine)
        torch.autograd.grad(out, (x, w1, w2, w3, combine), grad)

    def hugging_face() -> None:
        torch.autograd.grad(hf(x, indices, combine.to(dtype)), hf_leaves, grad)

    def dense() -> None:
        functional = torch.nn.functional
        gate, up = functional.linear(x, d1), functional.linear(x, d3)
        out = functional.linear(functional.silu(gate) * up, d2)
        torch.autograd.grad(out, (x, d1, d2, d3), grad)

    return {"dense": dense, "ours": ours, "hf": hugging_face}


def default_experts_implementation(settings: Any) -> str:
    """The name of the experts' implementation that a model of this config gets by default."""
    tiny = settings.__class__(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_experts=2,
        num_experts_per_tok=1,
        pad_token_id=None,
        bos_token_id=None,
        eos_token_id=None,
    )
    model = transformers().OlmoeForCausalLM(tiny)
    return model.config._experts_implementation


if __name__ == "__main__":
    sys.exit(main())
