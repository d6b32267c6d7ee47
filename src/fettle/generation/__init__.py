"""Generation: from a prompt to the model's words."""

from fettle.generation.decode import Sampling, complete, generate, is_chat, prompt_text, stream

__all__ = ["Sampling", "complete", "generate", "is_chat", "prompt_text", "stream"]
