"""Does cached decoding write what the whole model would write, and stop where it should?"""

import itertools

import pytest
import torch
from conftest import relative_error
from model_cases import tiny_model, tokens

from moe.generate import filter_logits, generate

# Each way of attending, as the cache must serve all of them.
SHAPES = {
    "plain": {},
    "window": {"attention": {"num_heads": 4, "num_kv_heads": 2, "window": 3}},
    "projection norm": {"attention": {"num_heads": 4, "qk_norm": "projection"}},
    "no norm, tied, shared expert": {
        "attention": {"num_heads": 4, "qk_norm": "none"},
        "tie_embeddings": True,
        "moe": {"num_shared_experts": 1},
    },
    "dense": {"feed_forward": "dense"},
}


def full_logits(model, ids):
    """Of the last position, without a cache."""
    model.eval()
    with torch.no_grad():
        return model(ids).logits[:, -1]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("steps", [(1, 1, 1, 1, 1, 1, 1, 1), (5, 1, 2), (3, 5)])
def test_cached_logits_equal_those_of_the_whole_sequence(shape, steps):
    model = tiny_model(dtype=torch.float64, **SHAPES[shape]).eval()
    ids = tokens(3, 8)
    with torch.no_grad():
        whole = model(ids)
        caches, parts = None, []
        for first, end in itertools.pairwise([0, *itertools.accumulate(steps)]):
            out = model(ids[:, first:end], caches=caches)
            caches = out.caches
            parts.append(out.logits)
    assert relative_error(torch.cat(parts, 1), whole.logits) < 1e-10
    for cache, expected in zip(caches, whole.caches, strict=True):
        assert relative_error(cache.keys, expected.keys) < 1e-10
        assert relative_error(cache.values, expected.values) < 1e-10


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("prompt", [1, 5])
def test_greedy_writes_the_argmax_of_a_full_recomputation(shape, prompt):
    model = tiny_model(dtype=torch.float64, **SHAPES[shape])
    expected = ids = tokens(3, prompt)
    for _ in range(9):
        chosen = full_logits(model, expected).argmax(-1, keepdim=True)
        expected = torch.cat([expected, chosen], 1)
    assert torch.equal(generate(model, ids, 9, temperature=0), expected)
    assert len(set(expected[0].tolist())) > 2


def test_a_window_is_respected_while_decoding():
    changes = {"attention": {"num_heads": 4, "window": 2}, "num_layers": 1}
    model = tiny_model(dtype=torch.float64, **changes)
    one, other = tokens(1, 6), tokens(1, 6)
    other[:, :5] = (other[:, :5] + 1) % 67
    # One layer and a window of 2: after one token more, both see the same two tokens.
    first = [generate(model, ids, 1, temperature=0)[0, -1] for ids in (one, other)]
    same = [torch.cat([ids, first[0].view(1, 1)], 1) for ids in (one, other)]
    ends = [generate(model, ids, 5, temperature=0)[0, -5:].tolist() for ids in same]
    assert ends[0] == ends[1]
    # Without the window they differ.
    unlimited = tiny_model(dtype=torch.float64, attention={"num_heads": 4}, num_layers=1)
    logits = [full_logits(unlimited, ids) for ids in same]
    assert relative_error(logits[0], logits[1]) > 1e-6


def test_sampling_is_a_function_of_the_generator():
    model = tiny_model()
    ids = tokens(2, 4)

    def sample(seed):
        return generate(model, ids, 12, generator=torch.Generator().manual_seed(seed))

    first = sample(1)
    torch.rand(3)
    assert torch.equal(first, sample(1))
    assert not torch.equal(first, sample(2))
    assert torch.equal(first[:, :4], ids)


def test_samples_follow_the_distribution():
    model = tiny_model(vocab_size=7)
    ids = tokens(1, 4, vocab_size=7).expand(20000, 4)
    probs = (full_logits(model, ids[:1])[0] / 1.7).softmax(-1)
    generator = torch.Generator().manual_seed(0)
    written = generate(model, ids, 1, temperature=1.7, generator=generator)[:, -1]
    counts = torch.bincount(written, minlength=7)
    expected = probs * 20000
    # Chi-squared with 6 degrees of freedom: above 22.5 one time in a thousand.
    assert float(((counts - expected).square() / expected).sum()) < 22.5


def test_top_k_of_one_and_a_tiny_top_p_are_greedy():
    model = tiny_model()
    ids = tokens(3, 4)
    greedy = generate(model, ids, 8, temperature=0)
    assert torch.equal(generate(model, ids, 8, top_k=1), greedy)
    assert torch.equal(generate(model, ids, 8, top_p=1e-9), greedy)
    assert torch.equal(generate(model, ids, 8, temperature=1e-4), greedy)


