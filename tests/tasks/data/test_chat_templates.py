"""Chats in the templates of several families: the tokens that are learnt, decoded, against answers written by hand."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from fedlora.runs.chat import Chat
from fedlora.tasks.data.chat_templates import ChatRenderer
from fedlora.tasks.data.conversations import Conversation
from fedlora.tasks.data.few_shot import select_prompts
from tests.fixtures.chat_templates import (
    AT_THE_END,
    LEAVES_OUT,
    NO_SYSTEM,
    ONE_CALL,
    OPENS_THINKING,
    PLAIN,
    THINKER,
    chat_task,
    decode,
)
from tests.fixtures.networks import write_decoder

WEATHER = {"type": "function", "function": {"name": "weather", "description": "Now", "parameters": {"type": "object"}}}
CALL = {"id": "call00001", "type": "function", "function": {"name": "weather", "arguments": {"city": "Rome"}}}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A model that reads bytes, so that tokens are decoded without loss."""
    folder = tmp_path_factory.mktemp("models") / "decoder"
    write_decoder(folder)
    return str(folder)


def user(text):
    return {"role": "user", "content": text}


def bot(text, **more):
    return {"role": "assistant", "content": text, **more}


def system(text):
    return {"role": "system", "content": text}


def load(folder, model, messages, template, test=None, **settings):
    """Returns the first row's decoded samples, and the notes about the training rows."""
    rows = [{"messages": messages}] if isinstance(messages, list) else [messages]
    data = chat_task(folder, rows, template, test, **settings).load(model, 0)
    return decode(data.train, model), [note for note in data.notes if "training" in note]


SYSTEM_AND_TWO = [system("Be brief."), user("Hi"), bot("Hello"), user("More"), bot("Bye")]


def test_a_refused_system_message_is_folded_into_the_first_turn(tmp_path, model):
    rows, notes = load(tmp_path, model, SYSTEM_AND_TWO, NO_SYSTEM)
    assert rows == [
        (
            "<bos><turn>user\nBe brief.\n\nHi</turn>\n<turn>model\nHello</turn>\n"
            "<turn>user\nMore</turn>\n<turn>model\nBye</turn>\n<eos>",
            ["Hello</turn>\n", "Bye</turn>\n<eos>"],
        )
    ]
    assert notes == [
        "1 of 1 training rows have a system message, which the chat template does not take: it is written at the "
        "beginning of the first user message."
    ]


def test_a_system_message_that_would_be_left_out_is_folded_too(tmp_path, model):
    rows, notes = load(tmp_path, model, SYSTEM_AND_TWO[:3], LEAVES_OUT)
    assert rows == [("<user>Be brief.\n\nHi<end>\n<assistant>Hello<end>\n<eos>", ["Hello<end>\n<eos>"])]
    assert notes[0].startswith("1 of 1 training rows have a system message")


def test_a_system_message_that_cannot_be_folded_is_an_error(tmp_path, model):
    with pytest.raises(ValueError, match=r"does not take row 0 of column 'messages'.*this family has no system role"):
        load(tmp_path, model, [system("Be brief."), bot("Hello"), user("Hi"), bot("Yes")], NO_SYSTEM)


def test_templates_that_take_a_system_message_write_it(tmp_path, model):
    rows, notes = load(tmp_path, model, SYSTEM_AND_TWO, PLAIN)
    assert rows == [
        (
            "<|system|>Be brief.<end>\n<|user|>Hi<end>\n<|assistant|>Hello<end>\n"
            "<|user|>More<end>\n<|assistant|>Bye<end>\n<eos>",
            ["Hello<end>\n", "Bye<end>\n<eos>"],
        )
    ]
    assert notes == []


THOUGHTS = [
    user("Hi"),
    bot("<think>polite</think>\n\nHello"),
    user("2+2?"),
    bot("4", reasoning_content="add"),
    user("Thanks"),
    bot("Welcome"),
]


def test_each_answer_is_a_sample_where_earlier_turns_are_rewritten(tmp_path, model):
    rows, notes = load(tmp_path, model, THOUGHTS, THINKER)
    assert rows == [
        ("[usr]Hi[end]\n[bot]<think>polite</think>Hello[end]\n<eos>", ["<think>polite</think>Hello[end]\n<eos>"]),
        (
            "[usr]Hi[end]\n[bot]Hello[end]\n[usr]2+2?[end]\n[bot]<think>add</think>4[end]\n<eos>",
            ["<think>add</think>4[end]\n<eos>"],
        ),
        (
            "[usr]Hi[end]\n[bot]Hello[end]\n[usr]2+2?[end]\n[bot]4[end]\n"
            "[usr]Thanks[end]\n[bot]<think></think>Welcome[end]\n<eos>",
            ["<think></think>Welcome[end]\n<eos>"],
        ),
    ]
    assert notes == [
        "1 of 1 training rows have several answers and a chat template that writes earlier turns otherwise when later "
        "ones follow: they are learnt in samples of their own, 3 in all (task.turns)."
    ]


