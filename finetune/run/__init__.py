"""The run folder: a run's outputs, written as it goes, each file atomically."""

from finetune.run.curve import draw_loss_curve
from finetune.run.dashboards import Dashboards, prepare_dashboards, resolve_report_to
from finetune.run.facts import final_metrics, training_facts
from finetune.run.folder import RunFolder, keep_aside
from finetune.run.metrics import MetricsCallback, read_metrics
from finetune.run.provenance import collect_provenance
from finetune.run.resuming import check_same_recipe, check_same_rows
from finetune.run.router_load import RouterLoadCallback, draw_router_load

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
    "resolve_report_to",
    "training_facts",
]
