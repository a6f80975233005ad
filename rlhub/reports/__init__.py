"""What people look at: the page of a run, plots, and the denoising of completions in the terminal and on a page."""
