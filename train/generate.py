"""Let a trained model write: `python -m train.generate RUN --prompt TEXT`."""

import argparse
import sys
from pathlib import Path

import torch

from moe.generate import generate
from moe.model import MoETransformer
from train.checkpoint import find_checkpoint
from train.config import config_from_dict
from train.engine import choose_device, load_model
from train.errors import ConfigError
from train.program import guarded
from train.tokenizer import Tokenizer, load_tokenizer


def load_run(run_dir: Path, device: str = "auto") -> tuple[MoETransformer, Tokenizer, int]:
    """The model and tokenizer of a run, and the step of the checkpoint.

    Raises:
        ConfigError: if `run_dir` is not a run with a checkpoint.
        CheckpointError: if all its checkpoints are damaged.
    """
    if not run_dir.is_dir():
        raise ConfigError(f"{run_dir}: no such run directory; give the output_dir of a run")
    found = find_checkpoint(
        run_dir, "auto", lambda text: print(f"warning: {text}", file=sys.stderr)
    )
    if found is None:
        raise ConfigError(f"{run_dir} has no checkpoint yet; train first, or give another run")
    saved = found.state["config"]
    saved["model"] = found.state["identity"]["model"]
    config = config_from_dict(saved, source=str(run_dir))
    with torch.device(choose_device(device)):
        model = MoETransformer(config.model)
    load_model(model, found.tensors["model"])
    tokenizer = load_tokenizer(run_dir / "tokenizer.json")
    if tokenizer.sha256 != found.state["identity"]["tokenizer"]["sha256"]:
        raise ConfigError(
            f"{run_dir / 'tokenizer.json'} is not the tokenizer that the model was trained with; "
            f"the run's training command puts the right one back"
        )
    return model.eval(), tokenizer, found.step


def sample_text(
    model: MoETransformer,
    tokenizer: Tokenizer,
    prompt: str,
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
) -> str:
    """The prompt and what the model writes after it, up to an end of text."""
    device = model.embedding.weight.device
    # A document begins after the end of the one before.
    ids = torch.tensor([[tokenizer.end_of_text, *tokenizer.encode(prompt)]], device=device)
    generator = torch.Generator(device).manual_seed(seed)
    written = generate(
        model,
        ids,
        max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        end_of_text=tokenizer.end_of_text,
        generator=generator,
    )
    new = [token for token in written[0, 1:].tolist() if token < tokenizer.vocab_size]
    return tokenizer.decode(new)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m train.generate", description=__doc__)
    parser.add_argument("run", type=Path, help="the run's output_dir")
    parser.add_argument("--prompt", default="", help="text to go on from")
    parser.add_argument("--max-new-tokens", type=int, default=200, metavar="N")
    parser.add_argument("--temperature", type=float, default=0.8, help="0 is greedy")
    parser.add_argument("--top-k", type=int, metavar="N", help="sample from the N likeliest")
    parser.add_argument("--top-p", type=float, metavar="P", help="sample from the likeliest P mass")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the program; returns the exit code."""
    options = _parser().parse_args(argv)

    def program() -> int:
        heat = options.temperature
        for name, value, fine in (
            ("--max-new-tokens", options.max_new_tokens, options.max_new_tokens >= 1),
            ("--temperature", heat, heat == 0 or 0.01 <= heat <= 100),
            ("--top-k", options.top_k, options.top_k is None or options.top_k >= 1),
            ("--top-p", options.top_p, options.top_p is None or 0 < options.top_p <= 1),
            ("--seed", options.seed, 0 <= options.seed < 2**63),
        ):
            if not fine:
                raise ConfigError(f"{name} ({value}) is out of range; see --help")
        if not options.prompt.isprintable() and any(
            "\ud800" <= c <= "\udfff" for c in options.prompt
        ):
            raise ConfigError("--prompt is not UTF-8 text")
        model, tokenizer, step = load_run(options.run, options.device)
        print(f"# {options.run}, step {step}", file=sys.stderr)
        text = sample_text(
            model,
            tokenizer,
            options.prompt,
            max_new_tokens=options.max_new_tokens,
            temperature=options.temperature,
            top_k=options.top_k,
            top_p=options.top_p,
            seed=options.seed,
        )
        print(text)
        return 0

    return guarded(program)


if __name__ == "__main__":
    sys.exit(main())
