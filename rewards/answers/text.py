"""Text as models and servers can take it."""

from __future__ import annotations

from rlhub.types import Prompt


class Unusable(ValueError):
    """An item that cannot be graded; the message is the reason."""


def check_text(prompt: Prompt, completion: str) -> None:
    """Raises Unusable where there is nothing to grade or a text is no Unicode (lone surrogates)."""
    if not completion.strip():
        raise Unusable("the completion is empty")
    for name, text in (("prompt", plain(prompt)), ("completion", completion)):
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise Unusable(f"the {name} has a lone surrogate at character {error.start}") from error


def plain(prompt: Prompt) -> str:
    """A prompt as one text, chat messages joined by newlines."""
    return prompt if isinstance(prompt, str) else "\n".join(message["content"] for message in prompt)
