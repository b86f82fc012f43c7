"""How does a model continue a text? Greedy or sampled decoding with the KV cache.

p = softmax(logits / temperature), cut to the top_k likeliest tokens and to the smallest set of
likeliest tokens whose probability reaches top_p, then divided by what is left
"""

from collections.abc import Callable

import torch
from torch import Tensor

from kernels.launch import at_least_float32
from moe.model import MoETransformer


def filter_logits(logits: Tensor, top_k: int | None, top_p: float | None) -> Tensor:
    """Lower all but the likeliest tokens to -inf: (B, V) -> (B, V).

    Keeps the `top_k` likeliest, then of these the fewest whose probability together is at least
    `top_p`; always the likeliest one.

    Source: nucleus sampling, Holtzman et al., arXiv 1904.09751, section 3.1.
    """
    if top_k is None and top_p is None:
        return logits
    ranked, order = logits.sort(dim=-1, descending=True, stable=True)  # (B, V)
    if top_k is not None:
        ranked[:, top_k:] = -torch.inf
    if top_p is not None:
        probs = ranked.softmax(-1)
        # A token goes if the ones before it reach top_p already.
        ranked[probs.cumsum(-1) - probs >= top_p] = -torch.inf
    return torch.empty_like(logits).scatter_(-1, order, ranked)


def _next_tokens(
    logits: Tensor,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    generator: torch.Generator | None,
) -> Tensor:
    """One token for each row, (B, V) -> (B,)."""
    if temperature == 0:
        return logits.argmax(-1)
    # float32 at least: bfloat16 probabilities are steps of 1/256.
    logits = at_least_float32(logits) / temperature
    probs = filter_logits(logits, top_k, top_p).softmax(-1)
    return torch.multinomial(probs, 1, generator=generator).squeeze(-1)


def _check(input_ids, max_new_tokens, temperature, top_k, top_p, end_of_text, vocab_size):
    if input_ids.dim() != 2 or input_ids.shape[1] == 0:
        raise ValueError(
            f"generate: input_ids has shape {tuple(input_ids.shape)}, needs (B, S) with at least "
            f"one token in each row; begin an empty prompt with the end-of-text token"
        )
    if max_new_tokens < 0:
        raise ValueError(f"generate: max_new_tokens ({max_new_tokens}) must be at least 0")
    # Negated, so that NaN is refused too.
    if not temperature >= 0:
        raise ValueError(f"generate: temperature ({temperature}) must be 0 (greedy) or positive")
    if top_k is not None and top_k < 1:
        raise ValueError(f"generate: top_k ({top_k}) must be at least 1, or None for all tokens")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"generate: top_p ({top_p}) must be above 0 and at most 1")
    if end_of_text is not None and not 0 <= end_of_text < vocab_size:
        raise ValueError(
            f"generate: end_of_text ({end_of_text}) must be a token of the vocabulary, from 0 to "
            f"{vocab_size - 1}"
        )


@torch.no_grad()
def generate(
    model: MoETransformer,
    input_ids: Tensor,
    max_new_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    end_of_text: int | None = None,
    generator: torch.Generator | None = None,
    stop: Callable[[], bool] = lambda: False,
    agree: Callable[[Tensor], Tensor] = lambda chosen: chosen,
) -> Tensor:
    """Continue each row of `input_ids`.

    Args:
        model: is in evaluation mode meanwhile, and in its own mode again afterwards.
        input_ids: (B, S) int64 prompts of one length, S at least 1.
        max_new_tokens: most tokens added to a row.
        temperature: 0 takes the likeliest token (greedy, ties to the lowest id), 1 samples from the
            model's distribution.
        top_k: sample among that many likeliest tokens; None: among all.
        top_p: sample among the likeliest tokens that together reach this probability.
        end_of_text: a row that has written this token is filled up with it; decoding stops when
            every row has. One in the prompt does not count.
        generator: of the draws, on the model's device; None for PyTorch's global one.
        stop: asked before each token; True ends the text there.
        agree: of many ranks that write the same text, makes the (B,) chosen tokens those of one:
            an expert's rounding may differ between them, and all must run as many forwards.
    Returns:
        (B, S + new) with new <= max_new_tokens.
    Raises:
        ValueError: on an empty prompt or a setting out of range.
    """
    _check(
        input_ids, max_new_tokens, temperature, top_k, top_p, end_of_text, model.config.vocab_size
    )
    was_training = model.training
    model.eval()
    try:
        tokens, step, caches = [input_ids], input_ids, None
        finished = torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)
        for _ in range(max_new_tokens):
            if stop():
                break
            out = model(step, caches=caches)
            caches = out.caches
            chosen = _next_tokens(out.logits[:, -1], temperature, top_k, top_p, generator)
            chosen = agree(chosen)  # (B,)
            if end_of_text is not None:
                chosen = chosen.masked_fill(finished, end_of_text)
                finished |= chosen == end_of_text
            step = chosen.unsqueeze(-1)  # (B, 1)
            tokens.append(step)
            if end_of_text is not None and finished.all():
                break
        return torch.cat(tokens, 1)
    finally:
        model.train(was_training)
