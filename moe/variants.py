"""How does `name: topk` in a config become the code in `moe/routers/topk.py`?

A variant is one module in `moe/routers`, `moe/losses` or `moe/experts`, found by its file name; a
name with a dot (`my_lab.sinkhorn`) is imported as it stands, so a private variant needs no fork.
Each module has a `Config` (a `VariantConfig`) and the class or function that it switches on:

    routers   class Router(config, hidden_size, num_experts), a `moe.router.RouterModule`:
              forward(x, context) -> Routing; it says where it breaks a rule. Config has top_k,
              the K columns of its Routing (unused ones hold -1), None for E; and where a token's
              number of experts varies, experts_per_token, their mean, None if not known
              may_change: its numbers that a run that goes on may change
    losses    function loss(config, routing, context) -> scalar of one layer; Config has a `weight`,
              and says whether it reads_batch_counts, needs_batch_counts or needs_noise
    experts   class Experts(config, num_experts, hidden_size, intermediate_size):
              forward(rows, tokens_per_expert, backend=...) -> rows, where rows behind the last
              expert's are unused; with `fuses_dispatch = True` also forward(x, tokens_per_expert,
              plan=..., topk_weights=..., backend=...) -> (T, D), see `moe.dispatcher`. Config has
              activate(w1 x, w3 x) -> (..., F), of w1 x alone where has_gate is False: what stands
              between the matrices, also in shared experts and dense layers, which need it

A module may have EXAMPLES, settings that the contract's tests try beside the defaults.
"""

import importlib
import pkgutil
from difflib import get_close_matches
from types import ModuleType
from typing import Annotated, Any, ClassVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, SerializeAsAny


def _whole_number(value: Any) -> Any:
    """Accept `1e9` for integers, refuse booleans, and leave the rest to pydantic."""
    if isinstance(value, bool):
        raise ValueError("needs a whole number")
    if isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            return value
    return int(value) if isinstance(value, float) and value.is_integer() else value


def no_boolean(value: Any) -> Any:
    """Refuse a boolean, which Python would take as 0 or 1."""
    if isinstance(value, bool):
        raise ValueError("needs a number")
    return value


Whole = Annotated[int, BeforeValidator(_whole_number)]
Natural = Annotated[int, BeforeValidator(_whole_number), Field(ge=0)]
Count = Annotated[int, BeforeValidator(_whole_number), Field(ge=1)]
Real = Annotated[float, BeforeValidator(no_boolean)]


class Section(BaseModel):
    """Base of every section: frozen, unknown keys forbidden."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class VariantConfig(BaseModel):
    """Base of every variant's `Config`: its file's name, and settings of its own."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    # Whether an expert has three matrices of D and F, or two without a gate.
    has_gate: ClassVar[bool] = True
    # Numbers of a router that a run may change when it goes on, but not to or from None.
    may_change: ClassVar[tuple[str, ...]] = ()

    name: str

    @property
    def label(self) -> str:
        """Its name in logs."""
        return self.name

    def check_experts(self, num_experts: int) -> None:
        """ValueError if a router's settings do not fit the number of experts."""

    @property
    def causal(self) -> bool:
        """False where these settings let a router see later tokens that its class would not."""
        return True

    @property
    def reads_batch_counts(self) -> bool:
        """Whether a loss looks at `LossContext.batch_tokens_per_expert`."""
        return False

    @property
    def needs_batch_counts(self) -> bool:
        """Whether a loss must know the whole step's counts before the first backward pass."""
        return False

    @property
    def needs_noise(self) -> bool:
        """Whether a loss reads what only a router that `draws_noise` has in its Routing."""
        return False


# What the module of a variant has, beside its Config.
PARTS = {"routers": "Router", "losses": "loss", "experts": "Experts"}


def variant_names(kind: str) -> list[str]:
    """The names of the files in `moe/<kind>` (kind: `routers`, `losses` or `experts`)."""
    package = importlib.import_module(f"moe.{kind}")
    return sorted(module.name for module in pkgutil.iter_modules(package.__path__))


def load_variant(kind: str, name: str) -> ModuleType:
    """Import the module of a variant.

    Raises:
        ValueError: if there is no such file; names those that exist, and the nearest one.
    """
    if "." not in name and name not in variant_names(kind):
        known = variant_names(kind)
        near = get_close_matches(name, known, n=1)
        hint = f" (did you mean {near[0]}?)" if near else ""
        raise ValueError(f"no file {name}.py in moe/{kind}{hint}; there are: {', '.join(known)}")
    target = name if "." in name else f"moe.{kind}.{name}"
    try:
        module = importlib.import_module(target)
    # Somebody's own file can hold any mistake.
    except Exception as error:
        raise ValueError(f"cannot import {target}: {type(error).__name__}: {error}") from error
    for part in ("Config", PARTS[kind]):
        if not hasattr(module, part):
            raise ValueError(f"{target} has no {part}, so it is no variant for moe/{kind}")
    if kind == "routers":
        # Not above: routers are built on configs.
        base = importlib.import_module("moe.router").RouterModule
        if not (isinstance(module.Router, type) and issubclass(module.Router, base)):
            raise ValueError(f"{target}.Router must be a moe.router.RouterModule")
    return module


def _resolve(kind: str, value: Any) -> Any:
    """Validate a mapping with the `Config` of the variant that it names."""
    if isinstance(value, VariantConfig):
        return value
    if isinstance(value, str):
        value = {"name": value}
    if not isinstance(value, dict) or not isinstance(value.get("name"), str):
        raise ValueError(f"needs a name: one of {', '.join(variant_names(kind))}")
    return load_variant(kind, value["name"]).Config.model_validate(value)


def _field(kind: str) -> BeforeValidator:
    return BeforeValidator(lambda value: _resolve(kind, value))


RouterConfig = Annotated[SerializeAsAny[VariantConfig], _field("routers")]
LossConfig = Annotated[SerializeAsAny[VariantConfig], _field("losses")]
ExpertsConfig = Annotated[SerializeAsAny[VariantConfig], _field("experts")]
