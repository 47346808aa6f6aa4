"""The engine that the settings name, and no other's library."""

from __future__ import annotations

from cache_builder.engine import Capture, GeneratingEngine
from cache_builder.engine_settings import EngineSettings


def open_engine(settings: EngineSettings, capture: Capture) -> GeneratingEngine:
    """Load the teacher that the settings name; raises RequestError where it cannot give what `capture` asks for."""
    if settings.name == "hf":
        from cache_builder.hf_engine import HFEngine

        return HFEngine(settings, capture)
    from cache_builder.vllm_engine import VLLMEngine

    return VLLMEngine(settings, capture)
