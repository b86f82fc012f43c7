"""Are the layer and the model the functions that they should be, from what weights they should?"""

import math
import sys
import types

import pytest
import torch
import torch.nn.functional as F
from conftest import assert_equals, randn, relative_error
from model_cases import context, moe_layer, tiny_config, tiny_model, tokens
from variant_cases import variant_cases

from moe.layer import DenseFeedForward, MoELayer
from moe.model import MoETransformer, init_weights, num_parameters
from moe.router import RouterModule
from moe.routing import make_routing
from moe.variants import VariantConfig, load_variant

RESIDUAL_LATENT = {"num_shared_experts": 1, "shared_gate": "softmax", "latent_size": 7}

# --- the expert layer ---

EXPERTS = [{"name": name, **settings} for name, settings in variant_cases("experts")]


@pytest.mark.parametrize("experts", EXPERTS, ids=str)
def test_one_expert_is_the_dense_layer_of_its_kind(experts):
    # A softmax over one expert is 1: the router's weight says nothing.
    router = {"name": "topk", "top_k": 1, "normalize": False}
    moe = {"num_experts": 1, "router": router, "experts": experts}
    layer = moe_layer(**moe)
    dense = DenseFeedForward(tiny_config(moe=moe), 14).double()
    weights = {name: stack[0] for name, stack in layer.experts.named_parameters()}
    assert {f"{name}.weight" for name in weights} == dict(dense.named_parameters()).keys()
    for name, weight in weights.items():
        getattr(dense, name).weight.data = weight.data
    x = randn(30, 24, seed=9, dtype=torch.float64)
    out, routing = layer(x, context(30))
    assert_equals(out, dense(x))
    assert routing.tokens_per_expert.tolist() == [30]


def test_all_experts_at_equal_weights_are_their_mean():
    layer = moe_layer(router={"name": "topk", "top_k": 6})
    with torch.no_grad():
        layer.router.weight.zero_()
    x = randn(30, 24, seed=9, dtype=torch.float64)
    w1, w2, w3 = layer.experts.w1, layer.experts.w2, layer.experts.w3
    each = [(F.silu(x @ w1[e].T) * (x @ w3[e].T)) @ w2[e].T for e in range(6)]
    assert_equals(layer(x, context(30))[0], torch.stack(each).mean(0))


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_layer_does_not_depend_on_the_order_of_experts_or_tokens(score):
    router = {"name": "topk", "score": score, "bias_update_rate": 0.01}
    layer, shuffled = moe_layer(router=router), moe_layer(router=router)
    layer.router.expert_bias.copy_(randn(6, seed=4) * 0.1)
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    with torch.no_grad():
        for name, parameter in shuffled.named_parameters():
            parameter.copy_(layer.get_parameter(name)[order])
        shuffled.router.expert_bias.copy_(layer.router.expert_bias[order])
    x = randn(30, 24, seed=9, dtype=torch.float64)
    (out, routing), (other, other_routing) = layer(x, context(30)), shuffled(x, context(30))
    assert_equals(other, out)
    assert torch.equal(order[other_routing.topk_indices], routing.topk_indices)
    assert torch.equal(other_routing.tokens_per_expert, routing.tokens_per_expert[order])
    mixed = torch.randperm(30)
    assert_equals(layer(x[mixed], context(30))[0], out[mixed])


def test_shared_experts_are_added_for_every_token():
    layer = moe_layer(num_shared_experts=2, shared_intermediate_size=5)
    assert layer.shared_experts.w1.weight.shape == (10, 24)
    x = randn(30, 24, seed=9, dtype=torch.float64)
    with_shared, _ = layer(x, context(30))
    shared, layer.shared_experts = layer.shared_experts, None
    assert_equals(with_shared, layer(x, context(30))[0] + shared(x))


