"""Checkpoints of all architectures of the loader are served with their own tokenizer and chat template."""

from __future__ import annotations

import importlib.util
import json
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from moeless_opt.problems.errors import FormatError, ProblemError
from moeless_opt.runtime.serve import Emitted, Sampling, ServeRequest
from moeless_opt.runtime.serve.engine import EngineOptions, Fleet

TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'system' and not loop.first %}"
    "{{ raise_exception('system first') }}{% endif %}<{{ m.role }}>{{ m.content }}"
    "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture(scope="module")
def makers() -> Any:
    """The loader's tests, which write small checkpoints."""
    file = Path(__file__).parents[1] / "checkpoint" / "test_load.py"
    spec = importlib.util.spec_from_file_location("loader_checkpoints", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def write_tokenizer(folder: Path, vocabulary: int, *, chat: bool = True) -> None:
    """A tokenizer of characters."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from tokenizers.decoders import Fuse
    from transformers import PreTrainedTokenizerFast

    letters = [chr(32 + i) for i in range(vocabulary - 2)]
    words = {"<s>": 0, "</s>": 1} | {letter: i + 2 for i, letter in enumerate(letters)}
    inner = Tokenizer(models.WordLevel(words, unk_token="</s>"))
    inner.pre_tokenizer = pre_tokenizers.Split(Regex("[\\s\\S]"), "isolated")
    inner.decoder = Fuse()
    made = PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>")
    if chat:
        made.chat_template = TEMPLATE
    made.save_pretrained(str(folder))


def answer(engine: Fleet, prompt: list[int], length: int) -> list[int | None]:
    over, out = threading.Event(), []

    def take(emitted: Emitted) -> None:
        out.append(emitted.token)
        if emitted.finish is not None:
            over.set()

    rule = Sampling(temperature=0, max_tokens=length, ignore_end=True)
    engine.submit(ServeRequest(id=str(len(prompt)), prompt=tuple(prompt), sampling=rule), take)
    assert over.wait(60)
    return out


@pytest.mark.parametrize("name", ["mixtral", "qwen3", "llama4", "phi", "deepseek"])
def test_answers_are_those_of_transformers(name: str, makers: Any, tmp_path: Path) -> None:
    folder = tmp_path / name
    reference = makers.write_checkpoint(name, folder)
    write_tokenizer(folder, 90)
    engine = Fleet(
        EngineOptions(model=str(folder), token_budget=16, context_length=64, block_tokens=4, max_running=8)
    )
    assert engine.model == name
    engine.start()
    try:
        for length in (1, 7, 23):
            prompt = torch.randint(2, 90, (length,), generator=torch.Generator().manual_seed(length)).tolist()
            tokens = list(prompt)
            while len(tokens) < length + 10:
                with torch.no_grad():
                    tokens.append(int(reference(torch.tensor([tokens])).logits[0, -1].argmax()))
            assert answer(engine, prompt, 10) == tokens[length:]
    finally:
        engine.close()


def test_the_folder_tells_tokens_templates_and_ends(makers: Any, tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    makers.write_checkpoint("mixtral", folder)
    write_tokenizer(folder, 110)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 5]}))
    codec = Fleet(EngineOptions(model=str(folder))).codec
    assert {1, 5} <= codec.ends
    assert codec.decode(codec.encode("Hello.")) == "Hello."
    talk = codec.chat([{"role": "system", "content": "Be"}, {"role": "user", "content": "Hi"}])
    assert codec.decode(talk) == "<system>Be<user>Hi<assistant>"
    with pytest.raises(ProblemError, match="system first"):
        codec.chat([{"role": "user", "content": "Hi"}, {"role": "system", "content": "Be"}])
    write_tokenizer(folder, 110, chat=False)
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    with pytest.raises(ProblemError, match=r"chat template"):
        Fleet(EngineOptions(model=str(folder))).codec.chat([{"role": "user", "content": "Hi"}])
    for file in folder.glob("token*"):
        file.unlink()
    with pytest.raises(FormatError, match="tokenizer"):
        Fleet(EngineOptions(model=str(folder)))
