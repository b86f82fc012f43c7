"""Where do routed layers differ from each other? The entries of `model.moe.layers`, checked."""

from collections.abc import Sequence
from typing import Annotated, Any

from pydantic import BaseModel, Field

from moe.variants import Count, Natural, RouterConfig, Section


class LayerOverride(Section):
    """What some routed layers have in place of what `model.moe` says of all.

    layers: numbers of their blocks, from 0. num_experts, intermediate_size, router (whole, with its
    top_k): as in `model.moe`; None where they do not differ.
    """

    layers: Annotated[tuple[Natural, ...], Field(min_length=1)]
    num_experts: Count | None = None
    intermediate_size: Count | None = None
    router: RouterConfig | None = None

    @property
    def settings(self) -> dict[str, Any]:
        """What it sets, by the name in `model.moe`."""
        return {name: value for name, value in self if name != "layers" and value is not None}


def check_overrides(moe: BaseModel, overrides: Sequence[LayerOverride], routed: set[int]) -> None:
    """Refuse entries that contradict each other, name a block without experts, or change nothing.

    Args: moe: what holds where nothing else is said. routed: numbers of the blocks with experts.
    Raises:
        ValueError: naming the entry.
    """
    seen: set[int] = set()
    for place, override in enumerate(overrides):
        entry = f"model.moe.layers.{place}"
        for layer in override.layers:
            if layer not in routed:
                known = ", ".join(map(str, sorted(routed))) or "none"
                raise ValueError(
                    f"{entry}.layers ({layer}) must be a block with routed experts; there are: "
                    f"{known}"
                )
            if layer in seen:
                raise ValueError(
                    f"{entry}.layers ({layer}) names a block for the second time; keep one"
                )
            seen.add(layer)
        if not override.settings:
            raise ValueError(
                f"{entry} has no effect: it sets none of num_experts, intermediate_size and "
                f"router; remove it"
            )
        for name, value in override.settings.items():
            if value == getattr(moe, name):
                shown = f" ({value})" if isinstance(value, int) else ""
                raise ValueError(
                    f"{entry}.{name}{shown} has no effect: model.moe.{name} is the same; remove it"
                )
