"""One training: modules, objective, optimizers, schedules, the fit itself and the folder that it leaves."""
