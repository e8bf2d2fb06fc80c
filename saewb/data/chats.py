"""Chats as prompts: messages -> token ids by the model's chat template, with the role of every position."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn

from saewb.errors import explain, near
from saewb.models.tokenizer import token_strings, tokenizer_of

ROLES = ("system", "user", "assistant")
_ROLE_LINE = re.compile(rf"^({'|'.join(ROLES)}):[ \t]*", re.MULTILINE)


@dataclass(frozen=True, eq=False)
class ChatPrompt:
    """A chat in a model's tokens, with the role of every position: the result of `saewb.chat_prompt`."""

    messages: tuple[Mapping[str, str], ...]
    """Each with "role" and "content"."""
    ids: Int[Tensor, "1 pos"]
    """Token ids, on the CPU."""
    roles: tuple[str, ...]
    """Role of each position: that of its message; "" for what the template writes before an assistant's message."""
    tokens: tuple[str, ...]
    """Text of each token."""
    n_ctx: int
    """Positions of the model's context."""

    def __len__(self) -> int:
        return self.ids.shape[1]

    def __repr__(self) -> str:
        return f"ChatPrompt({len(self.messages)} messages, {len(self)} tokens: {', '.join(dict.fromkeys(self.roles))})"

    def positions(self, role: str) -> list[int]:
        """Positions of a role, for `saewb.steer(..., positions=)`; of the assistant also those that it will write.

        Args:
            role: of a message; or "assistant", whose answer follows the prompt.

        Raises:
            ValueError: if no message has it.
        """
        roles = sorted({*filter(None, self.roles), "assistant"})
        if role not in roles:
            what = f"no message has the role {role!r}."
            raise ValueError(explain(what, near=near(role, roles), want=", ".join(roles)))
        written = range(len(self), self.n_ctx) if role == "assistant" else ()
        return [*(i for i, one in enumerate(self.roles) if one == role), *written]

    def to_frame(self) -> Any:
        """A DataFrame, a row per position: position, token, id, role."""
        import pandas as pd

        columns = {"token": self.tokens, "id": self.ids[0].tolist(), "role": self.roles}
        return pd.DataFrame({"position": range(len(self)), **columns})


def chat_prompt(model: nn.Module, messages: Sequence[Mapping[str, str]]) -> ChatPrompt:
    """Write a chat in the model's chat template, ready for the assistant's answer, with the role of every position.

    After a user's (or system's) message the template opens the assistant's; an assistant's message at the end is left
    open, and continued. `saewb.read_prompt`, `next_tokens`, `generate_tokens` and the like take messages in place of a
    text, and read the same ids.

    Args:
        model: with a tokenizer that has a chat template.
        messages: dictionaries with "role" and "content", in order.

    Returns:
        A ChatPrompt: `.ids`, `.roles`, `.positions(role)`, `.to_frame()`.

    Raises:
        TypeError: if they are no messages.
        ValueError: without a chat template, or messages; if the template writes the beginning of a chat in another way
            when more follows, so that positions have no role.

    Example:
        >>> import saewb
        >>> model = saewb.load_model("tiny", device="cpu")
        >>> model.tokenizer.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\\n{% endfor %}"
        >>> chat = chat_prompt(model, [{"role": "user", "content": "Where is Paris?"}])
        >>> chat, chat.positions("user")[:3]
        (ChatPrompt(1 messages, 9 tokens: user), [0, 1, 2])
        >>> model.tokenizer.chat_template = None
    """
    messages = check_messages(messages)
    tokenizer = tokenizer_of(model)
    ids = chat_ids(tokenizer, messages)
    roles = [""] * len(ids)
    for role, begin, end in role_spans(tokenizer, messages, ids):
        roles[begin:end] = [role] * (end - begin)
    tensor = torch.tensor([ids])
    return ChatPrompt(tuple(messages), tensor, tuple(roles), tuple(token_strings(tokenizer, ids)), int(model.cfg.n_ctx))


def is_chat(prompt: object) -> bool:
    """Whether a prompt is a list of messages."""
    return isinstance(prompt, (list, tuple)) and bool(prompt) and all(isinstance(part, Mapping) for part in prompt)


def check_messages(messages: Any) -> list[Mapping[str, str]]:
    """Check that these are messages, and return them as a list.

    Raises:
        TypeError: if they are not.
    """
    fields = ("role", "content")
    if not is_chat(messages) or not all(isinstance(m.get(name), str) for m in messages for name in fields):
        fix = 'messages = [{"role": "user", "content": "Where is Paris?"}]'
        raise TypeError(explain(f"got {type(messages).__name__} as messages.", want="role and content", fix=fix))
    return list(messages)


def chat_ids(tokenizer: Any, messages: Sequence[Mapping[str, str]]) -> list[int]:
    """Token ids of a chat that the assistant is to answer, or whose last message it continues.

    Raises:
        ValueError: if the tokenizer has no chat template.
    """
    if getattr(tokenizer, "chat_template", None) is None:
        fix = "tokenizer.chat_template = ..."
        raise ValueError(explain("this tokenizer has no chat template.", want="a text, or a chat model", fix=fix))
    is_open = messages[-1]["role"] == "assistant"
    how = {"continue_final_message": True} if is_open else {"add_generation_prompt": True}
    return tokenizer.apply_chat_template(list(messages), tokenize=True, return_dict=False, **how)


def messages_of(text: str) -> list[dict[str, str]]:
    """Read a chat from a text: a line that begins with "system:", "user:" or "assistant:" begins a message.

    Without any such line the text is one message of the user.

    Example:
        >>> messages_of("system: Be brief.\\nuser: Where is Paris?")
        [{'role': 'system', 'content': 'Be brief.'}, {'role': 'user', 'content': 'Where is Paris?'}]
        >>> messages_of("Where is Paris?")
        [{'role': 'user', 'content': 'Where is Paris?'}]
    """
    before, *parts = _ROLE_LINE.split(text)
    if not parts:
        return [{"role": "user", "content": text}]
    pairs = [("user", before)] if before.strip() else []
    pairs += list(zip(parts[::2], parts[1::2], strict=True))
    last = len(pairs) - 1
    return [{"role": r, "content": c if i == last else c.removesuffix("\n")} for i, (r, c) in enumerate(pairs)]


def role_spans(
    tokenizer: Any, messages: Sequence[Mapping[str, str]], ids: Sequence[int], bos: int | None = None
) -> list[tuple[str, int, int]]:
    """Role, first and next position of each message, without what opens an assistant's.

    Args:
        tokenizer: with a chat template.
        messages: the chat.
        ids: of it, from the same template; may be cut.
        bos: token at the beginning of `ids` that the template may not have written.

    Raises:
        ValueError: if the template writes the beginning of a chat in another way when more follows.
    """
    ids = list(ids)

    def length(n: int, opened: bool) -> int:
        """Tokens of the first n messages, with what opens the next one."""
        if n == 0 and not opened:
            return 0
        part = tokenizer.apply_chat_template(
            list(messages[:n]), tokenize=True, return_dict=False, add_generation_prompt=opened
        )
        part = part if bos is None or part[:1] == [bos] else [bos, *part]
        if part != ids[: len(part)] and len(part) <= len(ids):
            what = "this chat template writes the beginning of a chat in another way when more follows."
            raise ValueError(explain(what, want="a mask", fix="positions=lambda ids: mask_of(ids)"))
        return min(len(part), len(ids))

    spans = []
    for n, message in enumerate(messages):
        is_answer = n > 0 and message["role"] == "assistant"
        spans.append((message["role"], length(n, opened=is_answer), length(n + 1, opened=False)))
    return spans
