"""Vectors as `/v1/embeddings` writes them."""

from __future__ import annotations

from base64 import b64decode

import numpy as np
import orjson

from gateway.answer import Piece, Usage


class EmbeddingsRenderer:
    """`list` of `embedding`; a piece is a vector in base64. It is never streamed."""

    def __init__(self, model: str, *, base64: bool) -> None:
        self._model = model
        self._base64 = base64

    def whole(self, texts: list[list[Piece]], usage: Usage) -> bytes:
        data = [
            {"object": "embedding", "index": index, "embedding": self._vector("".join(piece.text for piece in pieces))}
            for index, pieces in enumerate(texts)
        ]
        counts = {"prompt_tokens": usage.prompt_tokens, "total_tokens": usage.prompt_tokens}
        body = {"object": "list", "data": data, "model": self._model, "usage": counts}
        return orjson.dumps(body, option=orjson.OPT_SERIALIZE_NUMPY)

    def _vector(self, text: str) -> object:
        return text if self._base64 else np.frombuffer(b64decode(text), dtype=np.float32)  # in its shortest decimals
