"""Generation: from a prompt to the model's words."""

from fettle.generation.decode import BATCH_SIZE, Sampling, complete, generate, is_chat, prompt_text, stream

__all__ = ["BATCH_SIZE", "Sampling", "complete", "generate", "is_chat", "prompt_text", "stream"]