@pytest.mark.parametrize("template", [THINKER, PLAIN])
def test_only_the_last_answer_is_learnt_if_asked(tmp_path, model, template):
    rows, notes = load(tmp_path, model, THOUGHTS, template, turns="last")
    end = "<think></think>Welcome[end]\n<eos>" if template == THINKER else "Welcome<end>\n<eos>"
    assert [spans for _, spans in rows] == [[end]]
    assert "Hello" in rows[0][0] and "Thanks" in rows[0][0] and notes == []


def test_answers_share_a_sample_while_the_text_before_them_stays(tmp_path, model):
    """Within one question this family keeps the thinking, so only the next question begins a sample."""
    messages = [
        user("Rome?"),
        bot("", reasoning_content="look", tool_calls=[CALL]),
        {"role": "tool", "content": "sunny", "name": "weather"},
        bot("<think>fine</think>Sunny."),
        user("Thanks"),
        bot("Welcome"),
    ]
    called = '<think>look</think><call>{"name": "weather", "arguments": {"city": "Rome"}}</call>[end]\n'
    rows, _ = load(tmp_path, model, {"messages": messages, "tools": [WEATHER]}, THINKER)
    tools = f"[sys]tools: {json.dumps([WEATHER])}[end]\n"
    assert rows == [
        (
            f"{tools}[usr]Rome?[end]\n[bot]{called}[tool]sunny[end]\n[bot]<think>fine</think>Sunny.[end]\n<eos>",
            [called, "<think>fine</think>Sunny.[end]\n<eos>"],
        ),
        (
            f"{tools}[usr]Rome?[end]\n[bot]{called.replace('<think>look</think>', '')}[tool]sunny[end]\n"
            "[bot]Sunny.[end]\n[usr]Thanks[end]\n[bot]<think></think>Welcome[end]\n<eos>",
            ["<think></think>Welcome[end]\n<eos>"],
        ),
    ]


def test_a_system_message_before_the_last_turn_makes_samples(tmp_path, model):
    """No prefix of it stays, and the system message is taken, so it is not folded."""
    rows, _ = load(tmp_path, model, SYSTEM_AND_TWO, AT_THE_END)
    assert rows == [
        ("{ask}Be brief.\n\nHi{/ask}Hello{/s}<eos>", ["Hello{/s}<eos>"]),
        ("{ask}Hi{/ask}Hello{/s}{ask}Be brief.\n\nMore{/ask}Bye{/s}<eos>", ["Bye{/s}<eos>"]),
    ]


CALLED = [user("Rome?"), bot(None, tool_calls=[CALL]), {"role": "tool", "content": "sunny", "tool_call_id": "call00001"}, bot("Sunny.")]  # fmt: skip


def test_tool_calls_are_learnt_in_full(tmp_path, model):
    tools = json.dumps([WEATHER])
    for form in ({"tools": [WEATHER]}, {"tools": tools}, {"tools": [WEATHER["function"]]}):
        rows, notes = load(tmp_path, model, {"messages": CALLED, **form}, ONE_CALL)
        called = '{"name": "weather", "parameters": {"city": "Rome"}}<eot>'
        assert rows == [
            (
                f"<h>user</h>Functions: {tools}\nRome?<eot><h>assistant</h>{called}"
                '<h>result</h>"sunny"<eot><h>assistant</h>Sunny.<eot><eos>',
                [called, "Sunny.<eot><eos>"],
            )
        ]
        assert notes == []


def test_a_call_id_reaches_the_template(tmp_path, model):
    rows, _ = load(tmp_path, model, {"messages": CALLED, "tools": [WEATHER]}, AT_THE_END, turns="last")
    assert rows[0][0].endswith("{result}call00001 sunny{/result}Sunny.{/s}<eos>")
    assert rows[0][1] == ["Sunny.{/s}<eos>"]
    with pytest.raises(ValueError, match="does not take row 0.*a result needs the id"):
        anonymous = [{k: v for k, v in m.items() if k != "tool_call_id"} for m in CALLED]
        load(tmp_path, model, anonymous, AT_THE_END)


