"""What came out of a run? The page that a person reads at the end, and the same as JSON."""

from typing import Any

from moe.config import ModelConfig
from moe.measures import dead_experts, effective_experts, max_violation
from train.status import format_duration
from train.validation import Evaluation


def summarize(
    evaluation: Evaluation, model: ModelConfig, tokens: int, seconds: float
) -> dict[str, Any]:
    """The run's results as JSON values; means are None without validation text.

    Args: seconds: of training, None if this process had none.
    """
    load = evaluation.tokens_per_expert.sum(0)  # (L, E)
    layers = [
        {
            "layer": layer,
            "max_violation": float(max_violation(load[index])),
            "dead_experts": int(dead_experts(load[index])),
            "effective_experts": float(effective_experts(load[index])),
            "domain_information": float(evaluation.information[index]),
            "domain_information_shuffled": float(evaluation.shuffled_information[index]),
            "domain_divergence": float(evaluation.divergence[index]),
            "repeat_rate": float(evaluation.repeat_rate[index]),
        }
        for index, layer in enumerate(model.moe_layers if evaluation.loss else ())
    ]
    domains = {
        name: {
            "loss": loss,
            "unigram_entropy": evaluation.unigram_entropy[name],
            "gain": evaluation.unigram_entropy[name] - loss,
            "bits_per_byte": evaluation.bits_per_byte[name],
            "tokens": evaluation.num_tokens[name],
        }
        for name, loss in evaluation.loss.items()
    }
    return {
        "training_tokens": tokens,
        "training_seconds": seconds,
        "mean_loss": evaluation.mean_loss if domains else None,
        "mean_gain": evaluation.mean_gain if domains else None,
        "dead_experts": sum(layer["dead_experts"] for layer in layers),
        "domains": domains,
        "layers": layers,
    }


def render_summary(summary: dict[str, Any], num_experts: str) -> str:
    """Loss by domain against what unigrams give, expert use by layer, and samples of text.

    Args: num_experts: of a layer, in words.
    """
    tokens, seconds = summary["training_tokens"], summary["training_seconds"]
    if not summary["domains"]:
        return (
            f"After {tokens:,} training tokens: there is no validation text; give more "
            f"documents, or raise data.validation_fraction"
        )
    lines = [
        f"After {tokens:,} training tokens in {format_duration(seconds)}, on held-out text "
        "(nats per token):",
        "",
        f"  {'domain':<14}{'loss':>8}{'unigram':>10}{'gain':>8}{'bits/byte':>12}",
    ]
    for name, row in summary["domains"].items():
        lines.append(
            f"  {name:<14}{row['loss']:>8.3f}{row['unigram_entropy']:>10.3f}"
            f"{row['gain']:>8.3f}{row['bits_per_byte']:>12.3f}"
        )
    lines.append(f"  {'mean':<14}{summary['mean_loss']:>8.3f}{'':>10}{summary['mean_gain']:>8.3f}")
    if summary["layers"]:
        lines += [
            "",
            f"How its {num_experts} experts a layer are used (domain info: how much of a token's "
            "domain its",
            "expert reveals, 0 to 1; shuffled: the same with domain labels permuted):",
            "",
            f"  {'layer':<8}{'MaxVio':>8}{'dead':>6}{'effective':>11}{'domain info':>13}"
            f"{'shuffled':>10}",
        ]
        for row in summary["layers"]:
            lines.append(
                f"  {row['layer']:<8}{row['max_violation']:>8.2f}{row['dead_experts']:>6}"
                f"{row['effective_experts']:>11.1f}{row['domain_information']:>13.3f}"
                f"{row['domain_information_shuffled']:>10.3f}"
            )
    if summary.get("samples"):
        lines += ["", f"What it writes after {tokens:,} tokens:", ""]
        lines += [f"  {text}" for text in summary["samples"]]
    return "\n".join(lines)
