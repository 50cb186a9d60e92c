"""What llama.cpp says of the real file, in few numbers: logits_qwen2.json, which the real_model tests compare with.

    pip install -e '.[oracle]'
    python tests/golden/make_logits.py qwen2.5-coder-0.5b-instruct-q4_k_m.gguf

At every position of each prompt: the five largest logits with their ids, the logarithm of the sum of all
exponentials, the margin of the first over the second, and the logits of a few fixed ids. llama.cpp rounds
activations to int8 and keeps its cache in f16, so another machine or version gives slightly other numbers.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import llama_cpp
import numpy as np

PROMPTS = {
    "chat": "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
    "Write a haiku about autumn leaves.<|im_end|>\n<|im_start|>assistant\n",
    "code": "def fibonacci(n: int) -> int:\n"
    '    """Return the n-th Fibonacci number."""\n    if n < 2:\n        return n\n    return',
    "languages": "The rotary embedding turns each pair of channels by an angle that grows with the position. "
    "注意力机制让每个词都能看到前面的词，",
}
#: ids whose logits are written at every position: bytes, words, a special token, padding
COLUMNS = (0, 15, 198, 220, 1000, 12345, 99999, 151645, 151900)
TOP = 5


def main(model: str) -> None:
    engine = llama_cpp.Llama(model, n_ctx=128, n_batch=128, logits_all=True, n_threads=2, verbose=False)
    document = {
        "model": Path(model).name,
        "llama_cpp_python": llama_cpp.__version__,
        "columns": COLUMNS,
        "prompts": {name: golden(engine, text) for name, text in PROMPTS.items()},
    }
    path = Path(__file__).with_name("logits_qwen2.json")
    one_list_a_line = re.sub(r"\[[^\[\]]*\]", lambda found: " ".join(found[0].split()), json.dumps(document, indent=1))
    path.write_text(one_list_a_line + "\n", encoding="utf-8")


def golden(engine: llama_cpp.Llama, text: str) -> dict[str, object]:
    ids = engine.tokenize(text.encode(), add_bos=False, special=True)
    engine.reset()
    engine.eval(ids)
    logits = np.array(engine.scores[: len(ids)], np.float64)
    top = np.argsort(-logits, axis=-1)[:, :TOP]
    best = np.take_along_axis(logits, top, axis=-1)
    return {
        "ids": ids,
        "top_ids": top.tolist(),
        "top_logits": best.round(4).tolist(),
        "margin": (best[:, 0] - best[:, 1]).round(4).tolist(),
        "logsumexp": (best[:, 0] + np.log(np.exp(logits - best[:, :1]).sum(-1))).round(4).tolist(),
        "columns": logits[:, COLUMNS].round(4).tolist(),
    }


if __name__ == "__main__":
    main(sys.argv[1])
