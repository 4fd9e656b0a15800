"""Pictures of what a detector found, in the manner of scikit-learn's displays; matplotlib is needed to plot them."""

from vqad.display._codebook import CodebookDisplay
from vqad.display._scores import AnomalyMapDisplay, ScoreDistributionDisplay

__all__ = ["AnomalyMapDisplay", "CodebookDisplay", "ScoreDistributionDisplay"]
