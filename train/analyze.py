"""What did the experts of a trained model learn? `python -m train.analyze RUN`.

Reads the run's held-out text with a checkpoint and writes into RUN/analysis/step_XXXXXXXX:

    routes.parquet   the experts and weights of every token in every routed layer
    analysis.json    every number of the report
    report.html      the report, one file that needs no network
"""

import argparse
import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moe.model import MoETransformer, num_parameters
from moe.variants import load_variant
from train.analysis_routes import (
    LEAST_OCCURRENCES,
    RouteCounts,
    TextSample,
    count_routes,
    layer_numbers,
    permuted_vocabulary,
    top_tokens,
)
from train.analysis_text import HeldOutText
from train.checkpoint import Checkpoint
from train.config import RunConfig
from train.data import PreparedData, prepare_data
from train.errors import ConfigError, DataError
from train.expert_ablation import ablate_experts
from train.generate import check_device, load_trained_model, open_run, trained_config
from train.program import guarded
from train.report import describe, json_text, render_html
from train.route_table import RouteTable
from train.run_directory import (
    SAVING,
    check_directory,
    make_directory,
    storage_errors,
    sync_directory,
)
from train.saturation import COMPARED_TOKENS, compare_checkpoints, training_curve
from train.status import format_layers
from train.token_text import running_text, token_name

