"""Rules on the chat template: is it there, can it be read, and does it speak the language of this vocabulary.

A template is a program from a file. It is parsed here and never run.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from ggufkit.chat import TemplateError, TemplateFacts
from ggufkit.checks.context import Context
from ggufkit.checks.rule import Found, Need, rule
from ggufkit.findings import Confidence, Severity
from ggufkit.vocabulary import TokenType, Vocabulary

ERROR, WARNING, INFO = Severity.ERROR, Severity.WARNING, Severity.INFO

_KEY = "tokenizer.chat_template"
_INSTRUCT = re.compile(r"(?i)(?:^|[^a-z])(?:instruct|chat|it|assistant)(?:$|[^a-z])")
#: how the control tokens begin that must be in the vocabulary; `[INST]` and `</s>` are ordinary text in some
_MARKERS = ("<|", "<｜", "<start_of_turn>", "<end_of_turn>")
#: tokens of these types are found in a prompt whole; others are cut into pieces
_WHOLE = (TokenType.CONTROL, TokenType.USER_DEFINED, TokenType.UNKNOWN)
#: without these a template's turns cannot be told apart, in the families that have them
_TURN_MARKERS = frozenset(
    {"<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<start_of_turn>"}
    | {"<end_of_turn>", "<|end|>", "<|assistant|>", "<|user|>"}
)


@rule("C101", "template-missing", WARNING, confidence=Confidence.MEDIUM, needs=[Need.MODEL])
def template_missing(context: Context) -> Iterator[Found]:
    """An instruct model has no chat template.

    What. The name says instruct, chat or it; tokenizer.chat_template is missing or empty.

    Why. Programs then guess a template, usually ChatML, or send the bare text: the model rambles, ignores the
    question, or leaks role tags. It is the commonest complaint about files that are otherwise perfect.

    Case. Early conversions of Mistral and Llama 2 chat models.

    Fix. Convert again with tokenizer_config.json (or chat_template.jinja) beside the weights, or give the program the
    template (llama.cpp: --chat-template-file).
    """
    names = [context.text(f"general.{key}") or "" for key in ("name", "finetune", "basename")]
    named = next((name for name in names if _INSTRUCT.search(name)), None)
    if named and not any((context.text(key) or "").strip() for key in context.templates):
        yield Found(f"there is no chat template, though this is an instruct model by its name ({named!r})", key=_KEY)


@rule("C102", "template-unreadable", ERROR, needs=[Need.TEMPLATE])
def template_unreadable(context: Context) -> Iterator[Found]:
    """The chat template cannot be parsed.

    What. Syntax of Jinja, with the tags that transformers adds; at most 256 Ki characters and 64 levels of nesting.

    Why. Servers refuse to start or fall back to another template; a template nested a thousand deep overflows the
    stack of parsers.

    Case. A template pasted with typographic quotes; a 12 KB file of 6,000 parentheses.

    Fix. Take the template from the original model.
    """
    for key, read in context.templates.items():
        if isinstance(read, TemplateError):
            unknown_tag = "unknown tag" in read.message
            yield Found(read.message, key=key, offset=context.place(key), severity=WARNING if unknown_tag else None)


@rule("C103", "template-token", WARNING, needs=[Need.TEMPLATE, Need.VOCABULARY])
def template_token(context: Context) -> Iterator[Found]:
    """The chat template writes a control token that the vocabulary does not have as one.

    What. Every <|marker|> in the template's text must be a single token of type control (or user-defined).

    Why. Otherwise it is cut into pieces that the model has never seen together: it does not know whose turn it is,
    and never ends its own.

    Case. A ChatML template on a model that was trained with another format; <|im_end|> typed as a normal token.

    Fix. Take template and tokenizer from the same original model.
    """
    for key, facts in _readable(context):
        markers = [text for text in facts.special_texts if text.startswith(_MARKERS)]
        unknown = [text for text in markers if text not in context.words.ids]
        for text in unknown:
            essential = text in _TURN_MARKERS or len(unknown) == len(markers)
            message = f"the chat template writes {text!r}, which is no token of this vocabulary"
            yield Found(message, key=key, value=text, severity=None if essential else INFO)
        for text in (marker for marker in markers if marker not in unknown):
            kind = _type_in_use(context, context.words.ids[text])
            if kind is not None and kind not in _WHOLE:
                token = context.words.shown(context.words.ids[text])
                message = (
                    f"the chat template writes {text!r}, but token {token} is of type {TokenType(kind).name.lower()}"
                )
                yield Found(message, key=key, value=text)


def _type_in_use(context: Context, token: int) -> int | None:
    """A token's type as loaders treat it, after they have corrected the well-known ones."""
    vocabulary = context.words.vocabulary
    if isinstance(vocabulary, Vocabulary):
        return int(vocabulary.types[token])
    return context.words.type_of(token)


