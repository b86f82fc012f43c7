"""Does a token's result depend on earlier tokens of its own document alone?

In float64, as library matmuls change bits with the number of rows: chosen experts are identical,
logits within 1e-10 relative, and a planted leak gives more than 1e-6.
"""

import pytest
import torch
from conftest import relative_error
from model_cases import tiny_config, tiny_model, tokens

from kernels import attention
from moe.layer import MoELayer
from moe.model import MoETransformer, init_weights
from moe.variants import load_variant, variant_names

SEQ_LEN = 14
CONFIGS = {
    "softmax": {},
    "window": {"attention": {"num_heads": 4, "window": 5}},
    "sigmoid, bias, shared expert": {
        "moe": {
            "router": {"name": "topk", "score": "sigmoid", "bias_update_rate": 0.01},
            "num_shared_experts": 1,
        }
    },
    "residual, latent, no w3": {
        "moe": {
            "num_shared_experts": 1,
            "shared_gate": "softmax",
            "latent_size": 10,
            "experts": {"name": "relu2"},
        }
    },
    "every second layer, tied": {
        "num_layers": 3,
        "tie_embeddings": True,
        "moe": {"moe_layer_every": 2, "num_dense_layers": 1},
    },
    "zero, copy and constant experts": {
        "moe": {"num_zero_experts": 1, "num_copy_experts": 1, "num_constant_experts": 1}
    },
    "projection norm": {"attention": {"num_heads": 4, "qk_norm": "projection"}},
    "dense": {"feed_forward": "dense"},
} | {name: {"moe": {"router": {"name": name}}} for name in variant_names("routers")}
NOT_CAUSAL = [
    name for name in variant_names("routers") if not load_variant("routers", name).Router.causal
]


@pytest.fixture(params=["short path", "flash path"])
def path(request, monkeypatch):
    if request.param == "flash path":
        monkeypatch.setattr(attention, "SHORT_KEYS", -1)


def build(name, by_place=True, dtype=torch.float64):
    """A model of CONFIGS.

    Args: by_place: False where a token's place in the batch must play no part.
    """
    if name in NOT_CAUSAL:
        pytest.skip("this router says that it is not causal")
    model = tiny_model(dtype=dtype, **CONFIGS[name]).eval()
    routers = [m.router for m in model.modules() if isinstance(m, MoELayer)]
    if not by_place and not all(router.permutes_tokens for router in routers):
        pytest.skip("this router says that it goes by a token's place")
    return model


def changed_at(ids, *places):
    other = ids.clone()
    for place in places:
        other[place] = (other[place] + 11) % 67
    return other


def difference(model, ids, other, kept, **options):
    """Relative error of the logits at `kept` (B, S) bool; inf where an expert changed there."""
    with torch.no_grad():
        first, second = model(ids, **options), model(other, **options)
    for a, b in zip(first.routings, second.routings, strict=True):
        if not torch.equal(a.topk_indices[kept.flatten()], b.topk_indices[kept.flatten()]):
            return float("inf")
    return relative_error(second.logits[kept], first.logits[kept])


def before(position):
    """Tokens before `position` of the first of two rows, and all of the second."""
    kept = torch.ones(2, SEQ_LEN, dtype=torch.bool)
    kept[0, position:] = False
    return kept


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("position", [1, 6, SEQ_LEN - 1])
def test_a_later_token_changes_nothing_before_it(path, name, position):
    model, ids = build(name), tokens(2, SEQ_LEN)
    other = changed_at(ids, (0, position))
    assert difference(model, ids, other, before(position)) < 1e-10
    # The token itself does change.
    assert difference(model, ids, other, ~before(position)) > 1e-6


