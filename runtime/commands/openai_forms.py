"""Requests and responses in the form of OpenAI's API, as far as kvrun can do what they ask for."""

from __future__ import annotations

import time
import uuid
from typing import TYPE_CHECKING, Any

from kvrun.errors import OptionError
from kvrun.options import StreamKeywords, declared, shown

if TYPE_CHECKING:
    from kvrun.request import GenerationResult
    from kvrun.session import Stats

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
URLS = (CHAT, TEXT)

# Fields that would make another answer of it, and the values with which they ask for nothing.
_NOT_DONE: dict[str, tuple[Any, ...]] = {
    "audio": (),
    "best_of": (1,),
    "echo": (False,),
    "frequency_penalty": (0, 0.0),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "logit_bias": ({},),
    "logprobs": (False,),
    "modalities": (["text"],),
    "n": (1,),
    "presence_penalty": (0, 0.0),
    "response_format": ({"type": "text"},),
    "stream": (False,),
    "suffix": ("",),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "top_logprobs": (0,),
    "web_search_options": (),
}


def request(url: str, body: Any) -> tuple[str | list[Any], dict[str, Any]]:
    """The prompt and the options of `Session.stream` that a request body gives. What else is in it is ignored.

    OptionError if it has no prompt, or asks for what would change the answer and is not done here.
    """
    if not isinstance(body, dict):
        raise OptionError(f"body: must be an object, not {shown(body)}")
    for name, harmless in _NOT_DONE.items():
        value = body.get(name)
        if value is not None and not any(type(value) is type(other) and value == other for other in harmless):
            raise OptionError(f"{name}: kvrun cannot do that: {shown(value)}")
    options = {name: body[name] for name in declared(StreamKeywords) if name in body and name != "raw"}
    if body.get("max_completion_tokens") is not None:
        options["max_tokens"] = body["max_completion_tokens"]
    if url == CHAT:
        return conversation(body.get("messages")), options
    return _text(body.get("prompt")), {**options, "raw": True}


def conversation(messages: Any) -> list[Any]:
    """The messages if they are a list of objects, which a list of token ids is not. OptionError otherwise."""
    if not isinstance(messages, list) or not messages or not all(isinstance(message, dict) for message in messages):
        raise OptionError("messages: must be a list of objects with role and content")
    return messages


def _text(prompt: Any) -> str | list[Any]:
    """A text or token ids; of a list of prompts, the only one."""
    if isinstance(prompt, list) and prompt and isinstance(prompt[0], (str, list)):
        if len(prompt) > 1:
            raise OptionError(f"prompt: one answer to a request, not to {len(prompt)} prompts; give each its own line")
        prompt = prompt[0]
    if not isinstance(prompt, (str, list)) or (isinstance(prompt, list) and any(isinstance(i, dict) for i in prompt)):
        raise OptionError(f"prompt: must be text or token ids, not {shown(prompt)}")
    return prompt


def response(url: str, model: str, result: GenerationResult) -> dict[str, Any]:
    """The chat.completion or text_completion of an answer. `model`: its name."""
    end = {"logprobs": None, "finish_reason": result.finish_reason}
    if url == CHAT:
        kind, name = "chat.completion", "chatcmpl"
        content: dict[str, Any] = {"message": {"role": "assistant", "content": result.text}}
    else:
        kind, name, content = "text_completion", "cmpl", {"text": result.text}
    return {
        "id": f"{name}-{uuid.uuid4().hex}",
        "object": kind,
        "created": int(time.time()),
        "model": model,
        "choices": [{"index": 0, **content, **end}],
        "usage": {
            **usage(result.stats),
            "prompt_tokens_details": {"cached_tokens": result.stats.cached_tokens},
        },
    }


def error(message: str) -> dict[str, Any]:
    """The body of a response to a request that cannot be answered."""
    return {"error": {"message": message, "type": "invalid_request_error", "param": None, "code": None}}


def usage(stats: Stats) -> dict[str, int]:
    """Tokens of the prompt, fed or not, and of the answer."""
    prompt, answer = stats.prompt_tokens + stats.cached_tokens, stats.answer_tokens
    return {"prompt_tokens": prompt, "completion_tokens": answer, "total_tokens": prompt + answer}
