"""Rows of chat data in the forms of public data sets, read as messages, or refused by row."""

import json

import datasets
import pytest

from fedlora.tasks.causal_lm import CausalLM
from fedlora.tasks.data.conversations import find_columns, read_conversations, remove_thinking
from fedlora.tasks.data.tables import TextFormat, read_text_files
from tests.fixtures.chat_templates import PLAIN, chat_task, decode
from tests.fixtures.networks import write_decoder


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "decoder"
    write_decoder(folder)
    return str(folder)


def read(folder, row, columns=None, tools=None):
    """Returns the conversation of a file's only row."""
    (folder / "rows.jsonl").write_text(json.dumps(row) + "\n")
    split = read_text_files([folder / "rows.jsonl"], "json", False, TextFormat())
    return read_conversations(split, columns or find_columns([split]), tools)[0]


def turns(conversation):
    return [(message["role"], message["content"]) for message in conversation.messages], conversation.answers


HI = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
SHARED = [
    {"from": "system", "value": "Be kind."},
    {"from": "human", "value": "Hi"},
    {"from": "gpt", "value": "Hello"},
    {"from": "user", "value": "Rome?"},
    {"from": "function_call", "value": '{"name": "weather", "arguments": {"city": "Rome"}}'},
    {"from": "observation", "value": "sunny"},
    {"from": "assistant", "value": "Sunny."},
]


@pytest.mark.parametrize("column", ["conversations", "messages", "talk"])
def test_sharegpt(tmp_path, column):
    conversation = read(tmp_path, {column: SHARED}, None if column != "talk" else ("talk",))
    assert turns(conversation) == (
        [("system", "Be kind."), ("user", "Hi"), ("assistant", "Hello"), ("user", "Rome?"), ("assistant", ""),
         ("tool", "sunny"), ("assistant", "Sunny.")],
        (2, 4, 6),
    )  # fmt: skip
    call = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Rome"}}}
    assert conversation.messages[4]["tool_calls"] == [call]


def test_a_completion_alone_is_learnt(tmp_path):
    row = {
        "prompt": [*HI, {"role": "user", "content": "More"}],
        "completion": [{"role": "assistant", "content": "Bye"}],
    }
    conversation = read(tmp_path, row)
    assert turns(conversation)[1] == (3,) and conversation.last_answer == "Bye"
    assert read(tmp_path, {"q": row["prompt"], "a": row["completion"]}, ("q", "a")).messages == conversation.messages


