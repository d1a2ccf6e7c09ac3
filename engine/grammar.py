"""Grammars: what an output may look like, token by token.

A structure (a JSON schema, a regular expression, a choice, a Lark grammar) is compiled once, beside the step thread,
with bounds on its size and on the work it may cause; what cannot be enforced is refused, never ignored. Each output
then walks a state of its own: a mask says which tokens may come next, a token moves it on. A mask depends on the
tokens before it and on nothing else.

JSON is written compactly, with at most one blank after `,` and `:`: endless blanks would be valid JSON too.

Source: llguidance (https://github.com/guidance-ai/llguidance), imported where it is needed: an engine without it serves
everything else.
"""

from __future__ import annotations

import json
import re
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from threading import Lock
from typing import Any

from engine.request import RequestRefused, Structure, StructureKind

MAX_SOURCE_CHARS = 65_536
MAX_MESSAGE_CHARS = 262_144  # of a whole message, which may hold the schemas of many functions
MAX_CHOICES = 1_024
MAX_CACHED = 64  # compiled grammars
PARAM = "response_format"

# What one compilation, and one mask, may cost: about 20 ms each. Masks are made on the step thread: everybody waits.
_LIMITS: dict[str, Any] = {
    "initial_lexer_fuel": 1_000_000,
    "step_lexer_fuel": 100_000,
    "step_max_items": 5_000,
    "max_lexer_states": 10_000,  # of 1 to 2 KiB, of every output
    "max_grammar_size": 100_000,
    "verbose_errors": False,
}
_JSON = {"whitespace_flexible": False, "item_separator": ", ?", "key_separator": ": ?"}
# What the compiler names when it refuses a keyword; anything else it says may quote the schema.
_UNENFORCED = re.compile(r'Unimplemented keys: \[((?:"[A-Za-z$]{1,40}"(?:, )?)+)\]')
_ONE_OF = "oneOf constraints are not supported"


class GrammarState:
    """Where one output stands in its grammar. `mask` is of the next token, one bit an id, the lowest first."""

    __slots__ = ("_matcher", "failed", "mask")

    def __init__(self, matcher: Any) -> None:
        self._matcher = matcher
        self.failed = False  # a bound was met, or a token taken that may not come; there is no mask any more
        self.mask: bytes | None = None
        self._look()

    def take(self, token: int) -> None:
        if not self.failed and not self._matcher.consume_token(token):
            self.failed, self.mask = True, None
        self._look()

    def copy(self) -> GrammarState:
        return GrammarState(self._matcher.deep_copy())

    def _look(self) -> None:
        if self.failed:
            return
        mask = self._matcher.compute_bitmask()
        if self._matcher.is_error():
            self.failed, self.mask = True, None
        else:
            self.mask = bytes(mask)


Start = Callable[[], GrammarState]  # gives a new output its state


class Grammars:
    """The grammars of one vocabulary. Safe from any thread."""

    def __init__(self, tokenizer: Any) -> None:
        """`tokenizer`: an `llguidance.LLTokenizer`."""
        self._tokenizer = tokenizer
        self._compiled: OrderedDict[Structure, Any] = OrderedDict()
        self._lock = Lock()

    @classmethod
    def of(cls, tokenizer_json: str, vocabulary_size: int, eos_ids: Iterable[int]) -> Grammars | None:
        """Return the grammars over a Hugging Face tokenizer; None where llguidance is not installed."""
        try:
            from llguidance import LLTokenizer
        except ImportError:
            return None
        return cls(LLTokenizer(tokenizer_json, n_vocab=vocabulary_size, eos_token=sorted(eos_ids)))

    def compile(self, structure: Structure) -> Start:
        """Return what starts outputs of this structure. Cost: milliseconds, at most some ten; then none.

        Raises: RequestRefused: it cannot be enforced, or is too large; names the keyword where it is one.
        """
        with self._lock:
            matcher = self._compiled.get(structure)
            if matcher is None:
                matcher = self._compiled[structure] = self._matcher(structure)
                if len(self._compiled) > MAX_CACHED:
                    self._compiled.popitem(last=False)
            self._compiled.move_to_end(structure)
        return lambda: GrammarState(matcher.deep_copy())

    def _matcher(self, structure: Structure) -> Any:
        from llguidance import LLMatcher, LLParserLimits

        most = MAX_MESSAGE_CHARS if structure.kind is StructureKind.MESSAGE else MAX_SOURCE_CHARS
        if len(structure.source) > most:
            raise RequestRefused(f"the structure is longer than {most} characters", PARAM)
        try:
            source = _source(structure)
        except ValueError:
            raise RequestRefused("the structure is not of its form", PARAM) from None
        matcher = LLMatcher(self._tokenizer, source, log_level=0, limits=LLParserLimits(**_LIMITS))
        if matcher.is_error():
            raise RequestRefused(_refusal(matcher.get_error()), PARAM)
        if GrammarState(matcher.deep_copy()).failed:
            raise RequestRefused("the structure is too complex to be enforced; simplify it", PARAM)
        return matcher


def message_source(lark: str, parts: Mapping[str, Structure]) -> str:
    """Return the source of a MESSAGE: a Lark grammar that refers to its parts as `@name`."""
    return json.dumps({"lark": lark, "parts": {name: [part.kind, part.source] for name, part in parts.items()}})


def _composed(source: str) -> str:
    message = json.loads(source)
    parts = [_part(name, Structure(StructureKind(kind), text)) for name, (kind, text) in message["parts"].items()]
    return json.dumps({"grammars": [{"name": "message", "lark_grammar": message["lark"]}, *parts]})


def _part(name: str, structure: Structure) -> dict[str, Any]:
    source = _source(structure)
    if not source.startswith("{"):
        return {"name": name, "lark_grammar": source}
    (grammar,) = json.loads(source)["grammars"]
    return {**grammar, "name": name}


def _source(structure: Structure) -> str:
    """Return the grammar in the compiler's own form. Raises: ValueError."""
    from llguidance import LLMatcher

    if structure.kind is StructureKind.MESSAGE:
        return _composed(structure.source)
    if structure.kind is StructureKind.JSON_SCHEMA:
        # What the schema itself would set of the compiler, such as to be lenient, is overruled.
        overrides: Any = {**_JSON, "lenient": False, "coerce_one_of": False}
        return LLMatcher.grammar_from_json_schema(structure.source, overrides=overrides)
    if structure.kind is StructureKind.REGEX:
        return LLMatcher.grammar_from_regex(structure.source)
    if structure.kind is StructureKind.CHOICE:
        return LLMatcher.grammar_from_lark(f"start: {' | '.join(map(json.dumps, _choices(structure.source)))}")
    return LLMatcher.grammar_from_lark(structure.source)


def _choices(source: str) -> list[str]:
    choices = json.loads(source)
    if not isinstance(choices, list) or not 1 <= len(choices) <= MAX_CHOICES:
        raise ValueError("not a list of choices")
    if not all(isinstance(choice, str) and choice for choice in choices):
        raise ValueError("a choice is a text")
    return choices


def _refusal(error: str) -> str:
    """Return what the caller is told: the keyword, never the rest, which may quote what was sent."""
    named = _UNENFORCED.search(error)
    if named is not None:
        keywords = ", ".join(f"`{keyword}`" for keyword in re.findall(r'"([A-Za-z$]+)"', named.group(1)))
        return f"the JSON schema uses {keywords}, which cannot be enforced; leave it out"
    if _ONE_OF in error:
        return "the JSON schema uses `oneOf` in a way that cannot be enforced; use `anyOf`"
    return "the structure is not valid, or cannot be enforced"
