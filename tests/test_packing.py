from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from distiller.collate import Collator
from distiller.objectives import make_objective
from distiller.packing import check_packing
from distiller.stream import CacheDataset
from distiller.student import install_loss
from storage_schemas.errors import RequestError
from storage_schemas.reader import CacheReader
from tests.students import VOCAB_SIZE, make_student
from tests.teacher_cache import write_cache


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> CacheReader:
    return write_cache(tmp_path_factory.mktemp("packing") / "cache", make_student(seed=1))


def whole_cache_loss(student: Any, dataset: CacheDataset, collator: Collator) -> dict[str, Any]:
    """Loss and gradients over every row at once."""
    install_loss(student, make_objective("taid", {}), VOCAB_SIZE)
    batch = collator([dataset[i] for i in range(len(dataset))])
    outputs = student(**batch)
    outputs["loss_sum"].backward()
    gradients = {name: value.grad for name, value in student.named_parameters()}
    return {"loss": outputs["loss_sum"].detach(), "rows": len(batch["row_index"]), **gradients}


@pytest.mark.parametrize("flatten", [False, True])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gemma2", "gpt2"])
def test_packed_rows_give_the_loss_and_gradients_of_separate_ones(
    cache: CacheReader, architecture: str, attention: str, flatten: bool
) -> None:
    dataset = CacheDataset(cache, max_length=30, packing=True)
    assert len(dataset) < len(cache)
    expected = whole_cache_loss(make_student(architecture, attention=attention), CacheDataset(cache), Collator())
    packed = whole_cache_loss(
        make_student(architecture, attention=attention), dataset, Collator(packed=True, flatten=flatten)
    )
    assert packed["rows"] == expected["rows"]
    for name, value in expected.items():
        if isinstance(value, torch.Tensor):
            scale = float(value.abs().max())
            # float32, in another order of summation; a document that saw its neighbour would be off by tenths
            torch.testing.assert_close(packed[name] / scale, value / scale, rtol=0, atol=1e-5, msg=name)


def test_an_attention_mask_would_let_packed_documents_see_each_other(cache: CacheReader) -> None:
    """The trap that the collator avoids; if this fails, the library now separates documents by itself."""
    dataset = CacheDataset(cache, max_length=30, packing=True)
    batch = Collator(packed=True)([dataset[0]])
    assert len(dataset.members[0]) > 1
    student = make_student().eval()
    apart = student.model(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False)[0]
    leaky = student.model(
        input_ids=batch["input_ids"],
        position_ids=batch["position_ids"],
        attention_mask=torch.ones_like(batch["input_ids"]),
        use_cache=False,
    )[0]
    assert float((apart - leaky).detach().abs().max()) > 1e-2


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gemma2", "granite", "gpt2"])
def test_models_that_keep_documents_apart_are_accepted(architecture: str) -> None:
    check_packing(make_student(architecture))


def test_a_model_that_leaks_is_refused() -> None:
    student = make_student()
    attention = student.model.layers[1].self_attn
    original = attention.forward

    def leak(hidden_states: torch.Tensor, **kwargs: Any) -> Any:
        return original(hidden_states=hidden_states + hidden_states.cumsum(1) * 0.1, **kwargs)

    attention.forward = leak
    with pytest.raises(RequestError, match=r"data\.packing=false"):
        check_packing(student)


def test_padding_does_not_matter(cache: CacheReader) -> None:
    """The same row alone, and beside a longer one that pads it."""
    dataset = CacheDataset(cache, max_length=30, packing=True)
    lengths = [len(dataset[i]) for i in range(len(dataset))]
    short, long = int(np.argmin(lengths)), int(np.argmax(lengths))
    assert lengths[short] < lengths[long]
    losses = []
    for chosen in ([short], [long], [short, long]):
        student = make_student()
        install_loss(student, make_objective("cross_entropy", {}), VOCAB_SIZE)
        losses.append(float(student(**Collator(packed=True)([dataset[i] for i in chosen]))["loss_sum"].detach()))
    assert losses[2] == pytest.approx(losses[0] + losses[1], rel=1e-5)
