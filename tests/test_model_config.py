"""Is each mistake in a model's config named, and does the config place its parts?"""

import sys
import types
from pathlib import Path

import pytest
import torch
from model_cases import tiny_config, tiny_model, tokens
from pydantic import ValidationError
from variant_cases import variant_cases

from moe.config import ModelConfig, dense_equivalent
from moe.layer import DenseFeedForward, MoELayer
from moe.model import MoETransformer
from moe.variants import PARTS, VariantConfig, load_variant

ROUTERS = Path(__file__).parent.parent / "moe/routers"

MISTAKES = {
    "model.hidden_size (24) must be a multiple of model.attention.num_heads (5), or give "
    "model.attention.head_dim": {"attention": {"num_heads": 5, "num_kv_heads": 5}},
    "model.attention.head_dim (3) must be even: RoPE rotates pairs": {"attention": {"head_dim": 3}},
    "model.attention.num_heads (4) must be a multiple of model.attention.num_kv_heads (3)": {
        "attention": {"num_kv_heads": 3}
    },
    "model.moe.router.top_k (7) must not exceed model.moe.num_experts (6)": {
        "moe": {"router": {"name": "topk", "top_k": 7}}
    },
    "model.moe.num_dense_layers (2) and model.moe.moe_layer_every (1) leave no routed layer among "
    "model.num_layers (2); lower them, or set model.feed_forward: dense": {
        "moe": {"num_dense_layers": 2}
    },
    "model.moe.num_dense_layers (0) and model.moe.moe_layer_every (3) leave no routed layer among "
    "model.num_layers (2); lower them, or set model.feed_forward: dense": {
        "moe": {"moe_layer_every": 3}
    },
    "model.moe.shared_intermediate_size (9) has no effect while model.moe.num_shared_experts is 0; "
    "remove it or add shared experts": {"moe": {"shared_intermediate_size": 9}},
    "model.moe.shared_gate (softmax) has no effect while model.moe.num_shared_experts is 0; remove "
    "it or add shared experts": {"moe": {"shared_gate": "softmax"}},
    "model.moe.latent_size (25) must not exceed model.hidden_size (24): a latent that is wider "
    "holds no more and costs more; lower it, or remove it for experts of the full width": {
        "moe": {"latent_size": 25}
    },
    "model.moe.losses names router_z_loss twice; keep one line": {
        "moe": {"losses": [{"name": "router_z_loss"}, {"name": "router_z_loss", "weight": 1}]}
    },
    "model.moe.losses names load, which needs a router that draws noise on its logits; "
    "model.moe.router.name (topk) does not: take noisy_topk, or another loss, such as importance": {
        "moe": {"losses": [{"name": "importance"}, {"name": "load"}]}
    },
    "normalize (True) with top_k (1) makes every weight 1, so the router would get no gradient; "
    "set normalize: false or top_k of at least 2": {
        "moe": {"router": {"top_k": 1, "name": "topk"}}
    },
    "no file topc.py in moe/routers (did you mean topk?); there are: "
    + ", ".join(path.stem for path in sorted(ROUTERS.glob("[!_]*.py"))): {
        "moe": {"router": {"name": "topc"}}
    },
    "cannot import no_lab.router: ModuleNotFoundError: No module named 'no_lab'": {
        "moe": {"router": {"name": "no_lab.router"}}
    },
    "needs a whole number": {"num_layers": True},
    "needs a number": {"init_std": True},
    "Input should be greater than 0": {"norm_eps": 0.0},
    "Input should be greater than or equal to 1": {"num_layers": 0},
    "Input should be a finite number": {"init_std": float("nan")},
    "Input should be 'none', 'head' or 'projection'": {"attention": {"qk_norm": "both"}},
    "Extra inputs are not permitted": {"hidden": 3},
}


@pytest.mark.parametrize("message", MISTAKES)
def test_each_mistake_of_a_config_is_named(message):
    with pytest.raises(ValidationError) as caught:
        tiny_config(**MISTAKES[message])
    assert [e["msg"].removeprefix("Value error, ") for e in caught.value.errors()] == [message]


@pytest.mark.parametrize("kind", PARTS)
def test_settings_of_every_variant_are_read_back_as_they_were_written(kind):
    for name, settings in variant_cases(kind):
        schema = load_variant(kind, name).Config
        config = schema(name=name, **settings)
        assert schema.model_validate(config.model_dump(mode="json")) == config


