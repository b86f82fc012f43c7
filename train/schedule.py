"""What is the learning rate at a step?"""

import math

from train.config import RunConfig


def learning_rate(step: int, config: RunConfig) -> float:
    """The rate of optimizer step `step`, counted from 0.

    Linear warm-up to `optimizer.learning_rate`, then cosine, constant, or warm-up-stable-decay.
    """
    schedule, peak = config.schedule, config.optimizer.learning_rate
    warmup, total = config.num_warmup_steps, config.num_steps
    if step < warmup:
        return peak * (step + 1) / (warmup + 1)
    floor = schedule.final_fraction
    if schedule.name == "constant":
        return peak
    if schedule.name == "cosine":
        progress = (step - warmup) / max(1, total - 1 - warmup)
        return peak * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress))))
    decay_steps = math.ceil(schedule.decay_fraction * total)
    left = total - 1 - step
    if left >= decay_steps:
        return peak
    return peak * (floor + (1 - floor) * max(0, left) / max(1, decay_steps))