# Of analysis.json; changes when a reader of the old one would go wrong.
VERSION = 1
FILES = ("routes.parquet", "analysis.json", "report.html")
NUM_TOP_EXPERTS = 10


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m train.analyze",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run", type=Path, help="the run's output_dir")
    parser.add_argument("--step", type=int, metavar="N", help="checkpoint, by default the newest")
    parser.add_argument(
        "--against", type=int, metavar="STEP", help="another checkpoint to compare with in full"
    )
    parser.add_argument("--output", type=Path, metavar="DIR", help="the folder to write into")
    parser.add_argument(
        "--tokens", type=int, metavar="N", help="at most, of each domain (data.validation_tokens)"
    )
    parser.add_argument(
        "--ablation-tokens",
        type=int,
        default=2048,
        metavar="N",
        help="on which each expert is switched off once, of all domains; 0 leaves that out (2048)",
    )
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the program; returns the exit code."""
    options = _parser().parse_args(argv)

    def program() -> int:
        check_device(options.device)
        checkpoint = open_run(options.run, options.step)
        config = trained_config(options.run, checkpoint)
        _check(options, checkpoint.step, config)
        output = options.output or options.run / "analysis" / f"step_{checkpoint.step:08d}"
        _check_output(output, options.run)
        data = _data_of_run(options, config, checkpoint)
        model = load_trained_model(options.run, checkpoint, options.device)
        with storage_errors(output, setting="--output"), _whole_files(output) as paths:
            analysis = _analyse(options, checkpoint.step, config, data, model, paths[FILES[0]])
            paths["analysis.json"].write_bytes(json_text(analysis).encode())
            paths["report.html"].write_bytes(render_html(analysis).encode())
        print(describe(analysis))
        for name in FILES:
            print(output / name)
        return 0

    return guarded(program, "lower --ablation-tokens, or take a machine with more memory")


# ---- what cannot be is refused before anything is read or written


def _check(options: argparse.Namespace, step: int, config: RunConfig) -> None:
    seq_len, domains = config.training.seq_len, len(config.data.domains)
    if not config.model.moe_layers:
        raise ConfigError(
            f"{options.run} has no routed layer (model.feed_forward: dense), so there are no "
            f"experts to analyse; give a run with model.feed_forward: moe"
        )
    if options.tokens is not None and not seq_len <= options.tokens < 2**31:
        raise ConfigError(
            f"--tokens ({options.tokens}) is out of range; needs training.seq_len ({seq_len}), one "
            f"sequence of each domain, to 2^31 - 1"
        )
    if options.ablation_tokens and not domains <= options.ablation_tokens < 2**31:
        raise ConfigError(
            f"--ablation-tokens ({options.ablation_tokens}) is out of range; needs 0 (none), or "
            f"{domains} (one of each domain) to 2^31 - 1"
        )
    if options.against is not None:
        if options.against == step:
            raise ConfigError(
                f"--against ({step}) is the analysed step itself; name another one, or another "
                f"--step"
            )
        # Sound, or not there: known now, not after minutes.
        open_run(options.run, options.against)


def _check_output(output: Path, run: Path) -> None:
    if (run / "checkpoints").resolve() in (output.resolve(), *output.resolve().parents):
        raise ConfigError(f"--output ({output}) lies among the checkpoints; choose another place")
    check_directory(output, "--output", setting="--output")
    for name in FILES:
        if (output / name).is_dir():
            raise ConfigError(f"{output / name} is a folder; move it away, or choose --output")


def _data_of_run(
    options: argparse.Namespace, config: RunConfig, checkpoint: Checkpoint
) -> PreparedData:
    """The text of the run, which must be what it was trained on, its held-out part too."""
    data = prepare_data(config.data, config.tokenizer, progress=sys.stderr.isatty())
    identity = checkpoint.state["identity"]
    found = {"fingerprint": data.fingerprint, "domains": list(data.domain_names)}
    if any(identity["data"][key] != value for key, value in found.items()):
        raise ConfigError(
            f"{options.run}: the text that its config names (data.domains) is not what the model "
            f"was trained with, so what is held out now may have been read in training; put the "
            f"text back as it was, or train again"
        )
    if not any(data.validation_tokens[name] >= 2 for name in data.domain_names):
        raise DataError(
            f"{options.run} has no validation text to analyse; train with more documents, or a "
            f"larger data.validation_fraction"
        )
    return data


@contextlib.contextmanager
def _whole_files(folder: Path) -> Iterator[dict[str, Path]]:
    """Where to write each of FILES; they take their names together at the end, or not at all."""
    make_directory(folder)
    paths = {name: folder / (SAVING + name) for name in FILES}
    try:
        yield paths
        for name, path in paths.items():
            with path.open("rb") as file:
                os.fsync(file.fileno())
            os.replace(path, folder / name)
        sync_directory(folder)
    finally:
        for path in paths.values():
            path.unlink(missing_ok=True)


# ---- the numbers


def _analyse(
    options: argparse.Namespace,
    step: int,
    config: RunConfig,
    data: PreparedData,
    model: MoETransformer,
    table_path: Path,
) -> dict[str, Any]:
    """Write the table of routes; returns what analysis.json holds."""
    layers, top_k = config.model.moe_layers, config.model.top_k
    tokens = options.tokens or config.data.validation_tokens
    text = HeldOutText(data, config, tokens, shorten=False)
    with table_path.open("wb") as file:
        table = RouteTable(file, data.domain_names, layers, top_k)
        counts, sample = count_routes(model, text, table)
        table.close()
    frequent, num_tokens = counts.statistics.vocabulary.token_ids, int(counts.tokens.sum())
    control = permuted_vocabulary(table_path, config.model, frequent, num_tokens)
    analysis = {
        "version": VERSION,
        **_facts(options, step, config, model),
        **_counted(counts, data),
        "layers": layer_numbers(counts, control),
        "vocabulary": {
            "num_token_ids": len(frequent),
            "least_occurrences": LEAST_OCCURRENCES,
            "top_tokens": top_tokens(counts),
        },
        "text": _readable(sample, data),
        "ablation": _ablation(options.ablation_tokens, config, data, model),
        # Last: the model gets other weights there.
        "saturation": _saturation(options, step, config, data, model),
    }
    analysis["token_names"] = _names(analysis, data)
    return analysis


def _facts(
    options: argparse.Namespace, step: int, config: RunConfig, model: MoETransformer
) -> dict[str, Any]:
    """What was analysed, and on what."""
    size = num_parameters(model)
    return {
        "run": str(options.run),
        "step": step,
        "trained_tokens": step * config.tokens_per_step,
        "device": model.embedding.weight.device.type,
        "torch": torch.__version__,
        "seq_len": config.training.seq_len,
        "model": {
            "num_layers": config.model.num_layers,
            "moe_layers": list(config.model.moe_layers),
            # The largest of any layer; `layers` has those of each.
            "num_experts": config.model.num_choices,
            "top_k": config.model.top_k,
            "num_shared_experts": config.model.moe.num_shared_experts,
            "router": format_layers(
                config.model.at(layer).moe.router.name for layer in config.model.moe_layers
            ),
            "hidden_size": config.model.hidden_size,
            "vocab_size": config.model.vocab_size,
            "parameters": size.total,
            "active_parameters": size.active,
        },
    }


def _counted(counts: RouteCounts, data: PreparedData) -> dict[str, Any]:
    """Counts of assignments, and the loss; domains without text are left out."""
    present = [index for index, number in enumerate(counts.tokens.tolist()) if number]
    names = [data.domain_names[index] for index in present]
    loss = (counts.losses / counts.labels.clamp(min=1))[present].tolist()
    statistics, model = counts.statistics, counts.config
    num_experts, top_k = model.choices_of_layers, model.top_k_of_layers
    pairs = [
        together[:number, :number].long().tolist() if k > 1 else None
        for together, number, k in zip(statistics.co_activation, num_experts, top_k, strict=True)
    ]
    load = statistics.load[present].transpose(0, 1)  # (L, domains, E)
    by_layer = [each[:, :number].tolist() for each, number in zip(load, num_experts, strict=True)]
    return {
        "domains": names,
        "tokens": dict(zip(names, counts.tokens[present].tolist(), strict=True)),
        "predicted_tokens": dict(zip(names, counts.labels[present].long().tolist(), strict=True)),
        "loss": {"domains": dict(zip(names, loss, strict=True)), "mean": sum(loss) / len(loss)},
        # (domains, layers, experts), and (layers, experts, experts), of each layer's own experts;
        # null where a token has one expert.
        "load": [list(each) for each in zip(*by_layer, strict=True)],
        "co_activation_counts": pairs if any(pairs) else None,
    }


def _readable(sample: TextSample, data: PreparedData) -> list[dict[str, Any]]:
    """The sample with `shown`, what each token adds to the text."""
    parts = sample.numbers()
    for part in parts:
        ids, starts = part["token_ids"], part["starts"]
        part["shown"] = [
            shown
            for start, end in zip(starts, [*starts[1:], len(ids)], strict=True)
            for shown in running_text(data.tokenizer, ids[start:end])
        ]
    return parts


def _ablation(
    tokens: int, config: RunConfig, data: PreparedData, model: MoETransformer
) -> dict[str, Any]:
    """Rise of the loss without each expert, or why there is none: `skipped`."""
    if not tokens:
        return {"skipped": "left out by --ablation-tokens 0"}
    model_config = config.model
    for router in (model_config.at(layer).moe.router.name for layer in model_config.moe_layers):
        if not load_variant("routers", router).Router.replays:
            return {
                "skipped": f"the router {router} cannot take routes (it has no `replays = True`)"
            }
    each = tokens // len(data.domain_names)
    found = ablate_experts(model, HeldOutText(data, config, each, shorten=True))
    present = [index for index, number in enumerate(found.labels.tolist()) if number]
    names = [data.domain_names[index] for index in present]
    mean = found.mean_rise  # (L, E)
    num_experts = model_config.choices_of_layers
    places = [(layer, e) for layer, number in enumerate(num_experts) for e in range(number)]
    places.sort(key=lambda place: -float(mean[place]))
    top = []
    for layer, expert in places[:NUM_TOP_EXPERTS]:
        by_domain = found.rise[present, layer, expert].tolist()
        top.append(
            {
                "layer": config.model.moe_layers[layer],
                "expert": expert,
                "rise": float(mean[layer, expert]),
                "domain": names[by_domain.index(max(by_domain))],
                "domain_rise": max(by_domain),
            }
        )

    def own(values: Tensor) -> list[list[float]]:
        """(L, E) without what is no expert of a layer."""
        return [row[:number].tolist() for row, number in zip(values, num_experts, strict=True)]

    return {
        "predicted_tokens": int(found.labels.sum()),
        "loss": dict(zip(names, found.loss[present].tolist(), strict=True)),
        "assignments": own(found.assignments),
        "rise": own(mean),
        "rise_by_domain": dict(zip(names, map(own, found.rise[present]), strict=True)),
        "top_experts": top,
    }


def _saturation(
    options: argparse.Namespace,
    step: int,
    config: RunConfig,
    data: PreparedData,
    model: MoETransformer,
) -> dict[str, Any]:
    def warn(message: str) -> None:
        print(f"warning: {message}", file=sys.stderr)

    each = max(1, COMPARED_TOKENS // len(data.domain_names))
    text = HeldOutText(data, config, each, shorten=True)
    found = compare_checkpoints(options.run, step, model, text, against=options.against, warn=warn)
    layers, top_k = len(config.model.moe_layers), config.model.top_k
    return {**found, "training": training_curve(options.run, layers, top_k, warn)}


def _names(analysis: dict[str, Any], data: PreparedData) -> dict[str, str]:
    """The tokens that the report shows, by their id, as in `token_name`."""
    ids = {token for part in analysis["text"] for token in part["token_ids"]}
    for by_layer in analysis["vocabulary"]["top_tokens"].values():
        ids |= {token["token_id"] for layer in by_layer for top in layer for token in top}
    return {str(token): token_name(data.tokenizer, token) for token in sorted(ids)}


if __name__ == "__main__":
    sys.exit(main())
