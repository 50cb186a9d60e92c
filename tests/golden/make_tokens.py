"""Makes the golden token ids, with llama.cpp as the one who knows.

    python tests/golden/make_tokens.py      # needs llama-cpp-python, gguf, tokenizers; fetches the real models

`texts.json` is the input, written by hand. Results:

- `tokens_qwen2.json`, `tokens_smollm.json`: its texts as the two real models have them, without and with special
  tokens parsed, and what ends an answer.
- `vocabulary.json`: two small vocabularies of our own. The byte-level one has tokens that reach across words, so
  that every place where a pre-tokenizer cuts shows in the ids; the SentencePiece one has runs and equal scores.
- `tokens_pre.json`: the texts under the byte-level vocabulary for each pre-tokenizer, and under the other one.
"""

from __future__ import annotations

import ctypes
import json
import random
import sys
import tempfile
from pathlib import Path
from typing import Any

import gguf
import llama_cpp
import tokenizers

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent), str(HERE.parent.parent)]

import real_model  # noqa: E402

from ggufkit.pretokenizers import PRE  # noqa: E402

TEXTS: dict[str, str] = json.loads((HERE / "texts.json").read_text(encoding="utf-8"))
SPM_SPACE = "▁"


@llama_cpp.llama_log_callback
def be_quiet(level: int, text: bytes, data: object) -> None:
    """llama.cpp's log, thrown away; a named function because llama.cpp keeps the pointer."""


class Oracle:
    """A file's vocabulary as llama.cpp loads it."""

    def __init__(self, path: Path) -> None:
        params = llama_cpp.llama_model_default_params()
        params.vocab_only = True
        self.model = llama_cpp.llama_model_load_from_file(str(path).encode(), params)
        if not self.model:
            raise SystemExit(f"llama.cpp does not load {path}")
        self.vocab = llama_cpp.llama_model_get_vocab(self.model)

    def encode(self, text: str, *, parse_special: bool, add_special: bool = False) -> list[int]:
        data = text.encode()
        room = len(data) + 8
        ids = (llama_cpp.llama_token * room)()
        count = llama_cpp.llama_tokenize(self.vocab, data, len(data), ids, room, add_special, parse_special)
        if count < 0:
            raise SystemExit(f"{text!r} has more than {room} tokens")
        return list(ids[:count])

    def all_texts(self, *, parse_special: bool) -> dict[str, list[int]]:
        return {name: self.encode(text, parse_special=parse_special) for name, text in TEXTS.items()}

    def facts(self) -> dict[str, Any]:
        count = llama_cpp.llama_vocab_n_tokens(self.vocab)
        return {
            "n_vocab": count,
            "bos_id": llama_cpp.llama_vocab_bos(self.vocab),
            "eos_id": llama_cpp.llama_vocab_eos(self.vocab),
            "add_bos": bool(llama_cpp.llama_vocab_get_add_bos(self.vocab)),
            "stop_ids": [i for i in range(count) if llama_cpp.llama_vocab_is_eog(self.vocab, i)],
        }


def of_model(path: Path) -> dict[str, Any]:
    oracle = Oracle(path)
    return {
        **oracle.facts(),
        "plain": oracle.all_texts(parse_special=False),
        "special": oracle.all_texts(parse_special=True),
    }


