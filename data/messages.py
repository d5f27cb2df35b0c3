"""Conversations in JSON, as data sets on the hub have them: lists of messages {"role", "content"}.

    sft          {"messages"}: every turn of the assistant is to be learnt; or {"prompt", "completion"}, or a pair's chosen
    preference   {"prompt", "chosen", "rejected"}, or whole conversations as chosen and rejected, which begin with the prompt
    prompts      {"messages"} or {"prompt"}, up to the last turn of the user; or a pair's prompt

A text in `prompt` beside whole conversations is not read: in published data it is often something else.
"""

from base.errors import UserError
from data.examples import Example, Messages, only_text_views
from data.jsonl import get

FIELDS = ("messages", "prompt", "completion", "chosen", "rejected")
ROLES = ("system", "user", "assistant")
DROPPED = ""  # examples() always gives one


def is_record(record: dict) -> bool:
    """Whether an object has a conversation in it."""
    return any(isinstance(record.get(field), list) for field in FIELDS)


def conversation(record: dict, field: str, where: str, before: Messages = (), ends: str = "assistant") -> Messages:
    """The messages of a field, which go on from the messages `before` and end with a turn of the role `ends`.

    UserError unless a system message or none is followed by turns of user and assistant in turns, none of them empty.
    """
    found = get(record, field, list, where)
    for n, message in enumerate(found, start=1):
        at = f"{where}: message {n} of {field!r}"
        if not isinstance(message, dict):
            raise UserError(f'{at} must be {{"role": …, "content": …}}, not {message!r:.60}')
        role, content = get(message, "role", str, at), get(message, "content", str, at)
        if role not in ROLES:
            raise UserError(f"{at}: the role {role!r} is unknown: use {', '.join(ROLES)}")
        if not content and role != "system":
            raise UserError(f"{at}: the content is empty: give a text, or leave the conversation out")
        last = found[n - 2]["role"] if n > 1 else before[-1]["role"] if before else ""
        if role not in {"": ROLES[:2], "system": ("user",), "user": ("assistant",), "assistant": ("user",)}[last]:
            what = f"comes after the {last}'s" if last else "comes first"
            raise UserError(f"{at}: a turn of the {role} {what}: user and assistant take turns, the user begins")
    if not found or found[-1]["role"] != ends:
        what = f"ends with the {found[-1]['role']}" if found else "is empty"
        raise UserError(f"{where}: the conversation in {field!r} {what}: its last turn must be of the {ends}")
    return tuple(found)


def pair(record: dict, where: str) -> tuple[Messages, Messages, Messages]:
    """(prompt, chosen, rejected) of a line of preference data."""
    first = next(iter(get(record, "chosen", list, where)), None)
    if isinstance(first, dict) and first.get("role") == "assistant":  # answers alone
        prompt = conversation(record, "prompt", where, ends="user")
        return prompt, *(conversation(record, field, where, prompt) for field in ("chosen", "rejected"))
    chosen, rejected = (conversation(record, field, where) for field in ("chosen", "rejected"))
    both = list(zip(chosen[:-1], rejected[:-1], strict=False))  # equal to the end they are a pair of one answer
    n = next((i for i, (a, b) in enumerate(both) if (a["role"], a["content"]) != (b["role"], b["content"])), len(both))
    if not n or chosen[n - 1]["role"] != "user":
        raise UserError(f"{where}: 'chosen' and 'rejected' do not part at an answer: they answer no common prompt")
    return chosen[:n], chosen[n:], rejected[n:]


def examples(record: dict, view: str, group: int, where: str) -> list[Example]:
    """A line as the examples of a view."""
    only_text_views(where, view)
    if view == "preference":
        prompt, *answers = pair(record, where)
        return [Example(prompt, tuple(answers), source=where)]
    if "messages" in record:
        return [Example((), (conversation(record, "messages", where),), source=where)]
    if "completion" in record or "chosen" not in record:
        prompt = conversation(record, "prompt", where, ends="user")
        return [Example(prompt, (conversation(record, "completion", where, prompt),), source=where)]
    prompt, chosen, _ = pair(record, where)
    return [Example(prompt, (chosen,), source=where)]


def prompt_of(record: dict, where: str) -> str | Messages:
    """What a line asks a model: its text in `prompt`, or a conversation that ends with the user. What comes behind that in
    `messages` is left out."""
    if not is_record(record):
        return get(record, "prompt", str, where)
    field = next((name for name in ("messages", "prompt") if isinstance(record.get(name), list)), None)
    if field is None:
        return pair(record, where)[0]
    found = record[field]
    if found and isinstance(found[-1], dict) and found[-1].get("role") == "assistant":
        found = found[:-1]
    return conversation({field: found}, field, where, ends="user")


def as_text(prompt: str | Messages) -> str:
    """A prompt or an answer for people and judges to read: its text; of several messages each with its role."""
    if isinstance(prompt, str) or len(prompt) == 1:
        return prompt if isinstance(prompt, str) else prompt[0]["content"]
    return "\n\n".join(f"{message['role'].capitalize()}: {message['content']}" for message in prompt)
