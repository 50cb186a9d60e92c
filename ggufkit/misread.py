"""Words before numbers: whether an engine ran the tokens that its prompt should have become, and if not, why.

Most garbage that is blamed on an engine is in the prompt: a special token that was cut into text, a BOS that the
model never saw in training, a template left out. Each known mistake is applied to the prompt; the one that gives the
foreign ids is the answer.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ggufkit import chat
from ggufkit.conversation import Message, Words, message
from ggufkit.errors import GgufkitError

#: other models' templates, as people hard-code them; {} is the user's text
_OTHER_TEMPLATES = {
    "Llama 2's": "[INST] {} [/INST]",
    "Alpaca's": "### Instruction:\n{}\n\n### Response:\n",
    "Vicuna's": "USER: {} ASSISTANT:",
    "Llama 3's": "<|start_header_id|>user<|end_header_id|>\n\n{}<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n",
    "Gemma's": "<start_of_turn>user\n{}<end_of_turn>\n<start_of_turn>model\n",
    "ChatML without a system turn": "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n",
    "a plain User/Assistant": "User: {}\nAssistant:",
}


@dataclass(frozen=True, slots=True)
class Mistake:
    """What is wrong with the ids.

    Attributes:
        name, title, explanation: of the mistake; `tokens_differ` when no known one explains it.
        position: the first position that differs.
        expected, found: the texts from there on, as tokens.
    """

    name: str
    title: str
    explanation: str
    position: int
    expected: tuple[str, ...]
    found: tuple[str, ...]
    family: str = "words"


@dataclass(frozen=True, slots=True)
class _Variant:
    name: str
    title: str
    explanation: str
    ids: list[int]


def explain(words: Words, prompt: str, system: str | None, ids: Sequence[int]) -> Mistake | None:
    """Compare foreign token ids with those that the file's tokenizer and template make of a prompt.

    Returns:
        None when they are the same.

    Raises:
        UsageError, TemplateError, FormatError: the prompt cannot be rendered or encoded.
    """
    messages = [*([message("system", system)] if system is not None else []), message("user", prompt)]
    text = words.render(messages)
    expected = words.tokenizer.encode(text)
    found = list(ids)
    if found == expected:
        return None
    for variant in _variants(words, messages, text, expected, found):
        if variant.ids == found:
            return _mistake(words, variant.name, variant.title, variant.explanation, expected, found)
    title = "the token ids are not those of the prompt"
    explanation = "No known mistake gives these ids. Compare the two rows of tokens from the first difference on."
    return _mistake(words, "tokens_differ", title, explanation, expected, found)


def _mistake(words: Words, name: str, title: str, explanation: str, expected: list[int], found: list[int]) -> Mistake:
    pairs = zip(expected, found, strict=False)
    same = next((at for at, (a, b) in enumerate(pairs) if a != b), min(len(expected), len(found)))
    texts = [tuple(_token(words, token) for token in row[same : same + 8]) for row in (expected, found)]
    return Mistake(name, title, explanation, same, expected=texts[0], found=texts[1])


def _token(words: Words, token: int) -> str:
    try:
        return words.tokenizer.decode([token])
    except GgufkitError:
        return f"<{token}: outside the vocabulary>"


def _variants(
    words: Words, messages: Sequence[Message], text: str, expected: list[int], found: list[int]
) -> Iterator[_Variant]:
    """The prompt with each known mistake made, the likeliest first; rendering again is left to the end."""
    tokenizer = words.tokenizer
    prompt = messages[-1]["content"]
    yield _Variant(
        "leading_space",
        "a space was put in front of the prompt",
        "SentencePiece tokenizers add a space; byte-level BPE does not.",
        words.tokenizer.encode(" " + text),
    )
    if found[1:] == expected:
        yield _Variant(
            "bos_added",
            f"a token was put in front of the prompt: {_token(words, found[0])!r}",
            "Qwen has no BOS token, and its tokenizer's add_bos_token is false. An engine that adds one anyway, often "
            "id 1, 11 or 151643 by default, shifts every position.",
            found,
        )
    if expected[1:] == found:
        yield _Variant(
            "bos_missing",
            f"the first token is missing: {_token(words, expected[0])!r}",
            "The file asks for a BOS token, or the first token was taken for one and dropped.",
            found,
        )
    if found[:-1] == expected:
        yield _Variant(
            "token_appended",
            f"a token was added at the end: {_token(words, found[-1])!r}",
            "The prompt must end with the beginning of the assistant's turn. A tokenizer that adds EOS by itself ends "
            "the turn before it began.",
            found,
        )
    yield _Variant(
        "special_tokens_split",
        "special tokens were cut into ordinary text",
        "<|im_start|> must become one token. This tokenizer treats it as six characters and a word; the model has "
        "never seen that. Look for parse_special or allowed_special.",
        tokenizer.encode(text, parse_special=False),
    )
    yield _Variant(
        "trailing_newline_missing",
        "the newline after the assistant's role is missing",
        "The prompt ends with `<|im_start|>assistant` and a newline. Text was stripped somewhere.",
        words.tokenizer.encode(text.rstrip("\n")),
    )
    if words.templated:
        yield from _template_variants(words, messages, prompt)
    for whose, template in _OTHER_TEMPLATES.items():
        yield _Variant(
            "wrong_template",
            f"another chat template was used: {whose}",
            "Each family has its own. Use the one in the file's tokenizer.chat_template.",
            words.tokenizer.encode(template.format(prompt)),
        )


def _template_variants(words: Words, messages: Sequence[Message], prompt: str) -> Iterator[_Variant]:
    template = chat.templates(words.metadata)["default"]
    yield _Variant(
        "template_missing",
        "the chat template was not applied",
        "An instruct model continues bare text as if it were a document. Render tokenizer.chat_template first.",
        words.tokenizer.encode(prompt),
    )
    rendered = [
        (
            "system_turn_missing",
            "the system turn is missing",
            "The template writes a system turn, its own default when none is given. Without it answers change.",
            [*([message("system", "")] if len(messages) == 1 else []), messages[-1]],
            True,
        ),
        (
            "generation_prompt_missing",
            "the beginning of the assistant's turn is missing",
            "Render the template with add_generation_prompt, or the model writes the user's next words.",
            list(messages),
            False,
        ),
    ]
    for name, title, explanation, turns, generation in rendered:
        try:
            text = chat.render(template, turns, add_generation_prompt=generation)
        except GgufkitError:  # this template refuses such turns, so nobody made the mistake with it
            continue
        yield _Variant(name, title, explanation, words.tokenizer.encode(text))
        if name == "system_turn_missing":
            yield _Variant(name, title, explanation, words.tokenizer.encode(_without_first_turn(text)))


def _without_first_turn(text: str) -> str:
    """A ChatML text without its first turn."""
    end = text.find("<|im_end|>\n")
    return text[end + len("<|im_end|>\n") :] if end >= 0 else text