def test_usual_columns_in_order(tmp_path):
    row = {"messages": HI, "conversations": SHARED, "prompt": HI[:1], "completion": HI[1:], "text": "x"}
    found = []
    for name in ("messages", "conversations", "prompt"):
        (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
        found.append(find_columns([read_text_files([tmp_path / "rows.jsonl"], "json", False, TextFormat())]))
        del row[name]
    assert found == [("messages",), ("conversations",), ("prompt", "completion")]
    split = datasets.Dataset.from_dict({"prompt": ["a"], "completion": ["b"], "conversations": ["three of them"]})
    assert find_columns([split]) == (), "texts are no messages"


@pytest.mark.parametrize(
    "message,expected",
    [
        ({"content": [{"type": "text", "text": "It is "}, {"type": "text", "text": "4."}]}, {"content": "It is 4."}),
        ({"content": "4", "reasoning_content": "add"}, {"content": "4", "reasoning_content": "add"}),
        ({"content": "4", "thinking": "add", "name": "calc"}, {"content": "4", "thinking": "add"}),
        ({"content": "4", "reasoning_content": None, "tool_calls": None}, {"content": "4"}),
        ({"content": "4", "tool_calls": []}, {"content": "4"}),
        ({"function_call": {"name": "f", "arguments": '{"x": null}'}},
         {"content": "", "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {"x": None}}}]}),
        ({"content": None, "tool_calls": [{"name": "f", "arguments": None}]},
         {"content": "", "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {}}}]}),
    ],
)  # fmt: skip
def test_answers(tmp_path, message, expected):
    conversation = read(tmp_path, {"messages": [HI[0], {"role": "assistant", **message}]})
    assert conversation.messages[1] == {"role": "assistant", **expected} and conversation.answers == (1,)


@pytest.mark.parametrize(
    "message",
    [
        {"content": " \n"},
        {"content": ""},
        {"content": "Hello", "weight": 0},
        {"content": [{"type": "text", "text": ""}]},
    ],
)
def test_answers_that_are_not_learnt(tmp_path, message):
    conversation = read(tmp_path, {"messages": [HI[0], {"role": "assistant", **message}, *HI]})
    assert conversation.answers == (3,)


CALL = {"name": "f", "arguments": {}}


@pytest.mark.parametrize(
    "message,sentence",
    [
        ({"role": "assistant", "content": None}, "message 1 in row 0 of column 'messages'.*has neither a content nor"),
        ({"role": "assistant"}, "message 1 in row 0 .*neither a content nor tool calls"),
        ({"role": "user", "content": None, "tool_calls": [CALL]}, "by 'user' and has tool calls"),
        ({"role": "user", "content": [{"type": "image"}]}, "message 1 in row 0 .*a part of type 'image'; only parts with"),
        ({"role": "user", "content": ["text"]}, r"has the content \['text'\]; a content is text, or parts"),
        ({"role": "user", "content": 3}, "has the content 3"),
        ({"content": "x"}, "row 0 of column 'messages'.* is no list of messages"),
        ("x", "is no list of messages"),
        ({"from": "narrator", "value": "x"}, "message 1 in row 0 .*from 'narrator', which is no speaker"),
        ({"from": "function_call", "value": "f(x)"}, "a function call that is no JSON"),
        ({"from": "gpt", "value": None}, "neither a content nor"),
        ({"role": "assistant", "content": "x", "weight": 0.5}, "has the weight 0.5; a weight is 1"),
        ({"role": "assistant", "content": "x", "thinking": 3}, "has a thinking that is no text: 3"),
        ({"role": "assistant", "tool_calls": "f"}, "has tool_calls that are no list"),
        ({"role": "assistant", "tool_calls": [{"arguments": {}}]}, "a tool call without a name"),
        ({"role": "assistant", "tool_calls": [{**CALL, "arguments": "{x"}]}, "arguments that is no JSON"),
        ({"role": "assistant", "tool_calls": [{**CALL, "arguments": [1]}]}, "arguments that are no JSON object"),
    ],
)  # fmt: skip
def test_refused_messages(tmp_path, message, sentence):
    with pytest.raises(ValueError, match=sentence):
        read(tmp_path, {"messages": [HI[0], message]})


@pytest.mark.parametrize("tools", ["hammer", 3, {"name": "f"}, [3], [{"function": "f"}], "[1]"])
def test_refused_tools(tmp_path, tools):
    with pytest.raises(ValueError, match=r"row 0 of column 'tools' \(task.tools\) .*no (list of tools|JSON)"):
        read(tmp_path, {"messages": HI, "tools": tools})


def test_rows_of_arrow_have_no_keys_of_others(tmp_path):
    """Parquet gives every message and every call the keys of all; JSON lines keep a null that was written."""
    calls = [{"function": {"name": name, "arguments": {key: 1}}} for name, key in (("f", "x"), ("g", "y"))]
    messages = [HI[0], {"role": "assistant", "content": None, "tool_calls": calls}]
    arrow = datasets.Dataset.from_list([{"messages": messages}])
    assert arrow[0]["messages"][1]["tool_calls"][0]["function"]["arguments"] == {"x": 1, "y": None}
    (stored,) = read_conversations(arrow, ("messages",), None)
    assert stored.messages == read(tmp_path, {"messages": messages}).messages
    assert [call["function"]["arguments"] for call in stored.messages[1]["tool_calls"]] == [{"x": 1}, {"y": 1}]
    assert stored.messages[0] == HI[0]


def test_thinking_is_no_part_of_an_answer():
    assert remove_thinking("\n<think>\n1 + 1\n</think>\n\nIt is 2. <think>") == "It is 2. <think>"
    assert remove_thinking("It is <think>2</think>") == "It is <think>2</think>"


def test_rows_of_every_form_train_alike(tmp_path, model):
    """The same talk as messages, as ShareGPT, as prompt and completion, and in parts, through the task."""
    parts = [{**message, "content": [{"type": "text", "text": message["content"]}]} for message in HI]
    sharegpt = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]
    for row in (
        {"messages": HI},
        {"conversations": sharegpt},
        {"prompt": HI[:1], "completion": HI[1:]},
        {"messages": parts},
    ):
        data = chat_task(tmp_path, [row], PLAIN).load(model, 0)
        assert decode(data.train, model) == [("<|user|>Hi<end>\n<|assistant|>Hello<end>\n<eos>", ["Hello<end>\n<eos>"])]


def test_settings(tmp_path, model):
    row = {"q": HI[:1], "a": HI[1:]}
    assert len(chat_task(tmp_path, [row], PLAIN, messages=["q", "a"]).load(model, 0).train) == 1
    with pytest.raises(ValueError, match="column 'q' .* is not text; set task.messages if it holds chat messages"):
        chat_task(tmp_path, [row], PLAIN, prompt="q", response="a").load(model, 0)
    with pytest.raises(ValueError, match="task.messages names 3 columns; it is one column, or two"):
        CausalLM("x", messages=["a", "b", "c"])
    with pytest.raises(ValueError, match="row 0 .*no answer by 'assistant', but a message by 'bot'; roles are"):
        odd = [HI[0], {"role": "bot", "content": "Hello"}]
        chat_task(tmp_path, [{"messages": odd}], PLAIN).load(model, 0)
