"""How fast is a training step beside Hugging Face's on this machine?

    python -m train.bench step [--config configs/quickstart.yaml]

Our model against `OlmoeForCausalLM` of the same shape (float32 weights, bfloat16 by
`torch.autocast` or float32, fused AdamW, clipping at 1, no balancing loss, the same batch), in one
process and in turns. Hugging Face runs with its default experts and attention, with our allocator
setting and, in a process of its own, without; its faster time counts. Beside it stands the
arithmetic limit: 6 * active parameters * tokens over the measured matmul rate.
Needs the `evaluation` extra (transformers). Kernels alone: `python -m kernels.bench`.
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

from kernels.launch import tune_allocator
from kernels.machine import matmul_rate, seconds_of
from moe.config import ModelConfig
from moe.interop.olmoe import check_is_olmoe
from moe.model import MoETransformer, init_weights, num_parameters
from train.config import RunConfig, load_config
from train.errors import ConfigError
from train.program import guarded
from train.tokenizer import with_vocab_size

Step = Callable[[], object]
WARM_UP = 5


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m train.bench", description=__doc__)
    parser.add_argument("what", choices=("step",))
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


def bench_model(config: RunConfig) -> ModelConfig:
    """The config's model with what OLMoE also has: projection norms, plain softmax weights.

    Raises:
        ConfigError: if it differs from OLMoE beyond that, as with shared experts.
    """
    model = with_vocab_size(config.model, config.tokenizer.vocab_size)
    attention = model.attention.model_copy(update={"qk_norm": "projection"})
    router = model.moe.router.model_copy(update={"normalize": False})
    moe = model.moe.model_copy(update={"losses": (), "router": router})
    shape = model.model_copy(update={"attention": attention, "moe": moe})
    try:
        check_is_olmoe(shape)
    except ValueError as error:
        raise ConfigError(f"{error}, which this benchmark compares with") from error
    return shape


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


if __name__ == "__main__":
    sys.exit(main())