@pytest.mark.parametrize(
    "row,template,sentence",
    [
        ({"messages": CALLED[:2]}, LEAVES_OUT, "leaves a tool call of row 0 of column 'messages'.* out"),
        ({"messages": CALLED[:2]}, PLAIN, "leaves a tool call of row 0"),
        ({"messages": [*CALLED[:1], bot("Let me see."), CALLED[2], bot("Sunny.")]}, LEAVES_OUT, "leaves a message by 'tool'"),
        ({"messages": [user("Rome?"), bot("Let me see.", tool_calls=[CALL])]}, ONE_CALL, "leaves a message by 'assistant'"),
        ({"messages": CALLED[:1] + CALLED[3:], "tools": [WEATHER]}, PLAIN, "leaves the tools of row 0.*task.tools = \"\""),
        ({"messages": [user("Both?"), bot("", tool_calls=[CALL, CALL])]}, ONE_CALL, "does not take row 0.*only one call"),
        ({"messages": [user("Hi"), user("Ho"), bot("Hello")]}, NO_SYSTEM, "does not take row 0.*turns must alternate"),
        ({"messages": [user("Hi"), bot("Hello")]}, OPENS_THINKING, "the beginning of an answer, otherwise when the answer"),
    ],
)  # fmt: skip
def test_what_a_template_cannot_write_is_refused(tmp_path, model, row, template, sentence):
    with pytest.raises(ValueError, match=sentence):
        load(tmp_path, model, row, template)


def test_a_column_of_tools_can_be_left_out(tmp_path, model):
    row = {"messages": [user("Hi"), bot("Hello")], "tools": ["hammer"], "own": [WEATHER]}
    with pytest.raises(ValueError, match=r"row 0 of column 'tools' \(task.tools\) is no list of tools"):
        load(tmp_path, model, row, ONE_CALL)
    assert (
        load(tmp_path, model, row, ONE_CALL, tools="")[0][0][0] == "<h>user</h>Hi<eot><h>assistant</h>Hello<eot><eos>"
    )
    assert "Functions: [{" in load(tmp_path, model, row, ONE_CALL, tools="own")[0][0][0]


def test_thinking_that_the_template_leaves_out_is_counted(tmp_path, model):
    rows, notes = load(tmp_path, model, THOUGHTS, PLAIN)
    assert rows[0][1] == ["<think>polite</think>\n\nHello<end>\n", "4<end>\n", "Welcome<end>\n<eos>"]
    assert notes == [
        "1 of 1 training rows have thinking that the chat template leaves out of the answers that are learnt."
    ]


def test_columns_follow_the_samples_of_a_row(tmp_path, model):
    """Clients, kinds for partitions by label, and what is dropped, in a data set whose rows have 3, 0, 1 and 2 samples."""
    talks = [THOUGHTS, [user("Anyone?")], THOUGHTS[:2], THOUGHTS[:4]]
    rows = [{"messages": x, "who": f"c{i}", "kind": "ab"[i % 2]} for i, x in enumerate(talks)]
    data = chat_task(tmp_path, rows, THINKER, label="kind").load(model, 0, "who")
    assert data.train.groups == ("c0", "c0", "c0", "c2", "c3", "c3")
    assert data.train.strata.tolist() == [0, 0, 0, 0, 1, 1] and len(data.train.labels) == 6
    assert data.notes[:2] == (
        "2 of 4 training rows have several answers and a chat template that writes earlier turns otherwise when later "
        "ones follow: they are learnt in samples of their own, 7 in all (task.turns).",
        "1 of 7 training rows were left out: nothing is left to learn in them.",
    )
    last = chat_task(tmp_path, rows, THINKER, label="kind", turns="last").load(model, 0, "who")
    assert last.train.groups == ("c0", "c2", "c3") and last.train.strata.tolist() == [0, 0, 1]


@pytest.mark.parametrize("template", [THINKER, NO_SYSTEM, ONE_CALL, AT_THE_END, PLAIN])
@pytest.mark.parametrize("turns", ["last", "all"])
def test_generation_reads_what_stood_before_the_learnt_answer(tmp_path, model, template, turns):
    """The prompt of exact_match, and that of ``fedlora chat``, have the tokens before the last learnt span."""
    messages = [system("Be brief."), user("Hi"), bot("Hello"), user("2+2?"), bot("<think>add</think>It is 4.")]
    if turns == "all" and template in (THINKER, AT_THE_END):
        with pytest.raises(ValueError, match=r"grades one answer a row, but 1 of 1 test rows .* task.turns = 'last'"):
            load(tmp_path, model, messages, template, metric="exact_match", turns=turns)
        return
    asked = chat_task(tmp_path, [{"messages": messages}], template, metric="exact_match", answer="text", turns=turns)
    test = asked.load(model, 0).test
    learnt = test.features["learnt"].tolist()
    start = max(i for i, flag in enumerate(learnt) if flag and not learnt[i - 1])
    (prompt,) = select_prompts(test.features, torch.tensor([0]))
    assert prompt == test.features["input_ids"][:start].tolist()
    assert test.texts[0]["gold"] == "It is 4."
    chat = Chat(None, asked.preprocessor(model), None, 999, system="Be brief.")
    assert chat.prompt(messages[1:4]) == test.texts[0]["prompt"]


