"""Are these biases corrupt?

    python examples/bias_investigation.py [MODEL.gguf]

Qwen2 models carry attention biases of 80, 158, even -211, hundreds of times their neighbours. When such a model talks
garbage they are the first suspects, and are often switched off or clipped. This script asks the model itself: how
likely is a text to it as it is, without those biases, with them clipped, and with one value that really is damage?
Without an argument it asks the small model that comes with ggufkit.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator

import numpy as np

import ggufkit
from ggufkit import checks, demo, quants
from ggufkit.checks.ablate import Bench, Outcome
from ggufkit.checks.running import Running, RunRequest, start
from ggufkit.container import GGUF
from ggufkit.runtime.engine import Edit, element_edits

ROLES = ("attn_q.bias", "attn_k.bias", "attn_v.bias")
LIMIT = 10.0


def biases(gguf: GGUF) -> Iterator[tuple[str, np.ndarray]]:
    """Every attention bias by its tensor's name."""
    for name, tensor in gguf.tensors.items():
        if name.endswith(ROLES) and tensor.type is not None:
            yield name, quants.dequantize(tensor.type, gguf.read(tensor), byteorder=gguf.byteorder)


def zeroed(gguf: GGUF, role: str) -> list[Edit]:
    """The edits that switch off every bias of a role; `.bias` means all of them."""
    return [Edit(name, 0, bytes(gguf.tensor(name).nbytes or 0)) for name, _ in biases(gguf) if name.endswith(role)]


def clipped(gguf: GGUF, limit: float) -> list[Edit]:
    """The edits that clip every bias to ±limit."""
    edits: list[Edit] = []
    for name, values in biases(gguf):
        beyond = np.flatnonzero(np.abs(values) > limit)
        edits += element_edits(gguf, name, {int(at): float(np.clip(values[at], -limit, limit)) for at in beyond})
    return edits


def show_the_suspects(gguf: GGUF) -> None:
    print("\nThe largest value of each role, against the median magnitude of its tensor:")
    for role in ROLES:
        name, values = max(
            (entry for entry in biases(gguf) if entry[0].endswith(role)), key=lambda e: np.abs(e[1]).max()
        )
        at = int(np.abs(values).argmax())
        ratio = abs(values[at]) / np.median(np.abs(values))
        print(f"  {name}[{at}] = {values[at]:g}, {ratio:,.0f} times the median")


def show_the_judgement(path: str) -> None:
    print("\nWhat `ggufkit validate --select O` says, without running anything:")
    for finding in checks.run(path, select=["O"]).findings:
        print(f"  {finding.severity}: {finding.message} (judged {finding.judgement})")


def experiments(gguf: GGUF) -> Iterator[tuple[str, list[Edit]]]:
    """What is done to the biases, and the edits that do it."""
    yield "all biases zeroed, the usual 'fix'", zeroed(gguf, ".bias")
    for role in ROLES:
        yield f"only {role} zeroed", zeroed(gguf, role)
    largest = max((float(np.abs(values).max()) for _, values in biases(gguf)), default=0.0)
    limit = LIMIT if largest > LIMIT else largest / 4
    yield f"all clipped to ±{limit:g}", clipped(gguf, limit)
    name, values = max(biases(gguf), key=lambda entry: float(np.abs(entry[1]).max()))
    at = int(np.abs(values).argmax())
    yield f"the largest one alone ({name}[{at}] = {values[at]:g}) zeroed", element_edits(gguf, name, {at: 0.0})
    for role in ("attn_v.bias", "attn_q.bias"):
        yield f"one damaged value: blk.0.{role}[5] = 10000", element_edits(gguf, f"blk.0.{role}", {5: 1e4})


def show(what: str, outcome: Outcome) -> None:
    print(f"  {outcome.nats_after:8.3f} {outcome.delta:+9.3f} {outcome.mean_kl:9.3g} {outcome.top1:7.0%}  {what}")


def main(path: str) -> None:
    print(path)
    with ggufkit.open(path) as gguf:
        if not list(biases(gguf)):
            sys.exit("this model has no attention biases")
        show_the_suspects(gguf)
        show_the_judgement(path)
        context = checks.Context(gguf)
        running: Running | None = start(context, RunRequest(insist=True), [])
        if running is None:
            sys.exit(f"the model cannot be run: {context.skipped[-1].why}")
        bench = Bench(running)
        print(f"\nWhat the model says ({bench.text}, {len(running.texts[bench.text].ids)} tokens):")
        print("   nats/tok    change   mean KL   top-1")
        show("as it is", bench.without([]))
        for what, edits in experiments(gguf):
            show(what, bench.without(edits))
    print(
        "\nThe large biases are the model's own: without them it is the garbage that they were blamed for. A value that"
    )
    print("stands alone is damage, and where attention hides it only its neighbourhood tells: so both are asked.")


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else str(demo.MODEL))
