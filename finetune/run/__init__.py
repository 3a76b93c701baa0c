"""The run folder: a run's outputs, written as it goes, each file atomically."""

from finetune.run.dashboards import Dashboards, prepare_dashboards, resolve_report_to
from finetune.run.metrics import MetricsCallback, draw_loss_curve, final_metrics, read_metrics, training_facts
from finetune.run.provenance import collect_provenance
from finetune.run.router_load import RouterLoadCallback, draw_router_load
from finetune.run.run_folder import RunFolder, check_same_recipe, check_same_rows, keep_aside, recorded_template_day

__all__ = [
    "Dashboards",
    "MetricsCallback",
    "RouterLoadCallback",
    "RunFolder",
    "check_same_recipe",
    "check_same_rows",
    "collect_provenance",
    "draw_loss_curve",
    "draw_router_load",
    "final_metrics",
    "keep_aside",
    "prepare_dashboards",
    "read_metrics",
    "recorded_template_day",
    "resolve_report_to",
    "training_facts",
]