def test_experts_without_a_fused_form_are_dispatched_in_three_steps(monkeypatch):
    layer = moe_layer()
    x = randn(30, 24, seed=9, dtype=torch.float64)
    fused, _ = layer(x, context(30))
    monkeypatch.setattr(load_variant("experts", "swiglu").Experts, "fuses_dispatch", False)
    assert_equals(layer(x, context(30))[0], fused)


def test_weights_are_read_only_inside_a_call_of_the_module_that_holds_them():
    # As in ZeRO-3, which gathers a module's weights before its call and frees them behind it.
    model = tiny_model(moe=RESIDUAL_LATENT, tie_embeddings=True)
    ids = tokens(2, 16)
    with torch.no_grad():
        expected = model(ids, ids, need_logits=True)
        real = {parameter: parameter.clone() for parameter in model.parameters()}

        def gather(module, _args):
            for parameter in module.parameters(recurse=False):
                parameter.copy_(real[parameter])

        def free(module, _args=None, _out=None):
            for parameter in module.parameters(recurse=False):
                parameter.fill_(torch.nan)

        for module in model.modules():
            module.register_forward_pre_hook(gather)
            module.register_forward_hook(free)
            free(module)
        found = model(ids, ids, need_logits=True)
    assert torch.equal(found.logits, expected.logits)
    assert torch.equal(found.loss, expected.loss)


class EveryOtherExpert(RouterModule):
    """A router without weights, with a number of experts of each token's own, told by its layer."""

    fixed_k = False
    learned = False

    def __init__(self, config, hidden_size, num_experts):
        super().__init__()
        self.num_experts = num_experts

    def forward(self, x, context):
        expert = torch.arange(self.num_experts).expand(len(x), -1)  # (T, E)
        chosen = (expert + context.token_ids.unsqueeze(-1) + context.layer) % 2 == 0
        weights = chosen / chosen.sum(-1, keepdim=True)
        logits = torch.zeros(len(x), self.num_experts)
        return make_routing(logits, logits.softmax(-1), weights, expert.where(chosen, -1), None)


def test_a_router_may_have_no_weights_and_no_fixed_number_of_experts(monkeypatch):
    class Config(VariantConfig):
        top_k: int | None = None

    module = types.SimpleNamespace(Config=Config, Router=EveryOtherExpert)
    monkeypatch.setitem(sys.modules, "my_lab.every_other", module)
    monkeypatch.setitem(sys.modules, "my_lab", types.SimpleNamespace())
    model = tiny_model(moe={"router": {"name": "my_lab.every_other"}, "num_experts": 6})
    assert model.config.top_k == 6
    ids = torch.zeros(1, 8, dtype=torch.long)
    out = model(ids, ids)
    assert [r.tokens_per_expert.tolist() for r in out.routings] == [[8, 0] * 3, [0, 8] * 3]
    out.loss.backward()
    grad = model.blocks[0].feed_forward.experts.w1.grad
    assert [bool(g.any()) for g in grad] == [True, False] * 3


# --- initialisation ---


def test_weights_depend_on_seed_name_and_global_expert_id_alone():
    few, many = ({"moe": RESIDUAL_LATENT | {"num_experts": n}} for n in (4, 9))
    small, large = tiny_model(3, **few), tiny_model(3, **many)
    again, other = tiny_model(3, **few), tiny_model(4, **few)
    for name, parameter in small.named_parameters():
        assert torch.equal(parameter, again.get_parameter(name)), name
        if "norm" not in name:
            assert not torch.equal(parameter, other.get_parameter(name)), name
        wide = large.get_parameter(name)
        if ".experts." in name:
            assert torch.equal(wide[:4], parameter), name
        elif "router" not in name:
            assert torch.equal(wide, parameter), name
    # No two experts, layers or matrices share a stream.
    values = [
        round(value.item(), 9)
        for name, p in large.named_parameters()
        if "norm" not in name
        for value in (p.flatten(1)[:, 0] / p.std() if ".experts." in name else [p.flatten()[0]])
    ]
    assert len(set(values)) == len(values)


