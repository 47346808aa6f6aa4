"""`cache-builder`: documents → cache. Heavy modules are imported inside the commands, so that --help is instant."""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from types import FrameType
from typing import Any

import click

from storage_schemas.terminal import Group, set_up_logging

_FLAGS = {
    "teacher": "engine.model",
    "engine": "engine.name",
    "dtype": "engine.dtype",
    "tensor_parallel_size": "engine.tensor_parallel_size",
    "dataset": "corpus.dataset",
    "split": "corpus.split",
    "max_length": "corpus.max_length",
    "output": "cache.output",
    "top_k": "cache.top_k",
    "codec": "cache.codec",
    "format": "cache.format",
    "shard_tokens": "cache.shard_tokens",
    "worker": "cache.worker",
}
"""Where each flag of `build` stands in the configuration."""


@click.group(cls=Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="logitcask")
def main() -> None:
    """Run a teacher once over a dataset and keep its top-k log-probabilities."""
    set_up_logging()


@main.command()
@click.option("--teacher", help="Hub name or directory of a transformers model.  [engine.model]")
@click.option("--dataset", help="Hub name, or local .jsonl .parquet .csv .txt, directory or glob.  [corpus.dataset]")
@click.option("--split", help="Split of the dataset; train by default.  [corpus.split]")
@click.option("--max-length", type=int, help="Tokens of a sequence at most.  [corpus.max_length]")
@click.option("--output", help="Where the cache goes; an unfinished one there is continued.  [cache.output]")
@click.option("--top-k", type=int, help="Ids kept of each row; 64 by default.  [cache.top_k]")
@click.option("--codec", help="ld8 (8 bits, default) or ld16 (16 bits, exact for all practice).  [cache.codec]")
@click.option("--format", type=click.Choice(["arrow", "zarr"]), help="Container; arrow by default.  [cache.format]")
@click.option("--shard-tokens", type=int, help="Tokens of a shard; 131072 by default.  [cache.shard_tokens]")
@click.option("--worker", metavar="I/N", help="Build every N-th shard from the I-th on, beside others.  [cache.worker]")
@click.option("--generate", is_flag=True, help="The dataset holds prompts, which the teacher answers.  [generate]")
@click.option("--engine", type=click.Choice(["vllm", "hf"]), help="vllm by default.  [engine.name]")
@click.option("--dtype", help="The checkpoint's own by default.  [engine.dtype]")
@click.option("--tensor-parallel-size", type=int, help="GPUs that share the teacher.  [engine.tensor_parallel_size]")
@click.option("--config", type=click.Path(), help="TOML file with the tables [engine], [corpus], [cache], [generate].")
@click.option("--set", "overrides", multiple=True, metavar="TABLE.KEY=VALUE", help="Any other setting; repeatable.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def build(config: str | None, overrides: Sequence[str], as_json: bool, generate: bool, **flags: Any) -> None:
    """Build a cache, or continue one. The same command again does what is missing; other settings are refused."""
    from cache_builder.config import BuildSettings, GenerateSettings
    from storage_schemas.settings import load_settings

    settings = load_settings(BuildSettings, path=config, overrides=[*_as_overrides(flags), *overrides])
    if generate and settings.generate is None:
        settings = settings.model_copy(update={"generate": GenerateSettings()})
    signal.signal(signal.SIGTERM, _stop)
    from cache_builder.build import run

    try:
        result = run(settings)
    except KeyboardInterrupt:
        click.echo("stopped; committed shards are kept, run the same command again to continue", err=True)
        sys.exit(130)
    if as_json:
        click.echo(json.dumps({**vars(result), "bytes_per_token": result.bytes_per_token}))
        return
    for name, count in result.counts.items():
        if count and name not in ("documents", "sequences", "tokens", "targets"):
            click.echo(f"{name.replace('_', ' ')}: {count:,}", err=True)
    if result.shards_built == 0 and result.sealed:
        click.echo(f"nothing to do: {result.output} is complete")
    click.echo(
        f"{result.output}: {result.sequences:,} sequences, {result.tokens:,} tokens, "
        f"{result.bytes_per_token:.1f} bytes/token, {result.shards_built} of {result.shards} shards built "
        f"in {result.seconds:.0f} s" + ("" if result.sealed else "; other builders are still at work")
    )


@main.command()
@click.option("--teacher", help="Hub name or directory of a transformers model.  [engine.model]")
@click.option("--dataset", help="Hub name, or local .jsonl .parquet .csv .txt, directory or glob.  [corpus.dataset]")
@click.option("--split", help="Split of the dataset; train by default.  [corpus.split]")
@click.option("--max-length", type=int, help="Tokens of a sequence at most.  [corpus.max_length]")
@click.option("--top-k", type=int, help="Ids kept of each row; 64 by default.  [cache.top_k]")
@click.option("--codec", help="ld8 (8 bits, default) or ld16.  [cache.codec]")
@click.option("--engine", type=click.Choice(["vllm", "hf"]), help="vllm by default.  [engine.name]")
@click.option("--dtype", help="The checkpoint's own by default.  [engine.dtype]")
@click.option("--sample", type=int, default=1000, show_default=True, help="Documents to tokenise.")
@click.option(
    "--tokens-per-second", type=click.FloatRange(0, min_open=True), help="The teacher's speed, for the hours."
)
@click.option("--measure", is_flag=True, help="Load the teacher, and measure its speed and the codec's bytes.")
@click.option("--config", type=click.Path(), help="TOML file as for build; what it says of the output is not used.")
@click.option("--set", "overrides", multiple=True, metavar="TABLE.KEY=VALUE", help="Any other setting; repeatable.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def estimate(
    config: str | None,
    overrides: Sequence[str],
    sample: int,
    tokens_per_second: float | None,
    measure: bool,
    as_json: bool,
    **flags: Any,
) -> None:
    """Tell the tokens, bytes and hours of a build from a sample of the documents. Nothing is written."""
    from cache_builder.config import BuildSettings
    from storage_schemas.settings import load_settings

    unused = 'cache.output="unused"'
    settings = load_settings(BuildSettings, path=config, overrides=[*_as_overrides(flags), *overrides, unused])
    from cache_builder.estimate import estimate as run_estimate
    from cache_builder.estimate import render_estimate

    found = run_estimate(settings, sample=sample, tokens_per_second=tokens_per_second, measure=measure)
    click.echo(json.dumps(asdict(found)) if as_json else render_estimate(found))


@main.command()
@click.argument("cache")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def inspect(cache: str, as_json: bool) -> None:
    """Show what a cache is: its identity, its size, and how much of the teacher it kept."""
    from cache_builder.inspection import inspect_cache, render_inspection

    found = inspect_cache(cache)
    click.echo(json.dumps(found) if as_json else render_inspection(found))


def _as_overrides(flags: Mapping[str, Any]) -> list[str]:
    """Flags that were given, as overrides; JSON's strings and numbers are TOML's too."""
    return [f"{_FLAGS[name]}={json.dumps(value)}" for name, value in flags.items() if value is not None]


def _stop(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    main()