def test_experts_of_a_token_where_their_number_varies():
    for router, wanted in (
        ({"name": "topk", "top_k": 3}, 3),
        ({"name": "relu", "target": 1.5}, 1.5),
        ({"name": "top_p", "target": 2.5}, 2.5),
        ({"name": "top_p", "max_experts": 4}, 4),
        ({"name": "top_p"}, 6),
        ({"name": "sequence_topk", "experts_per_token": 1.5}, 1.5),
    ):
        moe = {"router": router, "allow_non_causal": True}
        assert tiny_config(moe=moe).experts_per_token == wanted
        known = router["name"] != "top_p" or "target" in router
        assert tiny_config(moe=moe).knows_experts_per_token == known
        other = moe | {"router": {"name": "hash"}, "layers": [{"layers": [1], "router": router}]}
        assert tiny_config(moe=other).knows_experts_per_token == known
        # Two of eight choices cost nothing; the most there can be is the same with them.
        costless = tiny_config(moe=moe | {"num_zero_experts": 2})
        assert costless.choices_per_token == (8 if router == {"name": "top_p"} else wanted)
        assert costless.experts_per_token == (wanted * 6 / 8 if known else wanted)


def test_a_config_is_frozen_and_writes_itself():
    config = tiny_config(moe={"router": {"name": "topk", "score": "sigmoid", "top_k": 3}})
    with pytest.raises(ValidationError):
        config.num_layers = 3
    dumped = config.model_dump()
    assert dumped["moe"]["router"]["score"] == "sigmoid"
    assert ModelConfig.model_validate(dumped) == config


def test_whole_numbers_may_be_written_as_1e3():
    assert (
        tiny_config(vocab_size="1e3").vocab_size == tiny_config(vocab_size=1e3).vocab_size == 1000
    )
    with pytest.raises(ValidationError):
        tiny_config(vocab_size=1.5)


@pytest.mark.parametrize(
    ("num_dense_layers", "every", "routed"),
    [(0, 1, (0, 1, 2, 3, 4, 5)), (0, 2, (1, 3, 5)), (1, 1, (1, 2, 3, 4, 5)), (2, 2, (3, 5))],
)
def test_routed_layers_lie_where_the_config_says(num_dense_layers, every, routed):
    model = tiny_model(
        num_layers=6, moe={"num_dense_layers": num_dense_layers, "moe_layer_every": every}
    )
    assert model.config.moe_layers == routed
    kinds = [type(block.feed_forward) for block in model.blocks]
    assert kinds == [MoELayer if i in routed else DenseFeedForward for i in range(6)]
    assert len(model(tokens(1, 4)).routings) == len(routed)
    dense = tiny_model(num_layers=6, feed_forward="dense")
    out = dense(tokens(1, 4), tokens(1, 4))
    assert (out.routings, out.aux_losses, dense.config.moe_layers) == ((), (), ())


def test_vocabulary_must_be_known():
    with pytest.raises(ValueError) as caught:
        MoETransformer(tiny_config(vocab_size=None))
    assert str(caught.value) == "model.vocab_size (None) must be set, by the tokenizer or by hand"


def test_experts_without_an_activation_can_be_neither_shared_nor_dense(monkeypatch):
    module = types.SimpleNamespace(Config=VariantConfig, Experts=object)
    monkeypatch.setitem(sys.modules, "my_lab.whole", module)
    monkeypatch.setitem(sys.modules, "my_lab", types.SimpleNamespace())
    experts = {"experts": {"name": "my_lab.whole"}}
    whole = tiny_config(moe=experts)
    refused = (
        r"model\.moe\.experts\.name \(my_lab\.whole\): its Config must have activate, which "
        r"shared experts and dense layers use too"
    )
    for moe in ({"num_shared_experts": 1}, {"num_dense_layers": 1}):
        with pytest.raises(ValidationError, match=refused):
            tiny_config(moe=experts | moe)
    with pytest.raises(ValueError, match=f"^{refused}$"):
        MoETransformer(dense_equivalent(whole))


def test_a_router_that_declares_nothing_is_refused(monkeypatch):
    for router in (torch.nn.Module, "no class"):
        module = types.SimpleNamespace(Config=VariantConfig, Router=router)
        monkeypatch.setitem(sys.modules, "my_lab.silent", module)
        monkeypatch.setitem(sys.modules, "my_lab", types.SimpleNamespace())
        with pytest.raises(ValidationError, match=r"silent\.Router must be a moe"):
            tiny_config(moe={"router": {"name": "my_lab.silent"}})


def test_a_private_variant_is_found_by_its_dotted_name(tmp_path, monkeypatch):
    (tmp_path / "my_lab").mkdir()
    (tmp_path / "my_lab" / "sinkhorn.py").write_text(
        "from typing import Literal\n"
        "from moe.routers.topk import Config as TopKConfig, Router\n"
        "class Config(TopKConfig):\n    name: Literal['my_lab.sinkhorn']\n    rounds: int = 3\n",
        encoding="utf-8",
    )
    monkeypatch.syspath_prepend(tmp_path)
    router = {"name": "my_lab.sinkhorn", "rounds": 5}
    model = tiny_model(moe={"router": router})
    assert model.config.moe.router.rounds == 5
    assert model.config.model_dump()["moe"]["router"]["rounds"] == 5
