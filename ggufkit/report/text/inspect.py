"""`inspect` as text."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console, RenderableType
from rich.padding import Padding
from rich.text import Text

from ggufkit.container import Problem
from ggufkit.memory import FORMULA, Memory
from ggufkit.overview import (
    FileFacts,
    MetadataRow,
    ModelFacts,
    Overview,
    Quantization,
    SpecialToken,
    Template,
    TensorRow,
    TokenizerFacts,
)
from ggufkit.report.escape import RUNNING_TEXT, shown
from ggufkit.report.text.style import (
    count_text,
    facts,
    from_file,
    heading,
    listing,
    nbytes_text,
    number_text,
    plural,
    shape_text,
    share_text,
    show,
)

if TYPE_CHECKING:
    from ggufkit.chat import TemplateFacts

_MANY = 6  # values of one a layer that are still shown one by one


def overview(console: Console, facts_: Overview, *, only_words: bool = False) -> None:
    """Print all sections, or those of the tokenizer and template alone."""
    words = [*_tokenizer(facts_.tokenizer), *_template(facts_.template)]
    sections: list[RenderableType] = words
    if not only_words:
        sections = [
            *_file(facts_.file),
            *_model(facts_.model),
            *_quantization(facts_.quantization, facts_.model),
            *words,
            *_memory(facts_.memory, facts_.memory_note),
        ]
    show(console, *sections)
    problems(console, facts_.problems)


def problems(console: Console, found: Sequence[Problem]) -> None:
    """Print what the reader met."""
    if not found:
        return
    lines: list[RenderableType] = [heading("Problems", "`ggufkit validate` explains them")]
    for problem in found:
        at = f"  byte {problem.offset:,}" if problem.offset is not None else ""
        lines.append(Text.assemble(("  ✗ ", "error"), shown(problem.message, limit=500), (at, "note")))
    show(console, *lines)


def tensors(console: Console, rows: Sequence[TensorRow]) -> None:
    """Print the tensor table, both orders of dimensions."""
    table = listing("name", "type", "shape (out, in)", "file order", "size", right=("size",), wide="name")
    for row in rows:
        size = nbytes_text(row.nbytes) if row.nbytes is not None else "?"
        shape, dims = shape_text(row.shape), shape_text(row.dims)
        table.add_row(from_file(row.name), Text(row.type, "type"), shape, Text(dims, "note"), size)
    show(console, heading("Tensors", f"{len(rows):,}"), Padding(table, (0, 0, 1, 2), expand=False))


def metadata(console: Console, rows: Sequence[MetadataRow]) -> None:
    """Print every key; long values are cut."""
    table = listing("key", "type", "value", wide="value")
    for row in rows:
        table.add_row(from_file(row.key), Text(row.type, "note"), from_file(_value_text(row), limit=120))
    show(console, heading("Metadata", f"{len(rows):,}"), Padding(table, (0, 0, 1, 2), expand=False))


def values(rows: Iterable[MetadataRow], *, with_names: bool) -> None:
    """Print whole values to stdout: strings as running text, arrays one element a line."""
    for row in rows:
        if with_names:
            sys.stdout.write(f"{shown(row.key)} ({row.type}):\n")
        value = row.value if isinstance(row.value, str) else _lines(row.value)
        sys.stdout.write(shown(value, keep=RUNNING_TEXT) + "\n")


def _value_text(row: MetadataRow) -> str:
    if row.count is None:
        return number_text(row.value) if isinstance(row.value, float) else str(row.value)
    items = [repr(item) if isinstance(item, str) else str(item) for item in row.value]
    return f"[{', '.join([*items, '…'] if row.count > len(items) else items)}]"


def _lines(value: Any) -> str:
    items = value.tolist() if hasattr(value, "tolist") else value
    return "\n".join(str(item) for item in items) if isinstance(items, list) else str(items)


def _file(file: FileFacts) -> list[RenderableType]:
    order = f"{file.byteorder}-endian"
    rows: list[tuple[str, RenderableType | None]] = [
        ("path", from_file(file.path)),
        ("shards", f"{len(file.shards)}" if len(file.shards) > 1 else None),
        ("size", f"{nbytes_text(file.size)} ({file.size:,} bytes)"),
        ("format", f"GGUF v{file.version}, {order}, aligned to {file.alignment}"),
        ("holds", f"{plural(file.n_keys, 'metadata key')}, {plural(file.n_tensors, 'tensor')}"),
        ("header", None if file.complete else Text("could not be read to its end", "error")),
    ]
    return _section("File", rows)


def _model(model: ModelFacts) -> list[RenderableType]:
    name = model.general.get("name")
    rows: list[tuple[str, RenderableType | None]] = [
        ("name", from_file(name) if name else None),
        ("architecture", _architecture(model)),
        ("dimensions of", ", ".join(model.known_as) or None),
        ("parameters", _parameters(model)),
        *((label, _hyper_text(value)) for label, value in _hyperparameters(model)),
        ("license", from_file(model.general["license"]) if "license" in model.general else None),
        ("problem", _error(model.problem)),
    ]
    return _section("Model", rows)


def _architecture(model: ModelFacts) -> Text:
    if model.architecture is None:
        return Text("not said", "warning")
    remark = "" if model.modelled else "  (not modelled here: inspected and validated, not run)"
    return Text.assemble(from_file(model.architecture), (remark, "note"))


def _parameters(model: ModelFacts) -> str | None:
    if not model.n_parameters:
        return None
    head = {True: ", output tied to the embedding", False: ", output separate", None: ""}[model.tied]
    return f"{count_text(model.n_parameters)}{head}"


def _hyperparameters(model: ModelFacts) -> list[tuple[str, Any]]:
    shown_ = dict(model.hyperparameters)
    if model.rows is not None:
        shown_["n_vocab"] = model.rows
    return list(shown_.items())


def _hyper_text(value: Any) -> Text:
    if isinstance(value, list):
        if len(set(value)) == 1:
            return Text(f"{_scalar_text(value[0])} in each of {len(value)} layers")
        more = "" if len(value) <= _MANY else f", … ({len(value)} layers)"
        return Text(", ".join(_scalar_text(entry) for entry in value[:_MANY]) + more)
    return Text(_scalar_text(value))


def _scalar_text(value: Any) -> str:
    if isinstance(value, float):
        whole = value.is_integer() and abs(value) < 1e9
        return f"{int(value):,}" if whole else number_text(value)
    return f"{value:,}" if isinstance(value, int) else shown(str(value), limit=80)


def _quantization(mix: Quantization, model: ModelFacts) -> list[RenderableType]:
    if not mix.types or mix.bits_per_weight is None:
        return []
    total = sum(share.nbytes for share in mix.types)
    table = listing(
        "type", "bits/weight", "tensors", "weights", "size", "share", "used for",
        right=("bits/weight", "tensors", "weights", "size", "share"), wide="used for",
    )  # fmt: skip
    for share in mix.types:
        table.add_row(
            Text(share.type, "type"),
            f"{share.bits_per_weight:.2f}" if share.bits_per_weight else "?",
            f"{share.tensors:,}",
            count_text(share.elements),
            nbytes_text(share.nbytes),
            share_text(share.nbytes, total),
            from_file(", ".join(role.removesuffix(".weight") for role in share.roles), limit=150),
        )
    asked = f", made as {model.file_type}" if model.file_type else ""
    note = f"{mix.bits_per_weight:.2f} bits a weight{asked}"
    return [heading("Quantization", note), Padding(table, (0, 0, 1, 2), expand=False)]


def _tokenizer(words: TokenizerFacts | None) -> list[RenderableType]:
    if words is None:
        return _section("Tokenizer", [("", Text("the file has none", "warning"))])
    kind = ", ".join(from_file(part).plain for part in (words.model, words.pre) if part)
    rows: list[tuple[str, RenderableType | None]] = [
        ("kind", kind or Text("not said", "warning")),
        ("tokens", _tokens_text(words)),
        ("merges", f"{words.n_merges:,}" if words.n_merges is not None else None),
        *((token.role, _special_text(token)) for token in words.special),
        ("flags", ", ".join(f"{name} {'on' if on else 'off'}" for name, on in words.flags.items()) or None),
    ]
    return _section("Tokenizer", rows)


def _tokens_text(words: TokenizerFacts) -> str:
    kinds = ", ".join(f"{count:,} {kind}" for kind, count in words.types.items())
    unused = f"; the embedding has {words.unused_rows:,} rows more" if words.unused_rows else ""
    return f"{words.n_tokens:,}" + (f" ({kinds})" if kinds else "") + unused


def _special_text(token: SpecialToken) -> Text:
    if token.text is None:
        return Text(f"{token.id}  outside the vocabulary", "error")
    return Text.assemble(f"{token.id}  ", (shown(token.text, limit=60), "info"))


def _template(template: Template | None) -> list[RenderableType]:
    title = "Chat template"
    if template is None:
        return _section(title, [("", Text("the file has none: `run` takes prompts as they are", "note"))])
    others = ", ".join(name for name in template.names if name != "default")
    rows: list[tuple[str, RenderableType | None]] = [("problem", _error(template.problem))]
    if template.facts is not None:
        rows += _template_facts(template.facts)
    return _section(title, [*rows, ("others", from_file(others) if others else None)])


def _template_facts(facts_: TemplateFacts) -> list[tuple[str, RenderableType | None]]:
    knows = {
        "a system message": facts_.has_system,
        "tools": facts_.has_tools,
        "the beginning of an answer": facts_.has_generation_prompt,
        "the BOS token": facts_.adds_bos,
    }
    uncommon = ", ".join(facts_.uncommon)
    return [
        ("length", f"{facts_.size:,} characters"),
        ("roles", from_file(", ".join(facts_.roles)) if facts_.roles else None),
        ("knows", ", ".join(what for what, known in knows.items() if known)),
        ("writes", from_file(", ".join(facts_.special_texts)) if facts_.special_texts else None),
        ("uncommon", Text(f"{shown(uncommon)}: not in every engine", "warning") if uncommon else None),
    ]


def _error(message: str | None) -> Text | None:
    return Text(shown(message), "error") if message else None


def _memory(needed: Sequence[Memory], remark: str | None) -> list[RenderableType]:
    if not needed:
        return _section("Memory", [("", Text(remark or "", "note"))])
    right = ("context", "weights", "KV f16", "KV f32", "working", "total f16", "total f32")
    table = listing(*right, right=right)
    for row in needed:
        sizes = (row.weights, row.kv_f16, row.kv_f32, row.working, row.total_f16, row.total_f32)
        table.add_row(f"{row.n_ctx:,}", *(nbytes_text(size) for size in sizes))
    notes = [Padding(Text(text, "note"), (0, 0, 0, 2)) for text in (FORMULA, remark) if text]
    return [heading("Memory to run it"), Padding(table, (0, 0, 0, 2), expand=False), *notes]


def _section(title: str, rows: Iterable[tuple[str, RenderableType | None]]) -> list[RenderableType]:
    return [heading(title), facts(rows), Text()]
