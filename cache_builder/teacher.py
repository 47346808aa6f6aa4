"""Who the teacher is: where its files lie, and the identity that two builds must share."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from cache_builder.engine_settings import EngineSettings
from storage_schemas.errors import RequestError
from storage_schemas.manifest import TeacherIdentity, TokenizerIdentity, tokenizer_digest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_WEIGHTS = ("*.safetensors", "*.bin", "*.pt", "*.gguf")
_BESIDE_WEIGHTS = ("*.json", "*.jinja", "*.model", "*.txt", "*.py", "*.tiktoken")
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Teacher:
    """A teacher found on this machine: its directory, its tokenizer, and the settings that run exactly it."""

    engine: EngineSettings
    identity: TeacherIdentity
    tokenizer: PreTrainedTokenizerBase
    tokenizer_identity: TokenizerIdentity


def find_teacher(settings: EngineSettings) -> Teacher:
    """Resolve the model to a local directory, downloading a hub model, and identify it by its contents.

    Raises RequestError where there is no such model, or no weights or no tokenizer in it.
    """
    from transformers import AutoConfig, AutoTokenizer

    directory, revision = _find_directory(settings)
    with _refusals(settings):
        config = AutoConfig.from_pretrained(directory, trust_remote_code=settings.trust_remote_code)
        tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=settings.trust_remote_code)
    dtype = _resolve_dtype(settings, getattr(config.get_text_config(), "dtype", None))
    quantization = settings.quantization or (getattr(config, "quantization_config", None) or {}).get("quant_method")
    vocabulary = tokenizer.get_vocab()
    return Teacher(
        engine=settings.model_copy(update={"model": str(directory), "revision": None, "dtype": dtype}),
        identity=TeacherIdentity(
            model=settings.model if revision else directory.name,
            revision=revision,
            weights_digest=_digest_weights(directory),
            dtype=dtype,
            head_dtype=dtype if settings.head_dtype == "model" else settings.head_dtype,
            quantization=quantization,
        ),
        tokenizer=tokenizer,
        tokenizer_identity=TokenizerIdentity(
            digest=tokenizer_digest(vocabulary),
            vocab_size=max(vocabulary.values()) + 1,
            template_digest=_digest_template(tokenizer.chat_template),
        ),
    )


def find_tokenizer(settings: EngineSettings) -> tuple[PreTrainedTokenizerBase, int]:
    """The teacher's tokenizer and its vocabulary's size, without any weights. Raises RequestError as `find_teacher`."""
    from transformers import AutoTokenizer

    directory, _ = _find_directory(settings, weights=False)
    with _refusals(settings):
        tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=settings.trust_remote_code)
    return tokenizer, max(tokenizer.get_vocab().values()) + 1


@contextmanager
def _refusals(settings: EngineSettings) -> Iterator[None]:
    """What transformers objects to in a model's directory, as RequestError."""
    try:
        yield
    except (OSError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise RequestError(
            f"expected a transformers model with its tokenizer in {settings.model!r}: {reason}"
        ) from error


def _find_directory(settings: EngineSettings, *, weights: bool = True) -> tuple[Path, str | None]:
    """The model's directory and, for a hub model, the commit it was resolved to."""
    path = Path(settings.model).expanduser()
    if path.is_dir():
        if settings.revision is not None:
            raise RequestError(f"revision is for hub models, and {settings.model!r} is a directory; leave it out")
        return path.resolve(), None
    if path.is_absolute() or settings.model.startswith(".") or path.exists():
        raise RequestError(f"expected a hub name or a directory with a model, got {settings.model!r}; there is none")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    patterns = [*_WEIGHTS[: int(weights)], *_BESIDE_WEIGHTS]
    try:
        found = Path(snapshot_download(settings.model, revision=settings.revision, allow_patterns=patterns))
    except (OSError, ValueError, HFValidationError) as error:  # no such name, no network and not in the local cache
        reason = str(error).strip().partition("\n")[0]
        raise RequestError(f"cannot get the model {settings.model!r} from the hub: {reason}") from error
    return found, found.name


def _resolve_dtype(settings: EngineSettings, own: object) -> str:
    """`auto` is the checkpoint's own dtype for vLLM, and float32 for the reference engine."""
    if settings.dtype != "auto":
        return {"half": "float16", "float": "float32"}.get(settings.dtype, settings.dtype)
    if settings.name == "hf" or own is None:
        return "float32"
    return str(own).removeprefix("torch.")


def _digest_weights(directory: Path) -> str:
    """SHA-256 over the SHA-256 of every weights file, in order of their names; the hub's own hash where it is known."""
    for pattern in _WEIGHTS:
        files = sorted(directory.glob(pattern))
        if files:
            with ThreadPoolExecutor() as pool:
                digests = list(pool.map(_digest_file, files))
            return hashlib.sha256(" ".join(digests).encode()).hexdigest()
    raise RequestError(f"expected weights ({', '.join(_WEIGHTS)}) in {directory}, found none; give a whole model")


def _digest_file(path: Path) -> str:
    blob = path.resolve().name  # the hub's local cache names a large file by its SHA-256
    if path.is_symlink() and path.resolve().parent.name == "blobs" and _SHA256.fullmatch(blob):
        return blob
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _digest_template(template: object) -> str | None:
    return None if not template else hashlib.sha256(str(template).encode()).hexdigest()
