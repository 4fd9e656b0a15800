"""Plots of what a detector found, in the style of scikit-learn's displays; they need matplotlib."""

from vqad.display._codebook import CodebookDisplay
from vqad.display._scores import AnomalyMapDisplay, ScoreDistributionDisplay

__all__ = ["AnomalyMapDisplay", "CodebookDisplay", "ScoreDistributionDisplay"]
