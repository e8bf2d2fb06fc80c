"""Chats as prompts: ids of the template, roles of positions, messages from a text, what is refused."""

import pytest
import torch
from helpers import tiny_models

import saewb
from saewb.data.chats import messages_of

TEMPLATE = (
    "<bos> {% for m in messages %}{{ {'system': 'w19', 'user': 'w20', 'assistant': 'w21'}[m.role] }} {{ m.content }} "
    "w22 {% endfor %}{% if add_generation_prompt %}w21{% endif %}"
)
CHAT = [
    {"role": "system", "content": "w0"},
    {"role": "user", "content": "w1 w2"},
    {"role": "assistant", "content": "w3 w4 w5"},
    {"role": "user", "content": "w6"},
]


@pytest.fixture
def chat_model():
    model = tiny_models.new_bridge()
    model.tokenizer.chat_template = TEMPLATE
    yield model
    model.tokenizer.chat_template = None


def test_ids_are_the_templates_and_each_position_has_its_role(chat_model):
    chat = saewb.chat_prompt(chat_model, CHAT)
    shown = list(zip(chat.tokens, chat.roles, strict=True))
    words = [(text.strip(), role) for text, role in shown]
    assert words == [
        *(("<bos>", "system"), ("w19", "system"), ("w0", "system"), ("w22", "system")),
        *((word, "user") for word in ("w20", "w1", "w2", "w22")),
        ("w21", ""),
        *((word, "assistant") for word in ("w3", "w4", "w5", "w22")),
        *((word, "user") for word in ("w20", "w6", "w22")),
        ("w21", ""),
    ]
    assert chat.to_frame().role.tolist() == list(chat.roles)
    assert chat.positions("user") == [4, 5, 6, 7, 13, 14, 15]
    assert chat.positions("assistant") == [9, 10, 11, 12, *range(17, 64)]
    with pytest.raises(ValueError, match="near: user"):
        chat.positions("usr")


def test_every_function_of_a_prompt_takes_messages(chat_model):
    chat, sae = saewb.chat_prompt(chat_model, CHAT), tiny_models.sae("blocks.1.hook_resid_post")
    assert saewb.read_prompt(chat_model, CHAT, sae).ids == tuple(chat.ids[0].tolist())
    assert saewb.next_tokens(chat_model, CHAT).tokens == chat.tokens
    by_ids, by_chat = (
        [t.token_id for t in saewb.generate_tokens(chat_model, p, max_new_tokens=4)] for p in (chat.ids, CHAT)
    )
    assert by_ids == by_chat
    sweep = saewb.steering_sweep(chat_model, sae, 3, [CHAT], [4.0], n_new_tokens=4, progress=False)
    assert set(sweep.samples.arm) == {"latent", "unsteered", "random direction", "prompting"}


def test_steering_by_role_changes_nothing_before_it_speaks(chat_model):
    chat, sae = saewb.chat_prompt(chat_model, CHAT), tiny_models.sae("blocks.1.hook_resid_post")
    with torch.no_grad():
        clean = chat_model(chat.ids)
        with saewb.steer(chat_model, sae, {3: 9.0}, positions=chat.positions("assistant")):
            steered = chat_model(chat.ids)
    assert torch.equal(clean[:, :9], steered[:, :9])
    assert not torch.equal(clean[:, 9], steered[:, 9])


def test_an_answer_that_has_begun_is_continued(chat_model):
    chat = saewb.chat_prompt(chat_model, [CHAT[1], {"role": "assistant", "content": "w3 w4"}])
    assert [token.strip() for token in chat.tokens[-3:]] == ["w21", "w3", "w4"]
    assert chat.roles[-3:] == ("", "assistant", "assistant")


def test_messages_of_a_text():
    text = "Hello.\nsystem: Be brief.\nAnd kind.\nuser: Who?\nassistant:It is "
    assert [(m["role"], m["content"]) for m in messages_of(text)] == [
        ("user", "Hello."),
        ("system", "Be brief.\nAnd kind."),
        ("user", "Who?"),
        ("assistant", "It is "),
    ]


def test_what_is_refused(chat_model):
    with pytest.raises(TypeError, match="role and content"):
        saewb.chat_prompt(chat_model, [{"role": "user"}])
    with pytest.raises(TypeError, match="role and content"):
        saewb.chat_prompt(chat_model, "Hello")
    chat_model.tokenizer.chat_template = None
    with pytest.raises(ValueError, match="no chat template"):
        saewb.chat_prompt(chat_model, CHAT)