@pytest.mark.parametrize("name", CONFIGS)
def test_gradient_flows_to_earlier_tokens_only(name):
    model, ids = build(name), tokens(1, SEQ_LEN)
    embedded = []
    model.embedding.register_forward_hook(lambda m, i, out: embedded.append(out) or out)
    (grad,) = torch.autograd.grad(model(ids).logits[0, 6].sum(), embedded)
    norms = grad[0].norm(dim=-1)
    assert norms[7:].tolist() == [0] * (SEQ_LEN - 7)
    assert (norms[5:7] > 1e-6).all()


def test_planted_leak_in_attention_is_caught(path, monkeypatch):
    def peeking(num_queries, num_keys, document_ids, window, device):
        visible = torch.ones(num_queries, num_keys, dtype=torch.bool, device=device)
        return visible.tril(1).unsqueeze(0)

    monkeypatch.setattr(attention, "key_mask", peeking)
    # A window leads both paths through the mask.
    model, ids = build("window"), tokens(2, SEQ_LEN)
    assert difference(model, ids, changed_at(ids, (0, 6)), before(6)) > 1e-6


def test_planted_leak_in_the_experts_is_caught(monkeypatch):
    dispatch = MoELayer.dispatch

    def leaking(self, x, *rest):
        routed, shared = dispatch(self, x, *rest)
        return routed + 1e-4 * x.mean(0), shared

    monkeypatch.setattr(MoELayer, "dispatch", leaking)
    model, ids = build("softmax"), tokens(2, SEQ_LEN)
    assert difference(model, ids, changed_at(ids, (0, 6)), before(6)) > 1e-6


def test_planted_leak_in_the_router_is_caught(monkeypatch):
    router = load_variant("routers", "topk").Router
    forward = router.forward
    monkeypatch.setattr(
        router, "forward", lambda self, x, context: forward(self, x + 1e-3 * x.mean(0), context)
    )
    model, ids = build("softmax"), tokens(2, SEQ_LEN)
    assert difference(model, ids, changed_at(ids, (0, 6)), before(6)) > 1e-6


@pytest.mark.parametrize("name", CONFIGS)
def test_documents_do_not_see_each_other(path, name):
    model, ids = build(name), tokens(2, SEQ_LEN)
    document_ids = torch.tensor([[0] * 4 + [1] * 5 + [2] * 5, [0] * 9 + [1] * 5])
    other = changed_at(ids, (0, 4), (0, 7), (1, 2))
    kept = torch.ones(2, SEQ_LEN, dtype=torch.bool)
    kept[0, 4:9] = kept[1, 2:9] = False
    assert difference(model, ids, other, kept, document_ids=document_ids) < 1e-10
    # Without the ids they do.
    assert difference(model, ids, other, kept) > 1e-6


@pytest.mark.parametrize("name", CONFIGS)
def test_a_packed_document_reads_as_it_does_alone(path, name):
    model, ids = build(name, by_place=False), tokens(1, SEQ_LEN)
    document_ids = torch.tensor([[0] * 5 + [1] * 9])
    with torch.no_grad():
        packed = model(ids, document_ids=document_ids).logits[:, 5:]
        alone = model(ids[:, 5:]).logits
    # RoPE is relative, but its angles are float32.
    assert relative_error(packed, alone) < 1e-5


@pytest.mark.parametrize("name", CONFIGS)
def test_rows_of_a_batch_do_not_see_each_other(name):
    model, ids = build(name, by_place=False), tokens(3, SEQ_LEN)
    with torch.no_grad():
        together = model(ids)
        alone = [model(row.unsqueeze(0)) for row in ids]
        reordered = model(ids.flip(0))
    assert relative_error(torch.cat([a.logits for a in alone]), together.logits) < 1e-10
    assert relative_error(reordered.logits.flip(0), together.logits) < 1e-10
    for layer, routing in enumerate(together.routings):
        parts = torch.cat([a.routings[layer].topk_indices for a in alone])
        assert torch.equal(parts, routing.topk_indices)


