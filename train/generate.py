"""Let a trained model write: `python -m train.generate RUN --prompt TEXT`."""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from moe.generate import generate
from moe.model import MoETransformer
from train.checkpoint import Checkpoint, listed_checkpoints, newest_checkpoint, open_checkpoint
from train.config import RunConfig, config_from_dict
from train.engine import choose_device, load_model
from train.errors import ConfigError, DataError
from train.program import guarded
from train.tokenizer import Tokenizer, load_tokenizer


def load_run(
    run_dir: Path, device: str = "auto", step: int | None = None
) -> tuple[MoETransformer, Tokenizer, int]:
    """The model and tokenizer of a run, and the step of the checkpoint.

    Args: step: of the checkpoint; None takes the newest sound one.
    Raises:
        ConfigError: if `run_dir` is not a run with such a checkpoint.
        CheckpointError: if it is damaged, or all are.
        DataError: if its tokenizer is missing or cannot be read.
    """
    checkpoint = open_run(run_dir, step)
    # Before the model, which may take minutes to build.
    tokenizer = run_tokenizer(run_dir, checkpoint)
    return load_trained_model(run_dir, checkpoint, device), tokenizer, checkpoint.step


def open_run(run_dir: Path, step: int | None = None) -> Checkpoint:
    """A checkpoint of a run, tensors read when they are asked for; see `load_run`."""
    if not run_dir.is_dir():
        found = "a file, not a run directory" if run_dir.exists() else "no such run directory"
        raise ConfigError(f"{run_dir}: {found}; give the output_dir of a run")
    if step is not None:
        listed = dict(listed_checkpoints(run_dir))
        if step not in listed:
            steps = ", ".join(map(str, sorted(listed))) or "none"
            raise ConfigError(f"{run_dir} has no checkpoint of step {step}; it has: {steps}")
        return open_checkpoint(listed[step])
    checkpoint = newest_checkpoint(
        run_dir, "auto", lambda text: print(f"warning: {text}", file=sys.stderr), open_checkpoint
    )
    if checkpoint is None:
        raise ConfigError(f"{run_dir} has no checkpoint yet; train first, or give another run")
    return checkpoint


def trained_config(run_dir: Path, checkpoint: Checkpoint) -> RunConfig:
    """The settings that a checkpoint was trained with, its vocabulary known."""
    saved = {**checkpoint.state["config"], "model": checkpoint.state["identity"]["model"]}
    return config_from_dict(saved, source=str(run_dir))


def load_trained_model(run_dir: Path, checkpoint: Checkpoint, device: str) -> MoETransformer:
    """The model of a checkpoint, ready to evaluate."""
    with torch.device(choose_device(device)):
        model = MoETransformer(trained_config(run_dir, checkpoint).model)
    load_model(model, checkpoint.tensors["model"])
    return model.eval()


def run_tokenizer(run_dir: Path, checkpoint: Checkpoint) -> Tokenizer:
    """The tokenizer beside the checkpoints, which must be that of the training."""
    sha256 = checkpoint.state["identity"]["tokenizer"]["sha256"]
    path, way_out = run_dir / "tokenizer.json", "the run's training command puts the right one back"
    try:
        tokenizer = load_tokenizer(path)
    except DataError as error:
        # Its message names a setting of the training; here there is only the file.
        found = "cannot be read as a tokenizer" if path.is_file() else "is missing"
        raise DataError(f"{path} {found}; {way_out}") from error
    if tokenizer.sha256 != sha256:
        raise ConfigError(f"{path} is not the tokenizer that the model was trained with; {way_out}")
    return tokenizer


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
    stop: Callable[[], bool] = lambda: False,
    agree: Callable[[Tensor], Tensor] = lambda chosen: chosen,
) -> str:
    """The prompt and what the model writes after it, up to an end of text.

    Args: as in `moe.generate.generate`.
    """
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
        stop=stop,
        agree=agree,
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


def _check(options: argparse.Namespace) -> None:
    """Raise ConfigError for an option that cannot be, before anything is loaded."""
    heat, many = options.temperature, "1 to 2^31 - 1"
    for name, value, fine, needs in (
        ("--max-new-tokens", options.max_new_tokens, 1 <= options.max_new_tokens < 2**31, many),
        ("--temperature", heat, heat == 0 or 0.01 <= heat <= 100, "0, or 0.01 to 100"),
        ("--top-k", options.top_k, options.top_k is None or 1 <= options.top_k < 2**31, many),
        ("--top-p", options.top_p, options.top_p is None or 0 < options.top_p <= 1, "above 0 to 1"),
        ("--seed", options.seed, 0 <= options.seed < 2**63, "0 to 2^63 - 1"),
    ):
        if not fine:
            raise ConfigError(f"{name} ({value}) is out of range; needs {needs}")
    if any("\ud800" <= character <= "\udfff" for character in options.prompt):
        raise ConfigError("--prompt is not UTF-8 text; give it in UTF-8")
    check_device(options.device)


def check_device(option: str) -> None:
    """Refuse `--device cuda` where there is none, in the words of the command line."""
    if option == "cuda" and not torch.cuda.is_available():
        raise ConfigError(
            "--device cuda, but PyTorch sees no GPU; leave --device out, or install a CUDA build "
            "of torch (README, two commands)"
        )


def main(argv: list[str] | None = None) -> int:
    """Run the program; returns the exit code."""
    options = _parser().parse_args(argv)

    def program() -> int:
        _check(options)
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

    return guarded(
        program, "shorten --prompt and --max-new-tokens, or take a machine with more memory"
    )


if __name__ == "__main__":
    sys.exit(main())
