"""The command ``plan``."""

import typer

from fedlora.cli._options import ConfigPath, Json, Methods, Override, parse_names, print_result, say


def plan_command(config: ConfigPath, override: Override = None, methods: Methods = None, as_json: Json = False) -> None:
    """Estimate the costs of a run before it begins: bytes, memory, operations; and report errors in the settings."""
    from fedlora.reporting.tables.plan import tabulate_plan, tabulate_plans
    from fedlora.runs.plan.plan import find_problems, plan_methods
    from fedlora.schema import apply_overrides, read_table

    table = apply_overrides(read_table(config), override or [])
    errors = find_problems(table)
    if errors:
        for sentence in errors:
            say(f"fedlora: {' '.join(sentence.split())}")
        print_result(as_json, {"problems": errors})
        raise typer.Exit(2)
    result = plan_methods(table, parse_names(methods))
    print_result(as_json, result, lambda: tabulate_plan(result[0]) if len(result) == 1 else tabulate_plans(result))