@pytest.mark.parametrize("moe", [{}, {"latent_size": 7}], ids=str)
def test_experts_of_a_rank_are_those_of_the_whole_model(moe):
    class Share(MoELayer):
        first_expert = 2

        def build_experts(self, config):
            share = config.moe.model_copy(update={"num_experts": 3})
            return super().build_experts(config.model_copy(update={"moe": share}))

    whole = tiny_model(5, moe=moe)
    part = MoETransformer(tiny_config(init_std=0.3, moe=moe), moe_layer=Share)
    init_weights(part, 5)
    for name, parameter in part.named_parameters():
        expected = whole.get_parameter(name)
        assert torch.equal(parameter, expected[2:5] if ".experts." in name else expected), name


@pytest.mark.parametrize(("num_layers", "latent"), [(2, None), (8, None), (8, 32)])
def test_projections_into_the_residual_stream_shrink_with_depth(num_layers, latent):
    moe = {"num_shared_experts": 1, "latent_size": latent}
    model = tiny_model(num_layers=num_layers, hidden_size=64, init_std=0.1, moe=moe)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            assert (parameter == 1).all()
            continue
        into_stream = name.endswith(("wo.weight", "latent_up.weight")) or ".w2" in name
        if latent and name.endswith(".experts.w2"):
            # Their sum goes through latent_up, which alone is scaled.
            into_stream = False
        expected = 0.1 / math.sqrt(2 * num_layers) if into_stream else 0.1
        # Five standard deviations of an estimate from so many values.
        error = 5 / math.sqrt(2 * parameter.numel())
        assert float(parameter.detach().std()) == pytest.approx(expected, rel=error), name
        assert abs(float(parameter.detach().mean())) < 5 * expected / math.sqrt(parameter.numel())


def test_tied_embeddings_are_one_tensor():
    tied, untied = tiny_model(tie_embeddings=True), tiny_model()
    assert tied.head.weight is tied.embedding.weight
    assert untied.head.weight is not untied.embedding.weight
    table = 67 * 24
    assert num_parameters(untied).total - num_parameters(tied).total == table
    assert num_parameters(tied).embedding == table
    ids = tokens(2, 6)
    tied(ids, ids).loss.backward()
    assert torch.count_nonzero(tied.embedding.weight.grad.norm(dim=1)) == 67


def test_first_loss_is_near_log_vocabulary():
    model = tiny_model(init_std=0.02)
    out = model(tokens(4, 32), tokens(4, 32, seed=2))
    assert out.lm_loss.item() == pytest.approx(math.log(67), rel=0.02)


# --- forward ---


@pytest.mark.parametrize(
    "changes",
    [{}, {"feed_forward": "dense"}, {"moe": RESIDUAL_LATENT}],
    ids=str,
)
def test_activation_checkpointing_changes_no_gradient(changes):
    ids = tokens(2, 12)
    document_ids = torch.arange(12).expand(2, 12) // 5
    grads = []
    for checkpointing in (False, True):
        model = tiny_model(**changes)
        model.activation_checkpointing = checkpointing
        model(ids, ids, document_ids).loss.backward()
        grads.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_a_noise_generator_under_activation_checkpointing_is_refused():
    model = tiny_model(moe={"router": {"name": "topk", "jitter": 0.2}})
    model.activation_checkpointing = True
    with pytest.raises(ValueError, match=r"^generator must be None under"):
        model(tokens(1, 4), generator=torch.Generator())
    with torch.no_grad():
        model(tokens(1, 4), generator=torch.Generator())


def test_a_noise_generator_beside_noise_seeds_is_refused():
    model = tiny_model(moe={"router": {"name": "topk", "jitter": 0.2}})
    with pytest.raises(ValueError, match=r"^generator must be None where noise_seeds"):
        model(tokens(1, 4), generator=torch.Generator(), noise_seeds=torch.tensor([3]))


