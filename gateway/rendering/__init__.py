"""How each endpoint writes an answer: pieces in, bytes out. No pydantic here: a chunk is a dict and orjson."""
