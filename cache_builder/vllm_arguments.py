"""A teacher's settings as vLLM's engine arguments. No vllm import: what vLLM knows is handed in."""

from __future__ import annotations

import difflib
import os
from collections.abc import Collection
from typing import Any

from cache_builder.engine_settings import EngineSettings
from cache_builder.vllm_capture import CaptureExtension
from storage_schemas.errors import RequestError

FIXED: dict[str, Any] = {
    "skip_tokenizer_init": True,  # ids in, ids out
    "enable_prefix_caching": False,  # a cached prefix is never computed, so its rows would be missing
    "worker_extension_cls": f"{CaptureExtension.__module__}.{CaptureExtension.__qualname__}",
}
_OURS = {"name", "head_dtype", "max_model_len", "capture_path", "extra_args"}
_CPU_KV_CACHE_BYTES = 2 << 30


def engine_arguments(settings: EngineSettings, known: Collection[str], on_cpu: bool) -> dict[str, Any]:
    """Arguments of vllm.LLM but for max_model_len and max_logprobs.

    known: the engine arguments that this vLLM has. Raises RequestError for one that it does not have or that is set
    elsewhere.
    """
    arguments = settings.model_dump(exclude_none=True, exclude=_OURS)
    for name in settings.extra_args:
        if name not in known:
            close = difflib.get_close_matches(name, sorted(known), n=1)
            hint = f"did you mean {close[0]!r}?" if close else "see the fields of vllm.EngineArgs"
            raise RequestError(f"vLLM has no engine argument {name!r}; {hint}")
        if name in FIXED or name == "max_logprobs" or name in EngineSettings.model_fields:
            raise RequestError(f"expected no {name!r} in extra_args, where it cannot be set; drop it there")
    arguments |= {"use_tqdm_on_load": False, **settings.extra_args, **FIXED}
    if settings.head_dtype == "float32":
        arguments["hf_overrides"] = {**arguments.get("hf_overrides", {}), "head_dtype": "float32"}
    sized = {"gpu_memory_utilization", "kv_cache_memory_bytes"} & arguments.keys()
    if on_cpu and not sized and "VLLM_CPU_KVCACHE_SPACE" not in os.environ:
        # vLLM's default on the CPU is nearly all of the machine's memory.
        arguments["kv_cache_memory_bytes"] = _CPU_KV_CACHE_BYTES
    return arguments
