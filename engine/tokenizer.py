"""Text ↔ tokens: chat template, encoding, and text as it becomes certain while tokens arrive.

A control token is written by the template or by the model, never by a user: a message whose content spells one out is
refused, and plain text is encoded with such spellings as the plain text they are. Templates run in Jinja's sandbox.

Source: Hugging Face tokenizers (tokenizer.json); the byte alphabet of GPT-2.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

import tokenizers
from jinja2 import TemplateError, meta
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from engine.chat_template import chat_template
from engine.config import UnsupportedModel
from engine.dialect import TAGS, Dialect, ToolFormat
from engine.reading import Files, WeightsError
from engine.request import RequestRefused

REPLACEMENT = "\ufffd"
_BYTE_NAME = re.compile(r"<0x[0-9A-F]{2}>")  # of a byte for which a vocabulary has no character
MAX_HELD_TOKENS = 8  # an incomplete character is at most four bytes, so at most four byte tokens


class Tokenizer:
    """`runtime.Codec` over a model's directory."""

    def __init__(self, files: Files) -> None:
        """Raises: WeightsError, UnsupportedModel."""
        config = files.json("tokenizer_config.json")
        self._tokenizer = _load(files)
        self._plain = _load(files)
        self._plain.encode_special_tokens = True  # `<|im_end|>` in plain text is ten characters
        added = self._tokenizer.get_added_tokens_decoder()
        template = chat_template(files)
        self.dialect = Dialect.of(template, frozenset(entry.content for entry in added.values()))
        self._special_ids = frozenset(token for token, entry in added.items() if entry.special)
        self._special = frozenset(added[token].content for token in self._special_ids)
        self._variables = {
            name: _content(config.get(name)) for name in ("bos_token", "eos_token", "pad_token", "unk_token")
        }
        self._template = _compile(template)
        self._options = _options(template) - set(self._variables)
        # A token for what the vocabulary lacks is special too, but any rare character becomes it.
        unknown = self._variables["unk_token"]
        self._control_ids = self._special_ids - {None if unknown is None else self._tokenizer.token_to_id(unknown)}
        self.eos_ids = self._eos(files)

    @property
    def vocabulary_size(self) -> int:
        return int(self._tokenizer.get_vocab_size())

    @property
    def json(self) -> str:
        """The tokenizer itself, in the form of tokenizer.json."""
        return str(self._tokenizer.to_str())

    def render_chat(
        self,
        messages: Sequence[Mapping[str, object]],
        *,
        tools: Sequence[Mapping[str, object]] = (),
        options: Mapping[str, object] | None = None,
    ) -> str:
        """Return the prompt text, generation prompt included.

        Raises: RequestRefused: the model has no template, the template refuses or does not know what it is given, or
            content spells a control token.
        """
        if self._template is None:
            raise RequestRefused("this model has no chat template; use `/v1/completions`", param="messages")
        self._refuse_unknown(messages, tools, options or {})
        for param, values in (("messages", messages), ("tools", tools), ("chat_template_kwargs", [options or {}])):
            if any(self._spells_control(text) for text in _texts(values)):
                raise RequestRefused(f"`{param}` spells out a control token of the model; remove it", param=param)
        variables = {**self._variables, "tools": list(tools) or None, "documents": None, **(options or {})}
        rendered = self._render(messages, variables)
        neutral = self._render([_neutral(message) for message in messages], variables)
        if self._controls(rendered) != self._controls(neutral):
            # Pieces that are harmless alone have met in the template and spell a control token together.
            raise RequestRefused("the messages spell out a control token of the model; remove it", param="messages")
        return rendered

    def _refuse_unknown(
        self,
        messages: Sequence[Mapping[str, object]],
        tools: Sequence[Mapping[str, object]],
        options: Mapping[str, object],
    ) -> None:
        """A template leaves out without a word what it does not know; the caller must know."""
        if self.dialect.tools is ToolFormat.NONE:
            if tools:
                raise RequestRefused("this model knows no tools; leave `tools` out", param="tools")
            if any(message.get("tool_calls") or message["role"] == "tool" for message in messages):
                raise RequestRefused("this model knows no tools; leave their calls and results out", param="messages")
        for name in options:
            if name not in self._options:
                message = "`chat_template_kwargs` names a variable that the model's chat template does not have"
                raise RequestRefused(message, param="chat_template_kwargs")

    def _render(self, messages: Sequence[Mapping[str, object]], variables: Mapping[str, object]) -> str:
        try:
            return str(self._template.render(messages=messages, add_generation_prompt=True, **variables))
        except (TemplateError, TypeError, ValueError, KeyError, ArithmeticError, RecursionError) as error:
            raise RequestRefused("the model's chat template refuses these messages", param="messages") from error

    def _spells_control(self, text: str) -> bool:
        """By name, and as the tokenizer itself reads it: what it normalises may be spelt in other characters."""
        return any(special in text for special in self._special) or bool(self._controls(text))

    def _controls(self, text: str) -> list[int]:
        ids = self._tokenizer.encode(text, add_special_tokens=False).ids
        return [token for token in ids if token in self._control_ids]

    def encode(self, text: str, *, chat: bool) -> list[int]:
        """Return token ids; see `request.Engine.encode`."""
        if chat:
            return list(self._tokenizer.encode(text, add_special_tokens=False).ids)
        return list(self._plain.encode(text, add_special_tokens=True).ids)

    def decode(self, tokens: Sequence[int]) -> str:
        """Return the text of tokens; control tokens have none."""
        return str(self._tokenizer.decode(list(tokens), skip_special_tokens=True))

    def token_text(self, token: int) -> bytes:
        """Return the bytes of one token, as it stands behind others; of a control token, its name.

        Alone it would lose the blank it begins with, where a decoder drops that of a whole text.
        """
        name = self._tokenizer.id_to_token(token)
        if name is None:
            return b""
        if token in self._special_ids:
            return str(name).encode()
        if self.is_byte_level:
            return self.plain_bytes(token)
        alone = self.decode([token])
        if _BYTE_NAME.fullmatch(name) and alone != name:
            return bytes([int(name[3:5], 16)])
        return self.decode([token, token])[len(alone) :].encode()

    def plain_bytes(self, token: int) -> bytes:
        """Return what a token of a byte-level vocabulary adds to the text: bytes, none for a control token."""
        name = self._tokenizer.id_to_token(token)
        if name is None or token in self._special_ids:
            return b""
        # A token that was added with characters outside the byte alphabet stands for itself.
        if all(character in _BYTE_OF for character in name):
            return bytes(_BYTE_OF[character] for character in name)
        return str(name).encode()

    @cached_property
    def is_byte_level(self) -> bool:
        """Whether every token stands for bytes, whatever its neighbours are."""
        return type(self._tokenizer.decoder).__name__ == "ByteLevel"

    def _eos(self, files: Files) -> frozenset[int]:
        """Return every id that ends an answer: the tokenizer's, and those of generation_config.json."""
        ids: set[int] = set()
        name = self._variables["eos_token"]
        if name is not None and (token := self._tokenizer.token_to_id(name)) is not None:
            ids.add(token)
        for file in ("generation_config.json", "config.json"):
            if files.has(file):
                value = files.json(file).get("eos_token_id")
                ids.update(value if isinstance(value, list) else [] if value is None else [value])
        if not ids:
            raise UnsupportedModel("the model names no end-of-sequence token; answers would never end")
        return frozenset(ids)