def test_an_answer_column_and_calls_in_exact_match(tmp_path, model):
    rows = [{"messages": CALLED[:2], "gold": "12"}]
    with pytest.raises(ValueError, match="test row 0 ends with an answer without text.*task.answer_column"):
        chat_task(tmp_path, rows, ONE_CALL, metric="exact_match", answer="text").load(model, 0)
    data = chat_task(tmp_path, rows, ONE_CALL, metric="exact_match", answer_column="gold").load(model, 0)
    assert data.test.texts[0]["gold"] == "12"


@pytest.fixture(scope="module")
def trl_templates():
    """The chat templates of known models, as TRL has them; those for training mark the answers for a mask."""
    spec = importlib.util.find_spec("trl")
    folder = Path(spec.origin).parent / "chat_templates" if spec and spec.origin else None
    if folder is None or not (folder / "qwen3_training.jinja").is_file():
        pytest.skip("needs the chat templates of TRL 1.0 or newer")
    return folder


TALKS = {
    "system": ([system("Be brief."), user("Hi"), bot("Hello"), user("More"), bot("Bye")], None),
    "thinking": ([user("Hi"), bot("<think>polite</think>\n\nHello"), user("2?"), bot("<think>add</think>\n\n4")], None),
    "tools": ([user("Rome?"), bot("", tool_calls=[CALL]), {"role": "tool", "content": "sunny"}, bot("Sunny.")], [WEATHER]),
}  # fmt: skip


@pytest.mark.parametrize("talk", TALKS)
@pytest.mark.parametrize("family", ["qwen3", "qwen3_instruct_2507", "gemma", "gemma3", "llama3", "lfm2_v2", "cohere2"])
def test_what_is_learnt_is_what_trl_masks(trl_templates, model, family, talk):
    """Token by token, up to the white space after a turn, which only the mask of TRL leaves out."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.chat_template = (trl_templates / f"{family}_training.jinja").read_text()
    messages, tools = TALKS[talk]
    answers = tuple(i for i, message in enumerate(messages) if message["role"] == "assistant")
    renderer, conversation = ChatRenderer(tokenizer), Conversation(messages, answers, tools, "row 0")
    if tools and family in ("gemma", "gemma3", "llama3", "cohere2"):
        with pytest.raises(ValueError, match="row 0"):
            renderer.render(conversation)
        return
    (segments,) = renderer.render(conversation)
    if not renderer.takes_system:
        messages = conversation.with_folded_system().messages
    masked = tokenizer.apply_chat_template(messages, tools=tools, return_dict=True, return_assistant_tokens_mask=True)
    text, learnt = "".join(text for text, _ in segments), "".join(text for text, flag in segments if flag)
    assert text == tokenizer.decode(masked["input_ids"])
    chosen = tokenizer.decode([i for i, flag in zip(masked["input_ids"], masked["assistant_masks"]) if flag])
    assert learnt.split() == chosen.split() and chosen


def test_the_published_templates_of_qwen3_gemma_and_llama(trl_templates, tmp_path, model):
    def learnt(family, talk):
        messages, tools = TALKS[talk]
        row = {"messages": messages, **({"tools": tools} if tools else {})}
        template = (trl_templates / f"{family}.jinja").read_text()
        return [spans for _, spans in load(tmp_path, model, row, template)[0]]

    call = '{"name": "weather", "arguments": {"city": "Rome"}}'
    assert learnt("qwen3", "thinking") == [
        ["<think>\npolite\n</think>\n\nHello<|im_end|>\n<eos>"],
        ["<think>\nadd\n</think>\n\n4<|im_end|>\n<eos>"],
    ]
    assert learnt("qwen3", "tools") == [
        [f"<think>\n\n</think>\n\n<tool_call>\n{call}\n</tool_call><|im_end|>\n<eos>"],
        ["<think>\n\n</think>\n\nSunny.<|im_end|>\n<eos>"],
    ]
    assert learnt("gemma", "system") == [["Hello<end_of_turn>\n", "Bye<end_of_turn>\n<eos>"]]
    assert learnt("llama3_1", "tools") == [
        ['{"name": "weather", "parameters": {"city": "Rome"}}<|eot_id|>', "Sunny.<|eot_id|><eos>"]
    ]
