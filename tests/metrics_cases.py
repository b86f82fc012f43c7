"""A run that writes to TensorBoard, and what is read back from there."""

from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from training_cases import EVALUATE_EVERY, NUM_STEPS

# Without noise, so that a forward pass of the test chooses what the run chose.
LOGGED = {
    "model.moe.router": {"name": "topk", "bias_update_rate": 0.02},
    "model.moe.num_dense_layers": 1,
    "model.num_layers": 3,
    "logging.tensorboard": True,
    "logging.heatmap_every": 4,
    "evaluation.sample_prompts": ["moss"],
    "evaluation.sample_tokens": 3,
}
LAYERS = (1, 2)


def read(run_dir: Path) -> EventAccumulator:
    kinds = ("scalars", "images", "histograms", "tensors")
    events = EventAccumulator(str(run_dir / "tensorboard"), size_guidance=dict.fromkeys(kinds, 0))
    return events.Reload()


def values(events: EventAccumulator, tag: str) -> dict[int, float]:
    """Value by step; a step that is there twice is an error."""
    found = events.Scalars(tag)
    steps = [scalar.step for scalar in found]
    assert len(set(steps)) == len(steps), f"{tag} has steps twice: {steps}"
    return {scalar.step: scalar.value for scalar in found}


EVALUATED = [*range(EVALUATE_EVERY, NUM_STEPS + 1, EVALUATE_EVERY), NUM_STEPS]


def tag_of(measure, layer):
    return f"{measure}/layer{layer:02d}"
