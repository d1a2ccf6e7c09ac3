"""The chat template of a model's directory: how messages become a prompt."""

from __future__ import annotations

from engine.reading import Files

TEMPLATE = "chat_template.jinja"


def chat_template(files: Files) -> str:
    """Return the chat template, or nothing where the model has none. Raises WeightsError."""
    if files.has(TEMPLATE):
        return files.text(TEMPLATE)
    template = files.json("tokenizer_config.json").get("chat_template") or ""
    if isinstance(template, list):  # several by name
        template = next((entry["template"] for entry in template if entry["name"] == "default"), "")
    return str(template)
