"""HTML reports of a detector's results, and overlays of anomaly maps."""

from vqad.report._overlay import heat_colours, overlay
from vqad.report._page import write_report
from vqad.report._verdicts import Verdicts, judge

__all__ = ["Verdicts", "heat_colours", "judge", "overlay", "write_report"]
