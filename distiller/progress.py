"""What a training run shows on stderr and leaves on disk as it goes."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

from tqdm import tqdm
from transformers import TrainerCallback

HISTORY_NAME = "history.jsonl"


class ProgressBar(TrainerCallback):  # type: ignore[misc]
    """Steps done, rate and ETA with the newest loss and the objective's state, on stderr."""

    def __init__(self, objective_keys: tuple[str, ...] = ()) -> None:
        self.objective_keys = objective_keys
        self._bar: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            quiet = not sys.stderr.isatty()  # a log file gets a line now and then
            self._bar = tqdm(
                total=state.max_steps,
                initial=state.global_step,
                desc="train",
                unit="step",
                file=sys.stderr,
                dynamic_ncols=True,
                mininterval=10.0 if quiet else 0.2,
            )

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._bar is not None:
            self._bar.update(state.global_step - self._bar.n)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if self._bar is None or not logs:
            return
        if "eval_kl" in logs:
            figures = f"held-out KL {logs['eval_kl']:.4f} nats, perplexity {logs['eval_perplexity']:.2f}"
            self._bar.write(f"step {state.global_step}: {figures}", file=sys.stderr)
        elif "loss" in logs:
            names = [name for name in ("loss", *self.objective_keys, "learning_rate") if name in logs]
            self._bar.set_postfix({name: f"{logs[name]:.4g}" for name in names}, refresh=False)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None


class HistoryFile(TrainerCallback):  # type: ignore[misc]
    """history.jsonl in the output directory: one JSON object for each log, in step order, also over resumed runs."""

    def __init__(self, output: Path) -> None:
        self.path = output / HISTORY_NAME

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._started = time.monotonic()
        if state.is_world_process_zero:  # what a killed run logged after its checkpoint will be logged again
            lines = [json.dumps(entry) for entry in state.log_history]
            self.path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if state.is_world_process_zero and logs:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({**logs, "step": state.global_step}) + "\n")