def test_filter_keeps_the_likeliest_tokens():
    probs = torch.tensor([[0.1, 0.4, 0.05, 0.3, 0.15], [0.2, 0.2, 0.2, 0.2, 0.2]])

    def kept(top_k, top_p):
        finite = filter_logits(probs.log(), top_k, top_p).isfinite()
        return [row.nonzero().flatten().tolist() for row in finite]

    assert kept(None, None) == [[0, 1, 2, 3, 4]] * 2
    assert kept(2, None) == [[1, 3], [0, 1]]
    assert kept(9, None) == [[0, 1, 2, 3, 4]] * 2
    # 0.4 + 0.3 does not reach 0.75, with 0.15 it does.
    assert kept(None, 0.75) == [[1, 3, 4], [0, 1, 2, 3]]
    assert kept(None, 0.35) == [[1], [0, 1]]
    # Of the two that top_k leaves, the first has 4/7 of the probability.
    assert kept(2, 0.55) == [[1], [0, 1]]


def test_a_finished_row_is_filled_up_and_decoding_stops_with_the_last():
    model = tiny_model()
    ids = tokens(4, 3)
    free = generate(model, ids, 12, temperature=0)[:, 3:]
    # A token that some row writes first at another place than another row does.
    end = next(
        int(t) for t in free.flatten() if len({r.tolist().index(t) for r in free if t in r}) > 1
    )
    written = generate(model, ids, 12, temperature=0, end_of_text=end)[:, 3:]
    for row, plain in zip(written.tolist(), free.tolist(), strict=True):
        length = plain.index(end) if end in plain else 12
        assert row == (plain[:length] + [end] * 12)[: len(row)]
    alone = generate(model, ids[:1], 12, temperature=0, end_of_text=int(free[0, 2]))
    assert alone.shape[1] == 3 + free[0].tolist().index(int(free[0, 2])) + 1


def test_an_end_of_text_in_the_prompt_does_not_end():
    model = tiny_model()
    ids = tokens(1, 3)
    out = generate(model, ids, 4, temperature=0, end_of_text=int(ids[0, -1]))
    assert out.shape[1] > 3


@pytest.mark.parametrize("training", [True, False])
def test_the_models_mode_is_restored(training, monkeypatch):
    model = tiny_model(moe={"router": {"name": "topk", "jitter": 0.5}}).train(training)
    before = [p.clone() for p in model.parameters()]
    first = generate(model, tokens(2, 3), 5, temperature=0)
    assert model.training == training
    assert all(m.training == training for m in model.modules())
    # In evaluation mode there is no noise.
    assert torch.equal(first, generate(model, tokens(2, 3), 5, temperature=0))
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert all(p.grad is None for p in model.parameters())

    def fail(*arguments, **options):
        raise RuntimeError("stop")

    monkeypatch.setattr(model, "forward", fail)
    with pytest.raises(RuntimeError, match="stop"):
        generate(model, tokens(2, 3), 5)
    assert model.training == training


@pytest.mark.parametrize("asked", [0, 1, 3])
def test_a_stop_ends_the_text_before_the_next_token(asked):
    model, ids, answers = tiny_model(), tokens(2, 3), []

    def stop() -> bool:
        answers.append(len(answers) >= asked)
        return answers[-1]

    out = generate(model, ids, 8, temperature=0, stop=stop)
    assert torch.equal(out, generate(model, ids, asked, temperature=0))
    assert len(answers) == asked + 1


def test_nothing_to_write_returns_the_prompt():
    ids = tokens(2, 3)
    assert torch.equal(generate(tiny_model(), ids, 0), ids)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"temperature": -1.0}, "temperature (-1.0) must be 0 (greedy) or positive"),
        ({"temperature": float("nan")}, "temperature (nan) must be 0 (greedy) or positive"),
        ({"top_k": 0}, "top_k (0) must be at least 1, or None for all tokens"),
        ({"top_p": 0.0}, "top_p (0.0) must be above 0 and at most 1"),
        ({"top_p": 1.5}, "top_p (1.5) must be above 0 and at most 1"),
        ({"max_new_tokens": -1}, "max_new_tokens (-1) must be at least 0"),
        ({"end_of_text": 67}, "end_of_text (67) must be a token of the vocabulary, from 0 to 66"),
        (
            {"input_ids": torch.zeros(1, 0, dtype=torch.int64)},
            "input_ids has shape (1, 0), needs (B, S) with at least one token in each row; begin "
            "an empty prompt with the end-of-text token",
        ),
    ],
)
def test_settings_out_of_range_are_named(arguments, message):
    with pytest.raises(ValueError) as caught:
        generate(tiny_model(), **({"input_ids": tokens(1, 2), "max_new_tokens": 1} | arguments))
    assert str(caught.value) == f"generate: {message}"
