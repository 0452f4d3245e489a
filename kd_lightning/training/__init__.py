"""Training: modules, objective, optimizers, schedules, the fit and its folder."""
