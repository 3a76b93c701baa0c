"""The run folder: a run's outputs, written as it goes, each file atomically."""

from finetune.run.checkpoints import newest_step
from finetune.run.dashboards import Dashboards, prepare_dashboards, resolve_report_to
from finetune.run.lines import append_line, read_metrics, repair_lines, write_waiting_lines
from finetune.run.metrics import MetricsCallback, draw_loss_curve, final_metrics, training_facts
from finetune.run.provenance import collect_provenance
from finetune.run.resume import (
    Change,
    Identity,
    check_allowed,
    check_keys,
    choose_checkpoint,
    earlier_recipe,
    identity_of,
    recipe_changes,
    recorded_template_day,
    row_changes,
)
from finetune.run.router_load import RouterLoadCallback, draw_router_load
from finetune.run.run_folder import RunFolder, keep_aside
from finetune.run.run_lock import lock_run, say_that_it_ends, unlock_run

__all__ = [
    "Change",
    "Dashboards",
    "Identity",
    "MetricsCallback",
    "RouterLoadCallback",
    "RunFolder",
    "append_line",
    "check_allowed",
    "check_keys",
    "choose_checkpoint",
    "collect_provenance",
    "draw_loss_curve",
    "draw_router_load",
    "earlier_recipe",
    "final_metrics",
    "identity_of",
    "keep_aside",
    "lock_run",
    "newest_step",
    "prepare_dashboards",
    "read_metrics",
    "recipe_changes",
    "recorded_template_day",
    "repair_lines",
    "resolve_report_to",
    "row_changes",
    "say_that_it_ends",
    "training_facts",
    "unlock_run",
    "write_waiting_lines",
]
