"""The ClientApp of a small instruction-tuning project."""

from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from peft import get_peft_model_state_dict, set_peft_model_state_dict

from ..task import fit, get_model, load_rows, measure

app = ClientApp()


@app.train()
def train(msg: Message, context: Context) -> Message:
    rows = load_rows(context.node_config["partition-id"])
    model = get_model(context.node_config)
    set_peft_model_state_dict(model, msg.content["arrays"].to_torch_state_dict())

    rate = msg.content["config"]["learning-rate"] / msg.content["config"]["server-round"]
    loss = fit(model, rows, rate)

    arrays = ArrayRecord(get_peft_model_state_dict(model))
    metrics = MetricRecord({"train_loss": loss, "num-examples": len(rows)})
    return Message(RecordDict({"arrays": arrays, "metrics": metrics}), reply_to=msg)


@app.evaluate()
def evaluate(msg: Message, context: Context) -> Message:
    rows = load_rows(context.node_config["partition-id"])
    model = get_model(context.node_config)
    set_peft_model_state_dict(model, msg.content["arrays"].to_torch_state_dict())
    metrics = MetricRecord({"loss": measure(model, rows), "num-examples": len(rows)})
    return Message(RecordDict({"metrics": metrics}), reply_to=msg)