class IncrementalDetokenizer:
    """Tokens of one output → its text, as soon as it is certain.

    What may still be part of a character or of a stop string is held. The released pieces, joined, are the decoded
    text up to the stop string that is complete first, the longest of those that end together, however the tokens were
    split into pushes.
    """

    def __init__(self, tokenizer: Tokenizer, stop: tuple[str, ...]) -> None:
        self._tokenizer = tokenizer
        self._stop = stop
        self._longest_stop = max(map(len, stop), default=0)
        self._bytes = codecs.getincrementaldecoder("utf-8")(errors="replace") if tokenizer.is_byte_level else None
        self._tokens: list[int] = []  # without bytes: those whose text may depend on each other
        self._read = ""  # the text of self._tokens that was taken already
        self._held = ""  # taken text that may begin a stop string
        self._stopped = False

    def push(self, token_ids: Sequence[int]) -> tuple[str, bool]:
        """Return the text now certain, and whether a stop string was completed: it and what follows it is dropped."""
        released: list[str] = []
        for token in token_ids:
            if self._stopped:
                break
            released.append(self._take(self._text_of(token)))
        return "".join(released), self._stopped

    def finish(self) -> str:
        """Return what is still held back, once no token will follow."""
        if self._stopped:
            return ""
        if self._bytes is not None:
            rest = self._bytes.decode(b"", final=True)
        else:
            rest = self._tokenizer.decode(self._tokens)[len(self._read) :]
            self._tokens, self._read = [], ""
        released = self._take(rest)
        if self._stopped:
            return released
        held, self._held = self._held, ""
        return released + held

    def _text_of(self, token: int) -> str:
        """Return the text that `token` completes; none while a character is incomplete."""
        if self._bytes is not None:
            return self._bytes.decode(self._tokenizer.plain_bytes(token))
        self._tokens.append(token)
        text = self._tokenizer.decode(self._tokens)
        if text.endswith(REPLACEMENT) and len(self._tokens) <= MAX_HELD_TOKENS:
            return ""
        new = text[len(self._read) :]
        # The last token stays as context: some decoders strip a blank that begins a text.
        self._tokens = self._tokens[-1:]
        self._read = self._tokenizer.decode(self._tokens)
        return new

    def _take(self, text: str) -> str:
        """Add text behind what is held, and return what no stop string can claim any more."""
        if not self._stop:
            return text
        self._held += text
        found = [(at + len(stop), at) for stop in self._stop if (at := self._held.find(stop)) >= 0]
        if found:
            self._stopped = True
            _, at = min(found)
            return self._held[:at]
        keep = self._undecided()
        released, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return released

    def _undecided(self) -> int:
        """Return how many characters at the end of the held text may begin a stop string."""
        for length in range(min(self._longest_stop - 1, len(self._held)), 0, -1):
            if any(stop.startswith(self._held[-length:]) for stop in self._stop):
                return length
        return 0


