"""A transformers.Trainer that gets its loss from an objective over cached teacher rows.

dataset = CacheDataset(CacheReader.open("cache"), max_length=512)
trainer = DistillationTrainer(student, make_objective("taid", {}), args, train_dataset=dataset)
trainer.train()
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from accelerate.utils import gather_object
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import ExportableState

from distiller.collate import Collator
from distiller.evaluate import measure_rows, metrics
from distiller.objectives import Objective
from distiller.packing import check_packing, wants_flat_rows
from distiller.stream import CacheDataset, WindowShuffleSampler
from distiller.student import install_loss
from distiller.worst import WorstTarget, WorstTargets
from storage_schemas.errors import RequestError

UNSUPPORTED_ARGUMENTS = {
    "label_smoothing_factor": 0.0,
    "use_liger_kernel": False,
    "auto_find_batch_size": False,
    "train_sampling_strategy": "random",
    "fp16": False,
}
"""TrainingArguments that would change the loss, the order or the batch behind the objective's back, and the one value
each may have."""


WORST_TARGETS = 20
"""How many of the last evaluation are kept in `DistillationTrainer.worst_targets`."""


class DistillationTrainer(Trainer):  # type: ignore[misc]
    """Trains `model` on the rows of a cache with the loss of `objective`, normalised per target token.

    The loss is a sum over the rows that carry loss, divided by their number in the whole optimiser step (all ranks and
    micro-batches), so it does not depend on how a batch is cut. `objective` is updated once per optimiser step and
    travels in checkpoints. `evaluate` measures held-out KL, perplexity and agreement and leaves the objective alone.
    shuffle_window: shards shuffled among each other. chunk_rows: rows of logits held at a time.
    """

    loss_is_scaled_for_ga = True

    def __init__(
        self,
        model: Any,
        objective: Objective,
        args: TrainingArguments,
        *,
        train_dataset: CacheDataset,
        eval_dataset: CacheDataset | Mapping[str, CacheDataset] | None = None,
        shuffle_window: int = 4,
        chunk_rows: int | None = None,
        **kwargs: Any,
    ) -> None:
        for name, only in UNSUPPORTED_ARGUMENTS.items():
            if getattr(args, name, only) != only:
                raise RequestError(
                    f"expected training.{name}={only}, got {getattr(args, name)}; it has no meaning with cached rows"
                )
        if args.n_gpu > 1:
            raise RequestError(
                f"expected one process per GPU, got one process that sees {args.n_gpu}; start it with `torchrun "
                "--nproc-per-node N -m distiller.cli` or show it one GPU by CUDA_VISIBLE_DEVICES"
            )
        args.remove_unused_columns = False  # batches are made of rows, not of the model's argument names
        if args.dataloader_num_workers > 0 and args.dataloader_multiprocessing_context is None:
            args.dataloader_multiprocessing_context = "spawn"  # object stores hang after a fork
        self.objective = objective
        self.shuffle_window = shuffle_window
        self.data_wait_seconds = 0.0
        self.worst_targets: list[WorstTarget] = []
        self._sums: dict[str, torch.Tensor] = {}
        self._since_log: dict[str, float] = {}
        if train_dataset.packing:
            check_packing(model)
        install_loss(model, objective, train_dataset.vocab_size, chunk_rows=chunk_rows)
        collator = kwargs.pop("data_collator", None) or Collator(
            packed=train_dataset.packing,
            flatten=train_dataset.packing and wants_flat_rows(model),
        )
        super().__init__(
            model=model,
            args=args,
            data_collator=collator,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            **kwargs,
        )
        self.model_accepts_loss_kwargs = False
        self._epoch_callback = _EpochCallback()
        self.add_callback(self._epoch_callback)
        self.add_callback(ObjectiveCallback())

    def _get_train_sampler(self, train_dataset: Any = None) -> WindowShuffleSampler:
        dataset = self.train_dataset if train_dataset is None else train_dataset
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        sampler = WindowShuffleSampler(dataset.shard_of, seed=seed, window=self.shuffle_window)
        self._epoch_callback.set_epoch = sampler.set_epoch
        return sampler

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], int]:
        """The micro-batches of one optimiser step, and the rows that carry loss in them over all ranks."""
        started = time.perf_counter()
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        self.data_wait_seconds += time.perf_counter() - started
        rows = torch.tensor([sum(len(batch["row_index"]) for batch in batches)], device=device)
        return batches, int(self.accelerator.gather(rows).sum())

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Loss of one micro-batch such that the mean over ranks of the sum over micro-batches is the mean per row."""
        outputs = model(**inputs)
        for name, value in outputs["sums"].items():
            value = value.detach().double()
            self._sums[name] = self._sums[name] + value if name in self._sums else value
        rows = len(inputs["row_index"]) if num_items_in_batch is None else int(num_items_in_batch)
        loss = outputs["loss_sum"] * (self.accelerator.num_processes / max(rows, 1))
        return (loss, outputs) if return_outputs else loss

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """As inherited, but a checkpoint of a run that had ended does not get one step more."""
        saved = self.state.stateful_callbacks.get("TrainerControl", {}).get("args", {})
        ended = saved.get("should_training_stop", False) or self.state.global_step >= self.state.max_steps
        if self.state.global_step > 0 and ended:
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        self._objective_callback().attach(self)
        return super().training_step(model, inputs, num_items_in_batch)  # type: ignore[no-any-return]

    def update_objective(self) -> None:
        """Hand the objective the sums of one optimiser step over all its micro-batches and ranks."""
        names = list(self._sums)
        values = torch.stack([self._sums[name] for name in names]).tolist() if names else []
        sums: dict[str, float] = {}
        mine = dict(zip(names, values, strict=True))
        for part in gather_object([mine]) if self.accelerator.num_processes > 1 else [mine]:
            for name, value in part.items():
                sums[name] = sums.get(name, 0.0) + value
        self._sums = {}
        if not sums:
            return  # no target in the whole step
        self.objective.update(sums, self.state.global_step, self.state.max_steps)
        for name, value in sums.items():
            self._since_log[name] = self._since_log.get(name, 0.0) + value

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """The Trainer's figures, and with each loss the objective's: its state and its statistics per row."""
        if "loss" in logs:
            self._objective_callback().attach(self)
            sums, self._since_log = self._since_log, {}
            rows = max(sums.get("rows", 0.0), 1.0)
            logs.update({name: value / rows for name, value in sums.items() if name not in ("loss", "rows")})
            logs.update(self.objective.metrics())
        super().log(logs, start_time)

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Held-out figures of `distiller.evaluate.metrics`, named `eval_kl` and so on; ranks share the work."""
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        if dataset is None:
            raise RequestError(
                "expected a held-out dataset to evaluate on, got none; give --eval-cache or data.eval_fraction"
            )
        if isinstance(dataset, Mapping):
            parts = [self.evaluate(part, ignore_keys, f"{metric_key_prefix}_{name}") for name, part in dataset.items()]
            return {name: value for part in parts for name, value in part.items()}
        values = {f"{metric_key_prefix}_{name}": value for name, value in self._measure(dataset).items()}
        self.log(dict(values))
        self.control: Any = self.callback_handler.on_evaluate(self.args, self.state, self.control, values)
        return values

    def _measure(self, dataset: CacheDataset) -> dict[str, float]:
        model = self.model
        training = model.training
        model.eval()

        def measure(batch: Mapping[str, Any]) -> Any:
            with torch.no_grad():
                return model(**batch, measure=True)

        worst = WorstTargets(WORST_TARGETS)
        table = measure_rows(
            measure,
            dataset,
            Collator(packed=dataset.packing, flatten=dataset.packing and wants_flat_rows(model)),
            batch_size=self.args.eval_batch_size,
            device=self.args.device,
            rank=self.accelerator.process_index,
            world_size=self.accelerator.num_processes,
            worst=None if dataset.packing else worst,
        )
        model.train(training)
        self.worst_targets = worst.targets()
        if self.accelerator.num_processes > 1:
            table = sum(gather_object([table]))
            self.worst_targets = worst.merge(gather_object([self.worst_targets]))
        return metrics(table)

    def _objective_callback(self) -> ObjectiveCallback:
        return next(callback for callback in self.callback_handler.callbacks if isinstance(callback, ObjectiveCallback))


class ObjectiveCallback(TrainerCallback, ExportableState):  # type: ignore[misc]
    """Carries the objective's state in checkpoints and says when an optimiser step is due.

    transformers may replace the object when it restores a checkpoint, so the trainer looks it up and attaches itself.
    """

    def __init__(self) -> None:
        self.trainer: DistillationTrainer | None = None
        self.objective: dict[str, Any] | None = None

    def state(self) -> dict[str, Any]:
        current = self.objective if self.trainer is None else self.trainer.objective.state_dict()
        return {"args": {}, "attributes": {"objective": current}}

    def attach(self, trainer: DistillationTrainer) -> None:
        """Once in a run, before its first step: the objective goes on from the checkpoint's state."""
        if self.trainer is not None:
            return
        self.trainer = trainer
        saved = trainer.state.stateful_callbacks[type(self).__name__]["attributes"]["objective"]
        if saved is not None:
            trainer.objective.load_state_dict(saved)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer = None

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        assert self.trainer is not None, "an optimiser step without a training step"
        self.trainer.update_objective()


class _EpochCallback(TrainerCallback):  # type: ignore[misc]
    """Tells the sampler its epoch: what accelerate does itself, except in a run that resumes on several ranks."""

    def __init__(self) -> None:
        self.set_epoch: Callable[[int], None] | None = None

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.set_epoch is not None:
            self.set_epoch(int(state.epoch or 0))