def bpe_vocabulary(seed: int = 1, merges: int = 900) -> dict[str, Any]:
    """A byte-level vocabulary trained without words on shuffled pieces of the texts."""
    dice = random.Random(seed)
    prose = [text for text in TEXTS.values() if "<|" not in text]  # no token shall be called </s>
    pieces = [text[a : a + 6] for text in prose for a in range(0, len(text), 3)]
    corpus = ["".join(dice.choices(pieces, k=6)) for _ in range(4000)]
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=256 + merges,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        max_token_length=12,
        show_progress=False,
    )
    trained = tokenizers.Tokenizer(tokenizers.models.BPE())
    trained.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    trained.train_from_iterator(corpus, trainer)
    model = json.loads(trained.to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    return {"tokens": tokens, "merges": [" ".join(pair) for pair in model["merges"]]}


def spm_vocabulary(pieces: int = 500) -> dict[str, Any]:
    """Byte tokens and the commonest pieces of one to five characters, whose scores tie in pairs."""
    counts: dict[str, int] = {}
    for text in TEXTS.values():
        spelled = SPM_SPACE + text.replace(" ", SPM_SPACE)
        for length in range(1, 6):
            for a in range(len(spelled) - length + 1):
                piece = spelled[a : a + length]
                counts[piece] = counts.get(piece, 0) + (length > 1) + 1
    counts = {piece: count for piece, count in counts.items() if "\0" not in piece}  # llama.cpp's C strings end there
    common = sorted(counts, key=lambda piece: (-counts[piece], piece))[:pieces]
    special, by_byte = ["<unk>", "<s>", "</s>"], [f"<0x{byte:02X}>" for byte in range(256)]
    return {
        "tokens": [*special, *by_byte, *common],
        "types": [2, 3, 3] + [6] * 256 + [1] * len(common),
        "scores": [0.0] * 259 + [-float(rank // 2) for rank in range(len(common))],
    }


def write(path: Path, model: str, vocabulary: dict[str, Any], pre: str | None = None) -> Path:
    """A vocabulary-only GGUF."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tokenizer_model(model)
    writer.add_token_list(vocabulary["tokens"])
    if pre is not None:
        writer.add_tokenizer_pre(pre)
    for key, add in (
        ("merges", writer.add_token_merges),
        ("types", writer.add_token_types),
        ("scores", writer.add_token_scores),
    ):
        if key in vocabulary:
            add(vocabulary[key])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path


def by_pre(vocabulary: dict[str, Any], folder: Path) -> list[dict[str, Any]]:
    """The ids for every pre-tokenizer; names with the same ids share a row."""
    rows: list[dict[str, Any]] = []
    for pre in PRE:
        ids = Oracle(write(folder / f"{pre}.gguf", "gpt2", vocabulary, pre)).all_texts(parse_special=False)
        row = next((row for row in rows if row["ids"] == ids), None)
        if row is None:
            rows.append({"pre": [pre], "ids": ids})
        else:
            row["pre"].append(pre)
    return rows


def save(name: str, document: dict[str, Any]) -> None:
    (HERE / name).write_text(rendered(document) + "\n", encoding="utf-8")


def rendered(value: Any, indent: str = "") -> str:
    """JSON with a line for each plain list."""
    inner = indent + " "
    if isinstance(value, dict):
        lines = [f"{inner}{json.dumps(key)}: {rendered(item, inner)}" for key, item in value.items()]
        return "{\n" + ",\n".join(lines) + f"\n{indent}}}"
    if isinstance(value, list) and value and isinstance(value[0], dict):
        return "[" + ", ".join(rendered(item, indent) for item in value) + "]"
    return json.dumps(value, separators=(",", ":"))


def main() -> None:
    llama_cpp.llama_log_set(be_quiet, ctypes.c_void_p(0))
    llama_cpp.llama_backend_init()
    save("tokens_qwen2.json", of_model(real_model.path(real_model.QWEN)))
    save("tokens_smollm.json", of_model(real_model.path(real_model.SMOL)))
    bpe, spm = bpe_vocabulary(), spm_vocabulary()
    save("vocabulary.json", {"bpe": bpe, "spm": spm})
    with tempfile.TemporaryDirectory() as folder:
        rows = by_pre(bpe, Path(folder))
        spm_oracle = Oracle(write(Path(folder) / "spm.gguf", "llama", spm))
        save("tokens_pre.json", {"bpe": rows, "spm": spm_oracle.all_texts(parse_special=False)})


if __name__ == "__main__":
    main()
