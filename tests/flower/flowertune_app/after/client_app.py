"""The ClientApp of a small instruction-tuning project."""

from flwr.app import Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from fedlora.flower import receive, send

from ..task import fit, get_model, load_rows, measure

app = ClientApp()


@app.train()
def train(msg: Message, context: Context) -> Message:
    rows = load_rows(context.node_config["partition-id"])
    model = get_model(context.node_config)
    receive(model, msg, context)

    rate = msg.content["config"]["learning-rate"] / msg.content["config"]["server-round"]
    loss = fit(model, rows, rate)

    arrays = send(model, msg, context)
    metrics = MetricRecord({"train_loss": loss, "num-examples": len(rows)})
    return Message(RecordDict({"arrays": arrays, "metrics": metrics}), reply_to=msg)


@app.evaluate()
def evaluate(msg: Message, context: Context) -> Message:
    rows = load_rows(context.node_config["partition-id"])
    model = get_model(context.node_config)
    receive(model, msg, context)
    metrics = MetricRecord({"loss": measure(model, rows), "num-examples": len(rows)})
    return Message(RecordDict({"metrics": metrics}), reply_to=msg)
