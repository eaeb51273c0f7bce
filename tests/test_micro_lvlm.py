"""The embedded LVLM is the same for a seed, knows every text, and is loaded as any checkpoint."""

from __future__ import annotations

from pathlib import Path

from guardalign.config import GenerationConfig, LvlmConfig
from guardalign.micro.lvlm import build_lvlm
from guardalign.models.lvlm import Lvlm
from tests.small_lvlms import picture


def files(folder: Path, seed: int) -> dict[str, bytes]:
    build_lvlm(folder, seed)
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_the_seed_decides_every_byte(tmp_path: Path) -> None:
    first = files(tmp_path / "a", 1)
    assert first == files(tmp_path / "b", 1)
    assert first["model.safetensors"] != files(tmp_path / "c", 2)["model.safetensors"]


def test_it_answers_any_text_and_knows_every_byte(tmp_path: Path) -> None:
    build_lvlm(tmp_path, 1)
    lvlm = Lvlm.load(LvlmConfig(model=str(tmp_path), device="cpu"))
    assert lvlm.notes == ()
    text = "naïve 你好 🙂 \0 <image> </s> \ud800"
    prompt = lvlm.prompt("a", text, picture(50, 120))
    ids = prompt.tensors["input_ids"][0].tolist()
    assert lvlm.tokenizer.decode(ids[slice(*prompt.instruction)]) == text.replace("\ud800", "\ufffd")
    assert len(prompt.image) == 64
    reply = lvlm.generate([prompt], GenerationConfig(max_new_tokens=40), [0])[0]
    assert reply.num_tokens <= 40
    assert reply.text.encode()  # bytes that are no UTF-8 are replaced, never refused