@pytest.mark.parametrize("name", CONFIGS)
def test_padding_changes_no_other_token_loss_or_count(name):
    model, ids = build(name), tokens(2, SEQ_LEN)
    valid = torch.arange(SEQ_LEN) < torch.tensor([[9], [SEQ_LEN]])
    labels = ids.roll(-1, 1).masked_fill(~valid, -100)
    labels[:, -1] = labels[0, 8] = -100
    other = changed_at(ids, *[(0, i) for i in range(9, SEQ_LEN)])
    assert difference(model, ids, other, valid, valid=valid) < 1e-10
    outputs = [model(x, labels, valid=valid) for x in (ids, other)]
    assert relative_error(outputs[1].loss, outputs[0].loss) < 1e-12
    for a, b in zip(outputs[0].routings, outputs[1].routings, strict=True):
        assert torch.equal(a.tokens_per_expert, b.tokens_per_expert)
        assert int(a.num_tokens) == int(valid.sum())
        assert (a.topk_indices[~valid.flatten()] == -1).all()
    # A row cut short is the row without its padding.
    with torch.no_grad():
        short, padded = model(ids[:1, :9]).logits, model(ids, valid=valid).logits[:1, :9]
    assert relative_error(padded, short) < 1e-10


def test_evaluation_is_deterministic_with_jitter_configured():
    model = tiny_model(moe={"router": {"name": "topk", "jitter": 0.3}})
    ids = tokens(2, SEQ_LEN)
    with torch.no_grad():
        model.train()
        assert not torch.equal(model(ids).logits, model(ids).logits)
        model.eval()
        state = torch.get_rng_state()
        assert torch.equal(model(ids).logits, model(ids).logits)
    # It takes no number from the training's random stream.
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("name", CONFIGS)
def test_float32_logits_agree_to_1e_5(name):
    model, ids = build(name, dtype=torch.float32), tokens(2, SEQ_LEN)
    assert difference(model, ids, changed_at(ids, (0, 6)), before(6)) < 1e-5


def test_a_router_that_sees_the_future_is_refused_unless_allowed(monkeypatch):
    monkeypatch.setattr(load_variant("routers", "topk").Router, "causal", False)
    with pytest.raises(ValueError) as caught:
        tiny_model()
    assert (
        "model.moe.router.name (topk) lets a token see later ones, which spoils language "
        "modelling; set model.moe.allow_non_causal: true to use it anyway"
    ) in str(caught.value)
    model = tiny_model(moe={"allow_non_causal": True})
    assert isinstance(model, MoETransformer)
    init_weights(model, 0)


def not_causal(name):
    return {"moe": {"router": {"name": name}, "allow_non_causal": True}}


@pytest.mark.parametrize("name", NOT_CAUSAL)
def test_a_router_that_is_not_causal_is_refused_by_name(name):
    with pytest.raises(ValueError) as caught:
        tiny_config(**CONFIGS[name])
    assert (
        f"model.moe.router.name ({name}) lets a token see later ones, which spoils language "
        f"modelling; set model.moe.allow_non_causal: true to use it anyway"
    ) in str(caught.value)
    assert tiny_config(**not_causal(name)).moe.router.name == name


@pytest.mark.parametrize("name", NOT_CAUSAL)
def test_with_a_router_that_is_not_causal_a_later_token_does_change_an_earlier_logit(name):
    model = tiny_model(dtype=torch.float64, **not_causal(name))
    ids, kept = tokens(2, SEQ_LEN), before(6)
    # The other sequence is no earlier token.
    kept[1] = False
    with torch.no_grad():
        moved = [
            (model(changed_at(ids, (0, at))).logits - model(ids).logits)[kept].abs().max()
            for at in range(6, SEQ_LEN)
        ]
    assert max(moved) > 1e-6


def test_sinkhorn_is_causal_in_evaluation():
    model = tiny_model(dtype=torch.float64, **not_causal("sinkhorn")).eval()
    ids = tokens(2, SEQ_LEN)
    assert difference(model, ids, changed_at(ids, (0, 6)), before(6)) < 1e-10
