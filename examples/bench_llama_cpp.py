"""How fast is ggufkit beside llama.cpp? The same file on the same machine, in turn, and the ratios.

    python examples/bench_llama_cpp.py MODEL.gguf                                    # needs llama-cpp-python
    python examples/bench_llama_cpp.py MODEL.gguf --llama-bench PATH/TO/llama-bench  # or llama.cpp's own tool
    python examples/bench_llama_cpp.py MODEL.gguf --device cuda --llama-bench PATH/TO/llama-bench

Rounds alternate, so that a machine that slows down slows both; of each side the median of all repeats counts. Both
compute the logits of a prompt's last token and of each generated one, on all processors or on the GPU (all layers,
flash attention on), with the keys and values that are each one's default.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from statistics import median
from typing import Any

#: test → tokens a second of each repeat
Rates = dict[str, list[float]]


def run(*command: str) -> Any:
    """What a program prints as JSON, or the end of this one with its complaint."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(command)} ended with {done.returncode}:\n{done.stderr.strip()[-2000:]}")
    return json.loads(done.stdout)


def ggufkit(options: argparse.Namespace) -> Rates:
    lengths = [*(f"--pp={n}" for n in options.pp), *(f"--tg={n}" for n in options.tg)]
    command = [sys.executable, "-m", "ggufkit", "bench", options.model, "--device", options.device, "--json"]
    found = run(*command, "-r", str(options.repeats), *lengths)
    return {test["name"]: test["rates"] for test in found["tests"]}


def llama_bench(options: argparse.Namespace) -> Rates:
    """With llama.cpp's own tool."""
    where = ["-ngl", "99", "-fa", "1"] if options.device == "cuda" else ["-ngl", "0", "-t", str(processors())]
    lengths = ["-p", ",".join(map(str, options.pp)), "-n", ",".join(map(str, options.tg))]
    found = run(options.llama_bench, "-m", options.model, "-r", str(options.repeats), "-o", "json", *where, *lengths)
    return {(f"pp{t['n_prompt']}" if t["n_prompt"] else f"tg{t['n_gen']}"): t["samples_ts"] for t in found}


def llama_cpp_python(options: argparse.Namespace) -> Rates:
    """With llama-cpp-python, in a process of its own."""
    if options.device == "cuda":
        sys.exit("on a GPU this needs --llama-bench: llama-cpp-python comes without CUDA")
    rates: Rates = run(options.llama_python, __file__, options.model, "--only-llama-cpp", *lengths_of(options))
    return rates


def lengths_of(options: argparse.Namespace) -> Iterator[str]:
    yield from ("--pp", *map(str, options.pp), "--tg", *map(str, options.tg), "--repeats", str(options.repeats))


def processors() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def only_llama_cpp(options: argparse.Namespace) -> Rates:
    """What the process of its own does."""
    import llama_cpp

    quiet = llama_cpp.llama_log_callback(lambda level, text, data: None)
    llama_cpp.llama_log_set(quiet, ctypes.c_void_p())
    settings = llama_cpp.llama_context_default_params()
    settings.n_ctx = max(*options.pp, *options.tg, 64)
    settings.n_threads = settings.n_threads_batch = processors()
    model = llama_cpp.llama_model_load_from_file(os.fsencode(options.model), llama_cpp.llama_model_default_params())
    context = llama_cpp.llama_init_from_model(model, settings)
    draw = random.Random(0)
    ids = (llama_cpp.llama_token * settings.n_ctx)(*(draw.randrange(256) for _ in range(settings.n_ctx)))
    one = ctypes.sizeof(llama_cpp.llama_token)

    def decode(at: int, count: int) -> None:
        place = ctypes.cast(ctypes.byref(ids, at * one), ctypes.POINTER(llama_cpp.llama_token))
        if llama_cpp.llama_decode(context, llama_cpp.llama_batch_get_one(place, count)):
            sys.exit("llama.cpp could not compute this batch")
        llama_cpp.llama_get_logits(context)  # waits for them

    def rate(length: int, step: int) -> float:
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(context), True)
        start = time.perf_counter()
        for at in range(0, length, step):
            decode(at, min(step, length - at))
        return length / (time.perf_counter() - start)

    def rates(length: int, step: int) -> list[float]:
        return [rate(length, step) for _ in range(options.repeats + 1)][1:]  # the first one warms up

    batch = settings.n_batch
    return {f"pp{n}": rates(n, batch) for n in options.pp} | {f"tg{n}": rates(n, 1) for n in options.tg}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--pp", type=int, nargs="+", default=[512], metavar="N", help="lengths of prompts")
    parser.add_argument("--tg", type=int, nargs="+", default=[128], metavar="N", help="tokens to generate")
    parser.add_argument("--repeats", type=int, default=3, help="in a round")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--llama-bench", metavar="PATH", help="llama.cpp's own tool")
    parser.add_argument("--llama-python", metavar="PATH", default=sys.executable, help="a Python with llama-cpp-python")
    parser.add_argument("--only-llama-cpp", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.only_llama_cpp:
        print(json.dumps(only_llama_cpp(options)))
        return
    theirs = llama_bench if options.llama_bench else llama_cpp_python
    ours_all: Rates = {}
    theirs_all: Rates = {}
    for number in range(options.rounds):
        print(f"round {number + 1} of {options.rounds} …", file=sys.stderr)
        for side, measure in ((ours_all, ggufkit), (theirs_all, theirs)):
            for test, rates in measure(options).items():
                side.setdefault(test, []).extend(rates)
    print(f"{'test':8}{'ggufkit':>10}{'llama.cpp':>11}{'ratio':>8}   tokens a second, medians")
    for test, rates in ours_all.items():
        ours, other = median(rates), median(theirs_all[test])
        print(f"{test:8}{ours:10.1f}{other:11.1f}{ours / other:8.2f}")


if __name__ == "__main__":
    main()