def test_every_parameter_gets_a_gradient():
    model = tiny_model(num_layers=3, moe=RESIDUAL_LATENT | {"num_dense_layers": 1})
    ids = tokens(4, 16)
    model(ids, ids.roll(-1, 1)).loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


def test_equal_steps_give_equal_bits():
    results = []
    for _ in range(2):
        model = tiny_model()
        ids = tokens(4, 16)
        out = model(ids, ids)
        out.loss.backward()
        results.append([out.loss, *[p.grad for p in model.parameters()]])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_bfloat16_by_autocast_is_near_float32():
    # Weights of the real initialisation: with large ones a changed choice dominates.
    model = tiny_model(init_std=0.02)
    ids = tokens(4, 16)
    exact = model(ids, ids)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours = model(ids, ids)
    assert ours.loss.dtype == torch.float32
    assert relative_error(ours.loss, exact.loss) < 1e-3
    for routing in ours.routings:
        assert routing.router_logits.dtype == routing.topk_weights.dtype == torch.float32
    ours.loss.backward()
    assert {p.grad.dtype for p in model.parameters()} == {torch.float32}


def test_logits_are_returned_only_when_wanted():
    model, ids = tiny_model(), tokens(2, 5)
    assert model(ids).logits.shape == (2, 5, 67)
    assert model(ids, ids).logits is None
    assert model(ids, ids, need_logits=True).logits.shape == (2, 5, 67)
    assert model(ids, need_logits=False).logits is None
    assert model(ids).loss is None
    assert len(model(ids).caches) == 2
    assert model(ids, ids).caches == ()


def test_documents_with_a_cache_equal_the_whole_sequence():
    model = tiny_model(dtype=torch.float64).eval()
    seen = []
    model.blocks[0].feed_forward.router.register_forward_pre_hook(
        lambda module, arguments: seen.append(arguments[1])
    )
    ids = tokens(2, 9)
    document_ids = torch.arange(9).expand(2, 9) // 4
    with torch.no_grad():
        whole = model(ids, document_ids=document_ids).logits
        first = model(ids[:, :5], document_ids=document_ids[:, :5])
        rest = model(ids[:, 5:], document_ids=document_ids, caches=first.caches)
    assert relative_error(rest.logits, whole[:, 5:]) < 1e-10
    assert torch.equal(seen[-1].document_ids, document_ids[:, 5:].flatten())
    assert seen[-1].token_ids.shape == seen[-1].document_ids.shape


def test_model_builds_on_meta_and_loads_its_state():
    source = tiny_model(moe={"router": {"name": "topk", "bias_update_rate": 0.01}})
    source.blocks[0].feed_forward.router.expert_bias.copy_(torch.arange(6) / 7)
    with torch.device("meta"):
        model = MoETransformer(source.config)
    model = model.to_empty(device="cpu")
    model.load_state_dict(source.state_dict())
    ids = tokens(2, 6)
    assert torch.equal(model(ids).logits, source(ids).logits)
    assert {"blocks.0.feed_forward.router.expert_bias"} <= set(source.state_dict())
    assert all(
        f"blocks.1.feed_forward.experts.{w}" in source.state_dict() for w in ("w1", "w2", "w3")
    )


def test_expert_bias_survives_casts_of_the_whole_model():
    model = tiny_model(moe={"router": {"name": "topk", "bias_update_rate": 0.01}})
    router = model.blocks[1].feed_forward.router
    router.expert_bias.copy_(7 + torch.arange(6) / 1000)
    before = router.expert_bias.clone()
    state = model.to(torch.bfloat16).state_dict()
    assert torch.equal(state["blocks.1.feed_forward.router.expert_bias"], before)
    restored = tiny_model(dtype=torch.bfloat16, moe={"router": {"name": "topk"}})
    restored.load_state_dict(state)
    bias = restored.blocks[1].feed_forward.router.expert_bias
    assert bias.dtype == torch.float32
    assert torch.equal(bias, before)
