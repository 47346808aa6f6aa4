"""`distiller`: cache → student. Heavy modules are imported inside the commands, so that --help is instant."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping, Sequence
from typing import Any

import click

from storage_schemas.terminal import Group, set_up_logging


@click.group(cls=Group, context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.version_option(package_name="logitcask")
def main() -> None:
    """Train a student from a teacher's cached log-probabilities; the teacher is not needed."""
    set_up_logging(logging.INFO if _is_first_rank() else logging.ERROR)


@main.command("init-student")
@click.option("--model", required=True, help="Hub name or directory of the model to take layers from.")
@click.option("--output", required=True, help="Directory to write the student to; new or empty.")
@click.option("--keep-layers", type=int, help="How many layers to keep, evenly spread, first and last included.")
@click.option("--layers", help="Which layers to keep, for example 0,2,5-9.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def init_student_command(model: str, output: str, keep_layers: int | None, layers: str | None, as_json: bool) -> None:
    """Make a student from a model's own layers, with its tokenizer."""
    from distiller.init_student import init_student

    _quieten()
    made = init_student(model, output, keep_layers=keep_layers, layers=layers)
    if as_json:
        click.echo(json.dumps({"output": output, **vars(made)}))
        return
    click.echo(f"kept layers {', '.join(map(str, made.layers))} of {made.model_layers}")
    click.echo(f"{made.parameters:,} of {made.model_parameters:,} parameters in {output}")


_FLAGS = {
    "output": "output",
    "student": "student.path",
    "freeze_embeddings": "student.freeze_embeddings",
    "cache": "data.cache",
    "eval_cache": "data.eval_cache",
    "max_length": "data.max_length",
    "objective": "objective.name",
    "max_steps": "training.max_steps",
    "num_train_epochs": "training.num_train_epochs",
    "per_device_train_batch_size": "training.per_device_train_batch_size",
    "gradient_accumulation_steps": "training.gradient_accumulation_steps",
    "learning_rate": "training.learning_rate",
    "seed": "training.seed",
    "bf16": "training.bf16",
}
"""Where each flag of `train` stands in the configuration."""


@main.command("train")
@click.option("--cache", help="Cache to train on: a path or an object-store URL.  [data.cache]")
@click.option("--student", help="Hub name or directory of the student to train.  [student.path]")
@click.option("--output", help="Directory for the trained student.  [output]")
@click.option("--objective", help="taid, cross_entropy, forward_kl, ...  [objective.name, taid if not set]")
@click.option("--max-steps", type=int, help="Optimiser steps; overrides --num-train-epochs.")
@click.option("--num-train-epochs", type=float, help="Passes over the cache.")
@click.option("--per-device-train-batch-size", type=int, help="Rows of a micro-batch.")
@click.option("--gradient-accumulation-steps", type=int, help="Micro-batches of an optimiser step.")
@click.option("--learning-rate", type=float, help="Peak learning rate.")
@click.option("--max-length", type=int, help="Tokens of a row; longer sequences are cut.  [data.max_length]")
@click.option("--eval-cache", help="Held-out cache, measured before and after.  [data.eval_cache]")
@click.option("--seed", type=int, help="Order of the rows, dropout.")
@click.option("--bf16/--no-bf16", default=None, help="Compute in bfloat16 autocast.")
@click.option(
    "--freeze-embeddings", is_flag=True, default=None, help="Keep embeddings as they are, tied output layer too."
)
@click.option("--config", "config_path", help="TOML file with any setting.")
@click.option("--set", "overrides", multiple=True, metavar="SECTION.KEY=VALUE", help="Any setting; overrides all else.")
@click.option("--resume", is_flag=True, help="Go on from the last complete checkpoint in --output.")
@click.option("--dry-run", is_flag=True, help="Check everything and print the counts; train and write nothing.")
@click.option("--json", "as_json", is_flag=True, help="Print the summary as JSON.")
def train_command(
    config_path: str | None, overrides: Sequence[str], resume: bool, dry_run: bool, as_json: bool, **flags: Any
) -> None:
    """Train a student on a cache.

    Every flag is also a setting of the TOML file: [student], [data], [objective] with the objective's own options, and
    [training] with transformers' TrainingArguments under their own names.
    """
    from distiller.config import TrainSettings
    from storage_schemas.settings import load_settings

    given = [f"{_FLAGS[name]}={json.dumps(value)}" for name, value in flags.items() if value is not None]
    settings = load_settings(TrainSettings, path=config_path, overrides=[*given, *overrides])
    if dry_run:
        from distiller.dry_run import dry_run as plan

        _quieten()
        _print_figures(plan(settings), as_json)
        return
    from distiller.train import train

    _quieten()
    summary = train(settings, resume=resume)
    if _is_first_rank():
        _print_figures(summary, as_json)


@main.command("evaluate")
@click.option("--student", required=True, help="Hub name or directory of the student.")
@click.option("--cache", required=True, help="Held-out cache: a path or an object-store URL.")
@click.option("--max-length", type=int, help="Tokens of a row; longer sequences are cut.")
@click.option("--targets", type=click.Choice(["completion", "all"]), default="completion", help="Tokens to measure.")
@click.option("--batch-size", type=int, default=8, help="Rows of a batch.")
@click.option("--bf16/--no-bf16", default=False, help="Compute in bfloat16 autocast.")
@click.option("--bootstrap-samples", type=int, default=0, help="Draws of whole documents for 95 % intervals; 0: none.")
@click.option("--json", "json_path", metavar="FILE", help="Write the figures as JSON; - for stdout.")
def evaluate_command(student: str, cache: str, json_path: str | None, **options: Any) -> None:
    """Measure how close a student is to the cache's teacher, on sequences it was not trained on."""
    from distiller.evaluate import evaluate_path

    _quieten()
    figures = evaluate_path(student, cache, **options)
    if json_path is not None and json_path != "-":
        with open(json_path, "w", encoding="utf-8") as file:
            file.write(json.dumps(figures, indent=1) + "\n")
    _print_figures(figures, json_path == "-")


@main.command("report")
@click.argument("runs", nargs=-1, required=True)
@click.option("--output", default="report.html", help="The page to write.")
def report_command(runs: Sequence[str], output: str) -> None:
    """Show training runs on one HTML page: curves, settings that differ, the worst held-out targets."""
    from distiller.report import write_report

    write_report(runs, output)
    click.echo(output)


def _is_first_rank() -> bool:
    """Whether this is the process that speaks for all that torchrun or accelerate started."""
    return os.environ.get("RANK", "0") == "0"


def _quieten() -> None:
    """transformers' bars for every file it loads would drown ours."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()


def _print_figures(figures: Mapping[str, Any], as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps(figures, indent=1))
        return
    width = max(len(name) for name in figures)
    for name, value in figures.items():
        if value is None:
            continue
        text = f"{value:.6g}" if isinstance(value, float) else str(value)
        click.echo(f"{name.replace('_', ' '):<{width}}  {text}")


if __name__ == "__main__":
    main()