@rule("C104", "double-bos", INFO, needs=[Need.TEMPLATE, Need.VOCABULARY])
def double_bos(context: Context) -> Iterator[Found]:
    """Both the chat template and the tokenizer put a BOS in front.

    What. The template writes bos_token (or its text) while add_bos_token is true, or is true by default.

    Why. llama.cpp takes one away; programs that do not send two, which costs a little quality.

    Case. Llama 3 and Mistral files: healthy, as long as the program knows.

    Fix. In your own program: render the template, then tokenize without adding BOS.
    """
    vocabulary = context.words.vocabulary
    if not isinstance(vocabulary, Vocabulary) or not vocabulary.add_bos:
        return
    bos = vocabulary.roles.get("bos")
    text = vocabulary.tokens[bos] if bos is not None else None
    for key, facts in _readable(context):
        if facts.adds_bos or (text and facts.literals and facts.literals[0].startswith(text)):
            message = (
                f"the chat template writes {text!r} and the tokenizer adds it as well: tokenize without adding BOS"
            )
            yield Found(message, key=key)


@rule("C105", "template-language", INFO, needs=[Need.TEMPLATE])
def template_language(context: Context) -> Iterator[Found]:
    """The chat template uses parts of the language that not every engine has.

    What. Filters, tests, functions, methods and tags outside what the engines that read GGUF have in common.

    Why. It works in transformers; elsewhere it is refused or, worse, silently renders something else.

    Case. Tool calls lost because `tojson(indent=4)` or `unique` were not known.

    Fix. None if your program renders it; otherwise a simplified template.
    """
    for key, facts in _readable(context):
        if facts.uncommon:
            yield Found(f"the chat template uses {', '.join(facts.uncommon)}, which not every engine knows", key=key)


@rule("C106", "template-messages", WARNING, needs=[Need.TEMPLATE])
def template_messages(context: Context) -> Iterator[Found]:
    """The chat template does not use the messages.

    What. The word `messages` occurs nowhere in it.

    Why. Whatever is asked, the prompt is the same.

    Case. A file name or a placeholder stored instead of the template.

    Fix. Take the template from the original model.
    """
    for key, facts in _readable(context):
        if "messages" not in (context.text(key) or ""):
            shown = (context.text(key) or "")[:60]
            yield Found(f"the chat template ({facts.size} characters, {shown!r}) does not use the messages", key=key)


@rule("C107", "turn-end", INFO, confidence=Confidence.MEDIUM, needs=[Need.TEMPLATE, Need.VOCABULARY])
def turn_end(context: Context) -> Iterator[Found]:
    """The EOS is not the token that ends a turn in the chat template.

    What. The template writes an end-of-turn token, and eos_token_id is another.

    Why. Programs that know EOS alone never stop, and print <|im_end|> or begin the user's next turn. llama.cpp
    recognizes the usual end-of-turn texts by themselves.

    Case. Base models, where it is right; instruct models that kept the base model's EOS, where it is not.

    Fix. Stop at the token that the message names as well (or set tokenizer.ggml.eos_token_id to it).
    """
    vocabulary = context.words.vocabulary
    if not isinstance(vocabulary, Vocabulary) or "eos" not in vocabulary.roles:
        return
    eos = vocabulary.tokens[vocabulary.roles["eos"]]
    ends = {vocabulary.tokens[token] for token in vocabulary.stop_ids}
    for _, facts in _readable(context):
        written = [text for text in dict.fromkeys(facts.special_texts) if text in ends]
        if written and eos not in written and "eos_token" not in facts.variables:
            message = f"turns end with {written[0]!r} in the chat template, but EOS is {eos!r}: stop at both"
            yield Found(message, key="tokenizer.ggml.eos_token_id", value=vocabulary.roles["eos"])


def _readable(context: Context) -> Iterator[tuple[str, TemplateFacts]]:
    for key, read in context.templates.items():
        if isinstance(read, TemplateFacts):
            yield key, read
