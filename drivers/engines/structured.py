"""Answers bound by a grammar: which tokens may come next, for each job by itself.

The work is llguidance's: it derives the allowed tokens from the grammar as it goes, in some
100 microseconds a token, and needs no table of the whole grammar beforehand. (xgrammar and
outlines were the alternatives: the first brings a gigabyte of packages with it, the second
compiles for seconds.)

Grammars are compiled in the thread that submits, never in the one that generates. JSON is
written as Python's ``json.dumps`` does, on one line with a blank after each comma and colon:
where blanks are free, a small model may write nothing else until its tokens are used up.
"""

from __future__ import annotations

import json
import re
import threading
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from llmos.drivers.errors import InvalidGrammar, InvalidParams
from llmos.drivers.protocols import Grammar

MAX_COMPILED = 64
"""Grammars that an engine remembers; the one that was not asked for longest goes first."""
_JSON_STYLE = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


class Grammars:
    """The grammars of one engine. Thread-safe; builds what it needs on first use."""

    def __init__(self, tokenizer: Any, vocabulary: int, eos: Sequence[int]) -> None:
        """``tokenizer``: of the tokenizers library; ``vocabulary``: columns of the logits;
        ``eos``: tokens that end an answer."""
        self._backend, self._vocabulary, self._eos = tokenizer, vocabulary, list(eos)
        self._lock = threading.Lock()
        self._tokenizer: Any = None
        self._compiled: OrderedDict[Grammar, Any] = OrderedDict()

    def bind(self, grammar: Grammar, prefix: str = "", prefix_ids: Sequence[int] = ()) -> Bound:
        """What binds one answer that begins with ``prefix``; its tokens are ``prefix_ids``.

        Raises:
            InvalidGrammar: it cannot be followed.
            InvalidParams: the prefix contradicts it.
        """
        matcher = self._matcher(grammar)
        if prefix_ids and matcher.try_consume_tokens(list(prefix_ids)) != len(prefix_ids):
            raise InvalidParams("prefix", prefix, f"the {grammar.kind} allows no such beginning")
        return Bound(grammar.kind, matcher)

    def _matcher(self, grammar: Grammar) -> Any:
        with self._lock:
            found = self._compiled.get(grammar)
            if found is not None:
                self._compiled.move_to_end(grammar)
        if found is None:
            # Outside the lock: it may take a second, and others compile something else.
            found = self._compile(grammar)
            with self._lock:
                self._compiled[grammar] = found
                while len(self._compiled) > MAX_COMPILED:
                    self._compiled.popitem(last=False)
        # The one that is kept is never advanced.
        return found.deep_copy()

    def _compile(self, grammar: Grammar) -> Any:
        from llguidance import LLMatcher

        try:
            source = source_of(grammar)
        except (ValueError, RecursionError) as error:
            raise InvalidGrammar(grammar.kind, str(error)) from error
        # log_level 0: its warnings go to stderr, and its errors are raised below anyway. Its own
        # limits bound the compiling (a tenth of a second) and each step (some 15 ms).
        matcher = LLMatcher(self._vocabulary_of(grammar), source, log_level=0)
        if not matcher.is_error():
            # The first tokens cost most, are the same for all, and show what is too complex.
            bits = np.zeros(-(-self._vocabulary // 32), dtype=np.int32)
            matcher.unsafe_compute_mask_ptr(bits.ctypes.data, bits.nbytes)
        if matcher.is_error():
            raise InvalidGrammar(grammar.kind, _reason(matcher))
        return matcher

    def _vocabulary_of(self, grammar: Grammar) -> Any:
        """The vocabulary as the library wants it: a second of work, and some 50 MB."""
        from llguidance import LLTokenizer

        with self._lock:
            if self._tokenizer is None:
                spec = json.loads(self._backend.to_str())
                spec["truncation"] = spec["padding"] = None
                try:
                    self._tokenizer = LLTokenizer(
                        json.dumps(spec), n_vocab=self._vocabulary, eos_token=self._eos or None
                    )
                except ValueError as error:
                    reason = f"this model's tokenizer cannot be bound: {error}"
                    raise InvalidGrammar(grammar.kind, reason) from error
            return self._tokenizer


class Bound:
    """See :class:`llmos.drivers.engines.sampling.Binding`. Used by one thread at a time."""

    def __init__(self, kind: str, matcher: Any) -> None:
        self._kind, self._matcher = kind, matcher

    @property
    def done(self) -> bool:
        """The grammar is complete, and nothing may follow."""
        return bool(self._matcher.is_stopped())

    def allowed(self, bits: npt.NDArray[np.int32]) -> None:
        """Set the bit of each token that may come next; ``bits`` covers the vocabulary.

        Raises:
            InvalidGrammar: it has become too complex to follow.
        """
        self._matcher.unsafe_compute_mask_ptr(bits.ctypes.data, bits.nbytes)
        self._check()

    def took(self, token: int) -> None:
        """This token came. Raises InvalidGrammar if it was not allowed."""
        if not self._matcher.consume_token(token):
            self._check()

    def _check(self) -> None:
        if self._matcher.is_error():
            raise InvalidGrammar(self._kind, _reason(self._matcher))


def source_of(grammar: Grammar) -> str:
    """The grammar in llguidance's form; it has passed ``checks.check_grammar``.

    Raises:
        ValueError, RecursionError: it is nested too deeply.
    """
    from llguidance import LLMatcher

    if grammar.kind == "json_schema":
        schema: dict[str, Any] = json.loads(grammar.source)
        # The schema's own wishes for the library are not the caller's to make.
        schema.pop("x-guidance", None)
        return str(LLMatcher.grammar_from_json_schema(json.dumps(schema), overrides=_JSON_STYLE))
    if grammar.kind == "choices":
        choices: list[str] = json.loads(grammar.source)
        # As one expression, not as alternatives: among these, no choice could begin with another.
        expression = "|".join(map(re_escape, dict.fromkeys(choices)))
        return str(LLMatcher.grammar_from_regex(f"({expression})"))
    if grammar.kind == "regex":
        return str(LLMatcher.grammar_from_regex(grammar.source))
    return str(LLMatcher.grammar_from_lark(grammar.source))


_SIGNS = re.compile(r"[\\.+*?()|\[\]{}^$/#&~\-]")


def re_escape(text: str) -> str:
    """The expression for a text. Not ``re.escape``: it escapes blanks, too, which is an error
    in the dialect of expressions that is meant here."""
    return _SIGNS.sub(lambda sign: "\\" + sign.group(), text)


def _reason(matcher: Any) -> str:
    """What the library says, without the state of its parser that it appends."""
    text: str = matcher.get_error()
    return " ".join(text.partition("<state>")[0].split())[:500]
