"""From (parameters, losses) to the optimal parameters: features, regressors, proposals."""
