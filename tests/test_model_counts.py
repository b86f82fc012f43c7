"""Are parameters and floating-point operations counted as the hand and PyTorch count them?"""

import pytest
import torch
from model_cases import merged, tiny_config, tiny_model, tokens
from torch.utils.flop_counter import FlopCounterMode

from moe.config import dense_equivalent
from moe.layer import MoELayer
from moe.model import MoETransformer, flops_per_token, num_parameters

COUNTED = {
    "plain": {},
    "shared, first dense": {
        "num_layers": 3,
        "moe": {"num_shared_experts": 1, "num_dense_layers": 1},
    },
    "tied, own widths": {
        "tie_embeddings": True,
        "num_layers": 4,
        "moe": {"moe_layer_every": 2, "dense_intermediate_size": 40},
    },
    "window": {"attention": {"num_heads": 4, "num_kv_heads": 2, "window": 5}},
    "gated otherwise": {"moe": {"experts": {"name": "geglu"}}},
    "latent": {
        "num_layers": 3,
        "moe": {"latent_size": 8, "num_shared_experts": 1, "num_dense_layers": 1},
    },
    "residual MoE": {
        "num_layers": 3,
        "moe": {"num_shared_experts": 1, "shared_gate": "softmax", "num_dense_layers": 1},
    },
    "no gate": {
        "num_layers": 3,
        "moe": {"experts": {"name": "relu2"}, "num_shared_experts": 1, "num_dense_layers": 1},
    },
}


@pytest.mark.parametrize("name", COUNTED)
def test_parameters_equal_a_hand_formula(name):
    with torch.device("meta"):
        model = MoETransformer(tiny_config(**COUNTED[name]))
    config = model.config
    moe, shared = config.moe, config.moe.num_shared_experts
    attention = 24 * 24 + 2 * 24 * 12 + 24 * 24 + 2 * 6
    matrices = 2 if moe.experts.name == "relu2" else 3
    shared_expert = matrices * 24 * 14
    latent = moe.latent_size or 0
    expert = matrices * (latent or 24) * 14
    total = active = 0
    for layer in range(config.num_layers):
        if config.is_moe_layer(layer):
            own = 6 * 24 + shared * shared_expert + 2 * 24 * latent
            own += 2 * 24 * (moe.shared_gate == "softmax")
            total += own + 6 * expert
            active += own + 2 * expert
        else:
            # round((2 * expert / 24 + 6 + what else there is) / matrices), of equal active FLOPs:
            # (56 + 6) / 2, (28 + 6 + 2 * 8) / 3, (84 + 6 + 2) / 3, (84 + 6) / 3
            routed = {"no gate": 31, "latent": 17, "residual MoE": 31}.get(name, 30)
            width = moe.dense_intermediate_size or shared * 14 + routed
            total += matrices * 24 * width
            active += matrices * 24 * width
        total += attention + 2 * 24
        active += attention + 2 * 24
    table = 67 * 24
    tables = table if config.tie_embeddings else 2 * table
    experts = len(config.moe_layers) * 6 * expert
    expected = (total + 24 + tables, active + 24 + table, tables, experts)
    assert tuple(num_parameters(model)) == expected


@pytest.mark.parametrize("name", COUNTED)
@pytest.mark.parametrize("seq_len", [3, 32])
def test_flops_equal_a_hand_formula(name, seq_len):
    model = MoETransformer(tiny_config(**COUNTED[name]))
    config = model.config
    vectors = config.num_layers * (2 * 24 + 2 * 6) + 24
    window = config.attention.window or seq_len
    keys = sum(min(i + 1, window) for i in range(seq_len)) / seq_len
    # Per key: 2 P for the score and 2 P for the sum, in each of 4 heads of 6, thrice in training.
    attention = config.num_layers * keys * 4 * 6 * 4 * 3
    expected = 6 * (num_parameters(model).active - vectors) + attention
    assert flops_per_token(model, seq_len) == pytest.approx(expected, abs=1)


def counted_flops(model, batch, seq_len):
    """Matmuls of a forward and backward pass as PyTorch counts them, a token."""
    ids = tokens(batch, seq_len)
    # PyTorch's table lacks the in-place form.
    table = {torch.ops.aten.addmm_: lambda x, a, b, out_shape=None, **_: 2 * a[0] * a[1] * b[1]}
    with FlopCounterMode(display=False, custom_mapping=table) as counter:
        out = model(ids, need_logits=True)
        out.logits.sum().backward()
    return counter.get_total_flops() / ids.numel()


@pytest.mark.parametrize("feed_forward", ["moe", "dense"])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"moe": {"num_shared_experts": 1}},
        {"moe": {"experts": {"name": "geglu"}}},
        {"moe": {"experts": {"name": "gelu"}}},
        {"moe": {"experts": {"name": "relu2"}, "num_shared_experts": 1}},
        {"moe": {"latent_size": 24, "num_shared_experts": 1, "shared_gate": "sigmoid"}},
        {"moe": {"experts": {"name": "relu2"}, "latent_size": 24}},
    ],
)
def test_flops_equal_those_that_pytorch_counts(feed_forward, changes):
    seq_len = 16
    model = tiny_model(hidden_size=64, feed_forward=feed_forward, **changes)
    # A block of queries computes all keys of the block, also those that the mask hides.
    hidden_keys = model.config.num_layers * 12 * 64 * (seq_len - (seq_len + 1) / 2)
    counted = counted_flops(model, 4, seq_len) - hidden_keys
    assert flops_per_token(model, seq_len) == pytest.approx(counted, rel=1e-6)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"moe": {"num_experts": 64, "router": {"name": "topk", "top_k": 8}}},
        {"moe": {"num_shared_experts": 2, "shared_intermediate_size": 40}},
        {"num_layers": 4, "moe": {"num_dense_layers": 1, "dense_intermediate_size": 300}},
        {"num_layers": 5, "moe": {"moe_layer_every": 2, "dense_intermediate_size": 10}},
        {"moe": {"experts": {"name": "gelu"}, "num_shared_experts": 1}},
        {"num_layers": 3, "moe": {"experts": {"name": "relu2"}, "num_dense_layers": 1}},
        {"moe": {"latent_size": 16, "num_shared_experts": 1, "shared_gate": "softmax"}},
    ],
)
def test_dense_equivalent_has_equal_active_flops(changes):
    config = tiny_config(**merged({"hidden_size": 64, "moe": {"intermediate_size": 96}}, changes))
    dense = dense_equivalent(config)
    assert dense.feed_forward == "dense"
    with torch.device("meta"):
        ours, baseline = MoETransformer(config), MoETransformer(dense)
    assert not any(isinstance(m, MoELayer) for m in baseline.modules())
    ratio = flops_per_token(baseline, 128) / flops_per_token(ours, 128)
    assert ratio == pytest.approx(1, abs=0.01)
    assert dense_equivalent(dense) == dense