def _load(files: Files) -> tokenizers.Tokenizer:
    if not files.has("tokenizer.json"):
        raise WeightsError("`tokenizer.json` is missing in the model directory; save it with a fast tokenizer")
    source = files.text("tokenizer.json")
    try:
        return tokenizers.Tokenizer.from_str(_with_tags_as_text(source))
    except Exception as error:  # the library raises a bare Exception for a file it cannot read
        raise WeightsError("`tokenizer.json` of the model directory cannot be read") from error


def _with_tags_as_text(source: str) -> str:
    """The tags of a dialect are text that is read, whatever the vocabulary calls them."""
    stored = json.loads(source)
    for entry in stored.get("added_tokens", ()):
        entry["special"] = entry["special"] and entry["content"] not in TAGS
    return json.dumps(stored)


def _compile(source: str) -> Any:
    if not source:
        return None
    environment = _environment()
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _refuse
    try:
        return environment.from_string(source)
    except TemplateError as error:
        raise UnsupportedModel("the model's chat template is not valid Jinja") from error


def _environment() -> ImmutableSandboxedEnvironment:
    return ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])


def _options(source: str) -> set[str]:
    """Return the variables that a caller may set in a template.

    A template is told no date: the same messages make the same prompt whenever they are rendered.
    """
    named = meta.find_undeclared_variables(_environment().parse(source))
    return named - {
        "messages",
        "tools",
        "documents",
        "add_generation_prompt",
        "raise_exception",
        "strftime_now",
        "range",
        "dict",
    }


def _to_json(value: object, indent: int | None = None) -> str:
    """As Hugging Face renders it: Jinja's own escapes characters for HTML, which a model was never shown."""
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _refuse(message: str) -> str:
    raise TemplateError(message)


def _texts(value: object) -> Iterator[str]:
    """Yield every text of a message: role, content and name as well as what is nested in them."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _texts(key)
            yield from _texts(inner)
    elif isinstance(value, Sequence):
        for inner in value:
            yield from _texts(inner)


def _neutral(message: Mapping[str, object]) -> dict[str, object]:
    """Return the message with a letter for each text of its content; roles decide how a template renders and stay."""
    free = ("content", "reasoning_content", "tool_calls")
    return {key: _letters(value) if key in free else value for key, value in message.items()}


def _letters(value: object) -> object:
    if isinstance(value, str):
        return "x" if value else ""
    if isinstance(value, Mapping):
        return {key: inner if key in ("type", "name") else _letters(inner) for key, inner in value.items()}
    if isinstance(value, Sequence):
        return [_letters(inner) for inner in value]
    return value


def _content(token: Any) -> str | None:
    """Special tokens stand in the configuration as text, or as an object around it."""
    return token.get("content") if isinstance(token, dict) else token


def _byte_alphabet() -> dict[str, int]:
    """Return which byte each character of a byte-level vocabulary stands for (GPT-2's table)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    characters = [*map(chr, printable), *(chr(256 + index) for index in range(len(others)))]
    return dict(zip(characters, [*printable, *others], strict=True))


_BYTE_OF = _byte_alphabet()
