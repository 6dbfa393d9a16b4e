"""Weights as others publish them: `load` reads a model, `save` writes one."""

from support.weights.formats import (  # noqa: F401
    hugging_face_config,
    hugging_face_json,
    hugging_face_tokenizer,
    load,
    openai_tokenizer,
    save,
)
