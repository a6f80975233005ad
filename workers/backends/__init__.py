"""What turns gradients into weights. A backend is built as `Backend(network, optimizer_config, total_steps, learner_config)` and has

forward(function)           function(network); every rank must make the same number of calls
backward(loss)              accumulate gradients of a scalar; any number of calls before
step() -> (grad_norm, lr)   which clips, updates and clears
network                     the module whose parameters are trained
full_parameters(trained_only=False)
                            context manager under which every parameter is whole on every rank, or those of `training_parameters` alone
save(folder), load(folder)  optimizer and scheduler state, and the weights they belong to
"""
