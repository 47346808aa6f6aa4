from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from distiller.init_student import find_layers, init_student, parse_layers, spread_layers
from storage_schemas.errors import RequestError
from tests.students import make_student, make_tokenizer


def save(model: Any, path: Path) -> str:
    model.save_pretrained(path)
    make_tokenizer().save_pretrained(path)
    return str(path)


def test_layers_are_spread_with_both_ends() -> None:
    assert spread_layers(4, 2) == (0, 3)
    assert spread_layers(30, 30) == tuple(range(30))
    for count in range(2, 40):
        for keep in range(2, count + 1):
            layers = spread_layers(count, keep)
            assert len(set(layers)) == keep
            assert layers == tuple(sorted(layers))
            assert (layers[0], layers[-1]) == (0, count - 1)


def test_a_list_of_layers_is_read() -> None:
    assert parse_layers("0,2,5-9", 10) == (0, 2, 5, 6, 7, 8, 9)
    assert parse_layers(" 3 ", 4) == (3,)


@pytest.mark.parametrize("text", ["", "a", "1,,2", "2,1", "1,1", "0-12", "3-1", "-1", "1.5"])
def test_a_list_that_makes_no_sense_is_refused(text: str) -> None:
    with pytest.raises(RequestError, match="layer"):
        parse_layers(text, 10)


@pytest.mark.parametrize("architecture", ["llama", "llama-tied", "qwen2", "gemma2", "granite", "gpt2"])
def test_the_student_computes_what_the_kept_layers_compute(architecture: str, tmp_path: Path) -> None:
    teacher = make_student(architecture).eval()
    source = save(teacher, tmp_path / "teacher")
    made = init_student(source, str(tmp_path / "student"), layers="0,2-3")
    assert made.layers == (0, 2, 3)
    assert made.parameters < made.model_parameters
    student = AutoModelForCausalLM.from_pretrained(tmp_path / "student").eval()
    assert student.config.num_hidden_layers == 3
    tokens = torch.arange(3, 23)[None]  # longer than the sliding windows

    name, layers = find_layers(teacher)
    bypassed = layers[1]
    bypassed.forward = lambda hidden, *args, **kwargs: hidden
    expected = teacher(tokens, use_cache=False).logits
    torch.testing.assert_close(student(tokens, use_cache=False).logits, expected, rtol=1e-5, atol=1e-5)
    assert "layers" in name or "h" in name
    kept_types = getattr(student.config, "layer_types", None)
    if kept_types is not None:
        assert kept_types == [teacher.config.layer_types[i] for i in made.layers]
    assert student.generate(tokens[:, :4], max_new_tokens=3, do_sample=False).shape == (1, 7)


def test_tokenizer_generation_settings_dtype_and_sharing_survive(tmp_path: Path) -> None:
    teacher = make_student("llama-tied").to(torch.bfloat16)
    teacher.generation_config = GenerationConfig(max_new_tokens=11, eos_token_id=2)
    source = save(teacher, tmp_path / "teacher")
    made = init_student(source, str(tmp_path / "student"), keep_layers=2)
    assert made.layers == (0, 3)
    student = AutoModelForCausalLM.from_pretrained(tmp_path / "student", dtype="auto")
    assert student.dtype == torch.bfloat16
    assert student.generation_config.max_new_tokens == 11
    assert student.lm_head.weight is student.model.embed_tokens.weight
    assert AutoTokenizer.from_pretrained(tmp_path / "student").get_vocab() == make_tokenizer().get_vocab()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"keep_layers": 1}, "between 2 and 4"),
        ({"keep_layers": 5}, "between 2 and 4"),
        ({}, "exactly one"),
        ({"keep_layers": 2, "layers": "0"}, "exactly one"),
        ({"layers": "4"}, "from 0 to 3"),
    ],
)
def test_bad_requests_are_refused_and_leave_nothing(changes: dict[str, Any], words: str, tmp_path: Path) -> None:
    source = save(make_student(), tmp_path / "teacher")
    with pytest.raises(RequestError, match=words):
        init_student(source, str(tmp_path / "student"), **changes)
    assert [path.name for path in tmp_path.iterdir()] == ["teacher"]


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    source = save(make_student(), tmp_path / "teacher")
    (tmp_path / "student").mkdir()
    (tmp_path / "student" / "precious").touch()
    with pytest.raises(RequestError, match="new or empty"):
        init_student(source, str(tmp_path / "student"), keep_layers=2)
    with pytest.raises(RequestError, match="a directory with a model"):
        init_student(str(tmp_path / "nowhere"), str(tmp_path / "other"), keep_layers=2)


def test_a_model_without_its_tokenizer_is_refused(tmp_path: Path) -> None:
    make_student().save_pretrained(tmp_path / "teacher")
    with pytest.raises(RequestError, match="tokenizer"):
        init_student(str(tmp_path / "teacher"), str(tmp_path / "student"), keep_layers=2)
