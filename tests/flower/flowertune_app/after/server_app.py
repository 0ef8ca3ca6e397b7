"""The ServerApp of a small instruction-tuning project."""

from flwr.app import ArrayRecord, ConfigRecord, Context, MetricRecord
from flwr.serverapp import Grid, ServerApp
from fedlora.flower import FedLoRA, load
from peft import get_peft_model_state_dict
from safetensors.torch import save_file

from ..task import get_model, load_rows, measure

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    arrays = ArrayRecord(get_peft_model_state_dict(get_model(context.run_config)))
    strategy = FedLoRA(context.run_config["method"], lora_alpha=8, fraction_train=context.run_config["fraction-train"])
    result = strategy.start(
        grid=grid,
        initial_arrays=arrays,
        num_rounds=context.run_config["num-server-rounds"],
        train_config=ConfigRecord({"learning-rate": context.run_config["learning-rate"]}),
        evaluate_fn=get_evaluate_fn(context.run_config),
    )
    save_file(result.arrays.to_torch_state_dict(), context.run_config["save-path"])


def get_evaluate_fn(run_config):
    def evaluate(server_round: int, arrays: ArrayRecord) -> MetricRecord:
        model = get_model(run_config)
        load(model, arrays)
        return MetricRecord({"loss": measure(model, load_rows(0))})

    return evaluate
